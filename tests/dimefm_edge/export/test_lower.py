"""Attention in each form: same numbers, one node or one pattern, nothing else beside it."""

from __future__ import annotations

from collections import Counter

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from dimefm_edge.errors import ExportError, UnknownNameError
from dimefm_edge.export.attention_patterns import find_attentions
from dimefm_edge.export.lower import ATTENTION_FORMS
from dimefm_edge.export.simplify import TracedAttention
from dimefm_edge.export.trace import trace

FORMS = [
    ("packed", 20), ("decomposed", 18), ("decomposed", 20), ("MultiHeadAttention", 20),
    ("Attention", 23),
]  # fmt: skip


class Attend(nn.Module):
    """Attention as libraries write it: packed or not, scaled, masked or causal."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.qkv = nn.Linear(32, 96)
        self.register_buffer("mask", torch.randn(9, 9))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        batch, tokens, _ = x.shape
        packed = self.qkv(x).reshape(batch, tokens, 3, 2, 16).permute(2, 0, 3, 1, 4)
        q, k, v = packed.unbind(0)
        if self.kind == "pooled":
            q = q[:, :, :1]
        mixed = F.scaled_dot_product_attention(
            q, k, v,
            attn_mask=self.mask if self.kind == "masked" else None,
            is_causal=self.kind == "causal",
            scale=0.3 if self.kind == "scaled" else None,
        )  # fmt: skip
        if self.kind == "heads":
            return mixed
        return mixed.transpose(1, 2).flatten(2)


def traced(module: nn.Module, form: str, opset: int, **changes: bool) -> onnx.ModelProto:
    model = trace(
        module, torch.randn(2, 9, 32), input_name="x", output_name="y", opset=opset,
        attention=form, **changes,
    )  # fmt: skip
    onnx.checker.check_model(model, full_check=True)
    return model


@pytest.mark.parametrize("kind", ["plain", "scaled", "masked", "causal", "pooled", "heads"])
@pytest.mark.parametrize(("form", "opset"), FORMS)
def test_each_form_is_the_formula(kind: str, form: str, opset: int) -> None:
    torch.manual_seed(0)
    module = Attend(kind).eval()
    model = traced(module, form, opset)
    (match,) = find_attentions(model)
    ops = Counter(node.op_type for node in model.graph.node)
    assert (ops["Softmax"] if form in ("packed", "decomposed") else ops[form]) == 1
    assert (match.num_heads, match.num_tokens, match.head_dim) == (2, 9, 16)
    assert not {"Shape", "Expand", "Where", "Cast", "Identity"} & set(ops)
    assert {o.domain for o in model.opset_import} <= {"", "com.microsoft"}
    session = onnxruntime.InferenceSession(
        model.SerializeToString(), providers=["CPUExecutionProvider"]
    )
    for size in (1, 2, 5):
        x = torch.randn(size, 9, 32)
        (found,) = session.run(None, {"x": x.numpy()})
        np.testing.assert_allclose(found, module(x).detach().numpy(), atol=2e-6)


class Projected(nn.Module):
    """Attention with three projections, as simplify.py makes every one."""

    def __init__(self, *, has_other_keys: bool = False, is_causal: bool = False) -> None:
        super().__init__()
        q, k, v, out = (nn.Linear(32, 32) for _ in range(4))
        self.attend = TracedAttention(q, k, v, out, num_heads=2)
        self.has_other_keys = has_other_keys
        self.register_buffer("mask", torch.full((9, 9), -9.0).triu(1) if is_causal else None)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        keys = x.flip(-1) if self.has_other_keys else x
        return self.attend(x, keys, keys, self.mask)


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("has_other_keys", [False, True])
def test_packed_is_one_projection_where_all_three_read_the_same(
    has_other_keys: bool, is_causal: bool
) -> None:
    torch.manual_seed(0)
    module = Projected(has_other_keys=has_other_keys, is_causal=is_causal).eval()
    model = traced(module, "packed", 20)
    (match,) = find_attentions(model)
    assert (match.num_heads, match.num_tokens, match.head_dim) == (2, 9, 16)
    ops = Counter(node.op_type for node in model.graph.node)
    # Beside the attention's own two products and the one behind it:
    assert ops["MatMul"] - 3 == (3 if has_other_keys else 1)
    assert ops["Split"] == (0 if has_other_keys else 1)
    session = onnxruntime.InferenceSession(
        model.SerializeToString(), providers=["CPUExecutionProvider"]
    )
    for size in (1, 3):
        x = torch.randn(size, 9, 32)
        (found,) = session.run(None, {"x": x.numpy()})
        np.testing.assert_allclose(found, module(x).detach().numpy(), atol=2e-6)


@pytest.mark.parametrize("odd", ["scalar bias", "no bias", "wider values"])
def test_packed_leaves_projections_that_are_unlike(odd: str) -> None:
    torch.manual_seed(0)

    class Unlike(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            width = 64 if odd == "wider values" else 32
            self.q, self.k = nn.Linear(32, 32), nn.Linear(32, 32, bias=odd != "no bias")
            self.v = nn.Linear(32, width)
            self.shift = nn.Parameter(torch.randn(1 if odd == "scalar bias" else 32))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            q = F.linear(x, self.q.weight) + self.shift
            q, k, v = (y.unflatten(2, (2, -1)).transpose(1, 2) for y in (q, self.k(x), self.v(x)))
            return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)

    module = Unlike().eval()
    model = traced(module, "packed", 20)
    assert "Split" not in {node.op_type for node in model.graph.node}
    x = torch.randn(3, 9, 32)
    session = onnxruntime.InferenceSession(
        model.SerializeToString(), providers=["CPUExecutionProvider"]
    )
    (found,) = session.run(None, {"x": x.numpy()})
    np.testing.assert_allclose(found, module(x).detach().numpy(), atol=2e-6)


def test_a_fixed_batch_has_no_open_dimension() -> None:
    model = traced(Attend("plain").eval(), "decomposed", 20, has_dynamic_batch=False)
    sides = [d.dim_value for d in model.graph.input[0].type.tensor_type.shape.dim]
    assert sides == [2, 9, 32]


def test_unknown_forms_and_modules_that_cannot_be_traced() -> None:
    with pytest.raises(UnknownNameError, match="unknown attention form 'flash'"):
        traced(Attend("plain"), "flash", 20)
    assert list(ATTENTION_FORMS) == [
        "packed", "decomposed", "MultiHeadAttention", "Attention", "plugin",
    ]  # fmt: skip

    class Baked(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x if x.mean() > 0 else -x

    with pytest.raises(ExportError, match=r"torch 2\S+ cannot export the model to ONNX: \S+"):
        traced(Baked(), "decomposed", 20)
