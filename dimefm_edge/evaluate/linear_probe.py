"""Linear probe: logistic regression on frozen embeddings, as CLIP and ELEVATER do it.

scikit-learn's L-BFGS. The strength of regularisation is swept on a validation split, 97 values
from 1e-6 to 1e6 of which CLIP's search tries fifteen (arXiv 2103.00020, appendix A.3: every 16th,
then half the step around the best until it is one); then the probe is fitted again on training
and validation images together (ELEVATER, arXiv 2204.08790). Where images show several classes,
each class has a regression of its own, and the sweep goes by 11-point mAP.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from dimefm_edge.errors import DataError
from dimefm_edge.evaluate.metrics import Metric, import_sklearn, score_metric

STRENGTHS = np.logspace(-6, 6, 97)
"""scikit-learn's C: one over the weight of the penalty; 8 a decade."""
VALIDATION_SHARE = 0.2
_MAX_ITERATIONS = 1000
_FIRST_STEP = 16
MAX_TRIED = 15
"""Strengths that the search tries at most; fewer when the best is the first or the last."""

Embeds = npt.NDArray[np.float32]
Labels = npt.NDArray[np.int64] | npt.NDArray[np.bool_]
"""(N,) classes, or (N, C) whether image n shows class c."""
Solve = Callable[[Embeds, Labels, float], Any]
"""(embeds, labels, C) -> what scikit-learn's fitted LogisticRegression can do."""


@dataclass(frozen=True, eq=False)
class LinearProbe:
    """A probe that is fitted."""

    model: Any
    """scikit-learn's LogisticRegression, or one of them a class."""
    num_classes: int
    c: float
    val_pct: float
    """Top-1 on the validation split, or 11-point mAP."""
    tried: tuple[tuple[float, float], ...]
    """(C, that figure), in order of C."""
    num_train: int
    has_converged: bool
    """Whether the last fit ended before its limit of iterations."""

    def scores(self, embeds: Embeds) -> npt.NDArray[np.float64]:
        """(N, E) -> (N, C) logits; classes without training images score least of all."""
        logits = np.asarray(self.model.decision_function(embeds), np.float64)
        if not hasattr(self.model, "n_iter_"):  # a regression for each class
            return logits
        if logits.ndim == 1:  # two classes: the margin of the second
            logits = np.stack([-logits, logits], axis=1) / 2
        full = np.full((len(embeds), self.num_classes), logits.min(initial=0.0) - 1)
        full[:, self.model.classes_] = logits
        return full


@dataclass(frozen=True)
class LinearProbeReport:
    """Accuracy of a linear probe on one test set, in percent."""

    name: str
    train_name: str
    metric: Metric
    value_pct: float
    c: float
    val_pct: float
    num_train: int
    num_images: int
    num_classes: int
    has_converged: bool


def fit_linear_probe(
    embeds: Embeds,
    labels: Labels,
    num_classes: int,
    *,
    name: str,
    seed: int = 0,
    advance: Callable[[int], None] | None = None,
    solve: Solve | None = None,
) -> LinearProbe:
    """Sweep C on a validation split and fit the best on all.

    Args:
        embeds: (N, E) of the training set.
        labels: (N,) its classes, or (N, C) bool.
        num_classes: C; classes without a training image are never predicted.
        name: Of the training set, for errors.
        seed: Of the split: one image in five of every class.
        advance: Told 1 after each fit.
        solve: Fits one strength; default: scikit-learn, on the CPU.

    Raises:
        DataError: If fewer than two classes have images, no class has two, or an embedding is
            not finite.
        MissingExtraError: If scikit-learn is not installed.
    """
    num_seen = int(labels.any(0).sum()) if labels.ndim == 2 else len(np.unique(labels))
    if num_seen < 2:
        raise DataError(
            f"a linear probe needs images of two classes or more; '{name}' has {num_seen}",
            hint="--linear-probe with a training set of the same classes",
        )
    if not np.isfinite(embeds).all():
        raise DataError(f"the embeddings of '{name}' are not all finite")
    is_val = validation_split(labels, seed=seed)
    if not is_val.any() or (labels.ndim == 2 and not labels[is_val].any()):
        raise DataError(
            f"'{name}' is too small for a validation split: a class needs two images or more"
        )
    fit = solve or _fit
    found: dict[int, float] = {}

    def accuracy(index: int) -> float:
        if index not in found:
            model = fit(embeds[~is_val], labels[~is_val], float(STRENGTHS[index]))
            found[index] = _score(model, embeds[is_val], labels[is_val])
            if advance is not None:
                advance(1)
        return found[index]

    best = search_strength(accuracy)
    model = fit(embeds, labels, float(STRENGTHS[best]))
    return LinearProbe(
        model=model,
        num_classes=num_classes,
        c=float(STRENGTHS[best]),
        val_pct=found[best],
        tried=tuple((float(STRENGTHS[i]), found[i]) for i in sorted(found)),
        num_train=len(labels),
        has_converged=_most_iterations(model) < _MAX_ITERATIONS,
    )


