"""Every plot that there are figures for, as SVG that is XML."""

from __future__ import annotations

import sys
from dataclasses import replace
from xml.etree import ElementTree

import pytest

from dimefm_edge.bench.plots import draw_all
from dimefm_edge.errors import MissingExtraError
from tests.dimefm_edge.bench.bench_case import full_result, stopped_result


@pytest.fixture(scope="module")
def plots():
    return draw_all(full_result())


def test_all_plots_of_a_full_result(plots):
    assert [title for title, _, _ in plots] == [
        "Ratios", "Latency distributions", "Round by round", "Accuracy against latency", "Stages",
        "Where calls spend their time", "Roofline", "Power, heat and clocks",
    ]  # fmt: skip
    for title, svg, text in plots:
        root = ElementTree.fromstring(svg)
        assert root.tag.endswith("svg")
        words = " ".join(t.text or "" for t in root.iter("{http://www.w3.org/2000/svg}text"))
        assert title in words
        assert "href" not in svg.replace('xlink:href="#', "").replace(
            'xmlns:xlink="http://www.w3.org/1999/xlink"', ""
        )
        assert text
    roofline = next(svg for title, svg, _ in plots if title == "Roofline")
    assert "100 GFLOP/s fp32, 20 GB/s" in roofline


def test_only_what_there_is():
    bare = full_result()
    bare = replace(
        bare, trace=[], peak_gflop_per_s=None,
        subjects=[replace(s, stages_ms={}, operators={}, top1_pct={}) for s in bare.subjects],
    )  # fmt: skip
    titles = [title for title, _, _ in draw_all(bare)]
    assert titles == ["Ratios", "Latency distributions", "Round by round"]
    assert draw_all(stopped_result()) == []


def test_plots_are_the_same_each_time(plots):
    assert draw_all(full_result()) == plots


def test_without_matplotlib(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(MissingExtraError, match="plots need matplotlib"):
        draw_all(full_result())
