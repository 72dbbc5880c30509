"""Captioned test sets: WebDataset shards, folders with a captions file, and scenes.

Each image has one caption or more; what is scored with them is `evaluate/retrieval.py`.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from dimefm_edge.data.decode import ImagePool
from dimefm_edge.data.image_pools import IMAGE_SUFFIXES, FolderPool, JoinedPool, TarPool
from dimefm_edge.data.labelled import list_tars, sample_key
from dimefm_edge.data.scenes import captioned_scene
from dimefm_edge.data.sources import digest_lines, expand_source, scenes_count
from dimefm_edge.data.tar_index import TarIndex, scan_tar
from dimefm_edge.errors import DataError

DEFAULT_NUM_SCENES = 500
CAPTION_FILES = tuple(
    f"{stem}.{suffix}"
    for stem in ("captions", "metadata", "results")
    for suffix in ("jsonl", "json", "csv", "tsv", "txt")
)
_IMAGE_KEYS = ("image", "file_name", "filename", "image_name", "filepath", "path")
_CAPTION_KEYS = ("captions", "caption", "raw", "text", "comment", "sentence")
_LAYOUTS = (
    "test/*.tar with .txt or .json beside each image, or a folder of images with "
    "captions.csv, .jsonl or .json"
)


@dataclass(frozen=True)
class CaptionedSet:
    """Images and what is said about each, to score retrieval."""

    name: str
    pool: ImagePool
    captions: tuple[tuple[str, ...], ...]
    """By row of the pool; one or more each."""


class CaptionedScenePool:
    """The images of the `scenes` retrieval set."""

    def __init__(self, count: int) -> None:
        self._count = count

    @property
    def fingerprint(self) -> str:
        pixels = [captioned_scene(row)[0].tobytes().hex() for row in range(min(4, self._count))]
        return digest_lines([str(self._count), *pixels])

    def __len__(self) -> int:
        return self._count

    def name(self, row: int) -> str:
        return f"scenes/captioned/{row}"

    def load(self, row: int) -> Image.Image:
        if not 0 <= row < self._count:
            raise IndexError(row)
        return captioned_scene(row)[0]


def open_captioned(source: str) -> CaptionedSet:
    """Open a captioned test set.

    Args:
        source: `scenes[:COUNT]` (five sentences an image); a CLIP-benchmark folder (`test/*.tar`
            with `.txt`, one caption a line), tars with `.txt` or `.json` (img2dataset's
            `caption`); a folder of images with a captions file (CSV with a header, as Flickr8k's
            captions.txt, .tsv, .jsonl, COCO's or Karpathy's .json), or such a file.

    Raises:
        DataError: If it is missing, damaged or of another layout, or an image has no caption.
    """
    count = scenes_count(source, DEFAULT_NUM_SCENES)
    if count is not None:
        captions = tuple(captioned_scene(row)[1] for row in range(count))
        return CaptionedSet("scenes", CaptionedScenePool(count), captions)
    paths = expand_source(source)
    if len(paths) == 1 and paths[0].is_dir():
        return _open_folder(paths[0])
    if len(paths) == 1 and paths[0].suffix.lower() != ".tar":
        return _open_file(paths[0], name=paths[0].stem)
    wrong = [path for path in paths if path.suffix.lower() != ".tar"]
    if wrong:
        raise DataError(f"{wrong[0]} is no captioned test set", hint=_LAYOUTS)
    return _open_tars(paths, name=paths[0].stem if len(paths) == 1 else paths[0].parent.name)


def _open_folder(root: Path) -> CaptionedSet:
    name = root.resolve().name
    for folder in (root / "test", root):
        if tars := list_tars(folder):
            return _open_tars(tars, name=name)
    for file in CAPTION_FILES:
        if (root / file).is_file():
            return _open_file(root / file, name=name)
    raise DataError(f"{root} holds no captioned image", hint=_LAYOUTS)


def _open_tars(paths: Sequence[Path], *, name: str) -> CaptionedSet:
    pools: list[ImagePool] = []
    captions: list[tuple[str, ...]] = []
    for path in paths:
        index = scan_tar(path, (*IMAGE_SUFFIXES, ".txt", ".json"))
        notes = {
            ending: {sample_key(m): i for i, m in enumerate(index.names) if m.endswith(ending)}
            for ending in (".txt", ".json")
        }
        places = [i for i, m in enumerate(index.names) if m.lower().endswith(IMAGE_SUFFIXES)]
        for place in places:
            captions.append(_beside(index, place, notes))
        names = tuple(index.names[i] for i in places)
        pools.append(TarPool(TarIndex(index.path, names, index.offsets[places],
                                      index.sizes[places])))  # fmt: skip
    if not captions:
        raise DataError(f"the tars of '{name}' hold no image", hint=_LAYOUTS)
    pool = pools[0] if len(pools) == 1 else JoinedPool(pools)
    return CaptionedSet(name, pool, tuple(captions))


def _beside(index: TarIndex, place: int, notes: dict[str, dict[str, int]]) -> tuple[str, ...]:
    """Captions of the `.txt` beside an image, else of the `.json`."""
    where = f"{index.path}/{index.names[place]}"
    key = sample_key(index.names[place])
    try:
        if (note := notes[".txt"].get(key)) is not None:
            return _cleaned(index.read(note).decode("utf-8-sig").split("\n"), where)
        if (note := notes[".json"].get(key)) is not None:
            return _cleaned(_captions_of(json.loads(index.read(note)), where), where)
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(f"the captions of {where} cannot be read: {error}") from error
    raise DataError(f"{where} has neither .txt nor .json beside it", hint=_LAYOUTS)


def _open_file(path: Path, *, name: str) -> CaptionedSet:
    """A captions file; images lie in its folder, or in `images/` or `Images/` there."""
    found: dict[str, list[str]] = {}
    for image, texts in _read_rows(path):
        found.setdefault(image, []).extend(texts)
    if not found:
        raise DataError(f"{path} names no image", hint=_LAYOUTS)
    files = [_locate(path, image) for image in found]
    captions = tuple(_cleaned(texts, f"{path}: {image}") for image, texts in found.items())
    return CaptionedSet(name, FolderPool(path.parent, files), captions)


def _locate(path: Path, image: str) -> tuple[str, int]:
    """Name below the captions file's folder, and bytes, of an image that the file names."""
    is_inside = not Path(image).is_absolute() and ".." not in Path(image).parts
    try:
        for folder in ("", "images/", "Images/", "val2017/", "val2014/") if is_inside else ():
            if (path.parent / folder / image).is_file():
                return folder + image, (path.parent / folder / image).stat().st_size
    except (OSError, ValueError):  # a name that no file can have
        pass
    raise DataError(f"{path} names {image}, which is not in {path.parent}")


