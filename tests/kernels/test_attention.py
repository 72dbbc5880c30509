"""fused_attention against the reference: awkward shapes, a tolerance per dtype, gradients."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")

from dimefm_kernels import attention_reference, fused_attention  # noqa: E402
from dimefm_kernels.attention import MAX_TOKENS, fits_kernel, kernel_shared_bytes  # noqa: E402

TOLERANCES = [(torch.float32, 1e-5), (torch.float16, 2e-3), (torch.bfloat16, 2e-2)]
SHAPES = [(1, 1, 1, 8), (2, 3, 50, 16), (1, 2, 65, 32), (1, 3, 197, 64), (2, 1, 7, 40)]
KERNELS = Path(__file__).parents[2] / "kernels"

# The interpreter must be chosen before triton is imported: hence a process of its own.
INTERPRETED = """
import torch
from dimefm_kernels.attention import attention_reference
from dimefm_kernels._attention_triton import attention_forward

torch.manual_seed(0)
worst = 0.0
for shape in [(1, 1, 1, 8), (2, 2, 17, 16), (1, 2, 50, 40), (1, 1, 197, 64), (1, 1, 577, 64)]:
    # (B, N, 3, H, D), as a ViT's qkv projection leaves it: not contiguous.
    batch, heads, tokens, dim = shape
    qkv = torch.randn(batch, tokens, 3, heads, dim).permute(2, 0, 3, 1, 4)
    out = attention_forward(*qkv.unbind(0), 0.7 * dim**-0.5)
    ref = attention_reference(*qkv.unbind(0), scale=0.7 * dim**-0.5)
    assert out.shape == ref.shape and out.is_contiguous()
    assert torch.isfinite(out).all()
    worst = max(worst, (out - ref).abs().max().item())
half = [torch.randn(1, 2, 33, 32).half() for _ in range(3)]
worst_half = (attention_forward(*half, 1.0).float() - attention_reference(*half, scale=1.0).float())
print(worst, worst_half.abs().max().item())
"""

COMPILED = """
import sys
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from dimefm_kernels._attention_triton import _attention_kernel as kernel
from dimefm_kernels.attention import block_sizes

