"""Zero-shot classification: an image's label is the class whose text embedding is nearest.

Works on anything that turns pixels into embeddings: a teacher, a student in torch, an
exported graph. No torch here.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from dimefm_edge.data.images import LabelledSet, decode_batches, row_batches
from dimefm_edge.errors import DataError
from dimefm_edge.labels import LabelBank
from dimefm_edge.preprocess import PreprocessSpec


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
    encode_pixels: Callable[[npt.NDArray[np.uint8]], npt.NDArray[np.float32]],
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
    if bank.classnames != labelled.classnames:
        raise DataError(
            f"the label set '{bank.name}' ({len(bank.classnames)} classes) is not the test set "
            f"'{labelled.name}' ({len(labelled.classnames)} classes)",
            hint="build the labels from the test set's own class names",
        )
    batches = row_batches([range(len(labelled.pool))], batch_size)
    top1 = top5 = read = bad = 0
    for batch in decode_batches(labelled.pool, batches, preprocess, workers=workers):
        bad += len(batch.bad_rows)
        if not len(batch.rows):
            continue
        scores = encode_pixels(batch.pixels) @ bank.embeds.T
        labels = labelled.labels[batch.rows]
        ranks = _ranks(scores, labels)
        read += len(labels)
        top1 += int((ranks < 1).sum())
        top5 += int((ranks < 5).sum())
    if not read:
        raise DataError(f"no image of the test set '{labelled.name}' could be read")
    return ZeroShotReport(
        name=labelled.name,
        top1_pct=100 * top1 / read,
        top5_pct=100 * top5 / read,
        chance_pct=100 / len(labelled.classnames),
        num_images=read,
        num_classes=len(labelled.classnames),
        num_bad=bad,
    )


def _ranks(scores: npt.NDArray[np.float32], labels: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """(B, C) scores, (B,) classes -> (B,) how many classes come before the true one."""
    own = scores[np.arange(len(labels)), labels][:, None]
    is_earlier = np.arange(scores.shape[1]) < labels[:, None]
    ranks = ((scores > own) | ((scores == own) & is_earlier)).sum(1)
    return np.where(np.isfinite(scores).all(1), ranks, np.iinfo(np.int64).max)
