"""Images: pools to embed and train on, decoding, the pixel cache and labelled test sets."""

from __future__ import annotations

from dimefm_edge.data.decode import (
    DecodedBatch,
    ImagePool,
    decode_batches,
    decode_image,
    row_batches,
    sample_rows,
    some_images,
)
from dimefm_edge.data.image_pools import open_images
from dimefm_edge.data.labelled import LabelledSet, open_labelled
from dimefm_edge.data.pixel_cache import PixelCache
from dimefm_edge.image_files import BadImageError

__all__ = [
    "BadImageError",
    "DecodedBatch",
    "ImagePool",
    "LabelledSet",
    "PixelCache",
    "decode_batches",
    "decode_image",
    "open_images",
    "open_labelled",
    "row_batches",
    "sample_rows",
    "some_images",
]
