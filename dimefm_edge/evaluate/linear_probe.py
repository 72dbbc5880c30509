"""Linear probe: logistic regression on frozen embeddings, as CLIP and ELEVATER do it.

scikit-learn's L-BFGS. The strength of regularisation is swept on a validation split, 97 values
from 1e-6 to 1e6 of which CLIP's search tries fifteen (arXiv 2103.00020, appendix A.3: every 16th,
then half the step around the best until it is one); then the probe is fitted again on training
and validation images together (ELEVATER, arXiv 2204.08790).
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from dimefm_edge.errors import DataError
from dimefm_edge.evaluate.metrics import Metric, import_sklearn, label_ranks, score_metric

STRENGTHS = np.logspace(-6, 6, 97)
"""scikit-learn's C: one over the weight of the penalty; 8 a decade."""
VALIDATION_SHARE = 0.2
_MAX_ITERATIONS = 1000
_FIRST_STEP = 16
MAX_TRIED = 15
"""Strengths that the search tries at most; fewer when the best is the first or the last."""

Embeds = npt.NDArray[np.float32]
Labels = npt.NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class LinearProbe:
    """A probe that is fitted."""

    model: Any
    """scikit-learn's LogisticRegression."""
    num_classes: int
    c: float
    val_top1_pct: float
    tried: tuple[tuple[float, float], ...]
    """(C, top-1 on the validation split in percent), in order of C."""
    num_train: int
    has_converged: bool
    """Whether the last fit ended before its limit of iterations."""

    def scores(self, embeds: Embeds) -> npt.NDArray[np.float64]:
        """(N, E) -> (N, C) logits; classes without training images score least of all."""
        logits = np.asarray(self.model.decision_function(embeds), np.float64)
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
    top1_pct: float
    c: float
    val_top1_pct: float
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
) -> LinearProbe:
    """Sweep C on a validation split and fit the best on all.

    Args:
        embeds: (N, E) of the training set.
        labels: (N,) its classes.
        num_classes: C; classes without a training image are never predicted.
        name: Of the training set, for errors.
        seed: Of the split: one image in five of every class.
        advance: Told 1 after each fit.

    Raises:
        DataError: If fewer than two classes have images, no class has two, or an embedding is
            not finite.
        MissingExtraError: If scikit-learn is not installed.
    """
    if len(np.unique(labels)) < 2:
        raise DataError(
            f"a linear probe needs images of two classes or more; '{name}' has "
            f"{len(np.unique(labels))}",
            hint="--linear-probe with a training set of the same classes",
        )
    if not np.isfinite(embeds).all():
        raise DataError(f"the embeddings of '{name}' are not all finite")
    is_val = validation_split(labels, seed=seed)
    if not is_val.any() or len(np.unique(labels[~is_val])) < 2:
        raise DataError(
            f"'{name}' is too small for a validation split: a class needs two images or more"
        )
    found: dict[int, float] = {}

    def accuracy(index: int) -> float:
        if index not in found:
            model = _fit(embeds[~is_val], labels[~is_val], float(STRENGTHS[index]))
            found[index] = float(100 * (model.predict(embeds[is_val]) == labels[is_val]).mean())
            if advance is not None:
                advance(1)
        return found[index]

    best = search_strength(accuracy)
    model = _fit(embeds, labels, float(STRENGTHS[best]))
    return LinearProbe(
        model=model,
        num_classes=num_classes,
        c=float(STRENGTHS[best]),
        val_top1_pct=found[best],
        tried=tuple((float(STRENGTHS[i]), found[i]) for i in sorted(found)),
        num_train=len(labels),
        has_converged=int(np.max(model.n_iter_)) < _MAX_ITERATIONS,
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
    """Score a probe on (N, E) embeddings and (N,) classes of a test set."""
    scores = probe.scores(embeds)
    return LinearProbeReport(
        name=name,
        train_name=train_name,
        metric=metric,
        value_pct=score_metric(metric, scores, labels),
        top1_pct=float(100 * (label_ranks(scores, labels) < 1).mean()),
        c=probe.c,
        val_top1_pct=probe.val_top1_pct,
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
    """(N,) True for one image in five of every class, at least one of classes that have two."""
    rng = np.random.default_rng(seed)
    is_val = np.zeros(len(labels), bool)
    for label in np.unique(labels):
        members = rng.permutation(np.flatnonzero(labels == label))
        count = max(round(VALIDATION_SHARE * len(members)), int(len(members) > 1))
        is_val[members[:count]] = True
    return is_val


def _fit(embeds: Embeds, labels: Labels, c: float) -> Any:
    linear_model = import_sklearn("linear_model")
    with warnings.catch_warnings():
        # Told in the report; a weak penalty often needs more steps than anyone waits for.
        warnings.simplefilter("ignore", import_sklearn("exceptions").ConvergenceWarning)
        return linear_model.LogisticRegression(C=c, max_iter=_MAX_ITERATIONS).fit(embeds, labels)
