"""Elastic students: cuts share the largest student's weights and learn through them."""

from __future__ import annotations

import pytest

torch = pytest.importorskip("torch")

from dimefm_edge.students import build_student, student_spec  # noqa: E402
from dimefm_edge.students.elastic import (  # noqa: E402
    SANDWICH,
    ElasticStudent,
    cut_student,
    recalibrate,
)

VITS = ("vit-p8-w32-d2", "vit-p8-w64-d2", "vit-p8-w64-d3", "vit-p8-w96-d4")
HYBRIDS = ("hybrid-w8-d1.1.1.1", "hybrid-w12-d1.1.2.1", "hybrid-w16-d1.2.3.2")
CONVNETS = ("convnet-w8-d1.1.1.1-relu", "convnet-w12-d1.1.1.2-relu", "convnet-w16-d1.1.2.3-relu")
FAMILIES = {"vit": VITS, "hybrid": HYBRIDS, "convnet": CONVNETS}
IMAGES = 4, 3, 32, 32


def elastic(names, seed=0):
    torch.manual_seed(0)
    specs = [student_spec(name, image_size=32, embed_dim=24) for name in names]
    return ElasticStudent(build_student(specs[-1]), specs, seed=seed)


@pytest.mark.parametrize(
    ("family", "place"),
    [(f, place) for f, names in FAMILIES.items() for place in range(len(names))],
)
def test_a_cut_answers_alone_as_it_does_inside(family, place):
    model, images = elastic(FAMILIES[family]), torch.randn(IMAGES)
    spec = model.specs[place]
    alone = cut_student(model.student, model.specs[-1], spec)
    with torch.no_grad():
        inside = model.embed(spec, images)
        torch.testing.assert_close(inside, alone.train()(images))
    assert inside.shape == (4, 24)
    assert {n: v.shape for n, v in alone.state_dict().items()} == {
        n: v.shape for n, v in build_student(spec).state_dict().items()
    }


def test_a_cut_learns_its_own_channels_and_no_others():
    model = elastic(VITS)
    model.embed(model.specs[0], torch.randn(IMAGES)).square()[:, 0].sum().backward()
    weights = dict(model.student.named_parameters())
    qkv = weights["trunk.blocks.0.attn.qkv.weight"].grad.unflatten(0, (3, 96))
    assert qkv[:, :32, :32].abs().amax(dim=(1, 2)).gt(0).all()  # one head of 32 of each of q, k, v
    assert not qkv[:, 32:].any()
    assert not qkv[:, :, 32:].any()
    depth_of_grad = [weights[f"trunk.blocks.{i}.mlp.fc1.weight"].grad is not None for i in range(4)]
    assert depth_of_grad == [True, False, False, True]  # the first and the last, which ends both


def test_a_shallower_stage_keeps_its_first_blocks_and_its_last():
    model = elastic(HYBRIDS)
    model.embed(model.specs[1], torch.randn(IMAGES)).square()[:, 0].sum().backward()
    used = {
        name.split(".token_mixer")[0]
        for name, value in model.student.named_parameters()
        if "token_mixer" in name and value.grad is not None
    }
    stages = [(0, 0), (1, 1), (2, 0), (2, 2), (3, 1)]
    assert used == {f"trunk.stages.{stage}.blocks.{block}" for stage, block in stages}


def asked(model, steps):
    """The cuts that steps are trained with, in turn; the largest is no cut."""
    found = []
    embed = model.embed
    model.embed = lambda spec, image: found.append(spec.name) or embed(spec, image)
    model.train()
    for step in steps:
        model.on_step(step, 100)
        for _ in range(SANDWICH):
            model(torch.randn(IMAGES))
    return found


def test_a_step_trains_the_smallest_one_between_and_the_largest():
    model = elastic(VITS)
    found = asked(model, range(12))
    assert set(found[::2]) == {VITS[0]}
    assert set(found[1::2]) == set(VITS[1:-1])
    model.eval()
    model(torch.randn(IMAGES))
    assert len(found) == 24  # evaluated as the largest


def test_a_step_is_the_same_after_resuming_and_another_with_another_seed():
    whole = asked(elastic(VITS), range(12))
    assert asked(elastic(VITS), range(6, 12)) == whole[12:]
    assert asked(elastic(VITS, seed=1), range(12)) != whole


def test_every_weight_is_used_by_the_last_of_a_step():
    """DistributedDataParallel waits for gradients of all in the pass that it reduces after."""
    model = elastic(HYBRIDS).train()
    model.on_step(0, 1)
    for turn in range(SANDWICH):
        model.zero_grad()
        model(torch.randn(IMAGES)).square()[:, 0].sum().backward()
        unused = [n for n, value in model.named_parameters() if value.grad is None]
        assert bool(unused) == (turn < SANDWICH - 1)


def test_two_cuts_are_enough():
    model = elastic(VITS[:2])
    assert set(asked(model, range(12))) == set(VITS[:2])


def test_a_cut_on_its_own_changes_nothing_of_the_whole():
    model = elastic(VITS)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    own = cut_student(model.student, model.specs[-1], model.specs[1])
    with torch.no_grad():
        for value in own.parameters():
            value.add_(1.0)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


def test_only_the_largest_leaves_averages_in_training():
    model = elastic(HYBRIDS).train()
    before = {name: value.clone() for name, value in model.student.named_buffers()}
    for spec in model.specs[:-1]:
        model.embed(spec, torch.randn(IMAGES))
    assert all(torch.equal(before[n], value) for n, value in model.student.named_buffers())
    model.on_step(0, 1)
    for _ in range(SANDWICH):
        model(torch.randn(IMAGES))
    tracked = [v for n, v in model.student.named_buffers() if n.endswith("num_batches_tracked")]
    assert all(int(value) == 1 for value in tracked)


def test_recalibrated_averages_are_those_of_the_images():
    model = elastic(CONVNETS)
    cut = cut_student(model.student, model.specs[-1], model.specs[0])
    batches = [torch.randn(IMAGES) + 3 for _ in range(3)]
    cut.eval()
    assert recalibrate(cut, iter(batches))
    assert not cut.training
    norm = cut.trunk.stem[0].conv_kxk[0].bn
    with torch.no_grad():
        seen = [cut.trunk.stem[0].conv_kxk[0].conv(images) for images in batches]
    wanted = torch.stack([maps.mean(dim=(0, 2, 3)) for maps in seen]).mean(dim=0)
    torch.testing.assert_close(norm.running_mean, wanted)


def test_without_batch_norms_no_image_is_read():
    def unread():
        raise AssertionError
        yield

    assert not recalibrate(elastic(VITS).student, unread())
