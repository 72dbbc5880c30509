"""The report's plots, as SVG text: matplotlib, no display, nothing fetched."""

from __future__ import annotations

import contextlib
import io
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from dimefm_edge.bench.results import BenchResult, SubjectResult
from dimefm_edge.bench.stages import STAGES
from dimefm_edge.errors import MissingExtraError

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_WIDTH, _HEIGHT = 8.0, 3.6
_COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#444444", "#b39b00")
"""Okabe and Ito's, which colour-blind readers tell apart."""


def draw_all(result: BenchResult) -> list[tuple[str, str, str]]:
    """Title, SVG and what it shows, of every plot that there are figures for.

    Raises:
        MissingExtraError: If matplotlib is not installed.
    """
    shown = [s for s in result.subjects if s.quantiles_ms]
    if not shown:
        return []
    return [
        (title, svg, text)
        for title, text, draw, is_there in _PLOTS
        if is_there(result, shown)
        for svg in [_svg(draw, result, shown, title)]
    ]


def _svg(
    draw: Callable[[Axes, BenchResult, list[SubjectResult]], None],
    result: BenchResult,
    shown: list[SubjectResult],
    title: str,
) -> str:
    with _figure(len(shown)) as (figure, axes):
        draw(axes, result, shown)
        axes.set_title(title, loc="left", fontsize=10)
        figure.tight_layout()
        text = io.StringIO()
        figure.savefig(text, format="svg", metadata={"Date": None})
    svg = text.getvalue()
    return svg[svg.index("<svg") :]


@contextlib.contextmanager
def _figure(rows: int) -> Iterator[tuple[Any, Any]]:
    try:
        import matplotlib
        from matplotlib.figure import Figure
    except ImportError as error:
        raise MissingExtraError(
            "the report's plots need matplotlib", hint="pip install 'dimefm_edge[bench]'"
        ) from error
    # Text stays text: it can be searched, and the file is small. Ids are the same each time.
    style: dict[Any, Any] = {"svg.fonttype": "none", "svg.hashsalt": "dimefm_edge", "font.size": 9}
    with matplotlib.rc_context(style), warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        figure = Figure(figsize=(_WIDTH, max(_HEIGHT, 1.2 + 0.42 * rows)))
        axes = figure.add_subplot()
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="both", alpha=0.25)
        axes.set_axisbelow(True)
        yield figure, axes


def _colour(place: int) -> str:
    return _COLOURS[place % len(_COLOURS)]


# ------------------------------------------------------------------------------- plots


def _ratios(axes: Axes, result: BenchResult, shown: list[SubjectResult]) -> None:
    for place, s in enumerate(shown):
        assert s.ratio is not None
        assert s.ratio_low is not None
        assert s.ratio_high is not None
        axes.errorbar(
            s.ratio, place, fmt="o", color=_colour(place), capsize=4,
            xerr=[[max(0.0, s.ratio - s.ratio_low)], [max(0.0, s.ratio_high - s.ratio)]],
        )  # fmt: skip
        axes.annotate(
            f"{s.ratio:.3f}", (s.ratio, place), xytext=(0, 7), textcoords="offset points",
            ha="center", fontsize=8,
        )  # fmt: skip
    axes.axvline(1, color="#444444", linewidth=0.8)
    axes.set_ylim(len(shown) - 0.4, -0.6)
    axes.set_yticks(range(len(shown)), [s.label for s in shown])
    axes.set_xlabel(f"time over {result.subjects[0].label}'s")


def _distributions(axes: Axes, result: BenchResult, shown: list[SubjectResult]) -> None:
    shares = np.linspace(0, 100, len(shown[0].quantiles_ms))
    for place, s in enumerate(shown):
        axes.plot(s.quantiles_ms, shares, color=_colour(place), label=s.label, linewidth=1.4)
    axes.set_xscale("log")
    axes.set_xlabel("ms a call")
    axes.set_ylabel("% of calls within")
    axes.legend(fontsize=8)


def _rounds(axes: Axes, result: BenchResult, shown: list[SubjectResult]) -> None:
    for place, s in enumerate(shown):
        times = np.asarray(s.rounds_ms)
        axes.plot(times / np.median(times), color=_colour(place), label=s.label, linewidth=0.9)
    yard = np.asarray(result.yardstick_ms)
    if len(yard):
        axes.plot(
            yard / np.median(yard), "--", color="#888888", label="the machine itself", linewidth=0.9
        )
    axes.set_xlabel("round")
    axes.set_ylabel("time over its median")
    axes.legend(fontsize=8)


def _accuracy(axes: Axes, result: BenchResult, shown: list[SubjectResult]) -> None:
    marks = "osD^v<>P"
    for row, name in enumerate(dict.fromkeys(n for s in shown for n in s.top1_pct)):
        for place, s in enumerate(shown):
            if name in s.top1_pct and s.p50_ms:
                axes.plot(
                    s.p50_ms, s.top1_pct[name], marks[row % len(marks)], color=_colour(place),
                    label=f"{s.label}, {name}",
                )  # fmt: skip
    axes.set_xlabel("p50 ms a call")
    axes.set_ylabel("zero-shot top-1 %")
    axes.legend(fontsize=8)


