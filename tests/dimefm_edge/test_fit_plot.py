"""The plot of a choice: a picture with something on it, of scores and of known top-1 alike."""

from __future__ import annotations

import pytest
from PIL import Image

from dimefm_edge.fit import fit_student
from dimefm_edge.fit_plot import plot_fit
from dimefm_edge.students import student_spec


@pytest.mark.parametrize("known", [(), (30.0, 40.0)])
def test_a_choice_is_drawn(known, tmp_path):
    names = ("vit-p8-w64-d2", "vit-p8-w128-d4")
    specs = [student_spec(name, image_size=64, embed_dim=64) for name in names]
    given = tuple(zip(specs, known, strict=True)) if known else ()
    report = fit_student(
        "jetson-orin", latency_ms=50.0, image_size=64, embed_dim=64, given=given, families=("vit",)
    )
    plot_fit(report, tmp_path / "fit.png")
    with Image.open(tmp_path / "fit.png") as image:
        assert image.format == "PNG"
        assert len(image.convert("RGB").getcolors(1 << 20)) > 50
