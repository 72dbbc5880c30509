"""What visitors send: pictures, labels and archives, none of which is trusted.

Everything wrong becomes a `DataError` or `InputError` that says what to do; nothing is written
to disk under a name that a visitor chose.
"""

from __future__ import annotations

import functools
import re
import unicodedata
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image, UnidentifiedImageError

from dimefm_edge import image_files
from dimefm_edge.errors import DataError, InputError
from dimefm_edge.image_files import BadImageError
from dimefm_edge.manifest import ARCHIVE_ERRORS

MAX_MEGAPIXELS = 64
MAX_LABELS = 4000
"""As many as `LabelEncoder` keeps."""
MAX_LABEL_CHARS = 200
MAX_TEMPLATES = 16
MAX_IMAGES = 5000
"""Of one search index or batch."""
IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff")

# Only what people send: Pillow's other readers, some of which run programs, are never reached.
_FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")
_MAX_ASPECT = 100
_MAX_UNPACKED_BYTES = 2**30
# Photographs hardly compress; 64 MiB may be blank scans, more must be earned.
_MAX_RATIO = 20
_FREE_BYTES = 2**26
_SEPARATORS = re.compile("[,\n\uff0c\u3001\u060c]")  # also Chinese, Japanese and Arabic commas
_DRIVE = re.compile("[A-Za-z]:$")
_SPOOFING = re.compile("[\u202a-\u202e\u2066-\u2069]")


def read_image(source: Path | bytes, name: str) -> Image.Image:
    """Decode a picture as a person sees it: upright, on white where it is transparent.

    Args:
        source: The file, or what is in it.
        name: What the visitor calls it.

    Returns:
        RGB; the first frame of an animation.

    Raises:
        BadImageError: If it is no picture, damaged, too large or too thin.
    """
    try:
        return image_files.read_image(source, name, formats=_FORMATS, check=_check_size)
    except BadImageError as error:
        reason = error.reason
        if isinstance(error.__cause__, Image.DecompressionBombError):
            reason = f"it has more than {MAX_MEGAPIXELS} megapixels"
        elif isinstance(error.__cause__, UnidentifiedImageError):
            reason = "it is no JPEG, PNG, WebP, GIF, BMP or TIFF picture"
        raise BadImageError(name, reason) from error


def _check_size(image: Image.Image, name: str) -> None:
    short, long = sorted(image.size)
    if short * long > MAX_MEGAPIXELS * 1e6:
        raise BadImageError(
            name,
            f"{image.width} x {image.height} pixels are more than {MAX_MEGAPIXELS} megapixels",
        )
    if long > _MAX_ASPECT * short:
        raise BadImageError(name, f"{image.width} x {image.height} pixels are too thin")


# ------------------------------------------------------------------------------- words


def parse_labels(text: str | Sequence[str]) -> tuple[str, ...]:
    """Labels from a text that separates them by commas or line ends; each once, in order.

    Args:
        text: Any script; commas of Chinese, Japanese and Arabic count too. Or a list of labels,
            which may hold commas.

    Raises:
        InputError: If there is none, there are too many, or one is too long.
    """
    words = _SEPARATORS.split(text) if isinstance(text, str) else text
    labels = tuple(dict.fromkeys(filter(None, map(_clean, words))))
    if not labels:
        raise InputError("there are no labels", hint="a cat, a dog, a red car")
    if len(labels) > MAX_LABELS:
        raise InputError(
            f"{len(labels):,} labels are too many: this page takes {MAX_LABELS:,}",
            hint="split them into several lists",
        )
    longest = max(labels, key=len)
    if len(longest) > MAX_LABEL_CHARS:
        raise InputError(
            f"the label {longest[:40]}... has {len(longest)} characters, more than "
            f"{MAX_LABEL_CHARS}",
            hint="commas or line ends separate labels",
        )
    return labels


def parse_templates(text: str | Sequence[str]) -> tuple[str, ...]:
    """Prompt templates, one per line; their `{c}` is checked where they are used.

    Raises:
        InputError: If there is none, or there are too many.
    """
    lines = text.splitlines() if isinstance(text, str) else text
    templates = tuple(dict.fromkeys(filter(None, map(_clean, lines))))
    if not templates:
        raise InputError("there is no prompt template", hint="a photo of a {c}.")
    if len(templates) > MAX_TEMPLATES:
        raise InputError(
            f"{len(templates)} prompt templates are too many: this page takes {MAX_TEMPLATES}",
            hint="keep those that differ most",
        )
    return templates


