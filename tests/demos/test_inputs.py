"""What visitors send: right pictures from odd files, clear messages for the rest."""

from __future__ import annotations

import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dimefm_demo.inputs import (
    MAX_LABELS,
    UploadPool,
    parse_labels,
    parse_templates,
    read_image,
)
from dimefm_edge.data.images import BadImageError
from dimefm_edge.errors import DataError, InputError
from tests.demos import bad_files as bad

SCENE = bad.scene()
ROTATED = bad.rotated_jpeg(SCENE)
JPEG = bad.encoded(SCENE.resize((256, 256)), "JPEG")


def difference(image: Image.Image, other: Image.Image) -> float:
    assert image.mode == other.mode == "RGB"
    assert image.size == other.size
    return float(np.abs(np.asarray(image, float) - np.asarray(other, float)).mean())


@pytest.mark.parametrize(
    ("data", "wanted", "tolerance"),
    [
        (bad.encoded(SCENE, "PNG"), SCENE, 0),
        (bad.encoded(SCENE, "WEBP", lossless=True), SCENE, 0),
        (ROTATED, SCENE, 8),
        (bad.deep_png(SCENE), SCENE.convert("L").convert("RGB"), 1),
        (bad.animated_gif(SCENE, Image.new("RGB", (64, 64))), SCENE, 8),
        (bad.encoded(SCENE.convert("CMYK"), "JPEG", quality=95), SCENE, 8),
        (bad.encoded(SCENE.convert("P"), "PNG"), SCENE.convert("P").convert("RGB"), 0),
    ],
    ids=["png", "webp", "exif rotation", "16 bits", "animated gif", "cmyk", "palette"],
)
def test_odd_pictures_are_read_as_a_person_sees_them(data, wanted, tolerance):
    assert difference(read_image(data, "x"), wanted) <= tolerance


def test_what_is_transparent_is_white():
    pixels = np.asarray(read_image(bad.see_through_png(SCENE), "x"))
    assert (pixels[:, :32] == 255).all()
    assert np.array_equal(pixels[:, 32:], np.asarray(SCENE)[:, 32:])


@pytest.mark.parametrize(
    ("data", "why"),
    [
        (b"these are words", "it is no JPEG, PNG, WebP, GIF, BMP or TIFF picture"),
        (b"", "the file is empty"),
        (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "it is no JPEG, PNG"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "it is no JPEG, PNG"),
        (JPEG[: len(JPEG) // 2], "truncated"),
        (bad.huge_png(), "more than 64 megapixels"),
        (bad.huge_png(12_000), "12000 x 12000 pixels are more than 64 megapixels"),
        (bad.encoded(Image.new("L", (3000, 2)), "PNG"), "3000 x 2 pixels are too thin"),
    ],
    ids=["text", "empty", "svg", "eps", "truncated", "20000 px", "12000 px", "thin"],
)
@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_what_is_no_picture_says_why(data, why, tmp_path):
    path = tmp_path / "photo.jpg"
    path.write_bytes(data)
    for source in (data, path):
        with pytest.raises(BadImageError, match=f"image photo.jpg cannot be read: .*{why}"):
            read_image(source, "photo.jpg")


# ------------------------------------------------------------------------------- words


@pytest.mark.parametrize(
    ("text", "labels"),
    [
        ("a cat, a dog", ("a cat", "a dog")),
        ("a cat\n\n  a   dog ,\r\na cat,", ("a cat", "a dog")),
        ("猫、犬\uff0c鳥", ("猫", "犬", "鳥")),
        ("قطة، كلب", ("قطة", "كلب")),
        ("🐶, 👩‍👩‍👧, é", ("🐶", "👩‍👩‍👧", "é")),
        ("<b>bold</b>, {c}, %s", ("<b>bold</b>", "{c}", "%s")),
        ("a\x00b, \u202ecat", ("ab", "cat")),
        (["tench, a fish", "eel"], ("tench, a fish", "eel")),
    ],
)
def test_labels_of_any_script(text, labels):
    assert parse_labels(text) == labels


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("", "there are no labels\n  try: a cat, a dog"),
        (" ,\n , ", "there are no labels"),
        (",".join(map(str, range(10_000))), f"10,000 labels are too many: .* {MAX_LABELS:,}"),
        ("x" * 201, r"the label x+\.\.\. has 201 characters, more than 200"),
    ],
)
def test_wrong_labels_say_so(text, why):
    with pytest.raises(InputError, match=why):
        parse_labels(text)


