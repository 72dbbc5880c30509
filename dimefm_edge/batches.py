"""Batches of a distillation step: which rows, which crops, and their stored embeddings.

Everything is a pure function of (seed, step), so resuming needs no generator state and ranks
agree on the global batch without talking. Used by distill.py.
"""

from __future__ import annotations

import contextlib
import queue
import threading
from collections.abc import Callable, Generator, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import numpy as np
import numpy.typing as npt
import torch
from safetensors.torch import save_file
from torch import Tensor

from dimefm_edge.config import DEFAULT_MIN_CROP, TrainConfig
from dimefm_edge.data.augment import random_crops, seeded_generator
from dimefm_edge.data.epochs import Epochs, Rows, rows_fingerprints
from dimefm_edge.data.images import ImagePool, PixelCache, decode_batches
from dimefm_edge.data.neighbours import NeighbourTable
from dimefm_edge.data.pairs import Pairs
from dimefm_edge.data.store import EmbeddingStore
from dimefm_edge.data.views import Views
from dimefm_edge.distributed import Ranks, piece_of_ranks
from dimefm_edge.errors import DataError
from dimefm_edge.preprocess import PreprocessSpec

T = TypeVar("T")
PixelSource = Callable[[Iterable[Rows]], Iterator[npt.NDArray[np.uint8]]]
"""Turns batches of rows into their (B, S, S, 3) uint8 pixels, in order."""

# One stream of random numbers each; distill.py has 3, text_batches.py 7 and 8.
_IMAGES, _TEXTS, _CROPS, _PAIRS, _VIEWS = 0, 1, 2, 4, 5
_PREFETCH_BATCHES = 3


@dataclass(frozen=True)
class DistillData:
    """What a student is distilled on: pixels, and the teacher's embeddings by row."""

    images: EmbeddingStore
    texts: EmbeddingStore
    pixels: PixelSource
    preprocess: PreprocessSpec
    logit_scale: float
    pairs: Pairs | None = None
    """Sentences that belong to the images, for the contrastive term only."""
    image_rows: Rows | None = None
    """Rows of `images` that are trained on, ascending; None: all that could be read."""
    text_rows: Rows | None = None
    """Rows of `texts` that are drawn from, ascending (corpus.py chooses); None: all."""
    neighbours: NeighbourTable | None = None
    """Sentences near to each image, for `hard_negatives`."""
    views: Views | None = None
    """Augmentations that the teacher saw too: the student then sees no other crops."""

    def usable_images(self) -> Rows:
        """Rows to train on: asked for, and readable."""
        return self.images.usable_rows(self.image_rows)

    def extras(self) -> dict[str, str]:
        """Fingerprints of what not every run has, by name."""
        parts = {"pairs": self.pairs, "neighbours": self.neighbours, "views": self.views}
        found = {name: part.fingerprint for name, part in parts.items() if part is not None}
        return found | rows_fingerprints(image_rows=self.image_rows, text_rows=self.text_rows)


@dataclass(frozen=True)
class Batch:
    """One step's data on this rank; embeddings and labels are of the global batch."""

    pixels: npt.NDArray[np.uint8]
    crops: Tensor
    image_rows: Rows
    text_rows: Rows
    image_embeds: Tensor
    text_embeds: Tensor
    paired_text_embeds: Tensor | None = None
    labels: Tensor | None = None

    def targets(self, piece: slice, num_ranks: int, device: torch.device) -> dict[str, Tensor]:
        """What the losses compare a micro-batch's images with, by the name that they give it.

        Args:
            piece: Of each rank's images.
            num_ranks: Ranks that the batch is split over.
            device: Where it is wanted.
        """
        sides = {
            "teacher_image_embeds": self.image_embeds,
            "paired_text_embeds": self.paired_text_embeds,
            "labels": self.labels,
        }
        return {
            name: piece_of_ranks(rows.to(device), piece, num_ranks)
            for name, rows in sides.items()
            if rows is not None
        }

    def save(self, path: Path) -> None:
        """Write everything as safetensors, to look at."""
        tensors = {
            "pixels": torch.from_numpy(self.pixels),
            "crops": self.crops,
            "image_rows": torch.from_numpy(self.image_rows),
            "text_rows": torch.from_numpy(self.text_rows),
            "image_embeds": self.image_embeds,
            "text_embeds": self.text_embeds,
            "paired_text_embeds": self.paired_text_embeds,
            "labels": self.labels,
        }
        save_file({k: v.contiguous() for k, v in tensors.items() if v is not None}, path)


