"""Plots of scores: accuracy against latency and parameters, and reliability diagrams."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dimefm_edge.errors import MissingExtraError
from dimefm_edge.evaluate.calibration import CalibrationReport
from dimefm_edge.files import atomic_file

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class ScorePoint:
    """A model in the plot."""

    name: str
    accuracy_pct: float
    latency_ms: float | None
    """Of one image."""
    params_m: float | None
    """Of the image tower, in millions."""


def plot_scores(
    points: Sequence[ScorePoint], stem: Path, *, accuracy: str, latency: str
) -> list[Path]:
    """Draw accuracy against latency and against parameters, side by side.

    Args:
        points: The models; one without a latency or a count is left out of that side.
        stem: Where to, without suffix: a .png and an .svg are written.
        accuracy: What the accuracy is, for its axis.
        latency: Where the latency was measured, for its axis.

    Raises:
        MissingExtraError: If matplotlib is not installed.
    """
    figure = _new_figure(10.0, 4.2)
    left, right = figure.subplots(1, 2, sharey=True)
    for axes, label, values in (
        (left, f"latency of one image, {latency} (ms)", [p.latency_ms for p in points]),
        (right, "parameters of the image tower (millions)", [p.params_m for p in points]),
    ):
        for number, (point, value) in enumerate(zip(points, values, strict=True)):
            if value is not None:
                axes.scatter(value, point.accuracy_pct, s=60, color=f"C{number % 10}",
                             marker="*" if number == 0 else "o", label=_short(point.name),
                             zorder=3)  # fmt: skip
        shown = [value for value in values if value is not None]
        if not shown:
            axes.text(0.5, 0.5, "not known", ha="center", transform=axes.transAxes)
        elif max(shown) > 5 * min(shown) > 0:
            axes.set_xscale("log")
            axes.xaxis.set_major_formatter("{x:g}")  # not 3 x 10^0
            axes.xaxis.set_minor_formatter("{x:g}")
        axes.set_xlabel(label)
        axes.grid(alpha=0.3)
    left.set_ylabel(accuracy)
    side = left if any(p.latency_ms is not None for p in points) else right
    if side.get_legend_handles_labels()[0]:
        side.legend(fontsize=8)
    return _save(figure, stem)


def plot_reliability(reports: Sequence[tuple[str, CalibrationReport]], stem: Path) -> list[Path]:
    """Draw accuracy against confidence, one line a model and test set (Guo et al. 2017, figure 1).

    Args:
        reports: Name of the model and its calibration.
        stem: Where to, without suffix: a .png and an .svg are written.

    Raises:
        MissingExtraError: If matplotlib is not installed.
    """
    figure = _new_figure(5.2, 5.0)
    axes = figure.add_subplot()
    axes.plot([0, 100], [0, 100], "k:", lw=1, label="calibrated")
    for name, report in reports:
        axes.plot(
            [b.confidence_pct for b in report.bins], [b.accuracy_pct for b in report.bins],
            marker="o", ms=4, label=f"{_short(name)}, {report.name}: ECE {report.ece_pct:.1f}%",
        )  # fmt: skip
    axes.set(xlim=(0, 100), ylim=(0, 100), aspect="equal")
    axes.set_xlabel("confidence (%)")
    axes.set_ylabel("accuracy (%)")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    return _save(figure, stem)


def import_matplotlib() -> tuple[Any, Any]:
    """matplotlib's canvas and figure, which need no display.

    Raises:
        MissingExtraError: If it is not installed.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise MissingExtraError(
            "plots need matplotlib, which is not installed", hint="pip install 'dimefm_edge[eval]'"
        ) from error
    return FigureCanvasAgg, Figure


def _new_figure(width: float, height: float) -> Figure:
    canvas, kind = import_matplotlib()
    figure: Figure = kind(figsize=(width, height), layout="constrained")
    canvas(figure)
    return figure


def _save(figure: Figure, stem: Path) -> list[Path]:
    paths = [stem.with_name(f"{stem.name}.{kind}") for kind in ("png", "svg")]
    for path in paths:
        with atomic_file(path) as stream:
            figure.savefig(stream, dpi=120, format=path.suffix[1:])
    return paths


def _short(name: str) -> str:
    """The end of a long path; `$` would begin a formula."""
    shown = name if len(name) <= 32 else f"…{name[-31:]}"
    return shown.replace("$", r"\$")
