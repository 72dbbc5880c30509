"""What the loop of distill.py trains: an image student or a text student, each by its own side.

The loop knows neither images nor sentences: a side says what a batch is, what the student takes
of it, and what its answer is worth.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor

from dimefm_edge.batches import Batch, BatchPlan, DistillData
from dimefm_edge.config import LossConfig, TextStudentConfig, TrainConfig
from dimefm_edge.data.augment import crop_batch
from dimefm_edge.distributed import Ranks, piece_of_ranks
from dimefm_edge.losses import distillation_loss, text_distillation_loss
from dimefm_edge.text_batches import TextBatch, TextBatchPlan, TextData


class SavedBatch(Protocol):
    """What can be looked at when a loss is not finite."""

    def save(self, path: Path) -> None:
        """Write everything as safetensors."""


B = TypeVar("B", bound=SavedBatch)


class Side(Protocol[B]):
    """One of the two towers, as the loop sees it."""

    unit: str
    """What a student takes: `images` or `sentences`."""
    num_rows: int
    """What an epoch passes over."""

    def batches(self, start: int, stop: int) -> Iterator[B]:
        """The batches of steps [start, stop), in order."""

    def inputs(self, batch: B) -> Tensor:
        """What the student takes of this rank's part, on the device."""

    def terms(self, student_embeds: Tensor, batch: B, piece: slice) -> dict[str, Tensor]:
        """The losses of a micro-batch, by name, `loss` being their weighted sum.

        Args:
            student_embeds: (B, E) of all ranks, with gradients.
            batch: Which it is part of.
            piece: Of each rank's inputs.
        """

    def identity(self) -> dict[str, Any]:
        """What a run must have in common with the one that it resumes."""


class ImageSide:
    """An image student: pixels, cropped and preprocessed, against `distillation_loss`."""

    unit = "images"

    def __init__(
        self,
        data: DistillData,
        loss: LossConfig,
        train: TrainConfig,
        ranks: Ranks,
        device: torch.device,
    ) -> None:
        self._data, self._loss, self._ranks, self._device = data, loss, ranks, device
        self.num_rows = len(data.usable_images())
        self._plan = BatchPlan(data, train, ranks)
        spec = data.preprocess
        self._mean = torch.tensor(spec.mean, device=device).view(1, 3, 1, 1) * 255
        self._std = torch.tensor(spec.std, device=device).view(1, 3, 1, 1) * 255

    def batches(self, start: int, stop: int) -> Iterator[Batch]:
        return self._plan.batches(start, stop)

    def inputs(self, batch: Batch) -> Tensor:
        """(B, 3, S, S)."""
        pixels = torch.from_numpy(batch.pixels).to(self._device, non_blocking=True)
        images = crop_batch(pixels.permute(0, 3, 1, 2).float(), batch.crops)
        images = images.sub_(self._mean).div_(self._std)
        return images.contiguous(memory_format=image_layout(self._device))

    def terms(self, student_embeds: Tensor, batch: Batch, piece: slice) -> dict[str, Tensor]:
        return distillation_loss(
            student_embeds,
            **batch.targets(piece, self._ranks.world_size, self._device),
            teacher_text_embeds=batch.text_embeds.to(self._device),
            config=self._loss,
            logit_scale=self._data.logit_scale,
        )

    def identity(self) -> dict[str, Any]:
        return {
            **dataclasses.asdict(self._loss),
            **_stores(self._data),
            **self._data.extras(),
        }


class TextSide:
    """A text student: tokens, against `text_distillation_loss`."""

    unit = "sentences"

    def __init__(
        self,
        data: TextData,
        loss: TextStudentConfig,
        train: TrainConfig,
        ranks: Ranks,
        device: torch.device,
    ) -> None:
        self._data, self._loss, self._ranks, self._device = data, loss, ranks, device
        self.num_rows = len(data.usable_texts())
        self._plan = TextBatchPlan(data, train, ranks, num_images=loss.text_images)

    def batches(self, start: int, stop: int) -> Iterator[TextBatch]:
        return self._plan.batches(start, stop)

    def inputs(self, batch: TextBatch) -> Tensor:
        """(B, N) int64."""
        return batch.tokens.to(self._device, non_blocking=True)

    def terms(self, student_embeds: Tensor, batch: TextBatch, piece: slice) -> dict[str, Tensor]:
        text_embeds = batch.text_embeds.to(self._device)
        return text_distillation_loss(
            student_embeds,
            piece_of_ranks(text_embeds, piece, self._ranks.world_size),
            batch.image_embeds.to(self._device),
            config=self._loss,
            logit_scale=self._data.logit_scale,
        )

    def identity(self) -> dict[str, Any]:
        told = {"text_student", "text_steps"}  # by its size and by the steps of `train`
        settings = dataclasses.asdict(self._loss)
        return {
            **{k: v for k, v in settings.items() if k not in told},
            **_stores(self._data),
            **self._data.extras(),
        }


def side_of(
    data: DistillData | TextData,
    loss: LossConfig | TextStudentConfig,
    train: TrainConfig,
    ranks: Ranks,
    device: torch.device,
) -> ImageSide | TextSide:
    """The side that a data set is of.

    Raises:
        TypeError: If the losses are the other side's.
    """
    if isinstance(data, TextData) and isinstance(loss, TextStudentConfig):
        return TextSide(data, loss, train, ranks, device)
    if isinstance(data, DistillData) and isinstance(loss, LossConfig):
        return ImageSide(data, loss, train, ranks, device)
    raise TypeError(f"{type(loss).__name__} holds no losses for {type(data).__name__}")


def training_inputs(
    data: DistillData, loss: LossConfig, train: TrainConfig, count: int, device: torch.device
) -> Iterator[Tensor]:
    """Batches of images, (B, 3, S, S) on a device, as a student is trained on them.

    The first `count`, or what one pass over the images has.
    """
    side = ImageSide(data, loss, train, Ranks(), device)
    count = min(count, math.ceil(side.num_rows / train.batch_size))
    return map(side.inputs, side.batches(0, count))


def image_layout(device: torch.device) -> torch.memory_format:
    """How images and an image student's weights lie in memory.

    Convolutions are faster channels last; on CPUs torch 2.14.1's oneDNN then corrupts the heap in
    the backward pass of hybrids (seen on an AMD EPYC with AVX2).
    """
    return torch.contiguous_format if device.type == "cpu" else torch.channels_last


def _stores(data: DistillData | TextData) -> dict[str, str]:
    images, texts = data.images.manifest, data.texts.manifest
    return {"images": images.source, "texts": texts.source, "teacher": images.weights_hash}
