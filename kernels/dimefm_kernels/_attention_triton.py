"""The Triton forward kernel of fused attention and its launcher, and nothing else.

One program does one block of queries of one head, or goes through several heads one after the
other so that the next head's loads overlap this one's products. Keys and values come in tiles
of which only the last may be padded (tiles.py); the softmax is online (Milakov and Gimelshein,
arXiv 1805.02867; FlashAttention-2, arXiv 2307.08691): one pass, no N x N in memory. With 64
tokens or fewer, all keys and values of a head are one tile and are read once.

int8 rounds each exponential, relative to the row's running maximum, to 1/127: as the sum of
exponentials is at least 1, that is never coarser than TensorRT's rule of 1/127 after softmax.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.library import wrap_triton

from dimefm_kernels.tiles import MAX_GRID_Y, forward_tiles

LOG2_E = 1.4426950408889634
LN_2 = tl.constexpr(0.6931471805599453)
_PROGRAMS_PER_SM = 4  # of 128 threads: enough to hide a load behind another's products


@triton.jit
def product(a, b):  # type: ignore[no-untyped-def]
    """Matrix product added up in float32, or exactly in int32 for int8."""
    if a.dtype == tl.int8:
        return tl.dot(a, b, out_dtype=tl.int32)
    return tl.dot(a, b, input_precision="ieee")


@triton.jit
def round_to_int8(x):  # type: ignore[no-untyped-def]
    """Nearest whole number, ties to even, of -128 <= x <= 127, without a conversion instruction.

    From 1.5 * 2^23 on a float32 has no bits for a fraction, and its low byte is the number's.
    """
    return (x + 12582912.0).to(tl.int32, bitcast=True).to(tl.int8)


@triton.jit  # type: ignore[untyped-decorator]
def load_tile(  # type: ignore[no-untyped-def]
    ptr,  # of one head
    start,  # first token
    STRIDE_N: tl.constexpr,  # between tokens
    NUM_TOKENS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    ROWS: tl.constexpr,
    FIRST_DIM: tl.constexpr,
    DIMS: tl.constexpr,
    IS_LAST: tl.constexpr,  # may hold padding
):
    """(ROWS, DIMS) of one head's values; padding is 0."""
    rows = start + tl.arange(0, ROWS)
    dims = FIRST_DIM + tl.arange(0, DIMS)
    at = ptr + rows[:, None] * STRIDE_N + dims[None, :]
    if FIRST_DIM + DIMS > HEAD_DIM:
        tile = tl.load(at, mask=(rows < NUM_TOKENS)[:, None] & (dims < HEAD_DIM)[None, :], other=0)
    elif IS_LAST:
        tile = tl.load(at, mask=(rows < NUM_TOKENS)[:, None], other=0)
    else:
        tile = tl.load(at)
    return tile


@triton.jit  # type: ignore[untyped-decorator]
def store_tile(  # type: ignore[no-untyped-def]
    ptr, tile, start, STRIDE_N: tl.constexpr,
    NUM_TOKENS: tl.constexpr, HEAD_DIM: tl.constexpr,
    ROWS: tl.constexpr, FIRST_DIM: tl.constexpr, DIMS: tl.constexpr,
):  # fmt: skip
    """Write (ROWS, DIMS) without its padding; to int8, rounded and clamped."""
    rows = start + tl.arange(0, ROWS)
    dims = FIRST_DIM + tl.arange(0, DIMS)
    at = ptr + rows[:, None] * STRIDE_N + dims[None, :]
    if ptr.dtype.element_ty == tl.int8:
        tile = round_to_int8(tl.minimum(tl.maximum(tile, -128.0), 127.0))
    mask = (rows < NUM_TOKENS)[:, None] & (dims < HEAD_DIM)[None, :]
    tl.store(at, tile.to(ptr.dtype.element_ty), mask=mask)


