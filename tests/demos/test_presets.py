"""Label lists and examples."""

from __future__ import annotations

import sys

import pytest
from PIL import Image

from dimefm_demo.presets import PRESETS, save_examples
from dimefm_edge.errors import MissingExtraError


def test_each_list_has_its_labels():
    counts = {name: len(make().labels) for name, make in PRESETS.items()}
    assert {k: counts[k] for k in ("scenes", "CIFAR-10")} == {"scenes": 96, "CIFAR-10": 10}
    assert counts["ImageNet"] in (998, 999, 1000)  # repeated names count once
    assert all("{c}" in template for make in PRESETS.values() for template in make().templates)


def test_imagenet_needs_open_clip(monkeypatch):
    monkeypatch.setitem(sys.modules, "open_clip.zero_shot_metadata", None)
    with pytest.raises(MissingExtraError, match="come with open_clip, which is not installed"):
        PRESETS["ImageNet"]()


def test_examples_are_drawn(tmp_path):
    paths = save_examples(tmp_path)
    assert len({path.name for path in paths}) == 5
    for path in paths:
        assert path.stem.replace("-", " ") in PRESETS["scenes"]().labels
        with Image.open(path) as image:
            assert image.size == (256, 256)
