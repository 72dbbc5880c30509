"""What one picture shows, by one model: ranked labels, and what each stage took."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import numpy.typing as npt
from PIL import Image

from dimefm_demo.models import Model, Models
from dimefm_demo.presets import PRESETS
from dimefm_edge.errors import InputError
from dimefm_edge.model_input import load_pixels
from dimefm_edge.runtime.text import DEFAULT_TEMPLATES

T = TypeVar("T")

NONE = "(none of these)"
"""What takes part in the ranking when none of the labels may be right."""
MIN_TEMPERATURE = 0.01
MAX_SENTENCES = 8000
"""Labels in all templates: while one visitor's are embedded, others' new labels wait."""


@dataclass(frozen=True)
class Question:
    """What a picture is asked."""

    labels: tuple[str, ...]
    templates: tuple[str, ...] = DEFAULT_TEMPLATES
    temperature: float = 1.0
    """Of the softmax: above 1 is less sure of itself, below 1 more."""
    with_none: bool = False
    """Whether `NONE` takes part."""

    def __post_init__(self) -> None:
        count = len(self.labels) * len(self.templates)
        if count > MAX_SENTENCES:
            raise InputError(
                f"{len(self.labels):,} labels in {len(self.templates)} templates are {count:,} "
                f"sentences, more than {MAX_SENTENCES:,}",
                hint="fewer templates",
            )
        if not self.temperature >= MIN_TEMPERATURE:
            raise InputError(
                f"the temperature must be {MIN_TEMPERATURE} at least, got {self.temperature}",
                hint="1 leaves the model's own certainty",
            )


@dataclass(frozen=True)
class Answer:
    """One model's answer, and what each of its stages took."""

    model: str
    ranked: tuple[tuple[str, float], ...]
    """(label, probability in [0, 1]) of all labels, from the likeliest on."""
    labels_ms: float
    """Label embeddings: next to nothing when they are known."""
    prepare_ms: float
    """Resizing and cropping."""
    image_ms: float
    """The image tower, with normalising: what `bench` measures."""
    rank_ms: float

    @property
    def top(self) -> str:
        return self.ranked[0][0]

    @property
    def total_ms(self) -> float:
        return self.labels_ms + self.prepare_ms + self.image_ms + self.rank_ms


def classify(models: Models, model: Model, image: Image.Image, question: Question) -> Answer:
    """Rank labels for a picture.

    Args:
        models: The page's, which keep label embeddings.
        model: One of them.
        image: RGB, any size.
        question: Labels and how to ask.

    Raises:
        CheckpointError: If the model has no text side, nor these labels baked in.
        DataError: If a template lacks `{c}`.
    """
    rows, labels_ms = _timed(lambda: label_rows(models, model, question))
    pixels, prepare_ms = _timed(lambda: load_pixels([image], model.subject.preprocess))
    embeds, image_ms = _timed(lambda: model.subject.encode_pixels(pixels))
    ranked, rank_ms = _timed(lambda: _rank(embeds[0], rows, model, question))
    return Answer(model.name, ranked, labels_ms, prepare_ms, image_ms, rank_ms)


def label_rows(models: Models, model: Model, question: Question) -> npt.NDArray[np.float32]:
    """(C, E) embeddings of the labels; those that stand for none of them follow."""
    labels, templates = question.labels, question.templates
    rows = models.label_bank(model, labels, templates).embeds
    if not question.with_none:
        return rows
    others = other_names(model, labels, has_text=models.has_text(model))
    if not others:
        raise InputError(
            f"{model.name} knows no other names that could speak for none of these",
            hint="switch 'none of these' off",
        )
    return np.concatenate([rows, models.label_bank(model, others, templates).embeds])


def other_names(model: Model, labels: Sequence[str], *, has_text: bool) -> tuple[str, ...]:
    """Names that speak for none of the labels: other classes that the model was baked with.

    An open model without any takes the presets'. A name that says more or less of a label
    ("star" of "red star") would compete with it, and is left out.
    """
    baked = [name for b in model.subject.label_banks.values() for name in b.classnames]
    if not baked and has_text:
        baked = [name for p in ("scenes", "CIFAR-10") for name in PRESETS[p]().labels]
    words = [set(label.casefold().split()) for label in labels]

    def is_other(name: str) -> bool:
        own = set(name.casefold().split())
        return not any(own <= label or label <= own for label in words)

    return tuple(filter(is_other, dict.fromkeys(baked)))


def _rank(
    embeds: npt.NDArray[np.float32], rows: npt.NDArray[np.float32], model: Model, question: Question
) -> tuple[tuple[str, float], ...]:
    """The likeliest of the other names stands for all of them, however many there are."""
    logits = (rows @ embeds).astype(np.float64) * model.subject.logit_scale / question.temperature
    names: tuple[str, ...] = question.labels
    if question.with_none:
        names = (*names, NONE)
        logits = np.append(logits[: len(question.labels)], logits[len(question.labels) :].max())
    weights = np.exp(logits - logits.max())
    shares = weights / weights.sum()
    return tuple((names[i], float(shares[i])) for i in np.argsort(-shares, kind="stable"))


def _timed(call: Callable[[], T]) -> tuple[T, float]:
    begun = time.perf_counter()
    result = call()
    return result, 1000 * (time.perf_counter() - begun)