class BatchPlan:
    """Which rows and crops belong to a step: pure functions of (seed, step)."""

    def __init__(self, data: DistillData, train: TrainConfig, ranks: Ranks) -> None:
        if train.hard_negatives and data.neighbours is None:
            raise ValueError("hard_negatives needs a table of neighbours")
        self._data, self._train, self._ranks = data, train, ranks
        self._epochs = Epochs(
            data.usable_images(), batch_size=train.batch_size, seed=train.seed, stream=_IMAGES
        )

    def image_rows(self, step: int) -> Rows:
        """(batch_size,) rows of the global batch: consecutive pieces of shuffled epochs."""
        return self._epochs.rows(step)

    def local_rows(self, step: int) -> Rows:
        """This rank's part of `image_rows`."""
        return self.image_rows(step)[self._ranks.slice(self._train.batch_size)]

    def batch(self, step: int, pixels: npt.NDArray[np.uint8]) -> Batch:
        """Complete a step's batch, given this rank's pixels."""
        train, data = self._train, self._data
        image_rows = self.image_rows(step)
        text_rows = self._text_rows(step, image_rows)
        image_embeds, crops = self._image_side(step, image_rows)
        text_embeds = torch.from_numpy(data.texts.gather(text_rows)).float()
        paired, labels = None, None
        if data.pairs is not None:
            rng = np.random.default_rng([train.seed, _PAIRS, step])
            paired = torch.from_numpy(data.pairs.sentence_embeds(image_rows, rng))
            labels = torch.from_numpy(data.pairs.labels[image_rows])
        return Batch(
            paired_text_embeds=paired,
            labels=labels,
            pixels=pixels,
            crops=crops[self._ranks.slice(train.batch_size)],
            image_rows=image_rows,
            text_rows=text_rows,
            image_embeds=image_embeds,
            text_embeds=text_embeds,
        )

    def _image_side(self, step: int, rows: Rows) -> tuple[Tensor, Tensor]:
        """The teacher's embeddings (B, E) float32 of the images, and the student's crops."""
        train, data = self._train, self._data
        if data.views is not None:
            rng = np.random.default_rng([train.seed, _VIEWS, step])
            embeds, crops = data.views.gather(rows, rng)
            return torch.from_numpy(embeds).float(), crops
        crops = random_crops(
            train.batch_size,
            min_crop=DEFAULT_MIN_CROP if train.min_crop is None else train.min_crop,
            flip=train.flip is not False,
            generator=seeded_generator(train.seed, _CROPS, step),
        )
        return torch.from_numpy(data.images.gather(rows)).float(), crops

    def _text_rows(self, step: int, image_rows: Rows) -> Rows:
        """(text_batch_size,) rows of sentences, ascending: a share of them near to the images,
        each once, the rest drawn with replacement."""
        train, data = self._train, self._data
        rng = np.random.default_rng([train.seed, _TEXTS, step])
        near: Rows = np.empty(0, np.int64)
        if train.hard_negatives:
            assert data.neighbours is not None
            near = data.neighbours.of(image_rows)
            count = min(len(near), round(train.hard_negatives * train.text_batch_size))
            near = rng.choice(near, count, replace=False)
        of = data.text_rows
        drawn = rng.integers(
            0, len(data.texts) if of is None else len(of), train.text_batch_size - len(near)
        )
        return np.sort(np.concatenate([near, drawn if of is None else of[drawn]]))

    def batches(self, start: int, stop: int) -> Iterator[Batch]:
        """The batches of steps [start, stop), in order."""
        pixels = self._data.pixels(self.local_rows(step) for step in range(start, stop))
        for step, batch_pixels in zip(range(start, stop), pixels, strict=True):
            yield self.batch(step, batch_pixels)


@dataclass(frozen=True)
class CachedPixels:
    """Pixels that were kept when the images were embedded."""

    cache: PixelCache

    def __call__(self, batches: Iterable[Rows]) -> Iterator[npt.NDArray[np.uint8]]:
        return (self.cache.gather(rows) for rows in batches)


@dataclass(frozen=True)
class DecodedPixels:
    """Pixels decoded anew in every epoch, for pools too large to keep."""

    pool: ImagePool
    preprocess: PreprocessSpec
    workers: int

    def __call__(self, batches: Iterable[Rows]) -> Iterator[npt.NDArray[np.uint8]]:
        for batch in decode_batches(self.pool, batches, self.preprocess, workers=self.workers):
            if batch.bad_rows:
                row, reason = batch.bad_rows[0]
                raise DataError(
                    f"image {self.pool.name(row)} could be read when it was embedded and "
                    f"cannot now: {reason}",
                    hint="bring the file back and run again with --resume",
                )
            yield batch.pixels


def prefetch(batches: Iterator[T]) -> Generator[T]:
    """Prepare batches in a thread; its errors are raised here."""
    ready: queue.Queue[T | BaseException | None] = queue.Queue(_PREFETCH_BATCHES)
    stopped = threading.Event()

    def offer(item: T | BaseException | None) -> None:
        while not stopped.is_set():
            with contextlib.suppress(queue.Full):
                return ready.put(item, timeout=0.1)

    def fill() -> None:
        try:
            for batch in batches:
                offer(batch)
                if stopped.is_set():
                    return
            offer(None)
        except BaseException as error:
            offer(error)

    thread = threading.Thread(target=fill, name="dimefm-prefetch", daemon=True)
    thread.start()
    try:
        while (item := ready.get()) is not None:
            if isinstance(item, BaseException):
                raise item
            yield item
    finally:
        stopped.set()
        thread.join()
