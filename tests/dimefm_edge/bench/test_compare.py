"""A regression is told, drift of the machine is not taken for one."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from dimefm_edge.bench.compare import compare, left_out
from dimefm_edge.bench.results import BenchResult, SubjectResult
from dimefm_edge.errors import InputError

MACHINE = {"cpu": "EPYC", "cores_available": 2, "memory_mib": 1000}


def result(factor: float, *, drift: float = 1.0, label: str = "a", seed: int = 0) -> BenchResult:
    rng = np.random.default_rng(seed)
    machine = drift * rng.normal(1, 0.05, 60)  # both share the machine's moods
    times = (10 * factor * machine * rng.normal(1, 0.01, 60)).tolist()
    subject = SubjectResult(
        label, "ONNX Runtime", "measured", rounds_ms=times, p50_ms=float(np.median(times))
    )
    return BenchResult([subject], MACHINE, {}, "complete", yardstick_ms=machine.tolist())


def test_a_machine_that_slowed_down_is_no_regression():
    (found,) = compare(result(1), result(1, drift=1.3, seed=1))
    assert found.raw.value == pytest.approx(1.3, abs=0.04)
    assert found.ratio.value == pytest.approx(1, abs=0.02)
    assert not found.is_slower


def test_a_model_that_slowed_down_is_one():
    (found,) = compare(result(1), result(1.1, seed=1))
    assert found.ratio.value == pytest.approx(1.1, abs=0.02)
    assert found.is_slower
    assert not compare(result(1), result(1.1, seed=1), threshold_pct=15)[0].is_slower
    assert not compare(result(1.1), result(1, seed=1))[0].is_slower


def test_without_a_yardstick_times_are_taken_as_they_are():
    old, new = (replace(result(f), yardstick_ms=[]) for f in (1, 1.2))
    (found,) = compare(old, new)
    assert found.ratio == found.raw


def test_models_that_one_bench_lacks_are_named():
    both, gone, added, failed = (result(1, label=name).subjects[0] for name in "abcd")
    old = replace(result(1), subjects=[gone, both, failed])
    new = replace(result(1), subjects=[both, added, replace(failed, rounds_ms=[])])
    assert [c.label for c in compare(old, new)] == ["a"]
    assert {m.label: m.reason for m in left_out(old, new)} == {
        "b": "the new bench has it not", "c": "the old bench has it not",
        "d": "the new bench did not measure it",
    }  # fmt: skip
    assert left_out(old, old) == []


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda r: replace(r, machine=MACHINE | {"cpu": "Orin"}), "machines: cpu is EPYC"),
        (lambda r: replace(r, subjects=[replace(r.subjects[0], label="b")]), "measured: a"),
        (lambda r: replace(r, subjects=[replace(r.subjects[0], batch_size=2)]), "size 1 and 2"),
        (lambda r: replace(r, subjects=[replace(r.subjects[0], rounds_ms=[])]), "no model in"),
    ],
)
def test_what_cannot_be_compared(change, message):
    with pytest.raises(InputError, match=message):
        compare(result(1), change(result(1)))


def test_a_negative_threshold():
    with pytest.raises(InputError, match="must not be negative"):
        compare(result(1), result(1), threshold_pct=-1)
