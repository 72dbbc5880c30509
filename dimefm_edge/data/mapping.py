"""Many files as one array: memory maps laid side by side in one range of addresses.

A gather over hundreds of shards then costs what it costs over one file: numpy's own fancy
indexing, with no loop over shards. Linux and macOS; POSIX mmap(2) through ctypes, because
Python's mmap cannot choose the address.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import sys
import weakref
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

_PROT_NONE, _PROT_READ = 0, 1
_MAP_SHARED, _MAP_PRIVATE, _MAP_FIXED = 0x01, 0x02, 0x10
_MAP_ANONYMOUS = 0x20 if sys.platform.startswith("linux") else 0x1000
_MAP_NORESERVE = 0x4000 if sys.platform.startswith("linux") else 0x40
_MADV_RANDOM = 1
_HUGE_PAGE_BYTES = 2 << 20
_FAILED = ctypes.c_void_p(-1).value


def map_files(paths: Sequence[Path], *, stride_bytes: int) -> npt.NDArray[np.uint8]:
    """Map files read-only so that file i begins at byte i * stride_bytes.

    Args:
        paths: Files of exactly stride_bytes, but for the last, which may be shorter.
        stride_bytes: A multiple of the page size where there is more than one file.

    Returns:
        (total bytes,) uint8, read-only. Pages are read when they are touched; the files may
        be renamed or deleted, and must not be truncated, while the array lives.

    Raises:
        OSError: If a file cannot be mapped.
        ValueError: If stride_bytes is not a whole number of pages, or a file has another size.
    """
    sizes = [path.stat().st_size for path in paths]
    if len(paths) == 1:
        return np.memmap(paths[0], np.uint8, "r").view(np.ndarray)
    if stride_bytes % mmap.PAGESIZE:
        raise ValueError(f"{stride_bytes} bytes are not a whole number of {mmap.PAGESIZE}-B pages")
    if any(size != stride_bytes for size in sizes[:-1]) or not 0 < sizes[-1] <= stride_bytes:
        raise ValueError(f"all files but the last must have {stride_bytes} bytes")
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mmap.restype = ctypes.c_void_p
    libc.mmap.argtypes = [
        ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long,
    ]  # fmt: skip
    libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
    libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    total = stride_bytes * (len(paths) - 1) + sizes[-1]
    # Begun on a huge page's boundary, cached files are mapped by huge pages, as one file is.
    reserved = total + _HUGE_PAGE_BYTES
    flags = _MAP_PRIVATE | _MAP_ANONYMOUS | _MAP_NORESERVE
    start = _checked(libc.mmap(None, reserved, _PROT_NONE, flags, -1, 0))
    base = -(-start // _HUGE_PAGE_BYTES) * _HUGE_PAGE_BYTES
    try:
        for index, (path, size) in enumerate(zip(paths, sizes, strict=True)):
            descriptor = os.open(path, os.O_RDONLY)
            try:
                _checked(
                    libc.mmap(
                        base + index * stride_bytes,
                        size,
                        _PROT_READ,
                        _MAP_SHARED | _MAP_FIXED,
                        descriptor,
                        0,
                    )
                )
            finally:
                os.close(descriptor)
        # Rows are read at random: reading ahead would fetch a hundred rows for one.
        libc.madvise(base, total, _MADV_RANDOM)
    except BaseException:
        libc.munmap(start, reserved)
        raise
    buffer = (ctypes.c_uint8 * total).from_address(base)
    # Views keep `buffer` alive through their base; the range is given back with the last one,
    # but not at exit, where threads may still be reading.
    weakref.finalize(buffer, libc.munmap, start, reserved).atexit = False
    return np.frombuffer(memoryview(buffer).toreadonly(), np.uint8)


def _checked(address: int | None) -> int:
    if address is None or address == _FAILED:
        number = ctypes.get_errno()
        raise OSError(number, f"mmap: {os.strerror(number)}")
    return address
