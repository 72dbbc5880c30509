"""Suites on small data sets in each layout: found, named, scored as they should; or missing."""

from __future__ import annotations

import io
import json
import struct
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dimefm_edge.data import benchmark_names
from dimefm_edge.data.benchmark_names import imagenet_classes, imagenet_templates
from dimefm_edge.data.labelled import LabelledSet
from dimefm_edge.data.multilabel import MultiLabelSet
from dimefm_edge.errors import ConfigError, DataError, UnknownNameError
from dimefm_edge.suites import list_suites, load_suite, open_suite


def png(seed: int) -> bytes:
    stream = io.BytesIO()
    noise = np.random.default_rng(seed).integers(0, 255, (12, 12, 3), dtype=np.uint8)
    Image.fromarray(noise).save(stream, "PNG")
    return stream.getvalue()


def npy(values: list[int]) -> bytes:
    stream = io.BytesIO()
    np.save(stream, np.asarray(values))
    return stream.getvalue()


def write(root: Path, files: dict[str, bytes]) -> Path:
    for name, data in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(data)
    return root


def write_tar(path: Path, members: dict[str, bytes]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as archive:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))


def wds(root: Path, labels: list[int], names: str | None, *, split: str = "test") -> None:
    """A CLIP-benchmark folder, with or without class names of its own."""
    members = {}
    for i, label in enumerate(labels):
        members |= {f"s{i}.png": png(i), f"s{i}.cls": str(label).encode()}
    write_tar(root / split / "0.tar", members)
    if names is not None:
        write(root, {"classnames.txt": names.encode()})


TEMPLATE = {"zeroshot_classification_templates.txt": b"a photo of a {c}.\n"}


@pytest.fixture
def tables(tmp_path_factory, monkeypatch):
    """A clip_benchmark with the names that the tests need, in its own layout."""
    root = tmp_path_factory.mktemp("packages")
    names = {"eurosat": ["forest", "river"], "mnist": [str(i) for i in range(10)],
             "caltech101_vtab": ["ant", "bass", "crab"]}  # fmt: skip
    keys = ("eurosat", "mnist", "caltech101", "cifar10", "voc2007_multilabel", "gtsrb")
    write(
        root / "clip_benchmark",
        {
            "__init__.py": b"",
            "datasets/en_classnames.json": json.dumps(names).encode(),
            "datasets/en_zeroshot_classification_templates.json": json.dumps(
                {key: [f"a {key} photo of {{c}}."] for key in keys}
            ).encode(),
        },
    )
    monkeypatch.syspath_prepend(str(root))
    benchmark_names._clip_benchmark.cache_clear()
    yield
    benchmark_names._clip_benchmark.cache_clear()


def opened(suite: str, root: Path, **options):
    found, missing = open_suite(load_suite(suite), root, **options)
    return {entry.name: entry for entry in found}, {item.name: item.reason for item in missing}


# ------------------------------------------------------------------------------ tables


def test_the_suites_that_ship():
    assert list_suites() == ["elevater", "imagenet", "imagenet-shifts"]
    elevater = load_suite("elevater")
    assert len(elevater.sets) == 20
    metrics = {entry.name: entry.metric for entry in elevater.sets if entry.metric != "accuracy"}
    assert metrics == {
        "caltech101": "mean_per_class", "fgvc-aircraft": "mean_per_class",
        "flowers102": "mean_per_class", "oxford-pets": "mean_per_class",
        "hateful-memes": "roc_auc", "voc2007": "map_11_point",
    }  # fmt: skip
    shifts = load_suite("imagenet-shifts")
    assert shifts.reference == "imagenet"
    assert [entry.name for entry in shifts.sets] == [
        "imagenet", "imagenet-v2", "imagenet-r", "imagenet-a", "imagenet-sketch", "objectnet",
    ]  # fmt: skip


def test_torchvision_has_the_classes_that_the_table_names():
    import inspect

    from torchvision import datasets

    for entry in load_suite("elevater").sets:
        if entry.torchvision is not None:
            parameters = inspect.signature(getattr(datasets, entry.torchvision["class"])).parameters
            assert "root" in parameters
            for split in ("test", "train"):
                assert set(entry.torchvision[split]) <= set(parameters)


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("title = 3", "is no suite: 'sets'"),
        ("sets = 3", "is no suite"),
        ("[[sets]]\nname = 'a'", "is no suite: 'places'"),
        ("[[sets]]\nname = 'a'\nplaces = 'a'", "must be a list of folders"),
        ("[[sets]]\nname = 'a'\nplaces = ['a']\nplace = 1", "unknown key place in a"),
        ("reference = 'b'\n[[sets]]\nname = 'a'\nplaces = ['a']", "'b' is none of its sets"),
        ("[[sets]]\nname='a'\nplaces=['a']\n[[sets]]\nname='a'\nplaces=['b']", "name of its own"),
        ("[[sets", "is no suite"),
    ],
)
def test_files_that_are_no_suite(text, complaint, tmp_path):
    (tmp_path / "mine.toml").write_text(text)
    with pytest.raises(ConfigError, match=complaint):
        load_suite(str(tmp_path / "mine.toml"))


