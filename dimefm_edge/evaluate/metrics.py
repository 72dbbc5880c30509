"""What a test set is scored by: accuracy, mean per class, 11-point mAP, ROC AUC. All in percent.

ELEVATER (arXiv 2204.08790) names the measure of each of its sets.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from dimefm_edge.errors import DataError, MissingExtraError

Metric = Literal["accuracy", "mean_per_class", "map_11_point", "roc_auc"]
METRICS: tuple[Metric, ...] = ("accuracy", "mean_per_class", "map_11_point", "roc_auc")

Scores = npt.NDArray[np.floating[Any]]
Labels = npt.NDArray[np.int64]


def label_ranks(scores: Scores, labels: Labels) -> Labels:
    """How many classes come before the true one; of classes that score the same the first wins.

    Args:
        scores: (N, C); rows that are not finite find no class.
        labels: (N,) classes.

    Returns:
        (N,) ranks from 0.
    """
    own = scores[np.arange(len(labels)), labels][:, None]
    is_earlier = np.arange(scores.shape[1]) < labels[:, None]
    ranks = ((scores > own) | ((scores == own) & is_earlier)).sum(1)
    return np.where(np.isfinite(scores).all(1), ranks, np.iinfo(np.int64).max)


def mean_per_class_pct(is_right: npt.NDArray[np.bool_], labels: Labels) -> float:
    """Accuracy of each class that has images, averaged: every class counts the same.

    Args:
        is_right: (N,) whether each image was told right.
        labels: (N,) its class.
    """
    counts = np.bincount(labels)
    hits = np.bincount(labels, weights=is_right)
    return float(100 * (hits[counts > 0] / counts[counts > 0]).mean())


def eleven_point_map_pct(scores: Scores, targets: npt.NDArray[np.bool_]) -> float:
    """Mean average precision of PASCAL VOC 2007: precision at recall 0, 0.1 to 1, interpolated.

    The precision at a recall is the best at that recall or any greater one (Everingham et al.,
    The PASCAL Visual Object Classes Challenge, 2010, section 4.2). Ties keep their order.

    Args:
        scores: (N, C).
        targets: (N, C) whether image n shows class c; classes without an image are left out.

    Raises:
        DataError: If no class has an image, or a score is not finite.
    """
    _check_finite(scores)
    precisions = []
    for column in np.flatnonzero(targets.any(0)):
        found = targets[np.argsort(-scores[:, column], kind="stable"), column]
        hits = np.cumsum(found)
        recall = hits / hits[-1]
        # Best precision from here on.
        best = np.maximum.accumulate((hits / np.arange(1, len(hits) + 1))[::-1])[::-1]
        # 1e-9: 0.1 * 3 is more than 3 / 10.
        places = np.searchsorted(recall, np.arange(11) / 10 - 1e-9)
        precisions.append(best[places].mean())
    if not precisions:
        raise DataError("no image shows any class: average precision has no meaning")
    return float(100 * np.mean(precisions))


def roc_auc_pct(scores: Scores, labels: Labels) -> float:
    """Area under the ROC curve of class 1 against class 0.

    Args:
        scores: (N, 2); what separates is how much more the second class scores.
        labels: (N,) 0 or 1.

    Raises:
        DataError: If there are not two classes with images, or a score is not finite.
        MissingExtraError: If scikit-learn is not installed.
    """
    if scores.shape[1] != 2 or len(np.unique(labels)) != 2:
        raise DataError("the area under the ROC curve needs two classes, with images of both")
    _check_finite(scores)
    margin = scores[:, 1].astype(np.float64) - scores[:, 0]
    return 100 * float(import_sklearn("metrics").roc_auc_score(labels, margin))


def score_metric(metric: Metric, scores: Scores, truth: npt.NDArray[Any]) -> float:
    """One figure, in percent.

    Args:
        metric: Its name.
        scores: (N, C).
        truth: (N,) classes; (N, C) bool for `map_11_point`.

    Raises:
        DataError: If the labels are not of the kind that the metric takes.
    """
    if (metric == "map_11_point") != (truth.ndim == 2):
        kind = "several classes an image" if truth.ndim == 2 else "one class an image"
        raise DataError(f"the metric {metric} cannot be taken of a set with {kind}")
    measures: dict[Metric, Callable[[], float]] = {
        "accuracy": lambda: float(100 * (label_ranks(scores, truth) < 1).mean()),
        "mean_per_class": lambda: mean_per_class_pct(label_ranks(scores, truth) < 1, truth),
        "map_11_point": lambda: eleven_point_map_pct(scores, truth),
        "roc_auc": lambda: roc_auc_pct(scores, truth),
    }
    return measures[metric]()


def import_sklearn(module: str) -> Any:
    """A module of scikit-learn.

    Raises:
        MissingExtraError: If it is not installed.
    """
    import importlib

    try:
        return importlib.import_module(f"sklearn.{module}")
    except ImportError as error:
        raise MissingExtraError(
            f"this measure needs scikit-learn, which cannot be imported: {error}",
            hint="pip install 'dimefm_edge[eval]'",
        ) from error


def _check_finite(scores: Scores) -> None:
    if not np.isfinite(scores).all():
        raise DataError("the model's scores are not all finite")
