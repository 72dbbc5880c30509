"""From a file, its bytes or a picture to a model's input: what the device does, and quickly.

The same picture as `preprocess.resize_image` makes, within a tolerance, in two thirds to a
quarter of its time. What is left is decoding, above all JPEG's entropy coding, which nothing
avoids; so:

- a JPEG is decoded at 1/2, 1/4 or 1/8 where that leaves twice the pixels that the model takes;
- only what the crop keeps is resampled, by `resample`, straight to planes of floats;
- these are normalised where they lie.

Against the training transform, in levels of 0 to 255: without reduction 1.3 at most at any pixel
(Pillow rounds twice, this not at all); with it, on photographs, at most 2 on average and 16 at any
pixel. `exact=True` is the training transform itself. benchmarks/bench_preprocess.py measures.

The floor is Pillow's decoder at the reduced scale. Just below four pixels for each of the model's
(320x240 to 64) nothing is reduced, and it alone is half of ours and 0.45 of all that PIL does: 1.5
times PIL's speed would leave less than half of what Pillow's own resampling takes. Another decoder
(simplejpeg, OpenCV's) took 3 to 6% less on 640x480 and larger: all are libjpeg-turbo, and none is
worth a dependency.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image

from dimefm_edge.image_files import Picture, as_seen, read_picture
from dimefm_edge.preprocess import (
    PreprocessSpec,
    crop_corner,
    margins,
    normalise_pixels,
    resize_image,
    resized_size,
)
from dimefm_edge.resample import FILTERS, Bands, fit_bands, resample

ImageSource = Image.Image | Picture | Path | str | bytes
"""A picture, one that `read_picture` read, an image file, or what is in one."""

HEADROOM = 2
"""Pixels left per pixel wanted when a picture is reduced before it is resampled. At 1 the mean
difference is some 2 levels and edges differ by 50; at 3 hardly any photograph is reduced."""

Levels = npt.NDArray[np.float32]


def load_inputs(
    sources: Sequence[ImageSource], spec: PreprocessSpec, *, exact: bool = False
) -> npt.NDArray[np.float32]:
    """Read, resize, crop and normalise images.

    Args:
        sources: Image files, their bytes, or pictures of any size and mode.
        spec: The model's preprocessing.
        exact: Bit for bit what training does, instead of quickly.

    Returns:
        (B, 3, S, S) float32, for `Engine.encode_image`.

    Raises:
        BadImageError: If one cannot be read.
    """
    if exact or spec.interpolation not in FILTERS:
        return normalise_pixels(load_pixels(sources, spec, exact=True), spec)
    scale, shift = (values[:, None, None] for values in spec.scale_and_shift())
    inputs = np.empty((len(sources), 3, spec.image_size, spec.image_size), np.float32)
    for values, source in zip(inputs, sources, strict=True):
        _write_levels(source, spec, values)
        values *= scale
        values -= shift
    return inputs


def load_pixels(
    sources: Sequence[ImageSource], spec: PreprocessSpec, *, exact: bool = False
) -> npt.NDArray[np.uint8]:
    """Read, resize and crop images; `load_inputs` before it normalises.

    Returns:
        (B, S, S, 3) uint8, RGB, for `Engine.encode_pixels`.

    Raises:
        BadImageError: If one cannot be read.
    """
    side = spec.image_size
    pixels = np.empty((len(sources), side, side, 3), np.uint8)
    levels = np.empty((3, side, side), np.float32)
    for values, source in zip(pixels, sources, strict=True):
        if exact or spec.interpolation not in FILTERS:
            values[...] = resize_image(load_image(source), spec)
        else:
            _write_levels(source, spec, levels)
            values[...] = np.rint(levels, out=levels).transpose(1, 2, 0)
    return pixels


def load_image(source: ImageSource) -> Image.Image:
    """All of a picture as a person sees it, RGB.

    Raises:
        BadImageError: If it cannot be read.
    """
    if isinstance(source, Picture):
        return source.image
    return as_seen(source) if isinstance(source, Image.Image) else read_picture(source).image


def _write_levels(source: ImageSource, spec: PreprocessSpec, out: Levels) -> None:
    """Read, resize and crop an image into (3, S, S), in [0, 255]."""
    if isinstance(source, Image.Image):
        image = as_seen(source)
        picture = Picture(image, image.size, 1)
    elif isinstance(source, Picture):
        picture = source
    else:
        picture = read_picture(source, least_side=HEADROOM * spec.image_size)
    side = spec.image_size
    size = resized_size(picture.size, spec)
    if spec.resize_mode == "longest":
        out[...] = spec.fill_color
        left, top = margins(size, side)
        inner = out[:, top : top + size[1], left : left + size[0]]
        _resample_part(picture, size, (0, 0), spec, inner)
    else:
        _resample_part(picture, size, crop_corner(size, side), spec, out)


def _resample_part(
    picture: Picture,
    size: tuple[int, int],
    corner: tuple[int, int],
    spec: PreprocessSpec,
    out: Levels,
) -> None:
    """Of a picture resized to `size`: what lies from a corner on, as much as `out` holds."""
    kept = out.shape[:0:-1]
    image = picture.image
    factors, bands = [], []
    for axis in (0, 1):
        # In pixels of the image, the last of which its reduction may have padded.
        step = picture.size[axis] / picture.reduction / size[axis]
        factor = max(1, int(step / HEADROOM))
        begin, end = step * corner[axis], step * (corner[axis] + kept[axis])
        box = begin / factor, end / factor
        length = -(-image.size[axis] // factor)
        bands.append(fit_bands(length, box, kept[axis], spec.interpolation))
        factors.append(factor)
    columns, rows = bands
    part = _part(image, columns, rows, (factors[0], factors[1]))
    resample([np.asarray(band) for band in part.split()], rows, columns, out=out)


def _part(image: Image.Image, columns: Bands, rows: Bands, factor: tuple[int, int]) -> Image.Image:
    """What the bands read of an image, averaged over blocks of `factor` pixels."""
    box = (
        columns.start * factor[0],
        rows.start * factor[1],
        min(columns.stop * factor[0], image.width),
        min(rows.stop * factor[1], image.height),
    )
    return image.crop(box) if factor == (1, 1) else image.reduce(factor, box)
