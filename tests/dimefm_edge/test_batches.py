"""Batches as functions of (seed, step), and the thread that prepares them."""

from __future__ import annotations

import dataclasses
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from dimefm_edge.batches import (
    Batch,
    BatchPlan,
    CachedPixels,
    DecodedPixels,
    DistillData,
    prefetch,
)
from dimefm_edge.config import TrainConfig
from dimefm_edge.data.images import PixelCache, open_images
from dimefm_edge.data.neighbours import NeighbourTable
from dimefm_edge.data.store import EmbeddingStore, StoreManifest, StoreWriter
from dimefm_edge.distributed import Ranks
from dimefm_edge.errors import DataError
from dimefm_edge.preprocess import PreprocessSpec, resize_image

NUM_IMAGES, NUM_TEXTS, EMBED_DIM, SIDE = 37, 23, 4, 6
BAD = (0, 11, 36)
SPEC = PreprocessSpec(image_size=SIDE)
TRAIN = TrainConfig(steps=9, batch_size=8, text_batch_size=5, seed=3)


def write_store(folder: Path, kind: str, count: int, bad: tuple[int, ...] = ()) -> EmbeddingStore:
    """Rows that tell their number: (row + 1) / 64, exact in float16; zeros where bad."""
    manifest = StoreManifest(
        kind=kind,
        teacher="numbers",
        weights_hash="0" * 16,
        preprocess_hash="1" * 16,
        source=kind,
        embed_dim=EMBED_DIM,
        logit_scale=10.0,
        num_rows=count,
        shard_rows=2048,
    )
    rows = np.repeat(numbers(np.arange(count))[:, None], EMBED_DIM, axis=1)
    rows[list(bad)] = 0
    writer = StoreWriter.create_or_resume(folder, manifest)
    writer.write_shard(0, rows.astype(np.float16), bad_rows=[(row, "broken") for row in bad])
    return writer.finish()


def numbers(rows: np.ndarray) -> np.ndarray:
    return (rows + 1) / 64


def row_pixels(batches) -> Iterator[np.ndarray]:
    for rows in batches:
        yield np.broadcast_to(
            rows.astype(np.uint8)[:, None, None, None], (len(rows), SIDE, SIDE, 3)
        )


@pytest.fixture
def data(tmp_path) -> DistillData:
    return DistillData(
        images=write_store(tmp_path / "images", "images", NUM_IMAGES, BAD),
        texts=write_store(tmp_path / "texts", "texts", NUM_TEXTS),
        pixels=row_pixels,
        preprocess=SPEC,
        logit_scale=10.0,
    )


def assert_same(left: Batch, right: Batch) -> None:
    for field in dataclasses.fields(Batch):
        a, b = getattr(left, field.name), getattr(right, field.name)
        assert np.array_equal(np.asarray(a), np.asarray(b)), field.name


