"""Modules made ready for tracing: every attention spelt one way, and the same answers."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import nn

from dimefm_edge.export.simplify import TracedAttention, ready_for_tracing
from dimefm_edge.students import build_student, hybrid_spec, vit_spec


def open_clip_tower(**changes: object) -> nn.Module:
    import open_clip

    vision = {"image_size": 32, "patch_size": 8, "width": 64, "layers": 2, "head_width": 32}
    text = {"context_length": 8, "vocab_size": 64, "width": 16, "heads": 2, "layers": 1}
    return open_clip.CLIP(embed_dim=24, vision_cfg={**vision, **changes}, text_cfg=text).visual


TOWERS: dict[str, tuple[Callable[[], nn.Module], int]] = {
    "vit": (
        lambda: build_student(
            vit_spec(image_size=32, embed_dim=24, patch_size=8, width=64, depth=2, num_heads=2)
        ),
        2,
    ),
    "hybrid": (
        lambda: build_student(
            hybrid_spec(image_size=32, embed_dim=24, width=16, depth=(1, 1, 1, 2))
        ),
        2,
    ),
    "open_clip vit": (open_clip_tower, 2),
    "open_clip vit, mean": (lambda: open_clip_tower(pool_type="avg"), 2),
    "open_clip vit, layer scale": (lambda: open_clip_tower(ls_init_value=0.3), 2),
    "open_clip resnet": (
        lambda: open_clip_tower(layers=[1, 1, 1, 1], width=16, patch_size=None), 1,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", TOWERS)
def test_same_answers_with_every_attention_replaced(name: str) -> None:
    torch.manual_seed(0)
    build, attentions = TOWERS[name]
    module = build().eval()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    before = copy.deepcopy(module.state_dict())
    ready = ready_for_tracing(module)
    assert sum(isinstance(part, TracedAttention) for part in ready.modules()) == attentions
    assert all(torch.equal(value, before[key]) for key, value in module.state_dict().items())
    image = torch.randn(3, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(ready(image), module(image), atol=1e-5, rtol=1e-4)


def test_what_is_not_known_is_left_as_it_is() -> None:
    attention = nn.MultiheadAttention(32, 2, kdim=16, vdim=16)
    assert not any(
        isinstance(part, TracedAttention)
        for part in ready_for_tracing(nn.Sequential(attention)).modules()
    )


def test_attention_with_a_mask_and_tokens_first() -> None:
    torch.manual_seed(0)
    for is_batch_first in (True, False):
        attention = nn.MultiheadAttention(32, 2, batch_first=is_batch_first).eval()
        ready = ready_for_tracing(nn.Sequential(attention))[0]
        x, mask = torch.randn(5, 5, 32), torch.triu(torch.full((5, 5), -torch.inf), diagonal=1)
        expected = attention(x, x, x, need_weights=False, attn_mask=mask)[0]
        torch.testing.assert_close(ready(x, x, x, attn_mask=mask)[0], expected)
