"""Labelled test sets: class folders, class-folder tars, CLIP-benchmark folders and scenes."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image

from dimefm_edge.data.decode import ImagePool
from dimefm_edge.data.image_pools import IMAGE_SUFFIXES, FolderPool, JoinedPool, TarPool
from dimefm_edge.data.scenes import SceneTestSet, scene_test_set
from dimefm_edge.data.sources import (
    SCENE_SETS,
    digest_lines,
    expand_source,
    natural_key,
    walk_files,
)
from dimefm_edge.data.tar_index import TarIndex, scan_tar
from dimefm_edge.errors import DataError

DEFAULT_TEMPLATES = ("a photo of a {c}.",)
CLASSNAMES_FILE = "classnames.txt"
TEMPLATES_FILE = "zeroshot_classification_templates.txt"

_LAYOUTS = (
    "one folder per class, tars with one folder per class, or test/*.tar with .cls files and "
    f"{CLASSNAMES_FILE}"
)


@dataclass(frozen=True)
class LabelledSet:
    """Images whose classes are known, to score zero-shot classification."""

    name: str
    pool: ImagePool
    labels: npt.NDArray[np.int64]
    """(N,) index into classnames, by row of the pool."""
    classnames: tuple[str, ...]
    templates: tuple[str, ...] = DEFAULT_TEMPLATES
    """Sentences about a class, with `{c}` where its name goes."""


@dataclass(frozen=True)
class ClassNames:
    """What classes are called where a set has no `classnames.txt` of its own."""

    by_number: tuple[str, ...] = ()
    """For `.cls` files."""
    by_folder: Mapping[str, str] = field(default_factory=dict)
    """For class folders; used if it knows all of them."""
    in_order: bool = False
    """`by_number` is also for class folders, in natural order, if there are as many."""
    leaves_out: bool = False
    """Class folders that `by_folder` does not know are no part of the set."""


class SceneTestPool:
    """The images of a scene test set."""

    def __init__(self, test_set: SceneTestSet) -> None:
        self._set = test_set

    @functools.cached_property
    def fingerprint(self) -> str:
        pixels = [self._set.image(row).tobytes().hex() for row in range(4)]
        return digest_lines([self._set.name, str(len(self)), *pixels])

    def __len__(self) -> int:
        return len(self._set)

    def name(self, row: int) -> str:
        return f"{self._set.name}/test/{row}"

    def load(self, row: int) -> Image.Image:
        if not 0 <= row < len(self):
            raise IndexError(row)
        return self._set.image(row)


def open_labelled(
    source: str, *, split: str = "test", fallback: ClassNames | None = None
) -> LabelledSet:
    """Open a labelled test set.

    Args:
        source: A folder with one folder per class, a CLIP-benchmark folder (`test/*.tar` with
            `.cls`, `classnames.txt`, `zeroshot_classification_templates.txt`), tars with one
            folder per class (a folder of them, a glob), `scenes`, `scenes-relations` or
            `scenes-train`. A `classnames.txt` in a folder of class folders renames them, in
            natural order.
        split: Which tars of a CLIP-benchmark folder: `train` reads `train/*.tar`.
        fallback: Class names, if the set brings none.

    Raises:
        DataError: If it is missing, damaged, of another layout, or has images without a class.
    """
    if source in SCENE_SETS:
        test_set = scene_test_set(source)
        labels = np.asarray([test_set.label(row) for row in range(len(test_set))], np.int64)
        pool = SceneTestPool(test_set)
        return LabelledSet(source, pool, labels, test_set.classnames, test_set.templates)
    paths = expand_source(source)
    if len(paths) == 1 and paths[0].is_dir():
        return _open_folder(paths[0], split, fallback or ClassNames())
    wrong = [path for path in paths if path.suffix.lower() != ".tar"]
    if wrong:
        raise DataError(f"{wrong[0]} is not a labelled test set", hint=_LAYOUTS)
    name = paths[0].stem if len(paths) == 1 else paths[0].resolve().parent.name
    return _open_tars(paths, paths[0].parent, fallback or ClassNames(), name=name)


def open_classes(source: str) -> tuple[str, tuple[str, ...], tuple[str, ...]]:
    """Name, class names and templates of a label set, which needs no images.

    Args:
        source: What `open_labelled` takes, or a `classnames.txt` with one name a line; templates
            are read from `zeroshot_classification_templates.txt` beside it.

    Raises:
        DataError: If it is missing, damaged or has less than two names.
    """
    path = Path(source).expanduser()
    if path.suffix.lower() != ".txt":
        if path.is_file() and path.suffix.lower() != ".tar":
            raise DataError(
                f"{source} is no label set",
                hint="a .txt file with one class name a line, or a labelled test set",
            )
        labelled = open_labelled(source)
        return labelled.name, labelled.classnames, labelled.templates
    if not path.is_file():
        raise DataError(f"no class names at {source}", hint="a file with one name a line")
    name = path.resolve().parent.name if path.name == CLASSNAMES_FILE else path.stem
    return name, read_classnames(path), read_templates(path.parent)


def list_tars(folder: Path) -> list[Path]:
    """The `.tar` files right in a folder, in natural order; none if there is no folder."""
    if not folder.is_dir():
        return []
    tars = [path for path in folder.iterdir() if path.suffix.lower() == ".tar"]
    return sorted(tars, key=lambda path: natural_key(path.name))


def _open_folder(root: Path, split: str, fallback: ClassNames) -> LabelledSet:
    name = root.resolve().name
    for folder in (root / split, root) if split == "test" else (root / split,):
        if tars := list_tars(folder):
            return _open_tars(tars, root, fallback, name=name)
    if split != "test":
        raise DataError(f"{root} has no {split}/*.tar", hint=f"ls {root}")
    files = walk_files(root)
    images = [item for item in files if item[0].lower().endswith(IMAGE_SUFFIXES)]
    if not images:
        raise DataError(f"{root} holds no labelled image", hint=_LAYOUTS)
    loose = [item[0] for item in images if "/" not in item[0]]
    if loose:
        raise DataError(
            f"{root / loose[0]} is in no class folder ({len(loose)} such images)", hint=_LAYOUTS
        )
    folders = [item[0].partition("/")[0] for item in images]
    if fallback.leaves_out:
        kept = [i for i, folder in enumerate(folders) if folder in fallback.by_folder]
        images, folders = [images[i] for i in kept], [folders[i] for i in kept]
        if not images:
            raise DataError(f"{root} has none of the class folders that this set is made of")
    return _from_folder_names(name, FolderPool(root, images), folders, root, fallback)


def _open_tars(
    paths: Sequence[Path], root: Path, fallback: ClassNames, *, name: str
) -> LabelledSet:
    """Tars with `.cls` members, else with one folder per class."""
    indices = [scan_tar(path, (*IMAGE_SUFFIXES, ".cls")) for path in paths]
    pools: list[ImagePool] = []
    classes: list[int] = []
    folders: list[str] = []
    has_cls = any(member.endswith(".cls") for index in indices for member in index.names)
    for index in indices:
        places = [i for i, member in enumerate(index.names) if not member.endswith(".cls")]
        if has_cls:
            classes.extend(_read_classes(index, places))
        else:
            folders.extend(_parent_folder(index, place) for place in places)
        names = tuple(index.names[i] for i in places)
        kept = TarIndex(index.path, names, index.offsets[places], index.sizes[places])
        pools.append(TarPool(kept))
    pool = pools[0] if len(pools) == 1 else JoinedPool(pools)
    if not len(pool):
        raise DataError(f"the tars of {root} hold no image", hint=_LAYOUTS)
    if not has_cls:
        return _from_folder_names(name, pool, folders, root, fallback)
    has_names = (root / CLASSNAMES_FILE).is_file() or not fallback.by_number
    classnames = _own_classnames(root) if has_names else fallback.by_number
    labels = np.asarray(classes, np.int64)
    outside = np.flatnonzero((labels < 0) | (labels >= len(classnames)))
    if len(outside):
        row = int(outside[0])
        raise DataError(
            f"{pool.name(row)} is of class {labels[row]}, and "
            f"{root / CLASSNAMES_FILE if has_names else 'the set'} names "
            f"{len(classnames)} classes (0 to {len(classnames) - 1})"
        )
    return LabelledSet(name, pool, labels, classnames, read_templates(root))


def _from_folder_names(
    name: str, pool: ImagePool, folders: Sequence[str], root: Path, fallback: ClassNames
) -> LabelledSet:
    known = sorted(set(folders), key=natural_key)
    if len(known) < 2:
        raise DataError(f"{root} has one class folder only, '{known[0]}'", hint=_LAYOUTS)
    classnames = tuple(folder.replace("_", " ") for folder in known)
    if all(folder in fallback.by_folder for folder in known):
        classnames = tuple(fallback.by_folder[folder] for folder in known)
    elif fallback.in_order and len(known) == len(fallback.by_number):
        classnames = fallback.by_number
    if (root / CLASSNAMES_FILE).is_file():
        classnames = _own_classnames(root)
        if len(classnames) != len(known):
            raise DataError(
                f"{root / CLASSNAMES_FILE} names {len(classnames)} classes, and there are "
                f"{len(known)} class folders"
            )
    number = {folder: label for label, folder in enumerate(known)}
    labels = np.asarray([number[folder] for folder in folders], np.int64)
    return LabelledSet(name, pool, labels, classnames, read_templates(root))


def _read_classes(index: TarIndex, places: Sequence[int]) -> list[int]:
    """The number in the `.cls` member beside each image."""
    by_key = {sample_key(m): i for i, m in enumerate(index.names) if m.endswith(".cls")}
    classes = []
    for place in places:
        member = index.names[place]
        if sample_key(member) not in by_key:
            raise DataError(f"{index.path}/{member} has no .cls beside it")
        cls = by_key[sample_key(member)]
        try:
            classes.append(int(index.read(cls)))
        except (ValueError, OSError) as error:
            raise DataError(
                f"{index.path}/{index.names[cls]} is no class number: {error}"
            ) from error
    return classes


def sample_key(member: str) -> str:
    """WebDataset's sample key: the path up to the first dot of the file name."""
    folder, slash, leaf = member.rpartition("/")
    return folder + slash + leaf.partition(".")[0]


