"""Each runtime's own profiler, read into one form: the time of each node in a call.

ONNX Runtime writes a trace; OpenVINO counts when it is compiled to (PERF_COUNT); PyTorch records
operators, told apart here by the module that calls them; TensorRT reports layers to an IProfiler.
To profile slows a call: shares are what to read.
"""

from __future__ import annotations

import contextlib
import json
import tempfile
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dimefm_edge.bench.operator_kinds import kind_of, kind_of_all, kind_of_fused
from dimefm_edge.bench.prepare import Prepared
from dimefm_edge.bench.runnable import Load, Runnable, compile_openvino, make_feed
from dimefm_edge.errors import InputError

if TYPE_CHECKING:
    from torch import nn

    from dimefm_edge.runtime.tensorrt_inspect import EngineLayer

WARMUP, RUNS = 5, 20
_MODULE = "dimefm_edge module: "
_UNNAMED = "(the model itself)"
_COMPILED = "cpp_fused"
"""In the names of torch.compile's generated kernels."""


@dataclass(frozen=True)
class OperatorTime:
    """One node of a model: what it took of a call."""

    node: str
    operator: str
    kind: str
    """A key of `operator_kinds.KINDS`, or elementwise."""
    ms: float


def profile_nodes(prepared: Prepared, runnable: Runnable, load: Load) -> list[OperatorTime]:
    """Profile some calls by the runtime's own profiler.

    Raises:
        InputError: If the runtime has none that is read here.
    """
    loader, option = prepared.loader, prepared.option
    if loader == "bundle" and not option.startswith("onnxruntime"):
        loader = "tensorrt" if "tensorrt" in option or option.endswith(".engine") else option
    if loader not in _PROFILERS:
        raise InputError(f"{prepared.runtime} has no profile by operator here")
    return _PROFILERS[loader](prepared, runnable, load)


# ------------------------------------------------------------------------ ONNX Runtime


def _profile_onnxruntime(prepared: Prepared, runnable: Runnable, load: Load) -> list[OperatorTime]:
    from dimefm_edge.runtime.onnxruntime import load_session

    path, precision = prepared.path, prepared.precision
    if prepared.loader == "bundle":
        bundle: Any = runnable.owner
        path, precision = bundle.model_path, bundle.precision
    with tempfile.TemporaryDirectory(prefix="dimefm_edge_profile_") as folder:
        session = load_session(
            Path(path), load.threads, precision=precision, profile_prefix=f"{folder}/p"
        )
        feed = make_feed(runnable, load)
        for _ in range(WARMUP + RUNS):
            session.run(None, feed)
        events: list[dict[str, Any]] = json.loads(Path(session.end_profiling()).read_text())
    return onnxruntime_times(events, runs=RUNS)


def onnxruntime_times(events: Sequence[dict[str, Any]], *, runs: int) -> list[OperatorTime]:
    """The nodes of ONNX Runtime's trace, over the last `runs` calls of each."""
    times: dict[str, list[float]] = defaultdict(list)
    operator: dict[str, str] = {}
    for event in events:
        name = str(event.get("name", ""))
        if event.get("cat") != "Node" or not name.endswith("_kernel_time"):
            continue
        node = name.removesuffix("_kernel_time")
        times[node].append(float(event["dur"]) / 1e3)
        operator[node] = str(event.get("args", {}).get("op_name", ""))
    return [
        OperatorTime(n, operator[n], kind_of(operator[n]), sum(values[-runs:]) / runs)
        for n, values in times.items()
    ]


# ---------------------------------------------------------------------------- OpenVINO


def _profile_openvino(prepared: Prepared, runnable: Runnable, load: Load) -> list[OperatorTime]:
    compiled = compile_openvino(prepared.path, load, PERF_COUNT=True)
    request = compiled.create_infer_request()
    feed = make_feed(runnable, load)
    for _ in range(WARMUP):
        request.infer(feed, share_inputs=True)
    spent: dict[tuple[str, str], float] = defaultdict(float)
    for _ in range(RUNS):
        request.infer(feed, share_inputs=True)
        for entry in request.profiling_info:
            spent[entry.node_name, entry.node_type] += 1e3 * entry.real_time.total_seconds() / RUNS
    merged = _merged_names(compiled)
    return [
        OperatorTime(node, operator, _openvino_kind(operator, merged.get(node, "")), ms)
        for (node, operator), ms in spent.items()
        # Merged into another and did not run, or took less than the microsecond that it counts in.
        if ms > 0
    ]


def _merged_names(compiled: Any) -> dict[str, str]:
    """By node: names of the nodes of the graph as it was read that became this one."""
    names = {}
    for node in compiled.get_runtime_model().get_ordered_ops():
        info = node.get_rt_info()
        if "originalLayersNames" in info:
            value = info["originalLayersNames"]
            names[node.get_friendly_name()] = str(getattr(value, "value", value))
    return names


def _openvino_kind(operator: str, merged: str) -> str:
    """A Subgraph is many nodes in one generated kernel: an attention, say, or a chain of sums."""
    if operator != "Subgraph":
        return kind_of(operator)
    return kind_of_all([name.rpartition("_")[0] or name for name in merged.split(",")])


