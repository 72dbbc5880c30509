"""Ranges of activations: a graph is run on images, and each tensor's values are counted.

Used by int8.py. Memory is bounded: a few images at a time, and one histogram per tensor.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from dimefm_edge.errors import ExportError, lookup
from dimefm_edge.export.parity import cpu_session
from dimefm_edge.export.quant_rules import CalibrationMethod
from dimefm_edge.manifest import INPUT_NAME

if TYPE_CHECKING:
    import onnx

_BINS = 8192  # over [-reach, reach], reach a power of two
_BATCH = 4
_TAIL = 1e-5  # share of values that the percentile method clips, on each side
_CLIPS = np.linspace(0.2, 1.0, 81)  # thresholds that the MSE method tries, of the largest value


@dataclass(frozen=True)
class Range:
    """The values that a tensor's integers stand for; holds 0."""

    low: float
    high: float


PROBABILITIES = Range(0.0, 1.0)
"""What a softmax answers, whatever it is asked."""


def calibrate(
    model: onnx.ModelProto,
    images: npt.NDArray[np.float32],
    *,
    tensors: Sequence[str],
    method: CalibrationMethod,
) -> dict[str, Range]:
    """Run a graph in ONNX Runtime and choose a range for each tensor.

    Args:
        model: fp32, with shapes; its input is `image`. Not changed.
        images: (N, 3, S, S) float32, preprocessed.
        tensors: Names of float tensors of the graph.
        method: minmax takes all values; percentile all but one in 1e5 on each side; mse the
            threshold with the least squared error in 8 bits.

    Raises:
        ExportError: If there are no images, or an activation is not finite.
        UnknownNameError: If there is no such method.
    """
    lookup(_METHODS, method, kind="calibration method")
    if not len(images):
        raise ExportError("calibration needs at least one image", hint="--images FOLDER")
    histograms = {name: Histogram() for name in tensors}
    inner = [name for name in tensors if name != INPUT_NAME]
    session = _probe(model, inner)
    batch = session.get_inputs()[0].shape[0]
    size = batch if isinstance(batch, int) else _BATCH
    for start in range(0, len(images), size):
        piece = images[np.arange(start, start + size) % len(images)]  # the last one is filled up
        values = session.run(inner, {INPUT_NAME: piece}) if inner else []
        for name, value in zip([*inner, INPUT_NAME], [*values, piece], strict=True):
            if name in histograms and not histograms[name].add(value):
                raise ExportError(
                    f"activation '{name}' is not finite on one of {size} images from number "
                    f"{start} on: it cannot be quantised",
                    hint="dimefm-edge export RUN --precision fp32",
                )
    return {name: choose_range(histogram, method) for name, histogram in histograms.items()}


def _probe(model: onnx.ModelProto, tensors: Sequence[str]) -> Any:
    """A session that answers with these tensors of the graph, and nothing else."""
    import onnx

    probe = onnx.ModelProto()
    probe.CopyFrom(model)
    del probe.graph.output[:]
    probe.graph.output.extend(
        onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, None) for name in tensors
    )
    return cpu_session(probe.SerializeToString())


class Histogram:
    """Counts of values in equal bins around zero; the reach doubles when a value lies outside."""

    def __init__(self) -> None:
        self.counts = np.zeros(_BINS, np.int64)
        self.reach = 0.0
        self.low = self.high = 0.0

    def add(self, values: npt.NDArray[np.float32]) -> bool:
        """Count values; False, and nothing counted, if one is not finite."""
        low, high = float(values.min(initial=0)), float(values.max(initial=0))
        peak = max(-low, high)
        if not math.isfinite(peak):
            return False
        self.low, self.high = min(self.low, low), max(self.high, high)
        self._widen(peak)
        if peak:
            scaled = values.ravel() * (_BINS / 2 / self.reach) + _BINS / 2
            bins = np.minimum(scaled.astype(np.int32), _BINS - 1)
            self.counts += np.bincount(bins, minlength=_BINS)
        return True

    def centers(self) -> npt.NDArray[Any]:
        """(BINS,) the value in the middle of each bin."""
        return (np.arange(_BINS) + 0.5) * (2 * self.reach / _BINS) - self.reach

    def _widen(self, peak: float) -> None:
        if peak and not self.reach:
            self.reach = 2.0 ** math.ceil(math.log2(peak))
        while peak > self.reach:
            self.reach *= 2
            merged = self.counts.reshape(-1, 2).sum(axis=1)
            self.counts = np.pad(merged, _BINS // 4)


def choose_range(histogram: Histogram, method: str) -> Range:
    """How far integers shall reach, given all values that were seen.

    Raises:
        UnknownNameError: If there is no such method.
    """
    return lookup(_METHODS, method, kind="calibration method")(histogram)


def _minmax(histogram: Histogram) -> Range:
    return Range(histogram.low, histogram.high)


def _percentile(histogram: Histogram) -> Range:
    counts = histogram.counts
    tail = _TAIL * counts.sum()
    step = 2 * histogram.reach / _BINS
    below = int(np.searchsorted(np.cumsum(counts), tail, side="right"))
    above = int(np.searchsorted(np.cumsum(counts[::-1]), tail, side="right"))
    low = min(0.0, below * step - histogram.reach)
    high = max(0.0, histogram.reach - above * step)
    return Range(max(low, histogram.low), min(high, histogram.high))


def _mse(histogram: Histogram) -> Range:
    """Clip both sides at one magnitude, the best of many."""
    filled = np.flatnonzero(histogram.counts)
    if not filled.size:
        return Range(0.0, 0.0)
    counts, centers = histogram.counts[filled], histogram.centers()[filled]
    peak = max(-histogram.low, histogram.high)

    def error(clip: float) -> float:
        low, high = max(histogram.low, -clip), min(histogram.high, clip)
        step = (high - low) / 255
        rounded = np.clip(np.round((centers - low) / step), 0, 255) * step + low
        return float((counts * (rounded - centers) ** 2).sum())

    clip = float(min(_CLIPS * peak, key=error))
    return Range(max(histogram.low, -clip), min(histogram.high, clip))


_METHODS = {"minmax": _minmax, "percentile": _percentile, "mse": _mse}
