"""export of runs and of teachers, through the command line."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import sys
from pathlib import Path

import numpy as np
import open_clip
import pytest

from dimefm_edge import cli
from dimefm_edge.errors import ParityError
from dimefm_edge.runtime import ZeroShotClassifier, load_bundle, load_text_encoder
from dimefm_edge.teacher import load_teacher


def _json(capsys, *words):
    code = cli.main([*map(str, words), "--json"])
    return code, json.loads(capsys.readouterr().out)


def test_export_to_a_folder_and_an_archive(tiny_run_dir, tmp_path, capsys):
    for out, precision in ((tmp_path / "b", "fp32"), (tmp_path / "b.zip", "fp16")):
        code, values = _json(capsys, "export", tiny_run_dir, "--out", out, "--precision", precision)
        assert code == 0
        assert (values["bundle"], values["precision"]) == (str(out), precision)
        assert values["parity"]["num_images"] == 12
        assert values["parity"]["min_cosine"] >= 0.999
        # Made from the run's own test set: it has no bundle to take them from.
        assert len(values["label_sets"]) == 1
        assert out.exists()


def test_export_without_the_images_it_was_distilled_on(
    tiny_run_dir, labelled_dir, tmp_path, capsys
):
    run = tmp_path / "run"
    run.mkdir()
    shutil.copy(tiny_run_dir / "checkpoint.safetensors", run)
    assert cli.main(["export", str(run)]) == 2
    said = capsys.readouterr().err
    assert "names images to check parity on" in said
    assert "--images" in said
    assert cli.main(["export", str(run), "--images", str(labelled_dir)]) == 0
    assert (run / "bundle-fp32" / "manifest.json").is_file()


def test_export_names_what_is_wrong(tiny_run_dir, tmp_path, capsys):
    assert cli.main(["export", str(tmp_path)]) == 2
    assert "no checkpoint at" in capsys.readouterr().err
    assert cli.main(["export", str(tiny_run_dir), "--format", "onxx"]) == 2
    assert "unknown export format 'onxx'. Did you mean 'onnx'?" in capsys.readouterr().err


def test_images_that_cannot_be_read_are_told(tiny_run_dir, labelled_dir, tmp_path, caplog, capsys):
    images = tmp_path / "images"
    shutil.copytree(labelled_dir, images)
    good = sorted(images.rglob("*.png"))
    for path in good[3:]:
        path.write_bytes(b"no picture")
    words = ["export", tiny_run_dir, "--images", images, "--out", tmp_path / "b"]
    code, values = _json(capsys, *words)
    assert (code, values["parity"]["num_images"]) == (0, 3)
    assert f"{len(good) - 3} images cannot be read and are left out; the first: " in caplog.text
    assert "3 images are few" in caplog.text


def test_a_run_whose_own_bundle_is_damaged(tiny_run_dir, tmp_path, caplog, capsys):
    run = tmp_path / "run"
    shutil.copytree(tiny_run_dir, run)
    code, before = _json(capsys, "export", run, "--out", run / "bundle")
    (run / "bundle" / "manifest.json").write_text("{")
    code, values = _json(capsys, "export", run, "--out", tmp_path / "again")
    assert (code, values["label_sets"]) == (0, before["label_sets"])
    assert "label sets are made again" in caplog.text


def test_hints_name_the_run(tiny_run_dir, tmp_path, monkeypatch, capsys):
    def fail(*_, **__):
        raise ParityError("no", hint="dimefm-edge export RUN --precision fp32")

    monkeypatch.setattr("dimefm_edge.export.onnx.check_parity", fail)
    words = ("export", tiny_run_dir, "--target", "jetson-orin", "--out", tmp_path / "b")
    code, said = _json(capsys, *words, "--precision", "fp16", "--batch-size", "2")
    assert (code, said["hint"]) == (
        3, f"dimefm-edge export {tiny_run_dir} --out {tmp_path / 'b'} --target jetson-orin "
        "--batch-size 2 --precision fp32",
    )  # fmt: skip
    assert not (tmp_path / "b").exists()


def test_a_run_with_its_teachers_text_side(tiny_run_dir, tiny_teacher_dir, tmp_path, capsys):
    (tmp_path / "animals.txt").write_text("cat\nred fox\neel\n")
    words = ("export", tiny_run_dir, "--text", "--labels", tmp_path / "animals.txt")
    code, values = _json(capsys, *words, "--out", tmp_path / "open.zip")
    assert code == 0
    assert values["label_sets"] == ["animals"]
    assert values["text"]["clean"] == "lower"
    assert values["text_size_mib"] > 3  # 49,408 words of 16 numbers
    bundle = load_bundle(tmp_path / "open.zip")
    assert bundle.manifest["spec"]["family"] == "vit"
    teacher = load_teacher(str(tiny_teacher_dir))
    wanted = teacher.encode_texts(["a photo of a red fox."])
    np.testing.assert_allclose(bundle.label_banks["animals"].embeds[1], wanted[0], atol=1e-5)
    found = load_text_encoder(bundle, threads=1).encode_texts(["a photo of a red fox."])
    np.testing.assert_allclose(found, wanted, atol=1e-5)


def test_a_teacher_by_its_folder(tiny_teacher_dir, labelled_dir, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    words = ["export", "--teacher", str(tiny_teacher_dir), "--labels", str(labelled_dir)]
    assert cli.main(words) == 0
    said = capsys.readouterr().out.splitlines()
    out = Path(f"{tiny_teacher_dir.name}-bundle")
    assert said[0].startswith(f"{out}: {tiny_teacher_dir.name}, fp32, ")
    assert said[0].endswith(f"label sets: {labelled_dir.name}")
    assert said[1].startswith("for onnxruntime, opset 20, 57 nodes; attention: 2 as microsoft ")
    assert said[2].startswith("parity on 32 images: max abs difference ")
    assert said[3].startswith("text side: ")
    assert "12 tokens; parity on 70 sentences: max abs difference " in said[3]
    bundle = load_bundle(out)
    assert bundle.manifest["target"] is None
    assert bundle.manifest["extra"] == {
        "teacher": str(tiny_teacher_dir),
        "teacher_weights": load_teacher(str(tiny_teacher_dir)).weights_hash,
    }
    bank = bundle.label_banks[labelled_dir.name]
    free = ZeroShotClassifier(bundle, labels=bank.classnames, threads=1)._bank(None)
    np.testing.assert_allclose(free.embeds, bank.embeds, atol=1e-5)
    code, values = _json(capsys, "eval", out, "--data", labelled_dir)
    assert code == 0
    assert values["results"][0]["num_images"] == 12


def test_without_tensorrt_the_hint_is_commands_that_work(
    tiny_run_dir, labelled_dir, tmp_path, monkeypatch, capsys
):
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    out = tmp_path / "my bundles" / "b"
    words = ["export", str(tiny_run_dir), "--format", "tensorrt", "--out", str(out),
             "--batch-size", "2", "--images", str(labelled_dir)]  # fmt: skip
    assert cli.main(words) == 1
    said = capsys.readouterr().err
    assert not out.parent.exists()
    export, _, build = said.partition("  try: ")[2].strip().partition("  here; ")
    assert build == f"then, where the bundle is on the device: dimefm-edge build '{out}'"
    assert "--target jetson-orin" in export
    program, *rest = shlex.split(export)
    assert program == "dimefm-edge"
    assert cli.main(rest) == 0
    assert load_bundle(out).manifest["graph"]["batch_size"] == 2


@pytest.mark.parametrize("words", [["--precision", "fp16"], ["--input", "uint8"]])
def test_the_default_destination_is_what_the_hint_says(words, tiny_run_dir, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    assert cli.main(["export", str(tiny_run_dir), "--format", "tensorrt", *words]) == 1
    name = "bundle-fp16" if "fp16" in words else "bundle-fp32"
    said = capsys.readouterr().err
    assert f"dimefm-edge build {tiny_run_dir / name}" in said
    assert " ".join(words) in said


def test_for_tensorrt_its_compiler_is_asked_where_it_is_installed(
    tiny_run_dir, tmp_path, monkeypatch, capsys
):
    pytest.importorskip("tensorrt_rtx_bindings", reason="pip install '.[rtx]'")
    words = ["export", tiny_run_dir, "--target", "jetson-orin", "--precision", "fp16", "--out"]
    _, said = _json(capsys, *words, tmp_path / "a")
    said = said["dry_build"]
    assert said["attention"] == {"expected": 1, "fused": 1, "unfused": []}
    assert said["num_kernels"] > 5
    words[5] = "fp32"  # which the device lowers
    _, said = _json(capsys, *words, tmp_path / "fp32")
    assert (said["precision"], said["dry_build"]["precision"]) == ("fp32", "fp16")

    def fail(*_):
        raise RuntimeError("odd")

    monkeypatch.setattr("dimefm_edge.runtime.tensorrt_rtx.dry_build", fail)
    code, said = _json(capsys, *words, tmp_path / "b")
    assert (code, said["dry_build"]) == (0, {"error": "RuntimeError('odd')"})
    assert (tmp_path / "b" / "manifest.json").is_file()
    monkeypatch.setitem(sys.modules, "tensorrt_rtx_bindings", None)
    assert "dry_build" not in _json(capsys, *words, tmp_path / "c")[1]
    monkeypatch.undo()
    words[3], words[5] = "x86-cpu", "fp32"
    assert "dry_build" not in _json(capsys, *words, tmp_path / "d")[1]


def test_int8_says_what_runs_in_integers(tiny_run_dir, tmp_path, capsys):
    words = ["export", str(tiny_run_dir), "--precision", "int8", "--target", "local"]
    assert cli.main([*words, "--out", str(tmp_path / "b")]) == 0
    said = capsys.readouterr().out
    graph = load_bundle(tmp_path / "b").manifest["graph"]
    integers = graph["integer_kernels"]
    assert integers["fallen_back"] == []
    count = sum(integers["counts"].values())
    assert count > 6
    assert f"int8 on this CPU: products in integers: {count} (" in said
    code, values = _json(capsys, "export", tiny_run_dir, "--precision", "int8", "--target",
                         "jetson-orin", "--out", tmp_path / "c")  # fmt: skip
    assert code == 0
    assert values["graph"]["integer_kernels"] is None  # TensorRT's are told by `build`
    assert values["graph"]["quantized"]["left_float"] == {}


def test_int8_names_what_its_rules_leave_in_float(tiny_run_dir, tmp_path, capsys):
    words = ["export", str(tiny_run_dir), "--precision", "int8", "--target", "raspberry-pi-5"]
    assert cli.main([*words, "--out", str(tmp_path / "b")]) == 0
    told = load_bundle(tmp_path / "b").manifest["graph"]["quantized"]
    kinds = list(told["left_float"].values())
    assert set(kinds) == {"attention"}
    total = len(told["quantized"]) + len(kinds)
    said = f"int8: {len(told['quantized'])} of {total} products quantised; left in float: "
    assert f"{said}{len(kinds)} attention" in capsys.readouterr().out


def test_int8_for_the_cpu_beside_an_npu_is_told(tiny_run_dir, tmp_path, capsys):
    words = ["export", str(tiny_run_dir), "--precision", "int8", "--target", "snapdragon-x-elite"]
    assert cli.main([*words, "--out", str(tmp_path / "b")]) == 0
    said = capsys.readouterr().out
    assert "warning: int8 is written for the CPU, by onnxruntime-arm: 'qnn' takes other" in said


def test_a_device_without_int8_is_refused(tiny_run_dir, tmp_path, capsys):
    words = ["export", str(tiny_run_dir), "--precision", "int8", "--target", "jetson-nano"]
    assert cli.main([*words, "--out", str(tmp_path / "b")]) == 2
    said = capsys.readouterr().err
    assert "jetson-nano has no int8: NVIDIA Jetson Nano 4 GB runs fp16, fp32" in said
    assert "try: --precision fp16, or another --target" in said
    assert not (tmp_path / "b").exists()


def test_fp8_for_a_gpu_that_has_it(tiny_run_dir, tmp_path, capsys):
    words = ["export", str(tiny_run_dir), "--precision", "fp8", "--target", "jetson-agx-thor"]
    assert cli.main([*words, "--out", str(tmp_path / "b")]) == 0
    assert "fp8: " in capsys.readouterr().out
    bundle = load_bundle(tmp_path / "b")
    assert bundle.precision == "fp8"
    assert bundle.manifest["parity"]["min_cosine"] > 0.98
    assert set(bundle.manifest["graph"]["quantized"]["left_float"].values()) == {"on the image"}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--target", "jetson-orin"], r"jetson-agx-orin has no fp8: .* runs fp16, int8, fp32"),
        (["--target", "x86-cpu"], "x86-cpu has no fp8"),
        (["--target", "jetson-agx-thor", "--opset", "18"], "opset 18 has no fp8"),
        (["--target", "jetson-agx-thor", "--attention", "plugin"], "fp32 and fp16 graphs, not fp8"),
        (["--target", "jetson-agx-thor", "--format", "pt2"], "a .pt2 is fp32 or fp16, not fp8"),
    ],
)
def test_fp8_elsewhere_is_refused(words, message, tiny_run_dir, tmp_path, capsys):
    asked = ["export", str(tiny_run_dir), "--precision", "fp8", "--out", str(tmp_path / "b")]
    assert cli.main([*asked, *words]) == 2
    assert re.search(message, capsys.readouterr().err)


def test_fp8_of_a_teacher_needs_a_target(tiny_teacher_dir, tmp_path, capsys):
    words = ["export", "--teacher", str(tiny_teacher_dir), "--precision", "fp8"]
    assert cli.main([*words, "--out", str(tmp_path / "b")]) == 2
    said = capsys.readouterr().err
    assert "no target says so" in said
    assert "--target jetson-agx-thor" in said


def test_calibration_of_a_float_graph_is_refused(tiny_run_dir, capsys):
    assert cli.main(["export", str(tiny_run_dir), "--calibration", "mse"]) == 2
    assert "how far int8 reaches, and the graph is fp32" in capsys.readouterr().err


def test_calibration_beside_a_text_side_in_float(tiny_teacher_dir, tmp_path, capsys):
    words = ["export", "--teacher", str(tiny_teacher_dir), "--precision", "int8"]
    assert cli.main([*words, "--calibration", "minmax", "--out", str(tmp_path / "b")]) == 0
    assert "text side: fp32" in capsys.readouterr().out


def test_what_a_run_kept_float_is_told_when_it_is_not_kept(tiny_run_dir, tmp_path, caplog, capsys):
    run = tmp_path / "run"
    shutil.copytree(tiny_run_dir, run)
    (run / "keep_float.json").write_text('{"asked": {}, "products": ["head", "stem"]}')
    words = ["export", str(run), "--precision", "int8", "--target", "x86-cpu"]
    assert cli.main([*words, "--out", str(tmp_path / "b")]) == 0
    assert "left head, stem in float: here all is quantised" in caplog.text


@pytest.mark.slow
def test_a_text_side_in_few_bits(tiny_run_dir, tiny_teacher_dir, tmp_path, capsys):
    words = ("export", "--teacher", tiny_teacher_dir, "--text-precision", "int8")
    assert cli.main([*map(str, words), "--out", str(tmp_path / "b")]) == 0
    said = capsys.readouterr().out.splitlines()
    assert said[-2].startswith("text side: int8, ")
    assert said[-1].startswith("text side: 7 products and 1 tables in integers, weights ")
    words = ("export", str(tiny_run_dir), "--text", "--text-precision", "int4")
    assert cli.main([*words, "--out", str(tmp_path / "c")]) == 1  # the run's target is a Jetson
    assert "tensorrt has no MatMulNBits" in capsys.readouterr().err
    assert [p.name for p in tmp_path.iterdir()] == ["b"]


def test_a_teacher_without_its_text_side(tiny_teacher_dir, labelled_dir, tmp_path, capsys):
    words = ("export", "--teacher", tiny_teacher_dir, "--image-only", "--images", labelled_dir)
    code, values = _json(capsys, *words, "--out", tmp_path / "b")
    assert code == 0
    assert values["text"] is None
    assert values["parity"]["num_images"] == 12
    assert sorted(p.name for p in (tmp_path / "b").iterdir()) == ["manifest.json", "model.onnx"]
    assert cli.main(["eval", str(tmp_path / "b"), "--data", "scenes"]) == 2
    assert "has no text side and does not carry" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "export needs a run or a teacher"),
        (["RUN", "--teacher", "sample"], "export takes a run or a teacher, not both: "),
        (["RUN", "--text", "--image-only"], "--text and --image-only contradict each other"),
        (["RUN", "--text-precision", "int8"], "int8 is of a text side, which is left out"),
        (["--teacher", "RUN"], " is a run\n  try: dimefm-edge export "),
        (["--teacher", "ViT-B-23:openai"], "unknown teacher 'ViT-B-23'. Did you mean 'ViT-"),
        (["--teacher", "ViT-B-32"], "teacher ViT-B-32 needs weights: a tag"),
        (["--teacher", "ViT-B-32:laion2b"], "unknown tag of ViT-B-32 'laion2b'. Did you mean"),
        (["--teacher", "ViT-B-32:gone/clip.pt"], "no checkpoint file at gone/clip.pt"),
        (["--teacher", "gone/teacher"], "gone/teacher does not exist"),
        (["--teacher", "sample", "--out", "PHOTOS"], "photos exists and is not a bundle of ours"),
        (["RUN", "--labels", "gone.txt", "--out", "b"], "no class names at gone.txt"),
        (["RUN", "--labels", "ONE", "--out", "b"], "cannot be used: it needs two classes or more"),
        (["RUN", "--text", "--sentences", "gone.txt", "--out", "b"], "gone.txt"),
        (
            ["RUN", "--text", "--sentences", "TABLE", "--out", "b"],
            "table.csv has no column 'text'; its columns: id, caption\n"
            "  try: --text-column with one of these",
        ),
        (
            ["RUN", "--text", "--sentences", "TABLE", "--text-column", "id", "--out", "b"],
            "table.csv holds no sentence",
        ),
    ],
)
def test_what_cannot_be_exported_is_named(
    words, message, tiny_run_dir, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "cat.jpg").write_bytes(b"jpeg")
    (tmp_path / "one.txt").write_text("cat\n")
    (tmp_path / "table.csv").write_text("id,caption\n,a cat\n")
    before = sorted(tmp_path.rglob("*"))
    names = {"RUN": tiny_run_dir, "PHOTOS": "photos", "ONE": "one.txt", "TABLE": "table.csv"}
    assert cli.main(["export", *(str(names.get(word, word)) for word in words)]) == 2
    said = capsys.readouterr().err
    assert message in said
    assert "Traceback" not in said
    assert sorted(tmp_path.rglob("*")) == before


def test_a_tokenizer_that_cannot_come_along(tmp_path, monkeypatch, capsys):
    """One that drops words by chance, which no file can do."""
    vision = {"image_size": 32, "patch_size": 16, "width": 32, "layers": 1, "head_width": 16}
    text = {"context_length": 8, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1}
    text["tokenizer_kwargs"] = {"reduction_mask": "simple"}
    path = tmp_path / "dimefm-masking.json"
    path.write_text(json.dumps({"embed_dim": 16, "vision_cfg": vision, "text_cfg": text}))
    open_clip.add_model_config(path)
    monkeypatch.chdir(tmp_path)
    words = ["export", "--teacher", "dimefm-masking:random"]
    assert cli.main(words) == 1
    said = capsys.readouterr().err
    assert "the tokenizer of dimefm-masking:random cannot run without open_clip: it drops" in said
    assert "--image-only" in said
    assert not (tmp_path / "dimefm-masking-random-bundle").exists()
