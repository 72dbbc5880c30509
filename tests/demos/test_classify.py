"""The page's answers are the runtime's own, with the page's extras on top."""

from __future__ import annotations

import pytest

from dimefm_demo.classify import NONE, Question, classify, other_names
from dimefm_demo.presets import PRESETS
from dimefm_edge.errors import CheckpointError, DataError, InputError
from dimefm_edge.runtime import ZeroShotClassifier
from tests.demos import bad_files as bad

SCENES = PRESETS["scenes"]()
LABELS = ("red ladder", "blue ladder", "red ring", "green heart")


def ask(models, name, image, **question):
    options = {"labels": SCENES.labels, "templates": SCENES.templates, **question}
    return classify(models, models.wait_for(name), image, Question(**options))


@pytest.mark.parametrize("name", ["sample", "baked"])
def test_the_answer_is_the_runtimes(name, models, sample_dir):
    image = bad.scene()
    answer = ask(models, name, image)
    (wanted,) = ZeroShotClassifier(sample_dir).classify([image], labels="scenes", top_k=96)
    assert [label for label, _ in answer.ranked] == [label for label, _ in wanted]
    assert [p for _, p in answer.ranked] == pytest.approx([p for _, p in wanted], abs=1e-5)
    assert answer.top == "red ladder"
    assert answer.model == name
    stages = (answer.labels_ms, answer.prepare_ms, answer.image_ms, answer.rank_ms)
    assert min(stages) > 0
    assert answer.total_ms == pytest.approx(sum(stages))


def test_temperature_flattens_and_keeps_the_order(models):
    cold, warm = (ask(models, "sample", bad.scene(), temperature=t) for t in (1, 4))
    assert [label for label, _ in cold.ranked] == [label for label, _ in warm.ranked]
    assert cold.ranked[0][1] > warm.ranked[0][1]
    assert sum(p for _, p in warm.ranked) == pytest.approx(1)
    with pytest.raises(InputError, match=r"temperature must be 0\.01 at least, got nan"):
        Question(("a",), temperature=float("nan"))


@pytest.mark.parametrize("name", ["sample", "baked"])
@pytest.mark.parametrize(
    ("shown", "top"), [("red ladder", "red ladder"), ("white circle", NONE), ("pink cross", NONE)]
)
def test_none_of_these_wins_when_none_is_right(shown, top, name, models):
    names = [label for label in SCENES.labels if shown in label]
    answer = ask(models, name, bad.scene(names[0]), labels=LABELS, with_none=True)
    assert answer.top == (top if names[0] not in LABELS else names[0])
    assert len(answer.ranked) == len(LABELS) + 1
    assert sum(p for _, p in answer.ranked) == pytest.approx(1)


def test_other_names_say_nothing_of_the_labels(models):
    others = other_names(models.wait_for("sample"), ("Red star", "ladder"), has_text=True)
    assert "blue heart" in others
    assert not {name for name in others if "ladder" in name or name.endswith(" red star")}


def test_an_unknown_label_needs_a_text_side(models):
    with pytest.raises(CheckpointError, match=r"baked has no text side.*scenes \(96\)"):
        ask(models, "baked", bad.scene(), labels=("a dog",))
    with pytest.raises(DataError, match=r"the template 'a photo' has no \{c\}"):
        ask(models, "sample", bad.scene(), templates=("a photo",))


def test_too_many_sentences_are_refused():
    with pytest.raises(InputError, match="4,000 labels in 3 templates are 12,000 sentences"):
        Question(tuple(map(str, range(4000))), ("{c}", "a {c}", "the {c}"))


def test_a_thousand_labels_are_usable(models):
    labels = (*LABELS, *(f"thing number {i}" for i in range(996)))
    first = ask(models, "sample", bad.scene(), labels=labels, templates=("a {c}.",))
    assert len(first.ranked) == 1000
    again = ask(models, "sample", bad.scene(), labels=labels, templates=("a {c}.",))
    assert again.labels_ms < first.labels_ms / 4
