"""targets, estimate and fit, through the command line."""

from __future__ import annotations

import json

import onnx
import pytest
from onnx import TensorProto, helper

from dimefm_edge import cli


def _json(capsys, *words):
    code = cli.main([*map(str, words), "--json"])
    return code, json.loads(capsys.readouterr().out)


def test_targets(capsys):
    code, values = _json(capsys, "targets")
    assert code == 0
    found = {t["name"]: t for t in values["targets"]}
    assert {"jetson-agx-orin", "jetson-orin-nano", "local"} <= set(found)
    assert all(t["sources"] and t["full_name"] == f"{t['name']}@{t['mode']}"
               for t in found.values())  # fmt: skip
    assert "jetson-orin" in found["jetson-agx-orin"]["aliases"]
    assert cli.main(["targets"]) == 0
    shown = capsys.readouterr().out
    assert "jetson-orin-nano" in shown
    assert "jetson-orin, jetson-agx-orin-64gb, agx-orin" in shown


def test_targets_and_estimate_agree_on_how_well_a_device_is_known(capsys):
    found = {t["name"]: t["basis"] for t in _json(capsys, "targets")[1]["targets"]}
    assert found["raspberry-pi-5"] == "published"
    assert found["jetson-agx-orin"] == "roofline"  # of 30w; the published rows are of maxn
    for name, basis in found.items():
        words = ("estimate", "vit-nano", "--target", name, "--image-size", "32")
        assert _json(capsys, *words)[1]["basis"] == basis, name


@pytest.mark.parametrize("model", ["vit-nano", "timm:resnet18"])
def test_estimate_by_name(model, capsys):
    words = ("estimate", model, "--target", "jetson-orin@30w", "--image-size", "64")
    code, values = _json(capsys, *words)
    assert code == 0
    assert values["target"] == "jetson-agx-orin@30w"
    assert 0 < values["low_ms"] < values["latency_ms"] < values["high_ms"]
    assert values["params_m"] > 0.1


def test_estimate_of_files_agrees(tiny_run_dir, tiny_bundle_dir, tiny_teacher_dir, capsys):
    paths = (tiny_run_dir, tiny_bundle_dir, tiny_bundle_dir / "model.onnx", tiny_teacher_dir)
    results = [_json(capsys, "estimate", path)[1] for path in paths]
    run, bundle, graph, teacher = (values["gmacs"] for values in results)
    assert bundle == graph
    assert run == pytest.approx(bundle, rel=0.02)
    assert teacher > run


@pytest.fixture(scope="module")
def other_bundles(tiny_run_dir, tmp_path_factory):
    """The tiny run in int8, and as a graph that takes images of any size."""
    folder, code = tmp_path_factory.mktemp("other_bundles"), 0
    words = ["export", str(tiny_run_dir), "--target", "x86-cpu", "--images", "scenes"]
    for name, flags in {"int8": ["--precision", "int8"], "any": ["--input", "image"]}.items():
        code |= cli.main([*words, *flags, "--out", str(folder / name)])
    assert code == 0
    return folder


def test_estimate_takes_the_precision_of_the_graph(other_bundles, tiny_bundle_dir, capsys):
    on_cpu, bundle = ("--target", "x86-cpu"), other_bundles / "int8"
    for path in (bundle, bundle / "model.onnx"):
        values = _json(capsys, "estimate", path, *on_cpu)[1]
        assert values["precision"] == "int8"
        assert _json(capsys, "estimate", path, *on_cpu, "--precision", "int8")[1] == values
        wins = _json(capsys, "estimate", path, *on_cpu, "--precision", "fp32")[1]
        assert wins["precision"] == "fp32"
        assert wins["latency_ms"] != values["latency_ms"]
    assert cli.main(["estimate", str(tiny_bundle_dir), "--target", "snapdragon-x-elite"]) == 0
    told = capsys.readouterr().out
    assert "onnxruntime fp16" in told
    assert "the graph is in fp32; --precision says what it is to run in there" in told


