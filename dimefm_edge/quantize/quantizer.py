"""Our quantizer for torchao's PT2E flow: one class, a runtime's rules are its data."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx
from torchao.quantization.pt2e.fake_quantize import FakeQuantizeBase
from torchao.quantization.pt2e.quantizer import (
    QuantizationAnnotation,
    QuantizationSpec,
    Quantizer,
)
from torchao.quantization.pt2e.quantizer.quantizer import Q_ANNOTATION_KEY

from dimefm_edge.export.calibration import PROBABILITIES
from dimefm_edge.export.quant_rules import QuantRules
from dimefm_edge.quantize.fake_quant import ActivationFakeQuant, WeightFakeQuant
from dimefm_edge.quantize.points import Product, find_products, is_gelu_share, is_softmax


class RulesQuantizer(Quantizer):  # type: ignore[misc]
    """Puts fake quantisation where `rules` put QuantizeLinear and DequantizeLinear."""

    def __init__(self, rules: QuantRules, keep_float: Collection[str] = ()) -> None:
        """Quantise by one of `QUANT_RULES`, but for the products named in `keep_float`."""
        self.rules, self.keep_float = rules, keep_float
        self.products: list[Product] = []
        """What was annotated."""
        dtype = getattr(torch, rules.activation)
        self._activation = QuantizationSpec(dtype, _Maker(lambda: ActivationFakeQuant(rules)))
        self._probabilities = QuantizationSpec(
            dtype, _Maker(lambda: ActivationFakeQuant(rules, PROBABILITIES))
        )
        self._weight = QuantizationSpec(torch.int8, _Maker(lambda: WeightFakeQuant(rules)))

    def annotate(self, model: fx.GraphModule) -> fx.GraphModule:
        """Mark every product's inputs, weight and, where it is written in integers, output; and
        the sigmoid of a GELU in integers."""
        self.products = find_products(model.graph, self.rules, self.keep_float)
        for product in self.products:
            annotation = _annotation(product.node)
            for source in product.inputs:
                spec = self._probabilities if is_softmax(source) else self._activation
                annotation.input_qspec_map[source] = spec
            if product.weight is not None:
                annotation.input_qspec_map[product.weight] = self._weight
            if product.output is not None:
                _annotation(product.output).output_qspec = self._activation
        for node in model.graph.nodes:
            if is_gelu_share(node):
                for user in node.users:
                    _annotation(user).input_qspec_map[node] = self._probabilities
        return model

    def validate(self, model: fx.GraphModule) -> None:
        """Nothing to refuse: what the rules do not know stays float."""


@dataclass(frozen=True)
class _Maker:
    """What torchao calls for a fake quantisation of its own: `with_args` of what the spec says."""

    make: Callable[[], FakeQuantizeBase]
    __name__ = "FakeQuant"

    def with_args(self, **_: Any) -> Callable[[], FakeQuantizeBase]:
        return self.make


def _annotation(node: fx.Node) -> QuantizationAnnotation:
    found: QuantizationAnnotation = node.meta.setdefault(
        Q_ANNOTATION_KEY, QuantizationAnnotation(_annotated=True)
    )
    return found
