"""The optimiser and its schedule."""

from __future__ import annotations

import itertools

import pytest
import torch

from dimefm_edge.config import TrainConfig
from dimefm_edge.optimizer import build_optimizer, count_steps, learning_rate
from dimefm_edge.students import build_student, vit_spec

SPEC = vit_spec(image_size=16, embed_dim=16, patch_size=8, width=32, depth=2, num_heads=2)


def test_the_schedule_is_the_papers() -> None:
    train = TrainConfig(lr=8e-4, min_lr_ratio=0.05, warmup_ratio=0.04)
    rates = [learning_rate(step, 1000, train) for step in range(1001)]
    assert rates[0] == pytest.approx(4e-6)
    assert max(rates) == rates[40] == pytest.approx(8e-4)
    assert rates[1000] == pytest.approx(4e-5)
    assert all(a < b for a, b in itertools.pairwise(rates[:41]))
    assert all(a >= b for a, b in itertools.pairwise(rates[40:]))
    assert count_steps(TrainConfig(epochs=2, batch_size=10), 105) == 21
    assert count_steps(TrainConfig(steps=7), 105) == 7


def test_biases_norms_and_embeddings_are_not_decayed() -> None:
    student = build_student(SPEC)
    optimizer = build_optimizer(student, TrainConfig(weight_decay=0.05))
    decayed, plain = optimizer.param_groups
    assert (decayed["weight_decay"], plain["weight_decay"]) == (0.05, 0.0)
    by_id = {id(p): name for name, p in student.named_parameters()}
    plain_names = [by_id[id(p)] for p in plain["params"]]
    assert any("pos_embed" in name for name in plain_names)
    assert any("cls_token" in name for name in plain_names)
    assert all(p.ndim >= 2 for p in decayed["params"])
    assert len(decayed["params"]) + len(plain["params"]) == len(by_id)


def test_a_table_of_tokens_is_not_decayed() -> None:
    student = torch.nn.Sequential(torch.nn.Embedding(5, 4), torch.nn.Linear(4, 4, bias=False))
    decayed, plain = build_optimizer(student, TrainConfig()).param_groups
    assert decayed["params"] == [student[1].weight]
    assert plain["params"] == [student[0].weight]
