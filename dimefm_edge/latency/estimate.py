"""Latency of a model on a target, with an honest interval and how it is known.

The model's costs (operators.py) are priced: by the profile that `calibrate` measured on this
machine; else by the fit on published latencies (published.py), for the device itself or, scaled
by peak arithmetic and bandwidth, for a sibling or another power mode of it.

No torch here: trace.py and onnx_costs.py list the operators.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from dimefm_edge.errors import InputError, UnknownNameError, lookup
from dimefm_edge.latency.operators import (
    COSTS,
    Operator,
    Vector,
    cost_vector,
    total_gmacs,
    total_params_m,
)
from dimefm_edge.latency.profile import load_profile
from dimefm_edge.latency.published import Context, context_of, load_published
from dimefm_edge.targets import Target, load_target

if TYPE_CHECKING:
    from torch import nn

SCALED_SPREAD = math.log(2.0)
"""Half width in log ms of the 80% interval of a device or mode whose prices were scaled from
another's: a guess, since no published rows test it."""


@dataclass(frozen=True)
class LatencyEstimate:
    """What a model will take, give or take."""

    latency_ms: float
    """One call. On a Jetson, copies to and from the GPU count where the published rows that its
    profile names (`prices`) count them."""
    low_ms: float
    high_ms: float
    """80% of the truths should lie between."""
    basis: str
    """calibrated: measured blocks and models on this machine; published: fitted on latencies of
    this very device and of this runtime, if not always of both together; roofline: a fit's
    prices, scaled by specifications or leaning on another precision's."""
    gmacs: float
    """1e9 multiply-adds of matmuls, convolutions and attentions, for the batch."""
    params_m: float
    """Millions of weights."""


@dataclass(frozen=True)
class Place:
    """Where an estimate is for, and what each cost is there."""

    log_prices: Vector
    """log ms of one unit of each cost, shape (len(COSTS),)."""
    spread: float
    """Half width of the 80% interval in log ms, for a model that no fit has seen."""
    basis: str
    context: Context | None = None
    """Set where the prices are of published rows, which may know the very model."""

    def estimate(self, costs: Vector, *, model: str = "") -> tuple[float, float, float]:
        """ms, and its 80% interval; `model` is `name@image size` where it is one of timm's."""
        if self.context is not None:
            published = load_published()
            latency = published.latency_ms(self.context, costs, model=model)
            spread = published.spread(self.context, model=model)
        else:
            latency, spread = float(np.exp(self.log_prices) @ costs), self.spread
        return latency, latency / math.exp(spread), latency * math.exp(spread)


def place_of(device: str, runtime: str, precision: str) -> Place:
    """A place by the names that published tables use; one of our targets' names does, too.

    Raises:
        UnknownNameError: If neither the published rows nor the targets have the device.
        InputError: If it is a target, and the runtime is not for its kind of hardware.
    """
    context, published = context_of(device, runtime, precision), load_published()
    if not published.knows(context):
        if _is_target(device):
            return _place_in(load_target(device), runtime, precision)
        published.check_device(context.device)
    return _published_at(context)


_OWN_NAMES = {
    "onnxruntime": ("onnxruntime", "onnx", "ort"), "tensorrt": ("tensorrt", "trt", "trtexec"),
}  # fmt: skip
_NO_NAMES = ("", "notstated")
_NOT_LETTERS = re.compile(r"v?[\d.]+|[^a-z]")


def _place_in(target: Target, runtime: str, precision: str) -> Place:
    """A target's place in another runtime than its own, if the row names one."""
    lookup(target.peak_tflops, precision, kind=f"precision on {target.name}")
    prices, name = target.prices, target.prices.get(precision, precision)
    own = context_of(prices["device"], prices["runtime"], name)
    spelt = runtime.lower().replace("onnxruntime", "onnx runtime")
    other = context_of(prices["device"], spelt, name)
    plain = _NOT_LETTERS.sub("", runtime.lower())
    called = _OWN_NAMES[target.runtime]
    is_own = other.runtime == own.runtime or plain in (*_NO_NAMES, *called)
    if is_own or plain.startswith(tuple(f"{word}{own.hardware}" for word in called)):
        return place_on(target, precision)
    if other.hardware != own.hardware:
        raise InputError(
            f"{target.name} runs {target.runtime} ({own.hardware}), not '{runtime.strip()}'"
        )
    place = published_place(target, precision, runtime=spelt)
    return place if load_published().has_rows(other) else replace(place, basis="roofline")


def _published_at(context: Context) -> Place:
    published = load_published()
    basis = "published" if published.knows_runtime(context) else "roofline"
    return Place(published.log_prices(context), published.spread(context), basis, context)


