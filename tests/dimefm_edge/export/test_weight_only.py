"""Weights in few bits: what is stored, that ONNX Runtime reads it so, and what is refused."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import open_clip
import pytest
from onnx import TensorProto, helper, numpy_helper

from dimefm_edge.data.scenes import scene_image, scene_sentence
from dimefm_edge.encoders import Normalised, TextTower
from dimefm_edge.errors import ExportError, ParityError, UnknownNameError
from dimefm_edge.export import export_student, graph_spec, image_tower
from dimefm_edge.export.text import export_text_onnx, text_precision
from dimefm_edge.export.weight_only import (
    WEIGHT_FORMATS,
    WeightFormat,
    pack_codes,
    quantize_blocks,
    quantize_weights,
)
from dimefm_edge.preprocess import preprocess_images
from dimefm_edge.runtime import ZeroShotClassifier, load_bundle, load_text_encoder
from dimefm_edge.targets import load_target
from dimefm_edge.teacher import load_teacher
from tests.dimefm_edge.export.test_text import build_model

WORDS, INNER, WIDTH = 50, 72, 24  # 72 is no multiple of a block


def restored(codes: np.ndarray, scales: np.ndarray, bits: int, inner: int) -> np.ndarray:
    values = (codes.astype(np.float64) - 2 ** (bits - 1)) * scales[..., None]
    return values.reshape(len(codes), -1)[:, :inner]


@pytest.mark.parametrize(("bits", "block_size"), [(8, 128), (8, 32), (4, 32), (4, 16)])
def test_blocks_are_as_near_as_onnxruntimes_own_or_nearer(bits: int, block_size: int) -> None:
    from onnxruntime.capi import _pybind_state as native

    rows = np.random.default_rng(bits).normal(size=(37, 256)).astype(np.float32)
    rows[3, 32:64] = 0
    rows[4, :32] = 0.25
    codes, scales = quantize_blocks(rows, bits=bits, block_size=block_size)
    assert codes.shape == (37, 256 // block_size, block_size)
    assert codes.max() < 2**bits
    found = restored(codes, scales, bits, 256)
    assert (found[3, 32:64] == 0).all() or block_size > 32
    columns = np.ascontiguousarray(rows.T)
    packed = np.zeros((37, 256 // block_size, block_size * bits // 8), np.uint8)
    theirs = np.zeros((37, 256 // block_size), np.float32)
    zeros = np.zeros((37, 256 // block_size), np.uint8)
    quantise = {4: native.quantize_matmul_4bits, 8: native.quantize_matmul_8bits}[bits]
    quantise(packed, columns, theirs, zeros, block_size, 37, 256, True)
    unpacked = packed
    if bits == 4:
        unpacked = np.stack([packed & 15, packed >> 4], axis=-1).reshape(37, -1, block_size)
    wanted = restored(unpacked, theirs, bits, 256)
    error, their_error = (np.square(x - rows).mean() for x in (found, wanted))
    assert error <= their_error * (1.001 if bits == 8 else 0.95)
    assert error > 0


def test_four_bits_lie_two_a_byte_the_first_one_low() -> None:
    codes = np.array([[[1, 2, 15, 0]]], np.uint8)
    np.testing.assert_array_equal(pack_codes(codes, 4), [[[0x21, 0x0F]]])
    assert pack_codes(codes, 8) is codes


def table_and_products() -> onnx.ModelProto:
    """Words to a product, and two that share a matrix."""
    rng = np.random.default_rng(0)
    weights = {
        "table": rng.normal(size=(WORDS, INNER)), "w": rng.normal(size=(INNER, WIDTH)),
        "v": rng.normal(size=(WIDTH, WIDTH)), "small": rng.normal(size=(3, WIDTH)),
        "three": rng.normal(size=(2, WIDTH, 3)),
    }  # fmt: skip
    nodes = [
        helper.make_node("Gather", ["table", "tokens"], ["words"], name="words"),
        helper.make_node("MatMul", ["words", "w"], ["a"], name="first"),
        helper.make_node("MatMul", ["a", "v"], ["b"], name="second"),
        helper.make_node("MatMul", ["b", "v"], ["c"], name="again"),
        helper.make_node("MatMul", ["c", "three"], ["d"], name="batched"),
        helper.make_node("MatMul", ["d", "small"], ["y"], name="small"),
    ]
    graph = helper.make_graph(
        nodes, "g", [helper.make_tensor_value_info("tokens", TensorProto.INT64, ["B", 2, 7])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["B", 2, 7, WIDTH])],
        [numpy_helper.from_array(v.astype(np.float32), k) for k, v in weights.items()],
    )  # fmt: skip
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)


def run(model: onnx.ModelProto, tokens: np.ndarray, answers: list[str]) -> list[np.ndarray]:
    probe = onnx.ModelProto()
    probe.CopyFrom(model)
    names = [name for name in answers if name != "y"]
    probe.graph.output.extend(
        helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in names
    )
    session = onnxruntime.InferenceSession(
        probe.SerializeToString(), providers=["CPUExecutionProvider"]
    )
    return session.run(answers, {"tokens": tokens})


@pytest.mark.parametrize("name", list(WEIGHT_FORMATS))
def test_onnxruntime_computes_with_what_was_stored(name: str) -> None:
    weights = WEIGHT_FORMATS[name]
    before, model = table_and_products(), table_and_products()
    report = quantize_weights(model, weights)
    assert (report.products, report.tables) == (3, 1)
    assert report.float_products == ("batched", "small")
    assert report.bytes_after < 0.45 * report.bytes_before  # what stays float is a tenth of it
    onnx.checker.check_model(model, full_check=True)
    names = [tensor.name for tensor in model.graph.initializer]
    assert not {"table", "w", "v"} & set(names)
    assert len(names) == len(set(names)) == 2 + 2 * 3  # the shared matrix is stored once

    tokens = np.random.default_rng(1).integers(0, WORDS, (3, 2, 7))
    words, first, second = run(model, tokens, ["words", "a", "b"])
    values = {t.name: numpy_helper.to_array(t) for t in before.graph.initializer}
    codes, scales = quantize_blocks(values["table"], bits=8, block_size=64)
    table = restored(codes, scales, 8, INNER)
    np.testing.assert_allclose(words, table[tokens], atol=1e-6)
    for x, answer, matrix in ((words, first, "w"), (first, second, "v")):
        rows = values[matrix].T
        block = min(weights.block_size, 64 if matrix == "w" else 16)
        stored = restored(
            *quantize_blocks(rows, bits=weights.bits, block_size=block), weights.bits, len(rows[0])
        )
        wanted = x.astype(np.float64) @ stored.T
        # MatMulNBits rounds activations to int8 as well, in blocks of its own.
        assert np.abs(answer - wanted).max() < 0.02 * np.abs(wanted).max()
    assert np.abs(second - run(before, tokens, ["b"])[0]).max() > 1e-4  # it did round


@pytest.fixture(scope="module")
def tokens() -> np.ndarray:
    tokenize = open_clip.SimpleTokenizer(context_length=12)
    return tokenize([scene_sentence(i) for i in range(40)]).numpy()


@pytest.mark.parametrize("kind", ["CLIP", "SigLIP"])
@pytest.mark.parametrize(("name", "share"), [("int8", 0.32), ("int4", 0.32)])
def test_text_towers(
    kind: str, name: str, share: float, tokens: np.ndarray, tmp_path: Path
) -> None:
    """Nine tenths of these are the table of words, which is int8 in both, 16 values a scale."""
    tower = Normalised(TextTower(build_model(kind)))
    level = logging.getLogger().level, list(logging.getLogger().handlers)
    graph = export_text_onnx(
        tower, tmp_path / "t.onnx", parity_tokens=tokens, metadata={}, spec=graph_spec(None),
        weights=WEIGHT_FORMATS[name],
    )  # fmt: skip
    assert (logging.getLogger().level, list(logging.getLogger().handlers)) == level
    assert graph.weights is not None
    assert graph.weights.tables == 1
    assert graph.op_counts["MatMulNBits"] == graph.weights.products > 10
    assert "MatMul" not in graph.op_counts
    assert WEIGHT_FORMATS[name].min_cosine <= graph.parity.min_cosine < 1
    num_values = sum(p.numel() for p in tower.parameters())
    assert (tmp_path / "t.onnx").stat().st_size < share * 4 * num_values
    assert "in integers, weights" in graph.to_dict()["weights"]["summary"]


def test_a_tower_that_suffers_is_refused(tokens: np.ndarray, tmp_path: Path) -> None:
    tower = Normalised(TextTower(build_model("CLIP")))
    strict = WeightFormat(bits=4, block_size=32, min_cosine=0.99999)
    with pytest.raises(
        ParityError,
        match=r"the int4 graph does not answer.*worst on sentence \d+ of 40.*allowed: cosine of "
        r"at least 0\.99999\).*\n  try: dimefm-edge export RUN --text-precision fp32",
    ):
        export_text_onnx(
            tower, tmp_path / "t.onnx", parity_tokens=tokens, metadata={},
            spec=graph_spec(None), weights=strict,
        )  # fmt: skip
    assert not list(tmp_path.iterdir())


def test_which_precision() -> None:
    anywhere, orin = graph_spec(None), graph_spec(load_target("jetson-orin"))
    assert text_precision(anywhere, None) == text_precision(orin, "fp32") == "fp32"
    half = graph_spec(None, precision="fp16")
    assert text_precision(half, None) == text_precision(anywhere, "fp16") == "fp16"
    assert text_precision(half, "int4") == "int4"
    with pytest.raises(ExportError, match=r"tensorrt has no MatMulNBits.*with int4 weights.*\n  "
                       r"try: --text-precision fp16"):  # fmt: skip
        text_precision(orin, "int4")
    with pytest.raises(UnknownNameError, match="unknown text precision 'int2'"):
        text_precision(anywhere, "int2")


def test_a_bundle_names_labels_with_it(tiny_teacher_dir: Path, tmp_path: Path) -> None:
    teacher = load_teacher(str(tiny_teacher_dir))
    images = preprocess_images([scene_image(i) for i in range(4)], teacher.preprocess)
    how: dict[str, Any] = {"graph": graph_spec(None), "text_teacher": teacher}
    out = export_student(
        image_tower(teacher), tmp_path / "b", parity_images=images, logit_scale=100.0,
        parity_sentences=[scene_sentence(i) for i in range(8)], text_precision="int8", **how,
    )  # fmt: skip
    bundle = load_bundle(out)
    text = bundle.manifest["text"]
    assert text["precision"] == "int8"
    assert text["parity"]["num_sentences"] == 14
    sentences = [scene_sentence(i) for i in range(5)]
    found = load_text_encoder(bundle, threads=1).encode_texts(sentences)
    wanted = teacher.encode_texts(sentences)
    assert 0.99 < (found * wanted).sum(axis=1).min() < 1 - 1e-7
    (ranked,) = ZeroShotClassifier(out).classify([scene_image(0)], labels=["a cat", "a dog"])
    assert {label for label, _ in ranked} == {"a cat", "a dog"}

    with pytest.raises(ExportError, match="tensorrt has no MatMulNBits"):
        export_student(
            image_tower(teacher), tmp_path / "orin", parity_images=images, logit_scale=100.0,
            graph=graph_spec(load_target("jetson-orin")), text_teacher=teacher,
            text_precision="int4",
        )  # fmt: skip
    assert [p.name for p in tmp_path.iterdir()] == ["b"]
