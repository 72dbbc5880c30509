"""The ONNX Runtime engine: shapes, threads, silence and refusals."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from PIL import Image

from dimefm_edge.data.scenes import scene_image
from dimefm_edge.errors import CheckpointError, DimeFMError, UnknownNameError
from dimefm_edge.preprocess import PreprocessSpec, preprocess_images, resize_image
from dimefm_edge.runtime import Bundle, engines, load_bundle, load_engine
from dimefm_edge.runtime.onnxruntime import (
    OnnxRuntimeEngine,
    count_physical_cores,
    load_session,
    told_precision,
)
from dimefm_edge.targets.cpu import cpu_quant_rules


def test_pixels_and_images_give_the_same_for_any_batch(exported_bundle: Path) -> None:
    bundle = load_bundle(exported_bundle)
    engine = load_engine(bundle, threads=1)
    pictures: list[Image.Image] = [scene_image(i) for i in range(7)]
    pixels = np.stack([resize_image(p, bundle.preprocess) for p in pictures])
    embeds = engine.encode_pixels(pixels)
    assert embeds.shape == (7, engine.embed_dim) == (7, 24)
    assert embeds.dtype == np.float32
    np.testing.assert_allclose(np.linalg.norm(embeds, axis=1), 1, atol=1e-5)
    np.testing.assert_array_equal(
        embeds, engine.encode_image(preprocess_images(pictures, bundle.preprocess))
    )
    for i in range(7):
        np.testing.assert_allclose(engine.encode_pixels(pixels[i : i + 1])[0], embeds[i], atol=1e-5)
    assert engine.encode_pixels(pixels[:0]).shape == (0, 24)


def test_wrong_shapes_are_value_errors(exported_bundle: Path) -> None:
    engine = load_engine(load_bundle(exported_bundle), threads=1)
    with pytest.raises(
        ValueError, match=r"image must be \(B, 3, 32, 32\) float32, got \(3, 32, 32"
    ):
        engine.encode_image(np.zeros((3, 32, 32), np.float32))
    with pytest.raises(ValueError, match=r"got \(1, 3, 64, 64\) float32"):
        engine.encode_image(np.zeros((1, 3, 64, 64), np.float32))
    with pytest.raises(ValueError, match=r"pixels must be \(B, 32, 32, 3\) uint8, got .* float32"):
        engine.encode_pixels(np.zeros((1, 32, 32, 3), np.float32))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="threads must not be negative, got -1"):
        load_engine(load_bundle(exported_bundle), threads=-1)
    with pytest.raises(UnknownNameError, match=r"unknown engine 'onnx'\. Did you mean"):
        load_engine(load_bundle(exported_bundle), engine="onnx")


def test_a_failing_run_is_one_line(exported_bundle: Path) -> None:
    engine = load_engine(load_bundle(exported_bundle), threads=1)
    assert isinstance(engine, OnnxRuntimeEngine)

    class Exhausted:
        def run(self, *_: object) -> None:
            raise RuntimeError("bad allocation\nand a stack trace")

    engine._session = Exhausted()
    with pytest.raises(DimeFMError, match=r"run the model on 2 images: bad allocation\n  try: few"):
        engine.encode_pixels(np.zeros((2, 32, 32, 3), np.uint8))


def test_a_graph_of_other_sizes_than_the_manifest_says(exported_bundle: Path) -> None:
    model = exported_bundle / "model.onnx"
    for preprocess, embed_dim in ((PreprocessSpec(64), 24), (PreprocessSpec(32), 25)):
        with pytest.raises(CheckpointError, match=r"takes \{'image': .* the manifest says"):
            OnnxRuntimeEngine(model, preprocess=preprocess, embed_dim=embed_dim)


def test_a_graph_that_is_not_a_student(tmp_path: Path) -> None:
    value = onnx.helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, [1])
    out = onnx.helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, [1])
    node = onnx.helper.make_node("Identity", ["x"], ["y"])
    graph = onnx.helper.make_graph([node], "g", [value], [out])
    model = onnx.helper.make_model(
        graph, opset_imports=[onnx.helper.make_opsetid("", 20)], ir_version=10
    )
    onnx.save(model, tmp_path / "m.onnx")
    with pytest.raises(CheckpointError, match=r"takes \{'x': .* the manifest says \{'image'"):
        OnnxRuntimeEngine(tmp_path / "m.onnx", preprocess=PreprocessSpec(32), embed_dim=24)
    node.op_type = "Nonesuch"
    onnx.save(
        onnx.helper.make_model(onnx.helper.make_graph([node], "g", [value], [out])),
        tmp_path / "m.onnx",
    )
    with pytest.raises(CheckpointError, match=r"cannot load .*m\.onnx: .*\n  try: pip install"):
        OnnxRuntimeEngine(tmp_path / "m.onnx", preprocess=PreprocessSpec(32), embed_dim=24)


def test_threads_default_to_the_cores_of_this_process(exported_bundle: Path) -> None:
    assert 1 <= count_physical_cores() <= (os.cpu_count() or 1)
    bundle = load_bundle(exported_bundle)
    for threads, expected in ((0, count_physical_cores()), (3, 3)):
        engine = load_engine(bundle, threads=threads)
        assert isinstance(engine, OnnxRuntimeEngine)
        assert engine.threads == expected
        assert engine._session.get_session_options().intra_op_num_threads == expected


def test_loading_and_running_print_nothing(exported_bundle: Path) -> None:
    code = (
        "import sys; import numpy as np; from dimefm_edge.runtime import *\n"
        "engine = load_engine(load_bundle(sys.argv[1]))\n"
        "engine.encode_pixels(np.zeros((2, 32, 32, 3), np.uint8))\n"
    )
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code, str(exported_bundle)],
        capture_output=True, text=True, timeout=60, cwd=Path(__file__).parents[3],
    )  # fmt: skip
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def _int8_bundle(bundle_path: Path, folder: Path, rules: str) -> Bundle:
    """A loaded bundle whose graph is int8 by some rules."""
    from dimefm_edge.export.int8 import quantize_graph
    from dimefm_edge.export.quant_rules import QUANT_RULES

    bundle = load_bundle(bundle_path)
    images = preprocess_images([scene_image(i) for i in range(16)], bundle.preprocess)
    model = quantize_graph(onnx.load(bundle.model_path), images, rules=QUANT_RULES[rules])
    onnx.save(model, folder / "model.onnx")
    manifest = {**bundle.manifest, "precision": "int8", "quantization": {"rules": rules}}
    return dataclasses.replace(bundle, manifest=manifest, model_path=folder / "model.onnx")


@pytest.mark.parametrize("rules", ["onnxruntime-x86", "onnxruntime-x86-avx2", "onnxruntime-arm"])
def test_int8_for_another_cpu_answers_right_and_is_named(
    exported_bundle: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, rules: str
) -> None:
    """As its graph is written, though this CPU's fast kernels may saturate."""
    bundle = _int8_bundle(exported_bundle, tmp_path, rules)
    engines._tell_once.cache_clear()
    engine = load_engine(bundle, threads=1)
    load_engine(bundle, threads=1)  # told once
    images = preprocess_images([scene_image(100 + i) for i in range(64)], bundle.preprocess)
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(str(bundle.model_path), options)
    (written,) = session.run(None, {"image": images})
    assert (engine.encode_image(images) * written).sum(axis=1).min() > 0.9999
    told = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    if rules == cpu_quant_rules():
        assert told == []
    else:
        assert len(told) == 1
        assert f"int8 is made for {rules} and this CPU wants {cpu_quant_rules()}" in told[0]
        assert "try: dimefm-edge export RUN --precision int8" in told[0]


