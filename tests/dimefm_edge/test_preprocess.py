"""Preprocessing: the same pixels as torchvision and open_clip make, without torch."""

from __future__ import annotations

import io

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from dimefm_edge.errors import ConfigError
from dimefm_edge.preprocess import (
    CLIP_MEAN,
    CLIP_STD,
    PreprocessSpec,
    normalise_pixels,
    preprocess_images,
    resize_image,
)


def _image(width: int, height: int, mode: str = "RGB") -> Image.Image:
    rng = np.random.default_rng(width * 1000 + height)
    pixels = rng.integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels).convert(mode)


@pytest.mark.parametrize("size", [(64, 64), (100, 37), (37, 100), (33, 32), (500, 333), (17, 90)])
@pytest.mark.parametrize("resize_mode", ["shortest", "longest", "squash"])
@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
def test_as_open_clip(size, resize_mode, interpolation):
    transform = pytest.importorskip("open_clip.transform")
    theirs = transform.image_transform_v2(
        transform.PreprocessCfg(
            size=32, resize_mode=resize_mode, interpolation=interpolation, fill_color=7
        ),
        is_train=False,
    )
    spec = PreprocessSpec(32, interpolation=interpolation, resize_mode=resize_mode, fill_color=7)
    image = _image(*size)
    ours = preprocess_images([image], spec)[0]
    np.testing.assert_allclose(ours, theirs(image).numpy(), atol=1e-5)


@pytest.mark.parametrize("mode", ["L", "RGBA", "P", "CMYK", "1", "LA"])
def test_every_mode_becomes_rgb(mode):
    pixels = resize_image(_image(40, 50, mode), PreprocessSpec(32))
    assert pixels.shape == (32, 32, 3)
    assert pixels.dtype == np.uint8


def test_pictures_are_seen_as_a_person_sees_them():
    """A picture opened from a file is what `image_files` makes of the file."""
    spec, upright = PreprocessSpec(32), _image(40, 50)
    turned = upright.transpose(Image.Transpose.ROTATE_90)
    exif = Image.Exif()
    exif[0x0112] = 6
    stream = io.BytesIO()
    turned.save(stream, "PNG", exif=exif)
    assert np.array_equal(resize_image(Image.open(stream), spec), resize_image(upright, spec))
    hidden = upright.copy()
    hidden.putalpha(0)
    assert (resize_image(hidden, spec) == 255).all()
    deep = Image.fromarray(np.full((40, 50), 100 * 257, np.uint16))
    assert (resize_image(deep, spec) == 100).all()


@settings(max_examples=40, deadline=None)
@given(
    st.integers(1, 300),
    st.integers(1, 300),
    st.integers(1, 64),
    st.sampled_from(["shortest", "longest", "squash"]),
)
def test_every_size_gives_the_square(width, height, side, resize_mode):
    spec = PreprocessSpec(side, resize_mode=resize_mode)
    assert resize_image(_image(width, height), spec).shape == (side, side, 3)


def test_normalisation_is_the_formula():
    pixels = np.random.default_rng(0).integers(0, 256, (2, 4, 4, 3), dtype=np.uint8)
    expected = (pixels.astype(np.float64) / 255 - CLIP_MEAN) / CLIP_STD
    ours = normalise_pixels(pixels, PreprocessSpec(4))
    assert ours.dtype == np.float32
    assert ours.flags.c_contiguous
    np.testing.assert_allclose(ours, expected.transpose(0, 3, 1, 2), atol=1e-5)


def test_a_spec_survives_json_and_its_digest_tells_changes():
    import json

    spec = PreprocessSpec(48, mean=(0.1, 0.2, 0.3), resize_mode="longest", fill_color=9)
    again = PreprocessSpec.from_dict(json.loads(json.dumps(spec.to_dict())))
    assert again == spec
    assert again.digest() == spec.digest()
    others = [PreprocessSpec(47), PreprocessSpec(48), PreprocessSpec(48, interpolation="nearest")]
    assert len({spec.digest(), *(s.digest() for s in others)}) == 4


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"image_size": 0}, "image_size must be positive, got 0"),
        ({"interpolation": "lanczos"}, "interpolation must be one of bicubic, bilinear, nearest"),
        ({"resize_mode": "crop"}, "resize_mode must be one of shortest, longest, squash"),
    ],
)
def test_values_that_cannot_be(values, message):
    with pytest.raises(ConfigError, match=message):
        PreprocessSpec(**values)
