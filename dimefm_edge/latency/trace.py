"""What a torch module does for one batch, as a list of kernels: run on the meta device.

Nothing is computed and no weight is copied, so the largest model takes a second. Pointwise
operations and batch norms are fused into the kernel before them, as TensorRT and ONNX Runtime
do; an attention is one kernel; a layer norm, a softmax or a pooling is one that only moves
memory.
"""

from __future__ import annotations

import functools
import math
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from dimefm_edge.latency.estimate import FLOAT_BYTES, OpCost
from dimefm_edge.students import StudentSpec, build_student, student_spec

_MOVES_MEMORY = (
    "native_layer_norm", "native_group_norm", "_softmax", "mean", "sum", "cat", "max_pool2d",
    "avg_pool2d", "_adaptive_avg_pool2d", "adaptive_avg_pool2d", "max_pool2d_with_indices",
    "upsample_bilinear2d", "upsample_bicubic2d", "upsample_nearest2d", "roll", "index",
    "linalg_vector_norm", "amax", "var_mean", "constant_pad_nd",
)  # fmt: skip
_FREE = (
    "view", "_unsafe_view", "reshape", "permute", "transpose", "t", "expand", "unsqueeze",
    "squeeze", "select", "slice", "split", "split_with_sizes", "unbind", "alias", "detach",
    "clone", "empty", "empty_like", "zeros", "ones", "full", "arange", "contiguous", "flatten",
    "_reshape_alias", "copy_", "unfold", "chunk", "as_strided",
)  # fmt: skip


def trace_ops(module: nn.Module, image_size: int, batch: int = 1) -> list[OpCost]:
    """List the kernels of one forward pass.

    Args:
        module: (B, 3, S, S) float -> anything; left as it is. It is traced as it is deployed: in
            eval mode, re-parametrisable branches merged.
        image_size: S, in pixels.
        batch: B.

    Returns:
        Kernels in order, bytes as in fp32.
    """
    if any(hasattr(m, "reparameterize") for m in module.modules()):
        from dimefm_edge.students.hybrid import reparameterise

        with next(module.parameters()).device:
            module = reparameterise(module)
    return _trace(module, image_size, batch)


@functools.lru_cache(maxsize=4096)
def trace_student(spec: StudentSpec, batch: int = 1) -> tuple[OpCost, ...]:
    """`trace_ops` of a student as it is deployed, its branches merged. Cached by spec."""
    with torch.device("meta"):
        student = _build_deployed(spec)
    return tuple(_trace(student, spec.image_size, batch))


def _build_deployed(spec: StudentSpec) -> nn.Module:
    if spec.family == "hybrid":
        from dimefm_edge.students.hybrid import build_hybrid

        return build_hybrid(spec, is_merged=True)
    return build_student(spec)


def trace_timm(name: str, image_size: int, batch: int = 1) -> tuple[OpCost, ...]:
    """`trace_ops` of a timm model by name, with its own classifier left out."""
    return trace_student(student_spec(f"timm:{name}", image_size=image_size, embed_dim=1), batch)


def _trace(module: nn.Module, image_size: int, batch: int) -> list[OpCost]:
    metas = {
        name: torch.empty_like(value, device="meta")
        for name, value in (*module.named_parameters(), *module.named_buffers())
    }
    image = torch.empty(batch, 3, image_size, image_size, device="meta", dtype=torch.float32)
    weights = {name for name, _ in module.named_parameters()}
    recorder = _Recorder([value for name, value in metas.items() if name in weights])
    was_training = [m for m in module.modules() if m.training]
    module.eval()
    try:
        with torch.no_grad(), recorder:
            torch.func.functional_call(module, metas, (image,))
    finally:
        for child in was_training:
            child.training = True
    return recorder.ops


