"""The third tab: many pictures in, a table out; it can be stopped, and keeps what is done."""

from __future__ import annotations

import contextlib
import shutil
import tempfile
import time
from collections.abc import Iterator
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
    table = gr.State("")
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
        progress: Any = gr.Progress(),
    ) -> Iterator[list[Any]]:  # fmt: skip
        paths = sent_paths(files)
        if not paths:
            raise InputError("there are no pictures yet", hint="drop pictures or a .zip first")
        question = Question(parse_labels(labels), parse_templates(templates))
        yield from _steps(models, UploadPool(paths), question, model, int(top_k), folder, progress)

    running = start.click(
        told(run), [files, labels, templates, model, top_k], [said, result, table],
        preprocess=False, api_name="batch", api_description=_API, **JOBS,
    )  # fmt: skip
    stop.click(_stopped, [said, table], [said, result], cancels=[running], queue=False,
               api_visibility="private")  # fmt: skip


def _steps(
    models: Models, pool: UploadPool, question: Question, name: str, top_k: int, folder: Path,
    progress: Any,
) -> Iterator[list[Any]]:  # fmt: skip
    """How far it is, now and then; at the end the table."""
    _clear_old(folder)
    out = Path(tempfile.mkdtemp(prefix="batch-", dir=folder)) / _TABLE
    model, total = models.wait_for(name), len(pool)
    begun = said = time.monotonic()
    yield [f"0 of {total:,} pictures", None, str(out)]
    for done in classify_batch(models, model, pool, question, out, top_k=top_k):
        progress((done, total), desc="classifying", unit="pictures")
        if time.monotonic() - said > _SAY_S:
            said = time.monotonic()
            yield [f"{done:,} of {total:,} pictures", None, str(out)]
    seconds = time.monotonic() - begun
    text = f"{total:,} of {total:,} pictures in {seconds:.1f} s: {total / seconds:.1f} a second"
    yield [text, str(out), ""]


def _stopped(said: str, table: str) -> list[Any]:
    """What a visitor keeps who stops it: the table of the pictures that are done."""
    if not table or not Path(table).is_file():
        return [said or "nothing is running", gr.update()]
    return [f"stopped after {said}", table]


def _clear_old(folder: Path) -> None:
    for old in folder.glob("batch-*"):
        with contextlib.suppress(OSError):
            if time.time() - old.stat().st_mtime > _KEEP_S:
                shutil.rmtree(old)