def evaluate_linear_probe(
    probe: LinearProbe,
    embeds: Embeds,
    labels: Labels,
    *,
    name: str,
    train_name: str,
    metric: Metric = "accuracy",
) -> LinearProbeReport:
    """Score a probe on (N, E) embeddings and (N,) classes, or (N, C) bool, of a test set."""
    return LinearProbeReport(
        name=name,
        train_name=train_name,
        metric=metric,
        value_pct=score_metric(metric, probe.scores(embeds), labels),
        c=probe.c,
        val_pct=probe.val_pct,
        num_train=probe.num_train,
        num_images=len(labels),
        num_classes=probe.num_classes,
        has_converged=probe.has_converged,
    )


def search_strength(accuracy: Callable[[int], float]) -> int:
    """Index of the best strength, by CLIP's search; of equals the smallest C, the most regular.

    Args:
        accuracy: Validation accuracy at an index of STRENGTHS.
    """
    indices = list(range(0, len(STRENGTHS), _FIRST_STEP))
    best = max(indices, key=accuracy)
    step = _FIRST_STEP
    while step > 1:
        step //= 2
        near = [i for i in (best - step, best, best + step) if 0 <= i < len(STRENGTHS)]
        best = max(near, key=accuracy)
    return best


def validation_split(labels: Labels, *, seed: int) -> npt.NDArray[np.bool_]:
    """(N,) True for one image in five: of every class, at least one of those that have two."""
    rng = np.random.default_rng(seed)
    if labels.ndim == 2:
        return np.asarray(rng.permutation(len(labels)) < max(1, len(labels) // 5))
    is_val = np.zeros(len(labels), bool)
    for label in np.unique(labels):
        members = rng.permutation(np.flatnonzero(labels == label))
        count = max(round(VALIDATION_SHARE * len(members)), int(len(members) > 1))
        is_val[members[:count]] = True
    return is_val


def _fit(embeds: Embeds, labels: Labels, c: float) -> Any:
    model = import_sklearn("linear_model").LogisticRegression(C=c, max_iter=_MAX_ITERATIONS)
    if labels.ndim == 2:
        model = import_sklearn("multiclass").OneVsRestClassifier(model)
    with warnings.catch_warnings():
        # Told in the report; a weak penalty often needs more steps than anyone waits for.
        warnings.simplefilter("ignore", import_sklearn("exceptions").ConvergenceWarning)
        warnings.filterwarnings("ignore", message="Label .* is present in all|Label not")
        return model.fit(embeds, labels.astype(np.int64))


def _score(model: Any, embeds: Embeds, labels: Labels) -> float:
    if labels.ndim == 2:
        return score_metric("map_11_point", model.decision_function(embeds), labels)
    return float(100 * (model.predict(embeds) == labels).mean())


def _most_iterations(model: Any) -> int:
    """Of its regressions; a class that all images show, or none, has none."""
    parts = getattr(model, "estimators_", [model])
    return max((int(np.max(part.n_iter_)) for part in parts if hasattr(part, "n_iter_")), default=0)
