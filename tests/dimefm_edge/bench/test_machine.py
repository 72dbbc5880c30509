"""The yardstick is what it says: so many operations, so many bytes."""

from __future__ import annotations

import sys
import time

import numpy as np
import pytest

from dimefm_edge.bench.machine import COPY_BYTES, GEMM_FLOP, GEMM_SIDE, copy, gemm, machine_subject
from dimefm_edge.bench.runnable import Load, load_runnable


def test_the_product_is_a_whole_one(monkeypatch):
    by_onnxruntime = gemm(1)()
    monkeypatch.setitem(sys.modules, "onnx", None)
    by_numpy = gemm(1)()
    assert np.shape(by_numpy) == (GEMM_SIDE, GEMM_SIDE)
    assert np.abs(by_onnxruntime[0] - by_numpy).max() < 1e-3
    assert GEMM_FLOP == 2 * GEMM_SIDE**3


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_the_copy_takes_as_long_as_bytes_take(threads):
    call = copy(threads)
    call()
    began = time.perf_counter()
    call()
    assert 0.1 < COPY_BYTES / (time.perf_counter() - began) / 1e9 < 2000


def test_they_are_subjects():
    for name in ("gemm", "copy"):
        load_runnable(machine_subject(name), Load()).run({})
