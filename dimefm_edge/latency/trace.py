"""What a torch module does for one batch, as a list of operators: run on the meta device.

Nothing is computed and no weight is copied, so the largest model takes a second. See
operators.py for what is listed and what is free because runtimes fuse it.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from dimefm_edge.errors import DimeFMError, InputError, lookup
from dimefm_edge.latency.operators import Operator, attention, convolution, product
from dimefm_edge.students import STAGED_FAMILIES, StudentSpec, build_student, student_spec
from dimefm_edge.students.hybrid import build_hybrid, reparameterise

_KINDS = {
    "elementwise": (
        "add", "mul", "sub", "div", "pow", "rsqrt", "sqrt", "exp", "square", "addcmul", "where",
        "neg", "linalg_vector_norm", "reciprocal", "abs", "rsub", "floor",
    ),
    "activation": (
        "silu", "hardswish", "hardsigmoid", "sigmoid", "tanh", "elu", "leaky_relu", "mish",
        "softplus", "prelu", "_prelu_kernel", "log_sigmoid_forward",
    ),
    "gelu": ("gelu", "erf"),
    "norm": ("native_layer_norm", "native_group_norm", "_fused_rms_norm"),
    "softmax": ("_softmax", "_safe_softmax", "_log_softmax"),
    "mean": ("mean", "sum", "_adaptive_avg_pool2d", "adaptive_avg_pool2d", "amax", "var_mean"),
    "pool": (
        "max_pool2d", "max_pool2d_with_indices", "avg_pool2d", "avg_pool1d", "max_pool1d",
        "adaptive_max_pool2d",
    ),
    "move": (
        "cat", "stack", "roll", "index", "constant_pad_nd", "flip",
        "repeat", "upsample_bilinear2d", "upsample_bicubic2d", "upsample_nearest2d",
        "pixel_shuffle", "index_select", "gather", "embedding", "im2col",
    ),
    "permute": ("permute", "transpose"),
}  # fmt: skip
_KIND = {name: kind for kind, names in _KINDS.items() for name in names}
_MATMULS = {"mm": 0, "addmm": 1, "bmm": 0, "baddbmm": 1}  # which argument is the left one
_TAKES_IN_BATCH_NORM = ("convolution", "addmm", "mm")


def trace_ops(module: nn.Module, image_size: int, batch: int = 1) -> list[Operator]:
    """List the operators of one forward pass.

    Args:
        module: (B, 3, S, S) float -> anything; left as it is. It is traced as it is deployed: in
            eval mode, re-parametrisable branches merged.
        image_size: S, in pixels.
        batch: B.

    Returns:
        Operators in order.
    """
    if _has_branches(module):
        with next(module.parameters()).device:
            module = reparameterise(module)
    return _trace(module, image_size, batch)


@functools.lru_cache(maxsize=4096)
def trace_student(spec: StudentSpec, batch: int = 1) -> tuple[Operator, ...]:
    """`trace_ops` of a student as it is deployed, its branches merged. Cached by spec."""
    if spec.family in STAGED_FAMILIES:
        student: nn.Module = _on_meta(lambda: build_hybrid(spec, is_merged=True))
    else:
        student = _deployed(lambda: build_student(spec))
    return tuple(_trace(student, spec.image_size, batch))


def trace_stages(
    spec: StudentSpec, batch: int = 1
) -> tuple[tuple[Operator, ...], tuple[tuple[Operator, ...], ...]]:
    """Operators of a hybrid or convnet, and those of the second block of each of its stages.

    Blocks of a stage are alike: with two in every stage, these tell students of any depth.
    """
    student: Any = _on_meta(lambda: build_hybrid(spec, is_merged=True))
    seconds = [stage.blocks[1] for stage in student.trunk.stages]
    ops, spans = _trace_spans(student, spec.image_size, batch, seconds)
    return tuple(ops), tuple(tuple(ops[span]) for span in spans)


def trace_timm(name: str, image_size: int, batch: int = 1) -> tuple[Operator, ...]:
    """`trace_ops` of a timm model by name, with its own classifier left out."""
    return trace_student(student_spec(f"timm:{name}", image_size=image_size, embed_dim=1), batch)


def trace_classifier(name: str, image_size: int | None = None, batch: int = 1) -> list[Operator]:
    """`trace_ops` of a timm model by name as it is published: with its classifier.

    Args:
        name: As timm has it; random weights, nothing is downloaded.
        image_size: In pixels; None: the model's own.
        batch: Images.

    Raises:
        UnknownNameError: If timm has no such model.
        InputError: If it does not take images of that size, or cannot be traced.
    """
    import timm

    architecture = name.partition(".")[0]
    if not timm.is_model(architecture):
        lookup(dict.fromkeys(timm.list_models()), architecture, kind="timm model")
    config = timm.get_pretrained_cfg(name, allow_unregistered=True)
    own = config.input_size[-1] if config is not None else None
    size = image_size or own
    if size is None:
        raise InputError(f"timm names no image size for {name}", hint="give one")
    try:
        kwargs = {"img_size": size} if size != own else {}
        module = _deployed(lambda: _build_timm(architecture, kwargs))
        return _trace(module, size, batch)
    except DimeFMError:
        raise
    except Exception as error:
        why = str(error).partition("\n")[0]
        raise InputError(f"{name} cannot be traced at {size} px: {why}") from error


def _build_timm(architecture: str, kwargs: dict[str, Any]) -> nn.Module:
    import timm

    try:
        return timm.create_model(architecture, **kwargs)
    except TypeError:  # only some take img_size; the others take any image
        return timm.create_model(architecture)


class _Unfilled(TorchFunctionMode):
    """Weights on the meta device hold nothing: filling them takes most of a build's time."""

    _FILLS = ("uniform_", "normal_", "erfinv_", "mul_", "add_", "clamp_", "fill_", "zero_")

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if getattr(func, "__name__", "") in self._FILLS and args and args[0].is_meta:
            return args[0]
        return func(*args, **(kwargs or {}))


