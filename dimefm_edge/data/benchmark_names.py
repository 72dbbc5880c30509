"""Class names and templates of public benchmarks, read at run time from packages that keep them.

ImageNet's 1000 names and 80 templates from open_clip, its WordNet identifiers and the classes of
ImageNet-A and -R from timm, those of the other sets from clip_benchmark. Nothing is copied here;
a test set's own `classnames.txt` and templates come first, and need none of these packages.
"""

from __future__ import annotations

import functools
import importlib.util
import json
import pkgutil
from pathlib import Path
from typing import Any

from dimefm_edge.data.labelled import ClassNames
from dimefm_edge.errors import DataError, MissingExtraError

CLIP_BENCHMARK_HINT = "pip install --no-deps clip-benchmark"
IMAGENET_SETS = ("imagenet", "imagenet-a", "imagenet-r")
_MAPPINGS = ("mappings", "objectnet-1.0/mappings", ".")
_FOLDER_LABELS = "folder_to_objectnet_label.json"
_TO_IMAGENET = "objectnet_to_imagenet_1k.json"


@functools.cache
def imagenet_classes(name: str) -> ClassNames:
    """ImageNet's names by class number, and by folder: WordNet identifier or number.

    Args:
        name: `imagenet`, or `imagenet-a` or `imagenet-r`, whose numbers count their own 200
            classes.

    Raises:
        MissingExtraError: If open_clip or timm is not installed.
    """
    metadata, synsets = _open_clip_metadata(), _timm_lines("imagenet_synsets.txt")
    names = tuple(metadata.IMAGENET_CLASSNAMES)
    by_folder = dict(zip(synsets, names, strict=True))
    by_folder |= {str(number): label for number, label in enumerate(names)}
    if name == "imagenet":
        return ClassNames(names, by_folder)
    own = _timm_lines(f"{name.replace('-', '_')}_synsets.txt")
    return ClassNames(tuple(by_folder[synset] for synset in own), by_folder)


def imagenet_templates() -> tuple[str, ...]:
    """OpenAI's 80 templates, with `{c}`.

    Raises:
        MissingExtraError: If open_clip is not installed.
    """
    return tuple(template("{c}") for template in _open_clip_metadata().OPENAI_IMAGENET_TEMPLATES)


def clip_benchmark_classes(key: str) -> tuple[str, ...] | None:
    """clip_benchmark's class names of a set, by number; None if it has none for it.

    Raises:
        MissingExtraError: If clip_benchmark is not installed.
    """
    return _clip_benchmark("classnames").get(key)


def clip_benchmark_templates(key: str) -> tuple[str, ...] | None:
    """clip_benchmark's templates of a set, with `{c}`; None if it has none for it.

    Raises:
        MissingExtraError: If clip_benchmark is not installed.
    """
    return _clip_benchmark("zeroshot_classification_templates").get(key)


def objectnet_classes(root: Path) -> ClassNames:
    """ObjectNet's names by folder, of the 113 classes that are ImageNet's too.

    As clip_benchmark takes them: ObjectNet's own names in lower case; other folders are left out.

    Args:
        root: Where the data set was unpacked, with its `mappings/`.

    Raises:
        DataError: If the mappings are missing or damaged.
    """
    folders = (root / name for name in _MAPPINGS)
    place = next((f for f in folders if (f / _FOLDER_LABELS).is_file()), None)
    if place is None or not (place / _TO_IMAGENET).is_file():
        raise DataError(
            f"{root} has no mappings/{_FOLDER_LABELS} and {_TO_IMAGENET}",
            hint="unpack the data set's own mappings/ beside its images/",
        )
    try:
        labels = json.loads((place / _FOLDER_LABELS).read_text(encoding="utf-8"))
        shared = json.loads((place / _TO_IMAGENET).read_text(encoding="utf-8"))
        by_folder = {folder: str(name).lower() for folder, name in labels.items() if name in shared}
    except (OSError, ValueError, AttributeError, TypeError) as error:
        raise DataError(f"the mappings in {place} cannot be read: {error}") from error
    return ClassNames(by_folder=by_folder, leaves_out=True)


def _open_clip_metadata() -> Any:
    try:
        from open_clip import zero_shot_metadata
    except ImportError as error:
        raise MissingExtraError(
            "ImageNet's class names are open_clip's, which is not installed",
            hint="pip install 'dimefm_edge[train]'",
        ) from error
    return zero_shot_metadata


def _timm_lines(file: str) -> list[str]:
    try:
        data = pkgutil.get_data("timm.data", f"_info/{file}")
    except (ImportError, OSError) as error:
        raise MissingExtraError(
            f"ImageNet's classes are timm's ({file}), which is not installed or too old",
            hint="pip install 'dimefm_edge[train]'",
        ) from error
    assert data is not None  # timm is a plain package
    return data.decode().split()


@functools.cache
def _clip_benchmark(kind: str) -> dict[str, tuple[str, ...]]:
    """Its English table, without importing the package: that would want all that it can do."""
    spec = importlib.util.find_spec("clip_benchmark")
    if spec is None or not spec.submodule_search_locations:
        raise MissingExtraError(
            "the class names and templates are clip_benchmark's, which is not installed",
            hint=CLIP_BENCHMARK_HINT,
        )
    path = Path(spec.submodule_search_locations[0]) / "datasets" / f"en_{kind}.json"
    try:
        table = json.loads(path.read_text(encoding="utf-8"))
        return {key: tuple(map(str, values)) for key, values in table.items()}
    except (OSError, ValueError, AttributeError, TypeError) as error:
        raise MissingExtraError(
            f"{path} cannot be read: {error}", hint=CLIP_BENCHMARK_HINT
        ) from error
