"""A student's first weights from its teacher: a ViT's layers, or a choice of a larger network's.

ViTs of one width take whole layers (vit.py). A convolutional student takes from a teacher of its
own class what has the same name, evenly spaced channels of it where the teacher is wider ("weight
selection", arXiv 2311.18823); blocks that the student lacks are left out, which residual
networks bear well (arXiv 1605.06431). Where there is attention channels belong to heads, and
nothing is taken.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from dimefm_edge.students.student import Student
from dimefm_edge.students.vit import inherit_layers

_LEAST_SHARE = 0.5
"""Of a student's tensors; below it, teacher and student are alike in name only."""


def inherit_from_teacher(student: nn.Module, teacher_image_tower: nn.Module) -> list[str]:
    """Copy what the teacher's weights have for a student, in place.

    Args:
        student: Changed in place.
        teacher_image_tower: An open_clip image tower, or a student.

    Returns:
        What was inherited, by name; empty, and the student untouched, if the two are of
        different kinds.
    """
    return inherit_layers(student, teacher_image_tower) or select_weights(
        student, teacher_image_tower
    )


@torch.no_grad()
def select_weights(student: nn.Module, teacher_image_tower: nn.Module) -> list[str]:
    """Weight selection: see the top; the projection too where the embeddings are of one size.

    Returns:
        Names of the student's tensors that were copied; empty, and the student untouched, if
        the trunks are of different classes or attend, or if less than half has a counterpart.
    """
    trunk = getattr(teacher_image_tower, "trunk", None)
    if not isinstance(student, Student) or type(student.trunk) is not type(trunk):
        return []
    if any(hasattr(part, "num_heads") for part in student.trunk.modules()):
        return []
    source = {f"trunk.{name}": value for name, value in trunk.state_dict().items()}
    source |= _projection(teacher_image_tower)
    state = student.state_dict()
    chosen = {
        name: _evenly_spaced(source[name], value)
        for name, value in state.items()
        if name in source and _is_within(value, source[name])
    }
    if len(chosen) < _LEAST_SHARE * len(state):
        return []
    for name, value in chosen.items():
        state[name].copy_(value)
    return list(chosen)


def _projection(tower: nn.Module) -> dict[str, Tensor]:
    """The last linear layer without bias, as a student names it."""
    for name in ("proj", "head.proj"):
        try:
            layer = tower.get_submodule(name)
        except AttributeError:
            continue
        if isinstance(layer, nn.Linear) and layer.bias is None:
            return {"proj.weight": layer.weight}
    return {}


def _is_within(mine: Tensor, theirs: Tensor) -> bool:
    return mine.ndim == theirs.ndim and all(
        m <= t for m, t in zip(mine.shape, theirs.shape, strict=True)
    )


def _evenly_spaced(theirs: Tensor, mine: Tensor) -> Tensor:
    """Evenly spaced indices of every axis; those of one width are the same everywhere."""
    for axis, (size, full) in enumerate(zip(mine.shape, theirs.shape, strict=True)):
        if size < full:
            index = torch.arange(size, device=theirs.device) * full // size
            theirs = theirs.index_select(axis, index)
    return theirs
