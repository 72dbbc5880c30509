"""Files as the page sends them, and errors as it shows them."""

from __future__ import annotations

import base64
import inspect

import gradio as gr
import pytest

from dimefm_demo.events import sent_image, sent_paths, told
from dimefm_edge.errors import DataError, InputError
from tests.demos import bad_files as bad

PNG = bad.encoded(bad.scene(), "PNG")


def test_errors_are_shown_escaped_and_with_their_hint():
    @told
    def fail(labels):
        raise DataError(f"<img src=x onerror=alert(1)> in {labels}", hint="a <b>")

    with pytest.raises(gr.Error) as caught:
        fail("labels")
    assert str(caught.value.message) == (
        "&lt;img src=x onerror=alert(1)&gt; in labels<br><b>Try:</b> a &lt;b&gt;"
    )
    assert list(inspect.signature(fail).parameters) == ["labels"]  # gradio reads it


def test_steps_fail_in_the_same_way():
    @told
    def steps(count):
        yield count
        raise InputError("no more")

    running = steps(3)
    assert next(running) == 3
    with pytest.raises(gr.Error, match="no more"):
        next(running)


def test_other_errors_are_left_alone():
    @told
    def fail():
        raise KeyError("a bug of ours")

    with pytest.raises(KeyError):
        fail()


def test_pictures_come_as_files_and_as_frames(tmp_path):
    path = tmp_path / "a.png"
    path.write_bytes(PNG)
    frame = {"url": "data:image/png;base64," + base64.b64encode(PNG).decode()}
    for sent in ({"path": str(path), "orig_name": "a.png"}, frame):
        assert sent_image(sent).tobytes() == bad.scene().tobytes()
    assert sent_paths([{"path": str(path)}, {"path": None}]) == [path]
    assert sent_paths(None) == []


@pytest.mark.parametrize(
    ("sent", "why"),
    [
        (None, "there is no picture yet"),
        ({"path": None, "url": "http://127.0.0.1/x.png"}, "the picture was not uploaded"),
        ({"url": "data:image/png;base64,@@"}, "not base64"),
        ({"url": "data:image/png;base64,AAAA"}, "image the frame cannot be read: it is no JPEG"),
    ],
)
def test_what_is_no_picture_says_so(sent, why):
    with pytest.raises(InputError, match=why):
        sent_image(sent)
