"""Suites: test sets that the field reports together, as data in *.toml, found below one folder.

A suite names its sets, where each may lie below `--data-root`, how it is scored, and which
package keeps its class names and templates. What is missing is told with the reason, and the
rest runs. The places of a set are looked through in order: CLIP-benchmark's WebDataset folders,
class folders (`PLACE/test`, `PLACE/val` or `PLACE` itself), then torchvision's own layout.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dimefm_edge.data.benchmark_names import (
    CLIP_BENCHMARK_HINT,
    IMAGENET_SETS,
    clip_benchmark_classes,
    clip_benchmark_templates,
    imagenet_classes,
    imagenet_templates,
    objectnet_classes,
)
from dimefm_edge.data.labelled import (
    CLASSNAMES_FILE,
    TEMPLATES_FILE,
    ClassNames,
    LabelledSet,
    list_tars,
    open_labelled,
    read_classnames,
    read_templates,
)
from dimefm_edge.data.multilabel import MultiLabelSet, is_multilabel, open_multilabel
from dimefm_edge.data.torchvision_sets import open_torchvision
from dimefm_edge.errors import ConfigError, DataError, DimeFMError, MissingExtraError, lookup
from dimefm_edge.evaluate.metrics import METRICS, Metric

if sys.version_info >= (3, 11):
    import tomllib
else:  # JetPack 6 has Python 3.10
    import tomli as tomllib

_FOLDER = Path(__file__).parent
_OBJECTNET = "objectnet"
_SPLITS = {"test": ("test", "val"), "train": ("trainval", "train")}
"""Folders that hold a split."""
_FIELDS = {"name", "metric", "places", "names", "in_order", "templates", "torchvision"}


@dataclass(frozen=True)
class EvalSet:
    """A test set, how it is scored, and what a linear probe of it may learn from."""

    test: LabelledSet | MultiLabelSet
    metric: Metric = "accuracy"
    train: LabelledSet | MultiLabelSet | None = None

    @property
    def name(self) -> str:
        return self.test.name


@dataclass(frozen=True)
class SuiteSet:
    """One line of a suite: where a set may lie, and who knows its names."""

    name: str
    metric: Metric
    places: tuple[str, ...]
    """Folders below the data root."""
    names: str | None
    """Whose class names: imagenet, imagenet-a, imagenet-r, objectnet, or a key of
    clip_benchmark's table; None: the set's own."""
    in_order: bool
    """Whether class folders, sorted, are in the order of those names."""
    templates: str | None
    """A key of clip_benchmark's table; ImageNet's sets take OpenAI's 80."""
    torchvision: Mapping[str, Any] | None
    """Its `class` there, and the arguments for `test` and `train`."""


@dataclass(frozen=True)
class Suite:
    """Test sets that are reported together."""

    name: str
    title: str
    sets: tuple[SuiteSet, ...]
    reference: str | None
    """The set that natural shift is measured from."""


@dataclass(frozen=True)
class MissingSet:
    """A set of a suite that cannot be used here."""

    name: str
    reason: str


def list_suites() -> list[str]:
    """The suites that come with the package."""
    return sorted(path.stem for path in _FOLDER.glob("*.toml"))


def load_suite(name_or_path: str) -> Suite:
    """Read a suite by name, or from a .toml file of the same form.

    Raises:
        UnknownNameError: If there is no such suite.
        ConfigError: If the file is missing or not of that form.
    """
    path = Path(name_or_path).expanduser()
    if path.suffix != ".toml":
        known = {name: _FOLDER / f"{name}.toml" for name in list_suites()}
        path = lookup(known, name_or_path, kind="suite")
    try:
        return _parse(path.stem, tomllib.loads(path.read_text(encoding="utf-8")))
    except FileNotFoundError:
        raise ConfigError(f"no suite at {path}", hint=f"--suite {list_suites()[0]}") from None
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise ConfigError(
            f"{path} is no suite: {error}", hint=f"see {_FOLDER / 'elevater.toml'}"
        ) from error


def open_suite(
    suite: Suite, root: Path, *, with_train: bool = False
) -> tuple[list[EvalSet], list[MissingSet]]:
    """Open the sets of a suite that are below a folder.

    Args:
        suite: What to look for.
        root: The data root.
        with_train: Also their training splits, where they are.

    Returns:
        Those that are there, and those that are not, with the reason.

    Raises:
        DataError: If none is there.
    """
    if not root.is_dir():
        raise DataError(f"{root} is no folder", hint="--data-root with the folder of the sets")
    found, missing = [], []
    for entry in suite.sets:
        try:
            found.append(_open_set(entry, root, with_train=with_train))
        except DimeFMError as error:
            reason = str(error.args[0]) + (f" ({error.hint})" if error.hint else "")
            missing.append(MissingSet(entry.name, reason))
    if not found:
        first = missing[0]
        raise DataError(
            f"none of the {len(missing)} sets of '{suite.name}' is in {root}; {first.name}: "
            f"{first.reason}",
            hint=f"put them there, such as {root / suite.sets[0].places[0]}",
        )
    return found, missing


