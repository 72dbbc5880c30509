"""Models load behind the page, fail alone, and keep what their labels cost."""

from __future__ import annotations

import threading
from pathlib import Path

import numpy as np
import pytest

from dimefm_demo.model_specs import ModelSpec, find_models
from dimefm_demo.models import Models, cache_dir, check_samples, sample_bundle
from dimefm_edge.errors import (
    CheckpointError,
    ExportError,
    InputError,
    MissingExtraError,
    UnknownNameError,
)

PLAIN = ("{c}",)


def fresh(*folders: Path) -> Models:
    models = Models(find_models([str(folder) for folder in folders], engines=["onnxruntime"]))
    models.load_behind()
    return models


def test_one_changed_label_costs_one(sample_dir):
    models = fresh(sample_dir)
    model = models.wait_for("sample")
    asked: list[list[str]] = []
    encode = model.subject.encode_texts
    assert encode is not None

    def counted(sentences):
        asked.append(list(sentences))
        return encode(sentences)

    object.__setattr__(model.subject, "encode_texts", counted)
    models.label_bank(model, ("a", "b", "c"), PLAIN)
    before = models.label_bank(model, ("a", "b", "d"), PLAIN)
    assert asked == [["a", "b", "c"], ["d"]]
    threads = [
        threading.Thread(target=models.label_bank, args=(model, ("a", "e", "d"), PLAIN))
        for _ in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert asked[2:] == [["e"]]  # eight visitors, one encoding
    after = models.label_bank(model, ("a", "b", "d"), PLAIN)
    assert np.array_equal(before.embeds, after.embeds)


def test_baked_labels_are_taken_in_the_order_asked_for(models):
    model = models.wait_for("baked")
    bank = models.label_bank(model, ("red ring", "blue cross"), PLAIN)
    whole = model.subject.label_banks["scenes"]
    wanted = [whole.embeds[whole.classnames.index(name)] for name in bank.classnames]
    assert np.array_equal(bank.embeds, wanted)
    assert not models.has_text(model)
    assert models.has_text(models.wait_for("sample"))


def test_a_student_answers_to_its_teachers_text_side(sample_dir, baked_dir):
    specs = [
        ModelSpec("teacher", str(sample_dir), "bundle", teaches="sample"),
        ModelSpec("student", str(baked_dir), "bundle"),
    ]
    models = Models(specs)
    models.load_behind()
    student = models.wait_for("student")
    assert student.teacher == "sample"
    assert models.has_text(student)
    assert models.label_bank(student, ("any words",), PLAIN).embeds.shape == (1, 128)


def test_a_model_that_cannot_be_loaded_leaves_the_others(sample_dir, tmp_path):
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "manifest.json").write_text("{}")
    models = fresh(broken, sample_dir)
    assert models.first_ready() is models.wait_for("sample")
    with pytest.raises(CheckpointError, match=r"broken could not be loaded: .*bad manifest\.json"):
        models.wait_for("broken")
    with pytest.raises(InputError, match="there is no model 'nobody' here\n  try: broken, sample"):
        models.wait_for("nobody")
    states = dict(models.states())
    assert states["sample"] == "ready"
    assert "bad manifest" in states["broken"]
    assert models.is_settled


def test_the_sample_is_exported_once(monkeypatch, tmp_path, sample_dir):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_dir() == tmp_path / "dimefm_edge" / "demo"
    monkeypatch.setattr("dimefm_demo.model_specs.find_spec", lambda name: None)
    with pytest.raises(MissingExtraError, match="the sample teacher needs torch"):
        sample_bundle("fp32")
    with pytest.raises(MissingExtraError, match="the sample teacher needs torch") as caught:
        check_samples(find_models(["sample"], engines=["onnxruntime"]))
    assert caught.value.hint is not None
    assert "dimefm-edge demo BUNDLE" in caught.value.hint
    monkeypatch.undo()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    with pytest.raises(ExportError, match=r"the sample teacher cannot be exported: .*fp2"):
        sample_bundle("fp2")


def test_a_model_that_cannot_be_loaded_is_told_to_who_started_it(sample_dir, caplog):
    models = Models(find_models(["sampel", str(sample_dir)], engines=["onnxruntime"]))
    models.load_behind()
    models.require_one()
    with pytest.raises(CheckpointError, match="sampel could not be loaded"):
        models.wait_for("sampel")
    assert "Did you mean 'sample'" in caplog.text
    (name, state), _ = models.states()
    assert name == "sampel"
    assert "unknown teacher" in state


def test_without_any_model_the_reason_is_raised(tmp_path, caplog):
    alone = Models(find_models(["sampel"], engines=["onnxruntime"]))
    alone.load_behind()
    with pytest.raises(UnknownNameError, match="unknown teacher 'sampel'"):
        alone.require_one()
    assert caplog.text == ""  # it is said once
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "manifest.json").write_text("{}")
    both = Models(find_models(["sampel", str(broken)], engines=["onnxruntime"]))
    both.load_behind()
    why = r"no model can be loaded: sampel: unknown teacher.*; broken: .*bad manifest"
    with pytest.raises(CheckpointError, match=f"(?s){why}"):
        both.require_one()