def test_a_file_of_ours_tells_its_precision(tmp_path: Path) -> None:
    """Float weights behind integers stay float where the graph is ours and in int8."""
    rng = np.random.default_rng(0)
    weight = rng.normal(size=(8, 1, 3, 3)).astype(np.float32)
    weight *= np.geomspace(1e-3, 1, 8).reshape(-1, 1, 1, 1).astype(np.float32)
    scales = (np.float32(0.02), np.uint8(128))
    nodes = [
        onnx.helper.make_node("QuantizeLinear", ["image", "s", "z"], ["q"]),
        onnx.helper.make_node("DequantizeLinear", ["q", "s", "z"], ["x"]),
        onnx.helper.make_node("Conv", ["x", "w"], ["c"], group=8, pads=[1, 1, 1, 1]),
        onnx.helper.make_node("QuantizeLinear", ["c", "s", "z"], ["p"]),
        onnx.helper.make_node("DequantizeLinear", ["p", "s", "z"], ["y"]),
    ]
    sizes = ("N", 8, 6, 6)
    graph = onnx.helper.make_graph(
        nodes, "g",
        [onnx.helper.make_tensor_value_info("image", onnx.TensorProto.FLOAT, sizes)],
        [onnx.helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, sizes)],
        [onnx.numpy_helper.from_array(np.asarray(v), n)
         for n, v in zip("szw", (*scales, weight), strict=True)],
    )  # fmt: skip
    model = onnx.helper.make_model(
        graph, opset_imports=[onnx.helper.make_opsetid("", 20)], ir_version=10
    )
    path = tmp_path / "model.onnx"
    image = {"image": rng.normal(size=(2, 8, 6, 6)).astype(np.float32)}

    def answer(precision: str) -> np.ndarray:
        session = load_session(path, 1, precision=precision)
        found: np.ndarray = session.run(None, image)[0]
        return found

    path.write_bytes(model.SerializeToString())
    ours, stock = answer("int8"), answer("fp32")
    assert np.abs(ours - stock).max() > 0.01  # the rewrite spoils it
    np.testing.assert_array_equal(answer(told_precision(path)), stock)  # of others nothing is known
    onnx.helper.set_model_props(model, {"producer": "dimefm_edge", "precision": "int8"})
    path.write_bytes(model.SerializeToString())
    np.testing.assert_array_equal(answer(told_precision(path)), ours)
