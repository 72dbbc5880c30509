"""Which student: estimate a grid of them on the target, keep the largest that fits.

On this machine, the choice is measured before it is made, and what measuring says of the
estimates corrects the others.

Quality is not known before training; it is stood in for by multiply-adds, doubled for students
that can inherit the teacher's layers. A crude rule, stated so that you can overrule it: every
candidate is in the report.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from dimefm_edge.errors import BudgetError, ConfigError, lookup
from dimefm_edge.latency.estimate import Place, estimate_at, place_on
from dimefm_edge.latency.operators import Operator, total_gmacs
from dimefm_edge.students import (
    NAMED_STUDENTS,
    StudentSpec,
    hybrid_spec,
    patch_for,
    student_spec,
    vit_spec,
)
from dimefm_edge.targets import Target, load_target

logger = logging.getLogger(__name__)

TEACHER_LATENCY_SHARE = 0.5
"""Of the teacher's estimated latency, what a student may take by default."""
TEACHER_GMACS_SHARE = 0.4
"""Of the teacher's multiply-adds, likewise."""
INHERITANCE_BONUS = 2.0
"""A student that starts from the teacher's weights counts as one of twice the arithmetic."""

_VIT_WIDTHS = (64, 96, 128, 160, 192, 224, 256, 320, 384, 448, 512, 576, 640, 704, 768, 1024)
_VIT_DEPTHS = tuple(range(2, 13))
_MAX_WIDTH_PER_LAYER = 96
"""Wide and shallow ViTs fill a budget with arithmetic that they cannot use; ViT-B has 64."""
_MIN_DEPTH = 2
_MAX_MEASURED = 10
_MARGIN = 0.97
"""Of the budget, what a student that was not measured may take by its corrected estimate."""
_HYBRID_WIDTHS = (16, 24, 32, 40, 48, 56, 64, 80, 96)
_HYBRID_DEPTHS = ((1, 1, 1, 1), (1, 1, 2, 1), (2, 2, 4, 2), (2, 2, 6, 2), (3, 3, 9, 3))

Measure = Callable[[StudentSpec, str], float]
Grid = Callable[[int, int, "dict[str, Any] | None"], Iterator[tuple[StudentSpec, bool]]]


@dataclass(frozen=True)
class FitCandidate:
    """One student, estimated."""

    spec: StudentSpec
    latency_ms: float
    low_ms: float
    high_ms: float
    gmacs: float
    params_m: float
    inherits: bool
    """Can start from the teacher's weights."""
    fits: bool
    """Within the budget, and within its share of the teacher's multiply-adds."""
    measured_ms: float | None = None
    """Median on this machine, where it was measured."""

    @property
    def score(self) -> float:
        """Stand-in for quality: GMACs, with the bonus for inheritance."""
        return self.gmacs * (INHERITANCE_BONUS if self.inherits else 1.0)


