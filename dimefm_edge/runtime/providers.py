"""ONNX Runtime's execution providers: which of them a bundle's target wants, and are there.

A bundle names them in its manifest, the preferred one first, as the target's profile has them.
ONNX Runtime falls back to the CPU without a word where a provider cannot start; here it says so.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from dimefm_edge.errors import DimeFMError, MissingExtraError, lookup

logger = logging.getLogger(__name__)

AUTO = "auto"


@dataclass(frozen=True)
class Provider:
    """One of ONNX Runtime's back ends."""

    ort_name: str
    install: str
    """The command that brings it."""
    options: dict[str, Any] = field(default_factory=dict, hash=False)


PROVIDERS: dict[str, Provider] = {
    "cpu": Provider("CPUExecutionProvider", "pip install onnxruntime"),
    "cuda": Provider("CUDAExecutionProvider", "pip install onnxruntime-gpu"),
    "tensorrt": Provider(
        "TensorrtExecutionProvider",
        "pip install onnxruntime-gpu",
        {"trt_fp16_enable": "1", "trt_engine_cache_enable": "1"},
    ),
    "openvino": Provider("OpenVINOExecutionProvider", "pip install onnxruntime-openvino"),
    "qnn": Provider("QNNExecutionProvider", "pip install onnxruntime-qnn"),
    "nnapi": Provider("NnapiExecutionProvider", "an Android build of ONNX Runtime"),
    "coreml": Provider("CoreMLExecutionProvider", "pip install onnxruntime"),
    "xnnpack": Provider("XnnpackExecutionProvider", "a build of ONNX Runtime with XNNPACK"),
}
"""By our names (onnxruntime.ai/docs/execution-providers); the options are ONNX Runtime's."""


def choose_providers(wanted: Sequence[str], available: Sequence[str], *, asked: str) -> list[str]:
    """Which providers to try, the preferred one first; the CPU is always the last.

    Args:
        wanted: Names in `PROVIDERS`, as the bundle's target prefers them.
        available: ONNX Runtime's names, from `get_available_providers`.
        asked: A name in `PROVIDERS` that the user insists on, or `auto`.

    Raises:
        MissingExtraError: If the one that is asked for is not installed.
        UnknownNameError: If there is no such provider.
    """
    if asked != AUTO:
        provider = lookup(PROVIDERS, asked, kind="execution provider")
        if provider.ort_name not in available:
            raise MissingExtraError(
                f"this ONNX Runtime has no {provider.ort_name}, only {', '.join(available)}",
                hint=provider.install,
            )
        wanted = [asked]
    others = [name for name in wanted if name in PROVIDERS and name != "cpu"]
    there = [name for name in others if PROVIDERS[name].ort_name in available]
    return [*there, "cpu"]


def session_providers(names: Sequence[str], *, precision: str) -> list[Any]:
    """What `InferenceSession(providers=...)` takes."""
    given: list[Any] = []
    for name in names:
        provider = PROVIDERS[name]
        options = dict(provider.options)
        if "trt_fp16_enable" in options and precision == "fp32":
            options["trt_fp16_enable"] = "0"
        given.append((provider.ort_name, options) if options else provider.ort_name)
    return given


def check_started(names: Sequence[str], started: Sequence[str], *, asked: str) -> str:
    """Our name of the provider that runs the model.

    Args:
        names: Those tried, the preferred one first.
        started: ONNX Runtime's names, from the session.
        asked: As for `choose_providers`.

    Raises:
        DimeFMError: If the provider that was asked for did not start.
    """
    running = [name for name in names if PROVIDERS[name].ort_name in started]
    first = running[0] if running else "cpu"
    if first == names[0]:
        return first
    wanted = PROVIDERS[names[0]].ort_name
    message = f"{wanted} did not start; ONNX Runtime runs the model on the {first} provider"
    if asked != AUTO:
        raise DimeFMError(message, hint="dimefm-edge doctor  (drivers, libraries, versions)")
    logger.warning("%s", message)
    return first
