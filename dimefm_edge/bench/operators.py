"""Where a call's time goes, by ONNX Runtime's own profiler: operator by operator, kind by kind."""

from __future__ import annotations

import json
import tempfile
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dimefm_edge.bench.prepare import Prepared
from dimefm_edge.bench.runnable import Load, Runnable, make_feed
from dimefm_edge.errors import InputError

_WARMUP, _RUNS, _TOP = 5, 20, 10

KINDS: dict[str, tuple[str, ...]] = {
    "attention": (
        "MultiHeadAttention", "Attention", "GroupQueryAttention", "QAttention",
        "DecoderMaskedMultiHeadAttention", "PackedMultiHeadAttention",
    ),
    "gemm": (
        "MatMul", "Gemm", "FusedMatMul", "FusedGemm", "MatMulInteger", "MatMulIntegerToFloat",
        "DynamicQuantizeMatMul", "QLinearMatMul", "QGemm", "MatMulNBits", "TransposeMatMul",
        "GemmFastGelu", "Einsum",
    ),
    "convolution": ("Conv", "FusedConv", "NhwcFusedConv", "QLinearConv", "ConvInteger",
                    "ConvTranspose", "NhwcConv"),
    "norm": (
        "LayerNormalization", "SkipLayerNormalization", "BatchNormalization", "LpNormalization",
        "GroupNormalization", "InstanceNormalization", "RMSNormalization",
        "SimplifiedLayerNormalization", "QOrderedLayerNormalization", "ReduceL2",
    ),
    "softmax": ("Softmax", "QLinearSoftmax", "LogSoftmax"),
    "activation": (
        "Gelu", "FastGelu", "QuickGelu", "BiasGelu", "Erf", "Sigmoid", "HardSwish", "Relu",
        "HardSigmoid", "Tanh", "QLinearSigmoid", "QLinearLeakyRelu",
    ),
    "quantise": ("QuantizeLinear", "DequantizeLinear", "DynamicQuantizeLinear"),
    "preprocessing": ("Resize", "Cast", "Pad"),
    "movement": (
        "Transpose", "Reshape", "Concat", "Slice", "Gather", "Split", "Squeeze", "Unsqueeze",
        "Expand", "ReorderInput", "ReorderOutput", "Shape", "Identity", "Flatten", "Tile",
        "MemcpyFromHost", "MemcpyToHost",
    ),
}  # fmt: skip
"""ONNX Runtime's operators by kind; all others count as elementwise."""
_KIND_OF = {name: kind for kind, names in KINDS.items() for name in names}


def profile_operators(prepared: Prepared, runnable: Runnable, load: Load) -> dict[str, Any]:
    """Profile some calls in a session of their own.

    Returns:
        `kinds`: share of the operators' time by kind, in [0, 1]. `top`: the ten slowest nodes,
        with name, operator, ms a call and share. `operators_ms`: their sum a call. `gmacs` and
        `moved_mib`: multiply-adds, and weights and activations read and written, of a call.

    Raises:
        InputError: If it does not run in ONNX Runtime on the CPU.
    """
    path = _graph_of(prepared, runnable)
    events = _profile(path, runnable, load)
    answer = summarise_events(events, runs=_RUNS)
    return answer | _work(Path(prepared.counted_on or path), prepared, load)


def summarise_events(events: Sequence[dict[str, Any]], *, runs: int) -> dict[str, Any]:
    """Shares and the slowest nodes of ONNX Runtime's profile events, the last `runs` of each."""
    times: dict[str, list[float]] = defaultdict(list)
    operator: dict[str, str] = {}
    for event in events:
        name = str(event.get("name", ""))
        if event.get("cat") != "Node" or not name.endswith("_kernel_time"):
            continue
        node = name.removesuffix("_kernel_time")
        times[node].append(float(event["dur"]) / 1e3)
        operator[node] = str(event.get("args", {}).get("op_name", ""))
    spent = {node: sum(values[-runs:]) / runs for node, values in times.items()}
    total = sum(spent.values()) or 1.0
    kinds: dict[str, float] = defaultdict(float)
    for node, ms in spent.items():
        kinds[_KIND_OF.get(operator[node], "elementwise")] += ms / total
    top = sorted(spent, key=lambda node: -spent[node])[:_TOP]
    return {
        "operators_ms": sum(spent.values()),
        "kinds": dict(sorted(kinds.items(), key=lambda item: -item[1])),
        "top": [
            {"node": n, "operator": operator[n], "ms": spent[n], "share": spent[n] / total}
            for n in top
        ],
    }


def _graph_of(prepared: Prepared, runnable: Runnable) -> Path:
    if prepared.loader == "onnx":
        return Path(prepared.path)
    if prepared.loader == "bundle" and prepared.option.startswith("onnxruntime"):
        return Path(runnable.owner.model_path)  # type: ignore[attr-defined]
    raise InputError(f"{prepared.runtime} has no profile by operator here")


def _profile(path: Path, runnable: Runnable, load: Load) -> list[dict[str, Any]]:
    from dimefm_edge.runtime.onnxruntime import load_session

    with tempfile.TemporaryDirectory(prefix="dimefm_edge_profile_") as folder:
        session = load_session(path, load.threads, profile_prefix=f"{folder}/p")
        feed = make_feed(runnable, load)
        for _ in range(_WARMUP + _RUNS):
            session.run(None, feed)
        events: list[dict[str, Any]] = json.loads(Path(session.end_profiling()).read_text())
    return events


def _work(path: Path, prepared: Prepared, load: Load) -> dict[str, Any]:
    """Multiply-adds and bytes of a call, where the graph can be read."""
    from dimefm_edge.errors import DimeFMError
    from dimefm_edge.latency.onnx_costs import onnx_ops
    from dimefm_edge.latency.operators import total_gmacs

    try:
        side = prepared.image_size or load.image_size
        ops = onnx_ops(path, batch=load.batch_size, image_size=side)
    except DimeFMError:
        return {"gmacs": None, "moved_mib": None}
    elements = sum(op.weights + op.read + op.written for op in ops)
    return {"gmacs": total_gmacs(ops), "moved_mib": 4 * elements / 2**20}
