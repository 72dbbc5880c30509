"""What the device prepares is what training prepares, within the tolerance that is stated."""

from __future__ import annotations

import functools
import importlib.util
import io
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from benchmarks.photos import jpeg, photo
from dimefm_edge.data.scenes import scene_test_set
from dimefm_edge.image_files import BadImageError
from dimefm_edge.model_input import load_image, load_inputs, load_pixels
from dimefm_edge.preprocess import CLIP_STD, PreprocessSpec, preprocess_images

LEVEL = 1 / (255 * np.asarray(CLIP_STD)).reshape(3, 1, 1)
"""Of 0 to 255, in units of the model's input."""
MEAN_TOLERANCE, MAX_TOLERANCE = 2, 16


def theirs(data: bytes, spec: PreprocessSpec) -> np.ndarray:
    """open_clip's own transform of a file; of RGB, as it would pad CMYK with white for black."""
    transform = pytest.importorskip("open_clip.transform")
    call = transform.image_transform_v2(
        transform.PreprocessCfg(
            size=spec.image_size, resize_mode=spec.resize_mode,
            interpolation=spec.interpolation, fill_color=spec.fill_color,
        ),
        is_train=False,
    )  # fmt: skip
    image = Image.open(io.BytesIO(data))
    return call(image.convert("RGB") if image.mode == "CMYK" else image).numpy()


def levels_apart(data: bytes, spec: PreprocessSpec) -> np.ndarray:
    """(3, S, S) differences of our input from open_clip's, in levels of 0 to 255."""
    (found,) = load_inputs([data], spec)
    assert found.shape == (3, spec.image_size, spec.image_size)
    assert found.dtype == np.float32
    return np.abs(found - theirs(data, spec)) / LEVEL


def real_photos() -> list[Path]:
    """Photographs that come with packages that are here anyway."""
    found = []
    for package, below in (
        ("matplotlib", "mpl-data/sample_data"),
        ("gradio", "media_assets/images"),
    ):
        spec = importlib.util.find_spec(package)
        if spec is not None and spec.origin is not None:
            found += sorted(Path(spec.origin).parent.joinpath(below).glob("*.jp*g"))
    return found


@pytest.mark.parametrize("side", [64, 112, 224])
@pytest.mark.parametrize("path", real_photos(), ids=lambda path: path.name)
def test_photographs_as_open_clip(path, side):
    apart = levels_apart(path.read_bytes(), PreprocessSpec(side))
    assert apart.mean() < 1.1
    assert apart.max() < MAX_TOLERANCE


@pytest.mark.parametrize("size", [(320, 240), (640, 480), (240, 641), (1283, 957)])
def test_a_photo_that_is_not_reduced_differs_by_rounding(size):
    spec = PreprocessSpec(480)
    assert levels_apart(jpeg(photo(*size)), spec).max() < 1.3  # Pillow rounds twice
    pixels = load_pixels([jpeg(photo(*size))], spec).astype(int)
    exact = load_pixels([jpeg(photo(*size))], spec, exact=True)
    assert np.abs(pixels - exact).max() <= 1


