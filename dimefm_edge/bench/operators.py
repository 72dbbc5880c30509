"""Where a call's time goes, by the runtime's own profiler: operator by operator, kind by kind."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dimefm_edge.bench.prepare import Prepared
from dimefm_edge.bench.profilers import OperatorTime, profile_nodes
from dimefm_edge.bench.runnable import Load, Runnable
from dimefm_edge.errors import DimeFMError

_TOP = 10


def profile_operators(prepared: Prepared, runnable: Runnable, load: Load) -> dict[str, Any]:
    """Profile some calls.

    Returns:
        `kinds`: share of the operators' time by kind, in [0, 1]. `top`: the ten slowest nodes,
        with name, operator, ms a call and share. `operators_ms`: their sum a call. `gmacs` and
        `moved_mib`: multiply-adds, and weights and activations read and written, of a call;
        None where they cannot be counted.

    Raises:
        InputError: If the runtime has no profiler that is read here.
    """
    return summarise(profile_nodes(prepared, runnable, load)) | _work(prepared, runnable, load)


def summarise(times: Sequence[OperatorTime]) -> dict[str, Any]:
    """Shares by kind, and the slowest nodes."""
    total = sum(entry.ms for entry in times) or 1.0
    kinds: dict[str, float] = defaultdict(float)
    for entry in times:
        kinds[entry.kind] += entry.ms / total
    top = sorted(times, key=lambda entry: -entry.ms)[:_TOP]
    return {
        "operators_ms": sum(entry.ms for entry in times),
        "kinds": dict(sorted(kinds.items(), key=lambda item: -item[1])),
        "top": [
            {"node": e.node, "operator": e.operator, "ms": e.ms, "share": e.ms / total} for e in top
        ],
    }


def _work(prepared: Prepared, runnable: Runnable, load: Load) -> dict[str, Any]:
    """Multiply-adds and bytes of a call, where the model can be read."""
    from dimefm_edge.latency.onnx_costs import onnx_ops
    from dimefm_edge.latency.operators import total_gmacs

    side = prepared.image_size or load.image_size
    try:
        if prepared.loader == "torch":
            from dimefm_edge.latency.trace import trace_ops

            module: Any = runnable.owner
            ops = trace_ops(getattr(module, "_orig_mod", module), side, load.batch_size)
        else:
            ops = onnx_ops(_graph_of(prepared, runnable), batch=load.batch_size, image_size=side)
    except DimeFMError:
        return {"gmacs": None, "moved_mib": None}
    elements = sum(op.weights + op.read + op.written for op in ops)
    return {"gmacs": total_gmacs(ops), "moved_mib": 4 * elements / 2**20}


def _graph_of(prepared: Prepared, runnable: Runnable) -> Path:
    if prepared.loader == "bundle":
        return Path(runnable.owner.model_path)  # type: ignore[attr-defined]
    return Path(prepared.counted_on or prepared.path)
