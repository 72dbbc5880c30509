"""Where students are fake-quantised: just where the exporter puts Q/DQ."""

from __future__ import annotations

import functools

import pytest
import torch
from torch import fx, nn

from dimefm_edge.export.patches import patches_as_products
from dimefm_edge.export.quant_rules import QUANT_RULES
from dimefm_edge.export.simplify import TracedAttention
from dimefm_edge.export.trace import trace
from dimefm_edge.quantize.deployed import export_graph
from dimefm_edge.quantize.points import find_products, gelus_in_integers
from tests.dimefm_edge.quantize.int8_students import ARM, AVX2, SIDE, TENSORRT, deployed


@functools.cache
def graph(family: str, *, is_spelt_out: bool) -> fx.Graph:
    module = deployed(family)
    for part in module.modules():
        if isinstance(part, TracedAttention):
            part.is_spelt_out = is_spelt_out
    return export_graph(module, SIDE).graph


def products(family: str, rules_name: str, keep_float: tuple[str, ...] = ()):
    exported = graph(family, is_spelt_out=rules_name == TENSORRT)
    return find_products(exported, QUANT_RULES[rules_name], keep_float)


@pytest.mark.parametrize("rules_name", [AVX2, ARM])
def test_a_vit_in_onnx_runtime_is_its_linear_layers_and_its_patches(rules_name):
    found = products("vit", rules_name)
    names = [product.name for product in found]
    assert len(names) == 1 + 2 * 6 + 1
    assert names[:2] == ["trunk.patch_embed.proj", "trunk.blocks.0.attn.core.q"]
    assert names[-1] == "proj"
    assert found[0].output is None  # a MatMul, which answers in float
    assert not found[0].has_integer_bias


class Patches(nn.Module):
    """A convolution of the image whose answers become tokens, or not."""

    def __init__(self, end: str = "tokens", **settings) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 16, **{"kernel_size": 8, "stride": 8} | settings)
        self.end = end

    def forward(self, image):
        maps = self.conv(image)
        if self.end == "maps":
            return maps.mean((2, 3))
        if self.end == "both":
            return maps.flatten(2).transpose(1, 2).mean(1) + maps.mean((2, 3))
        if self.end == "split":
            return torch.cat(maps.chunk(2, 1)[::-1], 1).mean((2, 3))
        if self.end == "permute":
            return maps.reshape(-1, 16, maps.shape[2] * maps.shape[3]).permute(0, 2, 1).mean(1)
        return maps.flatten(2).transpose(1, 2).mean(1)


@pytest.mark.parametrize(
    ("module", "are_patches"),
    [
        (Patches(), True),
        (Patches("permute"), True),
        (Patches("maps"), False),
        (Patches("both"), False),
        (Patches("split"), False),
        (Patches(stride=4), False),
        (Patches(padding=4), False),
        (Patches(kernel_size=3, stride=3), False),  # does not divide the image
        (Patches(dilation=2), False),
        (Patches(kernel_size=1, stride=1), False),
    ],
)
def test_patches_are_what_the_exporter_makes_a_product_of(module, are_patches):
    found = find_products(export_graph(module, SIDE).graph, QUANT_RULES[AVX2])
    assert [product.name for product in found] == ["conv"] * are_patches
    model = trace(
        module, torch.zeros(2, 3, SIDE, SIDE), input_name="image", output_name="out",
        opset=20, attention="decomposed", has_dynamic_batch=True,
    )  # fmt: skip
    assert patches_as_products(model) == are_patches


def test_patches_of_a_feature_map_stay_a_convolution_on_both_sides():
    module = nn.Sequential(nn.Conv2d(3, 3, 3, padding=1), Patches())
    (found,) = find_products(export_graph(module, SIDE).graph, QUANT_RULES[AVX2])
    assert found.name == "1.conv"
    assert found.output is not None
    model = trace(
        module, torch.zeros(2, 3, SIDE, SIDE), input_name="image", output_name="out",
        opset=20, attention="decomposed", has_dynamic_batch=True,
    )  # fmt: skip
    assert patches_as_products(model) == 0


def test_attention_and_the_stem_are_tensorrts():
    found = products("vit", TENSORRT)
    names = [product.name for product in found]
    assert "trunk.patch_embed.proj" in names
    assert len([p for p in found if p.weight is None]) == 2 * 2


@pytest.mark.parametrize(("rules_name", "is_wanted"), [(AVX2, False), (ARM, True)])
def test_depthwise_convolutions_are_for_arm(rules_name, is_wanted):
    names = [product.name for product in products("hybrid", rules_name)]
    assert ("trunk.stages.0.blocks.0.mlp.conv.conv" in names) is is_wanted
    assert "trunk.stages.0.blocks.0.mlp.fc1" in names


def test_a_convolution_answers_in_integers_behind_its_clipping():
    found = {p.name: p for p in products("resnet", AVX2)}
    clipped = [p for p in found.values() if p.output is not None and "relu" in p.output.name]
    assert clipped
    assert found["proj"].output is None


def test_what_is_kept_float_is_no_product():
    assert "proj" not in [product.name for product in products("vit", AVX2, ("proj",))]


@pytest.mark.parametrize(("rules_name", "count"), [(AVX2, 4), (ARM, 9)])
def test_gelus_between_products_are_found(rules_name, count):
    exported = graph("hybrid", is_spelt_out=False)
    found = gelus_in_integers(exported, products("hybrid", rules_name))
    assert len(found) == count  # of the four stages' MLPs; on Arm between depthwise ones too
    for node in found:
        assert all("conv" in user.name for user in node.users)
    some = [p for p in products("hybrid", AVX2) if p.name != "trunk.stages.0.blocks.0.mlp.fc2"]
    assert len(gelus_in_integers(exported, some)) == 3
    assert gelus_in_integers(graph("vit", is_spelt_out=False), products("vit", AVX2)) == []
