"""Text students: their shape, what they inherit, and what of a sentence they need."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import open_clip
import pytest
import torch

from dimefm_edge.encoders import JoinedTowers, TextTower
from dimefm_edge.errors import ConfigError, UnknownNameError
from dimefm_edge.students.text import (
    TextSpec,
    TextStudent,
    inherit_text,
    text_geometry,
    text_spec,
)

LENGTH, END = 12, 99
VISION = {"image_size": 32, "patch_size": 16, "width": 32, "layers": 1, "head_width": 16}
TEXT = {"context_length": LENGTH, "vocab_size": 100, "width": 32, "heads": 2, "layers": 6}
KINDS: dict[str, dict[str, Any]] = {
    "CLIP": {},
    "SigLIP": {
        "no_causal_mask": True, "proj_bias": True, "pool_type": "last",
        "norm_kwargs": {"eps": 1e-6}, "act_kwargs": {"approximate": "tanh"},
    },
    "eos": {"pool_type": "eos", "eos_id": END},
}  # fmt: skip


def build_tower(kind: str, **changed: Any) -> TextTower:
    torch.manual_seed(0)
    values = {"embed_dim": 8, "vision_cfg": VISION}
    values["text_cfg"] = {**TEXT, **KINDS.get(kind, {}), **changed}
    cls = open_clip.CLIP if kind == "CLIP" else open_clip.CustomTextCLIP
    model = cls(**values).eval()
    with torch.no_grad():  # random position embeddings of 0.01 would hide a shift
        for name, parameter in model.named_parameters():
            if "embedding" in name:
                parameter.mul_(20)
    return TextTower(model)


def sentences(count: int = 9) -> torch.Tensor:
    """Tokens as CLIP's tokenizer gives them: an end token, then zeros."""
    rng = np.random.default_rng(0)
    tokens = np.zeros((count, LENGTH), np.int64)
    for row in tokens:
        length = int(rng.integers(2, LENGTH - 2))
        row[:length] = rng.integers(1, END - 1, length)
        row[length] = END
    return torch.from_numpy(tokens)


@pytest.mark.parametrize("kind", list(KINDS))
def test_a_student_of_the_teachers_own_shape_answers_as_the_teacher(kind: str) -> None:
    tower = build_tower(kind)
    geometry = text_geometry(tower)
    assert geometry is not None
    student = TextStudent(text_spec("text-w32-d6", geometry)).eval()
    inherited = inherit_text(student, tower)
    assert inherited[-1] == "proj"
    assert [name for name in inherited if "<-" in name] == [f"blocks.{i} <- {i}" for i in range(6)]
    with torch.no_grad():
        wanted = torch.nn.functional.normalize(tower(sentences()), dim=-1)
        found = student(sentences())
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-5)
    assert wanted.std(0).mean() > 0.01  # sentences are told apart


def test_fewer_layers_are_evenly_spaced_ones_and_the_name_says_the_shape() -> None:
    tower = build_tower("CLIP")
    geometry = text_geometry(tower)
    assert geometry is not None
    spec = text_spec("auto", geometry)
    assert (spec.name, spec.depth, spec.token_dim) == ("text-w32-d2-e8", 2, 8)
    assert text_spec(spec.name, geometry) == spec
    student = TextStudent(spec)
    assert [n for n in inherit_text(student, tower) if "<-" in n] == [
        "blocks.0 <- 0", "blocks.1 <- 5",
    ]  # fmt: skip
    last = tower.model.transformer.resblocks[5].mlp.c_fc.weight
    torch.testing.assert_close(student.transformer.resblocks[1].mlp.c_fc.weight, last)


def test_a_factorised_token_embedding_is_the_nearest_of_its_rank() -> None:
    tower = build_tower("CLIP")
    table = tower.model.token_embedding.weight
    student = TextStudent(text_spec("text-w32-d2-e8", text_geometry(tower) or {}))
    inherit_text(student, tower)
    with torch.no_grad():
        made = student.token_embedding(torch.arange(100))
    left, sizes, right = torch.linalg.svd(table.double(), full_matrices=False)
    nearest = left[:, :8] * sizes[:8] @ right[:8]
    torch.testing.assert_close(made.double(), nearest, rtol=0, atol=1e-5)
    assert (made - table).norm() < table.norm()


