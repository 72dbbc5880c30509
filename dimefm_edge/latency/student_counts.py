"""What is counted of a student, without a trace of each: all blocks of a stage are alike.

`fit` looks at hundreds of students; a trace takes a quarter of a second.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass, replace

from dimefm_edge.latency.operators import (
    COST_NAMES,
    Operator,
    Vector,
    cost_vector,
    memory_elements,
    total_gmacs,
    total_params_m,
)
from dimefm_edge.latency.trace import trace_stages, trace_student
from dimefm_edge.students import STAGED_FAMILIES, StudentSpec


@dataclass(frozen=True)
class StudentCounts:
    """Of one image."""

    costs: Vector
    """(len(COSTS),): see operators.py."""
    gmacs: float
    params_m: float
    memory_elements: float
    """Weights, and the largest operator's tensors."""

    def plus(self, other: StudentCounts, times: int) -> StudentCounts:
        """With `times` more of another's counts."""
        mine, more = vars(self), vars(other)
        return StudentCounts(**{name: mine[name] + times * more[name] for name in mine})


def count_student(spec: StudentSpec) -> StudentCounts:
    """Count a student as it is deployed."""
    if spec.family == "vit" and spec.args["depth"] > 3:  # the last block is not like the others
        two, three = (_count(trace_student(_of_depth(spec, depth))) for depth in (2, 3))
        return three.plus(three.plus(two, -1), spec.args["depth"] - 3)
    if spec.family in STAGED_FAMILIES:
        counts, blocks = _two_blocks_each(_of_depth(spec, [2, 2, 2, 2]))
        for depth, block in zip(spec.args["depth"], blocks, strict=True):
            counts = counts.plus(block, depth - 2)
        return counts
    return _count(trace_student(spec))


def _of_depth(spec: StudentSpec, depth: int | list[int]) -> StudentSpec:
    """One name for all depths, since traces are kept by spec."""
    return replace(spec, name=spec.family, args=spec.args | {"depth": depth})


def _count(ops: Sequence[Operator]) -> StudentCounts:
    return StudentCounts(
        cost_vector(ops), total_gmacs(ops), total_params_m(ops), memory_elements(ops)
    )  # fmt: skip


@functools.lru_cache(maxsize=1024)
def _two_blocks_each(spec: StudentSpec) -> tuple[StudentCounts, tuple[StudentCounts, ...]]:
    ops, seconds = trace_stages(spec)
    return _count(ops), tuple(map(_count_block, seconds))


def _count_block(ops: tuple[Operator, ...]) -> StudentCounts:
    """Of a part: no call of its own, and no tensor larger than the whole's."""
    counts = _count(ops)
    counts.costs[COST_NAMES.index("calls")] = 0.0
    return replace(counts, memory_elements=1e6 * counts.params_m)
