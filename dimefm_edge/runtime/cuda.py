"""The CUDA driver through ctypes: what an engine needs of it, without torch, pycuda or cuda-python.

`libcuda` is wherever an NVIDIA GPU can be used, JetPack included, and keeps its ABI: these
functions have had these names since CUDA 11.4 (CUDA driver API, "Data types used by CUDA
driver"). `libcudart` changes its name with each major version and pip hides it in a folder of
its own. TensorRT works in the device's primary context, which is the one used here.
"""

from __future__ import annotations

import ctypes
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from dimefm_edge.errors import DimeFMError, MissingExtraError

_LIBRARIES = ("libcuda.so.1", "nvcuda.dll")
_MAJOR, _MINOR = 75, 76  # CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_{MAJOR,MINOR}
_NON_BLOCKING = 1  # CU_STREAM_NON_BLOCKING
_THREAD_LOCAL = 1  # CU_STREAM_CAPTURE_MODE_THREAD_LOCAL
_NAME_BYTES = 256

_int, _uint, _size, _handle = ctypes.c_int, ctypes.c_uint, ctypes.c_size_t, ctypes.c_void_p
_pointer = ctypes.c_uint64  # CUdeviceptr


def _out(kind: Any) -> Any:
    return ctypes.POINTER(kind)


_FUNCTIONS: dict[str, tuple[Any, ...]] = {
    "cuInit": (_uint,),
    "cuDriverGetVersion": (_out(_int),),
    "cuDeviceGet": (_out(_int), _int),
    "cuDeviceGetCount": (_out(_int),),
    "cuDeviceGetName": (ctypes.c_char_p, _int, _int),
    "cuDeviceGetAttribute": (_out(_int), _int, _int),
    "cuDevicePrimaryCtxRetain": (_out(_handle), _int),
    "cuCtxSetCurrent": (_handle,),
    "cuMemAlloc_v2": (_out(_pointer), _size),
    "cuMemFree_v2": (_pointer,),
    "cuMemHostAlloc": (_out(_handle), _size, _uint),
    "cuMemFreeHost": (_handle,),
    "cuMemcpyHtoDAsync_v2": (_pointer, _handle, _size, _handle),
    "cuMemcpyDtoHAsync_v2": (_handle, _pointer, _size, _handle),
    "cuStreamCreate": (_out(_handle), _uint),
    "cuStreamDestroy_v2": (_handle,),
    "cuStreamSynchronize": (_handle,),
    "cuStreamBeginCapture_v2": (_handle, _int),
    "cuStreamEndCapture": (_handle, _out(_handle)),
    "cuGraphInstantiateWithFlags": (_out(_handle), _handle, ctypes.c_uint64),
    "cuGraphDestroy": (_handle,),
    "cuGraphLaunch": (_handle, _handle),
    "cuGraphExecDestroy": (_handle,),
}


@dataclass(frozen=True)
class Gpu:
    """A GPU as the driver names it."""

    name: str
    compute_capability: tuple[int, int]
    cuda: str
    """Newest CUDA version that the driver runs, such as 12.6."""

    @property
    def sm(self) -> str:
        """Its architecture, such as sm_87."""
        return "sm_{}{}".format(*self.compute_capability)


