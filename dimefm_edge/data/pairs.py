"""Pairs of image and sentence: what a student needs to be trained as CLIP is.

Distillation needs none; this is the baseline that it is compared with. No torch here.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from dimefm_edge.data.labelled import LabelledSet
from dimefm_edge.errors import DataError

_SENTENCES_PER_CALL = 4096


@dataclass(frozen=True, eq=False)
class Pairs:
    """The label of every image, and the teacher's embeddings of each label's sentences."""

    labels: npt.NDArray[np.int64]
    """(N,), by row of the images, each in [0, C)."""
    embeds: npt.NDArray[np.float32]
    """(C, P, E), L2-normalised: P sentences of each label."""

    def __post_init__(self) -> None:
        if self.embeds.ndim != 3 or self.labels.ndim != 1:
            raise ValueError(
                f"labels must be (N,) and embeds (C, P, E), got {self.labels.shape} and "
                f"{self.embeds.shape}"
            )
        if len(self.labels) and not 0 <= self.labels.min() <= self.labels.max() < len(self.embeds):
            raise ValueError(f"labels must be in [0, {len(self.embeds)})")

    def sentence_embeds(
        self, rows: npt.NDArray[np.int64], rng: np.random.Generator
    ) -> npt.NDArray[np.float32]:
        """One sentence of each image's label, drawn at random: (B,) rows -> (B, E)."""
        which = rng.integers(0, self.embeds.shape[1], len(rows))
        chosen: npt.NDArray[np.float32] = self.embeds[self.labels[rows], which]
        return chosen

    @functools.cached_property
    def fingerprint(self) -> str:
        """16 hex digits over labels and sentences."""
        digest = hashlib.sha256(self.labels.tobytes())
        digest.update(np.ascontiguousarray(self.embeds).data)
        return digest.hexdigest()[:16]


def class_pairs(
    labelled: LabelledSet, encode_texts: Callable[[Sequence[str]], npt.NDArray[np.float32]]
) -> Pairs:
    """Pair each image with its class in every template of its set.

    Args:
        labelled: Images with classes; rows of the pairs are rows of its pool.
        encode_texts: Sentences to (len, E) L2-normalised embeddings: the teacher's.

    Raises:
        DataError: If the set has less than two classes.
    """
    if len(labelled.classnames) < 2:
        raise DataError(f"{labelled.name} has less than two classes: nothing to contrast")
    sentences = [t.replace("{c}", c) for c in labelled.classnames for t in labelled.templates]
    embeds = np.concatenate(
        [
            encode_texts(sentences[start : start + _SENTENCES_PER_CALL])
            for start in range(0, len(sentences), _SENTENCES_PER_CALL)
        ]
    )
    shape = (len(labelled.classnames), len(labelled.templates), -1)
    return Pairs(labelled.labels, embeds.reshape(shape))
