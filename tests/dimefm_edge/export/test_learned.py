"""Which product of a graph has which learned ranges: told by its weight."""

from __future__ import annotations

import numpy as np
import pytest

from dimefm_edge.errors import ExportError
from dimefm_edge.export.calibration import Range
from dimefm_edge.export.learned import LearnedProduct, match_products

RNG = np.random.default_rng(0)
ONE, TWO = (RNG.normal(size=(4, 3)).astype(np.float32) for _ in range(2))


def product(name: str, weight: np.ndarray | None) -> LearnedProduct:
    return LearnedProduct(name, weight, (Range(-1, 1),), None)


def test_products_are_known_by_their_weights_whatever_the_order():
    learned = [product("one", ONE), product("two", TWO)]
    found = match_products([TWO, np.asfortranarray(ONE)], learned)
    assert [p.name for p in found] == ["two", "one"]


def test_equal_weights_and_none_go_by_order():
    learned = [product(name, weight) for name, weight in
               (("a", ONE), ("q k", None), ("b", ONE), ("p v", None))]  # fmt: skip
    found = match_products([ONE, None, ONE, None], learned)
    assert [p.name for p in found] == ["a", "q k", "b", "p v"]


def test_what_was_not_trained_stays_float():
    assert match_products([ONE, TWO], [product("one", ONE)])[1] is None


def test_a_lost_product_is_named():
    learned = [product("one", ONE), product("trunk.fc", TWO)]
    with pytest.raises(ExportError, match=r"lacks 1 of 2 products .* int8: trunk\.fc") as said:
        match_products([ONE, ONE + np.float32(1e-7)], learned)
    assert "--precision int8" in said.value.hint
