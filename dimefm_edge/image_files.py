"""Image files to pixels as a person sees them: training, evaluation, device and demo read alike.

Upright by the EXIF orientation, on white where transparent, 16-bit grey scaled to 8 bits. Every
other picture is what Pillow's `convert("RGB")` gives, which is all that open_clip's transform
does: it would leave a phone's photo on its side, show what a transparent picture hides, and clip
16 bits to white. The sets that CLIP models are trained on came on white too (img2dataset's
resizer). A picture that is nothing of the kind costs no extra pass or copy. No torch here.
"""

from __future__ import annotations

import io
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import ExifTags, Image, UnidentifiedImageError

from dimefm_edge.errors import DataError

Source = Path | str | bytes
"""An image file, or what is in one."""

_REDUCTIONS = (8, 4, 2)
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""By EXIF orientation: what turns the picture upright."""
_ON_SIDE = (5, 6, 7, 8)
_SAY_ORIENTATION = ("exif", "xmp", "XML:com.adobe.xmp", "Raw profile type exif")


class BadImageError(DataError):
    """One image cannot be read; `reason` says why without naming the image."""

    def __init__(self, name: str, reason: str) -> None:
        super().__init__(f"image {name} cannot be read: {reason}")
        self.reason = reason


@dataclass(frozen=True)
class Picture:
    """A decoded image, perhaps at a reduced scale."""

    image: Image.Image
    """RGB, upright."""
    size: tuple[int, int]
    """Width and height of the whole picture, upright, in its own pixels."""
    reduction: int
    """1, 2, 4 or 8: `image` has one pixel where the picture has so many across."""


def check_size(image: Image.Image, name: str) -> None:
    """Refuse more pixels than `PIL.Image.MAX_IMAGE_PIXELS`.

    Raises:
        BadImageError: If there are.
    """
    limit = Image.MAX_IMAGE_PIXELS
    if limit is not None and image.width * image.height > limit:
        raise BadImageError(
            name, f"{image.width} x {image.height} pixels exceed the limit of {limit}"
        )


def read_image(
    source: Source,
    name: str = "",
    *,
    formats: tuple[str, ...] | None = None,
    check: Callable[[Image.Image, str], None] = check_size,
) -> Image.Image:
    """Decode an image as a person sees it; see `read_picture`.

    Returns:
        RGB; the first frame of an animation.
    """
    return read_picture(source, name, formats=formats, check=check).image


def read_picture(
    source: Source,
    name: str = "",
    *,
    least_side: int | None = None,
    formats: tuple[str, ...] | None = None,
    check: Callable[[Image.Image, str], None] = check_size,
) -> Picture:
    """Decode an image as a person sees it, a JPEG at a reduced scale if that is enough.

    Args:
        source: The file, or what is in it.
        name: What to call it in a message; a file's own path by default.
        least_side: A JPEG may be decoded at 1/2, 1/4 or 1/8 (libjpeg's scaled DCT) as long as
            neither side gets shorter than this. None: decode all of it.
        formats: Pillow's names of the formats to accept; all that it knows by default.
        check: Called with the image, not decoded yet, and the name; refuses by `BadImageError`.

    Raises:
        BadImageError: If it is missing, truncated, no image, or a decompression bomb. Its cause
            is Pillow's error.
    """
    name = name or ("in these bytes" if isinstance(source, bytes) else str(source))
    try:
        if not (len(source) if isinstance(source, bytes) else os.path.getsize(source)):
            raise BadImageError(name, "the file is empty")
        stream = io.BytesIO(source) if isinstance(source, bytes) else source
        with Image.open(stream, formats=formats) as image:
            check(image, name)
            if least_side is None or image.format not in ("JPEG", "MPO"):
                upright = as_seen(image)
                return Picture(upright, upright.size, 1)
            size = image.size[::-1] if _orientation(image) in _ON_SIDE else image.size
            reduction = _reduce(image, least_side)
            return Picture(as_seen(image), size, reduction)
    except BadImageError:
        raise
    except UnidentifiedImageError as error:
        raise BadImageError(name, "not an image file that Pillow knows") from error
    except OSError as error:
        raise BadImageError(name, error.strerror or str(error)) from error
    # Pillow's plugins raise nearly anything on damaged bytes: SyntaxError, struct.error, ...
    except Exception as error:
        raise BadImageError(name, str(error) or type(error).__name__) from error


def as_seen(image: Image.Image) -> Image.Image:
    """RGB, upright, on white where transparent; the image itself if that is what it is.

    Args:
        image: Any size and mode. More than 8 bits of grey are scaled: integers from 16 bits,
            floats from their own range.
    """
    image.load()
    orientation = _orientation(image)
    if orientation in _TURNS:
        image = image.transpose(_TURNS[orientation])
        for key in _SAY_ORIENTATION:  # or it would be turned again
            image.info.pop(key, None)
    if image.mode in ("I", "F") or image.mode.startswith("I;16"):
        return _scaled_grey(image)
    if image.has_transparency_data:
        white = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(white, image.convert("RGBA")).convert("RGB")
    return image if image.mode == "RGB" else image.convert("RGB")


def _orientation(image: Image.Image) -> int:
    """EXIF's, 1 to 8; damaged EXIF says nothing, and the picture may still be good."""
    if not any(key in image.info for key in _SAY_ORIENTATION):
        return 1
    try:
        value = image.getexif().get(ExifTags.Base.Orientation, 1)
    except Exception:
        return 1
    return value if isinstance(value, int) else 1


def _reduce(image: Image.Image, least_side: int) -> int:
    """Have a JPEG decoded at the smallest scale that suits; returns how much smaller that is."""
    width, height = image.size
    is_turned = _orientation(image) != 1
    for reduction in _REDUCTIONS:
        if min(width, height) < reduction * least_side:
            continue
        # What is left over is padded at the right and bottom: elsewhere once it is turned.
        if is_turned and (width % reduction or height % reduction):
            continue
        image.draft(None, (width // reduction, height // reduction))
        return reduction
    return 1


def _scaled_grey(image: Image.Image) -> Image.Image:
    values = np.nan_to_num(np.asarray(image).astype(np.float64), posinf=0, neginf=0)
    low, high = (0.0, 65535.0) if image.mode != "F" else (values.min(), values.max())
    scaled = 255 * (values - low) / ((high - low) or 1)
    return Image.fromarray(scaled.clip(0, 255).round().astype(np.uint8)).convert("RGB")
