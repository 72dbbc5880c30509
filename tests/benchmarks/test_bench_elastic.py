"""benchmarks/bench_elastic.py: equal cost, and runs that are kept and not done again."""

from __future__ import annotations

import importlib
import json
import statistics
import sys
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")

from dimefm_edge.latency.operators import total_gmacs  # noqa: E402
from dimefm_edge.latency.trace import trace_student  # noqa: E402
from dimefm_edge.students import student_spec  # noqa: E402

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def script(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    yield importlib.import_module("bench_elastic")
    for name in ("bench_elastic", "studies", "study_arms", "study_data",
                 "real_teacher", "train_teacher"):  # fmt: skip
        sys.modules.pop(name, None)


@pytest.mark.parametrize("which", ["vits", "heirs", "heirs-and-narrower", "convnets"])
def test_an_elastic_student_costs_what_the_others_cost_together(script, which):
    def sized(names):
        return tuple(student_spec(n, image_size=64, embed_dim=32) for n in names)

    specs = sized(script.STUDENTS[which])
    cuts = sized(script.NARROWER * (which == "heirs-and-narrower")) + specs
    costs = [total_gmacs(trace_student(spec)) for spec in cuts]
    assert (costs[0], costs[-1]) == (min(costs), max(costs))
    a_step = costs[0] + statistics.fmean(costs[1:-1]) + costs[-1]
    steps = script.elastic_steps(specs, cuts, 1000)
    alone = sum(costs[-len(specs) :])
    assert steps * a_step == pytest.approx(1000 * alone, rel=1e-3)


@pytest.mark.parametrize(
    ("which", "names"),
    [
        ("vits", ("vit-p8-w32-d2", "vit-p8-w64-d2")),
        pytest.param(
            "convnets", ("convnet-w4-d1.1.1.1", "convnet-w8-d1.1.1.1"), marks=pytest.mark.slow
        ),
        ("heirs", ("vit-p8-w192-d2", "vit-p8-w192-d3")),
    ],
)
def test_every_way_is_trained_once_and_scored(
    script, which, names, two_pictures, tmp_path, monkeypatch, capsys
):
    two_pictures()
    monkeypatch.setitem(script.STUDENTS, which, names)
    words = ["bench_elastic.py", "--limit", "80", "--steps", "5", "--out", str(tmp_path / "out"),
             "--students", which, "--tune", "--json"]  # fmt: skip
    monkeypatch.setattr(sys, "argv", words)
    script.main()
    first = json.loads(capsys.readouterr().out)
    ways = first["seeds"]["0"]
    assert list(ways) == ["alone", "elastic", "elastic, not tuned yet", "elastic, tuned"]
    assert all(list(way["top1_pct"]) == list(names) for way in ways.values())
    assert ways["elastic, tuned"]["cpu_s"] > ways["elastic, not tuned yet"]["cpu_s"]
    monkeypatch.setattr(script, "distill", None)  # all is there: nothing is trained
    script.main()
    assert json.loads(capsys.readouterr().out) == first
