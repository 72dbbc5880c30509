"""The deployed form: same answers, BatchNorm and dropout gone, weights trainable."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from dimefm_edge.errors import ExportError
from dimefm_edge.quantize.deployed import deployed_form, export_graph
from tests.dimefm_edge.quantize.int8_students import SIDE, images, student


@pytest.mark.parametrize("family", ["vit", "hybrid", "resnet"])
def test_answers_stay_and_weights_can_be_trained(family):
    before = student(family)
    deployed = deployed_form(before, SIDE)
    with torch.no_grad():
        torch.testing.assert_close(deployed(images(8)), before(images(8)), atol=1e-5, rtol=0)
    assert all(value.requires_grad for value in deployed.parameters())
    assert not any(isinstance(part, nn.Dropout) for part in deployed.modules())
    assert not deployed.training


@pytest.mark.parametrize(("family", "left"), [("vit", 0), ("hybrid", 1), ("resnet", 0)])
def test_batch_norm_is_folded_where_it_alone_reads_a_convolution(family, left):
    # The hybrid's last norm reads what a residual connection reads too: it must stay.
    found = [m for m in deployed_form(student(family), SIDE).modules()
             if isinstance(m, nn.BatchNorm2d)]  # fmt: skip
    assert len(found) == left


def test_what_is_deployed_is_deployed_again_unchanged():
    once = deployed_form(student("hybrid"), SIDE)
    twice = deployed_form(once, SIDE)
    assert once.state_dict().keys() == twice.state_dict().keys()


def test_weights_are_stored_once():
    deployed = deployed_form(student("vit"), SIDE)
    places = [value.data_ptr() for value in deployed.state_dict().values()]
    assert len(places) == len(set(places))


class _Branching(nn.Module):
    def forward(self, image):
        return image if image.sum() > 0 else -image


def test_what_torch_cannot_export_is_named():
    with pytest.raises(ExportError, match="cannot export the student for training in int8") as said:
        export_graph(_Branching(), SIDE)
    assert "--ptq int8" in said.value.hint
