"""The last block at its class token only: same answers and gradients, same weights, less work."""

from __future__ import annotations

import pytest
import torch
from timm.models.vision_transformer import VisionTransformer

from dimefm_edge.students.class_token import ClassTokenBlock, read_class_token_only

SIZES = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2}


def vit(**changes: object) -> VisionTransformer:
    torch.manual_seed(0)
    model = VisionTransformer(**{**SIZES, "num_classes": 0, "init_values": 0.5, **changes})
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


@pytest.mark.parametrize("changes", [{}, {"qkv_bias": False}, {"reg_tokens": 2}, {"depth": 1}])
def test_answers_and_gradients_stay(changes: dict[str, object]) -> None:
    image = torch.randn(3, 3, 32, 32)
    plain, lean = vit(**changes), vit(**changes)
    assert read_class_token_only(lean)
    assert lean.state_dict().keys() == plain.state_dict().keys()
    assert lean.blocks[-1](torch.randn(3, 17, 32)).shape == (3, 1, 32)
    expected, found = plain(image), lean(image)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    weights = torch.randn_like(expected)
    (expected * weights).sum().backward()
    (found * weights).sum().backward()
    for (name, one), other in zip(plain.named_parameters(), lean.parameters(), strict=True):
        assert other.grad is not None, name
        torch.testing.assert_close(other.grad, one.grad, atol=1e-4, rtol=1e-4, msg=name)


@pytest.mark.parametrize(
    "changes",
    [
        {"global_pool": "avg"}, {"qk_norm": True}, {"global_pool": "map"},
        {"class_token": False, "global_pool": "avg"},
    ],
)  # fmt: skip
def test_vits_that_read_more_are_left_alone(changes: dict[str, object]) -> None:
    model = vit(**changes)
    assert not read_class_token_only(model)
    assert not any(isinstance(part, ClassTokenBlock) for part in model.modules())


def test_one_block_does_a_sixth_of_the_work() -> None:
    from torch.utils.flop_counter import FlopCounterMode

    counts = []
    for block in (vit().blocks[-1], ClassTokenBlock(vit().blocks[-1])):
        with FlopCounterMode(display=False) as counter:
            block(torch.randn(1, 197, 32))
        counts.append(counter.get_total_flops())
    # Keys and values, 2 of 12 parts of the products, and one row of the rest.
    assert counts[1] < 0.2 * counts[0]