def _on_meta(build: Callable[[], nn.Module]) -> nn.Module:
    with torch.device("meta"), _Unfilled():
        return build()


def _deployed(build: Callable[[], nn.Module]) -> nn.Module:
    """Built on the meta device, but where branches must be merged, which takes weights."""
    module = _on_meta(build)
    return reparameterise(build()) if _has_branches(module) else module


def _has_branches(module: nn.Module) -> bool:
    """Whether it is trained in another form than it is deployed in; timm names it two ways."""
    return any(hasattr(m, "reparameterize") or hasattr(m, "fuse") for m in module.modules())


def _trace(module: nn.Module, image_size: int, batch: int) -> list[Operator]:
    return _trace_spans(module, image_size, batch, [])[0]


def _trace_spans(
    module: nn.Module, image_size: int, batch: int, parts: list[nn.Module]
) -> tuple[list[Operator], list[slice]]:
    """All operators, and where those of each part of the module are among them."""
    metas = {
        name: torch.empty_like(value, device="meta", dtype=_float32_if_float(value))
        for name, value in (*module.named_parameters(), *module.named_buffers())
    }
    image = torch.empty(batch, 3, image_size, image_size, device="meta", dtype=torch.float32)
    weights = {name for name, _ in module.named_parameters()}
    recorder = _Recorder([value for name, value in metas.items() if name in weights])
    was_training = [m for m in module.modules() if m.training]
    module.eval()
    begun: dict[int, int] = {}
    spans: dict[int, slice] = {}

    def enter(part: nn.Module, *_: Any) -> None:
        begun[id(part)] = len(recorder.ops)

    def leave(part: nn.Module, *_: Any) -> None:
        spans[id(part)] = slice(begun[id(part)], len(recorder.ops))

    hooks = [part.register_forward_pre_hook(enter) for part in parts]
    hooks += [part.register_forward_hook(leave) for part in parts]
    try:
        with torch.no_grad(), recorder:
            torch.func.functional_call(module, metas, (image,))
    finally:
        for child in was_training:
            child.training = True
        for hook in hooks:
            hook.remove()
    return recorder.ops, [spans[id(part)] for part in parts]


