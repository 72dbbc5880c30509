"""Fused attention for small vision transformers: signatures, checks, dispatch and autograd.

Each op is a `torch.library.triton_op`, not an opaque `custom_op`: torch.export keeps it as one
node, torch.compile and AOTInductor see the Triton launches inside, so that a compiled `.pt2`
embeds the kernels and needs neither this package nor Triton to run. On CUDA the ops launch the
kernels of `_attention_triton.py`; elsewhere, without Triton and for shapes that the kernels do
not take (tiles.is_supported) they are torch's own attention. The plain references are in
reference.py.

No CPU kernel of ours: there, torch's attention took 0.7 to 1.5 times as long as ONNX Runtime's,
on most shapes a little longer (benchmarks/bench_attention.py), and what runs on a CPU is exported
to the latter.
No LayerNorm and quantise kernel: a compiler that writes the norm's output as int8 in the norm's
own pass, as Inductor does with pointwise neighbours of a reduction, moves 3 bytes a value (2
read, 1 written), two passes move 7; one of ours would move the same 3.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from dimefm_kernels.tiles import is_supported, whole_key_tiles

try:
    from dimefm_kernels._attention_backward_triton import launch_attention_backward
    from dimefm_kernels._attention_int8_triton import launch_attention_int8
    from dimefm_kernels._attention_triton import capability_of, launch_attention

    HAS_TRITON = True
except ImportError:  # Triton is not made for every system that torch runs on
    HAS_TRITON = False

_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def fused_attention(q: Tensor, k: Tensor, v: Tensor, *, scale: float | None = None) -> Tensor:
    """Attend every token to every other, without mask or dropout.

    Args:
        q: (B, num_heads, N, head_dim), float32, float16 or bfloat16.
        k: (B, num_heads, N, head_dim), same dtype and device.
        v: (B, num_heads, N, head_dim), same dtype and device.
        scale: Multiplies the logits; default head_dim ** -0.5.

    Returns:
        (B, num_heads, N, head_dim), contiguous, in the dtype of `q`.

    Raises:
        ValueError: If shapes, dtypes or devices differ, or are not of the kinds above.
    """
    if q.ndim != 4 or q.shape != k.shape or q.shape != v.shape:
        raise ValueError(
            "q, k and v must all be (B, num_heads, N, head_dim), got "
            f"{tuple(q.shape)}, {tuple(k.shape)} and {tuple(v.shape)}"
        )
    if len({q.dtype, k.dtype, v.dtype}) > 1 or len({q.device, k.device, v.device}) > 1:
        raise ValueError("q, k and v must share one dtype and one device")
    if q.dtype not in _DTYPES:
        raise ValueError(f"q, k and v must be float32, float16 or bfloat16, got {q.dtype}")
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    needs_lse = torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v))
    out: Tensor = _fused_attention(q, k, v, scale, needs_lse)[0]
    return out


def fused_attention_qkv(qkv: Tensor, num_heads: int, *, scale: float | None = None) -> Tensor:
    """The same on the packed output of a qkv projection, without permutes or copies.

    Args:
        qkv: (B, N, 3 * num_heads * head_dim): all heads of q, then of k, then of v; float32,
            float16 or bfloat16.
        num_heads: Number of heads.
        scale: Multiplies the logits; default head_dim ** -0.5.

    Returns:
        (B, N, num_heads * head_dim), contiguous: what the output projection takes.

    Raises:
        ValueError: If the shape cannot be, or the dtype is another.
    """
    head_dim = _head_dim(qkv, num_heads)
    if qkv.dtype not in _DTYPES:
        raise ValueError(f"qkv must be float32, float16 or bfloat16, got {qkv.dtype}")
    scale = head_dim**-0.5 if scale is None else scale
    needs_lse = torch.is_grad_enabled() and qkv.requires_grad
    out: Tensor = _fused_attention_qkv(qkv, num_heads, scale, needs_lse)[0]
    return out


def fused_attention_qkv_int8(
    qkv: Tensor,
    num_heads: int,
    *,
    qkv_scales: tuple[float, float, float],
    scale: float | None = None,
    out_scale: float | None = None,
) -> Tensor:
    """The same on int8, with int32 products and a float32 softmax; inference only.

    Args:
        qkv: (B, N, 3 * num_heads * head_dim) int8, symmetric: zero is 0.
        num_heads: Number of heads.
        qkv_scales: What one step of q, of k and of v is worth.
        scale: Multiplies the logits; default head_dim ** -0.5.
        out_scale: What one step of an int8 output is worth; None gives float16.

    Returns:
        (B, N, num_heads * head_dim), float16, or int8 that saturates.

    Raises:
        ValueError: If the shape cannot be, the dtype is another, or a scale is not positive.
    """
    head_dim = _head_dim(qkv, num_heads)
    if qkv.dtype != torch.int8:
        raise ValueError(f"qkv must be int8, got {qkv.dtype}")
    steps = (*qkv_scales, 1.0 if out_scale is None else out_scale)
    scale = head_dim**-0.5 if scale is None else scale
    # The largest logit is looked for before they are scaled. NaN is not positive either.
    if not all(x > 0 for x in (*steps, scale)):
        raise ValueError(f"scales must be positive, got {steps} and {scale}")
    q_step, k_step, v_step, out_step = steps
    is_int8 = out_scale is not None
    out: Tensor = _fused_attention_qkv_int8(
        qkv, num_heads, scale * q_step * k_step, v_step / out_step, is_int8
    )
    return out


def split_qkv(qkv: Tensor, num_heads: int) -> tuple[Tensor, Tensor, Tensor]:
    """(B, N, 3 * H * D) as three views (B, H, N, D)."""
    batch, num_tokens, width = qkv.shape
    parts = qkv.view(batch, num_tokens, 3, num_heads, width // (3 * num_heads))
    q, k, v = parts.permute(2, 0, 3, 1, 4).unbind(0)
    return q, k, v


def _head_dim(qkv: Tensor, num_heads: int) -> int:
    if qkv.ndim != 3 or num_heads < 1 or not qkv.shape[2] or qkv.shape[2] % (3 * num_heads):
        raise ValueError(
            f"qkv must be (B, N, 3 * num_heads * head_dim) with {num_heads} heads, "
            f"got {tuple(qkv.shape)}"
        )
    return int(qkv.shape[-1]) // (3 * num_heads)


# ------------------------------------------------------------------------------- the ops


def _uses_kernel(q: Tensor) -> bool:
    return HAS_TRITON and q.is_cuda and is_supported(*q.shape[2:], itemsize=q.element_size())


def _new_lse(q: Tensor, needs_lse: bool) -> Tensor:
    """(B, H, N) to be written, or nothing."""
    return q.new_empty(q.shape[:3] if needs_lse else (0,), dtype=torch.float32)


def _plain_lse(q: Tensor, k: Tensor, scale: float) -> Tensor:
    return ((q.float() @ k.float().transpose(-2, -1)) * scale).logsumexp(dim=-1)


def _plain_grads(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v in float32, from probabilities that are computed again."""
    q, k, v, grad, out = (x.float() for x in (q, k, v, grad, out))
    probs = ((q @ k.transpose(-2, -1)) * scale - lse[..., None]).exp()
    delta = (grad * out).sum(dim=-1, keepdim=True)
    grad_logits = probs * (grad @ v.transpose(-2, -1) - delta) * scale
    return grad_logits @ k, grad_logits.transpose(-2, -1) @ q, probs.transpose(-2, -1) @ grad


