"""Who inherits from whom and which layers, by shape: ViTs and text transformers. No torch here."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def is_heir(mine: Mapping[str, Any], teacher: Mapping[str, Any]) -> bool:
    """Whether a ViT can inherit from another: alike, with heads of one size, and no larger.

    Args:
        mine: Its spec's args.
        teacher: The other one's, or what `vit_geometry` says of a teacher.
    """
    head_dim, theirs = (g["width"] / g["num_heads"] for g in (mine, teacher))
    is_alike = all(mine[key] == teacher[key] for key in ("patch_size", "act"))
    # Of a hidden unit: a ratio may be of a width that it does not give whole units of.
    is_alike &= abs(mine["mlp_ratio"] - teacher["mlp_ratio"]) * mine["width"] < 1
    is_within = all(mine[key] <= teacher[key] for key in ("width", "depth"))
    return is_alike and is_within and head_dim == theirs


def inherited_layers(student_depth: int, teacher_depth: int) -> list[int]:
    """Which teacher layers a student takes: evenly spaced, first and last included."""
    if student_depth == 1:
        return [teacher_depth - 1]
    step = (teacher_depth - 1) / (student_depth - 1)
    return [round(i * step) for i in range(student_depth)]


def layers_share(mine: Mapping[str, Any], teacher: Mapping[str, Any] | None) -> float | None:
    """How many of the teacher's layers a ViT has, as a share; None of others.

    Args:
        mine: Its spec's args.
        teacher: As for `is_heir`; None if it is no ViT.
    """
    if teacher is None or not isinstance(mine.get("depth"), int):
        return None
    return float(mine["depth"] / teacher["depth"])
