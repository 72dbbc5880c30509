"""What `fit` looked at, drawn: latency against score, the front, the budget and the choice."""

from __future__ import annotations

from pathlib import Path

from dimefm_edge.fit import FitReport


def plot_fit(report: FitReport, path: Path) -> None:
    """Draw candidates, Pareto front, budget and choice: latency against score, as a PNG."""
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
                x, y = [c.latency_ms for c in group], [c.score for c in group]
                axes.scatter(x, y, s=16, alpha=0.6, marker=marker, label=label)
    front = report.pareto
    axes.plot([c.latency_ms for c in front], [c.score for c in front], "k:", lw=1, label="front")
    axes.axvline(report.budget_ms, color="tab:red", lw=1, label=f"budget {report.budget_ms:.3g} ms")
    best = report.chosen_candidate
    axes.scatter(best.latency_ms, best.score, s=160, marker="*", color="tab:red", zorder=3)
    axes.annotate(best.name, (best.latency_ms, best.score), xytext=(8, -12),
                  textcoords="offset points")  # fmt: skip
    is_known = best.top1_pct is not None
    what = "zero-shot top-1 (%)" if is_known else "score: GMACs, and what they count"
    axes.set(xscale="log", yscale="linear" if is_known else "log", ylabel=what)
    axes.set_xlabel(f"estimated latency on {report.target}, {report.precision} (ms)")
    axes.legend(fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120, format="png")
