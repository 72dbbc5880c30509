"""Label banks: the text embeddings of class names that a deployed model carries.

The text encoder stays with the teacher; what the device needs of it is one L2-normalised
row per class. Banks are built after training, travel in a bundle as `labels.npz` and are
read by the runtime and the zero-shot evaluation. No torch here.
"""

from __future__ import annotations

import io
import json
import logging
import math
import os
import struct
import zipfile
import zlib
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from dimefm_edge.errors import CheckpointError, DataError

logger = logging.getLogger(__name__)

_INDEX_KEY = "banks"
_FORMAT = "dimefm_edge.labels"
_SENTENCES_PER_CALL = 4096
_SHOWN_NAMES = 5

Embeds = npt.NDArray[np.float32]


@dataclass(frozen=True, eq=False)
class LabelBank:
    """One set of classes that images can be told apart by.

    `embeds` is (C, E) float32, L2-normalised, row i for `classnames[i]`.
    """

    name: str
    classnames: tuple[str, ...]
    templates: tuple[str, ...]
    embeds: Embeds

    def __post_init__(self) -> None:
        if not self.classnames:
            raise DataError(f"label set '{self.name}' has no classes")
        if self.embeds.ndim != 2 or self.embeds.dtype != np.float32:
            raise DataError(
                f"label set '{self.name}': embeds must be (C, E) float32, "
                f"got {self.embeds.shape} {self.embeds.dtype}"
            )
        if len(self.classnames) != len(self.embeds):
            raise DataError(
                f"label set '{self.name}' has {len(self.classnames)} class names "
                f"but {len(self.embeds)} embeddings"
            )
        norms = np.sqrt(np.square(self.embeds, dtype=np.float64).sum(axis=1))
        wrong = np.flatnonzero(~(np.abs(norms - 1) < 1e-3))  # NaN counts as wrong
        if wrong.size:
            worst = int(wrong[0])
            raise DataError(
                f"label set '{self.name}': the embedding of '{self.classnames[worst]}' has "
                f"length {norms[worst]:.4g}, not 1"
            )