@torch.library.triton_op("dimefm::fused_attention", mutates_args=())
def _fused_attention(
    q: Tensor, k: Tensor, v: Tensor, scale: float, needs_lse: bool
) -> tuple[Tensor, Tensor]:
    if not _uses_kernel(q):
        out = F.scaled_dot_product_attention(q, k, v, scale=scale).contiguous()
        return out, _plain_lse(q, k, scale) if needs_lse else _new_lse(q, False)
    if not q.stride() == k.stride() == v.stride() or q.stride(-1) != 1:
        q, k, v = q.contiguous(), k.contiguous(), v.contiguous()
    out, lse = q.new_empty(q.shape), _new_lse(q, needs_lse)
    launch_attention(
        q, k, v, out, lse if needs_lse else None,
        out_strides=_strides(out), logit_scale=scale,
    )  # fmt: skip
    return out, lse


@torch.library.triton_op("dimefm::fused_attention_backward", mutates_args=())
def _fused_attention_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, scale: float
) -> Tensor:
    """(3, B, H, N, D): the gradients of q, k and v."""
    if not _uses_kernel(q):
        return torch.stack(_plain_grads(grad, q, k, v, out, lse, scale)).to(q.dtype)
    q, k, v, grad = q.contiguous(), k.contiguous(), v.contiguous(), grad.contiguous()
    grads = q.new_empty((3, *q.shape))
    launch_attention_backward(
        grad, q, k, v, out, lse, grads,
        out_strides=_strides(out), part_stride=grads.stride(0), logit_scale=scale,
    )  # fmt: skip
    return grads


