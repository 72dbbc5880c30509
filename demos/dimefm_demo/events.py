"""Between gradio's events and ours: files as they were sent, errors as people read them."""

from __future__ import annotations

import base64
import binascii
import functools
import html
import inspect
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import gradio as gr
from PIL import Image

from dimefm_demo.inputs import read_image
from dimefm_edge import DimeFMError
from dimefm_edge.errors import InputError

ANSWERS: dict[str, Any] = {"concurrency_id": "answers"}
"""Events that answer at once share one limit, which `serve` sets."""
CAMERAS: dict[str, Any] = {
    "concurrency_id": "cameras", "concurrency_limit": 4, "stream_every": 0.1, "time_limit": 600,
}  # fmt: skip
"""A camera keeps its place for as long as it runs, so it has places of its own."""
JOBS: dict[str, Any] = {"concurrency_id": "jobs", "concurrency_limit": 1}
"""Events that run for long: one at a time, beside the answers."""


def told(function: Callable[..., Any]) -> Callable[..., Any]:
    """Turn what a visitor can mend into a message on the page; anything else is logged.

    gradio shows messages as HTML, and ours quote what visitors typed.
    """
    if inspect.isgeneratorfunction(function):

        @functools.wraps(function)
        def steps(*args: Any) -> Any:
            try:
                yield from function(*args)
            except DimeFMError as error:
                raise _message(error) from error

        return steps

    @functools.wraps(function)
    def call(*args: Any) -> Any:
        try:
            return function(*args)
        except DimeFMError as error:
            raise _message(error) from error

    return call


def _message(error: DimeFMError) -> gr.Error:
    text = html.escape(str(error.args[0]))
    hint = f"<br><b>Try:</b> {html.escape(error.hint)}" if error.hint else ""
    return gr.Error(text + hint, print_exception=False)


def sent_image(sent: dict[str, Any] | None) -> Image.Image:
    """A picture as the page sends it: an uploaded file, or a camera's frame in its URL.

    gradio has checked that a path lies in its upload folder.

    Raises:
        BadImageError: If it cannot be read.
        InputError: If there is none.
    """
    if not sent:
        raise InputError("there is no picture yet", hint="drop one, paste one or take an example")
    url = str(sent.get("url") or "")
    if url.startswith("data:"):
        try:
            return read_image(base64.b64decode(url.partition(",")[2], validate=True), "the frame")
        except binascii.Error as error:
            raise InputError("the picture's data is not base64") from error
    if not sent.get("path"):
        raise InputError("the picture was not uploaded", hint="upload the file itself")
    return read_image(Path(sent["path"]), str(sent.get("orig_name") or "") or "you sent")


def sent_paths(sent: Sequence[dict[str, Any]] | None) -> list[Path]:
    """Uploaded files, where gradio put them."""
    return [Path(file["path"]) for file in sent or () if file.get("path")]
