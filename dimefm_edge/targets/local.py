"""The peaks of this machine, measured in a fraction of a second with numpy."""

from __future__ import annotations

import functools
import platform
import time
from typing import Any

import numpy as np

_MATRIX_SIDE = 1024
_COPY_BYTES = 64 << 20
_REPEATS = 5
_INT8_GAIN = 1.5  # without dot-product instructions; a guess until calibrate has measured


@functools.cache
def measure_peaks() -> dict[str, Any]:
    """Measure fp32 matmul speed and copy bandwidth; once per process.

    Returns:
        A power mode as the profiles hold it: `peak_tflops`, `bandwidth_gbs`, `sources`.
    """
    matrix = np.ones((_MATRIX_SIDE, _MATRIX_SIDE), np.float32)
    product = np.empty_like(matrix)
    matmul_s = _best_of(lambda: np.matmul(matrix, matrix, out=product))
    source = np.ones(_COPY_BYTES // 4, np.float32)
    copy = np.empty_like(source)
    copy_s = _best_of(lambda: np.copyto(copy, source))
    fp32 = 2 * _MATRIX_SIDE**3 / matmul_s / 1e12
    return {
        "peak_tflops": {"fp32": fp32, "int8": _INT8_GAIN * fp32},
        "bandwidth_gbs": 2 * _COPY_BYTES / copy_s / 1e9,  # read and written
        "sources": [
            f"measured here ({platform.machine()}, {platform.system()}): best of {_REPEATS} numpy "
            f"fp32 matmuls of side {_MATRIX_SIDE} and copies of {_COPY_BYTES >> 20} MiB",
            f"int8: {_INT8_GAIN} times fp32, a guess: dimefm-edge calibrate measures",
        ],
    }


def _best_of(call: Any) -> float:
    """Seconds of the fastest run, after one that warms up."""
    call()
    times = []
    for _ in range(_REPEATS):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return max(min(times), 1e-9)
