"""int8 students on disk: weights and ranges come back, and the two kinds are told apart."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from dimefm_edge.errors import CheckpointError
from dimefm_edge.preprocess import PreprocessSpec
from dimefm_edge.quantize.checkpoint import float_before, load_int8_student, save_int8_student
from dimefm_edge.quantize.qat import FakeQuantStudent, qat_prepare
from dimefm_edge.students import load_student, save_student
from tests.dimefm_edge.quantize.int8_students import AVX2, SIDE, SPECS, images, student


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, FakeQuantStudent]:
    made = qat_prepare(student("vit"), image_size=SIDE, rules_name=AVX2, keep_float=("proj",))
    made.warm_up([images(16)])
    with torch.no_grad():
        for value in made.parameters():
            value.mul_(1.01)
    path = tmp_path_factory.mktemp("int8") / "checkpoint.safetensors"
    save_int8_student(path, made, SPECS["vit"], PreprocessSpec(SIDE), {"teacher": "sample"})
    return path, made.eval()


def test_what_is_loaded_is_what_was_saved(saved):
    path, made = saved
    loaded = load_int8_student(path)
    assert isinstance(loaded.student, FakeQuantStudent)
    assert loaded.student.ranges() == made.ranges()
    assert loaded.student.keep_float == ("proj",)
    assert loaded.spec == SPECS["vit"]
    assert loaded.metadata["teacher"] == "sample"
    with torch.no_grad():
        assert torch.equal(loaded.student(images(8)), made(images(8)))


def test_a_file_from_before_patches_were_quantised_keeps_them_in_float(saved, tmp_path):
    kept = ("proj", "trunk.patch_embed.proj")
    made = qat_prepare(student("vit"), image_size=SIDE, rules_name=AVX2, keep_float=kept)
    made.warm_up([images(16)])
    made.eval()
    path = tmp_path / "older.safetensors"
    said = {"quant_rules": AVX2, "quant_ranges": json.dumps(made.ranges()),
            "quant_keep_float": '["proj"]'}  # fmt: skip
    save_student(
        path, made.deployed(), SPECS["vit"], PreprocessSpec(SIDE), said, kind="int8 student"
    )
    loaded = load_int8_student(path).student
    assert loaded.keep_float == kept
    now = qat_prepare(student("vit"), image_size=SIDE, rules_name=AVX2, keep_float=("proj",))
    assert float_before(path, now) == ("trunk.patch_embed.proj",)
    assert float_before(saved[0], now) == float_before(tmp_path / "none", now) == ()
    with torch.no_grad():
        assert torch.equal(loaded(images(8)), made(images(8)))


def test_an_int8_student_is_no_float_student_and_the_reverse(saved, tmp_path):
    path, _ = saved
    with pytest.raises(CheckpointError, match="not a student of dimefm_edge"):
        load_student(path)
    plain = tmp_path / "plain.safetensors"
    save_student(plain, student("vit"), SPECS["vit"], PreprocessSpec(SIDE), {})
    with pytest.raises(CheckpointError, match="not an int8 student of dimefm_edge"):
        load_int8_student(plain)


def test_ranges_that_are_gone_are_named(saved, tmp_path):
    path, made = saved
    with safe_open(path, framework="pt") as reader:
        assert '"proj"' not in reader.metadata()["metadata"].split("quant_ranges")[1][:20]
    made.ranges = lambda: {}
    try:
        save_int8_student(tmp_path / "bad", made, SPECS["vit"], PreprocessSpec(SIDE), {})
    finally:
        del made.ranges
    with pytest.raises(CheckpointError, match=r"is damaged.*trunk\.patch_embed"):
        load_int8_student(tmp_path / "bad")
