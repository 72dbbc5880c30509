"""What this machine can do at most: its products a second and its memory's bandwidth.

Run as a subject of its own in every round, the product is also the yardstick that tells a
machine that slowed down from a model that did.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from dimefm_edge.bench.prepare import Prepared
from dimefm_edge.latency.settle import product_factors, products

GEMM_SIDE = 512
GEMM_FLOP = 2 * GEMM_SIDE**3
"""Of one call of `gemm`."""
COPY_BYTES = 2 * 64 * 2**20
"""Read and written by one call of `copy`: too much for any cache."""


def gemm(threads: int) -> Callable[[], object]:
    """A product of two square float32 matrices: ONNX Runtime's, else numpy's.

    numpy's OpenBLAS reached half of ONNX Runtime's rate on a CPU with AVX-512, so it is taken
    only where the onnx package, which the one-node graph is made with, is not installed.
    """
    try:
        return products(GEMM_SIDE, 1, threads)
    except ImportError:
        b, a = product_factors(GEMM_SIDE, 1)
        out = np.empty_like(a)
        return lambda: np.matmul(a, b, out=out)


def copy(threads: int) -> Callable[[], object]:
    """A copy of a large array by so many threads, each its own part."""
    source = np.ones(COPY_BYTES // 2 // 4, np.float32)
    target = np.empty_like(source)
    pairs = list(zip(np.array_split(target, threads), np.array_split(source, threads), strict=True))
    if threads == 1:
        return lambda: np.copyto(target, source)
    pool = ThreadPoolExecutor(threads)
    return lambda: list(pool.map(lambda pair: np.copyto(*pair), pairs))


def machine_subject(function: str) -> Prepared:
    """`gemm` or `copy` as something that a worker loads."""
    return Prepared("python", "Python", f"{Path(__file__)}:{function}", "python")