def _parse(name: str, values: dict[str, Any]) -> Suite:
    sets = []
    for entry in values["sets"]:
        if unknown := set(entry) - _FIELDS:
            raise ValueError(f"unknown key {sorted(unknown)[0]} in {entry.get('name')}")
        metric = entry.get("metric", "accuracy")
        lookup(dict.fromkeys(METRICS), metric, kind="metric")
        places = tuple(map(str, entry["places"]))
        if not places or isinstance(entry["places"], str):
            raise ValueError(f"places of {entry['name']} must be a list of folders")
        sets.append(
            SuiteSet(
                str(entry["name"]), metric, places, entry.get("names"),
                bool(entry.get("in_order", False)), entry.get("templates"),
                entry.get("torchvision"),
            )
        )  # fmt: skip
    names = [entry.name for entry in sets]
    if not sets or len(set(names)) < len(names):
        raise ValueError("it needs sets, each with a name of its own")
    reference = values.get("reference")
    if reference is not None and reference not in names:
        raise ValueError(f"its reference '{reference}' is none of its sets")
    return Suite(name, str(values.get("title", name)), tuple(sets), reference)


def _open_set(entry: SuiteSet, root: Path, *, with_train: bool) -> EvalSet:
    test = _open_split(entry, root, "test")
    train = None
    if with_train:
        try:
            opened = _open_split(entry, root, "train")
        except DimeFMError:  # told where the probe would have been
            opened = None
        if type(opened) is type(test) and opened.classnames == test.classnames:
            train = opened
    return EvalSet(test, entry.metric, train)


def _open_split(entry: SuiteSet, root: Path, split: str) -> LabelledSet | MultiLabelSet:
    homes = [root / place for place in entry.places if (root / place).is_dir()]
    for home in homes:
        if (opened := _open_parts(entry, home, split)) is not None:
            return opened
    reason = f"none of {', '.join(entry.places)} in {root} holds its {split} images"
    if entry.torchvision is not None:
        try:
            return _open_torchvision(entry, [root, *homes], split)
        except DataError as error:
            reason += f"; {str(error.args[0]).partition('. ')[0]}"
    for home in homes if split == "test" else ():
        places = (home / "images", home / "objectnet-1.0" / "images", home)
        images = next(place for place in places if place.is_dir())
        return _named(entry, home, open_labelled(str(images), fallback=_class_names(entry, home)))
    raise DataError(reason)


def _open_parts(entry: SuiteSet, home: Path, split: str) -> LabelledSet | MultiLabelSet | None:
    """The set from tars or class folders in a folder of the split's name; None without one."""
    if is_multilabel(home):
        multilabel = open_multilabel(home, split=split)
        templates = _templates(entry, home, multilabel)
        return dataclasses.replace(multilabel, name=entry.name, templates=templates)
    for part in _SPLITS[split]:
        if list_tars(home / part):
            names = _class_names(entry, home)
            return _named(entry, home, open_labelled(str(home), split=part, fallback=names))
    for part in _SPLITS[split]:
        if (home / part).is_dir() and any((home / part).glob("*/")):
            names = _class_names(entry, home)
            return _named(entry, home, open_labelled(str(home / part), fallback=names))
    return None


def _open_torchvision(entry: SuiteSet, folders: list[Path], split: str) -> LabelledSet:
    """Read the set where torchvision puts it: below the data root, or a folder of its own."""
    assert entry.torchvision is not None
    kind, arguments = entry.torchvision["class"], entry.torchvision[split]
    names = clip_benchmark_classes(entry.names) if entry.names is not None else None
    reasons = []
    for folder in folders:
        try:
            opened = open_torchvision(kind, folder, arguments, name=entry.name, classnames=names)
            return _named(entry, folder, opened)
        except DataError as error:
            reasons.append(error)
    raise reasons[0]


def _named(entry: SuiteSet, home: Path, opened: LabelledSet) -> LabelledSet:
    templates = _templates(entry, home, opened)
    return dataclasses.replace(opened, name=entry.name, templates=templates)


def _class_names(entry: SuiteSet, home: Path) -> ClassNames | None:
    """Names for a set that brings none; its own `classnames.txt` needs no package."""
    if (home / CLASSNAMES_FILE).is_file():
        return ClassNames(read_classnames(home / CLASSNAMES_FILE), in_order=True)
    if entry.names == _OBJECTNET:
        return objectnet_classes(home)
    if entry.names in IMAGENET_SETS:
        return imagenet_classes(str(entry.names))
    try:
        names = clip_benchmark_classes(entry.names) if entry.names is not None else None
    except MissingExtraError:  # class folders have names of their own
        names = None
    if names is None:
        return None
    by_folder = {str(number): name for number, name in enumerate(names)}
    return ClassNames(names, by_folder, in_order=entry.in_order)


def _templates(entry: SuiteSet, home: Path, opened: LabelledSet | MultiLabelSet) -> tuple[str, ...]:
    """The set's own file first, then the benchmark's.

    Raises:
        MissingExtraError: If the package that keeps them is not installed: with other templates
            the figure would not be the benchmark's.
    """
    if (home / TEMPLATES_FILE).is_file():
        return read_templates(home)
    if entry.names in (*IMAGENET_SETS, _OBJECTNET):
        return imagenet_templates()
    if entry.templates is None:
        return opened.templates
    found = clip_benchmark_templates(entry.templates)
    if found is None:
        raise MissingExtraError(
            f"this version of clip_benchmark has no templates for {entry.templates}",
            hint=f"{CLIP_BENCHMARK_HINT}, or a {TEMPLATES_FILE} in {home}",
        )
    return found