def test_a_graph_of_any_size_is_estimated_at_its_own(other_bundles, capsys):
    bundle = other_bundles / "any"
    for path in (bundle, bundle / "model.onnx"):
        code, values = _json(capsys, "estimate", path, "--target", "x86-cpu")
        assert code == 0
        given = _json(capsys, "estimate", path, "--target", "x86-cpu", "--image-size", "32")[1]
        assert given == values
        larger = _json(capsys, "estimate", path, "--target", "x86-cpu", "--image-size", "640")
        assert larger[0] == 0
        assert larger[1]["latency_ms"] > values["latency_ms"]


def test_sizes_that_a_model_does_not_have_are_refused(
    tiny_run_dir, tiny_bundle_dir, tiny_teacher_dir, capsys
):
    graph = tiny_bundle_dir / "model.onnx"
    for path in (tiny_run_dir, tiny_bundle_dir, tiny_teacher_dir, graph):
        code, values = _json(capsys, "estimate", path, "--image-size", "64")
        assert (code, values["hint"]) == (2, "drop --image-size")
        assert "--image-size: the model's is 32" in values["error"]
        code, values = _json(capsys, "estimate", path, "--embed-dim", "64")
        assert (code, values["hint"]) == (2, "drop --embed-dim")
        own = "fixed" if path == graph else "16"
        assert f"--embed-dim: the model's is {own}" in values["error"]
        assert cli.main(["estimate", str(path), "--image-size", "32"]) == 0
        capsys.readouterr()


