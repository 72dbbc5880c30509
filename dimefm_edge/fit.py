"""Which student: estimate a grid of them on the target, keep the best that fits.

On this machine, the choice is measured before it is made, and what measuring says of the
estimates corrects the others.

Quality is not known before training; student_score.py stands in for it. A crude rule, stated so
that you can overrule it: every candidate is in the report.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from dimefm_edge.errors import ConfigError
from dimefm_edge.fit_limits import budget_error, first_met, limits_to_try
from dimefm_edge.latency.estimate import Place, estimate_at, place_on
from dimefm_edge.latency.operators import Operator, total_gmacs
from dimefm_edge.student_grid import FAMILIES, GRIDS, CanInherit, find_student, student_grid
from dimefm_edge.student_score import is_convolutional, learns_quickly, student_score
from dimefm_edge.students import STAGED_FAMILIES, StudentSpec
from dimefm_edge.students.heirs import layers_share
from dimefm_edge.targets import Target, load_target

logger = logging.getLogger(__name__)

_MAX_MEASURED = 10
_MAX_OVER, _OVER = 3, 1.15
"""How many are measured whose estimates are above the budget, and by how much at most."""
_MARGIN = 0.9
"""Of the budget, what a student should take when it is measured, or by its corrected estimate: the
same graph exported and timed once more took 0.87 to 1.11 of it (benchmarks/bench_fit.py)."""
_BYTES = {"fp32": 4, "fp16": 2, "bf16": 2}  # an element; all else 1

Measure = Callable[[StudentSpec, str], float]


@dataclass(frozen=True)
class FitCandidate:
    """One student, estimated."""

    spec: StudentSpec
    latency_ms: float
    low_ms: float
    high_ms: float
    gmacs: float
    params_m: float
    memory_mib: float
    """Weights and the largest operator's tensors in the precision; the runtime's own comes on
    top."""
    inherits: bool
    """Can start from the teacher's weights."""
    is_convolutional: bool
    """See `student_score.is_convolutional`."""
    fits: bool
    """Within the budget, the memory limit, and its share of the teacher's multiply-adds."""
    layers: float | None = None
    """Share of the teacher's layers that it inherits, of a ViT."""
    resolution: float = 1.0
    """Side of its images, as a share of those that the others take."""
    measured_ms: float | None = None
    """Median on this machine, where it was measured."""
    top1_pct: float | None = None
    """Zero-shot top-1 that it was measured to have: of students that are trained already."""

    @property
    def name(self) -> str:
        """The student's, and the size of its images where they are smaller than the others'."""
        return self.spec.name + (f" at {self.spec.image_size} px" if self.resolution < 1 else "")

    @property
    def score(self) -> float:
        """Top-1 where it is known; else what stands in for quality: see `student_score`."""
        if self.top1_pct is not None:
            return self.top1_pct
        return student_score(
            self.gmacs, inherits=self.inherits, is_convolutional=self.is_convolutional,
            learns_quickly=learns_quickly(self.spec), layers=self.layers,
            resolution=self.resolution,
        )  # fmt: skip


