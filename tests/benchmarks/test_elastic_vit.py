"""benchmarks/elastic_vit.py: cuts share the largest student's weights and learn through them."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")

from dimefm_edge.students import build_student, student_spec  # noqa: E402

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
NAMES = ("vit-p8-w32-d2", "vit-p8-w64-d2", "vit-p8-w96-d4")


@pytest.fixture
def elastic(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    yield importlib.import_module("elastic_vit")
    sys.modules.pop("elastic_vit", None)


@pytest.fixture
def model(elastic):
    torch.manual_seed(0)
    return elastic.ElasticVit([student_spec(n, image_size=32, embed_dim=24) for n in NAMES])


IMAGES = 2, 3, 32, 32


@pytest.mark.parametrize("place", range(len(NAMES)))
def test_a_cut_answers_alone_as_it_does_inside(model, place):
    spec, images = model.specs[place], torch.randn(IMAGES)
    inside = model.embed(spec, images)
    alone = model.cut_student(spec).eval()(images)
    torch.testing.assert_close(inside, alone)
    assert inside.shape == (2, 24)


def test_the_largest_cut_is_the_student_itself(model):
    images = torch.randn(IMAGES)
    with torch.no_grad():
        torch.testing.assert_close(model.eval()(images), model.student(images))
        torch.testing.assert_close(model.embed(model.specs[-1], images), model.student(images))


def test_a_cut_learns_its_own_channels_and_no_others(model):
    model.embed(model.specs[0], torch.randn(IMAGES)).square()[:, 0].sum().backward()
    weights = dict(model.student.named_parameters())
    qkv = weights["trunk.blocks.0.attn.qkv.weight"].grad.unflatten(0, (3, 96))
    assert qkv[:, :32, :32].abs().amax(dim=(1, 2)).gt(0).all()  # one head of 32 of each of q, k, v
    assert not qkv[:, 32:].any()
    assert not qkv[:, :, 32:].any()
    depth_of_grad = [weights[f"trunk.blocks.{i}.mlp.fc1.weight"].grad is not None for i in range(4)]
    assert depth_of_grad == [True, False, False, True]  # the first and the last, which ends both


def test_a_step_trains_the_largest_the_smallest_and_another(elastic, model, monkeypatch):
    asked = []
    embed = elastic.ElasticVit.embed
    monkeypatch.setattr(
        elastic.ElasticVit, "embed",
        lambda self, spec, image: asked.append(spec.name) or embed(self, spec, image),
    )  # fmt: skip
    model.train()
    for _ in range(12 * elastic.SANDWICH):
        model(torch.randn(IMAGES))
    assert set(asked[::3]) == {NAMES[-1]}
    assert set(asked[1::3]) == {NAMES[0]}
    assert set(asked[2::3]) == set(NAMES)
    model.eval()
    model(torch.randn(IMAGES))
    assert len(asked) == 36  # evaluated as the largest, which is no cut


def test_a_cut_on_its_own_changes_nothing_of_the_whole(model):
    before = {name: value.clone() for name, value in model.state_dict().items()}
    own = model.cut_student(model.specs[1])
    with torch.no_grad():
        for value in own.parameters():
            value.add_(1.0)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert {n: v.shape for n, v in own.state_dict().items()} == {
        n: v.shape for n, v in build_student(model.specs[1]).state_dict().items()
    }
