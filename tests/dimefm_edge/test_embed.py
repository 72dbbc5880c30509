"""Filling a store: the teacher's own answers by row, resumed, with bad images counted."""

from __future__ import annotations

import hashlib
import io
import json
import logging
import os
import signal
import subprocess
import sys
import tarfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dimefm_edge.data.images import PixelCache, open_images
from dimefm_edge.data.sentences import open_sentences
from dimefm_edge.data.store import EmbeddingStore
from dimefm_edge.embed import embed_images, embed_texts
from dimefm_edge.errors import DataError, StoreError
from dimefm_edge.preprocess import PreprocessSpec, resize_image

SHARD_ROWS = 2048
NUM_IMAGES = 4500  # shards of 2048, 2048 and 404 rows
NUM_TEXTS = 4200
BAD = {
    3: "the file is empty",
    7: "not an image file that Pillow knows",
    2047: "truncated",
    2048: "not an image file that Pillow knows",
    4499: "the file is empty",
}
SIDE = 6
ROOT = Path(__file__).parents[2]


class Projector:
    """A teacher whose answers depend on one image or sentence alone, to the last bit."""

    name = "projector"
    weights_hash = "a" * 16
    preprocess = PreprocessSpec(image_size=SIDE)
    embed_dim = 8
    logit_scale = 10.0

    def __init__(self, *, stop_at: int | None = None) -> None:
        self.images = 0
        self.sentences: list[str] = []
        self._stop_at = stop_at
        self._weights = np.random.default_rng(5).normal(size=(8, SIDE * SIDE * 3))

    def encode_images(self, pixels: np.ndarray) -> np.ndarray:
        if self._stop_at is not None and self.images >= self._stop_at:
            raise KeyboardInterrupt
        self.images += len(pixels)
        centred = pixels.reshape(len(pixels), 1, -1) / 255 - 0.5
        return unit((centred * self._weights).sum(-1))

    def encode_texts(self, sentences: Sequence[str]) -> np.ndarray:
        if self._stop_at is not None and len(self.sentences) >= self._stop_at:
            raise KeyboardInterrupt
        self.sentences.extend(sentences)
        digests = [hashlib.sha256(text.encode()).digest()[:8] for text in sentences]
        return unit(np.asarray([list(digest) for digest in digests]) - 127.5)


class Counting:
    """A pool that notes which rows were decoded."""

    def __init__(self, inner) -> None:
        self._inner = inner
        self.fingerprint = inner.fingerprint
        self.loaded: list[int] = []

    def __len__(self) -> int:
        return len(self._inner)

    def name(self, row: int) -> str:
        return self._inner.name(row)

    def load(self, row: int) -> Image.Image:
        self.loaded.append(row)
        return self._inner.load(row)


def unit(rows: np.ndarray) -> np.ndarray:
    return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)


def png(seed: int, size: tuple[int, int] = (9, 7)) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (*size[::-1], 3), dtype=np.uint8)
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, "PNG", compress_level=0)
    return stream.getvalue()


@pytest.fixture(scope="module")
def tar_path(tmp_path_factory) -> Path:
    damaged = {3: b"", 7: b"no image" * 9, 2047: png(2047)[:60], 2048: b"x", 4499: b""}
    path = tmp_path_factory.mktemp("pool") / "images.tar"
    with tarfile.open(path, "w") as archive:
        for row in range(NUM_IMAGES):
            data = damaged[row] if row in damaged else png(row)
            info = tarfile.TarInfo(f"{row:05d}.png")
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return path


@pytest.fixture
def pool(tar_path):
    return Counting(open_images([str(tar_path)]))


@pytest.fixture(scope="module")
def pixels(tar_path) -> np.ndarray:
    """What the images are to the teacher, decoded here one by one; zeros where bad."""
    pixels = np.zeros((NUM_IMAGES, SIDE, SIDE, 3), np.uint8)
    for row in set(range(NUM_IMAGES)) - set(BAD):
        pixels[row] = resize_image(Image.open(io.BytesIO(png(row))), Projector.preprocess)
    return pixels


