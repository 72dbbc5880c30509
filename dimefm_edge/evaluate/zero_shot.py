"""Zero-shot classification: an image's label is the class whose text embedding is nearest.

Works on anything that turns pixels into embeddings: a teacher, a student in torch, an
exported graph. No torch here.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from dimefm_edge.data.images import LabelledSet
from dimefm_edge.errors import DataError
from dimefm_edge.evaluate.features import EncodePixels, Features, embed_pool
from dimefm_edge.evaluate.metrics import label_ranks
from dimefm_edge.labels import LabelBank
from dimefm_edge.preprocess import PreprocessSpec

_ROWS_PER_PRODUCT = 4096


@dataclass(frozen=True)
class ZeroShotReport:
    """Accuracy on one test set, in percent of the images that could be read."""

    name: str
    top1_pct: float
    top5_pct: float
    chance_pct: float
    num_images: int
    num_classes: int
    num_bad: int


def evaluate_zero_shot(
    encode_pixels: EncodePixels,
    preprocess: PreprocessSpec,
    labelled: LabelledSet,
    bank: LabelBank,
    *,
    batch_size: int = 250,
    workers: int = 0,
) -> ZeroShotReport:
    """Classify every image of a test set.

    Of classes that score the same the first wins, as in the runtime's classifier; an
    embedding that is not finite finds no class.

    Args:
        encode_pixels: (B, S, S, 3) uint8 -> (B, E), L2-normalised.
        preprocess: How the images become S x S pixels: the model's own.
        labelled: Images, labels and class names.
        bank: Text embeddings of the same class names.
        batch_size: Images per call.
        workers: Decoding threads; 0 chooses.

    Raises:
        DataError: If the bank's classes are not the set's, or no image can be read.
    """
    check_classes(bank, labelled.name, labelled.classnames)
    features = embed_pool(
        encode_pixels, preprocess, labelled.pool, name=labelled.name,
        batch_size=batch_size, workers=workers,
    )  # fmt: skip
    return score_zero_shot(features, labelled, bank)


def score_zero_shot(features: Features, labelled: LabelledSet, bank: LabelBank) -> ZeroShotReport:
    """The report for images that are embedded already; see `evaluate_zero_shot`."""
    check_classes(bank, labelled.name, labelled.classnames)
    labels = labelled.labels[features.rows]
    top1 = top5 = 0
    for start in range(0, len(labels), _ROWS_PER_PRODUCT):
        part = slice(start, start + _ROWS_PER_PRODUCT)
        ranks = label_ranks(features.embeds[part] @ bank.embeds.T, labels[part])
        top1 += int((ranks < 1).sum())
        top5 += int((ranks < 5).sum())
    return ZeroShotReport(
        name=labelled.name,
        top1_pct=100 * top1 / len(labels),
        top5_pct=100 * top5 / len(labels),
        chance_pct=100 / len(labelled.classnames),
        num_images=len(labels),
        num_classes=len(labelled.classnames),
        num_bad=features.num_bad,
    )


def cosine_scores(features: Features, bank: LabelBank) -> npt.NDArray[np.float32]:
    """(N, C) cosines of images and classes."""
    scores: npt.NDArray[np.float32] = features.embeds @ bank.embeds.T
    return scores


def check_classes(bank: LabelBank, name: str, classnames: tuple[str, ...]) -> None:
    """Refuse a label bank of other classes than the test set's.

    Raises:
        DataError: If the names or their order differ.
    """
    if bank.classnames != classnames:
        raise DataError(
            f"the label set '{bank.name}' ({len(bank.classnames)} classes) is not the test set "
            f"'{name}' ({len(classnames)} classes)",
            hint="build the labels from the test set's own class names",
        )
