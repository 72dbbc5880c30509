"""The second tab: pictures found by words or by a picture."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import gradio as gr
import numpy as np
import numpy.typing as npt

from dimefm_demo.events import JOBS, sent_image, sent_paths, told
from dimefm_demo.heat_map import as_seen
from dimefm_demo.inputs import UploadPool, parse_labels
from dimefm_demo.models import Model, Models
from dimefm_demo.search import ImageIndex, ServerIndexes, index_uploads
from dimefm_edge.errors import InputError

Embeds = npt.NDArray[np.float32]

_MAX_SHOWN = 48
_PLAIN = ("{c}",)
"""A query is a sentence already."""
_API = "Pictures of the server that a sentence, or without one a picture, finds: nearest first."


def build_search_tab(models: Models, indexes: ServerIndexes, folder: Path) -> None:
    """Lay out the tab and wire it; call within the page.

    Args:
        models: The page's.
        indexes: What is searched until a visitor indexes pictures.
        folder: Where visitors' indexes are kept.
    """
    own = gr.State(None)
    with gr.Row():
        with gr.Column(scale=4, min_width=300):
            model = gr.Dropdown(models.names, value=models.names[0], label="Model",
                                elem_id="search-model")  # fmt: skip
            query = gr.Textbox(label="Find", placeholder="a red star", elem_id="query")
            like = gr.Image(
                label="Or find what looks like this", type="filepath", height=180,
                sources=["upload", "clipboard"], elem_id="like", buttons=[],
            )  # fmt: skip
            count = gr.Slider(1, _MAX_SHOWN, 12, step=1, label="Pictures shown")
            find = gr.Button("Search", variant="primary", elem_id="search")
            files, tree, build = _build_own()
        with gr.Column(scale=6, min_width=300):
            said = gr.Textbox(_offer(indexes), label="Searching", interactive=False,
                              elem_id="searching")  # fmt: skip
            found = gr.Gallery(show_label=False, columns=3, object_fit="contain", height=640,
                               elem_id="found", interactive=False, buttons=[])  # fmt: skip

    def index_them(files: Any, tree: Any, model: str, progress: Any = gr.Progress()) -> list[Any]:
        index = _index(models.wait_for(model), sent_paths(files) + sent_paths(tree), folder,
                       progress)  # fmt: skip
        return [index, _describe(index, "of yours"), None]

    def search(
        query: str, like: Any, model: str, count: int, own: Any, progress: Any = gr.Progress()
    ) -> list[Any]:
        index = own or _server_index(indexes, models.wait_for(model), progress)
        embeds = _words(models, index.model, query) if query.strip() else _picture(index, like)
        return [_gallery(index, embeds, int(count)), _described(index, own)]

    def search_like(
        like: Any, model: str, count: int, own: Any, progress: Any = gr.Progress()
    ) -> list[Any]:
        index = own or _server_index(indexes, models.wait_for(model), progress)
        return [_gallery(index, _picture(index, like), int(count)), _described(index, own)]

    options: dict[str, Any] = {"preprocess": False, **JOBS}
    build.click(told(index_them), [files, tree, model], [own, said, found],
                api_visibility="private", **options)  # fmt: skip
    gr.on([find.click, query.submit], told(search), [query, like, model, count, own],
          [found, said], api_name="search", api_description=_API, **options)  # fmt: skip
    like.upload(told(search_like), [like, model, count, own], [found, said],
                api_visibility="private", **options)  # fmt: skip
    model.input(lambda: [None, _offer(indexes), None], None, [own, said, found],
                api_visibility="private")  # fmt: skip


def _build_own() -> tuple[gr.File, gr.File, gr.Button]:
    with gr.Accordion("Search your own pictures", open=False, elem_id="own"):
        files = gr.File(file_count="multiple", height=120, elem_id="search-files",
                        label="Pictures, or .zip archives")  # fmt: skip
        tree = gr.File(file_count="directory", height=120, label="Or a folder",
                       elem_id="search-folder")  # fmt: skip
        return files, tree, gr.Button("Index them", elem_id="index")


def _index(model: Model, paths: list[Path], folder: Path, progress: Any) -> ImageIndex:
    if not paths:
        raise InputError("there are no pictures to index", hint="drop pictures or a .zip first")
    pool = UploadPool(paths)
    return index_uploads(model, pool, folder, _counted(progress, len(pool)))


def _server_index(indexes: ServerIndexes, model: Model, progress: Any) -> ImageIndex:
    return indexes.index_of(model, _counted(progress, None))


def _counted(progress: Any, total: int | None) -> Callable[[int], None]:
    """A progress bar that is told how many more are done."""
    done = 0

    def advance(count: int) -> None:
        nonlocal done
        done += count
        progress((done, total), desc="indexing", unit="pictures")

    return advance


def _words(models: Models, model: Model, query: str) -> Embeds:
    (label,) = parse_labels([query])
    embeds: Embeds = models.label_bank(model, [label], _PLAIN).embeds[0]
    return embeds


def _picture(index: ImageIndex, sent: Any) -> Embeds:
    pixels = as_seen(index.model, sent_image(sent))
    embeds: Embeds = index.model.subject.encode_pixels(pixels[None])[0]
    return embeds


def _gallery(index: ImageIndex, embeds: Embeds, count: int) -> list[tuple[Any, str]]:
    count = min(max(1, count), _MAX_SHOWN)
    return [
        (hit.thumbnail, f"{hit.cosine:.3f}  {hit.name}")
        for hit in index.search(embeds, count=count)
    ]


def _offer(indexes: ServerIndexes) -> str:
    return f"{', '.join(indexes.sources)} (indexed at the first search)"


def _described(index: ImageIndex, own: ImageIndex | None) -> str:
    return _describe(index, "of yours" if own else "of the server")


def _describe(index: ImageIndex, whose: str) -> str:
    text = f"{len(index):,} pictures {whose}, by {index.model.name}"
    return f"{text}; {len(index.bad)} cannot be read: {index.describe_bad()}" if index.bad else text