class _Recorder(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Writes down each operation; views are free, pointwise ones join the kernel before."""

    def __init__(self, parameters: list[Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.sizes = {id(p): _numel(p) for p in parameters}
        self.parameter_ids = set(self.sizes)
        self.counted: set[int] = set()
        self.ops: list[OpCost] = []
        self.scores: tuple[int, float] | None = None  # a softmax: its kernel, its bytes
        self._roots: dict[int, int] = {}  # views of weights, and whose they are
        self._kept: list[Tensor] = []  # an id is only good while its tensor lives

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self._record(func.overloadpacket.__name__, list(args), result)
        return result

    def _record(self, name: str, args: list[Any], result: Any) -> None:
        tensors = [a for a in _flat(args) if isinstance(a, Tensor)]
        outputs = [r for r in _flat([result]) if isinstance(r, Tensor)]
        if not tensors or not outputs or name in _FREE:
            self._remember_views(tensors, outputs)
            return
        params = self._new_params(tensors)
        moved = sum(_bytes(t) for t in tensors) + _bytes(outputs[0])
        if name in ("mm", "addmm", "bmm", "baddbmm"):
            left = tensors[1] if name in ("addmm", "baddbmm") else tensors[0]
            flops = 2.0 * outputs[0].numel() * left.shape[-1]
            # A linear layer on strided tokens is a bmm with its weight expanded.
            uses_weight = any(id(t) in self.parameter_ids for t in tensors)
            if name in ("bmm", "baddbmm") and not uses_weight:
                self._product(OpCost("attention", flops, moved, "attention"))
            else:
                self.ops.append(OpCost(name, flops, moved, "dense", params))
        elif name in ("convolution", "_convolution", "convolution_overrideable"):
            weight = tensors[1]
            flops = 2.0 * outputs[0].numel() * math.prod(weight.shape[1:])
            is_depthwise = weight.shape[1] == 1 and weight.shape[0] > 1
            kind = "depthwise" if is_depthwise else "dense"
            self.ops.append(OpCost(name, flops, moved, kind, params))
        elif "softmax" in name and self.ops and self.ops[-1].kind == "attention":
            scores_bytes = _bytes(outputs[0])
            self.scores = len(self.ops) - 1, scores_bytes
            self.ops[-1] = replace(self.ops[-1], bytes=self.ops[-1].bytes - scores_bytes)
        elif name.startswith("_scaled_dot_product"):
            query, key, value = tensors[:3]
            flops = 2.0 * math.prod(query.shape[:-1]) * key.shape[-2]
            flops *= query.shape[-1] + value.shape[-1]
            self.ops.append(OpCost("attention", flops, moved, "attention"))
        elif name in _MOVES_MEMORY or not self.ops:
            self.ops.append(OpCost(name, 0.0, moved, "memory", params))
        else:  # fused: only what it reads besides the kernel's own output costs anything
            extra = sum(sorted(_bytes(t) for t in tensors)[:-1])
            self.ops[-1] = self.ops[-1].with_epilogue(name, extra, params)

    def _product(self, op: OpCost) -> None:
        """Of two activations; one after a softmax joins the one before it: an attention."""
        if self.scores is None:
            self.ops.append(op)
            return
        idx, scores_bytes = self.scores  # they stay on the chip
        first, self.scores = self.ops[idx], None
        moved = first.bytes + op.bytes - scores_bytes
        self.ops[idx] = replace(first, flops=first.flops + op.flops, bytes=moved)

    def _new_params(self, tensors: list[Tensor]) -> int:
        """Weights that are read for the first time, whole or in part: of each, all of it."""
        roots = {self._root(id(t)) for t in tensors if id(t) in self.parameter_ids}
        fresh = roots - self.counted
        self.counted |= fresh
        return sum(self.sizes[root] for root in fresh)

    def _root(self, tensor_id: int) -> int:
        return self._roots.get(tensor_id, tensor_id)

    def _remember_views(self, inputs: list[Tensor], outputs: list[Tensor]) -> None:
        """A transposed weight is still that weight."""
        source = next((t for t in inputs if id(t) in self.parameter_ids), None)
        for view in outputs if source is not None else ():
            self._kept.append(view)
            self.parameter_ids.add(id(view))
            self._roots[id(view)] = self._root(id(source))


def _flat(values: list[Any]) -> list[Any]:
    found = []
    for value in values:
        found += _flat(list(value)) if isinstance(value, list | tuple) else [value]
    return found


def _numel(tensor: Tensor) -> int:
    """Elements in memory: an expanded dimension counts once."""
    return math.prod(n for n, step in zip(tensor.shape, tensor.stride(), strict=True) if step)


def _bytes(tensor: Tensor) -> float:
    return float(FLOAT_BYTES * _numel(tensor))
