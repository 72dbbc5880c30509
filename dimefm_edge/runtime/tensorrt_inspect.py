"""What TensorRT made of a graph: an engine's layers, and whether its attentions are fused kernels.

Reads the JSON of TensorRT's EngineInspector, as 10.x and 11.x write it (their "Engine
Inspector" pages): `Layers` holds objects with Name, LayerType, TacticName, Outputs and, since
8.6, Metadata with the ONNX nodes that a layer stands for; or names only, if the engine was not
built with detailed profiling. A fused attention shows as a kernel with `mha` in its name
(NVIDIA/TensorRT issue 3243).
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from dimefm_edge.errors import DimeFMError

_ONNX_NODE = re.compile(r"\[ONNX Layer: ([^\]]+)\]")
# An ONNX node, and so a layer's name, may be called "attention" without being fused.
_FUSED_NAME = re.compile(r"_mha|fmha", re.IGNORECASE)
_FUSED_KERNEL = re.compile(r"mha|flash_?att|attention", re.IGNORECASE)
# Our own kernel (export/plugin.py); where its operator was read as plain ONNX, the layers of that
# bear its name but are no plugins.
_OWN_KIND, _OWN_NAME = "Plugin", "fused_attention_qkv"
_OPAQUE = "ForeignNode["
_LOGGED = re.compile(r"^Name: (?P<name>[^,]+), LayerType: (?P<kind>[^,]+)")
_TACTIC = re.compile(r"TacticName: ([^,]+)")
_OUTPUT_TYPE = re.compile(r"Outputs: \[ \{.*?Datatype: (\w+)")
_NO_KERNELS = {"shape_call", "signal", "wait"}  # arithmetic on shapes, and streams that meet


@dataclass(frozen=True)
class EngineLayer:
    """One step of an engine."""

    name: str
    kind: str
    """TensorRT's LayerType, such as gemm or kgen; empty where it is not told."""
    kernel: str
    """Its tactic; empty where it is not told."""
    precision: str
    """Format and type of its first output; empty where it is not told."""
    onnx_nodes: tuple[str, ...]
    """The ONNX nodes that it computes, as far as they are told."""

    @property
    def is_fused_attention(self) -> bool:
        """Whether it is a kernel that computes an attention whole."""
        return (
            _FUSED_NAME.search(self.name) is not None
            or _FUSED_KERNEL.search(f"{self.kind} {self.kernel}") is not None
            or (self.kind.startswith(_OWN_KIND) and _OWN_NAME in self.name)
        )


@dataclass(frozen=True)
class AttentionFusion:
    """How many of a graph's attentions became one kernel each."""

    expected: int | None
    """Attentions that the export found in the graph; None where the bundle does not say."""
    fused: int | None
    """None where the engine hides them in one opaque layer."""
    unfused: tuple[str, ...]
    """Their first nodes, where the engine names ONNX nodes."""

    def describe(self) -> str:
        """One line for people."""
        of = "?" if self.expected is None else self.expected
        if self.fused is None:
            return f"attention: the engine does not tell how its {of} are computed"
        text = f"attention: {self.fused} of {of} fused"
        return text + (f"; not fused: {', '.join(self.unfused)}" if self.unfused else "")


def inspect_engine(trt: Any, engine: Any) -> list[EngineLayer]:
    """The layers of a loaded engine, in order.

    Args:
        trt: The `tensorrt` module.
        engine: An ICudaEngine.
    """
    inspector = engine.create_engine_inspector()
    return parse_layers(inspector.get_engine_information(trt.LayerInformationFormat.JSON))


def parse_layers(text: str) -> list[EngineLayer]:
    """Read what EngineInspector says in JSON.

    Raises:
        DimeFMError: If it is not that.
    """
    try:
        entries = json.loads(text)["Layers"]
        return [_layer(entry) for entry in entries]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DimeFMError(
            f"TensorRT's engine inspector answers in a form that is not known: {error!r}",
            hint="report it, with TensorRT's version",
        ) from error


def parse_layer_log(text: str) -> list[EngineLayer]:
    """The layers that a builder with detailed profiling writes to its log, a line each."""
    found = []
    for line in text.splitlines():
        match = _LOGGED.match(line)
        if match is None:
            continue
        kernel, output = _TACTIC.search(line), _OUTPUT_TYPE.search(line)
        found.append(
            EngineLayer(
                match["name"],
                match["kind"],
                "" if kernel is None else kernel[1],
                "" if output is None else output[1],
                tuple(dict.fromkeys(_ONNX_NODE.findall(line))),
            )
        )
    return found


def kernels_by_kind(layers: Sequence[EngineLayer]) -> dict[str, int]:
    """How many kernels of each LayerType an engine launches, the most frequent first."""
    counts = Counter(layer.kind for layer in layers if layer.kind not in _NO_KERNELS)
    return dict(counts.most_common())


def attention_fusion(
    layers: Sequence[EngineLayer], attentions: Sequence[Sequence[str]] | None
) -> AttentionFusion:
    """Compare an engine's layers with the attentions of the graph it was built of.

    Args:
        layers: The engine's.
        attentions: Names of the ONNX nodes of each attention, as the export recorded them;
            None where it did not.
    """
    expected = None if attentions is None else len(attentions)
    kernels = [layer for layer in layers if layer.is_fused_attention]
    if not kernels and any(_OPAQUE in layer.name and not layer.onnx_nodes for layer in layers):
        return AttentionFusion(expected, None, ())
    if attentions is None or not any(layer.onnx_nodes for layer in layers):
        return AttentionFusion(expected, len(kernels), ())
    covered = {name for kernel in kernels for name in kernel.onnx_nodes}
    unfused = tuple(names[0] for names in attentions if not _is_covered(names, covered))
    return AttentionFusion(expected, len(attentions) - len(unfused), unfused)


def describe_layers(layers: Sequence[EngineLayer]) -> list[dict[str, Any]]:
    """Plain values, for JSON."""
    return [asdict(layer) | {"onnx_nodes": list(layer.onnx_nodes)} for layer in layers]


def _is_covered(names: Sequence[str], covered: set[str]) -> bool:
    """Whether fused kernels compute an attention's core; its scale may lie in another."""
    return len(covered.intersection(names)) >= min(len(names), 3)


def _layer(entry: Any) -> EngineLayer:
    if isinstance(entry, str):
        return EngineLayer(entry, "", "", "", ())
    outputs = entry.get("Outputs") or [{}]
    precision = outputs[0].get("Format/Datatype") or outputs[0].get("Datatype") or ""
    return EngineLayer(
        str(entry["Name"]),
        str(entry.get("LayerType", "")),
        str(entry.get("TacticName", "")),
        str(precision),
        tuple(dict.fromkeys(_ONNX_NODE.findall(str(entry.get("Metadata", ""))))),
    )
