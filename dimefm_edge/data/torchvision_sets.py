"""torchvision's data sets as labelled sets: read where they lie, never downloaded."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from dimefm_edge.data.labelled import LabelledSet
from dimefm_edge.data.sources import digest_lines
from dimefm_edge.errors import DataError, MissingExtraError, lookup
from dimefm_edge.image_files import BadImageError, as_seen


class TorchvisionPool:
    """The images of a torchvision data set."""

    def __init__(self, dataset: Any, name: str) -> None:
        self._dataset, self._name = dataset, name

    @property
    def fingerprint(self) -> str:
        return digest_lines([self._name, str(len(self))])

    def __len__(self) -> int:
        return len(self._dataset)

    def name(self, row: int) -> str:
        return f"{self._name}/{row}"

    def load(self, row: int) -> Image.Image:
        try:
            image = as_seen(self._dataset[row][0])
        except Exception as error:  # whatever its reader and Pillow raise on damaged files
            raise BadImageError(self.name(row), str(error) or type(error).__name__) from error
        return image


def open_torchvision(
    kind: str,
    root: Path,
    arguments: Mapping[str, Any],
    *,
    name: str,
    classnames: tuple[str, ...] | None = None,
) -> LabelledSet:
    """Open a data set that torchvision can read.

    Args:
        kind: Class in torchvision.datasets, such as `CIFAR10`.
        root: What that class takes as `root`.
        arguments: Its further arguments, such as `{"train": False}`.
        name: Of the set.
        classnames: By number; default: its own `classes`, with blanks for underscores.

    Raises:
        DataError: If it is not there, or has no class names.
        MissingExtraError: If torchvision, or what this set needs beside it, is not installed.
        UnknownNameError: If torchvision has no such data set.
    """
    try:
        from torchvision import datasets  # type: ignore[import-untyped]
    except ImportError as error:
        raise MissingExtraError(
            f"{kind} needs torchvision, which is not installed",
            hint="pip install 'dimefm_edge[train]'",
        ) from error
    build = lookup(vars(datasets), kind, kind="torchvision data set")
    never = {"download": False} if "download" in inspect.signature(build).parameters else {}
    try:
        dataset = build(root=str(root), **never, **arguments)
    except ImportError as error:
        package = error.name or "h5py"
        raise MissingExtraError(f"{kind} needs {package}", hint=f"pip install {package}") from error
    except (RuntimeError, OSError, ValueError, LookupError, TypeError) as error:
        raise DataError(f"torchvision finds no {kind} in {root}: {error}") from error
    try:
        labels = _labels_of(dataset)
    except (TypeError, ValueError) as error:
        raise DataError(f"{kind} in {root} has images without a label") from error
    own = tuple(str(c).replace("_", " ") for c in getattr(dataset, "classes", ()))
    names = classnames or own
    if not len(labels) or labels.max() >= len(names) or labels.min() < 0:
        raise DataError(f"{kind} in {root} has classes without a name: {len(names)} are named")
    return LabelledSet(name, TorchvisionPool(dataset, name), labels, names)


def _labels_of(dataset: Any) -> np.ndarray[Any, np.dtype[np.int64]]:
    """(N,) classes, from the list that most data sets keep; else image by image."""
    for field in ("targets", "_labels"):
        if len(values := getattr(dataset, field, ())) == len(dataset):
            return np.asarray(values, np.int64)
    for field in ("samples", "_samples"):
        if len(values := getattr(dataset, field, ())) == len(dataset):
            return np.asarray([label for _, label in values], np.int64)
    return np.asarray([int(dataset[row][1]) for row in range(len(dataset))], np.int64)
