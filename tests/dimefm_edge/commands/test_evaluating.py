"""eval through the command line: one model and several, suites, files and bad input."""

from __future__ import annotations

import csv
import json
import shutil
import subprocess
import sys

import pytest
from PIL import Image

from dimefm_edge import cli


def _json(capsys, *words):
    code = cli.main([*map(str, words), "--json"])
    return code, json.loads(capsys.readouterr().out)


def test_eval_of_teacher_run_and_bundle(
    tiny_teacher_dir, tiny_run_dir, tiny_bundle_dir, labelled_dir, capsys
):
    results = {}
    for kind, path in (
        ("teacher", tiny_teacher_dir), ("run", tiny_run_dir), ("bundle", tiny_bundle_dir),
    ):  # fmt: skip
        code, values = _json(capsys, "eval", path, "--data", labelled_dir)
        assert (code, values["kind"]) == (0, kind)
        (results[kind],) = values["results"]
        assert results[kind]["num_images"] == 12
        assert results[kind]["num_classes"] == 3
        assert results[kind]["chance_pct"] == pytest.approx(100 / 3)
        assert results[kind]["top5_pct"] == 100
    # The bundle's baked class names and its graph answer as the run does.
    assert results["bundle"]["top1_pct"] == results["run"]["top1_pct"]


def test_eval_prints_a_table(tiny_run_dir, labelled_dir, tmp_path, capsys):
    assert cli.main(["eval", str(tiny_run_dir), "--data", str(labelled_dir)]) == 0
    said = capsys.readouterr().out
    assert said.startswith(f"run {tiny_run_dir}\n\nzero-shot")
    assert "top-1 %" in said
    assert cli.main(["eval", str(tiny_run_dir)]) == 0  # the sets of the run's config.toml
    assert capsys.readouterr().out == said
    shutil.copytree(labelled_dir, tmp_path / "other")
    words = ["eval", str(tiny_run_dir), "--data", str(labelled_dir), str(tmp_path / "other")]
    assert cli.main(words) == 0  # two sets are a table of two lines, as ever
    assert capsys.readouterr().out.splitlines()[2:4] == said.splitlines()[2:4]


def test_a_bundle_without_the_class_names_needs_a_teacher(
    tiny_bundle_dir, tiny_teacher_dir, labelled_dir, tmp_path, capsys
):
    for name in ("fox", "gnu"):
        shutil.copytree(labelled_dir / "cat", tmp_path / name)
    words = ["eval", str(tiny_bundle_dir), "--data", str(tmp_path)]
    assert cli.main(words) == 2
    said = capsys.readouterr().err
    assert "does not carry the class names" in said
    assert "(it carries: pets)" in said
    assert "try: --teacher" in said
    code, values = _json(capsys, *words, "--teacher", tiny_teacher_dir)
    assert code == 0
    assert values["results"][0]["num_classes"] == 2


def test_several_models_with_every_measure(
    tiny_teacher_dir, tiny_run_dir, tiny_bundle_dir, labelled_dir, tmp_path, capsys
):
    other = tmp_path / "other"
    train = tmp_path / "train"
    for copy in (other, train):
        shutil.copytree(labelled_dir, copy)
    shutil.copytree(tiny_run_dir, tmp_path / "run")
    shutil.copytree(tiny_bundle_dir, tmp_path / "run" / "bundle")
    times = {"here_p50_ms": 2.5, "target_ms": 0.5}
    report = {side: {"name": side, **times} for side in ("teacher", "student")}
    report |= {"machine": {"cpu": "Some CPU"}, "target": "rk3588", "bundle": "run/bundle"}
    (tmp_path / "run" / "report.json").write_text(json.dumps(report))
    names = [str(tmp_path / "run" / "bundle"), str(tmp_path / "run")]
    out = tmp_path / "scores"
    code, values = _json(
        capsys, "eval", *names, "--data", labelled_dir, other, "--linear-probe", train,
        "--retrieval", "scenes:8", "--ece", "--shift", "--plot", "--out", out,
        "--teacher", tiny_teacher_dir,
    )  # fmt: skip
    assert code == 0
    assert [entry["name"] for entry in values["subjects"]] == names
    bundle, run = values["subjects"]
    assert [entry["name"] for entry in bundle["sets"]] == [labelled_dir.name, "other"]
    assert all(f["retention_pct"] in (None, 100) for f in bundle["figures"])
    for left, right in zip(run["figures"], bundle["figures"], strict=True):
        assert left["measure"] == right["measure"]
    measures = {figure["measure"] for figure in run["figures"]}
    assert {
        "zero-shot top-1", "linear probe top-1", "ECE",
        "image to text recall@1", f"drop from {labelled_dir.name}, points",
    } <= measures  # fmt: skip
    assert run["params_m"] == pytest.approx(bundle["params_m"], rel=0.1)
    assert [entry["latency_p50_ms"] for entry in values["subjects"]] == [2.5, 2.5]
    assert values["latency_on"] == "Some CPU"  # the run's report said so: nothing was timed
    assert {p.name for p in out.iterdir()} == {
        "scores.json", "scores.csv", "accuracy.png", "accuracy.svg", "reliability.png",
        "reliability.svg",
    }  # fmt: skip
    assert json.loads((out / "scores.json").read_text())["subjects"][1]["name"] == names[1]
    with (out / "scores.csv").open(newline="") as stream:
        rows = list(csv.DictReader(stream))
    assert {row["subject"] for row in rows} == set(names)
    top1 = next(r for r in rows if r["subject"] == names[1] and r["measure"] == "zero-shot top-1")
    assert float(top1["value"]) == pytest.approx(run["sets"][0]["value_pct"], rel=1e-4)
    with Image.open(out / "accuracy.png") as image:
        assert image.size[0] > 1000


