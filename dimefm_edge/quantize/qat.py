"""A student that is trained as it will run: in integers, by the rules of a runtime.

    qat_prepare -> warm_up on images -> distil (distill.py) -> export (learned ranges)

The student is deployed first (deployed.py), then exported by torch, annotated by our quantizer
and fake-quantised by torchao's `prepare_qat_pt2e`. What comes out is a module with the student's
weights under their own names that trains as any other; `export_student` takes it as it is.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torchao.quantization.pt2e.quantize_pt2e import prepare_qat_pt2e

from dimefm_edge.errors import ExportError, lookup
from dimefm_edge.export.calibration import Histogram, choose_range
from dimefm_edge.export.learned import LearnedProduct
from dimefm_edge.export.quant_rules import GELU_SLOPE, QUANT_RULES
from dimefm_edge.export.simplify import TracedAttention
from dimefm_edge.export.trace import silence
from dimefm_edge.quantize.deployed import deployed_form, export_graph
from dimefm_edge.quantize.fake_quant import ActivationFakeQuant, BiasFakeQuant, WeightFakeQuant
from dimefm_edge.quantize.points import (
    GELU_SHARE_KEY,
    Product,
    find_products,
    gelus_in_integers,
)
from dimefm_edge.quantize.quantizer import RulesQuantizer

_ATEN = torch.ops.aten
FREEZE_AT = 0.5
"""Share of the training after which ranges no longer follow the activations."""


@dataclass(frozen=True)
class _Point:
    """A product of the graph, and the names of the modules that round for it."""

    name: str
    inputs: tuple[str, ...]
    weight: str | None
    output: str | None

    @property
    def activations(self) -> tuple[str, ...]:
        return self.inputs if self.output is None else (*self.inputs, self.output)


def qat_prepare(
    student: nn.Module, *, image_size: int, rules_name: str, keep_float: Collection[str] = ()
) -> FakeQuantStudent:
    """Fake-quantise a student where the rules of a runtime quantise it.

    Args:
        student: (B, 3, S, S) -> (B, E), L2-normalised; not changed.
        image_size: S.
        rules_name: A name in `QUANT_RULES`.
        keep_float: Names of products to leave in float, as `FakeQuantStudent.product_names`.

    Returns:
        In train mode, with ranges that have seen nothing: `warm_up` comes next.

    Raises:
        ExportError: If torch cannot export the student, or the rules quantise nothing of it.
        UnknownNameError: If there are no such rules.
        MissingExtraError: If torchao is not installed.
    """
    rules = lookup(QUANT_RULES, rules_name, kind="int8 rules")
    template = deployed_form(student, image_size)
    quantizer = RulesQuantizer(rules, keep_float)
    source = copy.deepcopy(template)
    for part in source.modules():
        if isinstance(part, TracedAttention):
            part.is_spelt_out = bool(rules.attention_head_dims)
    exported = export_graph(source, image_size)
    if rules.has_integer_sigmoid:
        _gelus_as_they_run(exported, find_products(exported.graph, rules, keep_float))
    with silence():
        graph = prepare_qat_pt2e(exported, quantizer)
    if not quantizer.products:
        raise ExportError(
            f"the student has no product that {rules_name} runs in int8",
            hint="--qat off, or another --target",
        )
    points = [_point(graph.graph, product) for product in quantizer.products]
    if rules.is_bias_quantized:
        _round_biases(graph, quantizer.products, points)
    return FakeQuantStudent(graph, template, points, rules_name, keep_float).train()


def _gelus_as_they_run(module: fx.GraphModule, products: Sequence[Product]) -> None:
    """Train through x * sigmoid(1.702 x) where the exported graph will have it, in place."""
    graph = module.graph
    for node in gelus_in_integers(graph, products):
        with graph.inserting_before(node):
            steep = graph.call_function(_ATEN.mul.Tensor, (node.args[0], GELU_SLOPE))
            share = graph.call_function(_ATEN.sigmoid.default, (steep,))
            made = graph.call_function(_ATEN.mul.Tensor, (node.args[0], share))
        for new in (steep, share, made):
            new.meta = dict(node.meta)
        share.meta[GELU_SHARE_KEY] = True
        node.replace_all_uses_with(made)
        graph.erase_node(node)
    module.recompile()


def _point(graph: fx.Graph, product: Product) -> _Point:
    """Where torchao put the modules of a product; it makes new nodes with the old names."""
    nodes = {node.name: node for node in graph.nodes}
    node = nodes[product.node.name]
    inputs = tuple(_module_of(arg) for arg in node.args[: len(product.inputs)])
    weight = None if product.weight is None else _module_of(node.args[1])
    output = None
    if product.output is not None:
        behind = [user for user in nodes[product.output.name].users if user.op == "call_module"]
        output = _module_of(behind[0])
    return _Point(product.name, inputs, weight, output)


def _round_biases(
    module: fx.GraphModule, products: Sequence[Product], points: Sequence[_Point]
) -> None:
    """Round the biases that integer kernels add, in place."""
    nodes = {node.name: node for node in module.graph.nodes}
    for product, point in zip(products, points, strict=True):
        node = nodes[product.node.name]
        if point.weight is None or not product.has_integer_bias:
            continue
        name = f"{point.weight}_bias"
        source, weight = (module.get_submodule(n) for n in (point.inputs[0], point.weight))
        assert isinstance(source, ActivationFakeQuant)
        assert isinstance(weight, WeightFakeQuant)
        module.add_submodule(name, BiasFakeQuant(source, weight))
        with module.graph.inserting_before(node):
            rounded = module.graph.call_module(name, (node.args[2],))
        node.args = (*node.args[:2], rounded, *node.args[3:])
    module.recompile()


def _module_of(node: Any) -> str:
    assert isinstance(node, fx.Node)
    assert node.op == "call_module"
    return str(node.target)


class FakeQuantStudent(nn.Module):
    """A student whose products are rounded as its runtime will round them."""

    def __init__(
        self,
        graph: fx.GraphModule,
        template: nn.Module,
        points: Sequence[_Point],
        rules_name: str,
        keep_float: Collection[str],
    ) -> None:
        """Wrap what `prepare_qat_pt2e` gave; made by `qat_prepare`."""
        super().__init__()
        self.graph = graph
        self.rules_name, self.keep_float = rules_name, tuple(keep_float)
        self._template = (template,)  # in a tuple: its weights are not trained
        self._points = tuple(points)

    def forward(self, image: Tensor) -> Tensor:
        """Embed (B, 3, S, S) preprocessed images: (B, E), L2-normalised."""
        embeds: Tensor = self.graph(image)
        return embeds

    def train(self, mode: bool = True) -> FakeQuantStudent:
        """Exported graphs have no modes (dropout and BatchNorm are gone), but ranges do."""
        self.training = mode
        for part in self._activations():
            part.training = mode
        return self

    @property
    def product_names(self) -> tuple[str, ...]:
        """What runs in integers."""
        return tuple(point.name for point in self._points)

    def freeze_ranges(self, is_frozen: bool = True) -> None:
        """Stop ranges, or let them follow the activations of train mode."""
        for part in self._activations():
            part.is_observing = not is_frozen

    @torch.no_grad()
    def warm_up(self, batches: Iterable[Tensor]) -> None:
        """Let ranges see activations of the float student.

        Args:
            batches: Each (B, 3, S, S), preprocessed.
        """
        self.train().freeze_ranges(False)
        with self.rounding_only(()):
            for images in batches:
                self(images)
        self.freeze_ranges()

    @torch.no_grad()
    def calibrate(self, batches: Iterable[Tensor], method: str | None = None) -> None:
        """Choose ranges by all values of the float student's activations, without training.

        Args:
            batches: Each (B, 3, S, S), preprocessed.
            method: minmax, percentile or mse; default: what the rules say.

        Raises:
            ExportError: If an activation is not finite.
            UnknownNameError: If there is no such method.
        """
        method = method or QUANT_RULES[self.rules_name].calibration
        parts = [part for part in self._activations() if not part.is_fixed]
        for part in parts:
            part.histogram = Histogram()
        with self.rounding_only(()):
            for images in batches:
                self(images)
        for part in parts:
            assert part.histogram is not None
            chosen = choose_range(part.histogram, method)
            part.set_range(chosen.low, chosen.high)
            part.histogram = None

    def on_step(self, step: int, total: int) -> None:
        """Before a training step: ranges follow until half of them are done, then stay."""
        self.freeze_ranges(step >= FREEZE_AT * total)

    @contextlib.contextmanager
    def rounding_only(self, names: Collection[str]) -> Iterator[None]:
        """Run but a few products in integers, those of these names, and no GELU's sigmoid."""
        chosen = {
            module
            for point in self._points
            if point.name in names
            for module in (*point.activations, point.weight)
        }
        parts = [
            (name, part)
            for name, part in self.graph.named_modules()
            if isinstance(part, ActivationFakeQuant | WeightFakeQuant)
        ]
        for name, part in parts:
            part.is_rounding = name in chosen
        try:
            yield
        finally:
            for _, part in parts:
                part.is_rounding = True

    def ranges(self) -> dict[str, list[tuple[float, float]]]:
        """Of each product: of its inputs, then of its output where that is rounded."""
        found = {}
        for point in self._points:
            reaches = [self._activation(module).range for module in point.activations]
            found[point.name] = [(reach.low, reach.high) for reach in reaches]
        return found

    def set_ranges(self, ranges: Mapping[str, Sequence[Sequence[float]]]) -> None:
        """Take over what `ranges` gave, of a student prepared alike.

        Raises:
            KeyError: If a product is missing.
            ValueError: If one has another number of ranges.
        """
        for point in self._points:
            for module, (low, high) in zip(point.activations, ranges[point.name], strict=True):
                self._activation(module).set_range(low, high)

    def deployed(self) -> nn.Module:
        """The float student inside: a copy, on the CPU, in eval mode."""
        module = copy.deepcopy(self._template[0])
        ours = self.graph.state_dict()
        for name, value in module.state_dict().items():
            value.copy_(ours[name])
        return module.eval()

    def load_deployed(self, tensors: Mapping[str, Tensor]) -> None:
        """Take over the weights of what `deployed` gave.

        Raises:
            KeyError: If one is missing.
            RuntimeError: If one has another shape.
        """
        ours = self.graph.state_dict()
        for name in self._template[0].state_dict():
            ours[name].copy_(tensors[name])

    def learned(self) -> list[LearnedProduct]:
        """What export needs: products in the order in which they run."""
        products = []
        for point in self._points:
            reaches = [self._activation(module).range for module in point.activations]
            count = len(point.inputs)
            weight = None
            if point.weight is not None:
                weight = self.graph.get_parameter(f"{point.name}.weight").detach().cpu().numpy()
            products.append(
                LearnedProduct(
                    point.name, weight, tuple(reaches[:count]), next(iter(reaches[count:]), None)
                )
            )
        return products

    def _activation(self, module: str) -> ActivationFakeQuant:
        part = self.graph.get_submodule(module)
        assert isinstance(part, ActivationFakeQuant)
        return part

    def _activations(self) -> Iterator[ActivationFakeQuant]:
        return (m for m in self.graph.modules() if isinstance(m, ActivationFakeQuant))
