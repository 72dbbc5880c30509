"""The deployed form: same answers, BatchNorm and dropout gone, weights trainable."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from dimefm_edge.errors import ExportError
from dimefm_edge.quantize.deployed import deployed_form, export_graph
from tests.dimefm_edge.quantize.int8_students import SIDE, deployed, images, student


@pytest.mark.parametrize("family", ["vit", "hybrid", "resnet"])
def test_answers_stay_and_weights_can_be_trained(family):
    before, after = student(family), deployed(family)
    with torch.no_grad():
        torch.testing.assert_close(after(images(8)), before(images(8)), atol=1e-5, rtol=0)
    assert all(value.requires_grad for value in after.parameters())
    assert not any(isinstance(part, nn.Dropout) for part in after.modules())
    assert not after.training


@pytest.mark.parametrize(("family", "left"), [("vit", 0), ("hybrid", 1), ("resnet", 0)])
def test_batch_norm_is_folded_where_it_alone_reads_a_convolution(family, left):
    # The hybrid's last norm reads what a residual connection reads too: it must stay.
    found = [part for part in deployed(family).modules() if isinstance(part, nn.BatchNorm2d)]
    assert len(found) == left


def test_what_is_deployed_is_deployed_again_unchanged():
    once = deployed("hybrid")
    twice = deployed_form(once, SIDE)
    assert once.state_dict().keys() == twice.state_dict().keys()


def test_weights_are_stored_once():
    places = [value.data_ptr() for value in deployed("vit").state_dict().values()]
    assert len(places) == len(set(places))


class _Branching(nn.Module):
    def forward(self, image):
        return image if image.sum() > 0 else -image


def test_what_torch_cannot_export_is_named():
    with pytest.raises(ExportError, match="cannot export the student for training in int8") as said:
        export_graph(_Branching(), SIDE)
    assert "--ptq int8" in said.value.hint