@dataclass(frozen=True)
class FitReport:
    """Every student that was looked at, and the one that was chosen."""

    target: str
    precision: str
    budget_ms: float
    max_gmacs: float | None
    """Limit by the teacher's own; None when the user gave a budget."""
    max_memory_mib: float | None
    chosen: StudentSpec
    candidates: tuple[FitCandidate, ...]
    """Fastest first."""
    pareto: tuple[FitCandidate, ...]
    """Those that no other beats in both latency and score, fastest first."""
    teacher_ms: float | None = None
    """The teacher's own estimate, where it is known."""

    @property
    def teacher_fits(self) -> bool:
        """Whether the teacher itself is estimated to be fast enough; False where memory counts."""
        is_known = self.teacher_ms is not None and self.max_memory_mib is None
        return is_known and (self.teacher_ms or 0.0) <= self.budget_ms

    @property
    def chosen_candidate(self) -> FitCandidate:
        """The chosen student with its estimate."""
        return next(c for c in self.candidates if c.spec == self.chosen)

    def teacher_note(self, teacher: str) -> str:
        """For people, where `teacher_fits`: the command that makes a bundle of it as it is."""
        return (
            f"the teacher itself is estimated at {self.teacher_ms:.3g} ms: without training, "
            f"dimefm-edge export --teacher {teacher} --target {self.target} "
            f"--precision {self.precision}"
        )

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON; each candidate says whether it is on the Pareto front."""
        front = {id(c) for c in self.pareto}
        values = asdict(self)
        values["candidates"] = [
            asdict(c) | {"name": c.name, "score": c.score, "pareto": id(c) in front}
            for c in self.candidates
        ]
        values["pareto"] = [c.name for c in self.pareto]
        return values

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> FitReport:
        """Rebuild from `to_dict`; keys of others are left out.

        Raises:
            ConfigError, KeyError, TypeError: If it is not one.
        """
        candidates, pareto = [], []
        for row in values["candidates"]:
            spec = StudentSpec.from_dict(row["spec"])
            figures = {"is_convolutional": spec.family in STAGED_FAMILIES} | {  # of older files
                k: v for k, v in row.items() if k not in ("spec", "name", "pareto", "score")
            }
            candidates.append(FitCandidate(spec, **figures))
            pareto += candidates[-1:] * row["pareto"]
        plain = ("target", "precision", "budget_ms", "max_gmacs", "max_memory_mib")
        return cls(
            **{name: values[name] for name in plain},
            chosen=StudentSpec.from_dict(values["chosen"]),
            candidates=tuple(candidates),
            pareto=tuple(pareto),
            teacher_ms=values.get("teacher_ms"),  # older files lack it
        )


def fit_student(
    target: Target | str,
    *,
    image_size: int,
    embed_dim: int,
    latency_ms: float | None = None,
    precision: str | None = None,
    families: Sequence[str] = FAMILIES,
    student: str = "auto",
    given: Sequence[tuple[StudentSpec, float | None]] = (),
    max_memory_mib: float | None = None,
    teacher_geometry: dict[str, Any] | None = None,
    teacher_ops: Sequence[Operator] | None = None,
    can_inherit: CanInherit | None = None,
    can_shrink: bool = False,
    measure: Measure | None = None,
) -> FitReport:
    """Choose the student of the best score that an estimate says is fast enough.

    Args:
        target: Where it will run.
        image_size: Side of the input, in pixels.
        embed_dim: Size of the teacher's embeddings.
        latency_ms: Budget for one image. Default: the target's own, or a share of the teacher's
            estimate where that is less; multiply-adds are limited alike (`TEACHER_SHARES`).
        precision: What it will run in; default: the target's.
        families: Keys of `GRIDS`, or `timm:NAME`.
        student: `auto`; a family, which is then the only one; or one student, by the name of its
            spec or another that `student_spec` takes, on images of `image_size`. One student is
            refused only for a limit that was given.
        given: Students to choose among instead, with their top-1 in percent, or None of all.
        max_memory_mib: Limit of weights and the largest operator's tensors together.
        teacher_geometry: From `vit_geometry`: adds students that can inherit.
        teacher_ops: From `trace_ops`, at batch 1: for the default budget, and to tell whether the
            teacher itself meets one.
        can_inherit: Whether a student can start from a teacher that is no ViT.
        can_shrink: Whether students that inherit from a ViT are looked at on smaller images, too.
        measure: (spec, precision) -> ms, on the target: the choice is then one that was measured
            and meets the budget.

    Raises:
        BudgetError: If none fits; the message names the fastest, the hint a budget that would do.
        UnknownNameError: If the target, a family or the precision is not known.
        ConfigError: If no student of the families takes images of that size.
    """
    target = load_target(target) if isinstance(target, str) else target
    precision = precision or target.precision
    place = place_on(target, precision)
    teacher_ms = None if teacher_ops is None else estimate_at(teacher_ops, place).latency_ms
    tried = limits_to_try(
        target, latency_ms=latency_ms, max_memory_mib=max_memory_mib, teacher_ms=teacher_ms,
        teacher_gmacs=None if teacher_ops is None else total_gmacs(teacher_ops),
    )  # fmt: skip
    sizes: dict[str, Any] = {"image_size": image_size, "embed_dim": embed_dim}
    knows: dict[str, Any] = {"teacher": teacher_geometry, "can_inherit": can_inherit}
    is_one = len(given) == 1 or (student != "auto" and student not in GRIDS)
    top1 = dict(given)
    if given:
        specs = [(spec, False) for spec in top1]
    elif is_one:
        specs = [find_student(student, **sizes, **knows)]
    else:
        families = (student,) if student in GRIDS else families
        specs = student_grid(families, **sizes, **knows, can_shrink=can_shrink)
    candidates = [
        replace(
            _candidate(spec, place, precision, inherits=inherits), top1_pct=top1.get(spec),
            layers=layers_share(spec.args, teacher_geometry) if inherits else None,
            resolution=spec.image_size / image_size,
        )
        for spec, inherits in specs
    ]  # fmt: skip
    if not candidates:
        raise ConfigError(
            f"no student of {', '.join(families)} takes images of {image_size} px",
            hint="--image-size with a multiple of 16",
        )
    is_free = is_one and latency_ms is None and max_memory_mib is None
    limits = first_met(tried, candidates)
    candidates = [replace(c, fits=limits.meets(c)) for c in candidates]
    candidates.sort(key=lambda c: (c.latency_ms, -c.score))
    fitting = [c for c in candidates if c.fits or is_free]
    if not fitting and (measure is None or is_free):
        raise budget_error(candidates, target, precision, limits)
    if measure is not None and not is_free:
        allowed = [c for c in candidates if limits.allow(c)]
        measured = _measure_best(allowed, lambda spec: measure(spec, precision), limits.budget_ms)
        candidates = [measured.get(c.spec, c) for c in candidates]
        fitting = [c for c in measured.values() if c.fits]
        safe = _MARGIN * limits.budget_ms
        fitting = [c for c in fitting if (c.measured_ms or 0.0) <= safe] or fitting
        if not fitting:
            raise budget_error(list(measured.values()) or candidates, target, precision, limits)
    chosen = max(fitting, key=lambda c: (c.score, -c.latency_ms))
    logger.info("fit: %s, %.3g of %.3g ms", chosen.name, chosen.latency_ms, limits.budget_ms)
    return FitReport(
        target=target.full_name,
        precision=precision,
        budget_ms=limits.budget_ms,
        max_gmacs=limits.max_gmacs,
        max_memory_mib=limits.max_memory_mib,
        chosen=chosen.spec,
        candidates=tuple(candidates),
        pareto=_pareto(candidates),
        teacher_ms=teacher_ms,
    )


def _measure_best(
    candidates: Sequence[FitCandidate], measure: Callable[[StudentSpec], float], budget_ms: float
) -> dict[StudentSpec, FitCandidate]:
    """Measure the best that should fit, and again, until the best was measured and fits.

    What measuring said corrects the estimates of the others: of the nearest in latency, of the
    same family where there is one.
    """
    measured: dict[StudentSpec, FitCandidate] = {}

    def correction(candidate: FitCandidate) -> float:
        def distance(other: FitCandidate) -> tuple[bool, float]:
            is_other = other.spec.family != candidate.spec.family
            return is_other, abs(math.log(other.latency_ms / candidate.latency_ms))

        if not measured:
            return 1.0
        nearest = min(measured.values(), key=distance)
        return (nearest.measured_ms or 0.0) / nearest.latency_ms

    def fits(candidate: FitCandidate) -> bool:
        if candidate.spec in measured:
            return (measured[candidate.spec].measured_ms or 0.0) <= _MARGIN * budget_ms
        return candidate.latency_ms * correction(candidate) <= _MARGIN * budget_ms

    def look_at(candidate: FitCandidate) -> None:
        name, estimate = candidate.name, candidate.latency_ms
        took = measure(candidate.spec)
        logger.info("fit: %s takes %.3g ms, estimated %.3g", name, took, estimate)
        measured[candidate.spec] = replace(candidate, measured_ms=took, fits=took <= budget_ms)

    for _ in range(_MAX_MEASURED if candidates else 0):
        able = [c for c in candidates if fits(c)] or [candidates[0]]
        best = max(able, key=lambda c: (c.score, -c.latency_ms))
        if best.spec in measured:
            break
        look_at(best)
    for _ in range(_MAX_OVER):  # the estimates of larger ones may be too high
        best_score = max((c.score for c in measured.values() if fits(c)), default=math.inf)
        larger = [
            c for c in candidates
            if c.spec not in measured and c.score > best_score
            and c.latency_ms * correction(c) <= _OVER * budget_ms
        ]  # fmt: skip
        if not larger:
            break
        look_at(min(larger, key=lambda c: c.latency_ms * correction(c)))
    return measured


def _candidate(spec: StudentSpec, place: Place, precision: str, *, inherits: bool) -> FitCandidate:
    from dimefm_edge.latency.student_counts import count_student

    counts = count_student(spec)
    latency, low, high = place.estimate(counts.costs)
    return FitCandidate(
        spec, latency, low, high, gmacs=counts.gmacs, params_m=counts.params_m,
        memory_mib=counts.memory_elements * _BYTES.get(precision, 1) / 2**20,
        inherits=inherits, is_convolutional=is_convolutional(counts.costs), fits=False,
    )  # fmt: skip


def _pareto(candidates: Sequence[FitCandidate]) -> tuple[FitCandidate, ...]:
    front: list[FitCandidate] = []
    for candidate in candidates:  # fastest first
        if not front or candidate.score > front[-1].score:
            front.append(candidate)
    return tuple(front)
