"""This machine's profile: kept, read back, and refused when it is cut."""

from __future__ import annotations

import json

import numpy as np
import pytest

from dimefm_edge.errors import CheckpointError
from dimefm_edge.latency.estimate import estimate_latency, place_on
from dimefm_edge.latency.operators import PRIORS
from dimefm_edge.latency.profile import Profile, load_profile, profile_path, save_profile
from dimefm_edge.latency.trace import trace_timm
from dimefm_edge.targets import load_target


@pytest.fixture(autouse=True)
def _own_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))


def test_a_profile_is_used_for_local_and_for_no_other(tmp_path):
    local = load_target("local")
    assert load_profile(local, "fp32") is None
    assert place_on(local, "fp32").basis == "roofline"
    path = save_profile([Profile("fp32", PRIORS, 0.1, 20, 0.05)], {"cpu": "this"})
    assert path == profile_path()
    assert path.is_relative_to(tmp_path)
    profile = load_profile(local, "fp32")
    assert np.allclose(profile.log_prices, PRIORS, atol=1e-4)
    estimate = estimate_latency(trace_timm("resnet18", 64), local)
    assert estimate.basis == "calibrated"
    assert estimate.high_ms / estimate.latency_ms == pytest.approx(np.exp(0.1), rel=1e-3)
    assert place_on(local, "int8").basis == "roofline"
    assert load_profile(load_target("jetson-orin"), "fp32") is None


def test_precisions_are_added_to_those_that_are_there():
    save_profile([Profile("fp32", PRIORS, 0.1, 20, 0.05)], {})
    save_profile([Profile("int8", PRIORS + 1.0, 0.2, 20, 0.05)], {})
    local = load_target("local")
    assert load_profile(local, "fp32").spread == 0.1
    assert load_profile(local, "int8").spread == 0.2


def test_prices_of_other_counts_are_not_used():
    path = save_profile([Profile("fp32", PRIORS, 0.1, 20, 0.05)], {})
    values = json.loads(path.read_text())
    path.write_text(json.dumps(values | {"format": values["format"] - 1}))
    local = load_target("local")
    assert load_profile(local, "fp32") is None
    save_profile([Profile("int8", PRIORS, 0.2, 20, 0.05)], {})
    assert load_profile(local, "fp32") is None
    assert load_profile(local, "int8").spread == 0.2


@pytest.mark.parametrize("damage", ["cut", "missing", "nan"])
def test_a_damaged_profile_is_refused(damage):
    path = save_profile([Profile("fp32", PRIORS, 0.1, 20, 0.05)], {})
    values = json.loads(path.read_text())
    if damage == "missing":
        del values["precisions"]["fp32"]["log_prices"]["weights"]
    elif damage == "nan":
        values["precisions"]["fp32"]["log_prices"]["weights"] = float("nan")
    text = json.dumps(values)
    path.write_text(text[:-9] if damage == "cut" else text)
    with pytest.raises(CheckpointError, match="is not a profile of this machine") as caught:
        load_profile(load_target("local"), "fp32")
    assert caught.value.hint == "dimefm-edge calibrate makes it anew"
