from __future__ import annotations

import numpy as np
import pytest

from dimefm_edge.data.images import decode_image, open_labelled
from dimefm_edge.data.labelled import ClassNames, open_classes
from dimefm_edge.data.scenes import scene_test_set
from dimefm_edge.errors import DataError

CLASSNAMES = b"red star\nblue ring\ncircle\n"
TEMPLATES = b"a photo of a {c}.\n\na drawing of one {c}.\n"


@pytest.fixture
def benchmark_dir(tmp_path, encoded, write_files, write_tar):
    """A CLIP-benchmark folder: two shards, image i of class i % 3."""
    root = write_files(
        tmp_path / "shapes",
        {"classnames.txt": CLASSNAMES, "zeroshot_classification_templates.txt": TEMPLATES},
    )
    for shard in range(2):
        members = {}
        for i in range(shard * 4, shard * 4 + 4):
            members |= {f"{i:04d}.cls": str(i % 3).encode(), f"{i:04d}.jpg": encoded(i)}
        write_tar(root / "test" / f"{shard}.tar", members)
    return root


def test_clip_benchmark_folder(benchmark_dir, encoded):
    labelled = open_labelled(str(benchmark_dir))
    assert labelled.name == "shapes"
    assert labelled.classnames == ("red star", "blue ring", "circle")
    assert labelled.templates == ("a photo of a {c}.", "a drawing of one {c}.")
    assert labelled.labels.tolist() == [0, 1, 2, 0, 1, 2, 0, 1]
    assert labelled.labels.dtype == np.int64
    for row in range(8):
        assert labelled.pool.load(row).tobytes() == decode_image(encoded(row), "").tobytes()


def test_class_names_alone(benchmark_dir, tmp_path):
    """From a labelled set, or from its classnames.txt: the same."""
    wanted = ("shapes", ("red star", "blue ring", "circle"))
    templates = ("a photo of a {c}.", "a drawing of one {c}.")
    assert open_classes(str(benchmark_dir)) == (*wanted, templates)
    assert open_classes(str(benchmark_dir / "classnames.txt")) == (*wanted, templates)
    assert open_classes("scenes")[0] == "scenes"
    (tmp_path / "pets.txt").write_text("cat\ndog\n")
    assert open_classes(str(tmp_path / "pets.txt")) == (
        "pets", ("cat", "dog"), ("a photo of a {c}.",),
    )  # fmt: skip
    with pytest.raises(DataError, match=r"no class names at gone\.txt"):
        open_classes("gone.txt")
    (tmp_path / "pets.csv").write_text("cat\ndog\n")
    with pytest.raises(DataError, match=r"pets\.csv is no label set") as error:
        open_classes(str(tmp_path / "pets.csv"))
    assert "a .txt file with one class name a line" in str(error.value.hint)
    (tmp_path / "pets.txt").write_text("cat\n\ndog\n")
    with pytest.raises(DataError, match=r"pets\.txt cannot be used: line 2 is empty"):
        open_classes(str(tmp_path / "pets.txt"))


def test_clip_benchmark_without_templates_uses_the_default(benchmark_dir):
    (benchmark_dir / "zeroshot_classification_templates.txt").unlink()
    assert open_labelled(str(benchmark_dir)).templates == ("a photo of a {c}.",)


def test_class_folders(tmp_path, encoded, write_files):
    files = {"c10/a/1.jpg": 1, "c2/1.jpg": 2, "c2/2.png": 3, "big_cat/1.jpg": 4}
    root = write_files(tmp_path / "animals", {k: encoded(s) for k, s in files.items()})
    labelled = open_labelled(f"{root}/")
    assert labelled.name == "animals"
    assert labelled.classnames == ("big cat", "c2", "c10")
    assert labelled.labels.tolist() == [0, 1, 1, 2]
    (root / "classnames.txt").write_text("lynx\ncow\ncamel\n")
    assert open_labelled(str(root)).classnames == ("lynx", "cow", "camel")
    (root / "classnames.txt").write_text("lynx\ncow\n")
    with pytest.raises(DataError, match="names 2 classes, and there are 3 class folders"):
        open_labelled(str(root))


def test_class_folder_tars(tmp_path, encoded, write_tar):
    for shard in range(2):
        members = {f"set/{c}/{shard}.jpg": encoded(i) for i, c in enumerate(("ship", "frog"))}
        write_tar(tmp_path / "tars" / f"s{shard}.tar", members)
    for source, name in (
        (f"{tmp_path}/tars", "tars"),
        (f"{tmp_path}/tars/*.tar", "tars"),
        (f"{tmp_path}/tars/s0.tar", "s0"),
    ):
        labelled = open_labelled(source)
        assert labelled.name == name
        assert labelled.classnames == ("frog", "ship")
        assert labelled.labels.tolist() == [1, 0] * (len(labelled.pool) // 2)


@pytest.mark.parametrize(("name", "count"), [("scenes", 96), ("scenes-relations", 48)])
def test_scenes(name, count):
    labelled = open_labelled(name)
    known = scene_test_set(name)
    assert (labelled.name, len(labelled.classnames)) == (name, count)
    assert len(labelled.pool) == len(labelled.labels) == 20 * count
    assert labelled.templates == known.templates
    assert labelled.classnames[labelled.labels[100]] == known.classnames[known.label(100)]
    assert labelled.pool.load(9).tobytes() == known.image(9).tobytes()
    assert labelled.pool.fingerprint != open_labelled("scenes-relations").pool.fingerprint or (
        name == "scenes-relations"
    )
    with pytest.raises(IndexError):
        labelled.pool.load(20 * count)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"classnames.txt": b"one\ntwo\n"}, "2.jpg is of class 2, .* names 2 classes"),
        ({"classnames.txt": b"one\n\nthree\n"}, "line 2 is empty"),
        ({"classnames.txt": b"one\n"}, "two classes or more"),
        ({"classnames.txt": b"caf\xe9\nb\nc\n"}, "cannot be read"),
        ({"zeroshot_classification_templates.txt": b"a photo of a {}.\n"}, "has no {c} where"),
    ],
)
def test_bad_lists_of_names(benchmark_dir, write_files, change, message):
    write_files(benchmark_dir, change)
    with pytest.raises(DataError, match=message):
        open_labelled(str(benchmark_dir))


