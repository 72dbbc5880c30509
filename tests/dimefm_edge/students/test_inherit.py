"""Weight selection: what a convolutional student takes from a larger teacher of its class."""

from __future__ import annotations

import open_clip
import pytest
import torch

from dimefm_edge.students import build_student, student_spec
from dimefm_edge.students.inherit import (
    _Choice,
    can_inherit,
    inherit_from_teacher,
    select_weights,
)


def student(name: str, embed_dim: int = 32):
    torch.manual_seed(1)
    return build_student(student_spec(name, image_size=32, embed_dim=embed_dim))


@pytest.fixture(scope="module")
def teacher():
    """An open_clip tower around a resnet18d."""
    torch.manual_seed(0)
    vision = {"image_size": 32, "timm_model_name": "resnet18d", "timm_pool": "avg"}
    text = {"context_length": 8, "vocab_size": 64, "width": 32, "heads": 2, "layers": 1}
    return open_clip.CLIP(32, vision, text).visual.eval()


def test_blocks_are_taken_whole_and_channels_evenly_spaced(teacher):
    small = student("timm:resnet10t")
    taken = inherit_from_teacher(small, teacher)
    state, source = small.state_dict(), teacher.trunk.state_dict()
    assert set(taken) == set(state)
    assert torch.equal(state["trunk.layer3.0.conv1.weight"], source["layer3.0.conv1.weight"])
    assert torch.equal(state["trunk.layer4.0.bn2.running_var"], source["layer4.0.bn2.running_var"])
    assert torch.equal(state["proj.weight"], teacher.head.proj.weight)
    kept = torch.arange(24) * 32 // 24  # of the stem: 24 channels of 32, out here and in there
    assert torch.equal(state["trunk.conv1.0.weight"], source["conv1.0.weight"][kept])
    assert torch.equal(state["trunk.conv1.1.running_mean"], source["conv1.1.running_mean"][kept])
    assert torch.equal(state["trunk.conv1.3.weight"], source["conv1.3.weight"][:, kept])


def test_a_teacher_of_the_same_shape_is_copied(teacher):
    same = student("timm:resnet18d").eval()
    assert select_weights(same, teacher)
    x = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        answer = torch.nn.functional.normalize(teacher(x), dim=-1)
        torch.testing.assert_close(same(x), answer)


def test_another_embedding_size_keeps_its_projection(teacher):
    small = student("timm:resnet10t", embed_dim=48)
    before = small.proj.weight.clone()
    assert "proj.weight" not in inherit_from_teacher(small, teacher)
    assert torch.equal(small.proj.weight, before)


@pytest.mark.parametrize(
    ("name", "other"),
    [
        ("timm:resnet18", "timm:resnet50"),  # basic and bottleneck blocks
        ("timm:resnet10t", "timm:resnet50"),
        ("timm:resnet50", "timm:resnet18"),
        ("timm:resnet34", "timm:resnet18"),  # deeper than its teacher
        ("timm:resnet50", "timm:resnext50_32x4d"),  # groups
        ("timm:mobilenetv3_small_050", "timm:mobilenetv3_large_100"),
        ("timm:densenet121", "timm:densenet169"),
        ("convnet-w16-d1.1.1.1", "timm:resnet18"),
        ("hybrid-w16-d1.1.1.1", "convnet-w24-d1.1.1.1"),  # attention that it has not
        ("hybrid-w16-d1.1.2.1", "hybrid-w24-d1.1.1.1"),
        ("vit-p8-w64-d1", "vit-p8-w32-d1"),  # wider than its teacher
        ("vit-p8-w64-d1", "vit-p16-w128-d1"),
    ],
)
def test_nothing_is_taken_of_another_kind(name, other):
    mine, theirs = student(name), student(other)
    before = {key: value.clone() for key, value in mine.state_dict().items()}
    assert inherit_from_teacher(mine, theirs) == []
    assert all(torch.equal(value, before[key]) for key, value in mine.state_dict().items())


