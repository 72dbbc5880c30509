"""The page: its tabs, in order, and the line that says which models are ready."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import gradio as gr

from dimefm_demo.models import Models
from dimefm_demo.page_classify import build_classify_tab

_TITLE = "dimefm_edge: a student beside its teacher"
_TICK_S = 1.0
_DELETE_EVERY_S, _KEEP_S = 60, 600
"""Uploads and results are deleted ten minutes after they came."""


def build_page(models: Models, examples: Sequence[Path]) -> gr.Blocks:
    """Lay out the page; models may still be loading."""
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
        with gr.Tabs(), gr.Tab("Classify"):
            build_classify_tab(page, models, examples)
    return page


def _describe(models: Models) -> str:
    return "Models: " + "; ".join(
        f"`{name.replace('`', '')}` {' '.join(state.split())}" for name, state in models.states()
    )


def theme() -> Any:
    """gradio's own, with the device's fonts: a page that needs no other server."""
    return gr.themes.Default(
        font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"]
    )
