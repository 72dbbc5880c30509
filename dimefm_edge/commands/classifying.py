"""The command that names what images show, with a bundle: classify."""

from __future__ import annotations

import csv
import io
import logging
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dimefm_edge.commands.outcome import Outcome
from dimefm_edge.errors import DataError, InputError
from dimefm_edge.files import atomic_file
from dimefm_edge.image_files import BadImageError
from dimefm_edge.manifest import MANIFEST_FILE
from dimefm_edge.progress import counting
from dimefm_edge.tables import format_table

if TYPE_CHECKING:
    from dimefm_edge.options import ClassifyOptions
    from dimefm_edge.runtime import ZeroShotClassifier

logger = logging.getLogger(__name__)

_USAGE = "dimefm-edge classify runs/first/bundle photos/ --labels cat dog 'red ball'"
_FIELDS = ("file", "rank", "label", "probability")


def run_classify(options: ClassifyOptions) -> Outcome:
    """Classify every image on its own; those that cannot be read are told and left out."""
    if not options.bundle or not options.images:
        raise InputError("classify takes a bundle and images", hint=_USAGE)
    if options.out is not None and (options.out.is_dir() or not options.out.parent.is_dir()):
        raise InputError(f"--out {options.out} is not a file in a folder that is there")
    files = image_files(options.images)
    classifier = _open(options)
    found: list[dict[str, Any]] = []
    unreadable: list[dict[str, str]] = []
    with counting("classify", len(files), is_transient=True) as advance:
        for file in files:
            try:
                (ranked,) = classifier.classify([file], top_k=options.top)
                found.append({
                    "file": str(file),
                    "top": [{"label": name, "probability": share} for name, share in ranked],
                })  # fmt: skip
            except BadImageError as error:
                logger.warning("%s", error)
                unreadable.append({"file": str(file), "reason": error.reason})
            advance(1)
    if not found:
        raise DataError(f"none of {len(files)} images can be read", hint="see the warnings above")
    if options.out is not None:
        with atomic_file(options.out) as stream:
            stream.write(_csv(found).encode())
    values = {"bundle": str(classifier.bundle.path), "images": found, "unreadable": unreadable}
    return Outcome(values, _table(found))


def image_files(sources: Sequence[str]) -> list[Path]:
    """Files in the order that they were named; of a folder its images at any depth.

    Raises:
        DataError: If a source is missing, or none holds an image.
    """
    from dimefm_edge.data.image_pools import IMAGE_SUFFIXES
    from dimefm_edge.data.sources import expand_source, walk_files

    files: dict[str, Path] = {}  # by where they lie: globs and folders overlap
    for source in sources:
        is_pattern = not Path(source).expanduser().exists()
        for path in expand_source(source):
            if path.is_dir():
                names = (name for name, _ in walk_files(path))
                found = [path / name for name in names if name.lower().endswith(IMAGE_SUFFIXES)]
            else:
                is_image = path.name.lower().endswith(IMAGE_SUFFIXES)
                found = [path] if is_image or not is_pattern else []
            for file in found:
                files.setdefault(os.path.realpath(file), file)
    if not files:
        raise DataError(f"no image in {', '.join(sources)}", hint=" ".join(IMAGE_SUFFIXES))
    return list(files.values())


def _open(options: ClassifyOptions) -> ZeroShotClassifier:
    from dimefm_edge.data.labelled import open_classes
    from dimefm_edge.runtime import ZeroShotClassifier

    folder = Path(options.bundle).expanduser()
    nested = folder / "bundle"
    labels: str | tuple[str, ...] | None = options.labels or None
    templates: dict[str, Any] = {}
    if len(options.labels) == 1:
        labels = options.labels[0]
        if Path(labels).suffix.lower() == ".txt":
            _, labels, templates["templates"] = open_classes(labels)
    return ZeroShotClassifier(
        nested if (nested / MANIFEST_FILE).is_file() else folder,
        threads=options.threads, engine=options.engine, labels=labels, **templates,
    )  # fmt: skip


def _table(found: Sequence[dict[str, Any]]) -> str:
    rows = [
        [
            entry["file"],
            *(f"{one['label']} {100 * one['probability']:.1f}%" for one in entry["top"]),
        ]
        for entry in found
    ]
    return format_table(["image", *map(str, range(1, len(rows[0])))], rows)


def _csv(found: Sequence[dict[str, Any]]) -> str:
    stream = io.StringIO()
    writer = csv.writer(stream, lineterminator="\n")
    writer.writerow(_FIELDS)
    for entry in found:
        for rank, one in enumerate(entry["top"], 1):
            writer.writerow([entry["file"], rank, one["label"], f"{one['probability']:.6g}"])
    return stream.getvalue()
