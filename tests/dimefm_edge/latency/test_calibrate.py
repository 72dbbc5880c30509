"""Calibration: prices are found again, one disturbed timing bends nothing, this machine is run."""

from __future__ import annotations

import numpy as np
import pytest

from dimefm_edge.errors import ConfigError, UnknownNameError
from dimefm_edge.latency import calibrate as module
from dimefm_edge.latency.calibrate import (
    EMBED_DIM,
    MODELS,
    calibrate,
    fit_prices,
    fit_profile,
    measure_student,
)
from dimefm_edge.latency.operators import PRIORS, cost_vector
from dimefm_edge.latency.profile import load_profile
from dimefm_edge.latency.settle import MAX_ROUNDS, MIN_ROUNDS
from dimefm_edge.latency.trace import trace_student
from dimefm_edge.students import student_spec, vit_spec
from dimefm_edge.targets import load_target

SMALL = [
    (f"vit-p8-w{width}-d{depth}", size)
    for width in (32, 64)
    for depth in (1, 2)
    for size in (16, 32)
]


@pytest.fixture(scope="module")
def costs():
    sizes = [(name, size) for name, size in MODELS if "timm" not in name]
    specs = [student_spec(name, image_size=size, embed_dim=EMBED_DIM) for name, size in sizes]
    return np.array([cost_vector(trace_student(spec)) for spec in specs])


def test_prices_of_another_machine_are_found(costs):
    shift = np.linspace(0.2, 1.6, len(PRIORS))
    truth = np.exp(PRIORS + shift)
    profile, left_out = fit_profile(costs, costs @ truth, prior=PRIORS, precision="fp32")
    fitted = np.exp(profile.log_prices) @ costs.T
    assert fitted == pytest.approx(costs @ truth, rel=0.05)
    before = costs @ np.exp(PRIORS) / (costs @ truth)
    assert profile.median_error < 0.25 < np.median(abs(before - 1))
    assert left_out.shape == (len(costs),)


def test_one_disturbed_timing_does_not_bend_the_rest(costs):
    times = costs @ np.exp(PRIORS + 0.3)
    disturbed = times.copy()
    disturbed[3] *= 10
    prices = np.exp(fit_prices(costs, disturbed, prior=PRIORS))
    rest = np.arange(len(times)) != 3
    assert (costs @ prices)[rest] == pytest.approx(times[rest], rel=0.15)


def test_nothing_measured_leaves_the_prior():
    empty = np.zeros((0, len(PRIORS)))
    assert fit_prices(empty, np.zeros(0), prior=PRIORS) == pytest.approx(PRIORS)


@pytest.mark.usefixtures("short_timing")
def test_a_student_is_measured_here():
    tiny = vit_spec(image_size=32, embed_dim=16, patch_size=8, width=32, depth=1, num_heads=1)
    assert 0 < measure_student(tiny, "fp32") < 1000


def test_a_student_is_as_fast_as_its_fastest_sessions(monkeypatch):
    sessions = iter([2.0, 1.0, 1.02])
    tiny = vit_spec(image_size=32, embed_dim=16, patch_size=8, width=32, depth=1, num_heads=1)
    beside = []

    def settled_ms(subjects, *, min_rounds):
        student, other = subjects
        assert student == tiny.name
        assert min_rounds > MIN_ROUNDS
        beside.append(other)
        return {student: next(sessions), other: 0.5}

    monkeypatch.setattr(module, "settled_ms", settled_ms)
    assert measure_student(tiny, "fp32") == 1.01
    assert beside == ["products"] * 3


def test_wrong_requests_are_refused():
    with pytest.raises(ConfigError, match="takes 8 models or more, got 2"):
        calibrate(models=MODELS[:2])
    with pytest.raises(UnknownNameError, match="unknown precision to calibrate 'fp8'"):
        calibrate(precisions=["fp8"])


@pytest.mark.slow  # exports and times 8 models twice
def test_this_machine_is_calibrated(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    said = []
    report = calibrate(models=[*SMALL, ("timm:no_such_model", 32)], progress=said.append)
    assert [p.models for p in report.profiles] == [8, 8]
    assert [name for name, _ in report.skipped] == ["timm:no_such_model@32"]
    assert len(report.measured) == 16
    assert all(m.latency_ms > 0 and m.predicted_ms > 0 for m in report.measured)
    assert report.path.is_relative_to(tmp_path)
    assert load_profile(load_target("local"), "int8").models == 8
    assert len(said) == 9 + 16 + MAX_ROUNDS
