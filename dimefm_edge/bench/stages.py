"""From an image file to labels, stage by stage: read, decode, prepare, infer, rank.

Images are prepared as the runtime does it (`model_input`); for what runs in torch, as in training.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from dimefm_edge.bench.prepare import Prepared
from dimefm_edge.bench.runnable import Feed, Runnable
from dimefm_edge.errors import InputError
from dimefm_edge.image_files import BadImageError, Picture, read_picture
from dimefm_edge.manifest import INPUT_NAME
from dimefm_edge.model_input import HEADROOM, load_inputs, load_pixels
from dimefm_edge.preprocess import PreprocessSpec
from dimefm_edge.progress import counting

STAGES = ("read", "decode", "prepare", "infer", "rank")
"""Prepare: resize, crop and normalise."""
_RANDOM_LABELS = 1000
_TOP = 5
_MAX_NAMED = 3
_LOGIT_SCALE = 100.0


def time_stages(
    prepared: Prepared, runnable: Runnable, *, files: list[str], seconds: float, first: int
) -> dict[str, Any]:
    """Take files one by one, for some seconds, one at least.

    Args:
        prepared: What the worker loaded.
        runnable: The loaded model.
        files: Image files, taken in turn and round again.
        seconds: How long.
        first: Where in `files` to begin.

    Returns:
        `ms`: one row per image of milliseconds, a column per name in `STAGES`.

    Raises:
        BadImageError: If a file is no image.
        InputError: If how the model's images are prepared is not known.
    """
    if runnable.of_pixels is None or prepared.preprocess is None:
        raise InputError(f"how images are prepared for {prepared.path} is not known")
    spec = PreprocessSpec.from_dict(prepared.preprocess)
    label_embeds = _label_embeds(runnable, spec)
    rows: list[list[float]] = []
    until = time.perf_counter() + seconds
    while not rows or time.perf_counter() < until:
        path = Path(files[(first + len(rows)) % len(files)])
        rows.append(_one(path, spec, runnable, label_embeds))
    return {"ms": rows}


def _one(
    path: Path,
    spec: PreprocessSpec,
    runnable: Runnable,
    label_embeds: npt.NDArray[np.float32],
) -> list[float]:
    marks = [time.perf_counter_ns()]

    def done(value: Any) -> Any:
        marks.append(time.perf_counter_ns())
        return value

    data = done(path.read_bytes())
    least_side = None if runnable.is_exact else HEADROOM * spec.image_size
    picture = done(read_picture(data, least_side=least_side, name=path.name))
    feed = done(_feed(picture, spec, runnable))
    embeds = done(np.asarray(runnable.run(feed), np.float32))
    logits = _LOGIT_SCALE * embeds[0] @ label_embeds.T
    shares = np.exp(logits - logits.max())
    done(np.argsort(-shares / shares.sum())[:_TOP])
    return [(end - start) / 1e6 for start, end in itertools.pairwise(marks)]


def _feed(picture: Picture, spec: PreprocessSpec, runnable: Runnable) -> Feed:
    if runnable.is_exact or runnable.takes_pixels:
        assert runnable.of_pixels is not None
        return runnable.of_pixels(load_pixels([picture], spec, exact=runnable.is_exact))
    return {INPUT_NAME: load_inputs([picture], spec)}


def _label_embeds(runnable: Runnable, spec: PreprocessSpec) -> npt.NDArray[np.float32]:
    """(C, E): the bundle's first label set; else as many random labels as ImageNet has."""
    banks = getattr(runnable.owner, "label_banks", None)
    if banks:
        return np.asarray(next(iter(banks.values())).embeds, np.float32)
    assert runnable.of_pixels is not None
    grey = np.full((1, spec.image_size, spec.image_size, 3), 128, np.uint8)
    embed_dim = np.shape(runnable.run(runnable.of_pixels(grey)))[-1]
    values = np.random.default_rng(0).normal(size=(_RANDOM_LABELS, embed_dim))
    values /= np.linalg.norm(values, axis=1, keepdims=True)
    return np.asarray(values, np.float32)


def image_files(
    sources: Sequence[str], folder: Path, *, most: int = 256
) -> tuple[list[Path], list[str]]:
    """Image files as they are; images from shards and `scenes` are written as JPEG files first.

    Args:
        sources: Images, folders, shards, `scenes[:COUNT]`.
        folder: Where those are written that are no files of their own.
        most: Images of each source, and of all shards together.

    Returns:
        The files, each decoded once to see that it can be; and the names of those that cannot.

    Raises:
        DataError: If a source holds no image.
        InputError: If none can be read.
    """
    from dimefm_edge.data.image_pools import IMAGE_SUFFIXES
    from dimefm_edge.data.sources import walk_files

    files: list[Path] = []
    bad: list[str] = []
    others = []
    for source in sources:
        path = Path(source).expanduser()
        inside = [path / name for name, _ in walk_files(path)] if path.is_dir() else []
        found = [path] if path.is_file() else inside
        images = [p for p in found if p.suffix.lower() in IMAGE_SUFFIXES]
        _keep_readable(images, files, bad, most=most)
        if not images:
            others.append(source)
    if others:
        _write_files(others, folder, files, bad, most=most)
    if not files:
        raise InputError(
            f"none of the images of --images can be read: {name_some(bad)}", hint="--images FOLDER"
        )
    return files, bad


def name_some(names: Sequence[str]) -> str:
    """The first few, and how many more there are."""
    more = len(names) - _MAX_NAMED
    return ", ".join(names[:_MAX_NAMED]) + (f" and {more} more" if more > 0 else "")


def _keep_readable(images: list[Path], files: list[Path], bad: list[str], *, most: int) -> None:
    """Sort images into `files`, up to `most` of them, and `bad`."""
    full = len(files) + most
    total = min(len(images), most)
    with counting("looking at images", total, is_transient=True) as advance:
        for path in images:
            if len(files) == full:
                break
            try:
                read_picture(path, least_side=1)  # a JPEG at 1/8: its end is read all the same
                files.append(path)
            except BadImageError:
                bad.append(path.name)
            advance(1)


def _write_files(
    sources: Sequence[str], folder: Path, files: list[Path], bad: list[str], *, most: int
) -> None:
    """Images that are no files of their own, as JPEG files."""
    from dimefm_edge.data.image_pools import open_images

    folder.mkdir(parents=True, exist_ok=True)
    pool = open_images(sources)
    for row in range(min(len(pool), most)):
        try:
            pool.load(row).save(folder / f"{row:05}.jpg", quality=90)
            files.append(folder / f"{row:05}.jpg")
        except BadImageError:
            bad.append(pool.name(row))
