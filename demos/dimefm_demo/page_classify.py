"""The first tab: a picture or a camera, labels, and what each model makes of them, side by side."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gradio as gr

from dimefm_demo import page_answers as answers
from dimefm_demo.events import ANSWERS, CAMERAS, told
from dimefm_demo.models import Models
from dimefm_demo.presets import PRESETS

_MAX_SHOWN = 20


@dataclass(frozen=True)
class Ask:
    """The inputs that say what to ask; events take them in this order."""

    labels: gr.Textbox
    templates: gr.Textbox
    temperature: gr.Slider
    with_none: gr.Checkbox
    chosen: gr.CheckboxGroup
    top_k: gr.Slider

    @property
    def inputs(self) -> list[Any]:
        return [self.labels, self.templates, self.temperature, self.with_none, self.chosen,
                self.top_k]  # fmt: skip


def build_classify_tab(page: gr.Blocks, models: Models, examples: Sequence[Path]) -> Ask:
    """Lay out the tab and wire it; call within the page."""
    history = gr.State([])
    with gr.Row():
        with gr.Column(scale=4, min_width=300):
            picture, camera, rate = _build_pictures(examples)
            preset, ask = _build_ask(models)
            button = gr.Button("Classify", variant="primary", elem_id="classify")
        with gr.Column(scale=6, min_width=300):
            bars = _build_bars(models)
            table = gr.Dataframe(
                headers=list(answers.COLUMNS), interactive=False, label="Side by side",
                elem_id="table", datatype="str", buttons=[],
            )  # fmt: skip
            chart = gr.LinePlot(
                x="picture", y="ms", color="model", height=280, elem_id="chart", buttons=[],
                title="From picture to answer", show_label=False, visible=False,
            )  # fmt: skip
            looked, label = _build_heat_map(models, picture, ask)
    outputs = [*bars, table, chart, history, label, looked]
    answer = told(lambda *sent: answers.answer_picture(models, *sent))
    again: dict[str, Any] = {
        "fn": answer, "inputs": [picture, *ask.inputs, history], "outputs": outputs,
        "preprocess": False, "trigger_mode": "always_last", "api_visibility": "private",
        "show_progress_on": bars, **ANSWERS,
    }  # fmt: skip
    gr.on([picture.change, button.click, ask.labels.submit, ask.labels.blur, ask.templates.blur,
           ask.temperature.release, ask.top_k.release, ask.with_none.input, ask.chosen.input],
          **again)  # fmt: skip
    preset.input(
        told(lambda name: answers.choose_preset(models, name)), preset,
        [ask.labels, ask.templates], preprocess=False, api_visibility="private",
    ).success(**{**again, "trigger_mode": "multiple"})  # fmt: skip
    camera.stream(
        lambda *sent: answers.answer_frame(models, *sent), [camera, *ask.inputs, gr.State([])],
        [*bars, rate], preprocess=False, show_progress="hidden", api_visibility="private",
        **CAMERAS,
    )  # fmt: skip
    page.load(
        lambda: answers.first_preset(models), None, [preset, ask.labels, ask.templates],
        api_visibility="private", show_progress="hidden",
    )  # fmt: skip
    _publish(models, picture, ask)
    return ask


def _build_pictures(examples: Sequence[Path]) -> tuple[gr.Image, gr.Image, gr.Textbox]:
    with gr.Tabs():
        with gr.Tab("Picture"):
            picture = gr.Image(
                label="Picture", type="filepath", sources=["upload", "clipboard"], height=280,
                elem_id="picture", buttons=[],
            )  # fmt: skip
            gr.Examples([[str(path)] for path in examples], picture, label="Examples")
        with gr.Tab("Camera"):
            camera = gr.Image(
                label="Camera", type="filepath", sources=["webcam"], streaming=True, height=280,
                elem_id="camera", buttons=[],
            )  # fmt: skip
            rate = gr.Textbox(label="Frames", interactive=False, elem_id="rate")
    return picture, camera, rate


def _build_ask(models: Models) -> tuple[gr.Dropdown, Ask]:
    first = next(iter(PRESETS))
    begin = PRESETS[first]()
    preset = gr.Dropdown(list(PRESETS), value=first, label="Label list", elem_id="preset")
    labels = gr.Textbox(
        "\n".join(begin.labels), label="Labels", lines=3, max_lines=6, elem_id="labels",
        info="Any words, separated by commas or line ends.",
    )  # fmt: skip
    chosen = gr.CheckboxGroup(models.names, value=models.names[:3], label="Models",
                              elem_id="models")  # fmt: skip
    with gr.Accordion("Settings", open=False, elem_id="settings"):
        templates = gr.Textbox(
            "\n".join(begin.templates), label="Prompt templates", lines=2, max_lines=6,
            info="One per line; {c} stands for the label.", elem_id="templates",
        )  # fmt: skip
        top_k = gr.Slider(1, _MAX_SHOWN, 5, step=1, label="Labels shown", elem_id="top-k")
        temperature = gr.Slider(
            0.05, 5, 1, step=0.05, label="Softmax temperature", elem_id="temperature",
            info="Above 1: less sure of itself; below 1: more.",
        )  # fmt: skip
        with_none = gr.Checkbox(
            False, label="None of these", elem_id="with-none",
            info="Other names that a model knows take part; the likeliest speaks for them all.",
        )  # fmt: skip
    return preset, Ask(labels, templates, temperature, with_none, chosen, top_k)


def _build_bars(models: Models) -> list[gr.Label]:
    with gr.Row():
        return [
            gr.Label(label=name, min_width=240, visible=name in models.names[:3], buttons=[],
                     elem_id=f"bars-{number}")
            for number, name in enumerate(models.names)
        ]  # fmt: skip


def _build_heat_map(models: Models, picture: gr.Image, ask: Ask) -> tuple[gr.Image, gr.Dropdown]:
    """What shows where a model looked, and the label that it is shown for."""
    with gr.Accordion("Where did it look?", open=False, elem_id="heat"):
        with gr.Row():
            model = gr.Dropdown(models.names, value=models.names[0], label="Model", min_width=140)
            label = gr.Dropdown([], label="Label", min_width=140, elem_id="heat-label")
        show = gr.Button("Show where it looked", elem_id="heat-show")
        looked = gr.Image(label="Red: hiding it costs the label most", interactive=False,
                          height=300, elem_id="heat-map", buttons=[])  # fmt: skip

    def look(
        sent: Any, model: str, label: str, templates: str, progress: Any = gr.Progress()
    ) -> Any:
        return answers.show_relevance(models, sent, model, label, templates, advance=progress)

    show.click(told(look), [picture, model, label, ask.templates], looked, preprocess=False,
               api_visibility="private", **ANSWERS)  # fmt: skip
    return looked, label


def _publish(models: Models, picture: gr.Image, ask: Ask) -> None:
    """The same for programs: `/classify`, with the page's values as defaults."""

    def classify(
        picture: Any, labels: str, templates: str, temperature: float, with_none: bool,
        model: str, top_k: int,
    ) -> dict[str, Any]:  # fmt: skip
        return answers.answer_api(
            models, picture, labels, templates, temperature, with_none, model, top_k
        )

    with gr.Row(visible=False):
        model = gr.Dropdown(models.names, value=models.names[0], label="Model")
        result = gr.JSON(label="Answer")
        gr.Button().click(
            told(classify),
            [picture, ask.labels, ask.templates, ask.temperature, ask.with_none, model, ask.top_k],
            result, preprocess=False, api_name="classify", api_description=answers.API_CLASSIFY,
            **ANSWERS,
        )  # fmt: skip
