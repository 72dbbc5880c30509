"""Settings that cannot be are refused in the words of their flags."""

from __future__ import annotations

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
        ({"server_qps": -5.0}, "--server-qps and --server-bound-ms must be positive"),
    ],
)
def test_refused(settings, message):
    with pytest.raises(InputError, match=message):
        BenchConfig(**settings)
