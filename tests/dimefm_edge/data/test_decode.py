from __future__ import annotations

import itertools
import threading

import numpy as np
import pytest
from PIL import Image

from dimefm_edge.data.decode import decode_batches, sample_rows
from dimefm_edge.data.images import open_images
from dimefm_edge.image_files import BadImageError
from dimefm_edge.preprocess import PreprocessSpec, resize_image

SPEC = PreprocessSpec(image_size=8)


class NumberedPool:
    """Images whose pixels are their row; some are bad; counts what is loaded."""

    fingerprint = "0" * 16

    def __init__(self, count: int, bad: tuple[int, ...] = ()) -> None:
        self.count, self.bad = count, bad
        self.loaded: list[int] = []
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return self.count

    def name(self, row: int) -> str:
        return str(row)

    def load(self, row: int) -> Image.Image:
        with self._lock:
            self.loaded.append(row)
        if row in self.bad:
            raise BadImageError(self.name(row), f"bad {row}")
        return Image.new("RGB", (12, 10), (row % 256, row // 256, 0))


def values(pixels: np.ndarray) -> list[int]:
    return (pixels[:, 0, 0].astype(int) @ [1, 256, 0]).tolist()


@pytest.mark.parametrize("workers", [0, 1, 5])
def test_batches_come_in_order(workers):
    order = np.random.default_rng(0).permutation(400)
    batches = np.split(order, [70, 71, 71, 300])
    found = list(decode_batches(NumberedPool(400), iter(batches), SPEC, workers=workers))
    assert [batch.rows.tolist() for batch in found] == [rows.tolist() for rows in batches]
    for batch in found:
        assert batch.pixels.shape == (len(batch.rows), 8, 8, 3)
        assert batch.pixels.dtype == np.uint8
        assert batch.rows.dtype == np.int64
        assert values(batch.pixels) == batch.rows.tolist()
        assert batch.bad_rows == []


def test_pixels_are_those_of_resize_image(tmp_path, encoded, write_files):
    write_files(tmp_path, {f"{i}.jpg": encoded(i, size=(31, 20)) for i in range(3)})
    pool = open_images([str(tmp_path)])
    (batch,) = decode_batches(pool, [np.arange(3)], SPEC)
    for row in range(3):
        assert np.array_equal(batch.pixels[row], resize_image(pool.load(row), SPEC))


def test_pictures_are_seen_as_a_person_sees_them(tmp_path):
    """Training sees what the device will: upright, on white, 16 bits scaled."""
    exif = Image.Exif()
    exif[0x0112] = 6
    left_red = Image.new("RGB", (16, 16), "blue")
    left_red.paste("red", (0, 0, 8, 16))
    left_red.transpose(Image.Transpose.ROTATE_90).save(tmp_path / "0.png", exif=exif)
    Image.new("RGBA", (16, 16), (9, 9, 9, 0)).save(tmp_path / "1.png")
    Image.fromarray(np.full((16, 16), 100 * 257, np.uint16)).save(tmp_path / "2.png")
    (batch,) = decode_batches(open_images([str(tmp_path)]), [np.arange(3)], SPEC)
    assert batch.pixels[0, 3].tolist()[:2] == [[255, 0, 0]] * 2
    assert batch.pixels[0, 3].tolist()[-2:] == [[0, 0, 255]] * 2
    assert (batch.pixels[1] == 255).all()
    assert (batch.pixels[2] == 100).all()


def test_bad_rows_are_left_out_and_listed():
    pool = NumberedPool(40, bad=(3, 17, 39))
    batches = [np.arange(20)[::-1], np.asarray([39]), np.asarray([39, 38])]
    first, second, third = decode_batches(pool, batches, SPEC)
    assert first.bad_rows == [(17, "bad 17"), (3, "bad 3")]
    assert first.rows.tolist() == [row for row in range(19, -1, -1) if row not in (3, 17)]
    assert values(first.pixels) == first.rows.tolist()
    assert (len(second.rows), second.pixels.shape) == (0, (0, 8, 8, 3))
    assert (third.rows.tolist(), third.bad_rows) == ([38], [(39, "bad 39")])


def test_image_too_thin_to_resize_is_bad(tmp_path):
    Image.new("L", (2**20, 1)).save(tmp_path / "0.png")
    pool = open_images([str(tmp_path)])
    (batch,) = decode_batches(pool, [np.arange(1)], PreprocessSpec(image_size=64))
    assert batch.bad_rows == [(0, "1048576 x 1 pixels are too thin to resize")]
    (batch,) = decode_batches(
        pool, [np.arange(1)], PreprocessSpec(image_size=64, resize_mode="squash")
    )
    assert batch.rows.tolist() == [0]


def test_endless_batches_are_drawn_a_few_ahead():
    drawn = itertools.count()
    endless = (np.asarray([next(drawn)]) for _ in itertools.repeat(None))
    stream = decode_batches(NumberedPool(10_000), endless, SPEC, workers=2)
    assert [next(stream).rows[0] for _ in range(5)] == [0, 1, 2, 3, 4]
    assert next(drawn) <= 10
    threads = {t.name for t in threading.enumerate() if t.name.startswith("decode")}
    assert threads
    stream.close()
    assert not {t.name for t in threading.enumerate()} & threads


def test_other_errors_come_through_and_end_the_threads():
    class Broken(NumberedPool):
        def load(self, row: int) -> Image.Image:
            raise RuntimeError("a bug")

    with pytest.raises(RuntimeError, match="a bug"):
        list(decode_batches(Broken(5), [np.arange(5)], SPEC))
    assert not [t for t in threading.enumerate() if t.name.startswith("decode")]


def test_no_batches():
    assert list(decode_batches(NumberedPool(1), [], SPEC)) == []


@pytest.mark.parametrize(("num_rows", "count"), [(10_000, 288), (5, 32), (0, 3)])
def test_sampled_rows_are_of_all_the_pool_and_any_part_of_them_is(num_rows, count):
    rows = sample_rows(num_rows, count)
    assert len(set(rows.tolist())) == len(rows) == min(num_rows, count)
    assert np.array_equal(rows, sample_rows(num_rows, count))
    assert all(0 <= row < num_rows for row in rows)
    if num_rows > count:
        for part in (rows[:32], rows[-32:]):
            assert 0.2 < np.mean(part < num_rows / 2) < 0.8
