"""The Triton backward kernel of fused attention and its launcher, and nothing else.

Two launches of one kernel, each writing every value once, so that equal inputs give equal bits:
blocks of queries against tiles of keys give the gradient of q, blocks of keys against tiles of
queries those of k and v. Probabilities are computed again from the saved log-sum-exp
(FlashAttention-2, arXiv 2307.08691, section 3.1).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from dimefm_kernels._attention_triton import (
    LOG2_E,
    launchable,
    load_tile,
    product,
    program_count,
    store_tile,
)
from dimefm_kernels.tiles import backward_tiles

_LOG2_E = tl.constexpr(LOG2_E)


@triton.jit  # type: ignore[untyped-decorator]
def _add_tile(  # type: ignore[no-untyped-def]
    a0, a1, b0, b1,  # the block's own: q and grad of out, or k and v
    row_lse, row_delta,  # of the block's queries; unused for keys
    grad_a0, grad_a1, grad_b0, grad_b1,
    c_ptr, d_ptr,  # what it is multiplied with: k and v, or q and grad of out
    lse_ptr, delta_ptr, start, scale_log2,
    STRIDE_C: tl.constexpr, STRIDE_D: tl.constexpr,
    NUM_TOKENS: tl.constexpr, HEAD_DIM: tl.constexpr, TILE: tl.constexpr,
    D0: tl.constexpr, D1: tl.constexpr,
    IS_KEYS: tl.constexpr, IS_LAST: tl.constexpr,
):  # fmt: skip
    """Add one tile's share of the block's gradients."""
    c0 = load_tile(c_ptr, start, STRIDE_C, NUM_TOKENS, HEAD_DIM, TILE, 0, D0, IS_LAST)
    d0 = load_tile(d_ptr, start, STRIDE_D, NUM_TOKENS, HEAD_DIM, TILE, 0, D0, IS_LAST)
    logits = product(a0, tl.trans(c0))
    grad_probs = product(b0, tl.trans(d0))
    if D1 > 0:
        c1 = load_tile(c_ptr, start, STRIDE_C, NUM_TOKENS, HEAD_DIM, TILE, D0, D1, IS_LAST)
        d1 = load_tile(d_ptr, start, STRIDE_D, NUM_TOKENS, HEAD_DIM, TILE, D0, D1, IS_LAST)
        logits += product(a1, tl.trans(c1))
        grad_probs += product(b1, tl.trans(d1))
    cols = start + tl.arange(0, TILE)
    if IS_KEYS:
        lse = tl.load(lse_ptr + cols, mask=cols < NUM_TOKENS, other=0)[None, :]
        delta = tl.load(delta_ptr + cols, mask=cols < NUM_TOKENS, other=0)[None, :]
    else:
        lse = row_lse[:, None]
        delta = row_delta[:, None]
    probs = tl.exp2(logits * scale_log2 - lse * _LOG2_E)
    if IS_LAST:
        probs = tl.where((cols < NUM_TOKENS)[None, :], probs, 0.0)
    grad_logits = (probs * (grad_probs - delta)).to(c0.dtype)
    grad_a0 += product(grad_logits, c0)
    if D1 > 0:
        grad_a1 += product(grad_logits, c1)
    if IS_KEYS:
        grad_b0 += product(probs.to(d0.dtype), d0)
        if D1 > 0:
            grad_b1 += product(probs.to(d1.dtype), d1)
    return grad_a0, grad_a1, grad_b0, grad_b1


@triton.jit  # type: ignore[untyped-decorator]
def _grad_block(  # type: ignore[no-untyped-def]
    a_ptr, b_ptr, c_ptr, d_ptr, out_ptr, lse_ptr, delta_ptr, grad_a_ptr, grad_b_ptr,
    start, scale, scale_log2,
    STRIDE_A: tl.constexpr, STRIDE_B: tl.constexpr, STRIDE_D: tl.constexpr,
    NUM_TOKENS: tl.constexpr, HEAD_DIM: tl.constexpr, ROWS: tl.constexpr, IS_LAST: tl.constexpr,
    TILE: tl.constexpr, FULL_TILES: tl.constexpr, TAIL_A: tl.constexpr, TAIL_B: tl.constexpr,
    D0: tl.constexpr, D1: tl.constexpr, IS_KEYS: tl.constexpr,
):  # fmt: skip
    """One block of queries, or of keys, of one head against all tiles of the other."""
    a0 = load_tile(a_ptr, start, STRIDE_A, NUM_TOKENS, HEAD_DIM, ROWS, 0, D0, IS_LAST)
    b0 = load_tile(b_ptr, start, STRIDE_B, NUM_TOKENS, HEAD_DIM, ROWS, 0, D0, IS_LAST)
    a1 = a0
    b1 = b0
    grad_a0 = tl.zeros([ROWS, D0], tl.float32)
    grad_b0 = tl.zeros([ROWS, D0], tl.float32)
    grad_a1 = grad_a0
    grad_b1 = grad_b0
    if D1 > 0:
        a1 = load_tile(a_ptr, start, STRIDE_A, NUM_TOKENS, HEAD_DIM, ROWS, D0, D1, IS_LAST)
        b1 = load_tile(b_ptr, start, STRIDE_B, NUM_TOKENS, HEAD_DIM, ROWS, D0, D1, IS_LAST)
        grad_a1 = tl.zeros([ROWS, D1], tl.float32)
        grad_b1 = tl.zeros([ROWS, D1], tl.float32)
    rows = start + tl.arange(0, ROWS)
    lse = tl.zeros([ROWS], tl.float32)
    delta = tl.zeros([ROWS], tl.float32)
    if not IS_KEYS:
        o0 = load_tile(out_ptr, start, STRIDE_B, NUM_TOKENS, HEAD_DIM, ROWS, 0, D0, IS_LAST)
        delta = tl.sum(b0.to(tl.float32) * o0.to(tl.float32), axis=1)
        if D1 > 0:
            o1 = load_tile(out_ptr, start, STRIDE_B, NUM_TOKENS, HEAD_DIM, ROWS, D0, D1, IS_LAST)
            delta += tl.sum(b1.to(tl.float32) * o1.to(tl.float32), axis=1)
        tl.store(delta_ptr + rows, delta, mask=rows < NUM_TOKENS)
        lse = tl.load(lse_ptr + rows, mask=rows < NUM_TOKENS, other=0)
    for col in range(0, FULL_TILES * TILE, TILE):
        grad_a0, grad_a1, grad_b0, grad_b1 = _add_tile(
            a0, a1, b0, b1, lse, delta, grad_a0, grad_a1, grad_b0, grad_b1, c_ptr, d_ptr,
            lse_ptr, delta_ptr, col, scale_log2, STRIDE_A, STRIDE_D,
            NUM_TOKENS, HEAD_DIM, TILE, D0, D1, IS_KEYS, False,
        )  # fmt: skip
    if TAIL_A > 0:
        grad_a0, grad_a1, grad_b0, grad_b1 = _add_tile(
            a0, a1, b0, b1, lse, delta, grad_a0, grad_a1, grad_b0, grad_b1, c_ptr, d_ptr,
            lse_ptr, delta_ptr, FULL_TILES * TILE, scale_log2, STRIDE_A, STRIDE_D,
            NUM_TOKENS, HEAD_DIM, TAIL_A, D0, D1, IS_KEYS, TAIL_B == 0,
        )  # fmt: skip
    if TAIL_B > 0:
        grad_a0, grad_a1, grad_b0, grad_b1 = _add_tile(
            a0, a1, b0, b1, lse, delta, grad_a0, grad_a1, grad_b0, grad_b1, c_ptr, d_ptr,
            lse_ptr, delta_ptr, FULL_TILES * TILE + TAIL_A, scale_log2, STRIDE_A, STRIDE_D,
            NUM_TOKENS, HEAD_DIM, TAIL_B, D0, D1, IS_KEYS, True,
        )  # fmt: skip
    store_tile(grad_a_ptr, grad_a0 * scale, start, STRIDE_A, NUM_TOKENS, HEAD_DIM, ROWS, 0, D0)
    if D1 > 0:
        store_tile(grad_a_ptr, grad_a1 * scale, start, STRIDE_A, NUM_TOKENS, HEAD_DIM, ROWS, D0, D1)
    if IS_KEYS:
        store_tile(grad_b_ptr, grad_b0, start, STRIDE_A, NUM_TOKENS, HEAD_DIM, ROWS, 0, D0)
        if D1 > 0:
            store_tile(grad_b_ptr, grad_b1, start, STRIDE_A, NUM_TOKENS, HEAD_DIM, ROWS, D0, D1)


@triton.jit  # type: ignore[untyped-decorator]
def attention_backward_kernel(  # type: ignore[no-untyped-def]
    q_ptr, k_ptr, v_ptr,  # (B, H, N, D) by stride_b, stride_h, STRIDE_N
    out_ptr, grad_ptr,  # (B, H, N, D) by stride_ob, stride_oh, STRIDE_ON
    lse_ptr, delta_ptr,  # (B, H, N) float32; delta: sum of out * grad, written for the queries
    grads_ptr,  # of q, k and v, `part_stride` apart; strides of q
    part_stride,
    stride_b, stride_h, stride_ob, stride_oh,
    num_heads,
    num_items,  # B * H
    scale, scale_log2,
    STRIDE_N: tl.constexpr, STRIDE_ON: tl.constexpr,
    NUM_TOKENS: tl.constexpr, HEAD_DIM: tl.constexpr,
    ROWS: tl.constexpr, FULL_BLOCKS: tl.constexpr, TAIL_ROWS: tl.constexpr,
    TILE: tl.constexpr, FULL_TILES: tl.constexpr, TAIL_A: tl.constexpr, TAIL_B: tl.constexpr,
    D0: tl.constexpr, D1: tl.constexpr,
    IS_KEYS: tl.constexpr,  # blocks of keys (gradients of k and v), else of queries (of q)
):  # fmt: skip
    """Grid: (blocks, programs that share the B * H heads); first for queries, then for keys."""
    block = tl.program_id(0)
    stride_b_rows: tl.constexpr = STRIDE_N if IS_KEYS else STRIDE_ON
    stride_d_rows: tl.constexpr = STRIDE_ON if IS_KEYS else STRIDE_N
    for item in range(tl.program_id(1), num_items, tl.num_programs(1)):
        batch_idx = tl.cast(item // num_heads, tl.int64)
        head_idx = tl.cast(item % num_heads, tl.int64)
        at = batch_idx * stride_b + head_idx * stride_h
        out_at = batch_idx * stride_ob + head_idx * stride_oh
        row_at = (batch_idx * num_heads + head_idx) * NUM_TOKENS
        if IS_KEYS:
            a = k_ptr + at
            b = v_ptr + at
            c = q_ptr + at
            d = grad_ptr + out_at
            grad_a = grads_ptr + at + part_stride
        else:
            a = q_ptr + at
            b = grad_ptr + out_at
            c = k_ptr + at
            d = v_ptr + at
            grad_a = grads_ptr + at
        # No branch where there is one kind of block: loads overlap in a plain loop only.
        if FULL_BLOCKS > 0 and (TAIL_ROWS == 0 or block < FULL_BLOCKS):
            _grad_block(
                a, b, c, d, out_ptr + out_at, lse_ptr + row_at, delta_ptr + row_at,
                grad_a, grad_a + part_stride, block * ROWS, scale, scale_log2,
                STRIDE_N, stride_b_rows, stride_d_rows, NUM_TOKENS, HEAD_DIM, ROWS, False,
                TILE, FULL_TILES, TAIL_A, TAIL_B, D0, D1, IS_KEYS,
            )  # fmt: skip
        if TAIL_ROWS > 0 and (FULL_BLOCKS == 0 or block == FULL_BLOCKS):
            _grad_block(
                a, b, c, d, out_ptr + out_at, lse_ptr + row_at, delta_ptr + row_at,
                grad_a, grad_a + part_stride, FULL_BLOCKS * ROWS, scale, scale_log2,
                STRIDE_N, stride_b_rows, stride_d_rows, NUM_TOKENS, HEAD_DIM, TAIL_ROWS, True,
                TILE, FULL_TILES, TAIL_A, TAIL_B, D0, D1, IS_KEYS,
            )  # fmt: skip


def launch_attention_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, grads: Tensor,
    *, out_strides: tuple[int, int, int], part_stride: int, logit_scale: float,
) -> None:  # fmt: skip
    """Write the gradients of q, k and v into `grads`.

    Args:
        grad: Of `out`, which has its strides.
        q: (B, H, N, D), as the forward had it; `k`, `v` and the gradients have its strides.
        k: As `q`.
        v: As `q`.
        out: The forward's.
        lse: (B, H, N) float32, the forward's.
        grads: A whole tensor that holds the three gradients.
        out_strides: Of (B, H, N) in `out` and `grad`.
        part_stride: From one gradient to the next in `grads`.
        logit_scale: Multiplies q k^T.
    """
    batch, num_heads, num_tokens, head_dim = q.shape
    tiles = backward_tiles(num_tokens, head_dim, itemsize=q.element_size())
    grid = (tiles.blocks, program_count(q, batch * num_heads, tiles.blocks))
    delta = torch.empty_like(lse)
    kernel = launchable(attention_backward_kernel)
    for is_keys in (False, True):
        kernel[grid](
            q, k, v, out, grad, lse, delta, grads,
            part_stride, q.stride(0), q.stride(1), out_strides[0], out_strides[1],
            num_heads, batch * num_heads, logit_scale, logit_scale * LOG2_E,
            STRIDE_N=q.stride(2), STRIDE_ON=out_strides[2],
            NUM_TOKENS=num_tokens, HEAD_DIM=head_dim, IS_KEYS=is_keys,
            num_warps=tiles.num_warps, num_stages=tiles.num_stages, **tiles.constants(),
        )  # fmt: skip