class TestPlan:
    def test_pixels_and_embeddings_are_those_of_the_rows(self, data):
        for batch in BatchPlan(data, TRAIN, Ranks()).batches(0, 12):
            assert batch.pixels[:, 0, 0, 0].tolist() == batch.image_rows.tolist()
            assert batch.image_embeds.shape == (8, EMBED_DIM)
            assert batch.text_embeds.shape == (5, EMBED_DIM)
            assert batch.image_embeds.dtype == batch.text_embeds.dtype == torch.float32
            for embeds, rows in (
                (batch.image_embeds, batch.image_rows),
                (batch.text_embeds, batch.text_rows),
            ):
                assert np.array_equal(embeds[:, 0].numpy(), numbers(rows))
            assert batch.crops.shape == (8, 2, 3)

    def test_an_epoch_is_every_readable_image_once(self, data):
        plan = BatchPlan(data, TRAIN, Ranks())
        good = sorted(set(range(NUM_IMAGES)) - set(BAD))  # 34: no multiple of the batch
        seen = np.concatenate([plan.image_rows(step) for step in range(17)])  # 4 epochs of 34
        epochs = seen.reshape(4, 34)
        assert all(sorted(epoch.tolist()) == good for epoch in epochs)
        assert len({tuple(epoch) for epoch in epochs.tolist()}) == 4

    def test_a_batch_larger_than_the_pool_is_whole(self, data):
        train = dataclasses.replace(TRAIN, batch_size=80)
        rows = BatchPlan(data, train, Ranks()).image_rows(2)
        assert rows.shape == (80,)
        counts = np.bincount(rows, minlength=NUM_IMAGES)
        assert counts[list(BAD)].tolist() == [0, 0, 0]
        assert set(np.delete(counts, BAD)) <= {1, 2, 3, 4}

    def test_text_rows_are_in_range_and_reach_both_ends(self, data):
        plan = BatchPlan(data, TRAIN, Ranks())
        rows = [plan.batch(step, np.zeros(0)).text_rows for step in range(60)]
        assert all(len(part) == 5 for part in rows)
        assert {int(row) for part in rows for row in part} == set(range(NUM_TEXTS))
        assert len({tuple(part) for part in rows}) > 55

    def test_a_step_is_the_same_whenever_it_is_drawn(self, data):
        plan = BatchPlan(data, TRAIN, Ranks())
        inorder = list(plan.batches(0, 9))
        for step in (8, 0, 4, 5, 3):  # over the ends of epochs and back
            (again,) = BatchPlan(data, TRAIN, Ranks()).batches(step, step + 1)
            assert_same(again, inorder[step])
        for batch, resumed in zip(inorder[4:], plan.batches(4, 9), strict=True):
            assert_same(batch, resumed)

    @pytest.mark.parametrize("what", ["image_rows", "text_rows", "crops"])
    def test_another_seed_or_step_is_another_batch(self, data, what):
        other = dataclasses.replace(TRAIN, seed=4)
        first, second = BatchPlan(data, TRAIN, Ranks()).batches(0, 2)
        (elsewhere,) = BatchPlan(data, other, Ranks()).batches(0, 1)
        values = [np.asarray(getattr(b, what)).tobytes() for b in (first, second, elsewhere)]
        assert len(set(values)) == 3

    def test_ranks_share_the_batch(self, data):
        whole = next(BatchPlan(data, TRAIN, Ranks()).batches(5, 6))
        parts = [next(BatchPlan(data, TRAIN, Ranks(r, 4)).batches(5, 6)) for r in range(4)]
        for name in ("pixels", "crops"):
            joined = np.concatenate([np.asarray(getattr(part, name)) for part in parts])
            assert np.array_equal(joined, np.asarray(getattr(whole, name)))
        for part in parts:  # embeddings are the global batch's on every rank
            assert len(part.pixels) == 2
            for name in ("image_rows", "text_rows", "image_embeds", "text_embeds"):
                assert np.array_equal(getattr(part, name), getattr(whole, name))

    def test_no_crop_and_no_flip_leave_the_image_alone(self, data):
        train = dataclasses.replace(TRAIN, min_crop=1.0, flip=False)
        (batch,) = BatchPlan(data, train, Ranks()).batches(0, 1)
        assert batch.crops[:, 0, 0].min() > 0  # no mirror
        (flipped,) = BatchPlan(data, dataclasses.replace(train, flip=True), Ranks()).batches(0, 1)
        assert flipped.crops[:, 0, 0].min() < 0 < flipped.crops[:, 0, 0].max()

    def test_a_source_of_too_few_pixels_is_an_error(self, data):
        short = dataclasses.replace(data, pixels=lambda batches: iter([np.zeros(1)]))
        with pytest.raises(ValueError, match="zip"):
            list(BatchPlan(short, TRAIN, Ranks()).batches(0, 2))


@pytest.fixture
def folder(tmp_path) -> Path:
    root = tmp_path / "pool"
    root.mkdir()
    for row in range(7):
        noise = np.random.default_rng(row).integers(0, 256, (9, 8, 3), dtype=np.uint8)
        Image.fromarray(noise).save(root / f"{row}.png")
    return root


