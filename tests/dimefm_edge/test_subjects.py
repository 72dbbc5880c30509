"""Subjects: whatever embeds images, told apart by its files and asked in one way."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path

import numpy as np
import pytest

from dimefm_edge.data.scenes import scene_image
from dimefm_edge.errors import (
    CheckpointError,
    DataError,
    DimeFMError,
    InputError,
    UnknownNameError,
)
from dimefm_edge.export import GraphSpec, export_student
from dimefm_edge.preprocess import normalise_pixels, resize_image
from dimefm_edge.students import load_student
from dimefm_edge.subjects import load_subject, run_logit_scale, subject_kind


@pytest.fixture
def pixels() -> np.ndarray:
    from dimefm_edge.preprocess import PreprocessSpec

    return np.stack([resize_image(scene_image(i), PreprocessSpec(32)) for i in range(5)])


def _check_embeds(embeds: np.ndarray) -> None:
    assert embeds.shape == (5, 16)
    assert embeds.dtype == np.float32
    np.testing.assert_allclose(np.linalg.norm(embeds, axis=1), 1, atol=1e-5)


def test_a_teacher_has_a_text_side(tiny_teacher_dir, pixels):
    subject = load_subject(tiny_teacher_dir)
    assert (subject.kind, subject.embed_dim, subject.size_mib) == ("teacher", 16, None)
    _check_embeds(subject.encode_pixels(pixels))
    assert subject.encode_texts(["a cat", "a dog"]).shape == (2, 16)


def test_a_run_answers_with_its_teachers_text_side(tiny_run_dir, tiny_teacher_dir, pixels):
    run, teacher = load_subject(tiny_run_dir), load_subject(tiny_teacher_dir)
    assert run.kind == "run"
    assert run.logit_scale == pytest.approx(teacher.logit_scale)
    assert 0 < run.size_mib < 1
    _check_embeds(run.encode_pixels(pixels))
    words = ["a cat", "a dog"]
    np.testing.assert_array_equal(run.encode_texts(words), teacher.encode_texts(words))
    file = load_subject(tiny_run_dir / "checkpoint.safetensors")
    np.testing.assert_array_equal(file.encode_pixels(pixels), run.encode_pixels(pixels))


def test_a_bundle_its_zip_and_its_graph_answer_as_the_run(
    tiny_run_dir, tiny_bundle_dir, pixels, tmp_path
):
    expected = load_subject(tiny_run_dir).encode_pixels(pixels)
    archive = shutil.make_archive(str(tmp_path / "bundle"), "zip", tiny_bundle_dir)
    kinds = {"bundle": tiny_bundle_dir, "zip": archive, "onnx": tiny_bundle_dir / "model.onnx"}
    for name, path in kinds.items():
        subject = load_subject(path)
        assert subject.kind == ("onnx" if name == "onnx" else "bundle")
        assert subject.encode_texts is None
        assert subject.preprocess == load_subject(tiny_run_dir).preprocess
        assert subject.logit_scale == pytest.approx(1 / 0.07, rel=1e-4)
        np.testing.assert_allclose(subject.encode_pixels(pixels), expected, atol=1e-4)
        assert list(subject.label_banks) == ([] if name == "onnx" else ["pets"])


def test_a_lone_graph_of_pixels_and_a_fixed_batch(tiny_run_dir, pixels, tmp_path):
    """It says itself what it takes, how it pads, and how many at once."""
    loaded = load_student(tiny_run_dir)
    preprocess = dataclasses.replace(loaded.preprocess, resize_mode="longest", fill_color=127)
    loaded = dataclasses.replace(loaded, preprocess=preprocess)
    out = export_student(
        loaded, tmp_path / "b", graph=GraphSpec(image_input="uint8", batch_size=2),
        parity_images=normalise_pixels(pixels, preprocess), logit_scale=10.0,
    )  # fmt: skip
    shutil.copy(out / "model.onnx", tmp_path / "lone.onnx")
    subject = load_subject(tmp_path / "lone.onnx")
    assert subject.preprocess == preprocess
    expected = load_subject(tiny_run_dir).encode_pixels(pixels)
    np.testing.assert_allclose(subject.encode_pixels(pixels), expected, atol=1e-4)


def test_a_bundle_may_have_a_text_side(tiny_open_bundle_dir, tiny_teacher_dir, pixels):
    bundle, teacher = load_subject(tiny_open_bundle_dir), load_subject(tiny_teacher_dir)
    assert bundle.kind == "bundle"
    np.testing.assert_allclose(
        bundle.encode_pixels(pixels), teacher.encode_pixels(pixels), atol=1e-4
    )
    for words in (["a cat", "a dog"], ["an eel"]):
        np.testing.assert_allclose(
            bundle.encode_texts(words), teacher.encode_texts(words), atol=1e-5
        )


def test_kinds_are_told_by_files(tiny_run_dir, tiny_bundle_dir, tiny_teacher_dir):
    assert subject_kind(str(tiny_run_dir)) == "run"
    assert subject_kind(str(tiny_bundle_dir)) == "bundle"
    assert subject_kind(str(tiny_teacher_dir)) == "teacher"
    assert subject_kind("sample") == "teacher"
    assert subject_kind("x.zip") == "bundle"
    assert subject_kind("x.onnx") == "onnx"
    with pytest.raises(InputError, match="no model was named"):
        subject_kind("")


@pytest.mark.parametrize(
    ("name", "kind", "message"),
    [
        ("no/such/run", DataError, "no/such/run does not exist"),
        ("gone.zip", CheckpointError, "no bundle at gone.zip"),
        ("gone.onnx", CheckpointError, "no ONNX file at gone.onnx"),
        ("ViT-B-23", UnknownNameError, "Did you mean"),
    ],
)
def test_what_is_not_there(name, kind, message):
    with pytest.raises(kind, match=message):
        load_subject(name)


def test_a_folder_without_a_model(tmp_path):
    with pytest.raises(CheckpointError, match=r"holds no model: none of checkpoint\.safetensors"):
        load_subject(tmp_path)
    (tmp_path / "bundle").mkdir()
    with pytest.raises(CheckpointError) as caught:
        load_subject(tmp_path)
    assert caught.value.hint == str(tmp_path / "bundle")


def test_damaged_files_are_named(tiny_run_dir, tiny_bundle_dir, tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    whole = (tiny_run_dir / "checkpoint.safetensors").read_bytes()
    (run / "checkpoint.safetensors").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(CheckpointError, match="truncated"):
        load_subject(run)
    graph = tmp_path / "model.onnx"
    graph.write_bytes((tiny_bundle_dir / "model.onnx").read_bytes()[:500])
    with pytest.raises(CheckpointError, match="cannot load"):
        load_subject(graph)


def test_a_foreign_graph_cannot_be_asked_but_can_be_timed(tmp_path):
    path = write_foreign_onnx(tmp_path / "foreign.onnx")
    with pytest.raises(DimeFMError, match="was not exported by dimefm_edge") as caught:
        load_subject(path)
    assert caught.value.hint == f"dimefm-edge bench {path}  (times any ONNX file)"


def test_a_checkpoint_without_logit_scale():
    with pytest.raises(CheckpointError, match="the checkpoint of old carries no logit scale"):
        run_logit_scale({}, "old")


def write_foreign_onnx(path: Path) -> Path:
    """y = relu(x), with every dimension but the channels free."""
    from onnx import TensorProto, helper, save

    shape = ["n", 3, "h", "w"]
    graph = helper.make_graph(
        [helper.make_node("Relu", ["x"], ["y"])],
        "foreign",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, shape)],
    )
    opset = [helper.make_opsetid("", 17)]
    save(helper.make_model(graph, opset_imports=opset, ir_version=9), path)
    return path