@triton.jit  # type: ignore[untyped-decorator]
def _attend_tile(  # type: ignore[no-untyped-def]
    q0, q1, top, total, out0, out1, k_ptr, v_ptr, start, scale_log2,
    STRIDE_N: tl.constexpr, NUM_TOKENS: tl.constexpr, HEAD_DIM: tl.constexpr,
    TILE: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr,
    IS_LAST: tl.constexpr,
):  # fmt: skip
    """Add one tile of keys: the running maximum, the sum of exponentials, the weighted values."""
    k0 = load_tile(k_ptr, start, STRIDE_N, NUM_TOKENS, HEAD_DIM, TILE, 0, D0, IS_LAST)
    logits = product(q0, tl.trans(k0))
    if D1 > 0:
        k1 = load_tile(k_ptr, start, STRIDE_N, NUM_TOKENS, HEAD_DIM, TILE, D0, D1, IS_LAST)
        logits += product(q1, tl.trans(k1))
    logits = logits.to(tl.float32) * scale_log2
    if IS_LAST:
        is_key = start + tl.arange(0, TILE) < NUM_TOKENS
        logits = tl.where(is_key[None, :], logits, float("-inf"))
    new_top = tl.maximum(top, tl.max(logits, axis=1))
    decay = tl.exp2(top - new_top)
    probs = tl.exp2(logits - new_top[:, None])
    total = total * decay + tl.sum(probs, axis=1)
    if v_ptr.dtype.element_ty == tl.int8:
        probs = round_to_int8(probs * 127.0)
    v0 = load_tile(v_ptr, start, STRIDE_N, NUM_TOKENS, HEAD_DIM, TILE, 0, D0, IS_LAST)
    out0 = out0 * decay[:, None] + product(probs.to(v0.dtype), v0)
    if D1 > 0:
        v1 = load_tile(v_ptr, start, STRIDE_N, NUM_TOKENS, HEAD_DIM, TILE, D0, D1, IS_LAST)
        out1 = out1 * decay[:, None] + product(probs.to(v1.dtype), v1)
    return new_top, total, out0, out1


@triton.jit  # type: ignore[untyped-decorator]
def _attend_block(  # type: ignore[no-untyped-def]
    q_ptr, k_ptr, v_ptr, out_ptr, lse_ptr, start, scale_log2, out_scale,
    STRIDE_N: tl.constexpr, STRIDE_ON: tl.constexpr,
    NUM_TOKENS: tl.constexpr, HEAD_DIM: tl.constexpr, ROWS: tl.constexpr, IS_LAST: tl.constexpr,
    TILE: tl.constexpr, FULL_TILES: tl.constexpr, TAIL_A: tl.constexpr, TAIL_B: tl.constexpr,
    D0: tl.constexpr, D1: tl.constexpr, HAS_LSE: tl.constexpr,
):  # fmt: skip
    """One block of queries of one head against all its keys."""
    q0 = load_tile(q_ptr, start, STRIDE_N, NUM_TOKENS, HEAD_DIM, ROWS, 0, D0, IS_LAST)
    q1 = q0
    out0 = tl.zeros([ROWS, D0], tl.float32)
    out1 = out0
    if D1 > 0:
        q1 = load_tile(q_ptr, start, STRIDE_N, NUM_TOKENS, HEAD_DIM, ROWS, D0, D1, IS_LAST)
        out1 = tl.zeros([ROWS, D1], tl.float32)
    top = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    # The short tiles first: their loads then wait beside the queries', not after the loop.
    if TAIL_A > 0:
        top, total, out0, out1 = _attend_tile(
            q0, q1, top, total, out0, out1, k_ptr, v_ptr, FULL_TILES * TILE, scale_log2,
            STRIDE_N, NUM_TOKENS, HEAD_DIM, TAIL_A, D0, D1, TAIL_B == 0,
        )  # fmt: skip
    if TAIL_B > 0:
        top, total, out0, out1 = _attend_tile(
            q0, q1, top, total, out0, out1, k_ptr, v_ptr, FULL_TILES * TILE + TAIL_A, scale_log2,
            STRIDE_N, NUM_TOKENS, HEAD_DIM, TAIL_B, D0, D1, True,
        )  # fmt: skip
    for key in range(0, FULL_TILES * TILE, TILE):
        top, total, out0, out1 = _attend_tile(
            q0, q1, top, total, out0, out1, k_ptr, v_ptr, key, scale_log2,
            STRIDE_N, NUM_TOKENS, HEAD_DIM, TILE, D0, D1, False,
        )  # fmt: skip
    share = out_scale / total[:, None]
    store_tile(out_ptr, out0 * share, start, STRIDE_ON, NUM_TOKENS, HEAD_DIM, ROWS, 0, D0)
    if D1 > 0:
        store_tile(out_ptr, out1 * share, start, STRIDE_ON, NUM_TOKENS, HEAD_DIM, ROWS, D0, D1)
    if HAS_LSE:
        rows = start + tl.arange(0, ROWS)
        tl.store(lse_ptr + rows, (top + tl.log2(total)) * LN_2, mask=rows < NUM_TOKENS)


