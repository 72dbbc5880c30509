"""eval and doctor, through the command line."""

from __future__ import annotations

import json
import shutil
import sys

import pytest

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


def test_eval_prints_a_table(tiny_run_dir, labelled_dir, capsys):
    assert cli.main(["eval", str(tiny_run_dir), "--data", str(labelled_dir)]) == 0
    said = capsys.readouterr().out
    assert said.startswith(f"run {tiny_run_dir}\n\nzero-shot")
    assert "top-1 %" in said


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


def test_eval_of_missing_things(tiny_run_dir, tmp_path, capsys):
    assert cli.main(["eval", str(tiny_run_dir), "--data", str(tmp_path / "gone")]) == 2
    assert "gone" in capsys.readouterr().err
    assert cli.main(["eval", "", "--data", "scenes"]) == 2
    assert "no model was named" in capsys.readouterr().err


def test_doctor(capsys, tmp_path):
    code, values = _json(capsys, "doctor", "--disk", tmp_path)
    assert (code, values["ok"]) == (0, True)
    assert {"Python", "ONNX Runtime", "torch", "TensorRT", "disk"} <= {
        check["name"] for check in values["checks"]
    }


def test_doctor_fails_when_nothing_can_run(capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    assert cli.main(["doctor"]) == 1
    said = capsys.readouterr().out
    assert "missing  ONNX Runtime" in said
    assert "pip install --upgrade onnxruntime" in said
