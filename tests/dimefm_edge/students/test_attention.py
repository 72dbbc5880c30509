"""Fused attention in students: the same state, answers and gradients."""

from __future__ import annotations

import copy
import importlib.util

import pytest

torch = pytest.importorskip("torch")

from timm.models.vision_transformer import Attention  # noqa: E402

from dimefm_edge.errors import MissingExtraError  # noqa: E402
from dimefm_edge.students import attention as fused  # noqa: E402
from dimefm_edge.students import build_student, student_spec, vit_spec  # noqa: E402
from dimefm_edge.students.attention import (  # noqa: E402
    use_fused_attention,
    wants_fused_attention,
)

VIT = vit_spec(image_size=32, embed_dim=16, patch_size=8, width=64, depth=2, num_heads=2)
HYBRID = student_spec("hybrid-nano", image_size=32, embed_dim=16)


@pytest.mark.parametrize(("spec", "count"), [(VIT, 1), (HYBRID, 1)], ids=["vit", "hybrid"])
def test_same_state_answers_and_gradients(spec, count):
    torch.manual_seed(0)
    plain = build_student(spec).eval()
    swapped = copy.deepcopy(plain)
    assert use_fused_attention(swapped) == count
    assert use_fused_attention(swapped) == 0
    assert plain.state_dict().keys() == swapped.state_dict().keys()
    image = torch.randn(3, 3, 32, 32)
    weights = torch.randn(3, 16)
    for model in (plain, swapped):
        (model(image) * weights).sum().backward()
    torch.testing.assert_close(swapped(image), plain(image), atol=1e-5, rtol=0)
    for a, b in zip(plain.parameters(), swapped.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, atol=1e-5, rtol=1e-4)
    assert torch.equal(copy.deepcopy(swapped)(image), swapped(image))


def test_the_op_is_what_runs():
    student = build_student(VIT).eval()
    use_fused_attention(student)
    with torch.no_grad():
        program = torch.export.export(student, (torch.randn(2, 3, 32, 32),))
    targets = [str(node.target) for node in program.graph.nodes]
    # Of two blocks: the last one has a single query.
    assert targets.count("dimefm.fused_attention_qkv.default") == 1


def test_attention_with_more_to_it_is_left_alone():
    norm = torch.nn.LayerNorm
    assert use_fused_attention(Attention(32, 2, qk_norm=True, norm_layer=norm)) == 0
    assert use_fused_attention(Attention(32, 2, attn_drop=0.1)) == 0
    assert use_fused_attention(Attention(32, 2, proj_drop=0.1)) == 1


def test_a_mask_is_refused():
    layer = Attention(32, 2)
    use_fused_attention(layer)
    with pytest.raises(ValueError, match="takes no mask"):
        layer(torch.randn(1, 5, 32), attn_mask=torch.zeros(5, 5))


@pytest.mark.parametrize(
    ("choice", "device", "expected"),
    [
        ("auto", "cpu", False), ("auto", "cuda", False),
        ("on", "cpu", True), ("on", "cuda", True), ("off", "cuda", False),
    ],
)  # fmt: skip
def test_when_it_is_used(choice, device, expected):
    pytest.importorskip("triton")
    assert wants_fused_attention(choice, device) is expected


def test_without_triton(monkeypatch):
    real = importlib.util.find_spec
    monkeypatch.setattr(fused, "find_spec", lambda name: None if name == "triton" else real(name))
    assert not wants_fused_attention("auto", "cuda")
    assert wants_fused_attention("on", "cpu")
    with pytest.raises(MissingExtraError, match=r"needs Triton\n  try: pip install triton"):
        wants_fused_attention("on", "cuda")