class TestPixelSources:
    BATCHES = (np.asarray([5, 0, 5]), np.asarray([6]), np.asarray([1, 2, 3, 4]))

    def wanted(self, folder: Path) -> list[np.ndarray]:
        load = lambda row: resize_image(Image.open(folder / f"{row}.png"), SPEC)  # noqa: E731
        return [np.stack([load(row) for row in rows]) for rows in self.BATCHES]

    def test_decoded_and_cached_pixels_are_the_images_in_order(self, folder, tmp_path):
        pool = open_images([str(folder)])
        cache = PixelCache.create(tmp_path / "pixels.u8", 7, SPEC, pool.fingerprint)
        rows = np.arange(7)
        cache.write(rows, np.stack([resize_image(pool.load(row), SPEC) for row in rows]))
        for source in (DecodedPixels(pool, SPEC, 2), CachedPixels(cache)):
            found = list(source(iter(self.BATCHES)))
            assert len(found) == 3
            for part, wanted in zip(found, self.wanted(folder), strict=True):
                assert np.array_equal(part, wanted)

    def test_an_image_gone_since_is_named(self, folder):
        source = DecodedPixels(open_images([str(folder)]), SPEC, 1)
        (folder / "3.png").unlink()
        with pytest.raises(DataError, match=r"3\.png could be read when .* cannot now") as caught:
            list(source(iter(self.BATCHES)))
        assert "--resume" in str(caught.value)


def prefetch_threads() -> list[threading.Thread]:
    return [t for t in threading.enumerate() if t.name == "dimefm-prefetch"]


class TestPrefetch:
    def test_every_batch_in_order(self, data):
        plan = BatchPlan(data, TRAIN, Ranks())
        ready = list(prefetch(plan.batches(0, 9)))
        assert len(ready) == 9
        for batch, wanted in zip(ready, BatchPlan(data, TRAIN, Ranks()).batches(0, 9), strict=True):
            assert_same(batch, wanted)
        assert prefetch_threads() == []

    def test_none_at_all(self):
        assert list(prefetch(iter(()))) == []

    def test_batches_are_prepared_ahead_but_not_without_end(self):
        made = []

        def endless():
            while True:
                made.append(len(made))
                yield made[-1]

        ready = prefetch(endless())
        assert next(ready) == 0
        deadline = time.monotonic() + 5
        while len(made) < 4 and time.monotonic() < deadline:
            time.sleep(0.01)
        time.sleep(0.05)
        assert 4 <= len(made) <= 6  # three wait, one was taken, one is being offered
        ready.close()

    @pytest.mark.parametrize("error", [DataError("gone"), MemoryError(), KeyboardInterrupt()])
    def test_errors_are_raised_where_batches_are_taken(self, error):
        def broken():
            yield 1
            yield 2
            raise error

        ready = prefetch(broken())
        assert [next(ready), next(ready)] == [1, 2]
        with pytest.raises(type(error)) as caught:
            next(ready)
        assert caught.value is error
        assert prefetch_threads() == []

    @pytest.mark.parametrize("taken", [1, 3])
    def test_closing_early_ends_the_thread_and_its_source(self, taken):
        closed = threading.Event()

        def endless():
            try:
                while True:
                    yield 0
            finally:
                closed.set()

        ready = prefetch(endless())
        for _ in range(taken):
            next(ready)
        assert len(prefetch_threads()) == 1
        begun = time.perf_counter()
        ready.close()
        assert time.perf_counter() - begun < 1
        assert prefetch_threads() == []
        assert closed.is_set()

    def test_an_error_of_the_consumer_ends_the_thread(self):
        def consume() -> None:
            for item in prefetch(iter(range(100))):
                if item == 5:
                    raise ValueError("the step broke")

        with pytest.raises(ValueError, match="the step broke"):
            consume()
        assert prefetch_threads() == []

    def test_closing_early_ends_the_decoding_threads(self, folder, data):
        train = dataclasses.replace(TRAIN, batch_size=4)
        whole = dataclasses.replace(
            data,
            images=write_store(folder.parent / "seven", "images", 7),
            pixels=DecodedPixels(open_images([str(folder)]), SPEC, 2),
        )
        ready = prefetch(BatchPlan(whole, train, Ranks()).batches(0, 500))
        assert next(ready).pixels.shape == (4, SIDE, SIDE, 3)
        assert any(t.name.startswith("decode") for t in threading.enumerate())
        ready.close()
        assert not any(t.name.startswith("decode") for t in threading.enumerate())


