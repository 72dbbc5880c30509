"""Corruptions that are the same every time, and shift between sets, by hand."""

from __future__ import annotations

import sys
import threading

import numpy as np
import pytest

from dimefm_edge.data.images import open_labelled
from dimefm_edge.errors import DataError, MissingExtraError
from dimefm_edge.evaluate.robustness import (
    CORRUPTIONS,
    SEVERITIES,
    CorruptedPool,
    CorruptionReport,
    ScoredSet,
    chosen_rows,
    corrupt,
    effective_robustness,
    evaluate_corruptions,
    measure_shift,
    num_passes,
)
from dimefm_edge.labels import LabelBank
from dimefm_edge.preprocess import PreprocessSpec


@pytest.fixture(scope="module")
def picture() -> np.ndarray:
    from dimefm_edge.data.scenes import scene_image

    return np.asarray(scene_image(1))


def test_they_are_imagenet_cs():
    import imagecorruptions

    assert tuple(imagecorruptions.get_corruption_names("common")) == CORRUPTIONS
    assert num_passes() == 1 + 15 * 5


@pytest.mark.parametrize("side", [32, 64, 224])
@pytest.mark.parametrize("corruption", CORRUPTIONS)
def test_every_corruption_at_every_size(corruption, side, picture):
    from PIL import Image

    pixels = np.asarray(Image.fromarray(picture).resize((side, side)))
    before = pixels.copy()
    first = corrupt(pixels, corruption, 3, seed=5)
    assert first.shape == pixels.shape
    assert first.dtype == np.uint8
    assert np.array_equal(pixels, before)
    assert np.abs(first.astype(int) - pixels).mean() > 0.5
    np.random.seed(123)
    wanted = np.random.random()
    np.random.seed(123)
    assert np.array_equal(corrupt(pixels, corruption, 3, seed=5), first)
    assert np.random.random() == wanted  # numpy's own generator is left as it was


@pytest.mark.parametrize("corruption", ["gaussian_noise", "defocus_blur", "contrast", "pixelate"])
def test_greater_severity_changes_more(corruption, picture):
    changes = [
        np.abs(corrupt(picture, corruption, severity, seed=0).astype(int) - picture).mean()
        for severity in SEVERITIES
    ]
    assert changes == sorted(changes)
    assert changes[4] > 1.2 * changes[0]


