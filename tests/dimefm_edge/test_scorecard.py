"""All measures of one subject, of a real tiny teacher; each image is embedded once."""

from __future__ import annotations

import dataclasses
from collections import Counter

import numpy as np
import pytest

from dimefm_edge.data.captioned import open_captioned
from dimefm_edge.data.images import open_labelled
from dimefm_edge.data.multilabel import MultiLabelSet
from dimefm_edge.errors import CheckpointError, InputError
from dimefm_edge.evaluate.retrieval import RetrievalReport
from dimefm_edge.scorecard import (
    EvalPlan,
    Figure,
    SetScore,
    SubjectScore,
    figures_of,
    retention_pct,
    score_subject,
)
from dimefm_edge.subjects import load_subject
from dimefm_edge.suites import EvalSet


@pytest.fixture(scope="module")
def subject(tiny_teacher_dir):
    return load_subject(tiny_teacher_dir, device="cpu")


@pytest.fixture
def counted(subject):
    """The subject, and how many images it was given."""
    seen = Counter()

    def encode(pixels: np.ndarray) -> np.ndarray:
        seen["images"] += len(pixels)
        return subject.encode_pixels(pixels)

    return dataclasses.replace(subject, encode_pixels=encode), seen


def test_every_measure_reads_the_same_embeddings(counted, labelled_dir):
    subject, seen = counted
    test = open_labelled(str(labelled_dir))
    plan = EvalPlan(
        sets=(EvalSet(test, "mean_per_class", train=test),),
        captioned=(open_captioned("scenes:6"),),
        with_ece=True,
    )
    score = score_subject(subject, plan, subject.encode_texts)
    # 12 test images once, the same 12 as training images once, and 6 with captions
    assert seen["images"] == 12 + 12 + 6
    (entry,) = score.sets
    assert entry.zero_shot is not None
    assert entry.calibration is not None
    assert entry.linear_probe is not None
    assert entry.calibration.accuracy_pct == pytest.approx(entry.zero_shot.top1_pct)
    assert entry.calibration.logit_scale == subject.logit_scale
    assert entry.value_pct == pytest.approx(entry.zero_shot.top1_pct)  # four images of each class
    assert entry.linear_probe.metric == "mean_per_class"
    assert (entry.corruptions, entry.shift) == (None, None)
    assert score.retrieval[0].num_images == 6
    measures = [f.measure for f in figures_of(score)]
    assert measures[:4] == [
        "zero-shot mean per class", "zero-shot top-1", "zero-shot top-5",
        "linear probe mean per class",
    ]  # fmt: skip
    assert "text to image recall@10" in measures


def test_a_training_set_is_embedded_once_for_all_its_test_sets(counted, labelled_dir):
    subject, seen = counted
    test = open_labelled(str(labelled_dir))
    train = open_labelled(str(labelled_dir))
    again = dataclasses.replace(test, name="again")
    plan = EvalPlan(sets=(EvalSet(test, train=train), EvalSet(again, train=train)))
    score = score_subject(subject, plan, subject.encode_texts)
    assert seen["images"] == 3 * 12
    first, second = (entry.linear_probe for entry in score.sets)
    assert dataclasses.replace(second, name=first.name) == first


def test_shift_and_corruptions(counted, labelled_dir):
    subject, seen = counted
    test = open_labelled(str(labelled_dir))
    plan = EvalPlan(
        sets=(EvalSet(test), EvalSet(dataclasses.replace(test, name="shifted"))),
        reference=test.name,
        with_corruptions=True,
        corruption_images=2,
    )
    score = score_subject(subject, plan, subject.encode_texts)
    assert seen["images"] == 2 * (12 + 2 * 76)
    clean, shifted = score.sets
    assert clean.shift is None
    assert shifted.shift is not None
    assert shifted.shift.drop_points == 0
    assert shifted.corruptions is not None
    assert shifted.corruptions.num_images == 2
    values = score.to_dict()
    assert values["sets"][1]["shift"]["drop_points"] == 0
    assert values["sets"][1]["corruptions"]["mean_top1_pct"] == (shifted.corruptions.mean_top1_pct)
    compared = figures_of(score, score)
    assert Figure("shifted", "drop from " + test.name + ", points", 0.0, False) in compared
    mce = [f.value for f in compared if f.measure == "mCE, first model 100"]
    assert mce == pytest.approx([100, 100], nan_ok=True)


def test_several_classes_an_image(subject, labelled_dir):
    test = open_labelled(str(labelled_dir))
    targets = np.eye(3, dtype=bool)[test.labels]
    multi = MultiLabelSet("voc", test.pool, targets, test.classnames, test.templates)
    plan = EvalPlan(sets=(EvalSet(multi, "map_11_point", train=multi),), with_ece=True)
    score = score_subject(subject, plan, subject.encode_texts)
    (entry,) = score.sets
    assert 0 < entry.value_pct <= 100
    assert (entry.zero_shot, entry.calibration) == (None, None)
    assert entry.linear_probe is not None
    assert entry.linear_probe.metric == "map_11_point"
    assert [f.measure for f in figures_of(score)] == [
        "zero-shot 11-point mAP", "linear probe 11-point mAP",
    ]  # fmt: skip
    assert entry.num_classes == 3


def test_a_subject_without_a_text_side(tiny_bundle_dir, labelled_dir):
    bundle = load_subject(tiny_bundle_dir)
    test = open_labelled(str(labelled_dir))
    score = score_subject(bundle, EvalPlan(sets=(EvalSet(test),)))
    assert score.sets[0].num_images == 12  # by the class names that it carries
    with pytest.raises(InputError, match="no text side, which retrieval needs") as caught:
        score_subject(bundle, EvalPlan(sets=(), captioned=(open_captioned("scenes:2"),)))
    assert "--teacher" in str(caught.value.hint)
    other = dataclasses.replace(test, classnames=("fox", "gnu", "hen"))
    with pytest.raises(CheckpointError, match="does not carry the class names"):
        score_subject(bundle, EvalPlan(sets=(EvalSet(other),)))


def test_means_and_retention_by_hand():
    def score(*values: float) -> SubjectScore:
        sets = tuple(SetScore(f"set {i}", "accuracy", v, 10, 2, 0) for i, v in enumerate(values))
        recalls = {1: 10.0, 5: 20.0, 10: 30.0}
        return SubjectScore("x", "run", sets, (RetrievalReport("c", recalls, recalls, 1, 1, 1, 0),))

    teacher, student = score(80, 40), score(60, 40)
    assert student.mean_pct == 50
    assert SubjectScore("x", "run", ()).mean_pct is None
    # Where sets are shifted from a reference, the mean is over the shifted ones.
    shifted = dataclasses.replace(score(80, 40, 20), reference="set 0")
    assert shifted.mean_pct == 30
    assert Figure("mean of 2 sets", "zero-shot", 30) in figures_of(shifted)
    assert dataclasses.replace(score(80), reference="set 0").mean_pct == 80
    figures = figures_of(student)
    assert figures[-1] == Figure("mean of 2 sets", "zero-shot", 50)
    shares = [retention_pct(figure, figures_of(teacher)) for figure in figures]
    assert shares[:2] == [75, 100]
    assert shares[-1] == pytest.approx(100 * 50 / 60)
    assert retention_pct(Figure("set 0", "ECE", 3, False), [Figure("set 0", "ECE", 3)]) is None
    assert retention_pct(Figure("a", "b", 3), [Figure("a", "b", 0)]) is None
    assert retention_pct(Figure("a", "b", 3), []) is None
    assert student.to_dict()["retrieval"][0]["mean_recall_pct"] == pytest.approx(20)
