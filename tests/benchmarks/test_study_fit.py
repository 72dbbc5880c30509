"""What `fit` goes by against what training comes to, by hand and on real graphs."""

from __future__ import annotations

import pytest

from benchmarks.study_fit import (
    against_hand_picked,
    fit_figures,
    measured_ms,
    rank_correlations,
)
from dimefm_edge.student_score import CONVOLUTION_BONUS, INHERITANCE_BONUS
from dimefm_edge.students import student_spec

SIZES = {"image_size": 64, "embed_dim": 32}


def rows():
    names = ("vit-a", "vit-b", "vit-c", "timm:x", "timm:y")
    figures = ((1.0, 10.0, 50.0), (2.0, 20.0, 60.0), (4.0, 40.0, 70.0), (2.5, 21.0, 55.0),
               (0.5, 3.0, 40.0))  # fmt: skip
    return {
        name: {"p50_ms": p50, "score": score, "top1": top1, "gmacs": score, "params_m": p50}
        for name, (p50, score, top1) in zip(names, figures, strict=True)
    }


def test_the_best_of_ours_that_is_no_slower():
    found = against_hand_picked(rows(), "top1")
    assert found == {
        "timm:x": {"ours": "vit-b", "ours_pct": 60.0, "theirs_pct": 55.0, "time_ratio": 0.8}
    }  # nothing of ours is as fast as timm:y


def test_one_of_timms_that_inherits_is_ours():
    found = against_hand_picked(
        rows() | {"timm:x, inherits": rows()["vit-c"] | {"p50_ms": 2.5}}, "top1"
    )
    assert {name: row["ours"] for name, row in found.items()} == {"timm:x": "timm:x, inherits"}


def test_what_was_not_trained_is_left_out():
    untrained = rows()
    del untrained["timm:x"]["top1"]
    del untrained["vit-b"]["top1"]
    assert against_hand_picked(untrained, "top1") == {}
    assert rank_correlations({"vit-a": rows()["vit-a"], "vit-b": untrained["vit-b"]}, "top1") == {}


def test_ranks():
    found = rank_correlations(rows(), "top1")
    assert found["score"] == pytest.approx(0.9)  # timm:x and vit-b change places
    assert set(found) == {"gmacs", "params_m", "score", "p50_ms"}


def test_real_graphs():
    specs = {
        name: student_spec(name, **SIZES) for name in ("vit-p16-w32-d2", "convnet-w32-d2.2.4.2")
    }
    small, large = measured_ms(specs).values()
    assert 0 < small < large
    alone, helped = (
        fit_figures(specs["vit-p16-w32-d2"], inherits=inherits) for inherits in (False, True)
    )
    assert helped["score"] == INHERITANCE_BONUS / 2 * alone["score"]  # of who knows what share
    shape = specs["vit-p16-w32-d2"].args | {"depth": 8}
    heir = fit_figures(specs["vit-p16-w32-d2"], inherits=True, teacher=shape)
    assert heir["score"] == INHERITANCE_BONUS / 4 * alone["score"]
    assert alone["score"] == alone["gmacs"]
    convolutional = fit_figures(specs["convnet-w32-d2.2.4.2"], inherits=False)
    assert convolutional["score"] == CONVOLUTION_BONUS * convolutional["gmacs"]
