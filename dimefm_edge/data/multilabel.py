"""Test sets whose images show several classes at once: CLIP-benchmark's multilabel WebDatasets."""

from __future__ import annotations

import io
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from dimefm_edge.data.decode import ImagePool
from dimefm_edge.data.image_pools import IMAGE_SUFFIXES, JoinedPool, TarPool
from dimefm_edge.data.labelled import (
    CLASSNAMES_FILE,
    DEFAULT_TEMPLATES,
    list_tars,
    read_classnames,
    read_templates,
    sample_key,
)
from dimefm_edge.data.tar_index import TarIndex, scan_tar
from dimefm_edge.errors import DataError

_TYPE_FILE = "dataset_type.txt"
_MULTILABEL = "multilabel"


@dataclass(frozen=True)
class MultiLabelSet:
    """Images that may be of several classes, such as PASCAL VOC 2007."""

    name: str
    pool: ImagePool
    targets: npt.NDArray[np.bool_]
    """(N, C): whether image n shows class c."""
    classnames: tuple[str, ...]
    templates: tuple[str, ...] = DEFAULT_TEMPLATES


def is_multilabel(root: Path) -> bool:
    """Whether a folder says so in `dataset_type.txt`, as CLIP-benchmark writes it."""
    try:
        return (root / _TYPE_FILE).read_text(encoding="utf-8").strip().lower() == _MULTILABEL
    except (OSError, UnicodeDecodeError):
        return False


def open_multilabel(root: Path, *, split: str = "test") -> MultiLabelSet:
    """Open `split/*.tar` with an `.npy` of C zeros and ones beside each image.

    Raises:
        DataError: If it is missing, damaged, or its labels are of another shape.
    """
    tars = list_tars(root / split)
    if not tars:
        raise DataError(f"{root} has no {split}/*.tar", hint=f"ls {root}")
    classnames = read_classnames(root / CLASSNAMES_FILE)
    pools: list[ImagePool] = []
    targets = []
    for index in (scan_tar(path, (*IMAGE_SUFFIXES, ".npy")) for path in tars):
        by_key = {sample_key(m): i for i, m in enumerate(index.names) if m.endswith(".npy")}
        places = [i for i, member in enumerate(index.names) if not member.endswith(".npy")]
        for place in places:
            targets.append(_read_targets(index, place, by_key, len(classnames)))
        names = tuple(index.names[i] for i in places)
        pools.append(TarPool(TarIndex(index.path, names, index.offsets[places],
                                      index.sizes[places])))  # fmt: skip
    if not targets:
        raise DataError(f"the tars of {root / split} hold no image")
    pool = pools[0] if len(pools) == 1 else JoinedPool(pools)
    return MultiLabelSet(
        root.resolve().name, pool, np.stack(targets), classnames, read_templates(root)
    )


def _read_targets(
    index: TarIndex, place: int, by_key: dict[str, int], num_classes: int
) -> npt.NDArray[np.bool_]:
    member = index.names[place]
    if sample_key(member) not in by_key:
        raise DataError(f"{index.path}/{member} has no .npy beside it")
    label = by_key[sample_key(member)]
    try:
        values = np.load(io.BytesIO(index.read(label)), allow_pickle=False)
    except (ValueError, OSError, EOFError, SyntaxError) as error:
        raise DataError(f"{index.path}/{index.names[label]} is no label: {error}") from error
    is_right = isinstance(values, np.ndarray) and values.shape == (num_classes,)
    if not is_right or not np.isin(values, (0, 1)).all():
        raise DataError(
            f"{index.path}/{index.names[label]} is no label: it must be {num_classes} zeros and "
            "ones, one for each class"
        )
    return np.asarray(values, np.bool_)