def _clean(word: str) -> str:
    """Without control characters and those that turn the reading direction of what follows."""
    seen = "".join(c for c in str(word) if c == "\t" or unicodedata.category(c) != "Cc")
    return " ".join(_SPOOFING.sub("", seen).split())


# ---------------------------------------------------------------------- many pictures


@dataclass(frozen=True)
class _Item:
    name: str
    read: Callable[[], Path | bytes]


class UploadPool:
    """Uploaded pictures and the pictures in uploaded archives, as an `ImagePool`.

    Archives are read in place, a member at a time.
    """

    def __init__(self, paths: Sequence[Path]) -> None:
        """Look into what was uploaded.

        Args:
            paths: Pictures and `.zip` archives, where the server put them.

        Raises:
            DataError: If there is no picture, there are too many, or an archive is damaged or
                could do harm.
        """
        self._items: list[_Item] = []
        for path in paths:
            self._items += _zip_items(path) if path.suffix.lower() == ".zip" else [_file(path)]
        if not self._items:
            raise DataError(
                "there is no picture to look at",
                hint=f"pictures, or .zip archives of them: {' '.join(IMAGE_SUFFIXES)}",
            )
        if len(self._items) > MAX_IMAGES:
            raise DataError(
                f"{len(self._items):,} pictures are too many at once: this page takes "
                f"{MAX_IMAGES:,}",
                hint="split them; dimefm-edge embed and eval have no limit",
            )

    @property
    def fingerprint(self) -> str:
        return "0" * 16  # of an index that lives as long as the page

    def __len__(self) -> int:
        return len(self._items)

    def name(self, row: int) -> str:
        return self._items[row].name

    def load(self, row: int) -> Image.Image:
        item = self._items[row]
        try:
            return read_image(item.read(), item.name)
        except ARCHIVE_ERRORS as error:
            raise BadImageError(item.name, str(error) or type(error).__name__) from error


def _file(path: Path) -> _Item:
    return _Item(path.name, lambda: path)


def _zip_items(path: Path) -> list[_Item]:
    try:
        archive = zipfile.ZipFile(path)  # open as long as the pool lives
        members = [m for m in archive.infolist() if not m.is_dir()]
    except ARCHIVE_ERRORS as error:
        raise DataError(
            f"the archive {path.name} cannot be read: {error}", hint="pack it again as a .zip"
        ) from error
    _check_members(members, path.name)
    pictures = [m for m in members if _is_picture(m.filename)]
    return [_Item(m.filename, functools.partial(_read_member, archive, m)) for m in pictures]


def _read_member(archive: zipfile.ZipFile, member: zipfile.ZipInfo) -> bytes:
    with archive.open(member) as stream:
        return stream.read(member.file_size + 1)  # never more than was declared and checked


def _is_picture(name: str) -> bool:
    parts = name.split("/")
    is_hidden = any(part.startswith((".", "__MACOSX")) for part in parts)
    return name.lower().endswith(IMAGE_SUFFIXES) and not is_hidden


def _check_members(members: Sequence[zipfile.ZipInfo], name: str) -> None:
    """Refuse what an honest archive of pictures does not do."""
    for member in members:
        # zipfile itself mends some names; the raw one tells the intent.
        parts = member.orig_filename.replace("\\", "/").split("/")
        if ".." in parts or parts[0] == "" or _DRIVE.match(parts[0]):
            raise DataError(
                f"the archive {name} holds a path that leaves it: {member.orig_filename!r}",
                hint="get it from somewhere you trust",
            )
        if member.flag_bits & 1:
            raise DataError(f"the archive {name} is encrypted", hint="pack it without a password")
    total = sum(m.file_size for m in members)
    packed = sum(m.compress_size for m in members)
    if total > _MAX_UNPACKED_BYTES or total > _FREE_BYTES + _MAX_RATIO * packed:
        raise DataError(
            f"the archive {name} would unpack from {packed / 2**20:.1f} to {total / 2**20:,.0f} "
            "MiB: pictures do not",
            hint="pack fewer pictures, as JPEG or PNG",
        )
