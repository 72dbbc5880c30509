"""CLIP-benchmark's multilabel folders: what is read, and what is refused."""

from __future__ import annotations

import io

import numpy as np
import pytest

from dimefm_edge.data.images import decode_image
from dimefm_edge.data.multilabel import is_multilabel, open_multilabel
from dimefm_edge.errors import DataError


def npy(values) -> bytes:
    stream = io.BytesIO()
    np.save(stream, np.asarray(values))
    return stream.getvalue()


@pytest.fixture
def voc_dir(tmp_path, encoded, write_files, write_tar):
    root = write_files(
        tmp_path / "voc",
        {
            "classnames.txt": b"cat\ndog\ncar\n",
            "zeroshot_classification_templates.txt": b"a photo of a {c}.\n",
            "dataset_type.txt": b"multilabel\n",
        },
    )
    targets = [[1, 0, 0], [1, 1, 0], [0, 0, 1], [0, 0, 0]]
    for shard in range(2):
        members = {}
        for i in (2 * shard, 2 * shard + 1):
            members |= {f"s{i}.jpg": encoded(i), f"s{i}.npy": npy(targets[i])}
        write_tar(root / "test" / f"{shard}.tar", members)
    return root


def test_targets_and_images(voc_dir, encoded):
    found = open_multilabel(voc_dir)
    assert is_multilabel(voc_dir)
    assert (found.name, found.classnames) == ("voc", ("cat", "dog", "car"))
    assert found.templates == ("a photo of a {c}.",)
    assert found.targets.dtype == np.bool_
    assert found.targets.tolist() == [
        [True, False, False], [True, True, False], [False, False, True], [False] * 3
    ]  # fmt: skip
    assert found.pool.load(3).tobytes() == decode_image(encoded(3), "").tobytes()


def test_other_folders_are_not_multilabel(voc_dir, tmp_path):
    assert not is_multilabel(tmp_path)
    (voc_dir / "dataset_type.txt").write_text("retrieval\n")
    assert not is_multilabel(voc_dir)


@pytest.mark.parametrize(
    ("label", "complaint"),
    [
        (npy([1, 0]), "must be 3 zeros and ones"),
        (npy([1, 0, 2]), "must be 3 zeros and ones"),
        (npy([[1, 0, 1]]), "must be 3 zeros and ones"),
        (b"", "is no label"),
        (npy([1, 0, 1])[:70], "is no label"),
        (npy(np.asarray([{}, {}, {}], object)), "is no label"),  # a pickle: never loaded
        (None, r"has no \.npy beside it"),
    ],
)
def test_labels_that_are_refused(label, complaint, voc_dir, encoded, write_tar):
    members = {"s0.jpg": encoded(0)} | ({} if label is None else {"s0.npy": label})
    write_tar(voc_dir / "test" / "0.tar", members)
    with pytest.raises(DataError, match=complaint):
        open_multilabel(voc_dir)


def test_missing_split_and_empty_tars(voc_dir, write_tar):
    with pytest.raises(DataError, match=r"has no train/\*\.tar"):
        open_multilabel(voc_dir, split="train")
    write_tar(voc_dir / "train" / "0.tar", {"s0.npy": npy([1, 0, 0])})
    with pytest.raises(DataError, match="hold no image"):
        open_multilabel(voc_dir, split="train")