def test_names_of_suites_and_metrics(tmp_path):
    with pytest.raises(UnknownNameError, match="Did you mean 'elevater'"):
        load_suite("elevator")
    with pytest.raises(ConfigError, match="no suite at"):
        load_suite(str(tmp_path / "gone.toml"))
    (tmp_path / "m.toml").write_text("[[sets]]\nname='a'\nplaces=['a']\nmetric='top7'")
    with pytest.raises(UnknownNameError, match="unknown metric 'top7'"):
        load_suite(str(tmp_path / "m.toml"))


# ----------------------------------------------------------------------------- ELEVATER


def test_elevater_in_every_layout(tmp_path, tables):
    wds(tmp_path / "wds_cifar10", [0, 1, 1], "plane\ncar\n")
    write(tmp_path / "wds_cifar10", {"zeroshot_classification_templates.txt": b"my {c}\n"})
    wds(tmp_path / "wds_cifar10", [1, 0], None, split="train")
    wds(tmp_path / "wds_vtab-caltech101", [2, 0], None)  # names are clip_benchmark's
    write(tmp_path, {f"eurosat/test/{n}/{i}.png": png(i)
                     for n in ("Forest", "River") for i in range(2)})  # fmt: skip
    root = tmp_path / "wds_voc2007_multilabel"
    write(root, {"classnames.txt": b"cat\ndog\n", "dataset_type.txt": b"multilabel\n"})
    write_tar(root / "test" / "0.tar", {"s0.png": png(0), "s0.npy": npy([1, 1])})
    wds(tmp_path / "hateful_memes", [0, 1], "meme\nhateful meme\n")
    raw = "mnist/MNIST/raw"
    write(
        tmp_path,
        {
            f"{raw}/t10k-images-idx3-ubyte": struct.pack(">iiii", 2051, 2, 28, 28) + bytes(1568),
            f"{raw}/t10k-labels-idx1-ubyte": struct.pack(">ii", 2049, 2) + bytes([7, 1]),
            f"{raw}/train-images-idx3-ubyte": struct.pack(">iiii", 2051, 1, 28, 28) + bytes(784),
            f"{raw}/train-labels-idx1-ubyte": struct.pack(">ii", 2049, 1) + bytes([3]),
        },
    )
    found, missing = opened("elevater", tmp_path, with_train=True)
    assert list(found) == ["caltech101", "cifar10", "eurosat", "hateful-memes", "mnist", "voc2007"]
    assert len(missing) == 14
    assert found["cifar10"].test.classnames == ("plane", "car")
    assert found["cifar10"].test.templates == ("my {c}",)
    assert found["cifar10"].train is not None
    assert found["cifar10"].train.labels.tolist() == [1, 0]
    assert found["caltech101"].test.classnames == ("ant", "bass", "crab")
    assert found["caltech101"].test.templates == ("a caltech101 photo of {c}.",)
    assert (found["caltech101"].metric, found["caltech101"].train) == ("mean_per_class", None)
    assert found["eurosat"].test.classnames == ("forest", "river")
    assert isinstance(found["voc2007"].test, MultiLabelSet)
    assert found["voc2007"].test.templates == ("a voc2007_multilabel photo of {c}.",)
    assert found["mnist"].test.labels.tolist() == [7, 1]
    assert found["mnist"].train.labels.tolist() == [3]
    assert "none of wds_gtsrb" in missing["gtsrb"]
    assert "torchvision finds no GTSRB" in missing["gtsrb"] or "clip_benchmark" in missing["gtsrb"]


def test_without_clip_benchmark_a_set_needs_templates_of_its_own(tmp_path, monkeypatch):
    import importlib.util

    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "clip_benchmark" else find(name)
    )
    benchmark_names._clip_benchmark.cache_clear()
    wds(tmp_path / "wds_cifar10", [0, 1], "plane\ncar\n")
    wds(tmp_path / "wds_vtab-eurosat", [0, 1], "forest\nriver\n")
    write(tmp_path / "wds_vtab-eurosat", TEMPLATE)
    found, missing = opened("elevater", tmp_path)
    assert list(found) == ["eurosat"]
    assert "which is not installed (pip install --no-deps clip-benchmark)" in missing["cifar10"]