def test_kernels_of_another_size_are_no_counterpart():
    narrow, wide = student("convnet-w16-d1.1.1.1"), student("convnet-w24-d1.1.1.1")
    name, conv = next(
        (n, m) for n, m in wide.trunk.named_modules()
        if isinstance(m, torch.nn.Conv2d) and m.kernel_size == (7, 7)
    )  # fmt: skip
    parent = wide.trunk.get_submodule(name.rpartition(".")[0])
    smaller = torch.nn.Conv2d(
        conv.in_channels, conv.out_channels, 9, groups=conv.groups, bias=False
    )
    setattr(parent, name.rpartition(".")[2], smaller)
    assert inherit_from_teacher(narrow, wide) == []


@pytest.mark.parametrize("family", ["convnet", "hybrid"])
def test_a_staged_student_takes_from_a_wider_one(family):
    narrow, wide = student(f"{family}-w16-d1.1.1.1"), student(f"{family}-w24-d1.1.2.1")
    assert set(inherit_from_teacher(narrow, wide)) == set(narrow.state_dict())
    mine, theirs = narrow.state_dict(), wide.state_dict()
    first = torch.arange(16) * 3 // 2  # of the stem's channels
    kept = {
        16 * n: (first[:, None] * n + torch.arange(n)).flatten() for n in (1, 2, 3, 4, 6, 8, 16)
    }
    for key, value in mine.items():
        if value.ndim == 1 and len(value) in kept:
            assert torch.equal(value, theirs[key][kept[len(value)]]), key
    assert narrow(torch.randn(2, 3, 32, 32)).isfinite().all()


def test_what_a_depthwise_convolution_makes_of_a_channel_stays_with_it():
    """Where one channel becomes two, those of a chosen one are chosen."""
    narrow, wide = student("convnet-w12-d1.1.1.1"), student("convnet-w40-d1.1.1.1")
    choice = _Choice(narrow, wide.trunk)
    for wider in (2, 4, 8):
        made, of = choice._channels(12 * wider, 40 * wider), choice._channels(6 * wider, 20 * wider)
        assert torch.equal(made // 2, of.repeat_interleave(2))


def test_heads_of_a_hybrid_are_taken_whole():
    narrow, wide = student("hybrid-w16-d1.1.1.1"), student("hybrid-w32-d1.1.1.1")
    assert inherit_from_teacher(narrow, wide)
    mine, theirs = (s.trunk.stages[3].blocks[0].token_mixer for s in (narrow, wide))
    assert (mine.num_heads, theirs.num_heads) == (4, 8)
    inner = (torch.arange(4)[:, None] * 64 + torch.arange(32)).flatten()  # every other head of 32
    channels = (torch.arange(16)[:, None] * 16 + torch.arange(8)).flatten()
    rows = torch.cat([inner + 256 * part for part in range(3)])
    assert torch.equal(mine.qkv.weight, theirs.qkv.weight[rows][:, channels])
    assert torch.equal(mine.proj.weight, theirs.proj.weight[channels][:, inner])


def test_a_hybrid_takes_from_mobileclip():
    tower = open_clip.create_model("MobileCLIP2-S0").visual
    spec = student_spec("hybrid-w48-d1.2.2.1", image_size=256, embed_dim=512)
    assert can_inherit(spec, tower)
    heir = build_student(spec)
    assert set(inherit_from_teacher(heir, tower)) == set(heir.state_dict())
    columns = (torch.arange(48)[:, None] * 64 // 48 * 16 + torch.arange(16)).flatten()
    assert torch.equal(heir.proj.weight, tower.trunk.head.fc.weight[:, columns])
    assert not can_inherit(
        student_spec("hybrid-w80-d1.1.1.1", image_size=256, embed_dim=512), tower
    )


@pytest.mark.parametrize(
    "name", ["timm:resnet10t", "timm:resnet18d", "timm:resnet34d", "timm:resnet26t", "hybrid-nano",
             "vit-p8-w64-d2"]
)  # fmt: skip
def test_who_can_inherit_is_known_before_it_is_built(teacher, name):
    spec = student_spec(name, image_size=32, embed_dim=32)
    assert can_inherit(spec, teacher) == bool(inherit_from_teacher(student(name), teacher))
