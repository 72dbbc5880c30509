"""Where the members of a tar lie: one scan, then each is read on its own by offset."""

from __future__ import annotations

import os
import tarfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from dimefm_edge.errors import DataError

_BLOCK_BYTES = 512
# What tarfile lets through on damaged input, beside its own errors.
_DAMAGE = (tarfile.TarError, OSError, ValueError, OverflowError, EOFError, LookupError,
           RecursionError, MemoryError)  # fmt: skip


@dataclass(frozen=True)
class TarIndex:
    """Names, offsets and sizes (bytes) of the wanted members, in the order of the archive."""

    path: Path
    names: tuple[str, ...]
    offsets: npt.NDArray[np.int64]
    sizes: npt.NDArray[np.int64]

    def read(self, index: int) -> bytes:
        """The bytes of member `index`; safe from any thread or process.

        Raises:
            OSError: If the file went away or has shrunk since the scan.
        """
        offset, size = int(self.offsets[index]), int(self.sizes[index])
        descriptor = os.open(self.path, os.O_RDONLY)
        try:
            data = os.pread(descriptor, size, offset)
            while 0 < len(data) < size and (
                more := os.pread(descriptor, size - len(data), offset + len(data))
            ):
                data += more
        finally:
            os.close(descriptor)
        if len(data) != size:
            raise OSError(f"{self.path} has shrunk since it was indexed")
        return data


def scan_tar(path: Path, suffixes: tuple[str, ...]) -> TarIndex:
    """Index the regular members whose lower-cased name ends in one of `suffixes`.

    Hidden members (`._x.jpg`) are left out.

    Raises:
        DataError: If the file is not a plain tar, is truncated or is damaged.
    """
    names: list[str] = []
    offsets: list[int] = []
    sizes: list[int] = []
    try:
        with open(path, "rb") as stream:
            total = os.fstat(stream.fileno()).st_size
            with tarfile.open(fileobj=stream, mode="r:") as archive:
                last = -1
                while (member := archive.next()) is not None:
                    # else every header is kept: a gigabyte for a million
                    archive.members = []  # type: ignore[attr-defined]
                    end = member.offset_data + member.size
                    if member.size < 0 or member.offset <= last or end > total:
                        raise DataError(_damaged(path, f"member '{member.name}' runs past its end"))
                    last = member.offset
                    leaf = member.name.rpartition("/")[2]
                    if (
                        member.isreg()
                        and not member.issparse()
                        and leaf.lower().endswith(suffixes)
                        and not leaf.startswith(".")
                    ):
                        names.append(member.name)
                        offsets.append(member.offset_data)
                        sizes.append(member.size)
                # tarfile ends at the first header it cannot read; a whole tar ends in zeros.
                ending = os.pread(stream.fileno(), _BLOCK_BYTES, archive.offset)
    except _DAMAGE as error:
        raise DataError(
            _damaged(path, str(error) or type(error).__name__),
            hint=f"tar tf {path} (compressed tars must be unpacked: gunzip, zstd -d)",
        ) from error
    if ending != bytes(_BLOCK_BYTES):
        raise DataError(
            _damaged(path, f"after {archive.offset} bytes it has no valid header and no end mark"),
            hint="download or write the shard again",
        )
    return TarIndex(path, tuple(names), np.asarray(offsets, np.int64), np.asarray(sizes, np.int64))


def _damaged(path: Path, why: str) -> str:
    return f"{path} is truncated or not a plain tar file: {why}"
