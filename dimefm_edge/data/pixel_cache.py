"""Decoded pixels of a whole pool in one memory-mapped file: train without decoding again."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image

from dimefm_edge.data.decode import ImagePool, WrappedPool
from dimefm_edge.errors import DataError
from dimefm_edge.files import atomic_file
from dimefm_edge.image_files import BadImageError
from dimefm_edge.preprocess import PreprocessSpec

_DELETE = "delete the file and its .json; it is made again"


class PixelCache:
    """(N, S, S, 3) uint8 in a file, with a small `.json` beside it that says whose pixels."""

    def __init__(
        self, path: Path, pixels: npt.NDArray[np.uint8], owner: dict[str, object], *, done: bool
    ) -> None:
        """Use `create` or `open`."""
        self.path = path
        self._pixels = pixels
        self._owner = owner
        self._is_complete = done

    @classmethod
    def create(
        cls, path: Path, num_rows: int, spec: PreprocessSpec, fingerprint: str
    ) -> PixelCache:
        """Open for writing: the one that is there if it is this pool's, else a new one.

        Args:
            path: The file of pixels; a `.json` is written beside it.
            num_rows: Images in the pool.
            spec: How they are resized.
            fingerprint: The pool's.

        Raises:
            DataError: If the file is another pool's or the disk is full.
        """
        owner = _owner(num_rows, spec, fingerprint)
        if path.exists():
            done = _check(path, owner)
            return cls(path, _map(path, num_rows, spec, "r+"), owner, done=done)
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_name(f".{path.name}.{os.getpid()}.part")
        size = num_rows * spec.image_size**2 * 3
        try:
            _write_meta(path, owner, done=False)
            with open(part, "wb") as stream:
                if hasattr(os, "posix_fallocate"):  # a full disk is an error here, not SIGBUS later
                    os.posix_fallocate(stream.fileno(), 0, size)
                else:
                    stream.truncate(size)
            part.replace(path)
        except OSError as error:
            raise DataError(
                f"no pixel cache of {size / 2**20:.0f} MiB can be made at {path}: "
                f"{error.strerror or error}"
            ) from error
        finally:
            part.unlink(missing_ok=True)
        return cls(path, _map(path, num_rows, spec, "r+"), owner, done=False)

    @classmethod
    def open(cls, path: Path, num_rows: int, spec: PreprocessSpec, fingerprint: str) -> PixelCache:
        """Open a complete cache for reading.

        Raises:
            DataError: If there is none, it is another pool's, or it was never completed.
        """
        if not path.is_file():
            raise DataError(f"there is no pixel cache at {path}")
        owner = _owner(num_rows, spec, fingerprint)
        if not _check(path, owner):
            raise DataError(
                f"the pixel cache {path} was not finished", hint="run the same command again"
            )
        return cls(path, _map(path, num_rows, spec, "r"), owner, done=True)

    @property
    def is_complete(self) -> bool:
        """Whether every row that can be decoded has been written."""
        return self._is_complete

    def __len__(self) -> int:
        return len(self._pixels)

    def write(self, rows: npt.NDArray[np.int64], pixels: npt.NDArray[np.uint8]) -> None:
        """Store (B, S, S, 3) pixels at (B,) rows."""
        self._pixels[rows] = pixels

    def gather(self, rows: npt.NDArray[np.int64]) -> npt.NDArray[np.uint8]:
        """(B,) rows -> (B, S, S, 3) uint8, a copy."""
        return np.take(self._pixels, rows, axis=0)

    def flush(self) -> None:
        """Wait until the pixels are on disk."""
        if isinstance(self._pixels, np.memmap):
            self._pixels.flush()

    def mark_complete(self) -> None:
        """Say, on disk, that the pixels are all there."""
        self.flush()
        _write_meta(self.path, self._owner, done=True)
        self._is_complete = True


class DecodedPool(WrappedPool):
    """A pool whose images are in a complete cache: nothing is decoded again."""

    def __init__(self, pool: ImagePool, cache: PixelCache, bad_rows: Mapping[int, str]) -> None:
        """`bad_rows` could not be read and are not in the cache: by row, why."""
        super().__init__(pool)
        self.cache, self.bad_rows = cache, bad_rows

    def load(self, row: int) -> Image.Image:
        if row in self.bad_rows:
            raise BadImageError(self.name(row), self.bad_rows[row])
        return Image.fromarray(self.cache.gather(np.array([row]))[0])


def _owner(num_rows: int, spec: PreprocessSpec, fingerprint: str) -> dict[str, object]:
    return {
        "pool": fingerprint,
        "num_rows": num_rows,
        "image_size": spec.image_size,
        "preprocess": spec.digest(),
    }


def _meta_path(path: Path) -> Path:
    return path.with_name(path.name + ".json")


def _write_meta(path: Path, owner: dict[str, object], *, done: bool) -> None:
    with atomic_file(_meta_path(path)) as stream:
        stream.write(json.dumps({**owner, "complete": done}).encode())


def _check(path: Path, owner: dict[str, object]) -> bool:
    """Whether the cache at path is complete; raises if it is not this owner's."""
    try:
        meta = json.loads(_meta_path(path).read_text(encoding="utf-8"))
        done = bool(meta["complete"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(
            f"{path} is no pixel cache: {_meta_path(path).name} beside it is missing or damaged",
            hint=_DELETE,
        ) from error
    wrong = [key for key in owner if meta.get(key) != owner[key]]
    if wrong:
        pairs = ", ".join(f"{key} {meta.get(key)}, not {owner[key]}" for key in wrong)
        raise DataError(
            f"the pixel cache {path} belongs to other images ({pairs}): these have changed, or "
            "those are another run's",
            hint="the images as they were, or another --store or --out",
        )
    return done


def _map(path: Path, num_rows: int, spec: PreprocessSpec, mode: str) -> npt.NDArray[np.uint8]:
    shape = (num_rows, spec.image_size, spec.image_size, 3)
    size, expected = path.stat().st_size, int(np.prod(shape))
    if size != expected:
        raise DataError(
            f"the pixel cache {path} is truncated: {size} of {expected} bytes", hint=_DELETE
        )
    return np.memmap(path, np.uint8, mode, shape=shape)  # type: ignore[call-overload,no-any-return]
