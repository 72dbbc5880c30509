"""What the classify tab's events do: what the page sends in, what its components show out."""

from __future__ import annotations

import functools
import html
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import gradio as gr
import pandas as pd
from PIL import Image

from dimefm_demo.classify import NONE, Answer, Question, classify
from dimefm_demo.events import sent_image
from dimefm_demo.heat_map import as_seen, draw, relevance
from dimefm_demo.inputs import parse_labels, parse_templates
from dimefm_demo.models import Model, Models
from dimefm_demo.presets import PRESETS, Preset
from dimefm_edge import DimeFMError
from dimefm_edge.errors import InputError, lookup

COLUMNS = ("model", "answer", "agrees", "total ms", "image ms", "resize ms", "labels ms",
           "rank ms", "MiB", "precision", "runs in")  # fmt: skip
API_CLASSIFY = (
    "Rank labels for a picture. `labels` and `templates` are separated by line ends; labels also "
    "by commas. Gives the ranked labels with probabilities, and what each stage took in ms."
)
_HISTORY = 40
"""Answers per model that the chart remembers, per visitor."""
_RATE_FRAMES = 10

Sent = dict[str, Any]


@dataclass(frozen=True)
class Past:
    """One answer that the chart and the agreement remember."""

    picture: int
    file: str
    """Where the picture lies; the same bytes sent again lie in the same place."""
    model: str
    ms: float
    """From the picture to the answer, its labels being known."""
    agrees: bool


def answer_picture(
    models: Models, sent: Sent | None, labels: str, templates: str, temperature: float,
    with_none: bool, chosen: list[str], top_k: int, history: list[Past],
) -> list[Any]:  # fmt: skip
    """Each chosen model's answer: bars, table, chart, history, labels to look for, no heat map."""
    if not sent:
        return [*(gr.update() for _ in models.names), *(gr.update() for _ in range(5))]
    question = _question(labels, templates, temperature, with_none)
    found = _ask_each(models, chosen, sent_image(sent), question)
    number = history[-1].picture + 1 if history else 1
    first = next(iter(found.values()))
    history = history[-_HISTORY * len(models.names) :] + [
        Past(
            number,
            str(sent.get("path")),
            name,
            answer.total_ms - answer.labels_ms,
            answer.top == first.top,
        )
        for name, answer in found.items()
    ]
    rows = [
        _row(models.wait_for(name), answer, {p.file: p.agrees for p in history if p.model == name})
        for name, answer in found.items()
    ]
    names = [label for label, _ in first.ranked[: int(top_k)] if label != NONE]
    return [
        *_bars(models, found, int(top_k)),
        rows,
        _chart([past for past in history if past.model in found]),
        history,
        gr.Dropdown(choices=names, value=names[0] if names else None),
        None,
    ]


def answer_frame(
    models: Models, sent: Sent | None, labels: str, templates: str, temperature: float,
    with_none: bool, chosen: list[str], top_k: int, times: list[float],
) -> list[Any]:  # fmt: skip
    """A camera's frame: bars, and how many frames a second are answered.

    The newest frame wins: gradio keeps one frame per visitor, which each later one replaces
    until this is done with the last. Errors are said in the text: a toast a frame is no help.
    """
    try:
        question = _question(labels, templates, temperature, with_none)
        found = _ask_each(models, chosen, sent_image(sent), question)
    except DimeFMError as error:
        return [*(gr.update() for _ in models.names), str(error)]
    times.append(time.monotonic())
    del times[:-_RATE_FRAMES]
    seconds = times[-1] - times[0]
    rate = f"{(len(times) - 1) / seconds:.1f} frames/s" if seconds else "first frame"
    spent = ", ".join(f"{name} {answer.total_ms:.1f} ms" for name, answer in found.items())
    return [*_bars(models, found, int(top_k)), f"{rate}: {spent}"]


def answer_api(
    models: Models, picture: Sent, labels: str, templates: str, temperature: float,
    with_none: bool, model: str, top_k: int,
) -> dict[str, Any]:  # fmt: skip
    """The answer of one model, as plain values."""
    question = _question(labels, templates, temperature, with_none)
    answer = classify(models, models.wait_for(model), sent_image(picture), question)
    ranked = answer.ranked[: max(1, int(top_k))]
    return {
        **asdict(answer),
        "ranked": [{"label": name, "probability": share} for name, share in ranked],
        "total_ms": answer.total_ms,
    }


