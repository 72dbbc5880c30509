"""Rules are data: each has its source, and those that a CPU asks for exist."""

from __future__ import annotations

from dataclasses import replace

import pytest

from dimefm_edge.export.quant_rules import QUANT_RULES
from dimefm_edge.targets import cpu


def test_the_rules_of_every_cpu_are_there():
    assert {cpu.ARM_RULES, cpu.VNNI_RULES, cpu.AVX2_RULES} <= set(QUANT_RULES)
    assert all(name == rules.name for name, rules in QUANT_RULES.items())


@pytest.mark.parametrize("rules", QUANT_RULES.values(), ids=lambda rules: rules.name)
def test_rules_are_whole(rules):
    assert rules.sources
    assert all(rules.sources)
    assert not (rules.is_symmetric and rules.activation == "uint8")
    assert set(rules.output_op_types) <= set(rules.op_types)
    assert 0.9 < rules.min_cosine < 1


@pytest.mark.parametrize(("bits", "largest"), [(8, 127), (7, 63)])
def test_pairs_of_7_bit_products_fit_16_bits(bits, largest):
    rules = replace(QUANT_RULES["onnxruntime-x86"], weight_bits=bits)
    assert rules.weight_max == largest
    assert (2 * 255 * largest < 2**15) == (bits == 7)
