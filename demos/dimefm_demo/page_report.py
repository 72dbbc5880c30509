"""The last tab: the run's own report, accuracy against latency, and a card of each model."""

from __future__ import annotations

import html
import json
from pathlib import Path
from typing import Any

import gradio as gr
import pandas as pd
from PIL import Image

from dimefm_demo.models import Model, Models

_REPORT, _FIGURES, _FIT_PLOT = "report.md", "report.json", "fit.png"
_AXES = ("ms for one picture here", "zero-shot top-1 %")


def build_report_tab(tab: gr.Tab, models: Models) -> None:
    """Lay out the tab and wire it; call within the page.

    Args:
        tab: Its cards are made when it is opened: models load behind the page.
        models: The page's; their runs are read now.
    """
    run_dirs = dict.fromkeys(spec.run_dir for spec in models.specs if spec.run_dir is not None)
    for run_dir in run_dirs:
        _build_run(run_dir)
    if not run_dirs:
        gr.Markdown("No run is shown: `dimefm-edge demo RUN` brings its report here.")
    cards = gr.Markdown(elem_id="cards")
    tab.select(lambda: describe_models(models), None, cards, show_progress="hidden",
               api_visibility="private")  # fmt: skip


def _build_run(run_dir: Path) -> None:
    report = run_dir / _REPORT
    if report.is_file():
        gr.Markdown(report.read_text(encoding="utf-8", errors="replace"), elem_id="report")
    else:
        gr.Markdown(f"`{run_dir.name}` has no {_REPORT}: the run was not finished.")
    points = accuracy_latency(run_dir)
    with gr.Row():
        if points:
            gr.ScatterPlot(
                pd.DataFrame(points, columns=[*_AXES, "model"]), x=_AXES[0], y=_AXES[1],
                color="model", height=340, title="Accuracy and latency",
                x_lim=[0, 1.1 * max(p[0] for p in points)], y_lim=[0, 100], buttons=[],
                show_label=False, elem_id="tradeoff",
            )  # fmt: skip
        if (run_dir / _FIT_PLOT).is_file():
            with Image.open(run_dir / _FIT_PLOT) as plot:
                gr.Image(plot.convert("RGB"), label="How the student was chosen", height=340,
                         interactive=False, elem_id="fit", buttons=["fullscreen"])  # fmt: skip


def accuracy_latency(run_dir: Path) -> list[tuple[float, float, str]]:
    """(p50 ms here, top-1 %, who) of teacher and student on each test set, if there is a report."""
    try:
        figures = json.loads((run_dir / _FIGURES).read_bytes())
        return [
            (float(figures[who]["here_p50_ms"]), float(row[who]["top1_pct"]),
             f"{who}, {row[who]['name']}")
            for row in figures["accuracy"]
            for who in ("teacher", "student")
        ]  # fmt: skip
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return []


def describe_models(models: Models) -> str:
    """A card of each model that is loaded, side by side, as Markdown."""
    loaded = models.loaded()
    if not loaded:
        return "The models are still loading."
    facts = [_facts(models, model) for model in loaded]
    names = dict.fromkeys(name for of_one in facts for name in of_one)
    rows = [[name, *(of_one.get(name, "") for of_one in facts)] for name in names]
    heads = ["model card", *(model.name for model in loaded)]
    lines = [heads, ["---"] * len(heads), *rows]
    return "\n".join(f"| {' | '.join(map(_inert, line))} |" for line in lines)


def _facts(models: Models, model: Model) -> dict[str, Any]:
    """What is known of a model; what its manifest does not say is left out."""
    subject, manifest = model.subject, model.manifest
    parity, graph = manifest.get("parity", {}), manifest.get("graph", {})
    accuracy, size = manifest.get("accuracy") or {}, subject.size_mib
    facts = {
        "model": manifest.get("name") or subject.name,
        "teacher": model.teacher,
        "made for": manifest.get("target"),
        "precision": model.precision,
        "runs in": model.runtime,
        "size": f"{size:.2f} MiB" if size else None,
        "picture": f"{subject.preprocess.image_size} x {subject.preprocess.image_size} pixels",
        "embedding": f"{subject.embed_dim} numbers",
        "labels": "any" if models.has_text(model) else "baked in only",
        "label sets": ", ".join(
            f"{b.name} ({len(b.classnames)})" for b in subject.label_banks.values()
        ),
        "attention": graph.get("fusion", {}).get("summary"),
        "parity with PyTorch": f"least cosine {parity['min_cosine']:.6f} on "
        f"{parity['num_images']} images" if parity.get("min_cosine") else None,
        "zero-shot top-1": ", ".join(
            f"{name} {row['top1_pct']:.1f}%" for name, row in accuracy.items()
        ),
        "exported": manifest.get("created"),
    }  # fmt: skip
    return {name: value for name, value in facts.items() if value}


def _inert(value: Any) -> str:
    """Text as one cell of a table, whatever it holds."""
    text = html.escape(" ".join(str(value).split()))
    for mark in "\\`*[]|":
        text = text.replace(mark, f"&#{ord(mark)};")
    return text