def test_templates_are_lines():
    assert parse_templates("a {c}.\n\n a photo, of a {c}.\n") == ("a {c}.", "a photo, of a {c}.")
    with pytest.raises(InputError, match="there is no prompt template"):
        parse_templates(" \n")
    with pytest.raises(InputError, match="17 prompt templates are too many: this page takes 16"):
        parse_templates([f"{i} {{c}}" for i in range(17)])


# -------------------------------------------------------------------------- many pictures


def pool_of(folder: Path, files: dict[str, bytes]) -> UploadPool:
    paths = []
    for name, data in files.items():
        (folder / name).write_bytes(data)
        paths.append(folder / name)
    return UploadPool(paths)


def test_pictures_and_archives_are_one_pool(tmp_path):
    archive = bad.zipped(
        {"in/<b>.png": bad.encoded(SCENE, "PNG"), "notes.txt": b"no", "in/bad.jpg": b"no",
         "__MACOSX/in/._a.png": b"no", ".hidden.png": b"no"}
    )  # fmt: skip
    pool = pool_of(tmp_path, {"a.jpg": JPEG, "b.zip": archive})
    assert [pool.name(row) for row in range(len(pool))] == ["a.jpg", "in/<b>.png", "in/bad.jpg"]
    assert difference(pool.load(1), SCENE) == 0
    with pytest.raises(BadImageError, match=r"image in/bad\.jpg cannot be read: it is no JPEG"):
        pool.load(2)


@pytest.mark.parametrize(
    ("data", "why"),
    [
        (bad.zip_bomb(), r"would unpack from 0\.\d to 200 MiB: pictures do not"),
        (bad.zipped({"../../etc/x.png": b"x"}), "a path that leaves it: '../../etc/x.png'"),
        (bad.zipped({"/etc/x.png": b"x"}), "a path that leaves it"),
        (bad.zipped({"a\\..\\..\\x.png": b"x"}), "a path that leaves it"),
        (bad.zipped({"C:/x.png": b"x"}), "a path that leaves it"),
        (b"PK\x03\x04 no archive", "the archive u.zip cannot be read"),
        (bad.zipped({"notes.txt": b"x"}), "there is no picture to look at"),
    ],
    ids=["bomb", "dots", "root", "backslashes", "drive", "damaged", "no picture"],
)
def test_archives_that_are_refused(data, why, tmp_path):
    with pytest.raises(DataError, match=why):
        pool_of(tmp_path, {"u.zip": data})
    assert list(tmp_path.iterdir()) == [tmp_path / "u.zip"]  # nothing was unpacked


def test_an_encrypted_archive_is_refused(tmp_path):
    data = bytearray(bad.zipped({"a.png": b"x"}))
    data[data.index(b"PK\x01\x02") + 8] |= 1
    with pytest.raises(DataError, match=r"the archive u\.zip is encrypted"):
        pool_of(tmp_path, {"u.zip": bytes(data)})


def test_a_member_that_lies_about_its_size_is_a_bad_picture(tmp_path):
    data = bytearray(bad.zipped({"a.png": bad.encoded(SCENE, "PNG")}))
    with zipfile.ZipFile(tmp_path / "ok.zip", "w") as archive:
        archive.writestr("a.png", b"")
    place = data.index(b"PK\x01\x02") + 24
    data[place : place + 4] = (7).to_bytes(4, "little")  # the size in the directory
    pool = pool_of(tmp_path, {"u.zip": bytes(data)})
    with pytest.raises(BadImageError, match=r"a\.png"):
        pool.load(0)


def test_too_many_pictures_are_refused(tmp_path):
    with pytest.raises(DataError, match="5,001 pictures are too many at once"):
        pool_of(tmp_path, {"u.zip": bad.zipped({f"{i}.png": b"" for i in range(5001)})})
