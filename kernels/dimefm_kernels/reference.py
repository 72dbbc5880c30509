"""Attention in plain torch, in whatever precision it is given: what the kernels must match."""

from __future__ import annotations

import torch
from torch import Tensor


def attention_reference(q: Tensor, k: Tensor, v: Tensor, *, scale: float | None = None) -> Tensor:
    """Attention with the softmax in float32, or in float64 for float64.

    Args:
        q: (B, num_heads, N, head_dim), any float dtype.
        k: (B, num_heads, N, head_dim).
        v: (B, num_heads, N, head_dim).
        scale: Multiplies the logits; default head_dim ** -0.5.

    Returns:
        (B, num_heads, N, head_dim), contiguous, in the dtype of `q`.
    """
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    dtype = torch.promote_types(q.dtype, torch.float32)
    logits = (q.to(dtype) @ k.to(dtype).transpose(-2, -1)) * scale
    return (logits.softmax(dim=-1) @ v.to(dtype)).to(q.dtype).contiguous()


def attention_qkv_reference(qkv: Tensor, num_heads: int, *, scale: float | None = None) -> Tensor:
    """The same on packed (B, N, 3 * num_heads * head_dim); (B, N, num_heads * head_dim) out."""
    batch, num_tokens, width = qkv.shape
    q, k, v = qkv.view(batch, num_tokens, 3, num_heads, -1).permute(2, 0, 3, 1, 4).unbind(0)
    out = attention_reference(q, k, v, scale=scale)
    return out.transpose(1, 2).reshape(batch, num_tokens, width // 3)


def int8_error_bound(
    qkv: Tensor, num_heads: int, *, qkv_scales: tuple[float, float, float], scale: float
) -> Tensor:
    """How far int8 attention may be from float64 attention of the same int8 values.

    Each exponential is rounded by at most half of 1/127 of the row's largest, and the row's
    sum, at least 1, divides: 0.5 / 127 * sum |v| / sum exp(logit - largest logit).

    Returns:
        (B, N, num_heads * head_dim) float64.
    """
    batch, num_tokens, width = qkv.shape
    parts = qkv.double().view(batch, num_tokens, 3, num_heads, -1).permute(2, 0, 3, 1, 4)
    q, k, v = (part * step for part, step in zip(parts.unbind(0), qkv_scales, strict=True))
    logits = (q @ k.transpose(-2, -1)) * scale
    total = (logits - logits.amax(dim=-1, keepdim=True)).exp().sum(dim=-1, keepdim=True)
    bound = (0.5 / 127) * v.abs().sum(dim=-2, keepdim=True) / total
    return bound.transpose(1, 2).reshape(batch, num_tokens, width // 3)
