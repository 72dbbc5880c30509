"""How pixels become a model's input: one specification for training, export and the device.

No torch here. The specification travels from the teacher to the student, its checkpoint and
its bundle, so the demo cannot disagree with training.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from dimefm_edge.errors import ConfigError
from dimefm_edge.image_files import as_seen

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
_INTERPOLATIONS = {
    "bicubic": Image.Resampling.BICUBIC,
    "bilinear": Image.Resampling.BILINEAR,
    "nearest": Image.Resampling.NEAREST,
}
_RESIZE_MODES = ("shortest", "longest", "squash")


@dataclass(frozen=True)
class PreprocessSpec:
    """Resize, crop and normalisation, with the meaning that open_clip gives to each."""

    image_size: int = 224
    """Side of the square input, in pixels."""
    mean: tuple[float, float, float] = CLIP_MEAN
    """Per channel (RGB), of values in [0, 1]."""
    std: tuple[float, float, float] = CLIP_STD
    interpolation: str = "bicubic"
    """bicubic, bilinear or nearest."""
    resize_mode: str = "shortest"
    """shortest: resize the short side, crop the middle; longest: resize the long side, pad;
    squash: ignore the aspect ratio."""
    fill_color: int = 0
    """Value of padding in [0, 255]; used by `longest` only."""

    def __post_init__(self) -> None:
        if self.image_size <= 0:
            raise ConfigError(f"image_size must be positive, got {self.image_size}")
        if self.interpolation not in _INTERPOLATIONS:
            raise ConfigError(
                f"interpolation must be one of {', '.join(_INTERPOLATIONS)}, "
                f"got '{self.interpolation}'"
            )
        if self.resize_mode not in _RESIZE_MODES:
            raise ConfigError(
                f"resize_mode must be one of {', '.join(_RESIZE_MODES)}, got '{self.resize_mode}'"
            )

    def digest(self) -> str:
        """A short hash of every field, for manifests."""
        text = json.dumps(self.to_dict(), sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def scale_and_shift(self) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]:
        """(3,) each: levels in [0, 255] times the first less the second are the model's input."""
        scale = np.asarray([1 / (255 * s) for s in self.std], np.float32)
        shift = np.asarray([m / s for m, s in zip(self.mean, self.std, strict=True)], np.float32)
        return scale, shift

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> PreprocessSpec:
        """Rebuild from `to_dict`, lists for tuples allowed."""
        fixed: dict[str, Any] = {
            k: tuple(v) if isinstance(v, list) else v for k, v in values.items()
        }
        return cls(**fixed)


def resize_image(image: Image.Image, spec: PreprocessSpec) -> npt.NDArray[np.uint8]:
    """Resize and crop (or pad) an image to the model's square: bit for bit as in training.

    Args:
        image: Any size and mode; seen as `image_files.as_seen` does.
        spec: The model's preprocessing.

    Returns:
        (image_size, image_size, 3) uint8, RGB.
    """
    side = spec.image_size
    resample = _INTERPOLATIONS[spec.interpolation]
    image = as_seen(image)
    size = resized_size(image.size, spec)
    if size != image.size:
        image = image.resize(size, resample)
    if spec.resize_mode == "longest":
        canvas = Image.new("RGB", (side, side), (spec.fill_color,) * 3)
        canvas.paste(image, margins(size, side))
        return np.asarray(canvas)
    left, top = crop_corner(size, side)
    return np.asarray(image.crop((left, top, left + side, top + side)))


def resized_size(size: tuple[int, int], spec: PreprocessSpec) -> tuple[int, int]:
    """(width, height) of a whole picture of that size once resized, before it is cropped."""
    (width, height), side = size, spec.image_size
    if spec.resize_mode == "squash":
        return side, side
    # As torchvision's Resize (which truncates) and open_clip's ResizeKeepRatio (which rounds):
    # the other way would shift the crop by a pixel.
    if spec.resize_mode == "shortest":
        edge = min(width, height)
        return int(side * width / edge), int(side * height / edge)
    ratio = max(width, height) / side
    return max(1, round(width / ratio)), max(1, round(height / ratio))


def crop_corner(size: tuple[int, int], side: int) -> tuple[int, int]:
    """(left, top) of the middle square of a picture of that size."""
    return round((size[0] - side) / 2), round((size[1] - side) / 2)


def margins(size: tuple[int, int], side: int) -> tuple[int, int]:
    """(left, top) of a picture of that size in the middle of the padded square."""
    return (side - size[0]) // 2, (side - size[1]) // 2


def normalise_pixels(
    pixels: npt.NDArray[np.uint8], spec: PreprocessSpec
) -> npt.NDArray[np.float32]:
    """Turn (B, H, W, 3) uint8 pixels into the (B, 3, H, W) float32 model input."""
    scale, shift = spec.scale_and_shift()
    batch, height, width, _ = pixels.shape
    values = np.empty((batch, 3, height, width), np.float32)
    for channel in range(3):
        np.multiply(pixels[..., channel], scale[channel], out=values[:, channel])
        values[:, channel] -= shift[channel]
    return values


def preprocess_images(images: list[Image.Image], spec: PreprocessSpec) -> npt.NDArray[np.float32]:
    """Resize, crop and normalise images: (B, 3, image_size, image_size) float32."""
    return normalise_pixels(np.stack([resize_image(image, spec) for image in images]), spec)
