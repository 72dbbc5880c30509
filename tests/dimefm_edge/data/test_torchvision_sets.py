"""torchvision's data sets where they lie: files of MNIST, folders of RenderedSST2."""

from __future__ import annotations

import struct

import numpy as np
import pytest
from PIL import Image

from dimefm_edge.data.images import BadImageError
from dimefm_edge.data.torchvision_sets import open_torchvision
from dimefm_edge.errors import DataError, UnknownNameError


@pytest.fixture
def mnist_root(tmp_path):
    """Twelve digits as MNIST's own files."""
    raw = tmp_path / "MNIST" / "raw"
    raw.mkdir(parents=True)
    rng = np.random.default_rng(0)
    for stem in ("train", "t10k"):
        images = rng.integers(0, 256, (12, 28, 28)).astype(np.uint8)
        labels = (np.arange(12) % 10).astype(np.uint8)
        (raw / f"{stem}-images-idx3-ubyte").write_bytes(
            struct.pack(">iiii", 2051, 12, 28, 28) + images.tobytes()
        )
        (raw / f"{stem}-labels-idx1-ubyte").write_bytes(
            struct.pack(">ii", 2049, 12) + labels.tobytes()
        )
    return tmp_path


@pytest.fixture
def sst2_root(tmp_path):
    for split in ("train", "valid", "test"):
        for i, name in enumerate(("negative", "positive")):
            folder = tmp_path / "rendered-sst2" / split / name
            folder.mkdir(parents=True)
            for number in range(2 + i):
                Image.new("L", (9, 8), 40 * number).save(folder / f"{number}.png")
    return tmp_path


def test_mnist(mnist_root):
    names = tuple(f"digit {i}" for i in range(10))
    labelled = open_torchvision(
        "MNIST", mnist_root, {"train": False}, name="mnist", classnames=names
    )
    assert labelled.labels.tolist() == [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 0, 1]
    assert labelled.classnames == names
    assert (len(labelled.pool), labelled.pool.name(3)) == (12, "mnist/3")
    image = labelled.pool.load(3)
    assert (image.mode, image.size) == ("RGB", (28, 28))
    own = open_torchvision("MNIST", mnist_root, {"train": True}, name="mnist")
    assert own.classnames[3] == "3 - three"
    assert own.pool.fingerprint == labelled.pool.fingerprint


def test_labels_of_a_set_that_keeps_samples(sst2_root):
    labelled = open_torchvision("RenderedSST2", sst2_root, {"split": "test"}, name="sst2")
    assert labelled.labels.tolist() == [0, 0, 1, 1, 1]
    assert labelled.classnames == ("negative", "positive")


def test_a_damaged_image_is_counted_not_fatal(sst2_root):
    path = sst2_root / "rendered-sst2" / "test" / "negative" / "0.png"
    path.write_bytes(path.read_bytes()[:20])
    labelled = open_torchvision("RenderedSST2", sst2_root, {"split": "test"}, name="sst2")
    with pytest.raises(BadImageError, match="image sst2/0 cannot be read"):
        labelled.pool.load(0)


def test_a_split_without_labels(tmp_path, monkeypatch):
    """FER2013's test.csv has pixels only; the checksum would want the real file."""
    monkeypatch.setattr("torchvision.datasets.fer2013.check_integrity", lambda *a, **k: True)
    folder = tmp_path / "fer2013"
    folder.mkdir()
    text = "pixels\n" + " ".join(["7"] * 48 * 48) + "\n"
    (folder / "test.csv").write_text(text)
    with pytest.raises(DataError, match=r"FER2013 in .* has images without a label"):
        open_torchvision("FER2013", tmp_path, {"split": "test"}, name="fer2013")


def test_what_is_not_there(tmp_path, mnist_root):
    with pytest.raises(DataError, match="torchvision finds no CIFAR10 in"):
        open_torchvision("CIFAR10", tmp_path, {"train": False}, name="cifar10")
    with pytest.raises(UnknownNameError, match="unknown torchvision data set 'MINST'"):
        open_torchvision("MINST", tmp_path, {}, name="mnist")
    with pytest.raises(DataError, match="classes without a name: 2 are named"):
        open_torchvision("MNIST", mnist_root, {}, name="mnist", classnames=("a", "b"))
