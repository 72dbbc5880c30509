"""What the classify tab shows for what it is sent, without a browser."""

from __future__ import annotations

import pytest

from dimefm_demo.classify import NONE
from dimefm_demo.page_answers import (
    answer_api,
    answer_frame,
    answer_picture,
    choose_preset,
    first_preset,
    show_relevance,
)
from dimefm_edge.errors import DataError, InputError, UnknownNameError
from tests.demos import bad_files as bad

LABELS = "red ladder, blue cross, green heart"
TEMPLATE = "a picture of a {c}."


@pytest.fixture
def photo(tmp_path):
    path = tmp_path / "photo.png"
    path.write_bytes(bad.encoded(bad.scene(), "PNG"))
    return {"path": str(path), "orig_name": "photo.png"}


def ask(models, photo, *, history=(), chosen=("sample", "baked"), with_none=False, top_k=2):
    sent = (photo, LABELS, TEMPLATE, 1.0, with_none, list(chosen), top_k, list(history))
    return answer_picture(models, *sent)


def test_bars_table_chart_and_choices(models, photo):
    first, second, rows, chart, history, choices, heat_map = ask(models, photo)
    assert first.value["confidences"][0]["label"] == "red ladder"
    assert choices.choices[0] == ("red ladder", "red ladder")
    assert len(first.value["confidences"]) == len(second.value["confidences"]) == 2
    assert [row[0] for row in rows] == ["sample", "baked"]
    assert rows[1][1].startswith("red ladder (")
    assert rows[1][2] == "1 of 1"
    assert not chart.visible  # of one picture there is no line
    assert heat_map is None
    *_, rows, chart, history, _, _ = ask(models, photo, history=history)
    assert chart.visible
    assert [(past.picture, past.model) for past in history] == [
        (1, "sample"), (1, "baked"), (2, "sample"), (2, "baked")
    ]  # fmt: skip
    assert rows[0][2] == "1 of 1"  # the same picture, asked twice


def test_none_of_these_is_shown_but_not_looked_for(models, photo):
    first, *_, choices, _ = ask(models, photo, with_none=True, top_k=1, chosen=["sample"])
    assert [row["label"] for row in first.value["confidences"]] == ["red ladder", NONE]
    assert [value for _, value in choices.choices] == ["red ladder"]


def test_the_chart_forgets(models, photo):
    history: list = []
    for _ in range(50):
        *_, history, _, _ = ask(models, photo, history=history, chosen=["baked"])
    assert len(history) <= 40 * 2 + 1
    assert history[-1].picture == 50


def test_nothing_sent_changes_nothing(models):
    shown = ask(models, None)
    assert len(shown) == 7
    assert all("value" not in update for update in shown)


@pytest.mark.parametrize(
    ("chosen", "why"),
    [([], "no model is chosen"), (["nobody"], "no model of that name is here")],
)
def test_no_model_says_so(chosen, why, models, photo):
    with pytest.raises(InputError, match=why):
        ask(models, photo, chosen=chosen)


def test_frames_are_counted_and_their_errors_are_words(models, photo):
    times: list[float] = []
    for _ in range(12):
        *_, said = answer_frame(models, photo, LABELS, TEMPLATE, 1, False, ["baked"], 3, times)
    assert len(times) == 10
    assert "frames/s: baked " in said
    *_, said = answer_frame(models, photo, " ", TEMPLATE, 1, False, ["baked"], 3, times)
    assert said.startswith("there are no labels")


def test_programs_get_plain_values(models, photo):
    answer = answer_api(models, photo, LABELS, TEMPLATE, 1, False, "sample", 1)
    assert answer["ranked"][0]["label"] == "red ladder"
    assert set(answer) == {
        "model", "ranked", "labels_ms", "prepare_ms", "image_ms", "rank_ms", "total_ms"
    }  # fmt: skip


def test_lists_of_labels(models):
    labels, templates = choose_preset(models, "baked: scenes")
    assert labels.splitlines()[0] == "checkered blue star"
    assert "a {c}." in templates.splitlines()
    with pytest.raises(UnknownNameError, match=r"unknown label list 'CIFAR10'\. Did you mean"):
        choose_preset(models, "CIFAR10")
    preset, *_ = first_preset(models)
    assert [value for _, value in preset.choices] == [
        "scenes", "CIFAR-10", "ImageNet", "sample: scenes", "baked: scenes"
    ]  # fmt: skip


def test_relevance_needs_a_label_and_a_picture(models, photo):
    with pytest.raises(InputError, match="there is no label to look for"):
        show_relevance(models, photo, "sample", None, TEMPLATE, print)
    with pytest.raises(DataError, match=r"has no \{c\}"):
        show_relevance(models, photo, "sample", "dog", "a photo", print)
    shares: list[float] = []
    shown = show_relevance(models, photo, "baked", "red ladder", TEMPLATE, shares.append)
    assert shown.size == (384, 384)
    assert shares[-1] == 1