@torch.library.triton_op("dimefm::fused_attention_qkv", mutates_args=())
def _fused_attention_qkv(
    qkv: Tensor, num_heads: int, scale: float, needs_lse: bool
) -> tuple[Tensor, Tensor]:
    q, k, v = split_qkv(qkv.contiguous(), num_heads)
    if not _uses_kernel(q):
        out = _join_heads(F.scaled_dot_product_attention(q, k, v, scale=scale))
        return out, _plain_lse(q, k, scale) if needs_lse else _new_lse(q, False)
    out = qkv.new_empty((*qkv.shape[:2], qkv.shape[2] // 3))
    lse = _new_lse(q, needs_lse)
    launch_attention(
        q, k, v, out, lse if needs_lse else None,
        out_strides=_head_strides(q), logit_scale=scale,
    )  # fmt: skip
    return out, lse


@torch.library.triton_op("dimefm::fused_attention_qkv_backward", mutates_args=())
def _fused_attention_qkv_backward(
    grad: Tensor, qkv: Tensor, out: Tensor, lse: Tensor, num_heads: int, scale: float
) -> Tensor:
    q, k, v = split_qkv(qkv.contiguous(), num_heads)
    if not _uses_kernel(q):
        by_head = (*grad.shape[:2], num_heads, _head_dim(qkv, num_heads))
        grad, out = (x.reshape(by_head).transpose(1, 2) for x in (grad, out))
        parts = _plain_grads(grad, q, k, v, out, lse, scale)
        return torch.cat([_join_heads(part) for part in parts], dim=2).to(qkv.dtype)
    grads = qkv.new_empty(qkv.shape)
    launch_attention_backward(
        grad.contiguous(), q, k, v, out, lse, grads,
        out_strides=_head_strides(q), part_stride=qkv.shape[2] // 3, logit_scale=scale,
    )  # fmt: skip
    return grads


@torch.library.triton_op("dimefm::fused_attention_qkv_int8", mutates_args=())
def _fused_attention_qkv_int8(
    qkv: Tensor, num_heads: int, logit_scale: float, value_scale: float, is_int8: bool
) -> Tensor:
    q, k, v = split_qkv(qkv.contiguous(), num_heads)
    dtype = torch.int8 if is_int8 else torch.float16
    if not _uses_kernel(q):
        logits = (q.float() @ k.float().transpose(-2, -1)) * logit_scale
        probs = (logits - logits.amax(dim=-1, keepdim=True)).exp()
        values = ((probs * 127).round() @ v.float()) * (value_scale / 127)
        values = values / probs.sum(dim=-1, keepdim=True)
        return _join_heads(values.round().clamp(-128, 127) if is_int8 else values).to(dtype)
    out = qkv.new_empty((*qkv.shape[:2], qkv.shape[2] // 3), dtype=dtype)
    tiles = whole_key_tiles(*q.shape[2:], capability=capability_of(q))
    if tiles is not None:
        launch_attention_int8(
            q, k, v, out, tiles=tiles,
            out_strides=_head_strides(q), logit_scale=logit_scale, out_scale=value_scale,
        )  # fmt: skip
        return out
    launch_attention(
        q, k, v, out, None,
        out_strides=_head_strides(q), logit_scale=logit_scale, out_scale=value_scale / 127,
    )  # fmt: skip
    return out


def _join_heads(x: Tensor) -> Tensor:
    """(B, H, N, D) as (B, N, H * D), contiguous."""
    batch, num_heads, num_tokens, head_dim = x.shape
    return x.transpose(1, 2).reshape(batch, num_tokens, num_heads * head_dim).contiguous()


def _strides(x: Tensor) -> tuple[int, int, int]:
    return x.stride(0), x.stride(1), x.stride(2)


def _head_strides(q: Tensor) -> tuple[int, int, int]:
    """Of (B, H, N) in a contiguous (B, N, H * D)."""
    _, num_heads, num_tokens, head_dim = q.shape
    return num_tokens * num_heads * head_dim, head_dim, num_heads * head_dim


# ------------------------------------------------------------------------------ autograd


def _save_inputs(ctx: torch.autograd.function.FunctionCtx, inputs: tuple, output: tuple) -> None:  # type: ignore[type-arg]
    *tensors, scale, _ = inputs
    ctx.save_for_backward(*tensors, *output)
    ctx.scale = scale  # type: ignore[attr-defined]


def _backward(
    ctx: torch.autograd.function.FunctionCtx, grad: Tensor, _: Tensor
) -> tuple[Tensor | None, ...]:
    grads = _fused_attention_backward(grad, *ctx.saved_tensors, ctx.scale)  # type: ignore[attr-defined]
    return (*grads.unbind(0), None, None)


def _save_qkv(ctx: torch.autograd.function.FunctionCtx, inputs: tuple, output: tuple) -> None:  # type: ignore[type-arg]
    qkv, ctx.num_heads, ctx.scale, _ = inputs  # type: ignore[attr-defined]
    ctx.save_for_backward(qkv, *output)


def _backward_qkv(
    ctx: torch.autograd.function.FunctionCtx, grad: Tensor, _: Tensor
) -> tuple[Tensor | None, ...]:
    saved = ctx.saved_tensors  # type: ignore[attr-defined]
    grad_qkv = _fused_attention_qkv_backward(grad, *saved, ctx.num_heads, ctx.scale)  # type: ignore[attr-defined]
    return grad_qkv, None, None, None


_fused_attention.register_autograd(_backward, setup_context=_save_inputs)
_fused_attention_qkv.register_autograd(_backward_qkv, setup_context=_save_qkv)
