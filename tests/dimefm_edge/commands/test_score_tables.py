"""What eval says and writes, for scores that are given."""

from __future__ import annotations

import csv
import dataclasses
import json

import pytest

from dimefm_edge.commands.score_tables import tell_scores
from dimefm_edge.evaluate.robustness import ShiftReport
from dimefm_edge.evaluate.zero_shot import ZeroShotReport
from dimefm_edge.options import EvalOptions
from dimefm_edge.scorecard import SetScore, SubjectScore
from dimefm_edge.suites import MissingSet


def scored(name: str, *top1: float, shift: float | None = None) -> SubjectScore:
    sets = tuple(
        SetScore(f"set{i}", "accuracy", v, 40, 4, 0, ZeroShotReport(f"set{i}", v, 90, 25, 40, 4, 0))
        for i, v in enumerate(top1)
    )
    if shift is not None:
        moved = ShiftReport("set0", "set1", 4, top1[0], shift)
        sets = (sets[0], dataclasses.replace(sets[1], shift=moved))
    return SubjectScore(name, "run", sets)


def test_one_model_has_a_short_table():
    told = tell_scores(EvalOptions(), [scored("a", 80)], [], {}, "", {})
    assert told.text.splitlines()[0] == "run a"
    assert told.text.splitlines()[2].startswith("zero-shot  classes  images")
    assert told.values["results"][0]["top1_pct"] == 80
    assert (told.values["missing"], told.values["files"]) == ([], [])


def test_two_models_are_compared():
    told = tell_scores(
        EvalOptions(), [scored("a", 80), scored("b", 60)], [MissingSet("cars", "not there")],
        {"a": 4.0, "b": 1.0}, "CPU", {"a": 10.0, "b": 2.5},
    )  # fmt: skip
    assert "set0  zero-shot top-1   80   60       75" in told.text
    assert "latency on CPU" in told.text
    assert "cars: not there" in told.text
    second = told.values["subjects"][1]
    assert (second["params_m"], second["latency_p50_ms"]) == (1.0, 2.5)
    assert second["figures"][0]["retention_pct"] == pytest.approx(75)


def test_three_models_on_a_shift_have_effective_robustness():
    scores = [scored("a", 50, 40, shift=40), scored("b", 60, 50, shift=50),
              scored("c", 70, 45, shift=45)]  # fmt: skip
    told = tell_scores(EvalOptions(), scores, [], {}, "", {})
    assert "effective robustness, points" in told.text
    lifts = [
        next(f["value"] for f in entry["figures"] if f["measure"].startswith("effective"))
        for entry in told.values["subjects"]
    ]
    assert lifts[1] > 0 > lifts[2]


def test_files(tmp_path):
    options = EvalOptions(out=tmp_path / "new" / "scores")
    told = tell_scores(options, [scored("a", 80), scored("b", 60)], [], {"a": 4.0, "b": None}, "",
                       {})  # fmt: skip
    assert told.values["files"] == [str(options.out / f"scores.{kind}") for kind in ("json", "csv")]
    assert json.loads((options.out / "scores.json").read_text())["subjects"][0]["mean_pct"] == 80
    with (options.out / "scores.csv").open(newline="") as stream:
        rows = list(csv.DictReader(stream))
    assert [row["retention_pct"] for row in rows] == ["100", "100", "75", "100"]
    assert [row["params_m"] for row in rows] == ["4", "4", "", ""]
