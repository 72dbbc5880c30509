"""Zero-shot classification with a bundle's baked label embeddings: PIL images to names."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from dimefm_edge.errors import CheckpointError, lookup
from dimefm_edge.labels import LabelBank
from dimefm_edge.preprocess import resize_image
from dimefm_edge.runtime.bundle import Bundle, load_bundle
from dimefm_edge.runtime.engines import Engine, load_engine

_IMAGES_PER_CALL = 32


class ZeroShotClassifier:
    """Names what images show, among the classes of one of the bundle's label sets."""

    def __init__(
        self, bundle: Bundle | Path | str, *, threads: int = 0, engine: str = "onnxruntime"
    ) -> None:
        """Load a bundle and its engine.

        Args:
            bundle: A bundle, its folder or its `.zip`.
            threads: CPU threads; 0 takes one per physical core.
            engine: What runs it: see `load_engine`.

        Raises:
            CheckpointError: If the bundle cannot be used.
        """
        self.bundle = bundle if isinstance(bundle, Bundle) else load_bundle(bundle)
        self.engine: Engine = load_engine(self.bundle, threads=threads, engine=engine)

    def classify(
        self, images: Sequence[Image.Image], *, labels: str | None = None, top_k: int = 5
    ) -> list[list[tuple[str, float]]]:
        """Rank the classes for each image.

        Args:
            images: Any sizes and modes.
            labels: Name of a label set; the bundle's first when None.
            top_k: Classes per image; fewer when the label set has fewer.

        Returns:
            Per image, (class name, probability in [0, 1]) from the likeliest on.
            Probabilities are over all classes of the label set.

        Raises:
            CheckpointError: If the bundle has no label sets.
            UnknownNameError: If it lacks the one asked for.
        """
        if top_k < 1:
            raise ValueError(f"top_k must be at least 1, got {top_k}")
        bank = self._bank(labels)
        answers: list[list[tuple[str, float]]] = []
        for start in range(0, len(images), _IMAGES_PER_CALL):
            chunk = images[start : start + _IMAGES_PER_CALL]
            pixels = np.stack([resize_image(image, self.bundle.preprocess) for image in chunk])
            logits = self.bundle.logit_scale * self.engine.encode_pixels(pixels) @ bank.embeds.T
            for row in _softmax(logits):
                order = np.argsort(-row, kind="stable")[:top_k]
                answers.append([(bank.classnames[i], float(row[i])) for i in order])
        return answers

    def _bank(self, labels: str | None) -> LabelBank:
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
