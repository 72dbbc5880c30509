"""What many noisy times say: percentiles, and how sure a ratio is."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]

PERCENTILES = (50.0, 90.0, 95.0, 99.0, 99.9)
_RESAMPLES = 4000


@dataclass(frozen=True)
class Ratio:
    """How many times as long as another, with its 95% interval."""

    value: float
    low: float
    high: float

    @property
    def is_different(self) -> bool:
        """Whether the interval leaves out 1."""
        return self.low > 1 or self.high < 1


def percentiles(times: Sequence[float] | Floats) -> dict[str, float]:
    """p50, p90, p95, p99 and p99.9 of times, by name: `p50_ms` and so on."""
    values = np.percentile(np.asarray(times, float), PERCENTILES)
    return {
        f"p{f'{p:g}'.replace('.', '')}_ms": float(v)
        for p, v in zip(PERCENTILES, values, strict=True)
    }


def paired_ratio(
    times: Sequence[float], base: Sequence[float], *, starts: Sequence[int] = (), seed: int = 0
) -> Ratio:
    """The median over rounds of one subject's time over another's in the same round.

    The interval is a two-level bootstrap's (percentile method). A process keeps its luck with
    memory for as long as it lives, so generations of processes are drawn first (Kalibera and
    Jones, "Rigorous benchmarking in reasonable time", ISMM 2013); then, of each, blocks of about
    n^(1/3) neighbouring rounds, which share the machine's state (Kunsch 1989).

    Args:
        times: (R,) one time a round.
        base: (R,) the other's, of the same rounds.
        starts: The rounds at which new processes began, besides the first.
        seed: Of the resampling.

    Raises:
        ValueError: If there is no round, or their numbers differ.
    """
    ratios = np.asarray(times, float) / np.asarray(base, float)
    if ratios.ndim != 1 or not len(ratios):
        raise ValueError("a ratio needs the same rounds of both, one at least")
    low, high = np.percentile(_medians(ratios, starts, seed), [2.5, 97.5])
    return Ratio(float(np.median(ratios)), float(low), float(high))


def unpaired_ratio(
    times: Sequence[float],
    base: Sequence[float],
    *,
    starts: Sequence[int] = (),
    base_starts: Sequence[int] = (),
    seed: int = 0,
) -> Ratio:
    """The ratio of two medians whose rounds have nothing to do with each other: of two runs."""
    new, old = np.asarray(times, float), np.asarray(base, float)
    if not len(new) or not len(old):
        raise ValueError("a ratio needs a round of both")
    drawn = _medians(new, starts, seed) / _medians(old, base_starts, seed + 1)
    low, high = np.percentile(drawn, [2.5, 97.5])
    return Ratio(float(np.median(new) / np.median(old)), float(low), float(high))


def _medians(values: Floats, starts: Sequence[int], seed: int) -> Floats:
    """(resamples,) medians of rounds drawn anew: generations, then circular blocks of each."""
    edges = np.asarray([0, *[s for s in starts if 0 < s < len(values)], len(values)])
    first, size = edges[:-1], np.diff(edges)
    most = int(size.max())
    block = max(1, round(most ** (1 / 3)))
    rng = np.random.default_rng(seed)
    chosen = rng.integers(0, len(size), size=(_RESAMPLES, len(size)))
    begun = rng.integers(0, 2**31, size=(_RESAMPLES, len(size), -(-most // block)))
    places = (begun[..., None] + np.arange(block)).reshape(_RESAMPLES, len(size), -1)[..., :most]
    places = first[chosen][..., None] + places % size[chosen][..., None]
    return np.asarray(np.median(values[places].reshape(_RESAMPLES, -1), axis=1))
