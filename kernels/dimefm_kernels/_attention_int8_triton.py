"""The Triton kernel of int8 attention for Hopper and its launcher, and nothing else.

All logits of 64 queries are in registers at once, so that the softmax needs one pass and no
running maximum. Products q k^T are int8, probabilities float16 and values widened to it: nothing
is rounded to 1/127, and no values are transposed, which Hopper's int8 products would need. Both
conversions cost an addition, no conversion instruction: integers are added up from 1.5 * 2^23, in
whose binade a float32 has the integer's own bits, and a byte set under the bits of 1024 is a
float16. Programs go through several heads; the next one's loads are under way meanwhile.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from dimefm_kernels._attention_triton import (
    LOG2_E,
    launchable,
    load_tile,
    program_count,
    store_tile,
)
from dimefm_kernels.tiles import Tiles

_PROGRAMS_PER_SM = {64: 4, 288: 2}
"""Up to so many keys: what registers leave room for; the fastest of 2 to 6 on an H200."""


@triton.jit  # type: ignore[untyped-decorator]
def _load_keys(  # type: ignore[no-untyped-def]
    ptr, STRIDE_N: tl.constexpr, NUM_TOKENS: tl.constexpr, HEAD_DIM: tl.constexpr,
    KEYS_A: tl.constexpr, KEYS_B: tl.constexpr, KEYS_C: tl.constexpr, DIMS: tl.constexpr,
):  # fmt: skip
    """All keys, or values, of one head; for a tile that it does not have, the first."""
    END_B: tl.constexpr = KEYS_A + KEYS_B
    a = load_tile(ptr, 0, STRIDE_N, NUM_TOKENS, HEAD_DIM, KEYS_A, 0, DIMS, KEYS_B == 0)
    b = a
    c = a
    if KEYS_B > 0:
        b = load_tile(ptr, KEYS_A, STRIDE_N, NUM_TOKENS, HEAD_DIM, KEYS_B, 0, DIMS, KEYS_C == 0)
    if KEYS_C > 0:
        c = load_tile(ptr, END_B, STRIDE_N, NUM_TOKENS, HEAD_DIM, KEYS_C, 0, DIMS, True)
    return a, b, c


@triton.jit
def _biased_logits(q, k):  # type: ignore[no-untyped-def]
    """12582912 + q k^T as float32, exact below 2^22."""
    start = tl.full([q.shape[0], k.shape[0]], 0x4B400000, tl.int32)
    return tl.dot(q, tl.trans(k), acc=start, out_dtype=tl.int32).to(tl.float32, bitcast=True)


@triton.jit  # type: ignore[untyped-decorator]
def _mask(logits, FIRST: tl.constexpr, NUM_TOKENS: tl.constexpr):  # type: ignore[no-untyped-def]
    is_key = FIRST + tl.arange(0, logits.shape[1]) < NUM_TOKENS
    return tl.where(is_key[None, :], logits, float("-inf"))


@triton.jit
def _probs(logits, bias, scale_log2):  # type: ignore[no-untyped-def]
    # One rounding: by itself, logits * scale_log2 would lose the last bits of large numbers.
    return tl.exp2(tl.fma(logits, scale_log2, -bias))


@triton.jit
def _widened(v):  # type: ignore[no-untyped-def]
    bits = (v.to(tl.uint8, bitcast=True) ^ 0x80).to(tl.uint16) | 0x6400
    return bits.to(tl.float16, bitcast=True) - 1152.0


@triton.jit  # type: ignore[untyped-decorator]
def attention_int8_kernel(  # type: ignore[no-untyped-def]
    q_ptr,  # (B, H, N, D) int8 by the strides below, the values of a token next to each other
    k_ptr,
    v_ptr,
    out_ptr,  # (B, H, N, D) by strides of its own
    stride_b, stride_h,
    stride_ob, stride_oh,
    num_heads,
    num_items,  # B * H
    scale_log2,  # scale * log2(e) times the scales of q and k
    out_scale,  # the scale of v, over that of an int8 output
    STRIDE_N: tl.constexpr,
    STRIDE_ON: tl.constexpr,
    NUM_TOKENS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    ROWS: tl.constexpr,
    KEYS_A: tl.constexpr, KEYS_B: tl.constexpr, KEYS_C: tl.constexpr,  # 0: no such tile
    DIMS: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """Grid: (blocks of queries, programs that share the B * H heads)."""
    start = tl.program_id(0) * ROWS
    END_B: tl.constexpr = KEYS_A + KEYS_B
    for item in tl.range(tl.program_id(1), num_items, tl.num_programs(1), num_stages=STAGES):
        batch_idx = tl.cast(item // num_heads, tl.int64)
        head_idx = tl.cast(item % num_heads, tl.int64)
        at = batch_idx * stride_b + head_idx * stride_h
        q = load_tile(q_ptr + at, start, STRIDE_N, NUM_TOKENS, HEAD_DIM, ROWS, 0, DIMS, True)
        k_a, k_b, k_c = _load_keys(
            k_ptr + at, STRIDE_N, NUM_TOKENS, HEAD_DIM, KEYS_A, KEYS_B, KEYS_C, DIMS
        )
        v_a, v_b, v_c = _load_keys(
            v_ptr + at, STRIDE_N, NUM_TOKENS, HEAD_DIM, KEYS_A, KEYS_B, KEYS_C, DIMS
        )
        logits_a = _biased_logits(q, k_a)
        if KEYS_B == 0:
            logits_a = _mask(logits_a, 0, NUM_TOKENS)
        top = tl.max(logits_a, axis=1)
        if KEYS_B > 0:
            logits_b = _biased_logits(q, k_b)
            if KEYS_C == 0:
                logits_b = _mask(logits_b, KEYS_A, NUM_TOKENS)
            top = tl.maximum(top, tl.max(logits_b, axis=1))
        if KEYS_C > 0:
            logits_c = _mask(_biased_logits(q, k_c), END_B, NUM_TOKENS)
            top = tl.maximum(top, tl.max(logits_c, axis=1))
        bias = (top * scale_log2)[:, None]
        probs = _probs(logits_a, bias, scale_log2)
        total = tl.sum(probs, axis=1)
        out = tl.dot(probs.to(tl.float16), _widened(v_a))
        if KEYS_B > 0:
            probs_b = _probs(logits_b, bias, scale_log2)
            total += tl.sum(probs_b, axis=1)
            out = tl.dot(probs_b.to(tl.float16), _widened(v_b), acc=out)
        if KEYS_C > 0:
            probs_c = _probs(logits_c, bias, scale_log2)
            total += tl.sum(probs_c, axis=1)
            out = tl.dot(probs_c.to(tl.float16), _widened(v_c), acc=out)
        out_at = out_ptr + batch_idx * stride_ob + head_idx * stride_oh
        out *= (out_scale / total)[:, None]
        store_tile(out_at, out, start, STRIDE_ON, NUM_TOKENS, HEAD_DIM, ROWS, 0, DIMS)


@triton.jit  # type: ignore[untyped-decorator]
def packed_attention_int8_kernel(  # type: ignore[no-untyped-def]
    qkv_ptr,  # (B, N, 3, H, D) int8, contiguous
    num_items,  # B * H
    out_ptr,  # (B, N, H, D), contiguous
    NUM_HEADS: tl.constexpr,
    SCALE_LOG2: tl.constexpr,
    OUT_SCALE: tl.constexpr,
    NUM_TOKENS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    ROWS: tl.constexpr,
    KEYS_A: tl.constexpr, KEYS_B: tl.constexpr, KEYS_C: tl.constexpr,
    DIMS: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """attention_int8_kernel for TensorRT, as packed_attention_kernel."""
    width: tl.constexpr = NUM_HEADS * HEAD_DIM
    attention_int8_kernel(
        qkv_ptr, qkv_ptr + width, qkv_ptr + 2 * width, out_ptr,
        NUM_TOKENS * 3 * width, HEAD_DIM, NUM_TOKENS * width, HEAD_DIM,
        NUM_HEADS, num_items, SCALE_LOG2, OUT_SCALE, 3 * width, width, NUM_TOKENS, HEAD_DIM,
        ROWS, KEYS_A, KEYS_B, KEYS_C, DIMS, STAGES,
    )  # fmt: skip


def launch_attention_int8(
    q: Tensor, k: Tensor, v: Tensor, out: Tensor,
    *, tiles: Tiles, out_strides: tuple[int, int, int], logit_scale: float, out_scale: float,
) -> None:  # fmt: skip
    """Write attention into `out`, as `launch_attention` does.

    Args:
        q: (B, H, N, D) int8; values of a token next to each other, other strides any.
        k: As `q`, of equal strides.
        v: As `q`, of equal strides.
        out: float16 or int8, a whole tensor.
        tiles: Those of `tiles.whole_key_tiles`.
        out_strides: Of the output's (B, H, N) in `out`.
        logit_scale: Multiplies q k^T.
        out_scale: Multiplies the sum of probabilities times v, before it is stored.
    """
    batch, num_heads, num_tokens, head_dim = q.shape
    items = batch * num_heads
    per_sm = next(n for keys, n in _PROGRAMS_PER_SM.items() if tiles.padded_keys <= keys)
    grid = (tiles.blocks, program_count(q, items, tiles.blocks, per_sm=per_sm))
    launchable(attention_int8_kernel)[grid](
        q, k, v, out,
        q.stride(0), q.stride(1), out_strides[0], out_strides[1],
        num_heads, items, logit_scale * LOG2_E, out_scale,
        STRIDE_N=q.stride(2), STRIDE_ON=out_strides[2],
        NUM_TOKENS=num_tokens, HEAD_DIM=head_dim,
        num_warps=tiles.num_warps, num_stages=tiles.num_stages, **int8_constants(tiles),
    )  # fmt: skip


def int8_constants(tiles: Tiles) -> dict[str, int]:
    """The kernel's compile-time arguments by name."""
    keys = (tiles.tile,) * tiles.full_tiles + tuple(size for size in tiles.tails if size)
    names = ("KEYS_A", "KEYS_B", "KEYS_C")
    by_name = dict(zip(names, (*keys, 0, 0), strict=False))
    return {"ROWS": tiles.rows, "DIMS": tiles.dims[0], "STAGES": tiles.num_stages, **by_name}
