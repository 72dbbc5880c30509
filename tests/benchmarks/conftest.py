"""What tests of benchmarks share."""

from __future__ import annotations

import dataclasses
import sys

import pytest


@pytest.fixture
def two_pictures(tmp_path, monkeypatch):
    """Call it once studies are imported: their students are then tested on two pictures only."""

    def use() -> None:
        from dimefm_edge.data.scenes import scene_image

        for label, name in enumerate(("cat", "dog")):
            (tmp_path / "test" / name).mkdir(parents=True)
            scene_image(label).save(tmp_path / "test" / name / "0.png")
        study_data = sys.modules["study_data"]
        real, sets = study_data.setup_of, (str(tmp_path / "test"),)
        monkeypatch.setattr(
            study_data,
            "setup_of",
            lambda args: dataclasses.replace(real(args), eval_sets=sets),
        )

    return use