def test_a_text_student_hands_down_to_a_smaller_one() -> None:
    tower = build_tower("CLIP")
    geometry = text_geometry(tower)
    assert geometry is not None
    first = TextStudent(text_spec("text-w32-d4-e16", geometry)).eval()
    inherit_text(first, tower)
    second = TextStudent(text_spec("text-w32-d4", text_geometry(first) or {})).eval()
    assert "proj" in inherit_text(second, first)
    with torch.no_grad():
        torch.testing.assert_close(second(sentences()), first(sentences()), rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", ["text-w16-d2", "text-w32-d7"], ids=["narrower", "deeper"])
def test_what_does_not_fit_is_left_untouched(name: str) -> None:
    tower = build_tower("CLIP")
    student = TextStudent(text_spec(name, text_geometry(tower) or {}))
    before = {key: value.clone() for key, value in student.state_dict().items()}
    assert inherit_text(student, tower) == []
    assert all(torch.equal(before[key], value) for key, value in student.state_dict().items())


def test_towers_of_other_kinds_have_no_geometry() -> None:
    clip = build_tower("CLIP")
    others = (
        JoinedTowers([clip, clip], [0.7, 0.7]),
        build_tower("custom", embed_cls=True, pool_type="last"),  # CoCa
        build_tower("custom", ls_init_value=0.1),
        torch.nn.Linear(2, 2),
    )
    assert [text_geometry(tower) for tower in others] == [None] * 4


@pytest.mark.parametrize("kind", list(KINDS))
def test_what_is_cut_from_sentences_changes_nothing(kind: str) -> None:
    student = TextStudent(text_spec("auto", text_geometry(build_tower(kind)) or {})).eval()
    tokens = sentences()
    needed = student.spec.needed_length(tokens.numpy())
    ends = int((tokens == END).int().argmax(1).max()) + 1
    assert needed == (LENGTH if kind == "SigLIP" else ends)
    assert ends < LENGTH
    with torch.no_grad():
        whole, cut = student(tokens), student(tokens[:, :needed])
    torch.testing.assert_close(cut, whole, rtol=0, atol=1e-6)
    torch.testing.assert_close(whole.norm(dim=1), torch.ones(len(tokens)))


def test_a_causal_student_does_not_see_what_comes_later() -> None:
    student = TextStudent(text_spec("auto", text_geometry(build_tower("CLIP")) or {})).eval()
    tokens = sentences()
    other = tokens.clone()
    other[:, -1] = 7  # behind every end token
    early = tokens.clone()
    early[:, 0] = 55
    with torch.no_grad():
        torch.testing.assert_close(student(other), student(tokens))
        assert (student(early) - student(tokens)).abs().max() > 1e-3


def spec(**changed: Any) -> TextSpec:
    sizes = {"vocab_size": 100, "context_length": 12, "width": 32, "depth": 2, "num_heads": 2}
    return TextSpec(**{"name": "t", **sizes, "token_dim": 8, "embed_dim": 8, **changed})


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"width": 0}, "width cannot be 0"),
        ({"vocab_size": 10**9}, "vocab_size cannot be 1000000000"),
        ({"depth": True}, "depth cannot be True"),
        ({"num_heads": 5}, "5 heads do not divide width 32"),
        ({"token_dim": 64}, "64 numbers a token are more than the width 32"),
        ({"pool": "mean"}, "unknown pooling 'mean'"),
        ({"act": "relu"}, "unknown activation 'relu'"),
    ],
)
def test_a_spec_that_cannot_be_is_refused(changed: dict[str, Any], message: str) -> None:
    with pytest.raises((ConfigError, UnknownNameError), match=message):
        spec(**changed)
    assert dataclasses.asdict(spec()) == spec().to_dict()


def test_a_misspelt_name_is_answered_with_ones_that_work() -> None:
    geometry = text_geometry(build_tower("CLIP"))
    assert geometry is not None
    with pytest.raises(UnknownNameError, match="unknown text student 'tiny'") as caught:
        text_spec("tiny", geometry)
    assert "text-w32-d2" in str(caught.value.hint)
    with pytest.raises(ConfigError, match="more than the width"):
        text_spec("text-w32-d1-e64", geometry)
