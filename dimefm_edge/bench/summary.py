"""Times to figures: percentiles, quantiles and ratios, into a model's result."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from dimefm_edge.bench.results import SubjectResult
from dimefm_edge.bench.stages import STAGES
from dimefm_edge.bench.statistics import paired_ratio, percentiles


def summarise_calls(
    result: SubjectResult, times: Sequence[float], first: SubjectResult, starts: Sequence[int]
) -> None:
    """Percentiles of all calls, and the ratio to the first model's, into its result."""
    if not times:
        return
    result.runs = len(times)
    for name, value in percentiles(times).items():
        setattr(result, name, value)
    result.quantiles_ms = [float(q) for q in np.percentile(times, np.linspace(0, 100, 201))]
    result.mean_ms = float(np.mean(times))
    result.images_per_s = 1e3 * result.batch_size / result.mean_ms if result.mean_ms else None
    rounds = min(len(result.rounds_ms), len(first.rounds_ms))
    if rounds:
        ratio = paired_ratio(result.rounds_ms[:rounds], first.rounds_ms[:rounds], starts=starts)
        result.ratio, result.ratio_low, result.ratio_high = ratio.value, ratio.low, ratio.high


def summarise_stages(
    result: SubjectResult, rounds: Sequence[list[list[float]]], base: Sequence[list[list[float]]]
) -> None:
    """Medians by stage and figures of the whole, round by round beside the first model's."""
    if not rounds:
        return
    rows = np.asarray([row for turn in rounds for row in turn])
    totals = rows.sum(axis=1)
    result.stages_ms = dict(zip(STAGES, map(float, np.median(rows, axis=0)), strict=True))
    result.end_to_end = percentiles(totals) | {"images_per_s": 1e3 / float(totals.mean())}
    both = min(len(rounds), len(base))
    if not both:
        return
    ratio = paired_ratio(
        [float(np.median(np.sum(turn, axis=1))) for turn in rounds[:both]],
        [float(np.median(np.sum(turn, axis=1))) for turn in base[:both]],
    )
    result.end_to_end |= {
        "ratio": ratio.value, "ratio_low": ratio.low, "ratio_high": ratio.high
    }  # fmt: skip
