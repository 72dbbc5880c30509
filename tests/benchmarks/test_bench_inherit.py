"""benchmarks/bench_inherit.py: heirs of trained students, kept and not trained again."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path

import pytest

pytest.importorskip("torch")

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def script(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    yield importlib.import_module("bench_inherit")
    for name in ("bench_inherit", "studies", "study_arms", "study_data", "real_teacher",
                 "train_teacher"):  # fmt: skip
        sys.modules.pop(name, None)


def test_an_heir_is_trained_once_beside_its_likes(
    script, two_pictures, tmp_path, monkeypatch, capsys
):
    two_pictures()
    monkeypatch.setattr(script, "PAIRS", (("convnet-w4-d1.1.1.1", "convnet-w8-d1.1.1.1"),))
    words = ["bench_inherit.py", "--limit", "80", "--steps", "3", "--out", str(tmp_path / "out")]
    monkeypatch.setattr(sys, "argv", [*words, "--json"])
    script.main()
    first = json.loads(capsys.readouterr().out)
    row = first["seeds"]["0"]["convnet-w4-d1.1.1.1"]
    assert row["of"] == "convnet-w8-d1.1.1.1"
    assert {"of_pct", "random_pct", "selected_pct", "trained_pct", "cpu_s"} < set(row)
    monkeypatch.setattr(script, "distill", None)  # all is there: nothing is trained
    script.main()
    assert json.loads(capsys.readouterr().out) == first
    monkeypatch.setattr(sys, "argv", words)
    script.main()
    assert "convnet-w4-d1.1.1.1" in capsys.readouterr().out