@dataclass(frozen=True)
class FitReport:
    """Every student that was looked at, and the one that was chosen."""

    target: str
    precision: str
    budget_ms: float
    max_gmacs: float | None
    """Limit by the teacher's own; None when the user gave a budget."""
    chosen: StudentSpec
    candidates: tuple[FitCandidate, ...]
    """Fastest first."""
    pareto: tuple[FitCandidate, ...]
    """Those that no other beats in both latency and score, fastest first."""

    @property
    def chosen_candidate(self) -> FitCandidate:
        """The chosen student with its estimate."""
        return next(c for c in self.candidates if c.spec == self.chosen)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON; each candidate says whether it is on the Pareto front."""
        front = {id(c) for c in self.pareto}
        values = asdict(self)
        values["candidates"] = [asdict(c) | {"pareto": id(c) in front} for c in self.candidates]
        values["pareto"] = [c.spec.name for c in self.pareto]
        return values


def fit_student(
    target: Target | str,
    *,
    image_size: int,
    embed_dim: int,
    latency_ms: float | None = None,
    precision: str | None = None,
    families: Sequence[str] = ("vit", "hybrid"),
    student: str = "auto",
    teacher_geometry: dict[str, Any] | None = None,
    teacher_ops: Sequence[Operator] | None = None,
    measure: Measure | None = None,
) -> FitReport:
    """Choose the largest student that an estimate says is fast enough.

    Args:
        target: Where it will run.
        image_size: Side of the input, in pixels.
        embed_dim: Size of the teacher's embeddings.
        latency_ms: Budget for one image. Default: the target's own, or TEACHER_LATENCY_SHARE
            of the teacher's estimate where that is less; multiply-adds are limited alike then.
        precision: What it will run in; default: the target's.
        families: Keys of `GRIDS`.
        student: `auto`; a family, which is then the only one; or one student: a candidate's
            name, a key of `NAMED_STUDENTS` or `timm:NAME`. One student is refused only for a
            budget that was given.
        teacher_geometry: From `vit_geometry`: adds students that can inherit.
        teacher_ops: From `trace_ops`, at batch 1, for the default budget.
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
    budget_ms, max_gmacs = _limits(target, latency_ms, place, teacher_ops)
    candidates = []
    families = (student,) if student in GRIDS else families
    specs = _unique_specs(families, image_size, embed_dim, teacher_geometry)
    is_one = student != "auto" and student not in GRIDS
    if is_one:
        specs = [_one_student(student, specs, image_size, embed_dim)]
    for spec, inherits in specs:
        estimate = _estimate(spec, place)
        within = max_gmacs is None or estimate["gmacs"] <= max_gmacs
        fits = within and estimate["latency_ms"] <= budget_ms
        candidates.append(FitCandidate(spec, **estimate, inherits=inherits, fits=fits))
    if not candidates:
        raise ConfigError(
            f"no student of {', '.join(families)} takes images of {image_size} px",
            hint="--image-size with a multiple of 16",
        )
    candidates.sort(key=lambda c: (c.latency_ms, -c.score))
    is_free = is_one and latency_ms is None
    fitting = [c for c in candidates if c.fits or is_free]
    if not fitting:
        raise _budget_error(candidates[0], target, precision, budget_ms, max_gmacs)
    chosen = max(fitting, key=lambda c: (c.score, -c.latency_ms))
    if measure is not None and not is_free:
        allowed = [c for c in candidates if max_gmacs is None or c.gmacs <= max_gmacs]
        measured = _measure_best(allowed, lambda spec: measure(spec, precision), budget_ms)
        candidates = [measured.get(c.spec, c) for c in candidates]
        able = [c for c in measured.values() if c.fits]
        if not able:
            fastest = min(measured.values(), key=lambda c: c.measured_ms or math.inf)
            raise _budget_error(fastest, target, precision, budget_ms, max_gmacs)
        chosen = max(able, key=lambda c: (c.score, -c.latency_ms))
    logger.info("fit: %s, %.3g of %.3g ms", chosen.spec.name, chosen.latency_ms, budget_ms)
    return FitReport(
        target=target.full_name,
        precision=precision,
        budget_ms=budget_ms,
        max_gmacs=max_gmacs,
        chosen=chosen.spec,
        candidates=tuple(candidates),
        pareto=_pareto(candidates),
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
            return measured[candidate.spec].fits
        return candidate.latency_ms * correction(candidate) <= _MARGIN * budget_ms

    for _ in range(_MAX_MEASURED):
        able = [c for c in candidates if fits(c)] or [candidates[0]]
        best = max(able, key=lambda c: (c.score, -c.latency_ms))
        if best.spec in measured:
            break
        took = measure(best.spec)
        logger.info("fit: %s takes %.3g ms, estimated %.3g", best.spec.name, took, best.latency_ms)
        measured[best.spec] = replace(best, measured_ms=took, fits=took <= budget_ms)
    return measured


def plot_fit(report: FitReport, path: Path) -> None:
    """Draw candidates, Pareto front, budget and choice: latency against GMACs, as a PNG."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for family in sorted({c.spec.family for c in report.candidates}):
        for inherits, marker in ((False, "o"), (True, "s")):
            group = [
                c for c in report.candidates if (c.spec.family, c.inherits) == (family, inherits)
            ]
            if group:
                label = f"{family}, inherits" if inherits else family
                x, y = [c.latency_ms for c in group], [c.gmacs for c in group]
                axes.scatter(x, y, s=16, alpha=0.6, marker=marker, label=label)
    front = report.pareto
    axes.plot([c.latency_ms for c in front], [c.gmacs for c in front], "k:", lw=1, label="front")
    axes.axvline(report.budget_ms, color="tab:red", lw=1, label=f"budget {report.budget_ms:.3g} ms")
    best = report.chosen_candidate
    axes.scatter(best.latency_ms, best.gmacs, s=160, marker="*", color="tab:red", zorder=3)
    axes.annotate(best.spec.name, (best.latency_ms, best.gmacs), xytext=(8, -12),
                  textcoords="offset points")  # fmt: skip
    axes.set(xscale="log", yscale="log", ylabel="GMACs per image")
    axes.set_xlabel(f"estimated latency on {report.target}, {report.precision} (ms)")
    axes.legend(fontsize=8)
    figure.savefig(path, dpi=120, format="png")


def _limits(
    target: Target,
    latency_ms: float | None,
    place: Place,
    teacher_ops: Sequence[Operator] | None,
) -> tuple[float, float | None]:
    if latency_ms is not None:
        if not latency_ms > 0:
            raise ConfigError(f"latency_ms must be positive, got {latency_ms}")
        return latency_ms, None
    if teacher_ops is None:
        return target.latency_ms, None
    teacher_ms = estimate_at(teacher_ops, place).latency_ms
    budget_ms = min(target.latency_ms, TEACHER_LATENCY_SHARE * teacher_ms)
    return budget_ms, TEACHER_GMACS_SHARE * total_gmacs(teacher_ops)


def _vit_grid(
    image_size: int, embed_dim: int, teacher: dict[str, Any] | None
) -> Iterator[tuple[StudentSpec, bool]]:
    """The teacher's own geometry with fewer layers first, then everything else."""
    sizes: dict[str, Any] = {"image_size": image_size, "embed_dim": embed_dim}
    if teacher is not None and image_size % teacher["patch_size"] == 0:
        keys = ("patch_size", "width", "num_heads", "mlp_ratio", "act")
        shared = {key: teacher[key] for key in keys}
        for depth in range(_MIN_DEPTH, teacher["depth"] + 1):
            yield vit_spec(**sizes, **shared, depth=depth), True
    patch = patch_for(image_size)
    for patch_size in (p for p in (patch, 2 * patch) if image_size % p == 0):
        for width in _VIT_WIDTHS:
            heads = width // (32 if width < 256 else 64)
            for depth in (d for d in _VIT_DEPTHS if width <= _MAX_WIDTH_PER_LAYER * d):
                shape: dict[str, Any] = {
                    "patch_size": patch_size,
                    "width": width,
                    "num_heads": heads,
                }
                yield vit_spec(**sizes, **shape, depth=depth), False


def _hybrid_grid(
    image_size: int, embed_dim: int, teacher: dict[str, Any] | None
) -> Iterator[tuple[StudentSpec, bool]]:
    from dimefm_edge.students.hybrid import MIN_IMAGE_SIZE

    if image_size < MIN_IMAGE_SIZE:
        return
    for width in _HYBRID_WIDTHS:
        for depth in _HYBRID_DEPTHS:
            sizes = {"image_size": image_size, "embed_dim": embed_dim}
            yield hybrid_spec(**sizes, width=width, depth=depth), False


GRIDS: dict[str, Grid] = {"vit": _vit_grid, "hybrid": _hybrid_grid}
"""What is tried of each family: (image_size, embed_dim, teacher_geometry) -> spec, inherits."""


def _unique_specs(
    families: Sequence[str], image_size: int, embed_dim: int, teacher: dict[str, Any] | None
) -> list[tuple[StudentSpec, bool]]:
    """Every family's grid; of two students with one name, the one that inherits."""
    specs: dict[str, tuple[StudentSpec, bool]] = {}
    for family in families:
        for spec, inherits in lookup(GRIDS, family, kind="student family to fit")(
            image_size, embed_dim, teacher
        ):
            specs.setdefault(spec.name, (spec, inherits))
    return list(specs.values())


def _one_student(
    name: str, grid: Sequence[tuple[StudentSpec, bool]], image_size: int, embed_dim: int
) -> tuple[StudentSpec, bool]:
    for spec, inherits in grid:
        if spec.name == name:
            return spec, inherits
    if not name.startswith("timm:"):
        lookup(dict.fromkeys(("auto", *GRIDS, *NAMED_STUDENTS)), name, kind="student")
    return student_spec(name, image_size=image_size, embed_dim=embed_dim), False


def _estimate(spec: StudentSpec, place: Place) -> dict[str, float]:
    """Estimate a student; a ViT from two shallow ones, since every block costs the same."""
    from dimefm_edge.latency.trace import trace_student

    depth = spec.args["depth"] if spec.family == "vit" else 0
    if depth <= 2:
        return _figures(trace_student(spec), place)
    sizes: dict[str, Any] = {"image_size": spec.image_size, "embed_dim": spec.embed_dim}
    one, two = (
        _figures(trace_student(vit_spec(**sizes, **spec.args | {"depth": d})), place)
        for d in (1, 2)
    )
    return {key: one[key] + (depth - 1) * (two[key] - one[key]) for key in one}


def _figures(ops: Sequence[Operator], place: Place) -> dict[str, float]:
    estimate = asdict(estimate_at(ops, place))
    return {key: estimate[key] for key in ("latency_ms", "low_ms", "high_ms", "gmacs", "params_m")}


def _pareto(candidates: Sequence[FitCandidate]) -> tuple[FitCandidate, ...]:
    front: list[FitCandidate] = []
    for candidate in candidates:  # fastest first
        if not front or candidate.score > front[-1].score:
            front.append(candidate)
    return tuple(front)


def _budget_error(
    fastest: FitCandidate,
    target: Target,
    precision: str,
    budget_ms: float,
    max_gmacs: float | None,
) -> BudgetError:
    limits = f"{budget_ms:.3g} ms"
    if max_gmacs is not None:
        limits += f" and {max_gmacs:.3g} GMACs ({TEACHER_GMACS_SHARE} of the teacher's)"
    took = fastest.measured_ms or fastest.latency_ms
    enough = math.ceil(took * 1000) / 1000
    how = "measured" if fastest.measured_ms else "estimated"
    return BudgetError(
        f"no student meets {limits} on {target.full_name} ({precision}); the fastest, "
        f"{fastest.spec.name}, is {how} at {took:.3g} ms and "
        f"{fastest.gmacs:.3g} GMACs",
        hint=f"dimefm-edge fit --target {target.full_name} --latency-ms {enough:g}",
    )