def _parent_folder(index: TarIndex, place: int) -> str:
    folder = index.names[place].rpartition("/")[0].rpartition("/")[2]
    if folder in ("", "."):
        raise DataError(
            f"{index.path}/{index.names[place]} has neither a class folder nor a .cls beside it",
            hint=_LAYOUTS,
        )
    return folder


def _own_classnames(root: Path) -> tuple[str, ...]:
    if not (root / CLASSNAMES_FILE).is_file():
        raise DataError(f"{root} has .cls files and no {CLASSNAMES_FILE}", hint=_LAYOUTS)
    return read_classnames(root / CLASSNAMES_FILE)


def read_classnames(path: Path) -> tuple[str, ...]:
    """One class name a line, of two classes or more."""
    lines = _read_lines(path) or []
    empty = [number for number, line in enumerate(lines, 1) if not line]
    if empty or len(lines) < 2:
        why = f"line {empty[0]} is empty" if empty else "it needs two classes or more"
        raise DataError(f"{path} cannot be used: {why}")
    return tuple(lines)


def read_templates(root: Path) -> tuple[str, ...]:
    """The templates of a CLIP-benchmark folder, or the default one."""
    return read_template_file(root / TEMPLATES_FILE)


def read_template_file(path: Path) -> tuple[str, ...]:
    """Templates, one a line; the default one where there is no such file.

    Raises:
        DataError: If one has no `{c}`, or the file cannot be read.
    """
    lines = [line for line in _read_lines(path) or () if line]
    for line in lines:
        if "{c}" not in line:
            raise DataError(f"{path}: '{line}' has no {{c}} where the class name goes")
    return tuple(lines) or DEFAULT_TEMPLATES


def _read_lines(path: Path) -> list[str] | None:
    """Stripped lines without trailing empty ones; None if there is no such file."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        return None
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path} cannot be read: {error}") from error
    return [line.strip() for line in text.rstrip().split("\n")]