def test_the_pool_corrupts_by_row_on_any_thread(labelled_dir):
    pool = open_labelled(str(labelled_dir)).pool
    noisy = CorruptedPool(pool, "glass_blur", 4, seed=1)
    wanted = [noisy.load(row).tobytes() for row in range(6)]
    found: dict[int, bytes] = {}

    def load(row: int) -> None:
        found[row] = noisy.load(row).tobytes()

    threads = [threading.Thread(target=load, args=(row,)) for row in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [found[row] for row in range(6)] == wanted
    assert CorruptedPool(pool, "glass_blur", 4, seed=2).load(0).tobytes() != wanted[0]
    assert len(noisy) == 12
    assert noisy.name(0).endswith("(glass_blur 4)")


def test_images_are_brought_to_one_size_before_corruption(tmp_path):
    from PIL import Image

    for name, size in (("large/0.png", (500, 300)), ("small/0.png", (20, 40))):
        (tmp_path / name).parent.mkdir()
        Image.new("RGB", size, "red").save(tmp_path / name)
    pool = open_labelled(str(tmp_path)).pool
    assert CorruptedPool(pool, None).load(0).size == (224, 224)
    assert CorruptedPool(pool, "contrast", 1).load(1).size == (32, 32)  # the least that works


def _brightness_bank(labelled) -> tuple[LabelBank, object]:
    """A model that tells dark images from bright ones, by their mean."""
    bank = LabelBank("x", labelled.classnames, ("{c}",), np.eye(2, dtype=np.float32))

    def encode(pixels: np.ndarray) -> np.ndarray:
        bright = pixels.reshape(len(pixels), -1).mean(1) > 127
        return np.eye(2, dtype=np.float32)[bright.astype(int)]

    return bank, encode


def test_a_model_that_brightness_misleads(tmp_path):
    from PIL import Image

    for name, value in (("bright", 200), ("dark", 90)):
        (tmp_path / name).mkdir()
        for number in range(3):
            grey = Image.new("RGB", (40, 40), (value + number,) * 3)
            grey.save(tmp_path / name / f"{number}.png")
    (tmp_path / "classnames.txt").write_text("bright\ndark\n")
    labelled = open_labelled(str(tmp_path))
    bank = LabelBank("x", labelled.classnames, ("{c}",), np.eye(2, dtype=np.float32)[::-1].copy())
    _, encode = _brightness_bank(labelled)
    seen = []
    report = evaluate_corruptions(
        encode, PreprocessSpec(image_size=8), labelled, bank, advance=seen.append
    )
    assert report.clean_top1_pct == 100
    assert report.num_images == 6
    assert list(report.top1_pct) == list(CORRUPTIONS)
    assert report.top1_pct["brightness"][0] == 100
    assert report.top1_pct["brightness"][4] == 50  # the dark ones are bright now
    assert report.top1_pct["pixelate"] == (100,) * 5
    assert report.mean_top1_pct == pytest.approx(
        np.mean([v for values in report.top1_pct.values() for v in values])
    )
    assert report.kept_pct == pytest.approx(report.mean_top1_pct)
    assert sum(seen) == 6 * num_passes()
    fewer = evaluate_corruptions(
        encode, PreprocessSpec(image_size=8), labelled, bank, num_images=2, seed=1
    )
    assert fewer.num_images == 2
    with pytest.raises(DataError, match="is not the test set"):
        evaluate_corruptions(
            encode, PreprocessSpec(image_size=8), labelled,
            LabelBank("y", ("a", "b"), ("{c}",), bank.embeds),
        )  # fmt: skip


def _report(values: dict[str, tuple[float, ...]]) -> CorruptionReport:
    return CorruptionReport("x", 90.0, values, 10)


def test_mean_corruption_error_by_hand():
    """Errors 10 + 30 against 20 + 60, and 50 + 50 against 40 + 60."""
    ours = _report({"fog": (90.0, 70.0), "snow": (50.0, 50.0)})
    theirs = _report({"fog": (80.0, 40.0), "snow": (60.0, 40.0)})
    assert ours.mean_corruption_error_pct(theirs) == pytest.approx(100 * (0.5 + 1.0) / 2)
    assert theirs.mean_corruption_error_pct(theirs) == pytest.approx(100)
    assert np.isnan(ours.mean_corruption_error_pct(_report({"fog": (100.0,), "snow": (100.0,)})))
    assert ours.mean_top1_pct == pytest.approx(65)
    assert ours.kept_pct == pytest.approx(100 * 65 / 90)


def test_rows_are_drawn_once_and_in_order():
    assert chosen_rows(5, 0, 0).tolist() == [0, 1, 2, 3, 4]
    assert chosen_rows(5, 9, 0).tolist() == [0, 1, 2, 3, 4]
    rows = chosen_rows(100, 10, 3)
    assert len(set(rows.tolist())) == 10
    assert rows.tolist() == sorted(rows)
    assert np.array_equal(rows, chosen_rows(100, 10, 3))


def test_shift_is_taken_on_shared_classes():
    """The reference's third class is not in the shifted set: its images and column are left out."""
    reference = ScoredSet(
        "clean", ("cat", "dog", "car"),
        np.asarray([[0.9, 0.1, 1.0], [0.2, 0.8, 0.1], [0.1, 0.3, 0.9], [0.6, 0.4, 0.0]]),
        np.asarray([0, 1, 2, 1]),
    )  # fmt: skip
    shifted = ScoredSet(
        "sketch", ("dog", "cat"), np.asarray([[0.9, 0.1], [0.7, 0.3]]), np.asarray([0, 1])
    )
    report = measure_shift(reference, shifted)
    # image 0 counts as right: `car` is no answer there; images 0, 1 right, 3 wrong
    assert report.reference_top1_pct == pytest.approx(200 / 3)
    assert report.top1_pct == 50
    assert report.num_classes == 2
    assert report.drop_points == pytest.approx(200 / 3 - 50)
    assert report.relative_drop_pct == pytest.approx(25)


def test_sets_that_share_too_little():
    left = ScoredSet("a", ("cat", "dog"), np.eye(2), np.asarray([0, 1]))
    right = ScoredSet("b", ("cat", "cow"), np.eye(2), np.asarray([0, 1]))
    with pytest.raises(DataError, match="'b' shares 1 class names with 'a'"):
        measure_shift(left, right)
    empty = ScoredSet("c", ("cat", "dog", "x"), np.eye(3)[2:], np.asarray([2]))
    with pytest.raises(DataError, match="no image of 'c' is of a class"):
        measure_shift(left, empty)


def test_effective_robustness_is_the_distance_from_the_line():
    clean = [50.0, 60.0, 70.0, 80.0]

    def line(percent: float, lift: float = 0.0) -> float:
        logit = 0.8 * np.log(percent / (100 - percent)) - 0.5 + lift
        return 100 / (1 + np.exp(-logit))

    on_it = [line(v) for v in clean]
    assert effective_robustness(clean, on_it) == pytest.approx([0] * 4, abs=1e-9)
    raised = [*on_it[:2], line(70, lift=0.6), on_it[3]]
    values = effective_robustness(clean, raised)
    assert np.argmax(values) == 2
    assert values[2] > 3
    with pytest.raises(DataError, match="three models or more that differ"):
        effective_robustness([50, 60], [40, 50])
    with pytest.raises(DataError, match="three models or more that differ"):
        effective_robustness([50, 50, 50], [40, 50, 60])


def test_without_the_library(monkeypatch, picture):
    monkeypatch.setitem(sys.modules, "imagecorruptions", None)
    with pytest.raises(MissingExtraError) as caught:
        corrupt(picture, "fog", 1, seed=0)
    assert caught.value.hint == "pip install 'dimefm_edge[eval]'"
