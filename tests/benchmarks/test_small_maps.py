"""Convolutions over small maps as products are those of PyTorch, gradients and copies too."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from benchmarks.small_maps import with_small_maps
from dimefm_edge.students import build_student, student_spec


@settings(max_examples=60, deadline=None)
@given(
    side=st.tuples(st.integers(1, 4), st.integers(1, 4)),
    kernel=st.integers(2, 5), stride=st.integers(1, 3), padding=st.integers(0, 2),
    dilation=st.integers(1, 2), bias=st.booleans(),
)  # fmt: skip
def test_as_a_convolution(side, kernel, stride, padding, dilation, bias):
    if padding > kernel // 2 or min(side) + 2 * padding < dilation * (kernel - 1) + 1:
        return
    conv = nn.Conv2d(3, 4, kernel, stride, padding, dilation, bias=bias).double()
    images = torch.randn(2, 3, *side, dtype=torch.float64, requires_grad=True)
    found = []
    for _ in range(2):
        conv.zero_grad()
        images.grad = None
        out = conv(images)
        (out * torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view_as(out)).sum().backward()
        found.append([out.detach(), images.grad, *(p.grad for p in conv.parameters())])
        with_small_maps(conv)
    for plain, dense in zip(*found, strict=True):
        torch.testing.assert_close(dense, plain)


def test_a_student_learns_the_same():
    student = build_student(student_spec("timm:resnet10t", image_size=32, embed_dim=8)).train()
    other = with_small_maps(copy.deepcopy(student))
    images = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    for module in (student, other):
        module(images).square().sum().backward()
    for plain, dense in zip(student.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(dense.grad, plain.grad, rtol=1e-3, atol=1e-4)
    assert student.state_dict().keys() == other.state_dict().keys()


def test_a_copy_has_weights_of_its_own():
    conv = with_small_maps(nn.Conv2d(2, 2, 3, padding=1))
    copied = copy.deepcopy(conv)
    with torch.no_grad():
        copied.weight.zero_()
        copied.bias.zero_()
    images = torch.ones(1, 2, 2, 2)
    assert copied(images).abs().max() == 0
    assert conv(images).abs().max() > 0


def test_in_bfloat16():
    conv = with_small_maps(nn.Conv2d(2, 2, 3, padding=1))
    with torch.autocast("cpu", torch.bfloat16):
        assert conv(torch.ones(1, 2, 2, 2)).dtype == torch.bfloat16


@pytest.mark.parametrize("conv", [nn.Conv2d(4, 4, 3, groups=4, padding=1), nn.Conv2d(4, 4, 1)])
def test_what_stays_as_it_is(conv):
    with_small_maps(conv)
    assert "forward" not in vars(conv)


def test_a_named_padding():
    conv = nn.Conv2d(2, 2, 3, padding="same")
    images = torch.randn(1, 2, 2, 2)
    wanted = conv(images)
    torch.testing.assert_close(with_small_maps(conv)(images), wanted)