def _is_target(name: str) -> bool:
    try:
        load_target(name)
    except UnknownNameError:
        return False
    return True


def place_on(target: Target, precision: str) -> Place:
    """A place by target: calibrated if it is this machine and was, else from published rows.

    Raises:
        UnknownNameError: If the target does not run that precision.
    """
    lookup(target.peak_tflops, precision, kind=f"precision on {target.name}")
    profile = load_profile(target, precision)
    if profile is not None:
        return Place(profile.log_prices, profile.spread, "calibrated")
    return published_place(target, precision)


def published_place(target: Target, precision: str, *, runtime: str | None = None) -> Place:
    """`place_on` without this machine's profile; `runtime` is another than the target's own."""
    published, prices = load_published(), target.prices
    name = prices.get(precision, precision)
    context = context_of(prices["device"], runtime or prices["runtime"], name)
    if prices["mode"] == target.full_name:
        return _published_at(context)
    scale = _scale(target, load_target(prices["mode"]), precision)
    spread = max(SCALED_SPREAD, published.spread(context))
    return Place(published.log_prices(context) + scale, spread, "roofline")


def _scale(target: Target, anchor: Target, precision: str) -> Vector:
    """What a target's log prices are above its anchor's: peaks and bandwidth; launches halfway."""

    def peak(where: Target) -> float:
        return where.peak_tflops.get(precision) or max(where.peak_tflops.values())

    macs = math.log(peak(anchor) / peak(target))
    memory = math.log(anchor.bandwidth_gbs / target.bandwidth_gbs)
    launches = (macs + memory) / 2
    by_rate = {"mac": macs, "weight": memory, "activation": memory}
    return np.array([by_rate.get(cost.rate, launches) for cost in COSTS])


def estimate_latency(
    ops: Iterable[Operator], target: Target, *, precision: str | None = None
) -> LatencyEstimate:
    """Estimate one forward pass on a target.

    Args:
        ops: Operators of the pass: `trace_ops`, `trace_student`, `trace_timm` or `onnx_ops`.
        target: Where.
        precision: fp32, fp16, fp8 or int8; default: the target's.

    Raises:
        UnknownNameError: If the target does not run that precision.
    """
    return estimate_at(ops, place_on(target, precision or target.precision))


def estimate_at(ops: Iterable[Operator], place: Place) -> LatencyEstimate:
    """`estimate_latency` at a place that was found before: for many models."""
    ops = list(ops)
    latency, low, high = place.estimate(cost_vector(ops))
    return LatencyEstimate(
        latency, low, high, place.basis, total_gmacs(ops), total_params_m(ops)
    )  # fmt: skip


def trace_ops(module: nn.Module, image_size: int, batch: int = 1) -> list[Operator]:
    """List the operators of a torch module: see `trace.trace_ops`."""
    from dimefm_edge.latency import trace

    return trace.trace_ops(module, image_size, batch)


@dataclass(frozen=True)
class GraphFacts:
    """What an ONNX graph says of itself."""

    precision: str | None
    """Of a graph that we exported; None of any other."""
    image_size: int | None
    """Side of its images in pixels; if it takes any, the one that it was exported for."""
    takes_any_size: bool


def graph_facts(path: Path) -> GraphFacts:
    """Read what an ONNX file says of itself, but not its weights.

    A file that cannot be read says nothing: `onnx_ops` says what is wrong with it.
    """
    try:
        import onnx

        model = onnx.load(str(path), load_external_data=False)
    except Exception:  # protobuf's DecodeError is not exported by name
        return GraphFacts(None, None, takes_any_size=True)
    weights = {w.name for w in model.graph.initializer}
    shapes = [v.type.tensor_type.shape for v in model.graph.input if v.name not in weights]
    sides = [dim.dim_value for shape in shapes for dim in shape.dim[1:]]  # 0: free
    told = {entry.key: entry.value for entry in model.metadata_props}
    if told.get("producer") != "dimefm_edge":
        told = {}
    takes_any_size = 0 in sides
    size = told.get("image_size", "0") if takes_any_size else max(sides, default=0)
    own = told.get("precision", "fp32") if told else None
    return GraphFacts(own, int(size) or None, takes_any_size)


def estimate_onnx(
    path: Path,
    target: Target,
    *,
    precision: str | None = None,
    batch: int = 1,
    image_size: int | None = None,
) -> LatencyEstimate:
    """Estimate an ONNX file; its weights are not loaded. See `onnx_costs.graph_costs`."""
    from dimefm_edge.latency.onnx_costs import graph_costs

    costs = graph_costs(path, batch=batch, image_size=image_size)
    costs.warn(path)
    return estimate_latency(costs.ops, target, precision=precision)
