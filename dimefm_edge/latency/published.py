"""The latency model that was fitted on published latencies, and its coefficients in any context.

A context is a device, a runtime and a precision. The time of a model there is the sum of its
costs (operators.py), each at a price:

    ms = sum over costs of  exp(prior + offsets of the context's levels) x count

In a context that rows were measured in, models alike have a say too (analogy.py): the answer is
the weighted mean of both logs.

Offsets are shared along a hierarchy (all devices of a kind; of a kind and precision; of a runtime
and precision; the device; the very context), so that a context with few rows leans on its kin.
`benchmarks/fit_latencies.py` fits them by maximum a posteriori with Student-t residuals, says
which rows were left out and why, and writes published.json. No torch here.
"""

from __future__ import annotations

import functools
import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from dimefm_edge.errors import lookup
from dimefm_edge.latency.analogy import Analogy, Constants, build_analogy
from dimefm_edge.latency.operators import COST_NAMES, COSTS, PRIORS, Vector

SETUP_SPREAD = 0.35
"""80% of the Jetsons' contexts in the fit lie within this of what their device, runtime and
precision say, in log ms (of all contexts, 0.22): with transfers or without, which version, which
clocks. Part of the interval where the very context is not known."""
ANALOGY_SHARE = 0.3
"""Weight of the analogy beside the sum of costs, where a model of the rows is near."""
MODEL_PATH = Path(__file__).with_name("published.json")

_RUNTIMES = (  # the first that occurs in a runtime's name, in lower case, and its family
    ("qnn", "qnn", "npu"),
    ("edgetpu", "edgetpu", "edgetpu"),
    ("tflite (npu)", "tflite-npu", "npu"),
    ("tflite (gpu)", "tflite-gpu", "gpu"),
    ("tflite gpu", "tflite-gpu", "gpu"),
    ("onnx (npu)", "onnx-npu", "npu"),
    ("onnx (cpu)", "onnx-cpu", "cpu"),
    ("onnx runtime cpu", "onnx-cpu", "cpu"),
    ("onnx runtime (cpu)", "onnx-cpu", "cpu"),
    ("onnx runtime tensorrt", "onnx-tensorrt", "gpu"),
    ("onnx runtime", "onnx-cuda", "gpu"),
    ("hailo", "hailo", "hailo"),
    ("torch2trt", "tensorrt", "gpu"),
    ("tensorrt", "tensorrt", "gpu"),
    ("coreml", "coreml", "ane"),
    ("ncnn", "ncnn", "cpu"),
    ("openvino", "openvino", "cpu"),
    ("mnn", "mnn", "cpu"),
    ("xnnpack", "tflite-cpu", "cpu"),
    ("pytorch (cpu)", "pytorch-cpu", "cpu"),
    ("pytorch cpu", "pytorch-cpu", "cpu"),
    ("torchscript", "pytorch-cpu", "cpu"),
    ("pytorch", "pytorch-cuda", "gpu"),
    ("tflite", "tflite-cpu", "cpu"),
    ("mkl", "onnx-cpu", "cpu"),
    ("cpu", "other-cpu", "cpu"),
)
_MEMORY_SIZES = re.compile(r"\s*\(.*|\s+(super|\d+\s*gb)\b")


@dataclass(frozen=True)
class Context:
    """Where and how a model runs."""

    device: str
    runtime: str
    """A family: tensorrt, qnn, tflite-npu, onnx-cpu, ..."""
    hardware: str
    """npu, gpu, cpu, ane, hailo, edgetpu or other."""
    precision: str
    """fp32, fp16, int8, or as the source calls it (w8a8, w8a16)."""
    name: str
    """The very context: device, runtime and precision as the source writes them."""

    @property
    def levels(self) -> dict[str, str]:
        """The context's place in the hierarchy: level -> key."""
        return {
            "all": "all",
            "hardware": self.hardware,
            "hardware-precision": f"{self.hardware}/{self.precision}",
            "runtime-precision": f"{self.runtime}/{self.precision}",
            "device": self.device,
            "context": self.name,
        }

    @property
    def falls_back(self) -> bool:
        """Whether transformers leave the accelerator: ONNX Runtime on Qualcomm's NPU, quantised.

        ViT-B/16 takes 226 ms there against 9.1 ms in float (quic/ai-hub-models).
        """
        return self.runtime == "onnx-npu" and self.precision.startswith("w")


def context_of(device: str, runtime: str, precision: str) -> Context:
    """Parse names as published tables write them, such as `Jetson Orin Nano 8GB (MAXN_SUPER)`."""
    lower = runtime.lower()
    family, hardware = next(
        ((name, kind) for part, name, kind in _RUNTIMES if part in lower), (lower.strip(), "other")
    )
    plain = _MEMORY_SIZES.sub("", device.lower().strip())
    name = f"{device.strip()} | {runtime.strip()} | {precision.strip()}"
    return Context(plain, family, hardware, _precision(precision), name)


