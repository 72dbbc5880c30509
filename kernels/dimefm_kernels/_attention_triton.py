"""The Triton forward kernel of fused_attention and its launcher, and nothing else.

One program does BLOCK_M queries of one head and holds all keys and values of that head: with
577 tokens or fewer, one softmax over the whole row needs no running maximum.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from dimefm_kernels.attention import block_sizes


@triton.jit  # type: ignore[untyped-decorator]
def _attention_kernel(  # type: ignore[no-untyped-def]  # Triton reads annotations
    q_ptr,  # (B, H, N, D)
    k_ptr,  # (B, H, N, D)
    v_ptr,  # (B, H, N, D)
    out_ptr,  # (B, H, N, D), contiguous
    stride_qb, stride_qh, stride_qn, stride_qd,
    stride_kb, stride_kh, stride_kn, stride_kd,
    stride_vb, stride_vh, stride_vn, stride_vd,
    num_heads,
    num_tokens,
    head_dim,
    scale_log2,  # scale * log2(e): exp2 is the hardware's own
    BLOCK_M: tl.constexpr,  # queries of one program
    BLOCK_N: tl.constexpr,  # all keys, padded
    BLOCK_D: tl.constexpr,  # head_dim, padded
    PRECISION: tl.constexpr,  # of fp32 products: ieee, or tf32
):  # fmt: skip
    batch_idx = (tl.program_id(1) // num_heads).to(tl.int64)
    head_idx = (tl.program_id(1) % num_heads).to(tl.int64)
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    cols = tl.arange(0, BLOCK_N)
    dims = tl.arange(0, BLOCK_D)
    row_mask = (rows < num_tokens)[:, None] & (dims < head_dim)[None, :]
    col_mask = (cols < num_tokens)[:, None] & (dims < head_dim)[None, :]

    q_ptr += batch_idx * stride_qb + head_idx * stride_qh
    k_ptr += batch_idx * stride_kb + head_idx * stride_kh
    v_ptr += batch_idx * stride_vb + head_idx * stride_vh
    out_ptr += tl.program_id(1).to(tl.int64) * num_tokens * head_dim
    q_at = q_ptr + rows[:, None] * stride_qn + dims[None, :] * stride_qd
    q = tl.load(q_at, mask=row_mask, other=0.0)
    k_at = k_ptr + cols[:, None] * stride_kn + dims[None, :] * stride_kd
    k = tl.load(k_at, mask=col_mask, other=0.0)

    logits = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale_log2
    logits = tl.where((cols < num_tokens)[None, :], logits, float("-inf"))
    probs = tl.exp2(logits - tl.max(logits, axis=1)[:, None])
    total = tl.sum(probs, axis=1)

    v_at = v_ptr + cols[:, None] * stride_vn + dims[None, :] * stride_vd
    v = tl.load(v_at, mask=col_mask, other=0.0)
    out = tl.dot(probs.to(v.dtype), v, input_precision=PRECISION) / total[:, None]
    out_at = out_ptr + rows[:, None] * head_dim + dims[None, :]
    tl.store(out_at, out.to(out_ptr.dtype.element_ty), mask=row_mask)


def attention_forward(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """Launch the kernel: (B, num_heads, N, head_dim) each, any strides; see `fused_attention`."""
    batch, num_heads, num_tokens, head_dim = q.shape
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    block_m, block_n, block_d = block_sizes(num_tokens, head_dim)
    grid = (triton.cdiv(num_tokens, block_m), batch * num_heads)
    _attention_kernel[grid](
        q, k, v, out,
        *q.stride(), *k.stride(), *v.stride(),
        num_heads, num_tokens, head_dim, scale * 1.4426950408889634,
        BLOCK_M=block_m, BLOCK_N=block_n, BLOCK_D=block_d,
        PRECISION="tf32" if torch.backends.cuda.matmul.allow_tf32 else "ieee",
        num_warps=4 if block_n <= 256 else 8,
    )  # fmt: skip
    return out