@pytest.mark.parametrize(
    "words",
    [
        ("--target", "local"), ("--precision", "int8"), ("--batch-size", "2"),
        ("--image-size", "64"), ("--embed-dim", "64"), ("--config", "run.toml"),
    ],
    ids=lambda words: words[0],
)  # fmt: skip
def test_a_table_refuses_what_is_for_one_model(words, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run.toml").write_text('target = "local"\n')
    source, out = tmp_path / "in.csv", tmp_path / "out.csv"
    source.write_text("device,runtime,precision,timm_name\n")
    code, values = _json(capsys, "estimate", "--rows", source, "--out", out, *words)
    assert code == 2
    assert f"{words[0]} is for one model" in values["error"]
    assert not out.exists()


def test_estimate_names_what_is_wrong(capsys, tmp_path):
    assert cli.main(["estimate", "vit-nano", "--precision", "int7"]) == 2
    assert "unknown precision" in capsys.readouterr().err
    assert cli.main(["estimate", "vit-nano", "--batch-size", "0"]) == 2
    assert "must be positive" in capsys.readouterr().err
    assert cli.main(["estimate", str(tmp_path / "gone.onnx")]) == 2
    assert "no ONNX file at" in capsys.readouterr().err
    assert cli.main(["estimate", "vit-nano", "--out", str(tmp_path / "x.csv")]) == 2
    assert "--out is where the estimates of --rows go" in capsys.readouterr().err


def test_fit_chooses_and_draws(capsys, tmp_path):
    plot = tmp_path / "fit.png"
    words = ("fit", "--latency-ms", "0.8", "--image-size", "32", "--embed-dim", "16")
    code, values = _json(capsys, *words, "--families", "vit", "--plot", plot)
    assert code == 0
    assert values["budget_ms"] == 0.8
    assert values["chosen"]["image_size"] == 32
    chosen = next(c for c in values["candidates"] if c["spec"] == values["chosen"])
    assert chosen["fits"]
    assert chosen["latency_ms"] <= 0.8
    assert plot.read_bytes().startswith(b"\x89PNG")
    assert cli.main([*words, "--families", "vit"]) == 0
    assert f"*  {values['chosen']['name']}" in capsys.readouterr().out


def test_fit_for_a_teacher_takes_its_sizes(tiny_teacher_dir, capsys):
    words = ("fit", "--teacher", tiny_teacher_dir, "--families", "vit", "--latency-ms", "1")
    code, values = _json(capsys, *words)
    assert code == 0
    assert (values["chosen"]["image_size"], values["chosen"]["embed_dim"]) == (32, 16)
    assert any(c["inherits"] for c in values["candidates"])
    assert values["teacher_ms"] < 1
    assert cli.main([str(word) for word in words]) == 0
    told = capsys.readouterr().out
    assert f"dimefm-edge export --teacher {tiny_teacher_dir} --target jetson-agx-orin@30w" in told


def test_a_budget_that_none_meets_is_exit_3_with_one_that_would_do(capsys):
    words = ["fit", "--latency-ms", "0.0001", "--image-size", "32", "--embed-dim", "16"]
    words += ["--families", "vit"]
    code, values = _json(capsys, *words)
    assert code == values["exit_code"] == 3
    assert "no student meets" in values["error"]
    assert cli.main([*words, *values["hint"].split()]) == 0


def test_estimate_of_a_table(capsys, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    source, out = tmp_path / "in.csv", tmp_path / "out.csv"
    source.write_text(
        "device,runtime,precision,batch,timm_name_if_any,resolution\n"
        "Raspberry Pi 5,ONNX Runtime CPU,fp32,1,resnet18,224\n"
        "jetson-orin@30w,TensorRT,int8,1,resnet18,224\n"
        "Toaster,TensorRT,int8,1,resnet18,224\n"
    )
    code, values = _json(capsys, "estimate", "--rows", source, "--out", out)
    assert code == 0
    assert (values["rows"], values["estimated"]) == (3, 2)
    assert "unknown device" in values["errors"][0][1]
    assert out.read_text().count("published") == 2  # one of them in the error's text
    assert cli.main(["estimate", "--rows", str(source)]) == 2
    assert "--rows takes --out and no model" in capsys.readouterr().err
    assert cli.main(["estimate"]) == 2
    assert "name a model, or a table" in capsys.readouterr().err


def test_a_table_without_any_estimate_is_exit_2(capsys, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    source, out = tmp_path / "in.csv", tmp_path / "out.csv"
    header = "device,runtime,precision,timm_name\n"
    source.write_text(f"{header}raspberry-pi-5,tensorrt,fp32,resnet18\n")
    code, values = _json(capsys, "estimate", "--rows", source, "--out", out)
    assert (code, values["rows"], values["estimated"]) == (2, 1, 0)
    assert "raspberry-pi-5 runs onnxruntime" in values["errors"][0][1]
    assert "error: raspberry-pi-5 runs onnxruntime" in out.read_text()
    source.write_text(header)
    assert cli.main(["estimate", "--rows", str(source), "--out", str(out)]) == 0


def test_estimate_names_what_it_does_not_count(other_bundles, tmp_path, capsys, caplog):
    for bundle in ("int8", "any"):
        code, values = _json(capsys, "estimate", other_bundles / bundle, "--target", "x86-cpu")
        assert (code, values["uncounted"]) == (0, [])
    assert _json(capsys, "estimate", "vit-nano")[1]["uncounted"] == []
    assert not caplog.records
    x, y = (helper.make_tensor_value_info(name, TensorProto.FLOAT, [1, 8]) for name in "xy")
    graph = helper.make_graph([helper.make_node("Big", ["x"], ["y"], domain="my")], "g", [x], [y])
    opsets = [helper.make_opsetid("", 18), helper.make_opsetid("my", 1)]
    onnx.save(helper.make_model(graph, opset_imports=opsets), tmp_path / "odd.onnx")
    code, values = _json(capsys, "estimate", tmp_path / "odd.onnx")
    assert (code, values["uncounted"]) == (0, [{"operator": "my.Big", "nodes": 1}])
    assert "the estimate is too low: my.Big (1)" in caplog.text


@pytest.mark.usefixtures("short_timing")
def test_fit_measures_the_choice_here(capsys):
    words = ("fit", "--target", "local", "--latency-ms", "20", "--image-size", "32")
    small = ("--embed-dim", "16", "--families", "hybrid", "--max-memory-mib", "2")
    code, values = _json(capsys, *words, *small)
    assert code == 0
    chosen = next(c for c in values["candidates"] if c["spec"] == values["chosen"])
    assert 0 < chosen["measured_ms"] <= 20
