"""Small image files, tars and folders that the data tests share."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import pytest
from PIL import Image


@pytest.fixture(scope="session")
def encoded() -> Callable[..., bytes]:
    """A small image file of smooth random pixels, by seed."""

    def encode(seed: int, *, fmt: str = "JPEG", size: tuple[int, int] = (20, 14)) -> bytes:
        noise = np.random.default_rng(seed).integers(0, 255, (4, 4, 3), dtype=np.uint8)
        stream = io.BytesIO()
        Image.fromarray(noise).resize(size).save(stream, fmt)
        return stream.getvalue()

    return encode


@pytest.fixture(scope="session")
def write_tar() -> Callable[[Path, Mapping[str, bytes]], Path]:
    """Writes a plain tar of members in the order given."""

    def write(path: Path, members: Mapping[str, bytes]) -> Path:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tarfile.open(path, "w") as archive:
            for name, data in members.items():
                info = tarfile.TarInfo(name)
                info.size = len(data)
                archive.addfile(info, io.BytesIO(data))
        return path

    return write


@pytest.fixture(scope="session")
def write_files() -> Callable[[Path, Mapping[str, bytes]], Path]:
    """Writes files below a folder."""

    def write(root: Path, files: Mapping[str, bytes]) -> Path:
        for name, data in files.items():
            (root / name).parent.mkdir(parents=True, exist_ok=True)
            (root / name).write_bytes(data)
        return root

    return write
