"""The optimiser of distillation and its schedule, as in DIME-FM (arXiv 2303.18232)."""

from __future__ import annotations

import math

import torch
from torch import nn

from dimefm_edge.config import DEFAULT_EPOCHS, TrainConfig

_UNDECAYED = ("pos_embed", "cls_token", "embedding", "gamma")


def count_steps(train: TrainConfig, num_images: int) -> int:
    """Optimiser steps of a run over `num_images` images."""
    epochs = DEFAULT_EPOCHS if train.epochs is None else train.epochs
    return train.steps or max(1, round(epochs * num_images / train.batch_size))


def learning_rate(step: int, total_steps: int, train: TrainConfig) -> float:
    """Linear warm-up from lr / 200, then cosine to lr * min_lr_ratio (the paper's schedule)."""
    warmup = max(1, round(train.warmup_ratio * total_steps))
    if step < warmup:
        return train.lr * (1 / 200 + (1 - 1 / 200) * step / warmup)
    progress = (step - warmup) / max(1, total_steps - warmup)
    floor = train.lr * train.min_lr_ratio
    return floor + (train.lr - floor) * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))


def build_optimizer(student: nn.Module, train: TrainConfig) -> torch.optim.AdamW:
    """AdamW; biases, norms, layer scales and embeddings are not decayed."""
    decayed: list[nn.Parameter] = []
    plain: list[nn.Parameter] = []
    tables = {part.weight for part in student.modules() if isinstance(part, nn.Embedding)}
    for name, parameter in student.named_parameters():
        is_plain = parameter.ndim < 2 or name.endswith(_UNDECAYED) or parameter in tables
        (plain if is_plain else decayed).append(parameter)
    groups = [
        {"params": decayed, "weight_decay": train.weight_decay},
        {"params": plain, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=train.lr, betas=(0.9, 0.999), fused=True)
