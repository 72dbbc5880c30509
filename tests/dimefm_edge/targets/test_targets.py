"""Targets: names, modes, and figures that agree with one another."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import pytest

from dimefm_edge.errors import UnknownNameError
from dimefm_edge.latency.published import context_of, load_published
from dimefm_edge.targets import list_targets, load_target

DEVICES = (
    "jetson-agx-orin", "jetson-agx-orin-32gb", "jetson-agx-thor", "jetson-agx-xavier",
    "jetson-nano", "jetson-orin-nano", "jetson-orin-nx", "jetson-xavier-nx", "local",
    "raspberry-pi-4", "raspberry-pi-5", "rk3588", "snapdragon-x-elite", "x86-cpu",
)  # fmt: skip


def test_every_device_is_listed():
    assert tuple(t.name for t in list_targets()) == DEVICES


@pytest.mark.parametrize("device", DEVICES)
def test_every_mode_is_complete(device):
    for mode in load_target(device).modes:
        target = load_target(f"{device}@{mode}")
        assert load_target(target.full_name) == target
        assert target.precision in target.precisions
        assert set(target.precisions) == set(target.peak_tflops)
        peaks = target.peak_tflops
        known = [peaks[p] for p in ("fp32", "fp16", "int8") if p in peaks]
        assert known[0] > 0
        assert known == sorted(known)
        assert min(target.bandwidth_gbs, target.latency_ms) > 0
        assert load_target(target.prices["mode"]).peak_tflops
        names = target.prices["device"], target.prices["runtime"], target.precision
        assert load_published().knows(context_of(*names))
        assert (target.sm is not None) == (target.runtime == "tensorrt")
        assert target.sources
        assert all(source.isascii() and source for source in target.sources)


@pytest.mark.parametrize(
    ("name", "fp16", "bandwidth"),
    [
        ("jetson-orin@maxn", 42.6, 204.8),
        ("jetson-orin@30w", 10.0, 204.8),
        ("jetson-orin@15w", 5.0, 136.5),
        ("Jetson-Orin-32GB", 26.7, 204.8),
        ("jetson-orin-nx@maxn", 15.0, 102.4),
        ("jetson-orin-nano@maxn_super", 16.7, 102.4),
    ],
)
def test_figures_of_devices_md(name, fp16, bandwidth):
    target = load_target(name)
    assert target.peak_tflops["fp16"] == pytest.approx(fp16, rel=0.01)
    assert target.bandwidth_gbs == bandwidth


def test_the_default_mode_is_what_the_vendor_ships():
    assert load_target("jetson-orin").full_name == "jetson-agx-orin@30w"
    assert load_target("jetson-orin-nano").mode == "25w"


@pytest.mark.parametrize("device", DEVICES)
def test_a_target_tells_its_other_names(device):
    target = load_target(device)
    assert target.aliases
    assert all(load_target(alias).name == device for alias in target.aliases)


def test_unknown_names_are_answered():
    with pytest.raises(UnknownNameError, match=r"target 'jetson-orn'\. Did you mean 'jetson-orin'"):
        load_target("jetson-orn")
    with pytest.raises(UnknownNameError, match=r"power mode of jetson-agx-orin '35w'.*15w"):
        load_target("jetson-orin@35w")


def test_local_is_measured_once_and_quickly():
    start = time.perf_counter()
    target = load_target("local")
    assert time.perf_counter() - start < 5
    assert 0.001 < target.peak_tflops["fp32"] < 1000
    assert 0.1 < target.bandwidth_gbs < 10000
    assert load_target("local@measured") == target


def test_targets_need_no_torch():
    code = (
        "import sys, dimefm_edge.targets as t; t.list_targets(); assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[3])