@triton.jit  # type: ignore[untyped-decorator]
def attention_kernel(  # type: ignore[no-untyped-def]
    q_ptr,  # (B, H, N, D) by the strides below, the values of a token next to each other
    k_ptr,
    v_ptr,
    out_ptr,  # (B, H, N, D) by strides of its own
    lse_ptr,  # (B, H, N) float32, contiguous: log of the sum of exponentials, if HAS_LSE
    stride_b, stride_h,
    stride_ob, stride_oh,
    num_heads,
    num_items,  # B * H
    scale_log2,  # scale * log2(e), for int8 times the scales of q and k: exp2 is in hardware
    out_scale,  # 1; for int8 the scale of v / 127, over that of an int8 output
    STRIDE_N: tl.constexpr,
    STRIDE_ON: tl.constexpr,
    NUM_TOKENS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    ROWS: tl.constexpr, FULL_BLOCKS: tl.constexpr, TAIL_ROWS: tl.constexpr,
    TILE: tl.constexpr, FULL_TILES: tl.constexpr, TAIL_A: tl.constexpr, TAIL_B: tl.constexpr,
    D0: tl.constexpr, D1: tl.constexpr,
    HAS_LSE: tl.constexpr,
):  # fmt: skip
    """Grid: (blocks of queries, programs that share the B * H heads)."""
    block = tl.program_id(0)
    for item in range(tl.program_id(1), num_items, tl.num_programs(1)):
        batch_idx = tl.cast(item // num_heads, tl.int64)
        head_idx = tl.cast(item % num_heads, tl.int64)
        at = batch_idx * stride_b + head_idx * stride_h
        out_at = out_ptr + batch_idx * stride_ob + head_idx * stride_oh
        lse_at = lse_ptr + (batch_idx * num_heads + head_idx) * NUM_TOKENS
        # No branch where there is one kind of block: loads overlap in a plain loop only.
        if FULL_BLOCKS > 0 and (TAIL_ROWS == 0 or block < FULL_BLOCKS):
            _attend_block(
                q_ptr + at, k_ptr + at, v_ptr + at, out_at, lse_at, block * ROWS,
                scale_log2, out_scale, STRIDE_N, STRIDE_ON, NUM_TOKENS, HEAD_DIM, ROWS, False,
                TILE, FULL_TILES, TAIL_A, TAIL_B, D0, D1, HAS_LSE,
            )  # fmt: skip
        if TAIL_ROWS > 0 and (FULL_BLOCKS == 0 or block == FULL_BLOCKS):
            _attend_block(
                q_ptr + at, k_ptr + at, v_ptr + at, out_at, lse_at, FULL_BLOCKS * ROWS,
                scale_log2, out_scale, STRIDE_N, STRIDE_ON, NUM_TOKENS, HEAD_DIM, TAIL_ROWS, True,
                TILE, FULL_TILES, TAIL_A, TAIL_B, D0, D1, HAS_LSE,
            )  # fmt: skip


@triton.jit  # type: ignore[untyped-decorator]
def packed_attention_kernel(  # type: ignore[no-untyped-def]
    qkv_ptr,  # (B, N, 3, H, D), contiguous
    num_items,  # B * H
    out_ptr,  # (B, N, H, D), contiguous
    NUM_HEADS: tl.constexpr,
    SCALE_LOG2: tl.constexpr,
    OUT_SCALE: tl.constexpr,
    NUM_TOKENS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    ROWS: tl.constexpr, FULL_BLOCKS: tl.constexpr, TAIL_ROWS: tl.constexpr,
    TILE: tl.constexpr, FULL_TILES: tl.constexpr, TAIL_A: tl.constexpr, TAIL_B: tl.constexpr,
    D0: tl.constexpr, D1: tl.constexpr,
):  # fmt: skip
    """attention_kernel for TensorRT: inputs, sizes, outputs, in that order, and the rest fixed."""
    width: tl.constexpr = NUM_HEADS * HEAD_DIM
    attention_kernel(
        qkv_ptr, qkv_ptr + width, qkv_ptr + 2 * width, out_ptr, out_ptr,
        NUM_TOKENS * 3 * width, HEAD_DIM, NUM_TOKENS * width, HEAD_DIM,
        NUM_HEADS, num_items, SCALE_LOG2, OUT_SCALE, 3 * width, width, NUM_TOKENS, HEAD_DIM,
        ROWS, FULL_BLOCKS, TAIL_ROWS, TILE, FULL_TILES, TAIL_A, TAIL_B, D0, D1, False,
    )  # fmt: skip


def launch_attention(
    q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor | None,
    *, out_strides: tuple[int, int, int], logit_scale: float, out_scale: float = 1.0,
) -> None:  # fmt: skip
    """Write attention into `out`, and its log-sum-exp into `lse`.

    Args:
        q: (B, H, N, D); values of a token next to each other, other strides any.
        k: As `q`, of equal strides.
        v: As `q`, of equal strides.
        out: float16, bfloat16, float32 or int8. A whole tensor, no view: torch.compile then
            knows what is written.
        lse: (B, H, N) float32, contiguous; None keeps none.
        out_strides: Of the output's (B, H, N) in `out`.
        logit_scale: Multiplies q k^T.
        out_scale: Multiplies the output before it is stored.
    """
    batch, num_heads, num_tokens, head_dim = q.shape
    tiles = forward_tiles(
        num_tokens, head_dim, itemsize=q.element_size(), capability=capability_of(q),
        num_items=batch * num_heads if isinstance(batch, int) else 0,  # a guess fixes no batch
    )  # fmt: skip
    grid = (tiles.blocks, program_count(q, batch * num_heads, tiles.blocks))
    launchable(attention_kernel)[grid](
        q, k, v, out, out if lse is None else lse,
        q.stride(0), q.stride(1), out_strides[0], out_strides[1],
        num_heads, batch * num_heads, logit_scale * LOG2_E, out_scale,
        STRIDE_N=q.stride(2), STRIDE_ON=out_strides[2],
        NUM_TOKENS=num_tokens, HEAD_DIM=head_dim,
        HAS_LSE=lse is not None,
        num_warps=tiles.num_warps, num_stages=tiles.num_stages, **tiles.constants(),
    )  # fmt: skip


def capability_of(q: Tensor) -> int:
    """Compute capability of the GPU that Triton compiles for, as 87, which also stands for none."""
    if not q.is_cuda:
        return 87
    target = triton.runtime.driver.active.get_current_target()
    return int(target.arch) if target.backend == "cuda" else 87  # ROCm's are names


def launchable(kernel: Any) -> Any:
    """A kernel as an op launches it; the interpreter's functions are not to be wrapped."""
    return wrap_triton(kernel) if isinstance(kernel, triton.JITFunction) else kernel


def program_count(
    q: Tensor, num_items: int, blocks: int, *, per_sm: int | None = None
) -> int | torch.SymInt:
    """Programs along the heads: one each, or fewer that loop.

    Args:
        q: Whose GPU they run on.
        num_items: B * H.
        blocks: Programs that share one head.
        per_sm: Programs that a multiprocessor has at most; default: as many as there are heads,
            but 4 where one block is a whole head.
    """
    if per_sm is None and blocks == 1:
        per_sm = _PROGRAMS_PER_SM
    limit = MAX_GRID_Y
    if per_sm is not None and q.is_cuda:
        device = torch.cuda.get_device_properties(q.device)
        limit = max(1, per_sm * device.multi_processor_count // blocks)
    return torch.sym_min(num_items, limit)