def test_a_damaged_set_is_missing_with_its_reason(tmp_path, tables):
    wds(tmp_path / "wds_cifar10", [0, 1], "plane\ncar\n")
    wds(tmp_path / "wds_vtab-eurosat", [0, 5], "forest\nriver\n")
    found, missing = opened("elevater", tmp_path)
    assert list(found) == ["cifar10"]
    assert "s1.png is of class 5" in missing["eurosat"]


def test_nothing_is_there(tmp_path):
    with pytest.raises(DataError, match="none of the 20 sets of 'elevater' is in") as caught:
        opened("elevater", tmp_path)
    assert str(tmp_path / "wds_vtab-caltech101") in str(caught.value.hint)
    with pytest.raises(DataError, match="is no folder") as caught:
        opened("elevater", tmp_path / "gone")
    assert "--data-root" in str(caught.value.hint)


# ----------------------------------------------------------------------------- ImageNet


def test_imagenet_and_its_shifts_in_every_layout(tmp_path):
    every = imagenet_classes("imagenet")
    files = {f"imagenet/val/{n}/a.png": png(1) for n in ("n01440764", "n01443537", "n01498041")}
    files |= {f"imagenet/train/{n}/a.png": png(2) for n in ("n01440764", "n01443537", "n01498041")}
    files |= {f"imagenetv2/{i}/a.png": png(i) for i in (0, 1, 10, 2)}
    files |= {f"imagenet-r/{n}/a.png": png(3) for n in ("n01443537", "n01498041")}
    files |= {f"sketch/{n}/a.png": png(4) for n in ("n01440764", "n01443537")}
    files |= {f"objectnet-1.0/images/{n}/a.png": png(5) for n in ("air", "banana", "bath")}
    files |= {
        "objectnet-1.0/mappings/folder_to_objectnet_label.json": json.dumps(
            {"air": "Air freshener", "banana": "Banana", "bath": "Bath towel"}
        ).encode(),
        "objectnet-1.0/mappings/objectnet_to_imagenet_1k.json": json.dumps(
            {"Banana": "banana", "Bath towel": "bath towel"}
        ).encode(),
    }
    write(tmp_path, files)
    wds(tmp_path / "wds_imagenet-a", [0, 199], None)  # numbers count its own 200 classes
    found, missing = opened("imagenet-shifts", tmp_path, with_train=True)
    assert not missing
    names = {key: entry.test.classnames for key, entry in found.items()}
    assert names["imagenet"] == names["imagenet"][:3] == ("tench", "goldfish", "stingray")
    assert names["imagenet-v2"] == tuple(every.by_number[i] for i in (0, 1, 2, 10))
    assert names["imagenet-r"] == ("goldfish", "stingray")
    assert names["imagenet-a"] == imagenet_classes("imagenet-a").by_number
    assert names["imagenet-sketch"] == ("tench", "goldfish")
    assert names["objectnet"] == ("banana", "bath towel")
    assert all(entry.test.templates == imagenet_templates() for entry in found.values())
    assert isinstance(found["imagenet"].train, LabelledSet)
    assert found["imagenet-v2"].train is None
    alone, _ = opened("imagenet", tmp_path)
    assert list(alone) == ["imagenet"]


def test_objectnet_without_its_mappings_is_missing(tmp_path):
    write(tmp_path, {f"objectnet/images/{n}/a.png": png(0) for n in ("air", "banana")})
    wds(tmp_path / "wds_imagenet1k", [0, 1], "tench\ngoldfish\n")
    found, missing = opened("imagenet-shifts", tmp_path)
    assert list(found) == ["imagenet"]
    assert "has no mappings/" in missing["objectnet"]


# ------------------------------------------------------------------------- one's own file


def test_a_suite_of_ones_own(tmp_path):
    (tmp_path / "mine.toml").write_text(
        "reference = 'clean'\n"
        "[[sets]]\nname = 'clean'\nplaces = ['a', 'b']\n"
        "[[sets]]\nname = 'drawn'\nplaces = ['c']\nmetric = 'mean_per_class'\n"
    )
    write(tmp_path, {f"b/{n}/0.png": png(0) for n in ("big_cat", "dog")})
    write(tmp_path, {f"c/test/{n}/0.png": png(0) for n in ("x", "y")})
    write(
        tmp_path,
        {"c/classnames.txt": b"big cat\ndog\n", **{f"c/{k}": v for k, v in TEMPLATE.items()}},
    )
    found, missing = opened(str(tmp_path / "mine.toml"), tmp_path)
    assert not missing
    assert found["clean"].test.classnames == found["drawn"].test.classnames == ("big cat", "dog")
    assert found["drawn"].metric == "mean_per_class"
    assert found["drawn"].test.templates == ("a photo of a {c}.",)
