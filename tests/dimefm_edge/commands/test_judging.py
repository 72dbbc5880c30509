"""doctor, through the command line, and the accuracy that `build` tells."""

from __future__ import annotations

import json
import sys

from dimefm_edge import cli
from dimefm_edge.commands.judging import evaluate_subject
from dimefm_edge.data.images import open_labelled
from dimefm_edge.subjects import load_subject


def _json(capsys, *words):
    code = cli.main([*map(str, words), "--json"])
    return code, json.loads(capsys.readouterr().out)


def test_zero_shot_of_a_subject_for_build(tiny_run_dir, labelled_dir):
    subject = load_subject(tiny_run_dir, device="cpu")
    labelled = open_labelled(str(labelled_dir))
    (report,) = evaluate_subject(subject, [labelled], subject.encode_texts)
    assert (report.num_images, report.num_classes, report.top5_pct) == (12, 3, 100)


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