def _precision(text: str) -> str:
    lower = text.lower().strip()
    if lower.startswith("int8"):
        return "int8"
    if "fp16" in lower and "fp32" not in lower:
        return "fp16"
    return "fp32" if lower.startswith("fp32") else lower


@dataclass(frozen=True)
class PublishedModel:
    """Fitted offsets, by level and key; made by benchmarks/fit_latencies.py."""

    offsets: Mapping[str, Mapping[str, Vector]]
    """level -> key -> what is added to log ms of each cost, shape (len(COSTS),)."""
    residuals: Mapping[str, Mapping[str, float]]
    """level -> "key model" -> log of what this model takes more than its costs say."""
    spreads: Mapping[str, tuple[float, float]]
    """Hardware and precision -> half width of the 80% interval in log ms, for models that the
    fit has seen and for others, by cross-validation."""
    analogy: Analogy | None = None

    def knows(self, context: Context) -> bool:
        """Whether the device was in the fit."""
        return context.device in self.offsets["device"]

    def knows_runtime(self, context: Context) -> bool:
        """Whether the runtime was in the fit with that precision, on any device."""
        return context.levels["runtime-precision"] in self.offsets["runtime-precision"]

    def has_rows(self, context: Context) -> bool:
        """Whether the fit had rows of that device in that runtime and precision together."""
        alike = (context_of(*name.split(" | ")) for name in self.offsets["context"])
        places = {(known.device, known.runtime, known.precision) for known in alike}
        return (context.device, context.runtime, context.precision) in places

    def check_device(self, device: str) -> None:
        """Raise UnknownNameError, which offers the nearest, if the device was not in the fit."""
        lookup(self.offsets["device"], device, kind="device with published latencies")

    def log_prices(self, context: Context) -> Vector:
        """log ms of one unit of each cost there, shape (len(COSTS),)."""
        total = PRIORS
        for level, key in context.levels.items():
            if key in self.offsets[level]:
                total = total + self.offsets[level][key]
        return np.asarray(total)

    def latency_ms(self, context: Context, costs: Vector, *, model: str = "") -> float:
        """ms of one call; `model` (`name@image size`) adds what is known of that very model."""
        costs = with_fallback(costs, context)
        log_ms = math.log(float(np.exp(self.log_prices(context)) @ costs))
        if self.analogy is not None and context.name in self.offsets["context"]:
            alike, near = self.analogy.predict_near(context.levels, costs, model=model)
            log_ms += ANALOGY_SHARE * near * (alike - log_ms)
        return math.exp(log_ms + self._residual(context, model))

    def spread(self, context: Context, *, model: str = "") -> float:
        """Half width of the 80% interval in log ms."""
        key = context.levels["hardware-precision"]
        known, unknown = self.spreads.get(key, self.spreads["other"])
        spread = known if self._has_seen(context, model) else unknown
        if context.name in self.offsets["context"]:
            return spread
        spread = math.hypot(spread, SETUP_SPREAD)
        is_whole = self.knows_runtime(context) and self.knows(context)
        return spread if is_whole else max(spread, math.log(2.0))

    def _has_seen(self, context: Context, model: str) -> bool:
        key = f"{context.levels['runtime-precision']} {model}"
        return key in self.residuals["runtime-precision"]

    def _residual(self, context: Context, model: str) -> float:
        return sum(
            self.residuals[level].get(f"{context.levels[level]} {model}", 0.0)
            for level in self.residuals
        )


def with_fallback(costs: Vector, context: Context) -> Vector:
    """Fill in `macs_fallback` where a transformer's products leave the accelerator."""
    if not context.falls_back:
        return costs
    filled = costs.copy()
    names = ("macs_linear", "macs_attention")
    filled[COST_NAMES.index("macs_fallback")] = sum(costs[COST_NAMES.index(n)] for n in names)
    return filled


@functools.cache
def load_published() -> PublishedModel:
    """Read the fitted model that ships with the package."""
    return parse_published(json.loads(MODEL_PATH.read_text(encoding="utf-8")))


def parse_published(values: Mapping[str, Any]) -> PublishedModel:
    """From the JSON that `format_published` makes."""
    offsets = {
        level: {key: _vector(named) for key, named in keys.items()}
        for level, keys in values["offsets"].items()
    }
    spreads = {key: (float(a), float(b)) for key, (a, b) in values["spreads"].items()}
    analogy = _parse_analogy(values["analogy"]) if "analogy" in values else None
    return PublishedModel(offsets, values["residuals"], spreads, analogy)


def _parse_analogy(values: Mapping[str, Any]) -> Analogy:
    contexts = [context_of(*name.split(" | ")).levels for name in values["contexts"]]
    names = values["names"]
    rows = [(place, contexts[c], names[n], weight) for place, c, n, weight in values["rows"]]
    constants = Constants.from_dict(values["constants"])
    return build_analogy(constants, values["mean"], np.array(values["models"]), rows)


def _vector(named: Mapping[str, float]) -> Vector:
    """Offsets of rates and of single costs, as one number a cost."""
    return np.array([named.get(c.rate, 0.0) + named.get(c.name, 0.0) for c in COSTS])
