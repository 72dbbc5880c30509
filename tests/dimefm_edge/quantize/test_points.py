"""Where students are fake-quantised: just where the exporter puts Q/DQ."""

from __future__ import annotations

import functools

import pytest
from torch import fx

from dimefm_edge.export.quant_rules import QUANT_RULES
from dimefm_edge.export.simplify import TracedAttention
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


def test_a_vit_in_onnx_runtime_is_its_linear_layers_without_the_stem():
    names = [product.name for product in products("vit", AVX2)]
    assert len(names) == 2 * 6 + 1
    assert names[:2] == ["trunk.blocks.0.attn.core.q", "trunk.blocks.0.attn.core.k"]
    assert names[-1] == "proj"
    assert "trunk.patch_embed.proj" not in names


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
