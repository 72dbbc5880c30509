"""Names of operators, alone and fused, to kinds of work."""

from __future__ import annotations

import pytest

from dimefm_edge.bench.operator_kinds import KINDS, kind_of, kind_of_all, kind_of_fused


def test_each_operator_is_of_one_kind():
    names = [name for kind in KINDS.values() for name in kind]
    assert len(names) == len(set(names))


@pytest.mark.parametrize(
    ("operator", "kind"),
    [
        ("MatMul", "gemm"), ("aten::addmm", "gemm"), ("FullyConnected", "gemm"),
        ("aten::native_layer_norm", "norm"), ("MVN", "norm"), ("aten::copy_", "movement"),
        ("MultiHeadAttention", "attention"), ("SomethingNew", "elementwise"),
    ],
)  # fmt: skip
def test_one_operator(operator, kind):
    assert kind_of(operator) == kind


@pytest.mark.parametrize(
    ("operators", "kind"),
    [
        (["Transpose", "MatMul", "Softmax", "MatMul"], "attention"),
        (["MatMul", "Add", "Gelu"], "gemm"), (["Add", "LayerNormalization"], "norm"),
        (["Add", "Mul"], "elementwise"), ([], "elementwise"),
    ],
)  # fmt: skip
def test_operators_that_run_as_one(operators, kind):
    assert kind_of_all(operators) == kind


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("graph_1_cpp_fused_add_native_layer_norm_transpose_view_7", "norm"),
        ("graph_1_cpp_fused_gelu_view_4", "activation"), ("__myl_MulAdd_0x1", "elementwise"),
        ("sm80_xmma_gemm_f16f16_f16f32", "gemm"), ("_gemm_mha_v2_0x9f3c", "attention"),
    ],
)  # fmt: skip
def test_kernels_that_a_compiler_named(name, kind):
    assert kind_of_fused(name) == kind
