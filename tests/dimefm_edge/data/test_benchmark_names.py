"""Names that other packages keep: ImageNet's from open_clip and timm, the rest by their form."""

from __future__ import annotations

import importlib.util
import json
import sys

import pytest

from dimefm_edge.data import benchmark_names
from dimefm_edge.data.benchmark_names import (
    clip_benchmark_classes,
    clip_benchmark_templates,
    imagenet_classes,
    imagenet_templates,
    objectnet_classes,
)
from dimefm_edge.errors import DataError, MissingExtraError


def test_imagenet():
    names = imagenet_classes("imagenet")
    assert len(names.by_number) == 1000
    assert names.by_number[:2] == ("tench", "goldfish")
    assert names.by_folder["n01440764"] == names.by_folder["0"] == "tench"
    assert names.by_folder["n15075141"] == names.by_folder["999"] == names.by_number[999]
    assert len(imagenet_templates()) == 80
    assert all(template.count("{c}") == 1 for template in imagenet_templates())


@pytest.mark.parametrize(("name", "first"), [("imagenet-a", "n01498041"),
                                             ("imagenet-r", "n01443537")])  # fmt: skip
def test_subsets_of_imagenet_have_numbers_of_their_own(name, first):
    names, every = imagenet_classes(name), imagenet_classes("imagenet")
    assert len(names.by_number) == 200
    assert names.by_number[0] == every.by_folder[first]
    places = [every.by_number.index(label) for label in names.by_number]
    assert places == sorted(places)


@pytest.fixture
def tables(tmp_path, monkeypatch):
    """A clip_benchmark with small tables, in its own layout."""
    folder = tmp_path / "clip_benchmark" / "datasets"
    folder.mkdir(parents=True)
    (tmp_path / "clip_benchmark" / "__init__.py").write_text("raise ImportError('not wanted')")
    (folder / "en_classnames.json").write_text(json.dumps({"eurosat": ["forest", "river"]}))
    (folder / "en_zeroshot_classification_templates.json").write_text(
        json.dumps({"eurosat": ["a satellite photo of {c}."]})
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    benchmark_names._clip_benchmark.cache_clear()
    yield folder
    benchmark_names._clip_benchmark.cache_clear()


def test_clip_benchmark_is_read_and_not_imported(tables):
    assert clip_benchmark_classes("eurosat") == ("forest", "river")
    assert clip_benchmark_templates("eurosat") == ("a satellite photo of {c}.",)
    assert clip_benchmark_classes("cars") is None
    assert "clip_benchmark" not in sys.modules


def test_a_damaged_table_and_a_missing_package(tables, monkeypatch):
    (tables / "en_classnames.json").write_text("[1]")
    with pytest.raises(MissingExtraError, match="cannot be read"):
        clip_benchmark_classes("eurosat")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(MissingExtraError, match="which is not installed") as caught:
        clip_benchmark_classes("eurosat")
    assert caught.value.hint == "pip install --no-deps clip-benchmark"


def test_the_real_clip_benchmark_names_every_elevater_set():
    if importlib.util.find_spec("clip_benchmark") is None:
        pytest.skip("clip-benchmark is not installed")
    from dimefm_edge.suites import load_suite

    for entry in load_suite("elevater").sets:
        if entry.names is not None:
            assert len(clip_benchmark_classes(entry.names) or ()) >= 2
        if entry.templates is not None:
            assert all("{c}" in t for t in clip_benchmark_templates(entry.templates) or ("",))


def test_objectnet_keeps_the_folders_that_imagenet_has_too(tmp_path):
    mappings = tmp_path / "mappings"
    mappings.mkdir()
    with pytest.raises(DataError, match="has no mappings/"):
        objectnet_classes(tmp_path)
    (mappings / "folder_to_objectnet_label.json").write_text(
        json.dumps({"air_freshener": "Air freshener", "banana": "Banana", "bath": "Bath towel"})
    )
    (mappings / "objectnet_to_imagenet_1k.json").write_text(
        json.dumps({"Banana": "banana", "Bath towel": "bath towel"})
    )
    names = objectnet_classes(tmp_path)
    assert names.by_folder == {"banana": "banana", "bath": "bath towel"}
    assert names.leaves_out
    (mappings / "objectnet_to_imagenet_1k.json").write_text("{")
    with pytest.raises(DataError, match="cannot be read"):
        objectnet_classes(tmp_path)
