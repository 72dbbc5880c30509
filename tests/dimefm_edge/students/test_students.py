"""The student families: shapes, gradients, ONNX, checkpoints and their errors."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from dimefm_edge.errors import CheckpointError, ConfigError, DimeFMError, UnknownNameError
from dimefm_edge.preprocess import PreprocessSpec
from dimefm_edge.students import (
    NAMED_STUDENTS,
    StudentSpec,
    build_student,
    hybrid_spec,
    load_student,
    save_student,
    student_spec,
    vit_spec,
)

VIT = vit_spec(image_size=32, embed_dim=16, patch_size=8, width=32, depth=2, num_heads=2)
HYBRID = hybrid_spec(image_size=32, embed_dim=16, width=8, depth=(1, 1, 1, 1))
TIMM = student_spec("timm:resnet10t", image_size=32, embed_dim=16)
FAMILIES = pytest.mark.parametrize("spec", [VIT, HYBRID, TIMM], ids=lambda s: s.family)


@pytest.fixture(autouse=True)
def _one_thread():
    torch.set_num_threads(1)
    torch.manual_seed(0)


@FAMILIES
def test_answers_are_unit_length_and_every_parameter_learns(spec):
    student = build_student(spec)
    embeds = student(torch.randn(3, 3, 32, 32))
    assert embeds.shape == (3, 16)
    assert embeds.dtype == torch.float32
    torch.testing.assert_close(embeds.norm(dim=1), torch.ones(3))
    (embeds * torch.randn(3, 16)).sum().backward()
    # ResNets start with residual branches of zero, whose inside has no gradient yet.
    zero_init = spec.family == "timm"
    grads = {n: p.grad for n, p in student.named_parameters()}
    assert [n for n, g in grads.items() if g is None or not (g.any() or zero_init)] == []


@FAMILIES
@pytest.mark.parametrize("opset", [18, 20])
def test_exports_to_onnx_with_a_dynamic_batch(spec, opset, tmp_path):
    import onnxruntime

    student = build_student(spec).eval()
    path = tmp_path / "student.onnx"
    torch.onnx.export(
        student,
        (torch.randn(2, 3, 32, 32),),
        path,
        dynamo=True,
        opset_version=opset,
        input_names=["image"],
        output_names=["image_embeds"],
        dynamic_shapes=({0: torch.export.Dim("batch", min=1, max=1024)},),
        verbose=False,
    )
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    for batch in (1, 5):
        image = torch.randn(batch, 3, 32, 32)
        (answer,) = session.run(None, {"image": image.numpy()})
        np.testing.assert_allclose(answer, student(image).detach().numpy(), atol=1e-5)


@FAMILIES
def test_checkpoint_gives_back_the_student(spec, tmp_path):
    student = build_student(spec)
    student(torch.randn(4, 3, 32, 32))  # batch norms have statistics to keep
    preprocess = PreprocessSpec(image_size=32, interpolation="bilinear")
    path = tmp_path / "run" / "checkpoint.safetensors"
    save_student(path, student, spec, preprocess, {"teacher": "sample"})
    loaded = load_student(path.parent)
    assert (loaded.spec, loaded.preprocess) == (spec, preprocess)
    assert loaded.metadata == {"teacher": "sample"}
    image = torch.randn(2, 3, 32, 32)
    assert torch.equal(loaded.student(image), student.eval()(image))
    assert [p.name for p in path.parent.iterdir()] == ["checkpoint.safetensors"]


@pytest.fixture(scope="module")
def checkpoint_bytes(tmp_path_factory):
    path = tmp_path_factory.mktemp("run") / "checkpoint.safetensors"
    save_student(path, build_student(VIT), VIT, PreprocessSpec(image_size=32), {})
    return path.read_bytes()


@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_a_truncated_checkpoint_is_refused(checkpoint_bytes, tmp_path_factory, data):
    keep = data.draw(st.integers(0, len(checkpoint_bytes) - 1))
    path = tmp_path_factory.getbasetemp() / "cut.safetensors"
    path.write_bytes(checkpoint_bytes[:keep])
    with pytest.raises(CheckpointError, match="truncated or not a safetensors file"):
        load_student(path)


def test_foreign_and_missing_checkpoints_are_refused(tmp_path):
    with pytest.raises(CheckpointError, match=r"no checkpoint at .*checkpoint\.safetensors"):
        load_student(tmp_path)
    save_file({"x": torch.zeros(1)}, tmp_path / "x.safetensors")
    with pytest.raises(CheckpointError, match="not a student of dimefm_edge"):
        load_student(tmp_path / "x.safetensors")


@pytest.mark.parametrize(
    ("key", "value", "reason"),
    [
        ("spec", json.dumps(replace(VIT, embed_dim=17).to_dict()), "size mismatch|state_dict"),
        ("spec", json.dumps({**VIT.to_dict(), "args": {}}), "patch_size"),
        ("spec", json.dumps({**VIT.to_dict(), "family": "vitt"}), "unknown student family 'vitt'"),
        ("spec", json.dumps({"name": "x"}), "not a student spec"),
        ("spec", "{", "Expecting"),
        ("preprocess", json.dumps({"image_size": -1}), "image_size must be positive"),
        ("metadata", "[]", "items"),
    ],
)
def test_a_description_that_disagrees_is_refused(tmp_path, key, value, reason):
    header = {
        "format": "dimefm_edge.student/1",
        "spec": json.dumps(VIT.to_dict()),
        "preprocess": json.dumps(PreprocessSpec(image_size=32).to_dict()),
        "metadata": "{}",
        key: value,
    }
    save_file(build_student(VIT).state_dict(), tmp_path / "x.safetensors", metadata=header)
    with pytest.raises(CheckpointError, match=rf"is damaged.*({reason})"):
        load_student(tmp_path / "x.safetensors")


def test_a_checkpoint_may_be_read_by_whom_other_files_may(tmp_path):
    plain, path = tmp_path / "plain", tmp_path / "checkpoint.safetensors"
    plain.touch()
    save_student(path, build_student(VIT), VIT, PreprocessSpec(image_size=32), {})
    assert path.stat().st_mode == plain.stat().st_mode


def test_a_failed_write_keeps_the_old_checkpoint(tmp_path, checkpoint_bytes):
    path = tmp_path / "checkpoint.safetensors"
    path.mkdir()  # cannot be replaced by a file
    with pytest.raises(DimeFMError, match="cannot write"):
        save_student(path, build_student(VIT), VIT, PreprocessSpec(image_size=32), {})
    assert [p.name for p in tmp_path.iterdir()] == ["checkpoint.safetensors"]


@pytest.mark.parametrize("name", sorted(NAMED_STUDENTS))
@pytest.mark.parametrize("image_size", [64, 224])
def test_named_students_can_be_built(name, image_size):
    spec = student_spec(name, image_size=image_size, embed_dim=8)
    assert StudentSpec.from_dict(json.loads(json.dumps(spec.to_dict()))) == spec
    with torch.device("meta"):
        assert build_student(spec)(torch.empty(2, 3, image_size, image_size)).shape == (2, 8)


def test_unknown_names_are_answered_with_the_nearest():
    with pytest.raises(UnknownNameError, match=r"student 'vit-tinny'\. Did you mean 'vit-tiny'"):
        student_spec("vit-tinny", image_size=64, embed_dim=8)
    with pytest.raises(UnknownNameError, match=r"timm model 'resnet10x'\. Did you mean 'resnet1"):
        build_student(student_spec("timm:resnet10x", image_size=64, embed_dim=8))


def test_pretrained_is_for_timm_students():
    with pytest.raises(ConfigError, match="no pretrained weights: only timm:NAME students do"):
        build_student(VIT, pretrained=True)


def test_timm_model_that_needs_its_image_size_gets_it():
    spec = student_spec("timm:vit_tiny_patch16_224", image_size=64, embed_dim=8)
    with torch.device("meta"):
        assert build_student(spec)(torch.empty(1, 3, 64, 64)).shape == (1, 8)


def test_describing_students_needs_no_torch():
    code = (
        "import sys, dimefm_edge.students as s\n"
        "s.student_spec('vit-tiny', image_size=64, embed_dim=8)\n"
        "assert 'torch' not in sys.modules and 'timm' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[3])
