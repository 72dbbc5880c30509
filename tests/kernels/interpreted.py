"""Run by test_attention_triton.py under TRITON_INTERPRET=1, which must be set before an import.

    python interpreted.py B,H,N,D,DTYPE ...

Prints JSON: per case, the largest errors against float64. Outputs start as NaN. CAPABILITY and
HOPPER_BUSY in the environment: the tiles of another GPU, and from how many programs on.
"""

from __future__ import annotations

import json
import os
import sys

import torch

from dimefm_kernels import _attention_triton
from dimefm_kernels import tiles as tile_sizes
from dimefm_kernels._attention_backward_triton import launch_attention_backward
from dimefm_kernels._attention_int8_triton import launch_attention_int8
from dimefm_kernels._attention_triton import launch_attention, packed_attention_kernel
from dimefm_kernels.attention import split_qkv
from dimefm_kernels.reference import attention_qkv_reference, int8_error_bound
from dimefm_kernels.tiles import forward_tiles, whole_key_tiles

LOG2_E = 1.4426950408889634
STEPS = (0.02, 0.03, 0.01)
_attention_triton.MAX_GRID_Y = 2  # programs, which then go through several heads
CAPABILITY = int(os.environ.get("CAPABILITY", "87"))
_attention_triton.capability_of = lambda _: CAPABILITY
tile_sizes.HOPPER_BUSY = int(os.environ.get("HOPPER_BUSY", tile_sizes.HOPPER_BUSY))


def float_errors(batch: int, heads: int, tokens: int, dim: int, dtype: torch.dtype) -> dict:
    """Forward, log-sum-exp, backward and the packed entry; a scale that is not the default."""
    scale, strides = 0.7 * dim**-0.5, (tokens * heads * dim, dim, heads * dim)
    qkv = torch.randn(batch, tokens, 3 * heads * dim).to(dtype)
    exact = qkv.double().requires_grad_()
    expected = attention_qkv_reference(exact, heads, scale=scale)
    grad = torch.randn_like(expected).to(dtype)
    expected.backward(grad.double())
    q, k, v = split_qkv(qkv, heads)
    out = torch.full_like(grad, torch.nan)
    lse = torch.full((batch, heads, tokens), torch.nan)
    launch_attention(q, k, v, out, lse, out_strides=strides, logit_scale=scale)
    logits = (q.double() @ k.double().transpose(-2, -1)) * scale
    grads = torch.full_like(qkv, torch.nan)
    launch_attention_backward(
        grad, q, k, v, out, lse, grads,
        out_strides=strides, part_stride=heads * dim, logit_scale=scale,
    )  # fmt: skip
    packed = torch.full_like(grad, torch.nan)
    tiles = forward_tiles(
        tokens, dim, itemsize=qkv.element_size(), capability=CAPABILITY, num_items=batch * heads
    )
    packed_attention_kernel[(tiles.blocks, 2)](
        qkv, batch * heads, packed, NUM_HEADS=heads, SCALE_LOG2=scale * LOG2_E, OUT_SCALE=1.0,
        NUM_TOKENS=tokens, HEAD_DIM=dim, **tiles.constants(),
    )  # fmt: skip
    return {
        "out": worst(out - expected),
        "packed": worst(packed - out),
        "lse": worst(lse - logits.logsumexp(dim=-1)),
        "grad": worst(grads - exact.grad) / worst(exact.grad),
    }


def int8_errors(batch: int, heads: int, tokens: int, dim: int) -> dict:
    """Half and int8 outputs, as a share of what the rounding of probabilities allows."""
    strides = (tokens * heads * dim, dim, heads * dim)
    qkv = torch.randint(-127, 128, (batch, tokens, 3 * heads * dim), dtype=torch.int8)
    steps = torch.tensor(STEPS, dtype=torch.float64).view(3, 1)
    exact = (qkv.double().view(batch, tokens, 3, -1) * steps).flatten(2)
    expected = attention_qkv_reference(exact, heads)
    bound = int8_error_bound(qkv, heads, qkv_scales=STEPS, scale=dim**-0.5)
    q, k, v = split_qkv(qkv, heads)
    logit_scale, out_step = dim**-0.5 * STEPS[0] * STEPS[1], expected.abs().max().item() / 100
    half = torch.full(expected.shape, torch.nan, dtype=torch.float16)
    whole = torch.full(expected.shape, -128, dtype=torch.int8)
    tiles = whole_key_tiles(tokens, dim, capability=CAPABILITY)
    for out, step in ((half, STEPS[2]), (whole, STEPS[2] / out_step)):
        settings = {"out_strides": strides, "logit_scale": logit_scale}
        if tiles is None:
            launch_attention(q, k, v, out, None, out_scale=step / 127, **settings)
        else:  # one value is not rounded to 1/127
            launch_attention_int8(q, k, v, out, tiles=tiles, out_scale=step, **settings)
            bound = torch.full_like(bound, 2e-3 * STEPS[2] * 127)
    rounding = expected.abs() * 2**-10
    return {
        "half": worst((half - expected).abs() / (bound + rounding)),
        "int8": worst((whole.double() * out_step - expected).abs() / (bound + 0.501 * out_step)),
    }


def worst(error: torch.Tensor) -> float:
    """The largest absolute value; NaN, which nothing is below, if there is one."""
    return error.abs().max().item()


def main() -> None:
    torch.manual_seed(0)
    found = {}
    for case in sys.argv[1:]:
        *shape, dtype = case.split(",")
        sizes = tuple(map(int, shape))
        found[case] = (
            int8_errors(*sizes) if dtype == "int8" else float_errors(*sizes, getattr(torch, dtype))
        )
    print(json.dumps(found))


if __name__ == "__main__":
    main()