# ----------------------------------------------------------------------------- PyTorch


def _profile_torch(prepared: Prepared, runnable: Runnable, load: Load) -> list[OperatorTime]:
    import torch
    from torch.profiler import ProfilerActivity, profile

    module: Any = runnable.owner
    run, feed = runnable.run, make_feed(runnable, load)
    with contextlib.ExitStack() as stack:
        if prepared.option == "compile":
            run = _compiled_to_tell(module._orig_mod, stack)
        else:
            stack.enter_context(_named_modules(module))
        for _ in range(WARMUP):
            run(feed)
        with torch.inference_mode(), profile(activities=[ProfilerActivity.CPU]) as recorded:
            for _ in range(RUNS):
                run(feed)
    return torch_times(recorded.events(), runs=RUNS)


def _compiled_to_tell(module: nn.Module, stack: contextlib.ExitStack) -> Callable[[Any], Any]:
    """The module compiled once more, so that its generated kernels are recorded by name."""
    import torch
    from torch._inductor import config

    stack.enter_context(config.patch({"cpp.enable_kernel_profile": True}))
    torch.compiler.reset()
    compiled = torch.compile(module)

    def run(feed: Any) -> Any:
        with torch.inference_mode():
            return compiled(torch.from_numpy(feed["image"]))

    return run


@contextlib.contextmanager
def _named_modules(module: nn.Module) -> Iterator[None]:
    """Have the profiler mark each module's calls.

    `forward` is wrapped: hooks would keep nn.MultiheadAttention from its faster way.
    """
    from torch.profiler import record_function

    def marked(name: str, forward: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            with record_function(_MODULE + name):
                return forward(*args, **kwargs)

        return call

    wrapped = []
    try:
        for name, child in module.named_modules():
            if name and "forward" not in vars(child):
                child.forward = marked(name, child.forward)
                wrapped.append(child)
        yield
    finally:
        for child in wrapped:
            del child.forward


def torch_times(events: Sequence[Any], *, runs: int) -> list[OperatorTime]:
    """Operators of torch.profiler's events by the innermost module that calls them.

    Times are an operator's own: without those that it calls, and without Python.
    """
    spent: dict[tuple[str, str], float] = defaultdict(float)
    for event in events:
        # Others are marks: of modules, and of the parts of a compiled call.
        if "::" in event.name or _COMPILED in event.name:
            spent[_module_of(event), event.name] += event.self_cpu_time_total / 1e3 / runs
    return [
        OperatorTime(node, name, kind_of(name) if "::" in name else kind_of_fused(name), ms)
        for (node, name), ms in spent.items()
        if ms > 0
    ]


def _module_of(event: Any) -> str:
    parent = event.cpu_parent
    while parent is not None:
        if parent.name.startswith(_MODULE):
            return str(parent.name.removeprefix(_MODULE))
        parent = parent.cpu_parent
    return _UNNAMED


# ---------------------------------------------------------------------------- TensorRT


def _profile_tensorrt(prepared: Prepared, runnable: Runnable, load: Load) -> list[OperatorTime]:
    engine: Any = runnable.engine
    times = engine.layer_times_ms(load.batch_size, repeats=RUNS)
    operators = _onnx_operators(runnable.owner.model_path)  # type: ignore[attr-defined]
    return tensorrt_times(times, engine.layers(), operators)


def tensorrt_times(
    times: dict[str, float], layers: Sequence[EngineLayer], operators: dict[str, str]
) -> list[OperatorTime]:
    """The layers of an engine.

    Args:
        times: Milliseconds of a call by the layer's name, as the IProfiler was told.
        layers: As the engine inspector tells them.
        operators: ONNX operators by the node's name; empty where the graph cannot be read.
    """
    known = {layer.name: layer for layer in layers}
    found = []
    for name, ms in times.items():
        layer = known.get(name)
        told = layer.kind if layer is not None else ""
        found.append(OperatorTime(name, told or "layer", _layer_kind(layer, name, operators), ms))
    return found


def _layer_kind(layer: EngineLayer | None, name: str, operators: dict[str, str]) -> str:
    if layer is None:
        return kind_of_fused(name)
    if layer.is_fused_attention:
        return "attention"
    inside = [operators[node] for node in layer.onnx_nodes if node in operators]
    if inside:
        return kind_of_all(inside)
    kind = kind_of(layer.kind)
    return kind if kind != "elementwise" else kind_of_fused(f"{layer.kernel} {layer.name}")


def _onnx_operators(path: Path) -> dict[str, str]:
    """Of a bundle's graph; a device need not have the package that reads it."""
    try:
        import onnx
    except ImportError:
        return {}
    graph = onnx.load(str(path), load_external_data=False).graph
    return {node.name: node.op_type for node in graph.node}


_PROFILERS: dict[str, Callable[[Prepared, Runnable, Load], list[OperatorTime]]] = {
    "bundle": _profile_onnxruntime,
    "onnx": _profile_onnxruntime,
    "openvino": _profile_openvino,
    "torch": _profile_torch,
    "tensorrt": _profile_tensorrt,
}
