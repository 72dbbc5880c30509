"""Calibration: whether a model that is 80% sure is right 80% of the time.

The probabilities are what is deployed: the softmax of cosines times the teacher's logit scale.
Expected calibration error as in Guo et al., On Calibration of Modern Neural Networks (arXiv
1706.04599): 15 bins of equal width; beside it, bins of equal mass (arXiv 1909.10155).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from dimefm_edge.errors import DataError

NUM_BINS = 15

Vector = npt.NDArray[np.float64]


@dataclass(frozen=True)
class ReliabilityBin:
    """Images whose confidence lies in (low, high]; confidence and accuracy in percent."""

    low: float
    high: float
    count: int
    confidence_pct: float
    accuracy_pct: float


@dataclass(frozen=True)
class CalibrationReport:
    """How far confidence is from accuracy on one test set, in percent."""

    name: str
    logit_scale: float
    """What cosines were multiplied by: one over the temperature."""
    ece_pct: float
    """15 bins of equal width."""
    ece_equal_mass_pct: float
    """15 bins of as many images each."""
    confidence_pct: float
    """Mean; above the accuracy, the model is too sure of itself."""
    accuracy_pct: float
    num_images: int
    bins: tuple[ReliabilityBin, ...]
    """Of equal width, those that hold images: the reliability diagram."""


def measure_calibration(
    name: str,
    scores: npt.NDArray[np.floating[Any]],
    labels: npt.NDArray[np.int64],
    logit_scale: float,
    *,
    num_bins: int = NUM_BINS,
) -> CalibrationReport:
    """Calibration of a zero-shot classifier.

    Args:
        name: Of the test set.
        scores: (N, C) cosines.
        labels: (N,) classes.
        logit_scale: Of the teacher, exponentiated.
        num_bins: M.

    Raises:
        DataError: If there is no image, or a score is not finite.
    """
    if not len(labels) or not np.isfinite(scores).all():
        raise DataError(f"calibration on '{name}' needs images whose scores are finite")
    confidence, predicted = top_confidence(scores, logit_scale)
    is_right = predicted == labels
    edges = np.linspace(0, 1, num_bins + 1)
    number = np.clip(np.searchsorted(edges, confidence, side="left") - 1, 0, num_bins - 1)
    bins = []
    for i in range(num_bins):
        members = number == i
        if members.any():
            bins.append(
                ReliabilityBin(
                    float(edges[i]), float(edges[i + 1]), int(members.sum()),
                    float(100 * confidence[members].mean()), float(100 * is_right[members].mean()),
                )
            )  # fmt: skip
    return CalibrationReport(
        name=name,
        logit_scale=logit_scale,
        ece_pct=_gap([confidence[number == i] for i in range(num_bins)],
                     [is_right[number == i] for i in range(num_bins)]),
        ece_equal_mass_pct=_equal_mass_gap(confidence, is_right, num_bins),
        confidence_pct=float(100 * confidence.mean()),
        accuracy_pct=float(100 * is_right.mean()),
        num_images=len(labels),
        bins=tuple(bins),
    )  # fmt: skip


def top_confidence(
    scores: npt.NDArray[np.floating[Any]], logit_scale: float
) -> tuple[Vector, npt.NDArray[np.int64]]:
    """(N,) probability of the likeliest class, and (N,) that class, in float64."""
    logits = scores.astype(np.float64) * logit_scale
    top = logits.max(1, keepdims=True)
    return 1 / np.exp(logits - top).sum(1), logits.argmax(1)


def _equal_mass_gap(confidence: Vector, is_right: npt.NDArray[np.bool_], num_bins: int) -> float:
    order = np.argsort(confidence, kind="stable")
    return _gap(
        np.array_split(confidence[order], num_bins), np.array_split(is_right[order], num_bins)
    )


def _gap(confidence: list[Vector], is_right: list[npt.NDArray[np.bool_]]) -> float:
    """Mean over images of |accuracy - confidence| of their bin, in percent."""
    total = sum(map(len, confidence))
    return 100 * sum(
        abs(float(right.mean()) - float(sure.mean())) * len(sure) / total
        for sure, right in zip(confidence, is_right, strict=True)
        if len(sure)
    )
