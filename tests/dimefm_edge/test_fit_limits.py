"""What a student may take: as given, of the target, or shares of the teacher's."""

from __future__ import annotations

import logging

import pytest

from dimefm_edge.errors import BudgetError, ConfigError
from dimefm_edge.fit import FitCandidate, fit_student
from dimefm_edge.fit_limits import Limits, budget_error, first_met, limits_to_try
from dimefm_edge.latency.trace import trace_student
from dimefm_edge.students import student_spec
from dimefm_edge.targets import load_target

ORIN = load_target("jetson-orin")


def candidate(latency_ms, gmacs, memory_mib=1.0):
    return FitCandidate(
        student_spec("vit-tiny", image_size=64, embed_dim=16), latency_ms, latency_ms, latency_ms,
        gmacs=gmacs, params_m=1.0, memory_mib=memory_mib, inherits=False, is_convolutional=False,
        fits=False,
    )  # fmt: skip


def tried(**given):
    values = {"latency_ms": None, "max_memory_mib": None, "teacher_ms": None} | given
    return limits_to_try(ORIN, **{"teacher_gmacs": None} | values)


def test_what_is_given_is_all_that_is_tried():
    assert tried(latency_ms=3.0, teacher_ms=1.0, teacher_gmacs=1.0) == [Limits(3.0)]
    assert tried(max_memory_mib=4.0) == [Limits(ORIN.latency_ms, None, 4.0)]
    for name in ("latency_ms", "max_memory_mib"):
        with pytest.raises(ConfigError, match=f"{name} must be positive, got 0"):
            tried(**{name: 0.0})


def test_by_default_half_of_the_teacher_then_all_of_it():
    half, whole = tried(teacher_ms=1.0, teacher_gmacs=2.0, max_memory_mib=9.0)
    assert (half.budget_ms, half.max_gmacs, half.max_memory_mib) == (0.5, 0.8, 9.0)
    assert (whole.budget_ms, whole.max_gmacs, whole.max_memory_mib) == (1.0, 2.0, 9.0)
    assert str(half) == (
        "0.5 ms (0.5 of the teacher's) and 0.8 GMACs (0.4 of the teacher's) and 9 MiB"
    )
    slow = tried(teacher_ms=1000.0, teacher_gmacs=2.0)
    assert {limits.budget_ms for limits in slow} == {ORIN.latency_ms}
    assert str(slow[0]) == f"{ORIN.latency_ms:g} ms and 0.8 GMACs (0.4 of the teacher's)"


def test_a_budget_that_none_meets_gives_way_only_where_it_was_nobodys_wish(caplog):
    limits = tried(teacher_ms=1.0, teacher_gmacs=2.0)
    assert first_met(limits, [candidate(0.4, 0.1), candidate(0.9, 0.1)]) == limits[0]
    assert not caplog.records
    assert first_met(limits, [candidate(0.9, 0.1), candidate(0.4, 3.0)]) == limits[1]
    assert "no student meets 0.5 ms (0.5 of the teacher's)" in caplog.text
    assert "the budget is 1 ms (1 of the teacher's)" in caplog.text
    assert first_met(limits, [candidate(1.1, 0.1)]) == limits[1]
    assert first_met(tried(latency_ms=0.5), [candidate(0.9, 0.1)]) == Limits(0.5)


def test_a_small_teacher_has_a_student_too(caplog):
    """resnet18d at 32 px on an Orin: kernels' starts, which no student has half of."""
    caplog.set_level(logging.WARNING)
    small = {"image_size": 32, "embed_dim": 16}
    asked = small | {"teacher_ops": trace_student(student_spec("timm:resnet18d", **small))}
    report = fit_student("jetson-orin", **asked)
    assert report.budget_ms / 2 < report.chosen_candidate.latency_ms <= report.budget_ms
    assert "no student meets" in caplog.text
    named = fit_student("jetson-orin", student=report.chosen.name, **asked)
    assert named.budget_ms == report.budget_ms
    with pytest.raises(BudgetError, match="no student meets"):
        fit_student("jetson-orin", latency_ms=report.budget_ms / 2, **asked)


def test_the_hint_is_what_would_do():
    few = [candidate(2.0004, 0.1, 5.0), candidate(3.0, 0.1, 4.0)]
    error = budget_error(few, ORIN, "fp16", Limits(1.0))
    assert "no student meets 1 ms on jetson-agx-orin@30w (fp16); the fastest" in str(error)
    assert error.hint == "--latency-ms 2.001"
    error = budget_error(few, ORIN, "fp16", Limits(9.0, max_memory_mib=1.0))
    assert error.hint == "--max-memory-mib 4"
