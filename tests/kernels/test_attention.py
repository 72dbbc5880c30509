"""fused_attention against the reference: awkward shapes, a tolerance per dtype, gradients."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

torch = pytest.importorskip("torch")

from dimefm_kernels import (  # noqa: E402
    attention_qkv_reference,
    attention_reference,
    fused_attention,
    fused_attention_qkv,
    fused_attention_qkv_int8,
)
from dimefm_kernels.attention import split_qkv  # noqa: E402
from dimefm_kernels.reference import int8_error_bound  # noqa: E402

TOLERANCES = [(torch.float32, 1e-5), (torch.float16, 2e-3), (torch.bfloat16, 2e-2)]
SHAPES = [(1, 1, 1, 8), (2, 3, 50, 16), (1, 2, 65, 32), (1, 3, 197, 64), (2, 1, 7, 40)]


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


def test_packed_matches_unpacked_and_its_reference():
    qkv = torch.randn(3, 17, 3 * 2 * 24)
    q, k, v = split_qkv(qkv, 2)
    out = fused_attention_qkv(qkv, 2, scale=0.3)
    assert out.shape == (3, 17, 48)
    assert out.is_contiguous()
    expected = fused_attention(q, k, v, scale=0.3).transpose(1, 2).flatten(2)
    torch.testing.assert_close(out, expected)
    torch.testing.assert_close(out, attention_qkv_reference(qkv, 2, scale=0.3))


def test_packed_gradients_match_reference():
    fused = torch.randn(2, 19, 3 * 2 * 16).requires_grad_()
    plain = fused.detach().double().requires_grad_()
    fused_attention_qkv(fused, 2).sin().sum().backward()
    attention_qkv_reference(plain, 2).sin().sum().backward()
    torch.testing.assert_close(fused.grad.double(), plain.grad, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("out_scale", [None, 0.01])
def test_int8_is_within_the_rounding_of_probabilities(out_scale):
    steps = (0.02, 0.03, 0.01)
    qkv = torch.randint(-127, 128, (2, 50, 3 * 2 * 32), dtype=torch.int8)
    out = fused_attention_qkv_int8(qkv, 2, qkv_scales=steps, out_scale=out_scale)
    assert out.dtype == (torch.float16 if out_scale is None else torch.int8)
    exact = qkv.double().view(2, 50, 3, -1) * torch.tensor(steps).double().view(3, 1)
    expected = attention_qkv_reference(exact.flatten(2), 2)
    bound = int8_error_bound(qkv, 2, qkv_scales=steps, scale=32**-0.5)
    step = 1.0 if out_scale is None else out_scale
    rounding = expected.abs() * 2**-10 if out_scale is None else 0.501 * step
    assert ((out.double() * step - expected).abs() <= bound + rounding).all()


def test_int8_saturates():
    qkv = torch.full((1, 17, 3 * 32), 127, dtype=torch.int8)
    out = fused_attention_qkv_int8(qkv, 1, qkv_scales=(0.01, 0.01, 1.0), out_scale=0.5)
    assert (out == 127).all()


OPS = torch.ops.dimefm


@pytest.mark.parametrize(
    ("op", "arguments"),
    [
        (OPS.fused_attention, lambda: (*_qkv((1, 2, 5, 8), requires_grad=True), 0.25, True)),
        (OPS.fused_attention, lambda: (*split_qkv(torch.randn(2, 5, 48), 2), 0.25, False)),
        (OPS.fused_attention_qkv, lambda: (torch.randn(2, 5, 48).requires_grad_(), 2, 0.25, True)),
        (OPS.fused_attention_qkv, lambda: (torch.randn(2, 5, 48), 2, 0.25, False)),
        (OPS.fused_attention_qkv_int8,
         lambda: (torch.ones(2, 5, 48, dtype=torch.int8), 2, 0.01, 0.5, True)),
    ],
)  # fmt: skip
def test_opcheck(op, arguments):
    torch.library.opcheck(op.default, arguments())


def test_opcheck_of_the_backward_op():
    qkv, grad = torch.randn(2, 5, 48), torch.randn(2, 5, 16)
    out, lse = OPS.fused_attention_qkv(qkv, 2, 0.25, True)
    torch.library.opcheck(OPS.fused_attention_qkv_backward.default, (grad, qkv, out, lse, 2, 0.25))


def test_export_keeps_the_op_with_a_dynamic_batch():
    class Attend(torch.nn.Module):
        def forward(self, qkv):
            return fused_attention_qkv(qkv, 2)

    batch = torch.export.Dim("batch", min=1, max=64)
    args = (torch.randn(2, 5, 48),)
    program = torch.export.export(Attend(), args, dynamic_shapes=[{0: batch}])
    targets = [str(node.target) for node in program.graph.nodes]
    assert "dimefm.fused_attention_qkv.default" in targets
    qkv = torch.randn(7, 5, 48)
    torch.testing.assert_close(program.module()(qkv), attention_qkv_reference(qkv, 2))


def test_compiled_graph_launches_the_kernel_without_copies(monkeypatch):
    """Traced for a GPU that is not here: fake tensors, and a driver that knows its target."""
    triton = pytest.importorskip("triton")
    from functorch.compile import aot_function, make_boxed_func
    from torch._subclasses.fake_tensor import FakeTensorMode
    from triton.backends.compiler import GPUTarget

    driver = SimpleNamespace(get_current_target=lambda: GPUTarget("cuda", 87, 32))
    monkeypatch.setattr(triton.runtime.driver, "_active", driver)
    graphs = []

    def keep(graph, _):
        graphs.append(graph)
        return make_boxed_func(graph.forward)

    with FakeTensorMode(), torch.no_grad():
        qkv = torch.empty(4, 197, 3 * 6 * 64, device="cuda", dtype=torch.float16)
        out = aot_function(lambda x: fused_attention_qkv(x, 6), fw_compiler=keep, dynamic=True)(qkv)
    assert out.shape == (4, 197, 384)
    nodes = [node for node in graphs[0].graph.nodes if node.op == "call_function"]
    (launch,) = [node for node in nodes if "triton_kernel_wrapper" in str(node.target)]
    assert launch.kwargs["grid"] == [(4, 24, 1)]
    assert launch.kwargs["tensors_to_clone"] == ["out_ptr"]
    others = {str(node.target) for node in nodes if node is not launch}
    assert others == {
        "aten.view.default", "aten.permute.default", "aten.unbind.int", "aten.new_empty.default",
        "<built-in function getitem>",
    }  # fmt: skip


@pytest.mark.gpu
@pytest.mark.parametrize("num_tokens", [17, 50, 65, 197, 257, 577, 600])
@pytest.mark.parametrize("head_dim", [32, 64, 96, 128])
@pytest.mark.parametrize(("dtype", "atol"), TOLERANCES)
def test_triton_kernels_on_a_gpu(num_tokens, head_dim, dtype, atol):
    qkv = torch.randn(5, num_tokens, 3 * 3 * head_dim, device="cuda").to(dtype).requires_grad_()
    exact = qkv.detach().double().requires_grad_()
    out, expected = fused_attention_qkv(qkv, 3), attention_qkv_reference(exact, 3)
    torch.testing.assert_close(out.double(), expected, atol=atol, rtol=0)
    weights = torch.randn_like(expected)
    out.backward(weights.to(dtype))
    expected.backward(weights)
    torch.testing.assert_close(qkv.grad.double(), exact.grad, atol=3 * atol, rtol=1e-2)
    (again,) = torch.autograd.grad(fused_attention_qkv(qkv, 3), qkv, weights.to(dtype))
    assert torch.equal(again, qkv.grad)


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


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: fused_attention_qkv(torch.randn(2, 5, 47), 2), r"with 2 heads, got \(2, 5, 47\)"),
        (lambda: fused_attention_qkv(torch.randn(2, 5, 4, 12), 2), "qkv must be"),
        (lambda: fused_attention_qkv(torch.randn(2, 5, 48).double(), 2), "got torch.float64"),
        (lambda: fused_attention_qkv_int8(torch.randn(2, 5, 48), 2, qkv_scales=(1, 1, 1)),
         "must be int8, got torch.float32"),
        (lambda: fused_attention_qkv_int8(
            torch.ones(2, 5, 48, dtype=torch.int8), 2, qkv_scales=(1, 0, 1)),
         "scales must be positive"),
        (lambda: fused_attention_qkv_int8(
            torch.ones(2, 5, 48, dtype=torch.int8), 2, qkv_scales=(1, 1, 1), scale=-0.5),
         "scales must be positive, .* and -0.5"),
        (lambda: fused_attention_qkv_int8(
            torch.ones(2, 5, 48, dtype=torch.int8), 2, qkv_scales=(1, float("nan"), 1)),
         "scales must be positive"),
        (lambda: fused_attention_qkv(torch.randn(2, 5, 0), 2), "qkv must be"),
    ],
)  # fmt: skip
def test_wrong_packed_inputs_are_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_an_empty_batch_goes_back_as_it_came():
    qkv = torch.zeros(0, 17, 96, requires_grad=True)
    fused_attention_qkv(qkv, 2).sum().backward()
    assert qkv.grad.shape == qkv.shape
