"""Settings that cannot be are refused in the words of their flags."""

from __future__ import annotations

import os

import pytest

from dimefm_edge.bench_config import BenchConfig
from dimefm_edge.errors import InputError


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"batch_size": 0}, "--batch-size must be positive, got 0"),
        ({"seconds": -1.0}, "--seconds must be positive"),
        ({"restarts": 0}, "--restarts must be positive"),
        ({"time_limit_s": 0}, "--time-limit-s must be positive"),
        ({"threads": -1}, "--threads and --seed must not be negative"),
        ({"pin": (99_999,)}, "--pin names CPU 99999, which this process may not use"),
        ({"pin": (-1,)}, "--pin names CPU -1"),
        ({"server_qps": -5.0}, "--server-qps and --server-bound-ms must be positive"),
    ],
)
def test_refused(settings, message):
    with pytest.raises(InputError, match=message):
        BenchConfig(**settings)


def test_cpus_of_this_process_can_be_pinned():
    usable = tuple(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else (0,)
    assert BenchConfig(pin=usable).pin == usable
