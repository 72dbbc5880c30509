"""benchmarks/bench_graph_floor.py: floors from shapes, and what is left of a ratio."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
GIGA = 1e9


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The script on a machine that copies 1 GB a second."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    module = importlib.import_module("bench_graph_floor")
    monkeypatch.setattr(module, "copy_rate", lambda total: GIGA)
    return module


def node(inputs: list[list[int]], out: list[int], size: int = 0) -> dict[str, Any]:
    return {
        "input_type_shape": [{"float": shape} for shape in inputs],
        "output_type_shape": [{"float": out}],
        "activation_size": str(size), "parameter_size": "0", "output_size": "0",
    }  # fmt: skip


def test_products(script: Any) -> None:
    assert script.product_flop("MatMul", node([[1, 197, 384], [384, 64]], [1, 197, 64])) == (
        2 * 197 * 384 * 64
    )
    conv = node([[1, 3, 224, 224], [384, 3, 16, 16]], [1, 384, 14, 14])
    assert script.product_flop("FusedConv", conv) == 2 * 384 * 196 * 768


def test_a_floor_is_the_longer_of_moving_and_computing(script: Any) -> None:
    rates = script.Rates(product_flop=100 * GIGA, exp=2 * GIGA, erf=GIGA)
    add = node([[1, 10, 100], [100]], [1, 10, 100], size=8400)
    assert script.floor_s("Add", add, rates, 6) == pytest.approx(8400 / GIGA)
    assert script.floor_s("Reshape", add, rates, 6) == 0
    gelu = node([[1, 10, 100]], [1, 10, 100], size=10)
    assert script.floor_s("Gelu", gelu, rates, 6) == pytest.approx(1000 * (1 + 4 / 100) / GIGA)
    attention = node([[2, 5, 64], [2, 7, 64], [2, 7, 64]], [2, 5, 64], size=10)
    scores = 2 * 4 * 5 * 7  # images, heads, queries, keys
    wanted = scores * (4 * 16 + 4) / (100 * GIGA) + scores / (2 * GIGA)
    assert script.floor_s("MultiHeadAttention", attention, rates, 4) == pytest.approx(wanted)


def test_what_is_left_of_a_ratio(script: Any) -> None:
    rates = script.Rates(product_flop=100 * GIGA, exp=GIGA, erf=GIGA)
    nodes = [
        ("MatMul", 80.0, node([[1, 100, 200], [200, 100]], [1, 100, 100])),  # 4 MFLOP: 40 us
        ("Add", 15.0, node([[1, 100, 25]], [1, 100, 25], size=10_000)),  # 10 us
        ("Shape", 5.0, node([[1]], [1])),
    ]
    found = script.with_ratios(script.summarise(nodes, rates, 1, 6), 1.1)
    assert found["product_share"] == pytest.approx(0.8)
    assert found["product_over_peak"] == pytest.approx(0.5)
    assert found["kinds"]["Add"] == pytest.approx({"share": 0.15, "floor_share": 0.1})
    assert found["ratio_others_at_floor"] == pytest.approx(1.1 / 0.9)
    assert found["ratio_others_free"] == pytest.approx(1.1 / 0.8)
    assert found["ratio_all_at_floor"] == pytest.approx(1.1 / 0.5)
    halved = script.summarise(nodes, rates, 2, 6)
    assert halved["others_floor_share"] == pytest.approx(0.05)
    assert halved["product_over_peak"] == pytest.approx(0.25)
