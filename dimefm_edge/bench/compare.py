"""Did it become slower? Two benches of the same models, old and new."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from dimefm_edge.bench.results import BenchResult, SubjectResult
from dimefm_edge.bench.statistics import Ratio, unpaired_ratio
from dimefm_edge.errors import InputError

_MACHINE = ("cpu", "cores_available", "memory_mib")
_SAME = ("batch_size", "threads", "runtime")


@dataclass(frozen=True)
class Comparison:
    """One model, new over old."""

    label: str
    old_ms: float
    new_ms: float
    """Medians of the calls."""
    raw: Ratio
    """As measured."""
    ratio: Ratio
    """With each round divided by the machine's own speed in it, told by the yardstick."""
    is_slower: bool
    """Past the threshold, and its interval leaves out 1."""

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class LeftOut:
    """A model that is not compared."""

    label: str
    reason: str


def compare(old: BenchResult, new: BenchResult, *, threshold_pct: float = 5.0) -> list[Comparison]:
    """Compare the models that both benches measured.

    Args:
        old: The one to hold against.
        new: The one to judge.
        threshold_pct: How much slower counts.

    Returns:
        One per model that both have, in the new one's order.

    Raises:
        InputError: If they have no model in common, or were run on different machines or in
            different ways.
    """
    if threshold_pct < 0:
        raise InputError(f"--threshold-pct must not be negative, got {threshold_pct:g}")
    for key in _MACHINE:
        if old.machine.get(key) != new.machine.get(key):
            raise InputError(
                f"the benches are of different machines: {key} is {old.machine.get(key)} and "
                f"{new.machine.get(key)}",
                hint="run both on the same machine: times of two machines tell no regression",
            )
    known = {s.label: s for s in old.subjects if s.rounds_ms}
    pairs = [(known[s.label], s) for s in new.subjects if s.rounds_ms and s.label in known]
    if not pairs:
        names = ", ".join(known) or "none"
        raise InputError(
            f"the benches have no model in common; the old one measured: {names}",
            hint="name the models as the old bench did",
        )
    return [_compare(a, b, old=old, new=new, threshold=1 + threshold_pct / 100) for a, b in pairs]


def left_out(old: BenchResult, new: BenchResult) -> list[LeftOut]:
    """Models that `compare` cannot judge, as only one of the benches measured them."""
    missing = []
    for which, bench, other in (("old", old, new), ("new", new, old)):
        named = {s.label for s in bench.subjects}
        measured = {s.label for s in bench.subjects if s.rounds_ms}
        for s in other.subjects:
            if s.rounds_ms and s.label not in measured:
                why = "did not measure it" if s.label in named else "has it not"
                missing.append(LeftOut(s.label, f"the {which} bench {why}"))
    return missing


def _compare(
    a: SubjectResult, b: SubjectResult, *, old: BenchResult, new: BenchResult, threshold: float
) -> Comparison:
    for key in _SAME:
        if getattr(a, key) != getattr(b, key):
            raise InputError(
                f"{a.label} was measured with {key} {getattr(a, key)} and {getattr(b, key)}",
                hint="run it again with the same flags",
            )
    raw = unpaired_ratio(b.rounds_ms, a.rounds_ms, starts=new.starts, base_starts=old.starts)
    ratio = unpaired_ratio(
        _steadied(b, new), _steadied(a, old), starts=new.starts, base_starts=old.starts
    )
    is_slower = ratio.value > threshold and ratio.low > 1
    assert a.p50_ms is not None
    assert b.p50_ms is not None
    return Comparison(b.label, a.p50_ms, b.p50_ms, raw, ratio, is_slower)


def _steadied(subject: SubjectResult, result: BenchResult) -> list[float]:
    """(R,) times in units of the yardstick's in the same round."""
    rounds = min(len(subject.rounds_ms), len(result.yardstick_ms))
    if not rounds:
        return subject.rounds_ms
    pairs = zip(subject.rounds_ms[:rounds], result.yardstick_ms[:rounds], strict=True)
    return [ms / yard for ms, yard in pairs]
