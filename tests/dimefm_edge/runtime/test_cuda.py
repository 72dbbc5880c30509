"""The CUDA driver's calls, against a compiled stand-in with its prototypes: no GPU is used."""

from __future__ import annotations

import ctypes
import gc
from typing import Any

import numpy as np
import pytest

from dimefm_edge.errors import DimeFMError, MissingExtraError
from dimefm_edge.runtime.cuda import Cuda, Gpu


def live_bytes(driver: Any) -> int:
    return int(ctypes.c_size_t.in_dll(driver, "fake_live_bytes").value)


def test_the_gpu_is_named(fake_driver: Any) -> None:
    gpu = Cuda().gpu
    assert gpu == Gpu("Orin", (8, 7), "12.6")
    assert gpu.sm == "sm_87"


def test_without_a_driver_it_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dimefm_edge.runtime.cuda._LIBRARIES", ("libno-such-driver.so.1",))
    with pytest.raises(MissingExtraError, match=r"no NVIDIA driver here \(libno-such") as caught:
        Cuda()
    assert "run this on the device" in str(caught.value.hint)


def test_a_gpu_that_is_not_there_is_an_error(fake_driver: Any) -> None:
    with pytest.raises(DimeFMError, match="finds no GPU 1"):
        Cuda(1)
    ctypes.c_int.in_dll(fake_driver, "fake_count").value = 0
    with pytest.raises(DimeFMError, match=r"cuInit failed with CUDA_ERROR_NO_DEVICE \(100\)"):
        Cuda()


def test_work_on_a_stream_is_done_when_it_is_waited_for(fake_driver: Any) -> None:
    cuda = Cuda()
    cuda.activate()
    array = cuda.pinned_array((2, 3), np.float32)
    back = cuda.pinned_array((2, 3), np.float32)
    array[:], back[:] = np.arange(6).reshape(2, 3), -1
    address, stream = cuda.allocate(array.nbytes), cuda.create_stream()
    cuda.copy_in(address, array, stream=stream)
    cuda.copy_out(back, address, stream=stream)
    assert (back == -1).all()
    cuda.synchronise(stream)
    np.testing.assert_array_equal(back, array)
    with pytest.raises(DimeFMError, match="cuMemcpyHtoDAsync_v2 failed with CUDA_ERROR_INVALID"):
        cuda.copy_in(address, np.zeros((2, 3), np.float32), stream=stream)  # not pinned
    cuda.free(address)
    cuda.destroy_stream(stream)


def test_a_graph_does_its_work_each_time_it_is_launched(fake_driver: Any) -> None:
    cuda = Cuda()
    cuda.activate()
    array, back = (cuda.pinned_array((4,), np.float32) for _ in range(2))
    address, stream = cuda.allocate(16), cuda.create_stream()

    def enqueue() -> None:
        cuda.copy_in(address, array, stream=stream)
        cuda.copy_out(back, address, stream=stream)

    back[:] = -1
    graph = cuda.capture(stream, enqueue)
    cuda.synchronise(stream)
    assert (back == -1).all()
    for value in (1, 2):
        array[:] = value
        cuda.launch(graph, stream=stream)
        cuda.synchronise(stream)
        assert (back == value).all()
    cuda.destroy_graph(graph)


def test_a_capture_that_fails_leaves_the_stream_usable(fake_driver: Any) -> None:
    cuda = Cuda()
    cuda.activate()
    stream = cuda.create_stream()

    def wait() -> None:
        cuda.synchronise(stream)

    with pytest.raises(DimeFMError, match="STREAM_CAPTURE_UNSUPPORTED"):
        cuda.capture(stream, wait)
    cuda.synchronise(stream)


def test_memory_is_given_back_and_its_end_is_an_error(fake_driver: Any) -> None:
    cuda = Cuda()
    with pytest.raises(DimeFMError, match="CUDA_ERROR_INVALID_CONTEXT"):
        cuda.allocate(16)
    cuda.activate()
    array = cuda.pinned_array((256,), np.float32)
    view, address = array[3:], cuda.allocate(100)
    assert live_bytes(fake_driver) == 1124
    del array
    gc.collect()
    assert live_bytes(fake_driver) == 1124  # the view needs it
    del view
    cuda.free(address)
    gc.collect()
    assert live_bytes(fake_driver) == 0
    ctypes.c_size_t.in_dll(fake_driver, "fake_free_bytes").value = 10
    with pytest.raises(DimeFMError, match="OUT_OF_MEMORY") as caught:
        cuda.allocate(100)
    assert "smaller --batch" in str(caught.value.hint)