def test_missing_classnames(benchmark_dir):
    (benchmark_dir / "classnames.txt").unlink()
    with pytest.raises(DataError, match=r"has \.cls files and no classnames\.txt"):
        open_labelled(str(benchmark_dir))


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ({"0.jpg": b"", "0.cls": b"1", "1.jpg": b""}, r"1\.jpg has no \.cls beside it"),
        ({"0.jpg": b"", "0.cls": b"one"}, r"0\.cls is no class number"),
        ({"0.jpg": b"", "0.cls": b"-1"}, "is of class -1"),
        ({"0.jpg": b""}, r"neither a class folder nor a \.cls"),
        ({"0.txt": b""}, "hold no image"),
        ({"ship/0.jpg": b""}, "one class folder only, 'ship'"),
    ],
)
def test_bad_tars(benchmark_dir, write_tar, members, message):
    (benchmark_dir / "test" / "1.tar").unlink()
    write_tar(benchmark_dir / "test" / "0.tar", members)
    with pytest.raises(DataError, match=message):
        open_labelled(str(benchmark_dir))


def test_what_is_no_test_set(tmp_path, encoded, write_files):
    write_files(tmp_path, {"empty/x.txt": b"", "loose/1.jpg": encoded(1), "a.csv": b""})
    for source, message in (
        ("empty", "holds no labelled image"),
        ("loose", r"1\.jpg is in no class folder \(1 such images\)"),
        ("a.csv", "is not a labelled test set"),
        ("lose", "lose does not exist; the nearest .* 'loose'"),
    ):
        with pytest.raises(DataError, match=message):
            open_labelled(f"{tmp_path}/{source}")


def test_the_training_split_of_a_benchmark_folder(benchmark_dir, encoded, write_tar):
    with pytest.raises(DataError, match=r"has no train/\*\.tar"):
        open_labelled(str(benchmark_dir), split="train")
    write_tar(benchmark_dir / "train" / "0.tar", {"a.cls": b"2", "a.jpg": encoded(9)})
    train = open_labelled(str(benchmark_dir), split="train")
    assert train.labels.tolist() == [2]
    assert train.classnames == open_labelled(str(benchmark_dir)).classnames


def test_class_names_that_the_set_lacks(benchmark_dir, tmp_path, encoded, write_files):
    names = ClassNames(by_number=("one", "two", "three"))
    # Its own come first.
    assert open_labelled(str(benchmark_dir), fallback=names).classnames[0] == "red star"
    (benchmark_dir / "classnames.txt").unlink()
    assert open_labelled(str(benchmark_dir), fallback=names).classnames == names.by_number
    with pytest.raises(DataError, match="the set names 2 classes"):
        open_labelled(str(benchmark_dir), fallback=ClassNames(by_number=("one", "two")))
    files = {f"n{i}/a.jpg": encoded(i) for i in (1, 2, 10)}
    root = str(write_files(tmp_path / "synsets", files))
    by_folder = {"n1": "tench", "n2": "goldfish", "n10": "cock"}
    found = open_labelled(root, fallback=ClassNames(by_folder=by_folder))
    assert found.classnames == ("tench", "goldfish", "cock")
    del by_folder["n2"]  # one that is not known: the folders' own names
    assert open_labelled(root, fallback=ClassNames(by_folder=by_folder)).classnames[1] == "n2"
    kept = open_labelled(root, fallback=ClassNames(by_folder=by_folder, leaves_out=True))
    assert (kept.classnames, kept.labels.tolist()) == (("tench", "cock"), [0, 1])
    in_order = ClassNames(by_number=("a", "b", "c"), in_order=True)
    assert open_labelled(root, fallback=in_order).classnames == ("a", "b", "c")
    with pytest.raises(DataError, match="none of the class folders"):
        open_labelled(root, fallback=ClassNames(leaves_out=True))


def test_scenes_train_has_the_classes_of_scenes_and_other_images():
    train, test = open_labelled("scenes-train"), open_labelled("scenes")
    assert train.classnames == test.classnames
    assert np.array_equal(train.labels, test.labels)
    assert train.pool.load(0).tobytes() != test.pool.load(0).tobytes()
