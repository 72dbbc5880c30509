"""Zero-shot classification with baked or free labels: image files or PIL images to names."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from dimefm_edge.errors import CheckpointError, lookup
from dimefm_edge.labels import LabelBank
from dimefm_edge.model_input import ImageSource, load_image, load_inputs, load_pixels
from dimefm_edge.runtime.bundle import Bundle, load_bundle
from dimefm_edge.runtime.engines import Engine, load_engine
from dimefm_edge.runtime.text import DEFAULT_TEMPLATES, LabelEncoder, load_text_encoder

_IMAGES_PER_CALL = 32


class ZeroShotClassifier:
    """Names what images show, among the bundle's label sets or, with a text side, any labels."""

    def __init__(
        self,
        bundle: Bundle | Path | str,
        *,
        threads: int = 0,
        engine: str = "onnxruntime",
        labels: str | Sequence[str] | None = None,
        templates: Sequence[str] = DEFAULT_TEMPLATES,
        exact: bool = False,
    ) -> None:
        """Load a bundle and its engine.

        Args:
            bundle: A bundle, its folder or its `.zip`.
            labels: What to tell apart when `classify` is not told: the name of a label set, or
                labels of your own, which need a text side. Default: the first label set.
            templates: Sentences with `{c}` where a free label goes.
            threads: CPU threads; 0 takes one per physical core.
            engine: What runs it: see `load_engine`.
            exact: Prepare images bit for bit as in training, instead of quickly and within the
                tolerance that `model_input` states. A graph that resizes does it its own way.

        Raises:
            CheckpointError: If the bundle cannot be used, or has no text side for `labels`.
            DataError: If a template lacks `{c}`.
            InputError: If `labels` is empty, or one is blank.
        """
        self.bundle = bundle if isinstance(bundle, Bundle) else load_bundle(bundle)
        self.engine: Engine = load_engine(self.bundle, threads=threads, engine=engine)
        if isinstance(templates, str):
            raise ValueError("templates must be a list, of one template if need be")
        self._templates, self._threads, self._exact = tuple(templates), threads, exact
        self._labels: LabelBank | None = None
        self._labels = self._bank(labels) if labels is not None else None

    def classify(
        self,
        images: Sequence[ImageSource],
        *,
        labels: str | Sequence[str] | None = None,
        top_k: int = 5,
    ) -> list[list[tuple[str, float]]]:
        """Rank the classes for each image.

        Args:
            images: Image files, their bytes, or PIL images of any size and mode. Files are
                fastest: a JPEG is not decoded further than the model needs. All are seen as a
                person would: upright, and on white where they are transparent.
            labels: Name of a label set, or labels of your own, each of which is embedded
                once; None takes the classifier's, else the bundle's first label set.
            top_k: Classes per image; fewer when the label set has fewer.

        Returns:
            Per image, (class name, probability in [0, 1]) from the likeliest on.
            Probabilities are over all classes of the label set.

        Raises:
            BadImageError: If one of the images cannot be read.
            CheckpointError: If the bundle has no label sets, or no text side for free labels.
            InputError: If there are no labels, or one is blank.
            UnknownNameError: If it lacks the one asked for.
        """
        if top_k < 1:
            raise ValueError(f"top_k must be at least 1, got {top_k}")
        if not isinstance(images, Sequence) or isinstance(images, str | bytes):
            raise ValueError("images must be a list, of one image if need be")
        bank = self._bank(labels)
        answers: list[list[tuple[str, float]]] = []
        for start in range(0, len(images), _IMAGES_PER_CALL):
            chunk = images[start : start + _IMAGES_PER_CALL]
            logits = self.bundle.logit_scale * self._embed(chunk) @ bank.embeds.T
            for row in _softmax(logits):
                order = np.argsort(-row, kind="stable")[:top_k]
                answers.append([(bank.classnames[i], float(row[i])) for i in order])
        return answers

    def _embed(self, images: Sequence[ImageSource]) -> npt.NDArray[np.float32]:
        """(B, E); a graph that resizes gets each image as it is, those of one size together."""
        if self.engine.takes_any_size:
            whole = [np.asarray(load_image(image)) for image in images]
            runs = itertools.groupby(whole, key=np.shape)
            pieces = [self.engine.encode_pixels(np.stack(list(run))) for _, run in runs]
            return np.concatenate(pieces)
        spec = self.bundle.preprocess
        if self.bundle.image_input == "float":
            return self.engine.encode_image(load_inputs(images, spec, exact=self._exact))
        return self.engine.encode_pixels(load_pixels(images, spec, exact=self._exact))

    @functools.cached_property
    def _label_encoder(self) -> LabelEncoder:
        return LabelEncoder(load_text_encoder(self.bundle, threads=self._threads).encode_texts)

    def _bank(self, labels: str | Sequence[str] | None) -> LabelBank:
        if labels is None and self._labels is not None:
            return self._labels
        if labels is not None and not isinstance(labels, str):
            return self._label_encoder.bank(labels, templates=self._templates)
        banks = self.bundle.label_banks
        if not banks:
            raise CheckpointError(
                f"{self.bundle.path} has no label sets to choose from",
                hint="export it with label sets: dimefm-edge export --help says how",
            )
        return lookup(banks, next(iter(banks)) if labels is None else labels, kind="label set")


def _softmax(logits: npt.NDArray[np.floating[Any]]) -> npt.NDArray[np.float64]:
    shifted = np.exp(logits.astype(np.float64) - logits.max(axis=1, keepdims=True))
    return np.asarray(shifted / shifted.sum(axis=1, keepdims=True))