def _float32_if_float(value: Tensor) -> torch.dtype:
    return torch.float32 if value.is_floating_point() else value.dtype


class _Recorder(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Writes down each operation that costs time."""

    def __init__(self, parameters: list[Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.sizes = {id(p): _numel(p) for p in parameters}
        self.parameter_ids = set(self.sizes)
        self.counted: set[int] = set()
        self.ops: list[Operator] = []
        self.before = ""  # the operation before this one, views left out
        self._roots: dict[int, int] = {}  # views of weights, and whose they are
        self._kept: list[Tensor] = []  # an id is only good while its tensor lives

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self._record(func.overloadpacket.__name__, list(args), result)
        return result

    def _record(self, name: str, args: list[Any], result: Any) -> None:
        tensors = [a for a in _flat(args) if isinstance(a, Tensor)]
        outputs = [r for r in _flat([result]) if isinstance(r, Tensor)]
        if not tensors or not outputs:
            return
        if all(id(t) in self.parameter_ids for t in tensors):
            self._remember_views(tensors, outputs)  # a transposed weight is still that weight
            return
        op = self._operator(name, args, tensors, outputs[0])
        params = self._new_params(tensors)
        if op is not None:
            self.ops.append(replace(op, params=params))
        elif params and self.ops:
            self.ops[-1] = replace(self.ops[-1], params=self.ops[-1].params + params)
        if op is not None or "batch_norm" in name:
            self.before = name

    def _operator(
        self, name: str, args: list[Any], tensors: list[Tensor], output: Tensor
    ) -> Operator | None:
        read = float(sum(_numel(t) for t in tensors if id(t) not in self.parameter_ids))
        written = float(output.numel())
        if name in ("convolution", "_convolution", "convolution_overrideable"):
            shape = tuple(output.shape)
            op = convolution(name, tuple(args[1].shape), args[8], read=read, written=shape)
            return replace(op, weights=self._weights(tensors))
        if name in _MATMULS:
            inner = tensors[_MATMULS[name]].shape[-1]
            weights = self._weights(tensors)  # bmm: of strided tokens with their weight expanded
            if weights:
                return Operator(name, "linear", written * inner, 0.0, weights, read, written)
            return product(name, inner, read=read, written=tuple(output.shape))
        if name.startswith("_scaled_dot_product"):
            query, key, value = tensors[:3]
            return attention(
                name, tuple(query.shape), key.shape[-2], value.shape[-1], read=read, written=written
            )
        if "batch_norm" in name:
            if self.before in _TAKES_IN_BATCH_NORM:
                return None
            return Operator(name, "batch_norm", read=read, written=written)
        known = _KIND.get(name) or _KIND.get(name.removesuffix("_"))
        if name in ("mul", "mul_") and len(tensors) == 1:
            return None  # by a number, such as attention's scale: the product before it takes it in
        return Operator(name, known, read=read, written=written) if known else None

    def _weights(self, tensors: list[Tensor]) -> float:
        return float(sum(_numel(t) for t in tensors if id(t) in self.parameter_ids))

    def _new_params(self, tensors: list[Tensor]) -> int:
        """Weights that are read for the first time, whole or in part: of each, all of it."""
        roots = {self._root(id(t)) for t in tensors if id(t) in self.parameter_ids}
        fresh = roots - self.counted
        self.counted |= fresh
        return sum(self.sizes[root] for root in fresh)

    def _root(self, tensor_id: int) -> int:
        return self._roots.get(tensor_id, tensor_id)

    def _remember_views(self, inputs: list[Tensor], outputs: list[Tensor]) -> None:
        for view in outputs:
            self._kept.append(view)
            self.parameter_ids.add(id(view))
            self._roots[id(view)] = self._root(id(inputs[0]))


def _flat(values: list[Any]) -> list[Any]:
    found = []
    for value in values:
        found += _flat(list(value)) if isinstance(value, list | tuple) else [value]
    return found


def _numel(tensor: Tensor) -> int:
    """Elements in memory: an expanded dimension counts once."""
    return math.prod(n for n, step in zip(tensor.shape, tensor.stride(), strict=True) if step)