def _stages(axes: Axes, result: BenchResult, shown: list[SubjectResult]) -> None:
    parts = {s.label: s.stages_ms for s in shown if s.stages_ms}
    _stack(axes, parts, STAGES)
    axes.set_xlabel("ms from an image file to labels, medians")


def _kinds(axes: Axes, result: BenchResult, shown: list[SubjectResult]) -> None:
    parts = {
        s.label: {kind: 100 * share for kind, share in s.operators["kinds"].items()}
        for s in shown
        if s.operators
    }
    _stack(axes, parts, list(dict.fromkeys(kind for part in parts.values() for kind in part)))
    axes.set_xlabel("% of the operators' time")


def _stack(axes: Axes, parts: Mapping[str, Mapping[str, float]], names: Sequence[str]) -> None:
    """A bar for each model, made of its parts, one after the other."""
    left = np.zeros(len(parts))
    for place, name in enumerate(names):
        widths = np.asarray([part.get(name, 0.0) for part in parts.values()])
        axes.barh(range(len(parts)), widths, left=left, color=_colour(place), label=name)
        left += widths
    axes.set_yticks(range(len(parts)), list(parts))
    axes.invert_yaxis()
    axes.legend(fontsize=8, ncols=4)


def _roofline(axes: Axes, result: BenchResult, shown: list[SubjectResult]) -> None:
    assert result.peak_gflop_per_s is not None
    assert result.copy_gb_per_s is not None
    peak, copy = result.peak_gflop_per_s, result.copy_gb_per_s
    rows = [s for s in shown if s.gmacs and s.moved_mib and s.p50_ms]
    points = [_work_and_rate(s) for s in rows]
    around = [x for x, _ in points] + [peak / copy]
    x = np.geomspace(min(around) / 4, max(around) * 4, 200)
    axes.plot(x, np.minimum(peak, x * copy), color="#444444", linewidth=1.2)
    axes.annotate(
        f"{peak:.0f} GFLOP/s fp32, {copy:.0f} GB/s", (x[-1], peak), ha="right",
        xytext=(0, 4), textcoords="offset points", fontsize=8,
    )  # fmt: skip
    for place, (s, point) in enumerate(zip(rows, points, strict=True)):
        bound = min(peak, point[0] * copy)
        axes.plot(
            *point, "o", color=_colour(place), label=f"{s.label}: {100 * point[1] / bound:.0f}%"
        )
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlabel("operations per byte that must move")
    axes.set_ylabel("GFLOP/s")
    axes.legend(fontsize=8, title="of what could be", title_fontsize=8)


def _work_and_rate(s: SubjectResult) -> tuple[float, float]:
    """Operations per byte, and GFLOP/s."""
    assert s.gmacs is not None
    assert s.moved_mib is not None
    assert s.p50_ms is not None
    return 2e9 * s.gmacs / (s.moved_mib * 2**20), 2e3 * s.gmacs / s.p50_ms


def _trace(axes: Axes, result: BenchResult, shown: list[SubjectResult]) -> None:
    seconds = [row["at_s"] for row in result.trace]
    names = {"power_w": "W", "temperature_c": "degrees C", "clock_mhz": "MHz, CPU clock"}
    told = {k: v for k, v in names.items() if any(r[k] is not None for r in result.trace)}
    for place, (key, unit) in enumerate(told.items()):
        values = np.asarray([row[key] if row[key] is not None else np.nan for row in result.trace])
        median = float(np.nanmedian(values)) or 1.0
        axes.plot(
            seconds, values / median, color=_colour(place), label=f"{unit}; median {median:.4g}",
            linewidth=1,
        )  # fmt: skip
    axes.set_xlabel("s")
    axes.set_ylabel("over its median")
    axes.legend(fontsize=8)


_Draw = Callable[[Any, BenchResult, list[SubjectResult]], None]
_Has = Callable[[BenchResult, list[SubjectResult]], bool]
_PLOTS: tuple[tuple[str, str, _Draw, _Has], ...] = (
    ("Ratios", "With 95% intervals. An interval that holds 1 tells no difference.", _ratios,
     lambda r, s: all(x.ratio is not None for x in s)),
    ("Latency distributions", "How many calls took so long at most; a long flat top is a tail.",
     _distributions, lambda r, s: True),
    ("Round by round", "Drift that all share is the machine's.", _rounds,
     lambda r, s: len(s[0].rounds_ms) > 1),
    ("Accuracy against latency", "Up and left is better.", _accuracy,
     lambda r, s: any(x.top1_pct for x in s)),
    ("Stages", "From a file to labels, one image at a time.", _stages,
     lambda r, s: any(x.stages_ms for x in s)),
    ("Where calls spend their time", "By each runtime's own profiler.", _kinds,
     lambda r, s: any(x.operators for x in s)),
    ("Roofline", "Lines: what a float32 product and a copy reached here. Int8 may lie above.",
     _roofline, lambda r, s: bool(
         r.peak_gflop_per_s and r.copy_gb_per_s
         and any(x.gmacs and x.moved_mib and x.p50_ms for x in s))),
    ("Power, heat and clocks", "Over the whole bench, as far as the machine tells.", _trace,
     lambda r, s: any(v is not None for row in r.trace for k, v in row.items() if k != "at_s")),
)  # fmt: skip