class TestChosenRows:
    def test_only_chosen_rows_that_can_be_read_are_used(self, data):
        chosen = dataclasses.replace(
            data, image_rows=np.asarray([0, 3, 5, 11, 20]), text_rows=np.asarray([2, 7, 22])
        )
        plan = BatchPlan(chosen, TRAIN, Ranks())
        batches = [plan.batch(step, np.zeros(0)) for step in range(30)]
        assert {int(r) for b in batches for r in b.image_rows} == {3, 5, 20}
        assert {int(r) for b in batches for r in b.text_rows} == {2, 7, 22}
        for batch in batches:
            assert np.array_equal(batch.text_embeds[:, 0].numpy(), numbers(batch.text_rows))

    def test_choosing_all_is_choosing_nothing(self, data):
        every = dataclasses.replace(
            data, image_rows=np.arange(NUM_IMAGES), text_rows=np.arange(NUM_TEXTS)
        )
        for step in range(5):
            pixels = np.zeros(0)
            assert_same(
                BatchPlan(data, TRAIN, Ranks()).batch(step, pixels),
                BatchPlan(every, TRAIN, Ranks()).batch(step, pixels),
            )

    def test_other_rows_are_another_run(self, data):
        assert data.extras() == {}
        some = [dataclasses.replace(data, text_rows=np.asarray(r)).extras() for r in ([1], [2])]
        assert set(some[0]) == {"text_rows"}
        assert some[0] != some[1]


class TestHardNegatives:
    @pytest.fixture
    def table(self) -> NeighbourTable:
        """Image i is near to sentences i % 11 and 11 + i % 11; sentence 22 is near to none."""
        first = np.arange(NUM_IMAGES) % 11
        return NeighbourTable(np.stack([first, 11 + first], 1).astype(np.int32), "t")

    @pytest.mark.parametrize("share", [0.2, 0.6, 1.0])
    def test_that_share_is_near_to_the_batch_and_the_rest_anything(self, data, table, share):
        near_data = dataclasses.replace(data, neighbours=table)
        train = dataclasses.replace(TRAIN, hard_negatives=share)
        plan, far = BatchPlan(near_data, train, Ranks()), []
        for step in range(60):
            batch = plan.batch(step, np.zeros(0))
            near = set(table.of(batch.image_rows).tolist())
            rows = batch.text_rows.tolist()
            assert len(rows) == TRAIN.text_batch_size
            assert rows == sorted(rows)
            assert len(near.intersection(rows)) >= round(share * 5)
            far += [row for row in rows if row not in near]
        assert (22 in far) == (share < 1)

    def test_an_image_with_few_neighbours_leaves_room_for_others(self, data):
        table = NeighbourTable(np.full((NUM_IMAGES, 2), 7, np.int32), "t")
        train = dataclasses.replace(TRAIN, hard_negatives=1.0)
        plan = BatchPlan(dataclasses.replace(data, neighbours=table), train, Ranks())
        rows = [plan.batch(step, np.zeros(0)).text_rows for step in range(20)]
        assert all(7 in part and len(part) == 5 for part in rows)
        assert len({int(r) for part in rows for r in part}) > 10

    def test_a_share_of_zero_is_the_plain_sampler(self, data, table):
        with_table = BatchPlan(dataclasses.replace(data, neighbours=table), TRAIN, Ranks())
        for step in range(4):
            pixels = np.zeros(0)
            assert_same(
                with_table.batch(step, pixels), BatchPlan(data, TRAIN, Ranks()).batch(step, pixels)
            )

    def test_without_a_table_it_is_an_error(self, data):
        with pytest.raises(ValueError, match="needs a table"):
            BatchPlan(data, dataclasses.replace(TRAIN, hard_negatives=0.1), Ranks())
