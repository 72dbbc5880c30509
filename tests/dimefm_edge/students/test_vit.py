"""ViT students: weights that a CLIP ViT hands down."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from open_clip.transformer import QuickGELU, VisionTransformer

from dimefm_edge.errors import ConfigError
from dimefm_edge.students import build_student, student_spec, vit_spec
from dimefm_edge.students.vit import inherit_layers, vit_geometry


def teacher_tower(*, act=torch.nn.GELU, depth=5, **options):
    torch.manual_seed(1)
    tower = VisionTransformer(
        image_size=32, patch_size=8, width=32, layers=depth, heads=2, mlp_ratio=4.0,
        output_dim=16, act_layer=act, **options,
    )  # fmt: skip
    with torch.no_grad():  # norms and biases that differ from their defaults
        for parameter in tower.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return tower.eval()


def spec_like(tower, **changes):
    return vit_spec(**{**vit_geometry(tower), **changes})


@pytest.mark.parametrize(("act", "name"), [(torch.nn.GELU, "gelu"), (QuickGELU, "quick_gelu")])
def test_full_depth_inheritance_gives_the_teachers_embeddings(act, name):
    tower = teacher_tower(act=act)
    spec = spec_like(tower)
    assert spec.args["act"] == name
    student = build_student(spec).eval()
    image = torch.randn(4, 3, 32, 32)
    before = student(image)
    inherited = inherit_layers(student, tower)
    assert "proj" in inherited
    assert "blocks.4 <- 4" in inherited
    expected = F.normalize(tower(image), dim=-1)
    assert (student(image) - expected).abs().max() < 1e-5
    assert (before - expected).abs().max() > 0.1


def test_every_parameter_is_inherited():
    tower = teacher_tower()
    student = build_student(spec_like(tower))
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.fill_(float("nan"))
    inherit_layers(student, tower)
    assert all(p.isfinite().all() for p in student.parameters())


def test_a_shallow_student_takes_evenly_spaced_layers():
    tower = teacher_tower()
    student = build_student(spec_like(tower, depth=3))
    inherited = inherit_layers(student, tower)
    assert [n for n in inherited if n.startswith("blocks")] == [
        "blocks.0 <- 0",
        "blocks.1 <- 2",
        "blocks.2 <- 4",
    ]
    theirs = tower.transformer.resblocks[2].attn.in_proj_weight
    assert torch.equal(student.trunk.blocks[1].attn.qkv.weight, theirs)


def test_a_narrow_student_takes_whole_heads_and_evenly_spaced_channels():
    tower = teacher_tower()
    student = build_student(spec_like(tower, width=16, num_heads=1, depth=2))
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.fill_(float("nan"))
    assert inherit_layers(student, tower)[-2:] == ["blocks.1 <- 4", "proj"]
    assert all(parameter.isfinite().all() for parameter in student.parameters())
    mine, theirs = student.trunk.blocks[1], tower.transformer.resblocks[4]
    first_head = torch.cat([torch.arange(16) + 32 * part for part in range(3)])  # of q, k and v
    assert torch.equal(mine.attn.qkv.weight, theirs.attn.in_proj_weight[first_head][:, ::2])
    assert torch.equal(mine.attn.qkv.bias, theirs.attn.in_proj_bias[first_head])
    assert torch.equal(mine.attn.proj.weight, theirs.attn.out_proj.weight[::2, :16])
    assert torch.equal(mine.mlp.fc1.weight, theirs.mlp.c_fc.weight[::2, ::2])
    assert torch.equal(mine.mlp.fc1.bias, theirs.mlp.c_fc.bias[::2])
    assert torch.equal(mine.mlp.fc2.weight, theirs.mlp.c_proj.weight[::2, ::2])
    assert torch.equal(mine.norm1.weight, theirs.ln_1.weight[::2])
    assert torch.equal(student.trunk.pos_embed[0], tower.positional_embedding[:, ::2])
    assert torch.equal(student.trunk.patch_embed.proj.weight, tower.conv1.weight[::2])
    assert torch.equal(student.proj.weight, tower.proj.T[:, ::2])


def test_a_ratio_that_gives_no_whole_hidden_units_is_followed():
    tower = build_student(spec_like(teacher_tower(), mlp_ratio=85 / 32))
    student = build_student(spec_like(tower, width=16, num_heads=1))
    assert (tower.trunk.blocks[0].mlp.fc1.out_features, 85 * 16 % 32) == (85, 16)
    assert student.trunk.blocks[0].mlp.fc1.out_features == 42
    assert inherit_layers(student, tower)
    rows = torch.arange(42) * 85 // 42
    theirs = tower.trunk.blocks[0].mlp.fc1.weight
    assert torch.equal(student.trunk.blocks[0].mlp.fc1.weight, theirs[rows][:, ::2])


def test_heads_of_a_wider_teacher_are_evenly_spaced():
    tower = teacher_tower()
    wide = build_student(spec_like(tower, width=64, num_heads=4))
    narrow = build_student(spec_like(tower, width=32, num_heads=2))
    assert inherit_layers(narrow, wide)
    rows = torch.cat([torch.arange(16), torch.arange(32, 48)])  # heads 0 and 2 of 4
    theirs = wide.trunk.blocks[0].attn.proj.weight
    assert torch.equal(narrow.trunk.blocks[0].attn.proj.weight, theirs[::2][:, rows])


def test_another_image_size_resamples_the_positions():
    tower = teacher_tower()
    student = build_student(spec_like(tower, image_size=64)).eval()
    inherit_layers(student, tower)
    assert student.trunk.pos_embed.shape == (1, 65, 32)
    assert torch.equal(student.trunk.pos_embed[0, 0], tower.positional_embedding[0])
    assert student(torch.randn(2, 3, 64, 64)).isfinite().all()


def test_another_embedding_size_keeps_its_own_projection():
    tower = teacher_tower()
    student = build_student(spec_like(tower, embed_dim=8))
    inherited = inherit_layers(student, tower)
    assert inherited
    assert "proj" not in inherited


@pytest.mark.parametrize(
    "changes",
    [
        {"width": 64, "num_heads": 4}, {"patch_size": 16}, {"num_heads": 4}, {"depth": 6},
        {"act": "quick_gelu"}, {"mlp_ratio": 2.0}, {"width": 16},
    ],
)  # fmt: skip
def test_students_of_another_shape_inherit_nothing(changes):
    tower = teacher_tower()
    student = build_student(spec_like(tower, **changes))
    before = {k: v.clone() for k, v in student.state_dict().items()}
    assert inherit_layers(student, tower) == []
    assert all(torch.equal(v, before[k]) for k, v in student.state_dict().items())


@pytest.mark.parametrize(
    "options",
    [{"pool_type": "avg"}, {"no_ln_pre": True}, {"ls_init_value": 0.1}, {"attentional_pool": True}],
    ids=str,
)
def test_towers_that_a_student_cannot_copy_have_no_geometry(options):
    assert vit_geometry(teacher_tower(**options)) is None
    assert vit_geometry(torch.nn.Linear(2, 2)) is None


def test_a_student_of_ours_can_be_the_teacher():
    tower = teacher_tower()
    first = build_student(spec_like(tower)).eval()
    inherit_layers(first, tower)
    second = build_student(spec_like(first)).eval()
    inherit_layers(second, first)
    image = torch.randn(2, 3, 32, 32)
    assert torch.equal(second(image), first(image))
    other = build_student(student_spec("hybrid-nano", image_size=32, embed_dim=16))
    assert vit_geometry(other) is None


def test_contradictions_are_refused():
    values = {"image_size": 32, "embed_dim": 8, "width": 32, "depth": 1}
    with pytest.raises(ConfigError, match="patch 5 does not divide the image side 32"):
        build_student(vit_spec(patch_size=5, num_heads=2, **values))
    with pytest.raises(ConfigError, match="3 heads do not divide width 32"):
        build_student(vit_spec(patch_size=8, num_heads=3, **values))
