"""int8 without training: near to the float student, and what suffers most is found."""

from __future__ import annotations

import functools

import pytest
import torch
from torch import nn

from dimefm_edge.export.graph_spec import GraphSpec
from dimefm_edge.export.onnx import export_onnx
from dimefm_edge.quantize.ptq import calibrated, sensitivity, worst_products
from dimefm_edge.quantize.qat import FakeQuantStudent
from tests.dimefm_edge.quantize.int8_students import AVX2, SIDE, cosines, images, student

BROKEN = "trunk.blocks.0.mlp.fc2"


@functools.cache
def made() -> FakeQuantStudent:
    return calibrated(student("vit"), images(32), rules_name=AVX2)


@pytest.fixture
def broken():
    """One product whose integers reach a hundred times too far."""
    found = made()
    ranges = found.ranges()
    found.set_ranges({**ranges, BROKEN: [[100 * x for x in ranges[BROKEN][0]]]})
    yield found
    found.set_ranges(ranges)


def loss(module: nn.Module, family: str = "vit") -> float:
    with torch.no_grad():
        return float((1 - cosines(module(images(32)), student(family)(images(32)))).mean())


def test_calibration_alone_is_near_to_float():
    assert not made().training
    assert loss(made()) < 1e-3


@pytest.mark.parametrize(("family", "least"), [("vit", 0.9999), ("resnet", 0.995)])
def test_fp8_in_torch_is_the_graph_of_fp8(family, least, tmp_path):
    found = calibrated(student(family), images(32), rules_name="tensorrt-fp8")
    assert loss(found, family) < 0.01
    spec = GraphSpec(precision="fp8", quant_rules="tensorrt-fp8")
    written = export_onnx(
        found, tmp_path / "model.onnx", image_size=SIDE, parity_images=images(32).numpy(),
        metadata={}, spec=spec,
    )  # fmt: skip
    assert written.parity.min_cosine > least
    assert len(written.quantized.quantized) == len(found.product_names)


def test_the_broken_product_is_the_most_sensitive(broken):
    costs = sensitivity(broken, images(16))
    assert set(costs) == set(broken.product_names)
    assert max(costs, key=costs.__getitem__) == BROKEN


def test_it_alone_is_left_in_float_when_that_is_enough(broken):
    allowed = 2 * loss_without(broken, BROKEN)
    assert loss(broken) > allowed
    kept = worst_products(broken, images(16), max_drop=allowed, drop=loss)
    assert kept == (BROKEN,)


def test_none_when_nothing_is_lost_and_all_when_nothing_helps():
    assert worst_products(made(), images(8), max_drop=1.0, drop=loss) == ()
    kept = worst_products(made(), images(8), max_drop=-1.0, drop=loss)
    assert set(kept) == set(made().product_names)


def loss_without(found: FakeQuantStudent, name: str) -> float:
    with found.rounding_only([other for other in found.product_names if other != name]):
        return loss(found)