WITHOUT = """
import sys

class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("torch", "torchvision", "timm", "open_clip", "sklearn", "onnx"):
            raise ModuleNotFoundError(name, name=name)

sys.meta_path.insert(0, Blocked())
from dimefm_edge import cli
sys.exit(cli.main(sys.argv[1:]))
"""


def test_a_bundle_is_judged_without_torch(tiny_open_bundle_dir, labelled_dir):
    """As on a device: zero-shot with free labels, retrieval and calibration."""
    words = ("eval", tiny_open_bundle_dir, "--data", labelled_dir, "--retrieval", "scenes:4")
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT, *map(str, words), "--ece", "--json"],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    values = json.loads(done.stdout)
    assert values["sets"][0]["calibration"]["num_images"] == 12
    assert values["retrieval"][0]["num_captions"] == 20


def test_corruptions_of_two_models(tiny_run_dir, tiny_bundle_dir, labelled_dir, capsys):
    code, values = _json(
        capsys, "eval", tiny_run_dir, tiny_bundle_dir, "--data", labelled_dir, "--corruptions",
        "--corruption-images", "1",
    )  # fmt: skip
    assert code == 0
    for entry in values["subjects"]:
        report = entry["sets"][0]["corruptions"]
        assert report["num_images"] == 1
        assert len(report["top1_pct"]) == 15
        measures = [figure["measure"] for figure in entry["figures"]]
        assert {"corrupted top-1", "mCE, first model 100"} <= set(measures)


def test_the_table_of_several_models(tiny_teacher_dir, tiny_run_dir, labelled_dir, capsys):
    words = ["eval", str(tiny_teacher_dir), str(tiny_run_dir), "--data", str(labelled_dir)]
    assert cli.main([*words, "--ece"]) == 0
    said = capsys.readouterr().out
    assert said.startswith(f"A: teacher {tiny_teacher_dir}\nB: run {tiny_run_dir}\n")
    assert "B / A %" in said
    assert "parameters M" in said


def test_a_suite_names_what_is_missing(tiny_run_dir, labelled_dir, tmp_path, capsys):
    shutil.copytree(labelled_dir, tmp_path / "data" / "pets")
    (tmp_path / "mine.toml").write_text(
        "[[sets]]\nname = 'pets'\nplaces = ['pets']\nmetric = 'mean_per_class'\n"
        "[[sets]]\nname = 'cars'\nplaces = ['wds_cars']\n"
    )
    words = ["eval", str(tiny_run_dir), "--suite", str(tmp_path / "mine.toml"),
             "--data-root", str(tmp_path / "data")]  # fmt: skip
    assert cli.main(words) == 0
    said = capsys.readouterr().out
    assert "zero-shot mean per class" in said
    assert "cars: none of wds_cars in" in said
    code, values = _json(capsys, *words)
    assert code == 0
    assert [item["name"] for item in values["missing"]] == ["cars"]
    code, values = _json(capsys, *words[:-1], tmp_path)
    assert code == 2
    assert "none of the 2 sets of 'mine'" in values["error"]


def test_a_linear_probe_on_a_folders_own_training_split(tiny_run_dir, tmp_path, capsys):
    import io
    import tarfile

    from dimefm_edge.data.scenes import scene_image

    root = tmp_path / "pets"
    for split, count in (("train", 12), ("test", 6)):
        (root / split).mkdir(parents=True)
        with tarfile.open(root / split / "0.tar", "w") as archive:
            for i in range(count):
                stream = io.BytesIO()
                scene_image(i).save(stream, "PNG")
                for name, data in ((f"{i}.png", stream.getvalue()), (f"{i}.cls", b"%d" % (i % 2))):
                    info = tarfile.TarInfo(name)
                    info.size = len(data)
                    archive.addfile(info, io.BytesIO(data))
    (root / "classnames.txt").write_text("cat\ndog\n")
    code, values = _json(capsys, "eval", tiny_run_dir, "--data", root, "--linear-probe", "own")
    assert code == 0
    probe = values["sets"][0]["linear_probe"]
    assert (probe["num_train"], probe["num_images"], probe["train_name"]) == (12, 6, "pets")


