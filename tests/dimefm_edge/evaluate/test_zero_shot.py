"""Zero-shot accuracy against a count made one image at a time."""

from __future__ import annotations

import io

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from dimefm_edge.data.images import BadImageError, LabelledSet, decode_image, open_labelled
from dimefm_edge.errors import DataError
from dimefm_edge.evaluate.zero_shot import evaluate_zero_shot
from dimefm_edge.labels import LabelBank, build_label_bank
from dimefm_edge.preprocess import PreprocessSpec, resize_image

SPEC = PreprocessSpec(image_size=4)


class NumberedPool:
    """Images of one colour that tells their row; rows in `bad` are damaged files."""

    fingerprint = "0" * 16

    def __init__(self, count: int, bad: frozenset[int] = frozenset()) -> None:
        self._count, self._bad = count, bad

    def __len__(self) -> int:
        return self._count

    def name(self, row: int) -> str:
        return f"image {row}"

    def load(self, row: int) -> Image.Image:
        stream = io.BytesIO()
        Image.new("RGB", (5, 6), (row // 256, row % 256, 9)).save(stream, "PNG")
        data = stream.getvalue()
        return decode_image(data[:40] if row in self._bad else data, self.name(row))


def row_of(pixels: np.ndarray) -> np.ndarray:
    return pixels[:, 0, 0, 0].astype(int) * 256 + pixels[:, 0, 0, 1]


def make_set(labels: list[int], num_classes: int, bad: frozenset[int] = frozenset()):
    names = tuple(f"class {i}" for i in range(num_classes))
    return LabelledSet("toy", NumberedPool(len(labels), bad), np.asarray(labels, np.int64), names)


def unit(rows: np.ndarray) -> np.ndarray:
    return (rows / np.linalg.norm(rows, axis=-1, keepdims=True)).astype(np.float32)


def score(labelled: LabelledSet, embeds: np.ndarray, class_embeds: np.ndarray, **options):
    bank = LabelBank("toy", labelled.classnames, ("{c}",), class_embeds)
    return evaluate_zero_shot(lambda p: embeds[row_of(p)], SPEC, labelled, bank, **options)


@st.composite
def cases(draw):
    """Few directions, so that classes tie often; some images cannot be read."""
    num_classes, count = draw(st.integers(2, 9)), draw(st.integers(1, 14))
    corner = st.sampled_from([-1.0, 0.0, 1.0])
    vector = st.tuples(corner, corner, corner, corner)
    axis = st.integers(0, 3)
    class_embeds = np.eye(4, dtype=np.float32)[[draw(axis) for _ in range(num_classes)]]
    class_embeds *= np.asarray([[draw(st.sampled_from([-1, 1]))] for _ in range(num_classes)])
    embeds = np.asarray([draw(vector) for _ in range(count)], np.float32)
    labels = [draw(st.integers(0, num_classes - 1)) for _ in range(count)]
    bad = draw(st.sets(st.integers(0, count - 1), max_size=count - 1))
    return class_embeds.astype(np.float32), embeds, labels, frozenset(bad)


@settings(deadline=None, max_examples=60)
@given(cases(), st.integers(1, 6))
def test_top1_and_top5_are_those_of_sorting_the_classes(case, batch_size):
    class_embeds, embeds, labels, bad = case
    places = []
    for row, label in enumerate(labels):
        if row not in bad:
            scores = [sum(float(embeds[row][i] * c[i]) for i in range(4)) for c in class_embeds]
            order = sorted(range(len(scores)), key=lambda i: (-scores[i], i))
            places.append(order.index(label))
    labelled = make_set(labels, len(class_embeds), bad)
    report = score(labelled, embeds, class_embeds, batch_size=batch_size, workers=1)
    assert report.top1_pct == pytest.approx(100 * sum(p == 0 for p in places) / len(places))
    assert report.top5_pct == pytest.approx(100 * sum(p < 5 for p in places) / len(places))
    assert (report.num_images, report.num_bad) == (len(places), len(bad))
    assert report.num_classes == len(class_embeds)
    assert report.chance_pct == pytest.approx(100 / len(class_embeds))


def test_many_images_in_many_batches():
    rng = np.random.default_rng(0)
    class_embeds = unit(rng.normal(size=(30, 16)))
    labels = rng.integers(0, 30, 701).tolist()
    embeds = unit(class_embeds[labels] + 0.5 * rng.normal(size=(701, 16)))
    top5 = np.argsort(-(embeds @ class_embeds.T), axis=1)[:, :5]
    report = score(make_set(labels, 30), embeds, class_embeds, batch_size=100)
    assert report.num_images == 701
    assert report.top1_pct == pytest.approx(100 * np.mean(top5[:, 0] == labels))
    assert report.top5_pct == pytest.approx(
        100 * np.mean([label in row for label, row in zip(labels, top5, strict=True)])
    )
    assert 5 < report.top1_pct < report.top5_pct < 99  # neither is trivial


@pytest.mark.filterwarnings("ignore:invalid value encountered in matmul")
@pytest.mark.parametrize("value", [0.0, np.nan, np.inf])
def test_a_model_that_says_nothing_scores_no_more_than_one_class(value):
    labels = list(range(10))
    embeds = np.full((10, 4), value, np.float32)
    report = score(make_set(labels, 10), embeds, unit(np.ones((10, 4))))
    assert report.top1_pct == (10 if value == 0 else 0)
    assert report.top5_pct == (50 if value == 0 else 0)


def test_not_finite_is_wrong_even_with_few_classes():
    embeds = unit(np.eye(3))
    embeds[1] = np.nan
    report = score(make_set([0, 1, 2], 3), embeds, unit(np.eye(3)))
    assert report.top1_pct == pytest.approx(200 / 3)
    assert report.top5_pct == pytest.approx(200 / 3)


def test_images_that_cannot_be_read_are_counted_and_left_out():
    labels = [0, 1, 2, 0, 1, 2]
    bad = frozenset({0, 1, 5})
    embeds = unit(np.eye(3))[[0, 1, 2, 1, 1, 2]]  # rows 2 and 4 are right, 3 is wrong
    report = score(make_set(labels, 3, bad), embeds, unit(np.eye(3)), batch_size=2)
    assert (report.num_images, report.num_bad) == (3, 3)
    assert report.top1_pct == pytest.approx(200 / 3)


def test_no_image_can_be_read():
    labelled = make_set([0, 1], 2, frozenset({0, 1}))
    with pytest.raises(BadImageError):
        labelled.pool.load(0)
    with pytest.raises(DataError, match="no image of the test set 'toy' could be read"):
        score(labelled, unit(np.eye(2)), unit(np.eye(2)))


@pytest.mark.parametrize(
    "names", [("class 0", "class 1", "class 2"), ("class 1", "class 0"), ("Class 0", "class 1")]
)
def test_a_bank_of_other_classes_is_refused(names):
    labelled = make_set([0, 1], 2)
    bank = LabelBank("other", names, ("{c}",), unit(np.eye(3))[: len(names)])

    def never(_):
        raise AssertionError("asked before the check")

    with pytest.raises(DataError, match=r"label set 'other' .*not the test set 'toy'") as caught:
        evaluate_zero_shot(never, SPEC, labelled, bank)
    assert "own class names" in str(caught.value)


def test_a_real_teacher_on_a_real_folder(tiny_teacher_dir, labelled_dir):
    from dimefm_edge.teacher import load_teacher

    teacher = load_teacher(str(tiny_teacher_dir), device="cpu")
    labelled = open_labelled(str(labelled_dir))
    bank = build_label_bank(
        labelled.name, labelled.classnames, labelled.templates, teacher.encode_texts
    )
    report = evaluate_zero_shot(
        teacher.encode_images, teacher.preprocess, labelled, bank, batch_size=5
    )
    texts = teacher.encode_texts([f"a photo of a {name}." for name in ("cat", "dog", "eel")])
    hits = 0
    for label, name in enumerate(("cat", "dog", "eel")):
        for path in sorted((labelled_dir / name).iterdir()):
            pixels = resize_image(Image.open(path), teacher.preprocess)
            hits += int(np.argmax(texts @ teacher.encode_images(pixels[None])[0])) == label
    assert (report.name, report.num_images, report.num_bad) == (labelled_dir.name, 12, 0)
    assert report.top1_pct == pytest.approx(100 * hits / 12)
    assert report.top5_pct == 100  # there are three classes
