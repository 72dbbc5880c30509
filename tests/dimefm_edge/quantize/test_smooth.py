"""Smoothing changes no answer and evens out what integers have to reach."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from dimefm_edge.quantize.qat import qat_prepare
from dimefm_edge.quantize.smooth import smooth
from tests.dimefm_edge.quantize.int8_students import (
    AVX2,
    SIDE,
    TENSORRT,
    cosines,
    deployed,
    images,
    student,
)


class Pair(nn.Module):
    """Two convolutions and what stands between them."""

    def __init__(self, between: nn.Module, groups: int = 1) -> None:
        super().__init__()
        self.first, self.between = nn.Conv2d(3, 8, 3), between
        self.second, self.head = nn.Conv2d(8, 16, 3, groups=groups), nn.Linear(16, 4)

    def forward(self, image):
        x = self.second(self.between(self.first(image)))
        return nn.functional.normalize(self.head(x.mean((2, 3))), dim=-1)


@pytest.mark.parametrize("groups", [1, 2, 8])
@pytest.mark.parametrize(
    ("between", "count"),
    [(nn.Identity(), 1), (nn.ReLU(), 1), (nn.LeakyReLU(), 1), (nn.MaxPool2d(2), 1),
     (nn.Sequential(nn.ReLU(), nn.AvgPool2d(2)), 1), (nn.GELU(), 0), (nn.SiLU(), 0),
     (nn.Hardswish(), 0), (nn.ReLU6(), 0), (nn.Sigmoid(), 0)],
    ids=lambda value: str(value).partition("(")[0],
)  # fmt: skip
def test_convolutions_are_evened_out_where_a_scale_passes_between(between, count, groups):
    torch.manual_seed(0)
    plain = Pair(between, groups).eval()
    with torch.no_grad():
        plain.first.weight *= 10 ** torch.linspace(-1, 1, 8).view(-1, 1, 1, 1)
        evened = copy.deepcopy(plain)
        assert smooth(evened, images(8)) == count
        torch.testing.assert_close(evened(images(8)), plain(images(8)), atol=1e-5, rtol=0)
        before, after = (
            module.between(module.first(images(8))).abs().amax((0, 2, 3))
            for module in (plain, evened)
        )
    seen = before > 0.01 * before.max()  # else hardly used, and left so
    spreads = [float((reach.max() / reach)[seen].max()) for reach in (before, after)]
    assert (spreads[1] < spreads[0] / 2) == bool(count)
    if count and groups == 8:  # a depthwise one takes all of it
        assert spreads[1] == pytest.approx(1, abs=1e-3)


def test_weights_that_are_read_twice_stay():
    plain = Pair(nn.ReLU())
    plain.first = plain.second = nn.Conv2d(3, 3, 3, padding=1)
    plain.head = nn.Linear(3, 4)
    assert smooth(plain.eval(), images(4)) == 0


@pytest.mark.parametrize(
    ("family", "least"), [("vit", 4), ("hybrid", 4), ("resnet", 6), ("mobilenet", 14)]
)
def test_answers_stay(family, least):
    evened = deployed(family)
    assert smooth(evened, images(16)) >= least
    with torch.no_grad():
        torch.testing.assert_close(evened(images(8)), student(family)(images(8)),
                                   atol=2e-5, rtol=0)  # fmt: skip


@pytest.mark.parametrize("family", ["resnet", "mobilenet"])
@pytest.mark.parametrize("rules_name", [AVX2, TENSORRT])
def test_spread_channels_cost_no_more_than_even_ones(family, rules_name):
    """The spread of channels that folding BatchNorm leaves: undone, whatever it is."""
    even = deployed(family)
    spread = copy.deepcopy(even)
    generator = torch.Generator().manual_seed(0)
    for first, second in _relu_pairs(family):
        weight = spread.get_submodule(first).weight
        scale = 10 ** (3 * torch.rand(weight.shape[0], generator=generator) - 1.5)
        with torch.no_grad():
            weight.mul_(scale.view(-1, 1, 1, 1))
            spread.get_submodule(first).bias.mul_(scale)
            read = spread.get_submodule(second).weight  # (O, I, ...), depthwise (I, 1, ...)
            read.div_(scale.view((-1, 1, 1, 1) if read.shape[1] == 1 else (1, -1, 1, 1)))
    evened = copy.deepcopy(spread)
    smooth(evened, images(16))
    losses = []
    for module in (even, spread, evened):
        made = qat_prepare(module, image_size=SIDE, rules_name=rules_name)
        made.calibrate([images(32)], "minmax")
        made.eval()
        with torch.no_grad():
            losses.append(float((1 - cosines(made(images(32)), even(images(32)))).mean()))
    assert losses[1] > 3 * losses[0]
    assert losses[2] < 2 * losses[0]


def _relu_pairs(family: str) -> list[tuple[str, str]]:
    """Names of convolutions, and of the next ones behind a ReLU."""
    if family == "resnet":
        return [(f"trunk.layer{i}.0.conv1", f"trunk.layer{i}.0.conv2") for i in range(1, 5)]
    blocks = [f"trunk.blocks.1.{i}.conv_" for i in range(2)]
    return [(b + one, b + other) for b in blocks for one, other in (("pw", "dw"), ("dw", "pwl"))]


def test_an_outlier_channel_no_longer_costs_the_others_their_accuracy():
    # What int8 suffers from in ViTs: one channel behind a LayerNorm reaches 60 times as far.
    plain = deployed("vit")
    with torch.no_grad():
        for name, value in plain.named_parameters():
            if "norm2" in name:
                value[3] *= 60
            if name.endswith("fc1.weight"):
                value[:, 3] /= 60
    evened = copy.deepcopy(plain)
    smooth(evened, images(16))
    losses = []
    for module in (plain, evened):
        made = qat_prepare(module, image_size=SIDE, rules_name=AVX2)
        made.calibrate([images(32)], "minmax")
        made.eval()
        with torch.no_grad():
            losses.append(float((1 - cosines(made(images(32)), plain(images(32)))).mean()))
    assert losses[1] < losses[0] / 4
