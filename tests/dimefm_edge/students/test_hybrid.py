"""Hybrid students: small images, and branches that merge."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from dimefm_edge.errors import ConfigError
from dimefm_edge.students import (
    StudentSpec,
    build_student,
    convnet_spec,
    hybrid_spec,
    student_spec,
    vit_spec,
)
from dimefm_edge.students.hybrid import build_hybrid, reparameterise


def tiny(image_size=64, **changes):
    values = {"embed_dim": 16, "width": 8, "depth": (1, 1, 1, 1), **changes}
    return hybrid_spec(image_size=image_size, **values)


@pytest.mark.parametrize("image_size", [32, 48, 64, 96, 128, 224, 256])
def test_the_last_stage_has_enough_positions(image_size):
    student = build_student(tiny(image_size)).eval()
    features = student.trunk.forward_features(torch.randn(1, 3, image_size, image_size))
    assert min(features.shape[-2:]) >= 4
    assert student(torch.randn(1, 3, image_size, image_size)).shape == (1, 16)


def test_a_convnet_has_no_attention_and_merges_into_plain_convolutions():
    spec = convnet_spec(image_size=64, embed_dim=16, width=8, depth=(1, 1, 1, 1))
    assert spec.name == "convnet-w8-d1.1.1.1"
    student = build_student(spec).eval()
    assert not any("attn" in name or "attention" in name for name, _ in student.named_modules())
    assert any("attn" in name.lower() for name, _ in build_student(tiny()).named_modules()) or any(
        type(m).__name__ == "Attention" for m in build_student(tiny()).modules()
    )
    merged, image = reparameterise(student), torch.randn(2, 3, 64, 64)
    torch.testing.assert_close(merged(image), student(image), atol=1e-5, rtol=0)
    built = build_hybrid(spec, is_merged=True).state_dict()
    assert {k: v.shape for k, v in built.items()} == {
        k: v.shape for k, v in merged.state_dict().items()
    }


def test_merged_branches_answer_the_same_with_fewer_parameters():
    torch.manual_seed(0)
    student = build_student(tiny())
    for _ in range(3):
        student(torch.randn(8, 3, 64, 64))  # statistics that are not the defaults
    merged = reparameterise(student)
    image = torch.randn(4, 3, 64, 64)
    torch.testing.assert_close(merged(image), student.eval()(image), atol=1e-5, rtol=0)
    count = [sum(p.numel() for p in m.parameters()) for m in (merged, student)]
    assert count[0] < count[1]


def test_a_student_built_merged_has_the_weights_of_a_merged_one():
    merged = reparameterise(build_student(tiny())).state_dict()
    built = build_hybrid(tiny(), is_merged=True).state_dict()
    assert {k: v.shape for k, v in built.items()} == {k: v.shape for k, v in merged.items()}


def test_a_student_without_branches_is_copied():
    spec = vit_spec(image_size=32, embed_dim=8, patch_size=8, width=16, depth=1, num_heads=2)
    student = build_student(spec)
    copy = reparameterise(student)
    image = torch.randn(1, 3, 32, 32)
    assert copy is not student
    assert torch.equal(copy(image), student.eval()(image))


def test_it_trains_at_64_px():
    torch.manual_seed(0)
    torch.set_num_threads(1)
    student = build_student(tiny())
    images, targets = torch.randn(16, 3, 64, 64), torch.randn(16, 16)
    targets = torch.nn.functional.normalize(targets, dim=-1)
    optimizer = torch.optim.AdamW(student.parameters(), lr=3e-3)
    losses = []
    for _ in range(30):
        loss = (student(images) - targets).square().sum(dim=1).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.3 * losses[0]


@pytest.mark.parametrize("family", ["hybrid", "convnet"])
def test_relus_are_asked_for_by_name_and_stay_out_of_older_specs(family):
    sizes = {"image_size": 64, "embed_dim": 16}
    plain = student_spec(f"{family}-w8-d1.1.1.1", **sizes)
    relu = student_spec(f"{family}-w8-d1.1.1.1-relu", **sizes)
    assert "act" not in plain.args
    assert StudentSpec.from_dict(relu.to_dict()) == relu != plain
    for spec, wanted, other in ((plain, nn.GELU, nn.ReLU), (relu, nn.ReLU, nn.GELU)):
        student = build_hybrid(spec)
        student.trunk.final_conv.se = nn.Identity()  # has a ReLU of its own
        kinds = {type(module) for module in student.modules()}
        assert wanted in kinds
        assert other not in kinds
        merged = {
            type(module) for module in build_hybrid(spec, is_merged=True).trunk.stem.modules()
        }
        assert wanted in merged


@pytest.mark.parametrize("family", ["hybrid", "convnet"])
def test_larger_mixers_are_asked_for_by_name_and_merge_into_one_convolution(family):
    sizes = {"image_size": 64, "embed_dim": 16}
    plain, large = (student_spec(f"{family}-w8-d1.1.1.1{end}", **sizes) for end in ("", "-k5-relu"))
    assert "kernel" not in plain.args
    assert (large.args["kernel"], large.args["act"]) == (5, "relu")
    assert StudentSpec.from_dict(large.to_dict()) == large
    for spec, side in ((plain, 3), (large, 5)):
        student = build_student(spec).eval()
        mixer = reparameterise(student).trunk.stages[0].blocks[0].token_mixer
        assert mixer.reparam_conv.kernel_size == (side, side)
        image = torch.randn(1, 3, 64, 64)
        assert torch.allclose(reparameterise(student)(image), student(image), atol=1e-5)


def test_contradictions_are_refused():
    with pytest.raises(ConfigError, match="need images of 32 px or more, got 16"):
        build_student(tiny(16))
    with pytest.raises(ConfigError, match="depth must be four positive counts"):
        build_student(tiny(depth=(1, 1)))
    with pytest.raises(ConfigError, match="kernel must be odd, got 4"):
        build_student(student_spec("hybrid-w8-d1.1.1.1-k4", image_size=64, embed_dim=16))
    with pytest.raises(ConfigError, match="width must be a multiple of 4, got 10"):
        build_student(tiny(width=10))