@functools.cache
def _photo(width: int, height: int) -> Image.Image:
    return photo(width, height, seed=width * 1000 + height)


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_any_jpeg_as_open_clip(data):
    side = data.draw(st.sampled_from([16, 31, 48]))
    short = data.draw(st.integers(side // 2, 8 * side))
    long = int(short * data.draw(st.floats(1, 2.5)))
    size = (short, long) if data.draw(st.booleans()) else (long, short)
    mode = data.draw(st.sampled_from(["RGB", "L", "CMYK"]))
    options = {"progressive": data.draw(st.booleans()), "quality": data.draw(st.integers(40, 96))}
    if mode == "RGB":
        options["subsampling"] = data.draw(st.integers(0, 2))
    spec = PreprocessSpec(
        side,
        resize_mode=data.draw(st.sampled_from(["shortest", "longest", "squash"])),
        interpolation=data.draw(st.sampled_from(["bicubic", "bilinear"])),
        fill_color=data.draw(st.integers(0, 255)),
    )
    apart = levels_apart(jpeg(_photo(*size).convert(mode), **options), spec)
    assert apart.mean() < MEAN_TOLERANCE
    assert apart.max() < MAX_TOLERANCE


@settings(max_examples=60, deadline=None)
@given(
    st.integers(1, 200), st.integers(1, 200), st.integers(1, 40),
    st.sampled_from(["shortest", "longest", "squash"]),
    st.sampled_from(["bicubic", "bilinear", "nearest"]),
)  # fmt: skip
def test_any_size_gives_the_square(width, height, side, resize_mode, interpolation):
    """A picture of one colour stays it, but for padding: nothing from outside leaks in."""
    spec = PreprocessSpec(
        side, resize_mode=resize_mode, interpolation=interpolation, fill_color=200
    )
    data = jpeg(Image.new("L", (width, height), 200))
    assert (load_pixels([data], spec) == 200).all()


@pytest.mark.parametrize("resize_mode", ["shortest", "longest", "squash"])
@pytest.mark.parametrize("kind", ["PNG", "BMP", "WEBP"])
def test_other_formats_within_the_same_tolerance(kind, resize_mode):
    stream = io.BytesIO()
    photo(700, 410).save(stream, kind)
    apart = levels_apart(stream.getvalue(), PreprocessSpec(64, resize_mode=resize_mode))
    assert apart.mean() < MEAN_TOLERANCE
    assert apart.max() < MAX_TOLERANCE


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("size", [(1024, 768), (1021, 763)])
def test_turned_jpegs_are_reduced_in_place(size, orientation):
    """A shift by one reduced pixel would be seen here: the picture is a ramp along both axes."""
    ramp = np.add.outer(np.arange(size[1]) / 4, np.arange(size[0]) / 16)
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = jpeg(Image.fromarray(ramp.clip(0, 255).astype(np.uint8)).convert("RGB"), exif=exif)
    spec = PreprocessSpec(64)
    fast = load_pixels([data], spec).astype(int)
    assert np.abs(fast - load_pixels([data], spec, exact=True)).mean() < 0.6


def test_exact_is_the_training_transform():
    spec, data = PreprocessSpec(64), jpeg(photo(500, 400))
    np.testing.assert_allclose(
        load_inputs([data], spec, exact=True)[0], theirs(data, spec), atol=1e-5
    )
    image = Image.open(io.BytesIO(data))
    wanted = preprocess_images([image], spec)
    assert np.array_equal(load_inputs([data], spec, exact=True), wanted)
    assert not np.array_equal(load_inputs([data], spec), wanted)


def test_files_bytes_and_pictures_are_one_batch(tmp_path):
    spec, image = PreprocessSpec(64), photo(120, 100)
    path = tmp_path / "a.png"
    image.save(path)
    sources = [path, str(path), path.read_bytes(), image]
    for exact in (False, True):
        inputs = load_inputs(sources, spec, exact=exact)
        pixels = load_pixels(sources, spec, exact=exact)
        assert inputs.shape == (4, 3, 64, 64)
        assert pixels.shape == (4, 64, 64, 3)
        assert (inputs == inputs[0]).all()
        assert (pixels == pixels[0]).all()
    assert load_inputs([], spec).shape == (0, 3, 64, 64)
    assert load_image(path).tobytes() == image.tobytes()
    with pytest.raises(BadImageError, match=r"b\.png cannot be read: No such file"):
        load_inputs([image, tmp_path / "b.png"], spec)


def test_a_picture_thinner_than_any_is_not_blown_up():
    (pixels,) = load_pixels([Image.new("L", (2**20, 1), 77)], PreprocessSpec(64))
    assert (pixels == 77).all()


# ------------------------------------------------------------- what a model makes of it


def _scene_files(count: int) -> tuple[list[bytes], list[int]]:
    drawn, sides = scene_test_set(), (128, 200, 256, 400, 520, 777)
    rows = np.linspace(0, len(drawn) - 1, count).astype(int).tolist()
    files = [
        jpeg(drawn.image(row).resize((sides[i % 6],) * 2, Image.Resampling.BICUBIC))
        for i, row in enumerate(rows)
    ]
    return files, [drawn.label(row) for row in rows]


def _top1_pct_both_ways(count: int) -> tuple[float, float, np.ndarray]:
    """The sample teacher's top-1 on JPEGs prepared exactly and fast, and cosines between both."""
    from dimefm_edge.labels import build_label_bank
    from dimefm_edge.subjects import load_subject

    teacher, drawn = load_subject("sample"), scene_test_set()
    assert teacher.encode_texts is not None
    bank = build_label_bank("scenes", drawn.classnames, drawn.templates, teacher.encode_texts)
    files, labels = _scene_files(count)
    exact, fast = (
        teacher.encode_pixels(load_pixels(files, teacher.preprocess, exact=is_exact))
        for is_exact in (True, False)
    )
    found = [100 * float(np.mean((e @ bank.embeds.T).argmax(1) == labels)) for e in (exact, fast)]
    return found[0], found[1], (exact * fast).sum(1)


def test_the_sample_teacher_sees_the_same():
    exact_pct, fast_pct, cosines = _top1_pct_both_ways(96)
    assert exact_pct > 85
    assert fast_pct == pytest.approx(exact_pct, abs=1.1)  # one of 96
    assert cosines.min() > 0.995


@pytest.mark.slow
def test_the_sample_teacher_names_the_same_on_all_scenes():
    exact_pct, fast_pct, cosines = _top1_pct_both_ways(len(scene_test_set()))
    assert fast_pct == pytest.approx(exact_pct, abs=0.2)
    assert cosines.min() > 0.99
