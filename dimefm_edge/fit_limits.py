"""What a student may take, as given or by its teacher's own, and the error where none does."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from dimefm_edge.errors import BudgetError, ConfigError
from dimefm_edge.targets import Target

if TYPE_CHECKING:
    from dimefm_edge.fit import FitCandidate

logger = logging.getLogger(__name__)

TEACHER_SHARES = (0.5, 0.4), (1.0, 1.0)
"""Of the teacher's estimated latency and of its multiply-adds, what a student may take by default;
and where no student takes so little, as on small images, whose time is that of starting kernels."""


@dataclass(frozen=True)
class Limits:
    """What a student may take."""

    budget_ms: float
    max_gmacs: float | None = None
    max_memory_mib: float | None = None
    shares: tuple[float | None, float | None] = None, None
    """Of the teacher's latency and multiply-adds that the first two are, where they are."""

    def allow(self, candidate: FitCandidate) -> bool:
        """Whether all but the latency is within."""
        return (self.max_gmacs is None or candidate.gmacs <= self.max_gmacs) and (
            self.max_memory_mib is None or candidate.memory_mib <= self.max_memory_mib
        )

    def meets(self, candidate: FitCandidate) -> bool:
        """Whether its estimate is within, too."""
        return candidate.latency_ms <= self.budget_ms and self.allow(candidate)

    def __str__(self) -> str:
        ms, gmacs = ("" if s is None else f" ({s:g} of the teacher's)" for s in self.shares)
        text = f"{self.budget_ms:.3g} ms{ms}"
        if self.max_gmacs is not None:
            text += f" and {self.max_gmacs:.3g} GMACs{gmacs}"
        if self.max_memory_mib is not None:
            text += f" and {self.max_memory_mib:.3g} MiB"
        return text


def limits_to_try(
    target: Target,
    *,
    latency_ms: float | None,
    max_memory_mib: float | None,
    teacher_ms: float | None,
    teacher_gmacs: float | None,
) -> list[Limits]:
    """The limits that were given; without a budget the target's own, or the teacher's shares of it
    where these are less: each where no student meets those before.

    Raises:
        ConfigError: If a limit is not positive.
    """
    for name, value in (("latency_ms", latency_ms), ("max_memory_mib", max_memory_mib)):
        if value is not None and not value > 0:
            raise ConfigError(f"{name} must be positive, got {value}")
    if latency_ms is not None:
        return [Limits(latency_ms, None, max_memory_mib)]
    if teacher_gmacs is None or teacher_ms is None:
        return [Limits(target.latency_ms, None, max_memory_mib)]
    return [
        Limits(
            min(target.latency_ms, ms_share * teacher_ms), gmacs_share * teacher_gmacs,
            max_memory_mib,
            (ms_share if ms_share * teacher_ms < target.latency_ms else None, gmacs_share),
        )
        for ms_share, gmacs_share in TEACHER_SHARES
    ]  # fmt: skip


def first_met(limits: Sequence[Limits], candidates: Sequence[FitCandidate]) -> Limits:
    """The first that a student's estimate meets; of none, the last."""
    for place, one in enumerate(limits):
        if any(map(one.meets, candidates)):
            if place:
                logger.warning("fit: no student meets %s; the budget is %s", limits[0], one)
            return one
    return limits[-1]


def budget_error(
    candidates: Sequence[FitCandidate], target: Target, precision: str, limits: Limits
) -> BudgetError:
    """What the nearest would need: the fastest, or the smallest where all are too large."""
    asked = f"no student meets {limits} on {target.full_name} ({precision})"
    if not any(limits.allow(c) for c in candidates) and limits.max_memory_mib is not None:
        smallest = min(candidates, key=lambda c: c.memory_mib)
        return BudgetError(
            f"{asked}; the smallest, {smallest.name}, needs {smallest.memory_mib:.3g} MiB",
            hint=f"--max-memory-mib {math.ceil(smallest.memory_mib * 100) / 100:g}",
        )
    fastest = min(candidates, key=lambda c: c.measured_ms or c.latency_ms)
    took = fastest.measured_ms or fastest.latency_ms
    how = "measured" if fastest.measured_ms else "estimated"
    return BudgetError(
        f"{asked}; the fastest, {fastest.name}, is {how} at {took:.3g} ms and "
        f"{fastest.gmacs:.3g} GMACs",
        hint=f"--latency-ms {math.ceil(took * 1000) / 1000:g}",
    )
