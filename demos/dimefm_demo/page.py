"""The page: its tabs, in order, and the line that says which models are ready."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gradio as gr

from dimefm_demo.models import Models
from dimefm_demo.page_batch import build_batch_tab
from dimefm_demo.page_classify import build_classify_tab
from dimefm_demo.page_report import build_report_tab
from dimefm_demo.page_search import build_search_tab
from dimefm_demo.presets import save_examples
from dimefm_demo.search import ServerIndexes

_TITLE = "dimefm_edge: a student beside its teacher"
_TICK_S = 1.0
_DELETE_EVERY_S, _KEEP_S = 60, 600
"""Uploads and results are deleted ten minutes after they came."""


def build_page(models: Models, indexes: ServerIndexes, folder: Path) -> gr.Blocks:
    """Lay out the page; models may still be loading.

    Args:
        models: What is shown.
        indexes: What visitors may search.
        folder: For examples, indexes and tables; it goes when the server does.
    """
    examples = save_examples(folder)
    with gr.Blocks(
        title=_TITLE, analytics_enabled=False, delete_cache=(_DELETE_EVERY_S, _KEEP_S)
    ) as page:
        gr.Markdown(f"# {_TITLE}\nZero-shot classification: any picture, any words.")
        states = gr.Markdown(_describe(models), elem_id="states")
        timer = gr.Timer(_TICK_S, active=not models.is_settled)
        timer.tick(
            lambda: (_describe(models), gr.Timer(active=not models.is_settled)), None,
            [states, timer], show_progress="hidden", queue=False, api_visibility="private",
        )  # fmt: skip
        with gr.Tabs():
            with gr.Tab("Classify"):
                ask = build_classify_tab(page, models, examples)
            with gr.Tab("Search"):
                build_search_tab(models, indexes, folder)
            with gr.Tab("Batch"):
                build_batch_tab(models, ask.labels, ask.templates, folder)
            with gr.Tab("Report") as report:
                build_report_tab(report, models)
    built: gr.Blocks = page
    return built


def _describe(models: Models) -> str:
    return "Models: " + "; ".join(
        f"`{name.replace('`', '')}` {' '.join(state.split())}" for name, state in models.states()
    )


CSS = """
.prose table {display: block; overflow-x: auto}
.prose td, .prose th {overflow-wrap: normal; word-break: normal}
"""
"""Wide tables scroll on a phone, rather than break their words."""


def theme() -> Any:
    """gradio's own, with the device's fonts: a page that needs no other server."""
    return gr.themes.Default(
        font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"]
    )
