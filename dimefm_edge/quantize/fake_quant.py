"""Fake quantisation: tensors rounded as the exporter will round them, gradients passed through.

Put into a graph by torchao (quantizer.py). The arithmetic is that of export/int8.py: 0 is exact,
activations have one scale, weights one for each output channel, taken anew from the largest
weight at every call. Ranges of activations are averaged over batches until they are frozen.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from dimefm_edge.errors import ExportError
from dimefm_edge.export.calibration import Histogram, Range
from dimefm_edge.export.quant_rules import FP8, FP8_MAX, QuantRules
from dimefm_edge.export.trace import silence

with silence():  # of torchao about torch
    from torchao.quantization.pt2e.fake_quantize import FakeQuantizeBase

_MOMENTUM = 0.1
_LIMITS = {"int8": (-128, 127), "uint8": (0, 255), FP8: (-FP8_MAX, FP8_MAX)}


class ActivationFakeQuant(FakeQuantizeBase):  # type: ignore[misc]
    """One scale and zero point for a tensor, from the range that its values were seen to have."""

    qscheme = torch.per_tensor_affine
    is_dynamic = False
    ch_axis = -1
    low: Tensor
    high: Tensor
    num_seen: Tensor

    def __init__(self, rules: QuantRules, fixed: Range | None = None) -> None:
        """Observe nothing yet; `fixed` is a range that is known and stays."""
        super().__init__()
        self.is_symmetric = rules.is_symmetric
        self.quant_min, self.quant_max = _LIMITS[rules.activation]
        self.dtype = getattr(torch, rules.activation)
        self.is_fixed = fixed is not None
        self.is_observing = False
        """Whether values widen the range; only in train mode."""
        self.is_rounding = True
        """Off, values pass as they are."""
        self.histogram: Histogram | None = None
        """Counts the values that pass, while there is one."""
        self.register_buffer("low", torch.tensor(fixed.low if fixed else 0.0))
        self.register_buffer("high", torch.tensor(fixed.high if fixed else 0.0))
        self.register_buffer("num_seen", torch.tensor(0.0))

    def forward(self, x: Tensor) -> Tensor:
        """Round `x` to what its integers stand for."""
        if self.is_observing and self.training and not self.is_fixed:
            self._observe(x.detach())
        if self.histogram is not None and not self.histogram.add(x.detach().float().cpu().numpy()):
            raise ExportError("an activation is not finite: it cannot be quantised")
        if not self.is_rounding:
            return x
        scale, zero_point = self.calculate_qparams()
        if self.dtype == torch.float8_e4m3fn:
            return _round_float8(x.float(), scale)
        # In fp32 whatever autocast says: bf16 cannot tell 256 values apart.
        return torch.fake_quantize_per_tensor_affine(
            x.float(), scale, zero_point, self.quant_min, self.quant_max
        )

    def calculate_qparams(self, **_: Any) -> tuple[Tensor, Tensor]:
        """() scale and () zero point, as int8.py's `_affine` has them."""
        if self.is_symmetric:
            peak = torch.maximum(-self.low, self.high)
            scale = _or_one(peak / self.quant_max)
            return scale, torch.zeros_like(scale, dtype=torch.int32)
        scale = _or_one((self.high - self.low) / (self.quant_max - self.quant_min))
        return scale, (self.quant_min - self.low / scale).round().to(torch.int32)

    @property
    def range(self) -> Range:
        """What the integers reach."""
        return Range(float(self.low), float(self.high))

    def set_range(self, low: float, high: float) -> None:
        """Let the integers reach from `low` to `high`; where the range is known, it stays."""
        if not self.is_fixed:
            self.low.fill_(low)
            self.high.fill_(high)

    @torch.no_grad()
    def _observe(self, x: Tensor) -> None:
        """Average the extremes: of all batches at first, then with the last ones weighing most."""
        reach = torch.stack([(-x.min()).clamp_min(0), x.max().clamp_min(0)]).float()
        if dist.is_available() and dist.is_initialized():
            dist.all_reduce(reach, op=dist.ReduceOp.MAX)
        self.num_seen += 1
        share = (1 / self.num_seen).clamp_min(_MOMENTUM)
        self.low.lerp_(-reach[0], share)
        self.high.lerp_(reach[1], share)


class WeightFakeQuant(FakeQuantizeBase):  # type: ignore[misc]
    """One scale per output channel, axis 0, or the same for all of them; zero point 0."""

    qscheme = torch.per_channel_symmetric
    is_dynamic = False
    ch_axis = 0

    def __init__(self, rules: QuantRules) -> None:
        """Round to `rules.weight_bits` bits."""
        super().__init__()
        self.quant_min, self.quant_max = -rules.weight_max, rules.weight_max
        self.dtype = torch.float8_e4m3fn if rules.weight == FP8 else torch.int8
        self.is_per_channel = rules.is_weight_per_channel
        self.is_rounding = True
        self.scale = torch.ones(1)
        """(O,) of the last weight that was rounded."""

    def forward(self, weight: Tensor) -> Tensor:
        """Round a weight (O, ...), each output channel by its largest value."""
        if not self.is_rounding:
            return weight
        peak = weight.detach().flatten(1).abs().amax(dim=1).float()
        if not self.is_per_channel:
            peak = peak.amax().expand_as(peak)
        self.scale = _or_one(peak) / self.quant_max
        if self.dtype == torch.float8_e4m3fn:
            return _round_float8(weight, self.scale.view(-1, *[1] * (weight.ndim - 1)))
        zero_point = torch.zeros_like(self.scale, dtype=torch.int32)
        return torch.fake_quantize_per_channel_affine(
            weight, self.scale, zero_point, 0, self.quant_min, self.quant_max
        )

    def calculate_qparams(self, **_: Any) -> tuple[Tensor, Tensor]:
        """(O,) scales and zeros of the last weight that was rounded."""
        return self.scale, torch.zeros_like(self.scale, dtype=torch.int64)


class BiasFakeQuant(nn.Module):
    """A bias in whole steps of its product's input and weight, as int32 kernels add it."""

    def __init__(self, source: ActivationFakeQuant, weight: WeightFakeQuant) -> None:
        """Take the steps of what rounds the input and the weight, which are called before."""
        super().__init__()
        self._rounded = (source, weight)  # in a tuple: they are parts of the graph already

    def forward(self, bias: Tensor) -> Tensor:
        """Round (O,), unless its input or weight is not rounded."""
        source, weight = self._rounded
        if not (source.is_rounding and weight.is_rounding):
            return bias
        step = source.calculate_qparams()[0] * weight.scale
        step = _or_one(torch.maximum(step, bias.detach().abs() / 2**30))  # of 32 bits, as int8.py
        return bias + (step * (bias / step).round() - bias).detach()


def _round_float8(x: Tensor, scale: Tensor) -> Tensor:
    """To what e4m3 holds; gradients pass where it is not clipped."""
    clipped = (x / scale).clamp(-FP8_MAX, FP8_MAX)
    return scale * (clipped + (clipped.to(torch.float8_e4m3fn).float() - clipped).detach())


def _or_one(values: Tensor) -> Tensor:
    return torch.where(values > 0, values, torch.ones_like(values))
