"""Our quantizer in torchao's flow: prepared, converted and exported students agree."""

from __future__ import annotations

import pytest
import torch
from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_qat_pt2e

from dimefm_edge.export.quant_rules import QUANT_RULES
from dimefm_edge.quantize.deployed import export_graph
from dimefm_edge.quantize.fake_quant import ActivationFakeQuant
from dimefm_edge.quantize.quantizer import RulesQuantizer
from tests.dimefm_edge.quantize.int8_students import ARM, AVX2, SIDE, cosines, deployed, images


@pytest.mark.parametrize(
    ("family", "rules_name"),
    [("vit", AVX2), pytest.param("hybrid", ARM, marks=pytest.mark.slow)],
)
def test_what_torchao_converts_answers_as_what_was_trained(family, rules_name):
    graph = export_graph(deployed(family), SIDE)
    prepared = prepare_qat_pt2e(graph, RulesQuantizer(QUANT_RULES[rules_name]))
    parts = [m for m in prepared.modules() if isinstance(m, ActivationFakeQuant)]
    for part in parts:
        part.is_observing = True
    with torch.no_grad():
        prepared(images(32))
        for part in parts:
            part.is_observing = False
        trained = prepared(images(16))
        converted = convert_pt2e(prepared)
        found = converted(images(16))
    assert cosines(found, trained).min() >= 0.999
    assert any("dequantize" in str(node.target) for node in converted.graph.nodes)


def test_tensors_that_products_share_are_rounded_once():
    graph = export_graph(deployed("vit"), SIDE)
    prepared = prepare_qat_pt2e(graph, RulesQuantizer(QUANT_RULES[AVX2]))
    named = {node.name: node for node in prepared.graph.nodes}
    q, k, v = (named[name].args[0] for name in ("linear", "linear_1", "linear_2"))
    assert q is k is v
