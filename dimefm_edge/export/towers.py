"""A teacher's image tower as what `export_student` takes: it is no student, and says so."""

from __future__ import annotations

import re
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from dimefm_edge.encoders import Normalised

if TYPE_CHECKING:
    from torch import nn

    from dimefm_edge.preprocess import PreprocessSpec
    from dimefm_edge.teacher import Teacher


@dataclass(frozen=True)
class TeacherSpec:
    """What an exported teacher is: a model of open_clip, by name."""

    name: str
    """Safe as a file name."""
    image_size: int
    embed_dim: int
    family: str = "open_clip"

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True, eq=False)
class LoadedTeacher:
    """A teacher's image tower in the place of a `LoadedStudent`."""

    student: nn.Module
    """(B, 3, S, S) float, preprocessed -> (B, E), L2-normalised."""
    spec: TeacherSpec
    preprocess: PreprocessSpec


def image_tower(teacher: Teacher) -> LoadedTeacher:
    """Take a teacher's image tower, made to answer in unit length, with its preprocessing."""
    spec = TeacherSpec(file_name_of(teacher.name), teacher.preprocess.image_size, teacher.embed_dim)
    return LoadedTeacher(Normalised(teacher.image_tower), spec, teacher.preprocess)


def file_name_of(teacher: str) -> str:
    """A teacher's name as a file name: `ViT-B-32:/my/clip.pt` becomes `ViT-B-32-clip`."""
    parts = [re.split(r"[/\\]", part.rstrip("/\\"))[-1] for part in teacher.split(":")]
    name = re.sub(r"\.(pt|pth|bin|safetensors)$", "", "-".join(filter(None, parts)))
    return re.sub(r"[^\w.-]+", "-", name, flags=re.ASCII).strip("-.") or "teacher"
