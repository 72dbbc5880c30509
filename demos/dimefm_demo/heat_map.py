"""Where a model looked: what hiding each part of a picture costs a label (occlusion).

No gradients, so any engine will do: Zeiler and Fergus, arXiv 1311.2901, section 4.2.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt
from PIL import Image

from dimefm_demo.models import Model
from dimefm_edge.preprocess import resize_image

GRID = 8
_HIDDEN = 0.25
"""Side of the hidden square, as a share of the picture's."""
_IMAGES_PER_CALL = 16
_SHOWN_SIDE = 384


def relevance(
    model: Model,
    pixels: npt.NDArray[np.uint8],
    label_embeds: npt.NDArray[np.float32],
    *,
    advance: Callable[[float], None] = lambda share: None,
) -> npt.NDArray[np.float32]:
    """How much each place matters to a label.

    Args:
        model: Asked `GRID` x `GRID` + 1 times.
        pixels: (S, S, 3) uint8, as the model sees the picture.
        label_embeds: (E,), L2-normalised.
        advance: Told the share that is done.

    Returns:
        (GRID, GRID): the cosine that is lost when the place is hidden under the picture's mean
        colour; negative where the label gains.
    """
    side = len(pixels)
    half = max(1, round(side * _HIDDEN / 2))
    fill = pixels.reshape(-1, 3).mean(axis=0).round().astype(np.uint8)
    centres = [round((i + 0.5) * side / GRID) for i in range(GRID)]
    hidden = np.repeat(pixels[None], GRID * GRID + 1, axis=0)
    for place, (y, x) in enumerate((y, x) for y in centres for x in centres):
        hidden[place, max(0, y - half) : y + half, max(0, x - half) : x + half] = fill
    cosines = np.empty(len(hidden), np.float32)
    for start in range(0, len(hidden), _IMAGES_PER_CALL):
        chunk = slice(start, start + _IMAGES_PER_CALL)
        cosines[chunk] = model.subject.encode_pixels(hidden[chunk]) @ label_embeds
        advance(min(1.0, (start + _IMAGES_PER_CALL) / len(hidden)))
    lost: npt.NDArray[np.float32] = cosines[-1] - cosines[:-1]
    return lost.reshape(GRID, GRID)


def draw(pixels: npt.NDArray[np.uint8], heat: npt.NDArray[np.float32]) -> Image.Image:
    """Lay relevance over the picture, as the model sees it: grey where nothing is lost, then red.

    Args:
        pixels: (S, S, 3) uint8.
        heat: (GRID, GRID), as `relevance` gives it.
    """
    size = (_SHOWN_SIDE, _SHOWN_SIDE)
    share = np.clip(heat, 0, None) / max(float(heat.max()), 1e-6)
    smooth = Image.fromarray((255 * share).astype(np.uint8)).resize(size, Image.Resampling.BICUBIC)
    picture = Image.fromarray(pixels).resize(size, Image.Resampling.BICUBIC)
    faded = Image.blend(picture.convert("L").convert("RGB"), picture, 0.35)
    hot = Image.new("RGB", size, (255, 40, 0))
    return Image.composite(Image.blend(faded, hot, 0.7), faded, smooth)


def as_seen(model: Model, image: Image.Image) -> npt.NDArray[np.uint8]:
    """(S, S, 3): the picture as the model's preprocessing hands it over."""
    return resize_image(image, model.subject.preprocess)