@pytest.fixture(scope="module")
def expected(pixels) -> np.ndarray:
    """(N, E) float16, embedded one image at a time; zeros where bad."""
    teacher = Projector()
    rows = np.concatenate([teacher.encode_images(p[None]) for p in pixels]).astype(np.float16)
    rows[sorted(BAD)] = 0
    return rows


@pytest.fixture(scope="module")
def texts_path(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("texts") / "texts.txt"
    path.write_text("".join(f"sentence number {i}\n\n" for i in range(NUM_TEXTS)))
    return path


def embed(pool, folder: Path, teacher: Projector | None = None, **options) -> EmbeddingStore:
    options = {"shard_rows": SHARD_ROWS, **options}
    return embed_images(teacher or Projector(), pool, folder, **options)


def everything(store: EmbeddingStore) -> np.ndarray:
    return store.gather(np.arange(len(store)))


def shards_there(folder: Path) -> list[bool]:
    manifest = json.loads((folder / "manifest.json").read_text())
    return [shard is not None for shard in manifest["shards"]]


@pytest.mark.parametrize("batch_size", [256, 1000, 5000])
def test_rows_are_the_teachers_answers_in_order(pool, expected, tmp_path, batch_size, capsys):
    store = embed(pool, tmp_path / "store", batch_size=batch_size)
    assert np.array_equal(everything(store), expected)
    assert [shard.rows for shard in store.manifest.shards] == [2048, 2048, 404]
    assert store.manifest.source == pool.fingerprint
    assert store.manifest.preprocess_hash == Projector.preprocess.digest()
    assert capsys.readouterr().out == ""
    store.verify()


def test_bad_images_are_rows_without_embedding(pool, tmp_path, caplog):
    with caplog.at_level(logging.WARNING):
        store = embed(pool, tmp_path / "store")
    assert [row for row, _ in store.manifest.bad_rows] == list(BAD)
    for (_, reason), part in zip(store.manifest.bad_rows, BAD.values(), strict=True):
        assert part in reason
    assert not everything(store)[list(BAD)].any()
    assert store.valid_rows().tolist() == sorted(set(range(NUM_IMAGES)) - set(BAD))
    (message,) = [r.getMessage() for r in caplog.records if "unreadable" in r.getMessage()]
    assert message.startswith("5 images skipped")
    assert "images.tar/00003.png (the file is empty)" in message


@pytest.mark.parametrize("max_bad", [3, 3 / NUM_IMAGES])
def test_too_many_bad_images_stop_with_finished_shards_kept(pool, expected, tmp_path, max_bad):
    folder = tmp_path / "store"
    with pytest.raises(DataError) as caught:
        embed(pool, folder, max_bad=max_bad)
    message = str(caught.value.args[0])
    assert "\n" not in message
    assert message.startswith("4 images cannot be read, more than --max-bad allows (3 of 4500): ")
    for name in ("00003.png", "00007.png", "02047.png", "02048.png"):
        assert f"images.tar/{name}" in message
    assert "raise --max-bad" in str(caught.value.hint)
    assert shards_there(folder) == [True, False, False]

    teacher = Projector()
    store = embed(pool, folder, teacher, max_bad=5)
    assert teacher.images == NUM_IMAGES - SHARD_ROWS - 2
    assert np.array_equal(everything(store), expected)


@pytest.mark.parametrize("max_bad", [5, 5 / NUM_IMAGES])
def test_as_many_bad_images_as_allowed_pass(pool, tmp_path, max_bad):
    assert len(embed(pool, tmp_path / "store", max_bad=max_bad).manifest.bad_rows) == 5


def test_bad_images_of_former_runs_count(pool, tmp_path):
    folder = tmp_path / "store"
    with pytest.raises(KeyboardInterrupt):
        embed(pool, folder, Projector(stop_at=2300))
    with pytest.raises(DataError, match="4 images cannot be read"):
        embed(pool, folder, max_bad=3)


def test_bad_images_of_a_lost_shard_count_once(pool, expected, tmp_path):
    folder = tmp_path / "store"
    store = embed(pool, folder, max_bad=5)
    (folder / store.manifest.shards[0].file).unlink()
    del store
    teacher = Projector()
    again = embed(pool, folder, teacher, max_bad=5)
    assert teacher.images == SHARD_ROWS - 3
    assert np.array_equal(everything(again), expected)
    assert len(again.manifest.bad_rows) == 5


def test_names_and_reasons_with_line_ends_make_one_line(tmp_path):
    for row in range(4):
        (tmp_path / f"{row}\nbad.png").write_bytes(b"no image")
    with pytest.raises(DataError) as caught:
        embed(open_images([str(tmp_path)]), tmp_path / "store")
    assert "\n" not in str(caught.value.args[0])
    assert "0 bad.png" in str(caught.value.args[0])


def test_the_second_run_does_nothing(pool, tmp_path):
    folder = tmp_path / "store"
    embed(pool, folder)
    before = {path: path.stat().st_mtime_ns for path in folder.iterdir()}
    pool.loaded.clear()
    teacher = Projector()
    embed(pool, folder, teacher)
    assert teacher.images == 0
    assert pool.loaded == []
    assert {path: path.stat().st_mtime_ns for path in folder.iterdir()} == before


def test_a_store_keeps_its_own_shard_rows(pool, expected, tmp_path):
    folder = tmp_path / "store"
    with pytest.raises(KeyboardInterrupt):
        embed(pool, folder, Projector(stop_at=2300))
    store = embed(pool, folder, shard_rows=4096)
    assert store.manifest.shard_rows == SHARD_ROWS
    assert np.array_equal(everything(store), expected)


def test_another_teacher_is_refused_before_any_work(pool, tmp_path):
    embed(pool, tmp_path / "store")
    teacher = Projector()
    teacher.weights_hash = "b" * 16
    with pytest.raises(StoreError, match="embedded by teacher 'projector'"):
        embed(pool, tmp_path / "store", teacher)
    assert teacher.images == 0


class TestPixelCache:
    def cache(self, pool, folder: Path) -> PixelCache:
        return PixelCache.create(
            folder / "pixels.u8", len(pool), Projector.preprocess, pool.fingerprint
        )

    def kept(self, pool, folder: Path) -> np.ndarray:
        """What a later run reads: refused unless complete."""
        cache = PixelCache.open(
            folder / "pixels.u8", len(pool), Projector.preprocess, pool.fingerprint
        )
        return cache.gather(np.arange(len(cache)))

    def test_filled_in_the_same_pass(self, pool, pixels, expected, tmp_path):
        store = embed(pool, tmp_path / "store", cache=self.cache(pool, tmp_path))
        assert sorted(pool.loaded) == list(range(NUM_IMAGES))  # each once
        assert np.array_equal(everything(store), expected)
        assert np.array_equal(self.kept(pool, tmp_path), pixels)

    def test_completed_when_all_shards_are_there(self, pool, pixels, tmp_path):
        embed(pool, tmp_path / "store")
        teacher = Projector()
        embed(pool, tmp_path / "store", teacher, cache=self.cache(pool, tmp_path))
        assert teacher.images == 0
        assert np.array_equal(self.kept(pool, tmp_path), pixels)

    def test_completed_when_some_shards_are_there(self, pool, pixels, tmp_path):
        with pytest.raises(KeyboardInterrupt):
            embed(pool, tmp_path / "store", Projector(stop_at=2300))
        pool.loaded.clear()
        embed(pool, tmp_path / "store", cache=self.cache(pool, tmp_path))
        assert sorted(pool.loaded) == list(range(NUM_IMAGES))
        assert np.array_equal(self.kept(pool, tmp_path), pixels)

    def test_unfinished_after_a_stop_and_finished_by_the_next_run(self, pool, pixels, tmp_path):
        with pytest.raises(KeyboardInterrupt):
            embed(
                pool,
                tmp_path / "store",
                Projector(stop_at=2300),
                cache=self.cache(pool, tmp_path),
            )
        with pytest.raises(DataError, match="was not finished"):
            self.kept(pool, tmp_path)
        embed(pool, tmp_path / "store", cache=self.cache(pool, tmp_path))
        assert np.array_equal(self.kept(pool, tmp_path), pixels)

    def test_an_image_damaged_since_it_was_embedded_leaves_no_hole(self, tmp_path):
        (tmp_path / "images").mkdir()
        for row in range(5):
            (tmp_path / "images" / f"{row}.png").write_bytes(png(row))
        pool = open_images([str(tmp_path / "images")])
        embed(pool, tmp_path / "store")
        damaged = tmp_path / "images" / "2.png"
        damaged.write_bytes(bytes(damaged.stat().st_size))  # same name, same size
        with pytest.raises(DataError, match=r"2\.png could be read when it was embedded"):
            embed(pool, tmp_path / "store", cache=self.cache(pool, tmp_path))
        with pytest.raises(DataError, match="was not finished"):
            self.kept(pool, tmp_path)


class TestSentences:
    def embed(self, path: Path, folder: Path, teacher: Projector | None = None, **options):
        options = {"shard_rows": SHARD_ROWS, **options}
        return embed_texts(teacher or Projector(), open_sentences([str(path)]), folder, **options)

    def expected(self, path: Path) -> np.ndarray:
        lines = [line for line in path.read_text().splitlines() if line]
        return np.concatenate([Projector().encode_texts([line]) for line in lines])

    @pytest.mark.parametrize("batch_size", [512, 1000])
    def test_rows_are_the_teachers_answers_in_order(self, texts_path, tmp_path, batch_size):
        store = self.embed(texts_path, tmp_path / "store", batch_size=batch_size)
        assert len(store) == NUM_TEXTS
        expected = self.expected(texts_path).astype(np.float16)
        assert np.array_equal(everything(store), expected)
        assert store.manifest.bad_rows == ()

    def test_resumed_at_the_right_row(self, texts_path, tmp_path):
        with pytest.raises(KeyboardInterrupt):
            self.embed(texts_path, tmp_path / "store", Projector(stop_at=2500))
        assert shards_there(tmp_path / "store") == [True, False, False]
        teacher = Projector()
        store = self.embed(texts_path, tmp_path / "store", teacher)
        assert teacher.sentences == [f"sentence number {i}" for i in range(SHARD_ROWS, NUM_TEXTS)]
        assert np.array_equal(everything(store), self.expected(texts_path).astype(np.float16))

    def test_only_a_lost_shard_is_done_again(self, texts_path, tmp_path):
        store = self.embed(texts_path, tmp_path / "store")
        (tmp_path / "store" / store.manifest.shards[1].file).write_bytes(b"cut")
        del store
        teacher = Projector()
        store = self.embed(texts_path, tmp_path / "store", teacher)
        assert teacher.sentences == [f"sentence number {i}" for i in range(2048, 4096)]
        assert np.array_equal(everything(store), self.expected(texts_path).astype(np.float16))
        store.verify()

    def test_the_second_run_reads_nothing(self, texts_path, tmp_path):
        self.embed(texts_path, tmp_path / "store")
        teacher = Projector()
        self.embed(texts_path, tmp_path / "store", teacher)
        assert teacher.sentences == []

    def test_a_store_keeps_its_own_shard_rows(self, texts_path, tmp_path):
        with pytest.raises(KeyboardInterrupt):
            self.embed(texts_path, tmp_path / "store", Projector(stop_at=2500))
        store = self.embed(texts_path, tmp_path / "store", shard_rows=4096)
        assert np.array_equal(everything(store), self.expected(texts_path).astype(np.float16))

    @pytest.mark.parametrize("max_bad", [0.1, 1, 2])
    def test_too_many_left_out_are_refused_and_leave_no_store(self, tmp_path, max_bad):
        path = tmp_path / "texts.txt"
        path.write_bytes(b"a red star\n\n" + b"caf\xe9\n" * 3 + b"a blue ring\n\n")
        with pytest.raises(DataError) as caught:
            self.embed(path, tmp_path / "store", max_bad=max_bad)
        assert str(caught.value).startswith(
            "3 of 5 sentences cannot be used, more than --max-bad allows "
            f"({int(max_bad)}); the first is {path}:3 (not UTF-8)"
        )
        assert caught.value.hint == "mend them, or go on without them: --max-bad 3"
        assert not (tmp_path / "store").exists()

    @pytest.mark.parametrize("max_bad", [3, 0.6])
    def test_as_many_left_out_as_allowed_pass(self, tmp_path, max_bad):
        path = tmp_path / "texts.txt"
        path.write_bytes(b"a red star\n\n" + b"caf\xe9\n" * 3 + b"a blue ring\n\n")
        assert len(self.embed(path, tmp_path / "store", max_bad=max_bad)) == 2
        # The store is there: a run of former versions goes on.
        assert len(self.embed(path, tmp_path / "store", max_bad=0)) == 2

    def test_a_file_cut_while_it_is_read_is_no_traceback(self, tmp_path):
        path = tmp_path / "texts.txt"
        path.write_text("one\ntwo\nthree\n")
        pool = open_sentences([str(path)])
        assert len(pool) == 3
        path.write_text("one\n")
        with pytest.raises(DataError, match="became fewer"):
            embed_texts(Projector(), pool, tmp_path / "store", shard_rows=SHARD_ROWS)


class Nothing:
    fingerprint = "0" * 16

    def __len__(self) -> int:
        return 0

    def __iter__(self):
        return iter(())


def test_an_empty_pool_is_refused_and_leaves_no_store(tmp_path):
    with pytest.raises(DataError, match="no image to embed"):
        embed_images(Projector(), Nothing(), tmp_path / "images")
    with pytest.raises(DataError, match="no sentence to embed"):
        embed_texts(Projector(), Nothing(), tmp_path / "texts")
    assert list(tmp_path.iterdir()) == []


KILLED = """
import signal, sys, time
from pathlib import Path
from dimefm_edge.data.images import open_images
from dimefm_edge.embed import embed_images
from dimefm_edge.preprocess import PreprocessSpec
import numpy as np

class Slow:
    name, weights_hash, embed_dim, logit_scale = "projector", "a" * 16, 8, 10.0
    preprocess = PreprocessSpec(image_size=6)
    images = 0
    def encode_images(self, pixels):
        if self.images > 2100:
            print("in the second shard", flush=True)
            time.sleep(120)
        self.images += len(pixels)
        return np.full((len(pixels), 8), 0.125, np.float32)

signal.signal(signal.SIGINT, signal.default_int_handler)
embed_images(Slow(), open_images([sys.argv[1]]), Path(sys.argv[2]), shard_rows=2048)
"""


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_a_killed_process_loses_only_its_current_shard(tar_path, tmp_path, number):
    running = subprocess.Popen(
        [sys.executable, "-c", KILLED, str(tar_path), str(tmp_path / "store")],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert running.stdout is not None
    said = running.stdout.readline()
    running.send_signal(number)
    _, errors = running.communicate(timeout=30)
    assert said == "in the second shard\n", errors
    assert running.returncode != 0
    assert shards_there(tmp_path / "store") == [True, False, False]

    teacher = Projector()
    store = embed(open_images([str(tar_path)]), tmp_path / "store", teacher)
    assert teacher.images == NUM_IMAGES - SHARD_ROWS - 2
    killed = everything(store)[:SHARD_ROWS]
    assert set(np.unique(killed)) == {0, 0.125}  # the first process's rows, not done again
    store.verify()


def test_the_tiny_teacher(tiny_teacher_dir, labelled_dir, tmp_path):
    from dimefm_edge.teacher import load_teacher

    teacher = load_teacher(str(tiny_teacher_dir), device="cpu")
    pool = open_images([str(labelled_dir)])
    store = embed_images(teacher, pool, tmp_path / "images", batch_size=5)
    images = [resize_image(pool.load(row), teacher.preprocess) for row in range(len(pool))]
    own = teacher.encode_images(np.stack(images))
    assert np.abs(everything(store) - own).max() < 1e-3
    assert store.manifest.logit_scale == teacher.logit_scale

    path = tmp_path / "texts.txt"
    path.write_text("a cat\na dog on a mat\nan eel\n")
    texts = embed_texts(teacher, open_sentences([str(path)]), tmp_path / "texts", batch_size=2)
    own = teacher.encode_texts(["a cat", "a dog on a mat", "an eel"])
    assert np.abs(everything(texts) - own).max() < 1e-3
    assert np.abs(own[0] - own[1]).max() > 0.01  # the order is told
