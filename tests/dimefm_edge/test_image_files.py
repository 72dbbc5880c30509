"""Image files as a person sees them, and JPEGs no further decoded than asked."""

from __future__ import annotations

import io

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageOps

from benchmarks.photos import jpeg, photo
from dimefm_edge.image_files import BadImageError, as_seen, read_image, read_picture

PHOTO = photo(96, 64)
ORIENTATION = 0x0112


def saved(image: Image.Image, kind: str, **options: object) -> bytes:
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


def tagged(orientation: int) -> Image.Exif:
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    return exif


def pixels(image: Image.Image) -> np.ndarray:
    assert image.mode == "RGB"
    return np.asarray(image).astype(int)


@pytest.mark.parametrize(
    "data",
    [
        jpeg(PHOTO), jpeg(PHOTO, subsampling=0), jpeg(PHOTO, progressive=True),
        jpeg(PHOTO.convert("L")), jpeg(PHOTO.convert("CMYK")), saved(PHOTO, "PNG"),
        saved(PHOTO.convert("L"), "PNG"), saved(PHOTO.convert("1"), "PNG"),
        saved(PHOTO.convert("P"), "GIF"), saved(PHOTO, "WEBP"), saved(PHOTO, "BMP"),
        saved(PHOTO, "TIFF"),
    ],
)  # fmt: skip
def test_ordinary_files_are_what_pillow_and_open_clip_make_of_them(data, tmp_path):
    with Image.open(io.BytesIO(data)) as image:
        wanted = np.asarray(image.convert("RGB"))
    (tmp_path / "a.jpg").write_bytes(data)
    for source in (data, tmp_path / "a.jpg", str(tmp_path / "a.jpg")):
        assert np.array_equal(pixels(read_image(source)), wanted)


def test_what_is_rgb_is_not_copied():
    assert as_seen(PHOTO) is PHOTO


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
def test_upright_by_exif(orientation, kind):
    options = {"quality": 95} if kind in ("JPEG", "WEBP") else {}
    data = saved(PHOTO, kind, exif=tagged(orientation), **options)
    with Image.open(io.BytesIO(data)) as image:
        wanted = np.asarray(ImageOps.exif_transpose(image))
    found = read_image(data)
    assert np.array_equal(pixels(found), wanted)
    assert found.size == ((64, 96) if orientation > 4 else (96, 64))
    assert np.array_equal(pixels(as_seen(found)), wanted)  # not turned twice


@pytest.mark.parametrize("exif", [b"", b"Exif\0\0", b"Exif\0\0MM\0*\xff\xff\xff\xff", b"x" * 40])
def test_damaged_exif_spoils_no_picture(exif):
    assert read_image(jpeg(PHOTO, exif=exif)).size == PHOTO.size


@pytest.mark.parametrize("mode", ["RGBA", "LA", "PA", "P"])
def test_transparent_is_white(mode):
    image = PHOTO.copy()
    image.putalpha(Image.linear_gradient("L").resize(PHOTO.size))
    white = Image.new("RGBA", image.size, "white")
    wanted = Image.alpha_composite(white, image).convert("RGB")
    if mode == "LA":
        image, wanted = image.convert("LA"), wanted.convert("L").convert("RGB")
    elif mode in ("P", "PA"):
        image = Image.new("P", PHOTO.size, 1)
        image.putpalette([10, 20, 30, 40, 50, 60])
        wanted = Image.new("RGB", PHOTO.size, "white")
        image = image.convert("PA") if mode == "PA" else image
        if mode == "P":
            image.info["transparency"] = 1
        else:
            image.putalpha(0)
    assert np.abs(pixels(as_seen(image)) - np.asarray(wanted)).max() <= 1
    if mode != "PA":  # no format keeps one
        assert np.abs(pixels(read_image(saved(image, "PNG"))) - np.asarray(wanted)).max() <= 1


def test_opaque_alpha_changes_nothing():
    assert np.array_equal(pixels(as_seen(PHOTO.convert("RGBA"))), np.asarray(PHOTO))


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "PPM"])
def test_16_bits_are_scaled(kind):
    grey = np.asarray(PHOTO.convert("L")).astype(np.uint16) * 257
    found = pixels(read_image(saved(Image.fromarray(grey), kind)))
    assert np.abs(found - np.asarray(PHOTO.convert("L"))[..., None]).max() <= 1


def test_floats_are_stretched_and_holes_in_them_do_no_harm():
    values = np.asarray(PHOTO.convert("L")).astype(np.float32) / 7
    found = pixels(read_image(saved(Image.fromarray(values), "TIFF")))
    assert (found.min(), found.max()) == (0, 255)
    values[3, 4], values[5, 6] = np.nan, np.inf
    assert np.isin(pixels(as_seen(Image.fromarray(values))), range(256)).all()
    assert pixels(as_seen(Image.new("F", (3, 3), 5.0))).max() == 0


def test_what_cannot_be_read_says_why(tmp_path):
    (tmp_path / "empty.jpg").touch()
    (tmp_path / "text.jpg").write_text("words")
    for source, reason in (
        (b"", "in these bytes cannot be read: the file is empty"),
        (tmp_path / "empty.jpg", "empty.jpg cannot be read: the file is empty"),
        (tmp_path / "text.jpg", "text.jpg cannot be read: not an image file that Pillow knows"),
        (tmp_path / "none.jpg", "none.jpg cannot be read: No such file or directory"),
        (tmp_path, "cannot be read: Is a directory"),
        (jpeg(photo(300, 300))[:9000], "truncated"),
    ):
        for least_side in (None, 1):
            with pytest.raises(BadImageError, match=reason):
                read_picture(source, least_side=least_side)
    with pytest.raises(BadImageError, match="not an image file"):
        read_image(saved(PHOTO, "PNG"), formats=("JPEG",))


# ------------------------------------------------------------------------- reduced


@pytest.mark.parametrize(
    ("size", "least_side", "reduction"),
    [
        ((640, 480), 448, 1), ((640, 480), 240, 2), ((640, 480), 241, 1), ((641, 483), 128, 2),
        ((641, 483), 60, 8), ((33, 4000), 16, 2), ((640, 480), 1, 8), ((9, 9), 1, 8),
    ],
)  # fmt: skip
def test_a_jpeg_is_decoded_no_further_than_asked(size, least_side, reduction):
    picture = read_picture(jpeg(Image.new("RGB", size)), least_side=least_side)
    assert (picture.size, picture.reduction) == (size, reduction)
    assert picture.image.size == tuple(-(-side // reduction) for side in size)


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 90), st.integers(1, 90), st.integers(1, 8), st.integers(1, 12))
def test_reduced_and_turned(width, height, orientation, least_side):
    data = jpeg(Image.new("RGB", (width, height), "red"), exif=tagged(orientation))
    picture = read_picture(data, least_side=least_side)
    whole = read_image(data)
    assert picture.size == whole.size
    assert picture.image.size == tuple(-(-side // picture.reduction) for side in whole.size)
    assert picture.reduction == 1 or min(picture.image.size) >= least_side
    # Where it is turned, pixels of the reduced picture are whole blocks of the other's.
    assert orientation == 1 or picture.reduction == 1 or width % picture.reduction == 0


def test_other_formats_are_decoded_whole():
    picture = read_picture(saved(PHOTO, "PNG"), least_side=1)
    assert (picture.image.size, picture.reduction) == (PHOTO.size, 1)
