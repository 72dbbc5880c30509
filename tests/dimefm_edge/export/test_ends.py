"""The ends of a graph: pixels in as Pillow would prepare them, class scores out."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from dimefm_edge.data.scenes import scene_image
from dimefm_edge.errors import ExportError
from dimefm_edge.export.ends import add_head, normalised_to_pixels, take_pixels
from dimefm_edge.export.graph_spec import GraphSpec
from dimefm_edge.export.onnx import export_onnx
from dimefm_edge.labels import LabelBank
from dimefm_edge.preprocess import PreprocessSpec, normalise_pixels, resize_image
from dimefm_edge.students import build_student, vit_spec

SIDE = 32


def front_only(preprocess: PreprocessSpec, *, resize: bool) -> onnxruntime.InferenceSession:
    """A graph that gives what it would have prepared."""
    helper, kind = onnx.helper, onnx.TensorProto.FLOAT
    sides = ["batch", 3, preprocess.image_size, preprocess.image_size]
    graph = helper.make_graph(
        [helper.make_node("Identity", ["image"], ["image_embeds"])], "g",
        [helper.make_tensor_value_info("image", kind, sides)],
        [helper.make_tensor_value_info("image_embeds", kind, sides)],
    )  # fmt: skip
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    take_pixels(model, preprocess, resize=resize)
    onnx.checker.check_model(model, full_check=True)
    return onnxruntime.InferenceSession(
        model.SerializeToString(), providers=["CPUExecutionProvider"]
    )


def on_edges(size: int, width: int, height: int, mode: str) -> list[int]:
    """Places of an axis that `nearest` takes from exactly the edge between two pixels."""
    resized, start = SIDE, 0
    if mode == "shortest":
        resized = int(SIDE * size / min(width, height))
        start = round((resized - SIDE) / 2)
    if mode == "longest":
        resized = max(1, round(size / (max(width, height) / SIDE)))
        start = -((SIDE - resized) // 2)
    middles = (Fraction(2 * (place + start) + 1, 2) * size / resized for place in range(SIDE))
    return [place for place, middle in enumerate(middles) if middle.denominator == 1]


@pytest.fixture(scope="module")
def fronts() -> dict[tuple[str, str], tuple[PreprocessSpec, onnxruntime.InferenceSession]]:
    specs = {
        (mode, kind): PreprocessSpec(SIDE, resize_mode=mode, interpolation=kind, fill_color=9)
        for mode in ("shortest", "longest", "squash")
        for kind in ("bicubic", "bilinear", "nearest")
    }
    return {key: (spec, front_only(spec, resize=True)) for key, spec in specs.items()}


@given(
    width=st.integers(8, 150),
    height=st.integers(8, 150),
    mode=st.sampled_from(["shortest", "longest", "squash"]),
    kind=st.sampled_from(["bicubic", "bilinear", "nearest"]),
)
@settings(max_examples=60, deadline=None)
def test_resizing_in_the_graph_is_pillows(fronts, width, height, mode, kind):
    """To a level; but for bicubic's overshoot, which Pillow clips between its two passes."""
    preprocess, session = fronts[mode, kind]
    image = scene_image(width + height).resize((width, height), Image.Resampling.BICUBIC)
    (found,) = session.run(None, {"image": np.asarray(image)[None]})
    expected = normalise_pixels(resize_image(image, preprocess)[None], preprocess)
    assert found.shape == expected.shape
    std = np.array(preprocess.std, np.float32).reshape(1, 3, 1, 1)
    levels = np.abs(found - expected) * std * 255
    if kind == "nearest":
        levels[..., on_edges(width, width, height, mode)] = 0
        levels[:, :, on_edges(height, width, height, mode)] = 0
    worst = np.quantile(levels, 0.95) if kind == "bicubic" else levels.max()
    assert worst <= {"bicubic": 2.01, "bilinear": 1.01, "nearest": 0.01}[kind]
    assert levels.mean() < 0.6


def test_pixels_are_normalised_exactly():
    preprocess = PreprocessSpec(SIDE)
    pixels = np.random.default_rng(0).integers(0, 256, (3, SIDE, SIDE, 3), dtype=np.uint8)
    session = front_only(preprocess, resize=False)
    (found,) = session.run(None, {"image": pixels})
    np.testing.assert_allclose(found, normalise_pixels(pixels, preprocess), atol=1e-6)
    np.testing.assert_array_equal(
        normalised_to_pixels(normalise_pixels(pixels, preprocess), preprocess), pixels
    )


def test_a_head_scores_classes():
    helper, kind = onnx.helper, onnx.TensorProto.FLOAT
    names = ("image", "image_embeds")
    values = [helper.make_tensor_value_info(name, kind, ["batch", 4]) for name in names]
    graph = helper.make_graph(
        [helper.make_node("Identity", ["image"], ["image_embeds"])], "g", values[:1], values[1:]
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    bank = LabelBank("two", ("a", "b"), ("{c}",), np.eye(2, 4, dtype=np.float32))
    add_head(model, bank, 50.0)
    onnx.checker.check_model(model, full_check=True)
    session = onnxruntime.InferenceSession(
        model.SerializeToString(), providers=["CPUExecutionProvider"]
    )
    x = np.random.default_rng(0).normal(size=(3, 4)).astype(np.float32)
    embeds, logits = session.run(["image_embeds", "logits"], {"image": x})
    np.testing.assert_allclose(logits, 50 * embeds[:, :2], rtol=1e-6)


@pytest.mark.parametrize("image_input", ["uint8", "image"])
def test_an_export_that_takes_pixels_is_checked_on_pixels(image_input: str, tmp_path: Path):
    torch.manual_seed(0)
    sizes = {"image_size": SIDE, "embed_dim": 24, "patch_size": 16}
    student = build_student(vit_spec(**sizes, width=32, depth=1, num_heads=1)).eval()
    preprocess = PreprocessSpec(SIDE)
    pixels = np.stack([resize_image(scene_image(i), preprocess) for i in range(4)])
    graph = export_onnx(
        student, tmp_path / "m.onnx", image_size=SIDE, metadata={},
        parity_images=normalise_pixels(pixels, preprocess),
        spec=GraphSpec(image_input=image_input, batch_size=2), preprocess=preprocess,
    )  # fmt: skip
    assert graph.parity.max_abs_diff < 1e-4
    session = onnxruntime.InferenceSession(
        str(tmp_path / "m.onnx"), providers=["CPUExecutionProvider"]
    )
    sides = [SIDE, SIDE] if image_input == "uint8" else ["height", "width"]
    assert session.get_inputs()[0].shape == [2, *sides, 3]
    with pytest.raises(ExportError, match="takes pixels needs to know how they are prepared"):
        export_onnx(
            student, tmp_path / "m.onnx", image_size=SIDE, metadata={},
            parity_images=normalise_pixels(pixels, preprocess),
            spec=GraphSpec(image_input=image_input),
        )  # fmt: skip