class Cuda:
    """One GPU: memory, a stream's work, and graphs of it. Handles are plain numbers.

    Attributes:
        gpu: What it is.
    """

    def __init__(self, device: int = 0) -> None:
        """Open a GPU.

        Args:
            device: Its number.

        Raises:
            MissingExtraError: If there is no NVIDIA driver.
            DimeFMError: If the driver finds no such GPU.
        """
        self._library = _load_library()
        self._call("cuInit", 0)
        if not 0 <= device < self._number("cuDeviceGetCount"):
            raise DimeFMError(f"the NVIDIA driver finds no GPU {device}", hint="nvidia-smi")
        self._device = self._number("cuDeviceGet", device)
        self.gpu = self._examine()
        self._context: int | None = None

    def _examine(self) -> Gpu:
        name = ctypes.create_string_buffer(_NAME_BYTES)
        self._call("cuDeviceGetName", name, _NAME_BYTES, self._device)
        capability = tuple(
            self._number("cuDeviceGetAttribute", a, self._device) for a in (_MAJOR, _MINOR)
        )
        version = self._number("cuDriverGetVersion")
        return Gpu(
            name.value.decode(errors="replace"),
            (capability[0], capability[1]),
            f"{version // 1000}.{version % 1000 // 10}",
        )

    def activate(self) -> None:
        """Make the GPU the calling thread's; do so before anything below, and before TensorRT."""
        if self._context is None:
            self._context = self._made("cuDevicePrimaryCtxRetain", self._device)
        self._call("cuCtxSetCurrent", self._context)

    def allocate(self, size_bytes: int) -> int:
        """Address of new memory on the GPU, freed by `free`."""
        address = _pointer()
        self._call("cuMemAlloc_v2", ctypes.byref(address), size_bytes)
        return int(address.value)

    def free(self, address: int) -> None:
        self._call("cuMemFree_v2", address)

    def pinned_array(self, shape: Sequence[int], dtype: npt.DTypeLike) -> npt.NDArray[Any]:
        """An array in host memory that the GPU copies from and to by itself; freed with it."""
        size = int(np.prod(shape)) * np.dtype(dtype).itemsize
        address = ctypes.c_void_p()
        self._call("cuMemHostAlloc", ctypes.byref(address), size, 0)
        assert address.value is not None
        memory = (ctypes.c_byte * size).from_address(address.value)
        # Views keep `memory` alive; when the last has gone, so does the memory.
        weakref.finalize(memory, self._library.cuMemFreeHost, address)
        return np.ndarray(tuple(shape), dtype, buffer=memoryview(memory))

    def copy_in(self, address: int, array: npt.NDArray[Any], *, stream: int) -> None:
        """Enqueue a copy of a pinned array to the GPU."""
        self._call("cuMemcpyHtoDAsync_v2", address, array.ctypes.data, array.nbytes, stream)

    def copy_out(self, array: npt.NDArray[Any], address: int, *, stream: int) -> None:
        """Enqueue a copy from the GPU into a pinned array."""
        self._call("cuMemcpyDtoHAsync_v2", array.ctypes.data, address, array.nbytes, stream)

    def create_stream(self) -> int:
        return self._made("cuStreamCreate", _NON_BLOCKING)

    def destroy_stream(self, stream: int) -> None:
        self._call("cuStreamDestroy_v2", stream)

    def synchronise(self, stream: int) -> None:
        """Wait until everything enqueued on a stream is done."""
        self._call("cuStreamSynchronize", stream)

    def capture(self, stream: int, enqueue: Callable[[], None]) -> int:
        """Record what `enqueue` puts on a stream, without running it, as a graph to launch.

        Raises:
            DimeFMError: If something in it cannot be recorded; the stream can be used again.
        """
        self._call("cuStreamBeginCapture_v2", stream, _THREAD_LOCAL)
        try:
            enqueue()
        except BaseException:
            # Capture must end, or the stream is lost; its graph is of no use.
            broken = ctypes.c_void_p()
            self._library.cuStreamEndCapture(stream, ctypes.byref(broken))
            if broken.value:
                self._library.cuGraphDestroy(broken)
            raise
        graph = ctypes.c_void_p()
        self._call("cuStreamEndCapture", stream, ctypes.byref(graph))
        try:
            executable = ctypes.c_void_p()
            self._call("cuGraphInstantiateWithFlags", ctypes.byref(executable), graph, 0)
            assert executable.value is not None
            return executable.value
        finally:
            self._library.cuGraphDestroy(graph)

    def launch(self, graph: int, *, stream: int) -> None:
        """Enqueue a captured graph."""
        self._call("cuGraphLaunch", graph, stream)

    def destroy_graph(self, graph: int) -> None:
        self._call("cuGraphExecDestroy", graph)

    def _number(self, function: str, *arguments: Any) -> int:
        found = _int()
        self._call(function, ctypes.byref(found), *arguments)
        return int(found.value)

    def _made(self, function: str, *arguments: Any) -> int:
        handle = ctypes.c_void_p()
        self._call(function, ctypes.byref(handle), *arguments)
        assert handle.value is not None
        return handle.value

    def _call(self, function: str, *arguments: Any) -> None:
        code = getattr(self._library, function)(*arguments)
        if code:
            text = ctypes.c_char_p()
            self._library.cuGetErrorName(code, ctypes.byref(text))
            name = text.value.decode() if text.value else "unknown"
            hint = "a smaller --batch, or close something" if "MEMORY" in name else "nvidia-smi"
            raise DimeFMError(f"CUDA: {function} failed with {name} ({code})", hint=hint)


def _load_library() -> Any:
    for name in _LIBRARIES:
        try:
            library = ctypes.CDLL(name)
        except OSError:
            continue
        for function, arguments in _FUNCTIONS.items():
            getattr(library, function).argtypes = arguments
        library.cuGetErrorName.argtypes = (_int, ctypes.POINTER(ctypes.c_char_p))
        return library
    raise MissingExtraError(
        f"there is no NVIDIA driver here ({_LIBRARIES[0]} cannot be loaded)",
        hint="run this on the device; on a GPU machine install NVIDIA's driver, then: nvidia-smi",
    )
