"""What of operators costs time, counted by hand."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dimefm_edge.latency.operators import (
    COST_NAMES,
    COSTS,
    PRIORS,
    RATES,
    Operator,
    attention,
    convolution,
    cost_vector,
    product,
    total_gmacs,
    total_params_m,
)


def counts(*ops):
    return {k: v for k, v in zip(COST_NAMES, cost_vector(ops), strict=True) if v}


def test_names_rates_and_priors_fit_together():
    assert len(set(COST_NAMES)) == len(COSTS) == len(PRIORS)
    assert {cost.rate for cost in COSTS} == set(RATES)
    assert not set(RATES) & set(COST_NAMES)  # published.json has both in one table


def test_convolutions_by_hand():
    dense = convolution("c", (16, 3, 3, 3), 1, read=300.0, written=(1, 16, 10, 10))
    assert (dense.kind, dense.macs) == ("conv", 1600 * 27)
    assert dense.padded_macs == 100 * 32 * 32 * 9
    assert convolution("c", (8, 1, 5, 5), 8, read=1.0, written=(1, 8, 2, 2)).kind == "depthwise"
    grouped = convolution("c", (64, 16, 3, 3), 4, read=1.0, written=(1, 64, 2, 2))
    assert (grouped.kind, grouped.macs) == ("grouped", 256 * 16 * 9)
    assert grouped.padded_macs == 256 / 16 * 32 * 32 * 9
    assert convolution("c", (8, 8, 1, 1), 1, read=1.0, written=(1, 8, 2, 2)).is_pointwise
    assert counts(dense) == pytest.approx({
        "calls": 1, "kernels": 1, "macs_conv": 0.0432, "macs_padding": 0.9216 - 0.0432,
        "weights": 432e-6, "activations": 1900e-6,
    })  # fmt: skip


def test_an_attention_is_two_products_and_a_softmax():
    """Of 2 heads, 50 tokens that ask 20, 16 channels wide, values 40 wide."""
    whole = attention("a", (2, 50, 16), 20, 40, read=4e3, written=4e3)
    parts = (
        product("qk", 16, read=2e3, written=(2, 50, 20)),
        Operator("s", "softmax", read=2e3, written=2 * 50 * 20),
        product("av", 20, read=6e3, written=(2, 50, 40)),
    )
    assert whole.macs == parts[0].macs + parts[2].macs == 2 * 50 * 20 * (16 + 40)
    one, three = counts(whole), counts(*parts)
    for name in ("kernels_attention", "macs_attention", "activations_softmax"):
        assert one[name] == three[name]


def test_products_fill_up_tiles():
    """EfficientViT's: 2 heads of (16, 196) by (196, 17), whose rows are 32 of a tile."""
    op = product("p", 196, read=1.0, written=(2, 16, 17))
    assert (op.kind, op.macs) == ("matmul", 2 * 16 * 196 * 17)
    assert op.padded_macs == 2 * 32 * 224 * 32
    assert op.padded_moved == 2 * (16 * 224 + 196 * 32 + 16 * 32)
    assert counts(op) == pytest.approx({
        "calls": 1, "kernels_attention": 1, "macs_attention": op.padded_macs / 1e6,
        "activations_attention": op.padded_moved / 1e6,
    })  # fmt: skip
    vector = product("v", 64, read=1.0, written=(64,))
    assert (vector.macs, vector.padded_macs) == (64 * 64, 32 * 64 * 64)
    for shape, macs in (((), 64), ((0, 5), 0), ((2, 0, 5), 0)):  # of two vectors; of nothing
        assert product("n", 64, read=1.0, written=shape).macs == macs
    whole = attention("a", (64, 128, 64), 128, 64, read=1.0, written=1.0)
    assert whole.padded_macs == whole.macs  # nothing to fill up
    assert whole.padded_moved == 64 * (4 * 128 * 64 + 4 * 128 * 128)


def test_only_what_exceeds_the_chip_is_spilled():
    small, large = (Operator("x", "elementwise", written=n) for n in (1e6, 3e6))
    assert "activations_spilled" not in counts(small)
    assert counts(large)["activations_spilled"] == pytest.approx(2.0)


KINDS = st.sampled_from([
    "conv", "grouped", "depthwise", "linear", "matmul", "attention", "softmax", "norm",
    "batch_norm", "gelu", "activation", "elementwise", "pool", "mean", "move", "permute",
])  # fmt: skip
SIZES = st.floats(0, 1e9)


@given(st.lists(st.builds(Operator, st.just("x"), KINDS, macs=SIZES, read=SIZES, written=SIZES)))
def test_costs_add_up(ops):
    whole = cost_vector(ops)
    parts = sum((cost_vector([op]) for op in ops), np.zeros(len(COSTS)))
    parts[COST_NAMES.index("calls")] = 1.0
    assert whole == pytest.approx(parts)
    assert total_gmacs(ops) == pytest.approx(sum(op.macs for op in ops) / 1e9)
    assert total_params_m(ops) == 0
