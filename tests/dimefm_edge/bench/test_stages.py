"""From files to labels: every stage is there, and the files are what was named."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from dimefm_edge.bench.prepare import prepare
from dimefm_edge.bench.runnable import Load, load_runnable
from dimefm_edge.bench.specs import parse_subjects
from dimefm_edge.bench.stages import STAGES, image_files, name_some, time_stages
from dimefm_edge.data.decode import BadImageError
from dimefm_edge.errors import DataError, InputError


def loaded(word, folder):
    folder.mkdir(exist_ok=True)
    (spec,) = parse_subjects([word])
    prepared = prepare(spec, folder)
    return prepared, load_runnable(prepared, Load())


def test_a_bundle_on_images_of_mixed_sizes(tiny_bundle_dir, tmp_path):
    sizes = [(40, 30), (64, 64), (30, 200), (8, 8)]
    files = []
    for place, size in enumerate(sizes):
        Image.new("RGB", size, (9 * place, 50, 50)).save(tmp_path / f"{place}.jpg")
        files.append(str(tmp_path / f"{place}.jpg"))
    found = time_stages(*loaded(str(tiny_bundle_dir), tmp_path), files=files, seconds=0.1, first=2)
    rows = np.asarray(found["ms"])
    assert rows.shape[1] == len(STAGES)
    assert (rows > 0).all()
    assert 70 <= rows.sum() < 1000


def test_a_model_of_unknown_preprocessing(foreign_graph, tmp_path):
    with pytest.raises(InputError, match="how images are prepared"):
        time_stages(*loaded(str(foreign_graph), tmp_path), files=[], seconds=1, first=0)


def test_a_file_that_is_no_image(tiny_bundle_dir, tmp_path):
    bad = tmp_path / "bad.jpg"
    bad.write_bytes(b"no image")
    with pytest.raises(BadImageError, match=r"bad\.jpg"):
        time_stages(*loaded(str(tiny_bundle_dir), tmp_path), files=[str(bad)], seconds=1, first=0)


def test_files_as_they_are_and_others_written_as_files(labelled_dir, tmp_path):
    files, bad = image_files([str(labelled_dir), "scenes:3"], tmp_path / "made")
    assert (len(files), bad) == (12 + 3, [])
    assert all(path.is_file() for path in files)
    assert [path.suffix for path in files[-3:]] == [".jpg"] * 3
    assert image_files([str(files[0])], tmp_path / "none") == ([files[0]], [])
    some, _ = image_files([str(labelled_dir)], tmp_path / "none", most=5)
    assert some == files[:5]


def test_files_that_cannot_be_read_are_left_out_and_named(photos_with_bad, tmp_path):
    files, bad = image_files([str(photos_with_bad)], tmp_path / "made")
    assert sorted(path.name for path in files) == ["0.jpg", "1.jpg"]
    assert sorted(bad) == ["empty.jpg", "trunc.jpg"]
    for path in files:
        path.unlink()
    with pytest.raises(InputError, match=r"none of the images .*(empty|trunc)\.jpg, "):
        image_files([str(photos_with_bad)], tmp_path / "made")


def test_some_names_stand_for_all():
    assert name_some(["a", "b"]) == "a, b"
    assert name_some(["a", "b", "c", "d", "e"]) == "a, b, c and 2 more"


def test_nothing_to_read(tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="holds no image"):
        image_files([str(tmp_path / "empty")], tmp_path / "made")
