"""A foreign graph, and subjects that behave as a test wants."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dimefm_edge.bench.prepare import Prepared, prepare
from dimefm_edge.bench.specs import parse_subjects

SUBJECTS = Path(__file__).with_name("subjects.py")


@pytest.fixture(scope="session")
def prepared_run(
    tiny_run_dir: Path, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], Prepared]:
    """The tiny run made ready for a runtime, once for all that only read it."""

    @functools.cache
    def make(runtime: str) -> Prepared:
        (spec,) = parse_subjects([f"{tiny_run_dir}@{runtime}"])
        return prepare(spec, tmp_path_factory.mktemp("prepared"))

    return make


@pytest.fixture(scope="session")
def foreign_graph(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An ONNX file that is not ours: a product and a ReLU of images of any size."""
    from onnx import TensorProto, helper, numpy_helper, save

    shape = ["n", 3, "h", 32]
    weight = np.random.default_rng(0).normal(size=(32, 32)).astype(np.float32)
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["x", "w"], ["z"]), helper.make_node("Relu", ["z"], ["y"])],
        "foreign",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, shape)],
        [numpy_helper.from_array(weight, "w")],
    )
    path = tmp_path_factory.mktemp("foreign") / "foreign.onnx"
    save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9), path)
    return path


@pytest.fixture
def photos_with_bad(tmp_path: Path) -> Path:
    """A folder of two photos, one that was cut off, and an empty file."""
    folder = tmp_path / "photos"
    folder.mkdir()
    noise = np.random.default_rng(0).integers(0, 256, (2, 96, 128, 3), np.uint8)
    for place, pixels in enumerate(noise):
        Image.fromarray(pixels).save(folder / f"{place}.jpg")
    whole = (folder / "0.jpg").read_bytes()
    (folder / "trunc.jpg").write_bytes(whole[: len(whole) // 2])
    (folder / "empty.jpg").touch()
    return folder
