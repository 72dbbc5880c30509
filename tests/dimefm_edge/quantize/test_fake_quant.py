"""Fake quantisation rounds as export/int8.py does, and lets gradients through."""

from __future__ import annotations

import copy
from dataclasses import replace

import numpy as np
import pytest
import torch

from dimefm_edge.errors import ExportError
from dimefm_edge.export.calibration import PROBABILITIES, Histogram, Range
from dimefm_edge.export.int8 import _affine, _weight_scale
from dimefm_edge.export.quant_rules import QUANT_RULES
from dimefm_edge.quantize.fake_quant import ActivationFakeQuant, BiasFakeQuant, WeightFakeQuant

RULES = list(QUANT_RULES.values())


@pytest.mark.parametrize("rules", RULES, ids=lambda rules: rules.name)
@pytest.mark.parametrize("reach", [Range(-1.3, 2.7), Range(0.0, 4.0), Range(-3.0, 0.0),
                                   Range(0.0, 0.0)])  # fmt: skip
def test_scale_and_zero_point_are_the_exporters(rules, reach):
    part = ActivationFakeQuant(rules)
    part.set_range(reach.low, reach.high)
    scale, zero_point = part.calculate_qparams()
    wanted_scale, wanted_zero = _affine(reach, rules)
    assert float(scale) == pytest.approx(float(wanted_scale), rel=1e-6)
    assert int(zero_point) == int(wanted_zero)


@pytest.mark.parametrize("rules", [*RULES, replace(RULES[0], weight_bits=7)])
def test_weight_scales_are_the_exporters(rules):
    weight = torch.randn(5, 3, 2, 2, generator=torch.Generator().manual_seed(0))
    weight[2] = 0
    part = WeightFakeQuant(rules)
    rounded = part(weight)
    wanted = _weight_scale(weight.numpy(), 0 if rules.is_weight_per_channel else None, rules)
    wanted = np.broadcast_to(wanted, 5)
    np.testing.assert_allclose(part.calculate_qparams()[0].numpy(), wanted, rtol=1e-6)
    steps = rounded.numpy() / wanted[:, None, None, None]
    if rules.precision == "int8":
        np.testing.assert_allclose(steps, np.round(steps), atol=1e-4)
    else:
        exact = torch.from_numpy(steps)
        torch.testing.assert_close(exact, exact.to(torch.float8_e4m3fn).float())
    assert np.abs(steps).max() == pytest.approx(rules.weight_max)


@pytest.mark.parametrize("rules", RULES, ids=lambda rules: rules.name)
def test_gradients_pass_within_the_range_and_stop_outside(rules):
    part = ActivationFakeQuant(rules)
    part.set_range(-1.0, 1.0)
    x = torch.tensor([-2.0, 0.3, 2.0], requires_grad=True)
    part(x).sum().backward()
    assert x.grad.tolist() == [0.0, 1.0, 0.0]


def test_ranges_are_averaged_follow_and_freeze():
    part = ActivationFakeQuant(RULES[0]).train()
    part.is_observing = True
    part(torch.tensor([-1.0, 2.0]))
    part(torch.tensor([-3.0, 4.0]))
    assert part.range == Range(-2.0, 3.0)
    for _ in range(100):
        part(torch.tensor([-3.0, 4.0]))
    assert part.range.high == pytest.approx(4.0, abs=0.01)
    part.is_observing = False
    part(torch.tensor([9.0]))
    part.is_observing = True
    part.eval()
    part(torch.tensor([9.0]))
    assert part.range.high == pytest.approx(4.0, abs=0.01)


def test_what_a_softmax_answers_is_known():
    part = ActivationFakeQuant(QUANT_RULES["tensorrt"], PROBABILITIES).train()
    part.is_observing = True
    part(torch.tensor([0.1, 0.2]))
    part.set_range(0.0, 5.0)
    assert part.range == PROBABILITIES


def test_a_value_that_is_not_finite_is_named():
    part = ActivationFakeQuant(RULES[0])
    part.histogram = Histogram()
    with pytest.raises(ExportError, match="not finite"):
        part(torch.tensor([1.0, float("inf")]))


def test_a_bias_is_whole_steps_of_its_input_and_weight():
    rules = QUANT_RULES["onnxruntime-x86"]
    source, weight = ActivationFakeQuant(rules), WeightFakeQuant(rules)
    source.set_range(0.0, 2.55)
    weight(torch.tensor([[1.27], [-0.254]]))
    step = torch.tensor([0.01 * 0.01, 0.01 * 0.002])
    bias = torch.tensor([0.12344, -0.00501], requires_grad=True)
    part = BiasFakeQuant(source, weight)
    rounded = part(bias)
    torch.testing.assert_close(rounded / step, torch.tensor([1234.0, -250.0]), rtol=1e-5, atol=0.0)
    rounded.sum().backward()
    assert torch.equal(bias.grad, torch.ones(2))
    weight.is_rounding = False
    assert part(bias) is bias
    assert list(part.state_dict()) == list(part.parameters()) == []


def test_a_copy_of_a_bias_has_the_copied_steps():
    rules = QUANT_RULES["onnxruntime-x86"]
    whole = torch.nn.ModuleList([ActivationFakeQuant(rules), WeightFakeQuant(rules)])
    whole.append(BiasFakeQuant(whole[0], whole[1]))
    other = copy.deepcopy(whole)
    assert other[2]._rounded == (other[0], other[1])


def test_a_dead_channels_bias_stays_a_number():
    rules = QUANT_RULES["onnxruntime-x86"]
    source, weight = ActivationFakeQuant(rules), WeightFakeQuant(rules)
    source.set_range(0.0, 1e-3)
    weight(torch.tensor([[1e-38], [0.0], [1e-40]]))
    part = BiasFakeQuant(source, weight)
    bias = torch.tensor([0.5, 0.0, -2.0])
    torch.testing.assert_close(part(bias), bias)