def test_a_probe_is_not_fitted_on_what_it_is_tested_on(
    tiny_run_dir, labelled_dir, tmp_path, capsys, monkeypatch
):
    link = tmp_path / "link"
    link.symlink_to(labelled_dir)
    monkeypatch.chdir(labelled_dir.parent)
    for data, probe in (
        (labelled_dir, labelled_dir), (labelled_dir, labelled_dir.name), (labelled_dir, link),
        ("scenes", "scenes"),
    ):  # fmt: skip
        words = ["eval", str(tiny_run_dir), "--data", str(data), "--linear-probe", str(probe)]
        assert cli.main(words) == 2
        said = capsys.readouterr().err
        assert f"--linear-probe {probe} is the test set '" in said
        assert "try: --linear-probe own" in said


@pytest.mark.parametrize(
    ("flag", "value", "complaint"),
    [
        ("--batch-size", "0", "--batch-size must be positive, got 0"),
        ("--batch-size", "-1", "--batch-size must be positive, got -1"),
        ("--workers", "-1", "--workers must not be negative, got -1"),
        ("--corruption-images", "-3", "--corruption-images must not be negative, got -3"),
        ("--seed", "-1", "--seed must not be negative, got -1"),
    ],
)
def test_numbers_that_cannot_be(flag, value, complaint, capsys):
    assert cli.main(["eval", "/gone", "--data", "scenes", flag, value]) == 2
    assert complaint in capsys.readouterr().err


@pytest.mark.parametrize("below", [(), ("deeper",)], ids=["file", "below a file"])
def test_an_output_folder_that_cannot_be_is_told_before_anything_is_loaded(
    below, tiny_run_dir, tmp_path, capsys, monkeypatch
):
    file = tmp_path / "file"
    file.write_text("words that stay")
    monkeypatch.setattr("dimefm_edge.subjects.load_subject", _never)
    out = file.joinpath(*below)
    assert cli.main(["eval", str(tiny_run_dir), "--data", "scenes", "--out", str(out)]) == 2
    assert f"{out} cannot be the output folder: " in capsys.readouterr().err
    assert file.read_text() == "words that stay"


@pytest.mark.parametrize(
    ("words", "complaint", "hint"),
    [
        (["--linear-probe", "scenes"], "'scenes' has not the classes of any test set", "--linear"),
        (["--linear-probe", "own"], "own training splits have not the classes", "--linear-probe"),
        (["--linear-probe", "/gone"], "/gone does not exist", "ls /"),
        (["--retrieval", "/gone"], "/gone does not exist", "ls /"),
        (["--shift"], "a shift is between two test sets", "--data REFERENCE SHIFTED"),
        (["--suite", "elevator"], "unknown suite 'elevator'", None),
    ],
)
def test_bad_input(words, complaint, hint, tiny_run_dir, labelled_dir, capsys):
    assert cli.main(["eval", str(tiny_run_dir), "--data", str(labelled_dir), *words]) == 2
    said = capsys.readouterr().err
    assert complaint in said
    assert hint is None or f"try: {hint}" in said


def test_missing_libraries_are_told_before_anything_is_embedded(tiny_run_dir, capsys, monkeypatch):
    for flag, module in (
        (["--linear-probe", "scenes-train"], "sklearn.linear_model"),
        (["--corruptions"], "imagecorruptions"),
        (["--plot"], "matplotlib.figure"),
    ):
        with monkeypatch.context() as patch:
            patch.setitem(sys.modules, module, None)
            patch.setattr("dimefm_edge.subjects.load_subject", _never)
            assert cli.main(["eval", str(tiny_run_dir), "--data", "scenes", *flag]) == 1
        assert "try: pip install 'dimefm_edge[eval]'" in capsys.readouterr().err


def _never(*args, **options):
    raise AssertionError("loaded before the check")


def test_names_that_clash(tiny_run_dir, labelled_dir, tmp_path, capsys):
    assert cli.main(["eval", str(tiny_run_dir), str(tiny_run_dir)]) == 2
    assert "a model is named twice" in capsys.readouterr().err
    shutil.copytree(labelled_dir, tmp_path / labelled_dir.name)
    words = ["eval", str(tiny_run_dir), "--data", str(labelled_dir)]
    assert cli.main([*words, str(tmp_path / labelled_dir.name)]) == 2
    assert "two test sets are called" in capsys.readouterr().err


def test_eval_of_missing_things(tiny_run_dir, tmp_path, capsys):
    assert cli.main(["eval", str(tiny_run_dir), "--data", str(tmp_path / "gone")]) == 2
    assert "gone" in capsys.readouterr().err
    assert cli.main(["eval", "", "--data", "scenes"]) == 2
    assert "no model was named" in capsys.readouterr().err
    assert cli.main(["eval"]) == 2
    assert "no model was named" in capsys.readouterr().err
    assert cli.main(["eval", "sample"]) == 2
    assert "eval needs a labelled set" in capsys.readouterr().err