def show_relevance(
    models: Models, sent: Sent | None, name: str, label: str | None, templates: str,
    advance: Callable[[float], None],
) -> Image.Image:  # fmt: skip
    """Where a model looked for a label."""
    if not label:
        raise InputError("there is no label to look for", hint="classify a picture first")
    image, model = sent_image(sent), models.wait_for(name)
    rows = models.label_bank(model, [label], parse_templates(templates)).embeds
    pixels = as_seen(model, image)
    return draw(pixels, relevance(model, pixels, rows[0], advance=advance))


def choose_preset(models: Models, name: str) -> tuple[str, str]:
    """Labels and templates of a list, one per line."""
    table = {**PRESETS, **_baked_presets(models)}
    preset = lookup(table, name, kind="label list")()
    return "\n".join(preset.labels), "\n".join(preset.templates)


def first_preset(models: Models) -> list[Any]:
    """What the first model that is ready was baked with becomes what the page begins with."""
    model = models.first_ready()
    baked = _baked_presets(models)
    own = [name for name in baked if model is not None and name.startswith(f"{model.name}: ")]
    choices = [*PRESETS, *baked]
    if not own or own[0].endswith(": scenes"):  # which the page begins with anyway
        return [gr.Dropdown(choices=choices), gr.update(), gr.update()]
    return [gr.Dropdown(choices=choices, value=own[0]), *choose_preset(models, own[0])]


def _baked_presets(models: Models) -> dict[str, Callable[[], Preset]]:
    return {
        f"{model.name}: {bank.name}": functools.partial(Preset, bank.classnames, bank.templates)
        for model in models.loaded()
        for bank in model.subject.label_banks.values()
    }


def _question(labels: str, templates: str, temperature: float, with_none: bool) -> Question:
    return Question(
        parse_labels(labels), parse_templates(templates), float(temperature), bool(with_none)
    )


def _ask_each(
    models: Models, chosen: Sequence[str], image: Image.Image, question: Question
) -> dict[str, Answer]:
    """The chosen models' answers, in turn; one that cannot answer warns, unless none can."""
    if not chosen:
        raise InputError("no model is chosen", hint="tick one below the labels")
    found: dict[str, Answer] = {}
    errors: list[DimeFMError] = []
    for name in [name for name in models.names if name in chosen]:
        try:
            found[name] = classify(models, models.wait_for(name), image, question)
        except DimeFMError as error:
            errors.append(error)
    if not found:
        raise errors[0] if errors else InputError("no model of that name is here")
    for told in errors:
        gr.Warning(html.escape(str(told)))
    return found


def _bars(models: Models, found: dict[str, Answer], top_k: int) -> list[Any]:
    bars = []
    for name in models.names:
        answer = found.get(name)
        if answer is None:
            bars.append(gr.Label(visible=False))
            continue
        shown = dict(answer.ranked[:top_k])
        shown |= {label: share for label, share in answer.ranked if label == NONE}
        bars.append(gr.Label(value=shown, visible=True))
    return bars


def _chart(shown: Sequence[Past]) -> Any:
    """The time of each answer; numbers as words, or the axis would tell of picture 1.5."""
    points = [{"picture": str(p.picture), "model": p.model, "ms": p.ms} for p in shown]
    order = list(dict.fromkeys(point["picture"] for point in points))
    return gr.LinePlot(value=pd.DataFrame(points), sort=order, visible=len(order) > 1)


def _row(model: Model, answer: Answer, agreed: Mapping[str, bool]) -> list[str]:
    """One line of the table; `agreed` is with the first model, by this visitor's pictures."""
    stages = (answer.total_ms, answer.image_ms, answer.prepare_ms, answer.labels_ms, answer.rank_ms)
    size = model.subject.size_mib
    return [
        model.name,
        f"{answer.top} ({100 * answer.ranked[0][1]:.0f}%)",
        f"{sum(agreed.values())} of {len(agreed)}",
        *(f"{ms:.1f}" for ms in stages),
        f"{size:.1f}" if size else "",
        model.precision,
        model.runtime,
    ]
