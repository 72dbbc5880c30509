"""Photo-like JPEGs made by code: noise whose spectrum falls off as that of photographs does.

Natural images have amplitudes that fall as 1/f^slope with a slope near 1 (Field 1987; Ruderman
1994); a camera's lens and sharpening leave more of large scales, its sensor adds a little noise.
Used by bench_preprocess.py, bench_end_to_end.py and the tests of preprocessing.
"""

from __future__ import annotations

import io
from typing import Any

import numpy as np
from PIL import Image

_SLOPE = 1.2
_CONTRAST = 50.0
_SENSOR_NOISE = 1.5


def photo(width: int, height: int, *, seed: int = 0) -> Image.Image:
    """A picture of clouds, so to say: as much structure at each scale, brighter than coloured."""
    rng = np.random.default_rng(seed)
    frequency = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width)[None])
    frequency[0, 0] = np.inf
    bright, warm, green = (_field(rng, frequency, (height, width)) for _ in range(3))
    planes = [bright + 0.25 * warm, bright - 0.1 * warm + 0.15 * green, bright - 0.25 * green]
    noise = _SENSOR_NOISE * rng.standard_normal((height, width), np.float32)
    levels = [_CONTRAST * plane + 118 + noise for plane in planes]
    return Image.fromarray(np.stack(levels, -1).clip(0, 255).astype(np.uint8))


def jpeg(image: Image.Image, *, quality: int = 90, **options: Any) -> bytes:
    """The picture as a JPEG file, 4:2:0 like a camera's unless told."""
    stream = io.BytesIO()
    image.save(stream, "JPEG", quality=quality, **options)
    return stream.getvalue()


def _field(rng: np.random.Generator, frequency: Any, shape: tuple[int, int]) -> Any:
    spectrum = np.fft.rfft2(rng.standard_normal(shape, np.float32)) * frequency**-_SLOPE
    values = np.fft.irfft2(spectrum, s=shape).astype(np.float32)
    return values / values.std()