dtype, num_tokens, capability = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
kinds = {name: "i32" for name in kernel.arg_names}
kinds |= {name: "*" + dtype for name in kinds if name.endswith("_ptr")}
kinds |= {name: "constexpr" for name in kinds if name.isupper()} | {"scale_log2": "fp32"}
block_m, block_n, block_d = block_sizes(num_tokens, 64)
sizes = {"BLOCK_M": block_m, "BLOCK_N": block_n, "BLOCK_D": block_d, "PRECISION": "ieee"}
source = ASTSource(fn=kernel, signature=kinds, constexprs=sizes)
options = {"num_warps": 4 if block_n <= 256 else 8}
built = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
print(built.metadata.shared, "cubin" in built.asm)
"""


def _qkv(shape, dtype=torch.float32, *, requires_grad=False):
    generator = torch.Generator().manual_seed(sum(shape))
    return [
        torch.randn(shape, generator=generator).to(dtype).requires_grad_(requires_grad)
        for _ in range(3)
    ]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("dtype", "atol"), TOLERANCES)
def test_fused_attention_matches_reference(shape, dtype, atol):
    q, k, v = _qkv(shape, dtype)
    out = fused_attention(q, k, v)
    assert out.dtype == dtype
    assert out.is_contiguous()
    torch.testing.assert_close(out, attention_reference(q, k, v), atol=atol, rtol=0)


def test_reference_is_the_formula_in_float64():
    q, k, v = _qkv((2, 2, 9, 8))
    logits = torch.einsum("bhnd,bhmd->bhnm", q.double(), k.double()) * 0.3
    weights = logits.exp() / logits.exp().sum(-1, keepdim=True)
    expected = torch.einsum("bhnm,bhmd->bhnd", weights, v.double())
    out = attention_reference(q, k, v, scale=0.3).double()
    torch.testing.assert_close(out, expected, atol=1e-6, rtol=0)


@pytest.mark.parametrize("scale", [None, 0.05])
def test_gradients_match_reference(scale):
    fused, plain = (
        _qkv((2, 2, 19, 16), requires_grad=True),
        _qkv((2, 2, 19, 16), requires_grad=True),
    )
    weights = torch.randn(2, 2, 19, 16)
    (fused_attention(*fused, scale=scale) * weights).sum().backward()
    (attention_reference(*plain, scale=scale) * weights).sum().backward()
    for a, b in zip(fused, plain, strict=True):
        torch.testing.assert_close(a.grad, b.grad, atol=1e-5, rtol=1e-4)


def test_opcheck():
    op = torch.ops.dimefm.fused_attention.default
    torch.library.opcheck(op, (*_qkv((1, 2, 5, 8), requires_grad=True), 0.25))
    strided = torch.randn(2, 5, 3, 2, 8).permute(2, 0, 3, 1, 4).unbind(0)
    torch.library.opcheck(op, (*strided, 0.25))


def test_export_keeps_the_op_with_a_dynamic_batch():
    class Attend(torch.nn.Module):
        def forward(self, q, k, v):
            return fused_attention(q, k, v)

    batch = torch.export.Dim("batch", min=1, max=64)
    args = tuple(_qkv((2, 2, 5, 8)))
    program = torch.export.export(Attend(), args, dynamic_shapes=[{0: batch}] * 3)
    targets = [str(node.target) for node in program.graph.nodes]
    assert any("dimefm.fused_attention" in target for target in targets)
    q, k, v = _qkv((7, 2, 5, 8))
    torch.testing.assert_close(program.module()(q, k, v), attention_reference(q, k, v))


def test_triton_kernel_under_the_interpreter():
    pytest.importorskip("triton")
    env = {
        **os.environ,
        "TRITON_INTERPRET": "1",
        "PYTHONPATH": str(KERNELS),
        "OMP_NUM_THREADS": "1",
    }
    done = subprocess.run(
        [sys.executable, "-c", INTERPRETED], env=env, capture_output=True, text=True, timeout=240
    )
    assert done.returncode == 0, done.stderr[-2000:]
    worst, worst_half = map(float, done.stdout.split())
    assert worst < 1e-5
    assert worst_half < 2e-3


@pytest.mark.parametrize(
    ("dtype", "num_tokens", "capability"),
    [
        ("fp16", 65, 87),
        pytest.param("fp16", 577, 87, marks=pytest.mark.slow),
        pytest.param("fp32", 257, 90, marks=pytest.mark.slow),
        pytest.param("fp16", 197, 110, marks=pytest.mark.slow),
    ],
)
def test_triton_kernel_compiles_for_a_device_that_is_not_here(
    dtype, num_tokens, capability, tmp_path
):
    """The interpreter accepts what the compiler refuses: annotations, for one."""
    pytest.importorskip("triton")
    env = {**os.environ, "PYTHONPATH": str(KERNELS), "TRITON_CACHE_DIR": str(tmp_path)}
    env.pop("TRITON_INTERPRET", None)
    words = [dtype, str(num_tokens), str(capability)]
    done = subprocess.run(
        [sys.executable, "-c", COMPILED, *words],
        env=env,
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    shared, is_cubin = done.stdout.split()
    itemsize = 2 if dtype == "fp16" else 4
    assert is_cubin == "True"
    assert 0 < int(shared) <= kernel_shared_bytes(num_tokens, 64, itemsize)


@pytest.mark.gpu
@pytest.mark.parametrize("shape", [*SHAPES, (4, 6, 577, 64), (2, 3, 600, 64)])
@pytest.mark.parametrize(("dtype", "atol"), TOLERANCES)
def test_triton_kernel_on_a_gpu(shape, dtype, atol):
    q, k, v = (x.cuda() for x in _qkv(shape, dtype))
    torch.testing.assert_close(
        fused_attention(q, k, v), attention_reference(q, k, v), atol=atol, rtol=0
    )


def test_sizes_of_the_kernel():
    orin = 163 * 1024
    half, single = (torch.empty(1, 1, MAX_TOKENS, 64, dtype=d) for d in (torch.half, torch.float))
    assert fits_kernel(half, shared_bytes=orin)
    assert not fits_kernel(single, shared_bytes=orin)
    assert fits_kernel(single[:, :, :512], shared_bytes=orin)
    assert not fits_kernel(torch.empty(1, 1, MAX_TOKENS + 1, 16).half(), shared_bytes=orin)
    assert not fits_kernel(torch.empty(1, 1, 50, 129).half(), shared_bytes=orin)
    assert not fits_kernel(torch.empty(0, 1, 50, 64).half(), shared_bytes=orin)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda q, k, v: (q[0], k, v), r"must all be \(B, num_heads, N, head_dim\)"),
        (lambda q, k, v: (q, k[:, :, :3], v), r"got \(1, 2, 5, 8\), \(1, 2, 3, 8\)"),
        (lambda q, k, v: (q, k.half(), v), "share one dtype"),
        (lambda q, k, v: (q.double(), k.double(), v.double()), "got torch.float64"),
    ],
)
def test_wrong_inputs_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        fused_attention(*change(*_qkv((1, 2, 5, 8))))
