"""The report tab: what a run says of itself, and cards that nothing breaks out of."""

from __future__ import annotations

import json

import gradio as gr
import pytest

from dimefm_demo.model_specs import ModelSpec
from dimefm_demo.models import Models
from dimefm_demo.page_report import accuracy_latency, build_report_tab, describe_models

FIGURES = {
    "teacher": {"here_p50_ms": 8.5},
    "student": {"here_p50_ms": 2.25},
    "accuracy": [
        {"teacher": {"name": "scenes", "top1_pct": 94.3},
         "student": {"name": "scenes", "top1_pct": 86.25}},
    ],
}  # fmt: skip


def test_accuracy_against_latency_is_the_reports(tmp_path):
    (tmp_path / "report.json").write_text(json.dumps(FIGURES))
    assert accuracy_latency(tmp_path) == [
        (8.5, 94.3, "teacher, scenes"), (2.25, 86.25, "student, scenes")
    ]  # fmt: skip


@pytest.mark.parametrize("text", [None, "{", "[]", '{"accuracy": [{}]}', '{"accuracy": 3}'])
def test_a_damaged_report_shows_no_plot(text, tmp_path):
    if text is not None:
        (tmp_path / "report.json").write_text(text)
    assert accuracy_latency(tmp_path) == []


def test_a_run_without_a_report_says_so(tmp_path, models):
    shown = Models([ModelSpec("student", str(tmp_path), "bundle", run_dir=tmp_path)])
    with gr.Blocks() as page, gr.Tab("Report") as tab:
        build_report_tab(tab, shown)
    texts = [block.value for block in page.blocks.values() if isinstance(block, gr.Markdown)]
    assert any("has no report.md: the run was not finished" in str(text) for text in texts)
    assert describe_models(shown) == "The models are still loading."


def test_cards_say_what_the_manifest_says(models):
    card = describe_models(models)
    assert card.splitlines()[0] == "| model card | sample | baked |"
    assert "| precision | fp32 | fp32 |" in card
    assert "| labels | any | baked in only |" in card
    sizes = [models.wait_for(name).subject.size_mib for name in ("sample", "baked")]
    assert f"| size | {sizes[0]:.2f} MiB | {sizes[1]:.2f} MiB |" in card
    assert all(13 < size < 15 for size in sizes)
    assert "scenes (96)" in card


def test_a_name_cannot_break_out_of_its_card(models, monkeypatch):
    model = models.wait_for("baked")
    monkeypatch.setitem(model.manifest, "name", "<img src=x>|`[a](javascript:x)`\n# big")
    card = describe_models(models)
    assert "<img" not in card
    assert "javascript:x)`" not in card
    assert "&lt;img src=x&gt;&#124;&#96;&#91;a&#93;(javascript:x)&#96; # big" in card
