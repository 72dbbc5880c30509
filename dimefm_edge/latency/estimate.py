"""Latency of a model on a target that is not here: a roofline, kernel by kernel.

Each kernel takes the longer of its arithmetic (at the reached share of the peak) and its memory
traffic, plus a fixed launch time. Specifications and a handful of published latencies are all
that stands behind it, so the answer is an interval of a factor of two either way, and models
are ranked better than they are timed. Measure on the device before you promise anything.

No torch here: trace.py and onnx_costs.py list the kernels.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from dimefm_edge.errors import lookup
from dimefm_edge.targets import Target

if TYPE_CHECKING:
    from torch import nn

FLOAT_BYTES = 4
INTERVAL_FACTOR = 2.0
"""The interval is latency / 2 to latency x 2. Of 85 published latencies of CNNs (Orin Nano, AGX
Orin, Xaviers, Jetson Nano, Raspberry Pi 4 and 5; the constants in the profiles were set by hand
on the same rows, so this is no test) 75 lie inside, all 25 of Orin among them. Outside:
DenseNets on AGX Xavier (down to a fifth) and EfficientViT on the Jetson Nano (to 0.28). No
published latency of a whole ViT on a Jetson was at hand."""
_WIDTH = {"fp32": 1.0, "fp16": 0.5, "int8": 0.25}


@dataclass(frozen=True)
class OpCost:
    """One kernel."""

    name: str
    flops: float
    """A multiply-add is two."""
    bytes: float
    """Read and written, as if in fp32."""
    kind: str = "dense"
    """dense (matmul, convolution), attention, depthwise, or memory (norms, pooling)."""
    params: int = 0
    """Weights that it is the first to use."""

    def with_epilogue(self, name: str, extra_bytes: float, params: int) -> OpCost:
        """This kernel with a pointwise operation fused in."""
        return replace(
            self,
            name=f"{self.name}+{name}" if len(self.name) < 80 else self.name,
            bytes=self.bytes + extra_bytes,
            params=self.params + params,
        )


@dataclass(frozen=True)
class LatencyEstimate:
    """What a model will take, give or take."""

    latency_ms: float
    """One batch, input and output copies excluded."""
    low_ms: float
    high_ms: float
    basis: str
    """`roofline`: specifications, not measurements."""
    gmacs: float
    """1e9 multiply-adds of matmuls, convolutions and attentions, for the batch."""
    params_m: float
    """Millions of weights."""


def estimate_latency(
    ops: Iterable[OpCost], target: Target, *, precision: str | None = None
) -> LatencyEstimate:
    """Estimate one forward pass on a target.

    Args:
        ops: Kernels of the pass: `trace_ops`, `trace_student`, `trace_timm` or `onnx_ops`.
        target: Where.
        precision: fp32, fp16 or int8; default: the target's. In int8, only matmuls and
            convolutions are; the rest stays in fp16 where the target has it.

    Raises:
        UnknownNameError: If the target does not run that precision.
    """
    precision = precision or target.precision
    lookup(target.peak_tflops, precision, kind=f"precision on {target.name}")
    ops = list(ops)
    total_us = sum(_kernel_us(op, target, precision) + target.launch_us for op in ops)
    latency_ms = total_us / 1e3
    return LatencyEstimate(
        latency_ms=latency_ms,
        low_ms=latency_ms / INTERVAL_FACTOR,
        high_ms=latency_ms * INTERVAL_FACTOR,
        basis="roofline",
        gmacs=total_gmacs(ops),
        params_m=sum(op.params for op in ops) / 1e6,
    )


def total_gmacs(ops: Iterable[OpCost]) -> float:
    """1e9 multiply-adds of matmuls, convolutions and attentions."""
    return sum(op.flops for op in ops) / 2e9


def trace_ops(module: nn.Module, image_size: int, batch: int = 1) -> list[OpCost]:
    """List the kernels of a torch module: see `trace.trace_ops`."""
    from dimefm_edge.latency import trace

    return trace.trace_ops(module, image_size, batch)


def estimate_onnx(
    path: Path,
    target: Target,
    *,
    precision: str | None = None,
    batch: int = 1,
    image_size: int | None = None,
) -> LatencyEstimate:
    """Estimate an ONNX file; its weights are not loaded. See `onnx_costs.onnx_ops`."""
    from dimefm_edge.latency.onnx_costs import onnx_ops

    ops: Sequence[OpCost] = onnx_ops(path, batch=batch, image_size=image_size)
    return estimate_latency(ops, target, precision=precision)


def _kernel_us(op: OpCost, target: Target, precision: str) -> float:
    if precision == "int8" and op.kind != "dense":
        precision = "fp16" if "fp16" in target.peak_tflops else "fp32"
    share = target.efficiency
    bytes_per_us = target.bandwidth_gbs * share["bandwidth"] * 1e3
    memory_us = op.bytes * _WIDTH[precision] / bytes_per_us
    if op.flops == 0:
        return memory_us
    flops_per_us = target.peak_tflops[precision] * share[op.kind] * 1e6
    return max(op.flops / flops_per_us, memory_us)