def build_label_bank(
    name: str,
    classnames: Sequence[str],
    templates: Sequence[str],
    encode_texts: Callable[[Sequence[str]], npt.NDArray[np.floating[Any]]],
) -> LabelBank:
    """Embed every class name in every template and average, as CLIP's zero-shot heads are made.

    Args:
        name: Of the label set, such as `cifar10`.
        classnames: C names; repeated names are kept, since labels are positions, and told.
        templates: Sentences with `{c}` where the class name goes.
        encode_texts: Sentences to (len, E) embeddings; normalised again here.

    Returns:
        The bank: mean over templates of normalised embeddings, normalised.

    Raises:
        DataError: If there is no class or template, or a template lacks `{c}`.
    """
    if not classnames or not templates:
        raise DataError(f"label set '{name}' needs class names and templates")
    for template in templates:
        if "{c}" not in template:
            raise DataError(
                f"label set '{name}': the template {template!r} has no {{c}}",
                hint="write the class name's place as {c}, as in 'a photo of a {c}.'",
            )
    repeated = [name for name, count in Counter(classnames).items() if count > 1]
    if repeated:
        logger.warning(
            "label set '%s': several classes are called %s; their images cannot be told apart",
            name, ", ".join(map(repr, repeated[:_SHOWN_NAMES])),
        )  # fmt: skip
    rows = []
    step = max(1, _SENTENCES_PER_CALL // len(templates))
    for start in range(0, len(classnames), step):
        chunk = classnames[start : start + step]
        # Not str.format: class names and templates may hold braces of their own.
        sentences = [template.replace("{c}", c) for c in chunk for template in templates]
        embeds = _normalise(np.asarray(encode_texts(sentences), np.float64))
        rows.append(embeds.reshape(len(chunk), len(templates), -1).mean(axis=1))
    embeds = _normalise(np.concatenate(rows))
    return LabelBank(name, tuple(classnames), tuple(templates), embeds.astype(np.float32))


def _normalise(embeds: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    return np.asarray(embeds / np.linalg.norm(embeds, axis=-1, keepdims=True))


def save_label_banks(path: Path, banks: Sequence[LabelBank]) -> None:
    """Write banks to an `.npz` file, atomically; nothing in it is pickled.

    Raises:
        DataError: If two banks have one name.
    """
    names = [bank.name for bank in banks]
    if len(set(names)) != len(names):
        raise DataError(f"label sets need names of their own, got {', '.join(names)}")
    index = {
        "format": _FORMAT,
        "version": 1,
        "banks": [
            {"name": b.name, "classnames": b.classnames, "templates": b.templates} for b in banks
        ],
    }
    arrays: dict[str, npt.NDArray[Any]] = {
        f"embeds_{i}": np.ascontiguousarray(bank.embeds) for i, bank in enumerate(banks)
    }
    arrays[_INDEX_KEY] = np.frombuffer(json.dumps(index).encode(), np.uint8)
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with part.open("wb") as stream:
            np.savez(stream, allow_pickle=False, **arrays)
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def load_label_banks(path: Path) -> dict[str, LabelBank]:
    """Read what `save_label_banks` wrote, in its order.

    Raises:
        CheckpointError: If the file is missing, truncated, or not one of ours.
    """
    hint = "export the bundle again: dimefm-edge export RUN"
    try:
        arrays = _read_arrays(path)
        return _banks_of(arrays)
    except FileNotFoundError as error:
        raise CheckpointError(f"no label sets at {path}", hint=hint) from error
    except (
        DataError, ValueError, KeyError, TypeError, RecursionError, EOFError, OSError,
        RuntimeError, struct.error, zipfile.BadZipFile, zipfile.LargeZipFile, zlib.error,
    ) as error:  # fmt: skip
        raise CheckpointError(f"{path} holds no label sets of ours: {error}", hint=hint) from error


def _banks_of(arrays: Mapping[str, npt.NDArray[Any]]) -> dict[str, LabelBank]:
    index = json.loads(arrays[_INDEX_KEY].tobytes())
    if not isinstance(index, dict) or index.get("format") != _FORMAT:
        raise ValueError("its index is of another format")
    if index.get("version") != 1:
        raise ValueError(f"format version {index.get('version')!r}, this package reads 1")
    banks = {}
    for i, entry in enumerate(index["banks"]):
        words = (entry["name"], *entry["classnames"], *entry["templates"])
        if not all(isinstance(word, str) for word in words):
            raise ValueError(f"label set {i} has names that are not text")
        banks[entry["name"]] = LabelBank(
            entry["name"],
            tuple(entry["classnames"]),
            tuple(entry["templates"]),
            arrays[f"embeds_{i}"],
        )
    return banks


def _read_arrays(path: Path) -> dict[str, npt.NDArray[Any]]:
    """Read an `.npz` as numpy does, but trust no declared size: a shape allocates nothing."""
    arrays = {}
    with zipfile.ZipFile(path) as archive:
        members = archive.infolist()
        # As it was written, nothing is compressed: memory stays below the file's size.
        if any(member.compress_type != zipfile.ZIP_STORED for member in members):
            raise ValueError("it is compressed, which ours are not")
        if sum(member.file_size for member in members) > path.stat().st_size:
            raise ValueError("its files are said to be longer than itself")
        for member in members:
            stream = io.BytesIO(archive.read(member))
            version = np.lib.format.read_magic(stream)
            if version != (1, 0):
                raise ValueError(f"{member.filename} is of .npy version {version}")
            shape, is_fortran, dtype = np.lib.format.read_array_header_1_0(stream)
            if is_fortran or dtype not in (np.dtype(np.float32), np.dtype(np.uint8)):
                raise ValueError(f"{member.filename} holds {dtype}")
            data = stream.read()
            if min(shape, default=0) < 0 or math.prod(shape) * dtype.itemsize != len(data):
                raise ValueError(f"{member.filename} is not as long as its shape says")
            name = member.filename.removesuffix(".npy")
            arrays[name] = np.frombuffer(data, dtype).reshape(shape)
    return arrays
