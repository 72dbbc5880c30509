"""The third tab: many pictures in, a table out; it can be stopped, and keeps what is done."""

from __future__ import annotations

import contextlib
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import gradio as gr

from dimefm_demo.batch import classify_batch
from dimefm_demo.classify import Question
from dimefm_demo.events import JOBS, sent_paths, told
from dimefm_demo.inputs import UploadPool, parse_labels, parse_templates
from dimefm_demo.models import Models
from dimefm_edge.errors import InputError

_TABLE = "labels.csv"
_SAY_S = 0.3
_KEEP_S = 3600
_API = "Classify pictures and .zip archives of pictures: progress, then a CSV file."


def build_batch_tab(
    models: Models, labels: gr.Textbox, templates: gr.Textbox, folder: Path
) -> None:
    """Lay out the tab and wire it; call within the page.

    Args:
        models: The page's.
        labels: Of the first tab, whose question this one asks of each picture.
        templates: The same.
        folder: Where tables are kept for an hour.
    """
    stopped: set[str | None] = set()  # sessions; gradio's own cancelling loses the last words
    gr.Markdown("Asks for the labels of the first tab, picture by picture.")
    with gr.Row():
        with gr.Column(scale=4, min_width=300):
            files = gr.File(file_count="multiple", label="Pictures, or .zip archives", height=180,
                            elem_id="batch-files")  # fmt: skip
            model = gr.Dropdown(models.names, value=models.names[0], label="Model",
                                elem_id="batch-model")  # fmt: skip
            top_k = gr.Slider(1, 10, 3, step=1, label="Labels per picture")
            with gr.Row():
                start = gr.Button("Classify all", variant="primary", min_width=120, elem_id="batch")
                stop = gr.Button("Stop", min_width=120, elem_id="batch-stop")
        with gr.Column(scale=6, min_width=300):
            said = gr.Textbox(label="Progress", interactive=False, lines=2, elem_id="batch-said")
            result = gr.File(label="Table", interactive=False, height=120, elem_id="batch-table")

    def run(
        files: Any, labels: str, templates: str, model: str, top_k: int,
        request: gr.Request, progress: Any = gr.Progress(),
    ) -> Iterator[list[Any]]:  # fmt: skip
        paths = sent_paths(files)
        if not paths:
            raise InputError("there are no pictures yet", hint="drop pictures or a .zip first")
        question = Question(parse_labels(labels), parse_templates(templates))
        yield from _steps(
            models, UploadPool(paths), question, model, int(top_k), folder,
            lambda: request.session_hash in stopped, progress,
        )  # fmt: skip

    def go_on(request: gr.Request) -> None:
        stopped.discard(request.session_hash)

    def stop_it(request: gr.Request) -> None:
        stopped.add(request.session_hash)

    start.click(go_on, queue=False, api_visibility="private").then(
        told(run), [files, labels, templates, model, top_k], [said, result],
        preprocess=False, api_name="batch", api_description=_API, **JOBS,
    )  # fmt: skip
    stop.click(stop_it, queue=False, api_visibility="private")


def _steps(
    models: Models, pool: UploadPool, question: Question, name: str, top_k: int, folder: Path,
    is_stopped: Callable[[], bool], progress: Any,
) -> Iterator[list[Any]]:  # fmt: skip
    """How far it is, now and then; at the end the table, of what was done if it was stopped."""
    _clear_old(folder)
    out = Path(tempfile.mkdtemp(prefix="batch-", dir=folder)) / _TABLE
    model, total = models.wait_for(name), len(pool)
    begun = said = time.monotonic()
    yield [f"0 of {total:,} pictures", None]
    for done in classify_batch(models, model, pool, question, out, top_k=top_k):
        progress((done, total), desc="classifying", unit="pictures")
        if time.monotonic() - said > _SAY_S:
            said = time.monotonic()
            yield [f"{done:,} of {total:,} pictures", None]
        if is_stopped():
            break
    seconds = time.monotonic() - begun
    text = f"{done:,} of {total:,} pictures in {seconds:.1f} s: {done / seconds:.1f} a second"
    yield [f"stopped after {text}" if done < total else text, str(out)]


def _clear_old(folder: Path) -> None:
    for old in folder.glob("batch-*"):
        with contextlib.suppress(OSError):
            if time.time() - old.stat().st_mtime > _KEEP_S:
                shutil.rmtree(old)