def _read_rows(path: Path) -> Iterator[tuple[str, list[str]]]:
    try:
        text = path.read_text(encoding="utf-8-sig")
        suffix = path.suffix.lower()
        if suffix == ".json":
            yield from _json_rows(json.loads(text), path)
        elif suffix == ".jsonl":
            for number, line in enumerate(text.splitlines(), 1):
                if line.strip():
                    yield _row_of(json.loads(line), f"{path}, line {number}")
        else:
            yield from _table_rows(text, path, "\t" if suffix == ".tsv" else ",")
    except (OSError, ValueError, LookupError, TypeError, RecursionError, csv.Error) as error:
        raise DataError(f"{path} cannot be read: {error}", hint=_LAYOUTS) from error


def _table_rows(text: str, path: Path, delimiter: str) -> Iterator[tuple[str, list[str]]]:
    reader = csv.DictReader(io.StringIO(text), delimiter=delimiter, skipinitialspace=True)
    for row in reader:
        values = {str(k).strip(): v for k, v in row.items()}
        yield _row_of(values, f"{path}, line {reader.line_num}")


def _json_rows(value: Any, path: Path) -> Iterator[tuple[str, list[str]]]:
    """COCO's `images` and `annotations`, Karpathy's `images` with `sentences`, or a list."""
    if isinstance(value, dict) and isinstance(value.get("annotations"), list):
        files = {i["id"]: i["file_name"] for i in _mappings(value.get("images"), path)}
        for note in _mappings(value["annotations"], path):
            if note.get("image_id") not in files:
                raise DataError(f"{path}: no image has the id {note.get('image_id')!r}")
            yield str(files[note["image_id"]]), _captions_of(note, str(path))
        return
    if isinstance(value, dict) and isinstance(value.get("images"), list):
        for image in _mappings(value["images"], path):
            if image.get("split", "test") == "test":
                sentences = _mappings(image.get("sentences"), path)
                yield _row_of({**image, "captions": [s.get("raw") for s in sentences]}, str(path))
        return
    for number, row in enumerate(_mappings(value, path)):
        yield _row_of(row, f"{path}, entry {number}")


def _mappings(value: Any, path: Path) -> list[Mapping[str, Any]]:
    if not isinstance(value, list) or not all(isinstance(item, dict) for item in value):
        raise DataError(f"{path} is not a list of images with captions", hint=_LAYOUTS)
    return value


def _row_of(value: Any, where: str) -> tuple[str, list[str]]:
    if not isinstance(value, Mapping):
        raise DataError(f"{where}: it must name an image and its captions", hint=_LAYOUTS)
    image = next((value[k] for k in _IMAGE_KEYS if isinstance(value.get(k), str)), None)
    if not image:
        raise DataError(
            f"{where} names no image", hint=f"a column or key of {', '.join(_IMAGE_KEYS)}"
        )
    return image, _captions_of(value, where)


def _captions_of(value: Any, where: str) -> list[str]:
    if isinstance(value, Mapping):
        value = next((value[k] for k in _CAPTION_KEYS if value.get(k) is not None), None)
    texts = [value] if isinstance(value, str) else value
    if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
        raise DataError(
            f"{where} has no captions", hint=f"a column or key of {', '.join(_CAPTION_KEYS)}"
        )
    return texts


def _cleaned(texts: Iterable[str], where: str) -> tuple[str, ...]:
    kept = tuple(" ".join(text.split()) for text in texts if text.strip())
    if not kept:
        raise DataError(f"{where} has no captions: all are empty")
    return kept
