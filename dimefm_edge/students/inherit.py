"""A student's first weights from its teacher: a ViT's layers, or a choice of a larger network's.

ViTs take whole layers, of a wider teacher evenly spaced heads and channels (vit.py). A ResNet or
FastViT student takes from a larger teacher of its class what has the same name, evenly spaced
channels of it where the teacher is wider ("weight selection", arXiv 2311.18823); blocks that the
student lacks are left out, which residual networks bear well (arXiv 1605.06431), and so are the
activations and squeeze-and-excitation of MobileCLIP's downsampling. It takes all or nothing: every
tensor must have its counterpart, in a module of the same kind, kernel and grouping. Other networks
join channels end to end or give them to heads, which evenly spaced ones would tear apart.
"""

from __future__ import annotations

from typing import Any

import torch
from timm.layers.squeeze_excite import SqueezeExcite
from timm.models.fastvit import Attention, FastVit
from timm.models.resnet import ResNet
from torch import Tensor, nn

from dimefm_edge.students import StudentSpec, build_student
from dimefm_edge.students.student import Student
from dimefm_edge.students.vit import evenly_spaced, head_rows, inherit_layers

_SELECTABLE = (ResNet, FastVit)


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


def can_inherit(spec: StudentSpec, teacher_image_tower: nn.Module) -> bool:
    """Whether `inherit_from_teacher` would find something for a student that is not built yet.

    Of ViTs `fit` knows it by their shape; this is for the rest.
    """
    trunk = getattr(teacher_image_tower, "trunk", None)
    if type(trunk) not in _SELECTABLE:
        return False
    with torch.device("meta"):
        student = build_student(spec)
    return _has_all_of(trunk, student)


@torch.no_grad()
def select_weights(student: nn.Module, teacher_image_tower: nn.Module) -> list[str]:
    """Weight selection: see the top; the projection too where the embeddings are of one size.

    Returns:
        Names of the student's tensors that were copied; empty, and the student untouched, if
        the trunks are not of one of those classes, or a tensor has no counterpart.
    """
    trunk: Any = getattr(teacher_image_tower, "trunk", None)
    if type(trunk) not in _SELECTABLE or not _has_all_of(trunk, student):
        return []
    source = {f"trunk.{name}": value for name, value in trunk.state_dict().items()}
    source |= _projection(teacher_image_tower)
    state = student.state_dict()
    projection = source.get("proj.weight")
    if projection is None or not _is_within(state["proj.weight"], projection):
        del state["proj.weight"]
    chosen = _Choice(student, trunk)
    for name, value in state.items():
        value.copy_(chosen.part(source[name], name, value.shape))
    return list(state)


class _Choice:
    """Which channels and heads of a wider trunk a student takes: evenly spaced ones."""

    def __init__(self, student: Any, trunk: Any) -> None:
        parts = dict(trunk.named_modules())
        self._heads = {
            f"trunk.{name}": (part.num_heads, parts[name].num_heads, part.head_dim)
            for name, part in student.trunk.named_modules()
            if isinstance(part, Attention)
        }
        # Of FastViT's first stage: the others are 2, 4 and 8 times as wide, and their depthwise
        # convolutions make two channels of one, which must stay together.
        self._widths: tuple[int, ...] = (1, 1)
        if type(trunk) is FastVit:
            stems: list[Any] = [student.trunk.stem, trunk.stem]
            self._widths = tuple(stem[0].out_chs for stem in stems)

    def part(self, theirs: Tensor, name: str, shape: torch.Size) -> Tensor:
        """What a tensor of that name and shape takes of the teacher's."""
        owner, _, layer = name.rpartition(".")[0].rpartition(".")
        of_heads = {"qkv": 0, "proj": 1}.get(layer) if owner in self._heads else None
        for axis, (size, full) in enumerate(zip(shape, theirs.shape, strict=True)):
            if size == full:
                continue
            if axis == of_heads:
                index = head_rows(*self._heads[owner], parts=3 if layer == "qkv" else 1)
            else:
                index = self._channels(size, full)
            theirs = theirs.index_select(axis, index.to(theirs.device))
        return theirs

    def _channels(self, size: int, full: int) -> Tensor:
        own, whole = self._widths
        together = size // own if size * whole == full * own and size % own == 0 else 1
        return evenly_spaced(size, full, together=together)


def _has_all_of(trunk: Any, student: nn.Module) -> bool:
    """Whether a teacher's trunk has a counterpart of everything in a student's."""
    own: Any = student.trunk if isinstance(student, Student) else None
    return type(own) is type(trunk) and _is_part_of(own, trunk)


def _is_part_of(mine: nn.Module, theirs: nn.Module) -> bool:
    """Whether every module with tensors has a larger one of its kind, by name."""
    others = dict(theirs.named_modules())
    for name, part in mine.named_modules():
        other = others.get(name)
        if isinstance(part, nn.Identity) and _can_be_left_out(name, other):
            continue
        if other is None or type(part) is not type(other) or not _has_like_heads(part, other):
            return False
        larger = _tensors(other)
        if any(n not in larger or not _is_within(v, larger[n]) for n, v in _tensors(part).items()):
            return False
        if isinstance(part, nn.Conv2d) and _grouping(part) != _grouping(other):
            return False
    return True


def _can_be_left_out(name: str, theirs: nn.Module | None) -> bool:
    """Whether a student may do nothing where a teacher has a module: an activation, squeeze and
    excitation, or its projection, which the student has elsewhere."""
    if theirs is None or isinstance(theirs, SqueezeExcite) or name == "head.fc":
        return True
    return not theirs.state_dict()


def _has_like_heads(mine: nn.Module, theirs: Any) -> bool:
    """Whether heads, where there are any, can be taken whole."""
    if not hasattr(mine, "num_heads"):
        return True
    return isinstance(mine, Attention) and mine.head_dim == theirs.head_dim


def _tensors(part: nn.Module) -> dict[str, Tensor]:
    """A module's own, not those of its parts."""
    return dict(part.named_parameters(recurse=False)) | dict(part.named_buffers(recurse=False))


def _grouping(conv: nn.Module) -> str:
    groups, channels = int(conv.groups), int(conv.in_channels)  # type: ignore[arg-type]
    return "none" if groups == 1 else "depthwise" if groups == channels else f"{groups}"


def _projection(tower: nn.Module) -> dict[str, Tensor]:
    """The last linear layer, as a student names it; a bias is left out."""
    for name in ("proj", "head.proj", "trunk.head.fc"):
        try:
            layer = tower.get_submodule(name)
        except AttributeError:
            continue
        if isinstance(layer, nn.Linear):
            return {"proj.weight": layer.weight}
    return {}


def _is_within(mine: Tensor, theirs: Tensor) -> bool:
    """As many channels or fewer; of kernels the same size."""
    return (
        mine.ndim == theirs.ndim
        and all(m <= t for m, t in zip(mine.shape, theirs.shape, strict=True))
        and mine.shape[2:] == theirs.shape[2:]
    )
