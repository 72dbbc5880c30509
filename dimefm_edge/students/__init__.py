"""Students: what can be trained, how one is described, saved and loaded.

A `StudentSpec` is plain data; `build_student` makes the module. One architecture per file:
vit.py, hybrid.py, timm_model.py. Nothing here imports torch until a student is built.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dimefm_edge.errors import CheckpointError, ConfigError, DimeFMError, lookup
from dimefm_edge.files import atomic_file
from dimefm_edge.preprocess import PreprocessSpec

if TYPE_CHECKING:
    from torch import Tensor, nn

CHECKPOINT_FILE = "checkpoint.safetensors"
_FORMATS = {"student": "dimefm_edge.student/1", "int8 student": "dimefm_edge.int8_student/1"}


@dataclass(frozen=True)
class StudentSpec:
    """What a student is: enough to build it with random weights."""

    name: str
    """For people: `vit-p8-w192-d3`."""
    family: str
    """A key of `STUDENTS`."""
    image_size: int
    """Side of the square input, in pixels."""
    embed_dim: int
    """Size E of the embeddings: the teacher's."""
    args: dict[str, Any] = field(default_factory=dict, hash=False)
    """The family's own settings."""

    def __post_init__(self) -> None:
        for name in ("image_size", "embed_dim"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or not 0 < value <= 65536:
                raise ConfigError(f"student {self.name}: {name} must be 1 to 65536, got {value!r}")

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> StudentSpec:
        """Rebuild from `to_dict`.

        Raises:
            ConfigError: If a field is missing, unknown or of the wrong type.
        """
        kinds = {"name": str, "family": str, "image_size": int, "embed_dim": int, "args": dict}
        wrong = sorted(set(kinds) ^ set(values)) or sorted(
            k for k, kind in kinds.items() if not isinstance(values[k], kind)
        )
        if wrong:
            raise ConfigError(f"not a student spec: {', '.join(wrong)} missing, unknown or wrong")
        return cls(**values)


@dataclass(frozen=True)
class Family:
    """One architecture family."""

    title: str
    build: Callable[[StudentSpec, bool], nn.Module]
    """(spec, pretrained) -> (B, 3, S, S) float to (B, E), L2-normalised."""


@dataclass(frozen=True)
class LoadedStudent:
    """A trained student, in eval mode on the CPU."""

    student: nn.Module
    spec: StudentSpec
    preprocess: PreprocessSpec
    metadata: dict[str, str]


def _build_vit(spec: StudentSpec, pretrained: bool) -> nn.Module:
    from dimefm_edge.students.vit import build_vit

    _refuse_pretrained(spec, pretrained)
    return build_vit(spec)


def _build_hybrid(spec: StudentSpec, pretrained: bool) -> nn.Module:
    from dimefm_edge.students.hybrid import build_hybrid

    _refuse_pretrained(spec, pretrained)
    return build_hybrid(spec)


def _build_timm(spec: StudentSpec, pretrained: bool) -> nn.Module:
    from dimefm_edge.students.timm_model import build_timm_model

    return build_timm_model(spec, pretrained=pretrained)


STUDENTS: dict[str, Family] = {
    "vit": Family("vision transformer, can inherit from a CLIP ViT teacher", _build_vit),
    "hybrid": Family("convolutions, attention in the last stage (FastViT)", _build_hybrid),
    "convnet": Family("convolutions only (FastViT without attention)", _build_hybrid),
    "timm": Family("any timm model: timm:NAME", _build_timm),
}

STAGED_FAMILIES = ("hybrid", "convnet")
"""Those of four stages, which hybrid.py builds."""

NAMED_STUDENTS: dict[str, dict[str, Any]] = {
    "vit-nano": {"width": 128, "depth": 4, "num_heads": 4},
    "vit-micro": {"width": 192, "depth": 6, "num_heads": 6},
    "vit-tiny": {"width": 192, "depth": 12, "num_heads": 3},
    "vit-small": {"width": 384, "depth": 12, "num_heads": 6},
    "vit-base": {"width": 768, "depth": 12, "num_heads": 12},
    "hybrid-nano": {"width": 32, "depth": (1, 1, 2, 1)},
    "hybrid-tiny": {"width": 48, "depth": (2, 2, 4, 2)},
    "hybrid-small": {"width": 64, "depth": (2, 2, 6, 2)},
    "convnet-nano": {"width": 32, "depth": (1, 1, 2, 1)},
    "convnet-tiny": {"width": 48, "depth": (2, 2, 4, 2)},
    "convnet-small": {"width": 64, "depth": (2, 2, 6, 2)},
}
"""Fixed sizes by name, for comparisons; `fit` makes its own."""

_VIT_NAME = re.compile(r"vit-p(\d+)-w(\d+)-d(\d+)")
_STAGED_NAME = re.compile(
    rf"({'|'.join(STAGED_FAMILIES)})-w(\d+)-d(\d+)\.(\d+)\.(\d+)\.(\d+)(?:-k(\d+))?(?:-(relu))?"
)


def student_spec(name: str, *, image_size: int, embed_dim: int) -> StudentSpec:
    """The spec of a student by name.

    Args:
        name: A key of `NAMED_STUDENTS`; a shape, as `fit` names what it makes: patch, width and
            depth (`vit-p16-w192-d6`), or width and the depths of four stages
            (`hybrid-w32-d1.1.2.1`, `convnet-w32-d1.1.2.1`), `-k5` for mixers of 5 x 5 instead of
            3 x 3, `-relu` for ReLUs instead of GELUs; or a timm model, `timm:NAME`.
        image_size: Side of the input, in pixels.
        embed_dim: Size of the embeddings.

    Raises:
        UnknownNameError: If the name is not known; the message offers the nearest.
    """
    sizes: dict[str, Any] = {"image_size": image_size, "embed_dim": embed_dim}
    if name.startswith("timm:"):
        args = {"model": name.removeprefix("timm:")}
        return StudentSpec(name, "timm", image_size, embed_dim, args)
    if shape := _VIT_NAME.fullmatch(name):
        patch, width, depth = map(int, shape.groups())
        return vit_spec(
            **sizes, patch_size=patch, width=width, depth=depth, num_heads=heads_for(width)
        )
    if shape := _STAGED_NAME.fullmatch(name):
        family, *counts, kernel, act = shape.groups()
        width, *depths = map(int, counts)
        end: dict[str, Any] = {"kernel": int(kernel or 3), "act": act or "gelu"}
        return _staged_spec(family, **sizes, width=width, depth=(*depths,), **end)
    values = dict(lookup(NAMED_STUDENTS, name, kind="student"))
    family = name.split("-")[0]
    if family == "vit":
        return vit_spec(**sizes, patch_size=patch_for(image_size), **values)
    return _staged_spec(family, **sizes, **values)


def is_student_name(name: str) -> bool:
    """Whether `student_spec` would take it for one of its own."""
    is_shape = any(shape.fullmatch(name) for shape in (_VIT_NAME, _STAGED_NAME))
    return is_shape or name in NAMED_STUDENTS or name.startswith("timm:")


def heads_for(width: int) -> int:
    """Heads of a ViT of that width: of 32 channels while it is narrow, else of 64 as ViT-B."""
    return max(1, width // (32 if width < 256 else 64))


def patch_for(image_size: int) -> int:
    """A patch size, in pixels, that gives small images enough tokens: 8 x 8 or more."""
    return next((p for p in (16, 8, 4) if image_size >= 8 * p and image_size % p == 0), 2)


def vit_spec(
    *,
    image_size: int,
    embed_dim: int,
    patch_size: int,
    width: int,
    depth: int,
    num_heads: int,
    mlp_ratio: float = 4.0,
    act: str = "gelu",
) -> StudentSpec:
    """Describe a ViT student; `act` is gelu or quick_gelu (OpenAI's checkpoints)."""
    args = {
        "patch_size": patch_size,
        "width": width,
        "depth": depth,
        "num_heads": num_heads,
        "mlp_ratio": float(mlp_ratio),
        "act": act,
    }
    return StudentSpec(f"vit-p{patch_size}-w{width}-d{depth}", "vit", image_size, embed_dim, args)


def hybrid_spec(**shape: Any) -> StudentSpec:
    """Describe a hybrid student.

    Args:
        shape: image_size and embed_dim; width, channels of the first stage; depth, blocks of the
            four stages; kernel, side of the mixers' in elements (odd; default: 3); act, gelu (the
            default) or relu.
    """
    return _staged_spec("hybrid", **shape)


def convnet_spec(**shape: Any) -> StudentSpec:
    """Describe a convolutional student: as `hybrid_spec`, without attention."""
    return _staged_spec("convnet", **shape)


def _staged_spec(
    family: str,
    *,
    image_size: int,
    embed_dim: int,
    width: int,
    depth: tuple[int, ...],
    kernel: int = 3,
    act: str = "gelu",
) -> StudentSpec:
    name = f"{family}-w{width}-d{'.'.join(map(str, depth))}"
    args: dict[str, Any] = {"width": width, "depth": list(depth)}
    if kernel != 3:  # settings that older checkpoints do not have
        name, args["kernel"] = f"{name}-k{kernel}", kernel
    if act != "gelu":
        name, args["act"] = f"{name}-{act}", act
    return StudentSpec(name, family, image_size, embed_dim, args)


def build_student(spec: StudentSpec, *, pretrained: bool = False) -> nn.Module:
    """Build a student: random weights, or timm's own.

    Args:
        spec: What to build.
        pretrained: Ask timm for weights; `timm:NAME` students only.

    Returns:
        A module in train mode: image (B, 3, S, S) float, preprocessed -> image_embeds (B, E)
        float32, L2-normalised.

    Raises:
        UnknownNameError: If the family, or the timm model, is not known.
        ConfigError: If the spec's settings contradict each other.
        DimeFMError: If pretrained weights cannot be had.
    """
    return lookup(STUDENTS, spec.family, kind="student family").build(spec, pretrained)


def save_student(
    path: Path,
    student: nn.Module,
    spec: StudentSpec,
    preprocess: PreprocessSpec,
    metadata: dict[str, str],
    *,
    kind: str = "student",
) -> None:
    """Write one safetensors file, atomically: weights, spec, preprocessing and metadata.

    `kind` says what reads it: `load_student`, or quantize/checkpoint.py for an `int8 student`.

    Raises:
        DimeFMError: If it cannot be written, a full disk say; the old file then stays.
    """
    header = {
        "format": _FORMATS[kind],
        "spec": json.dumps(spec.to_dict()),
        "preprocess": json.dumps(preprocess.to_dict()),
        "metadata": json.dumps(metadata),
    }
    write_safetensors(path, student, header)


def write_safetensors(path: Path, module: nn.Module, header: dict[str, str]) -> None:
    """Write a module's weights and what is said of them, atomically.

    Raises:
        DimeFMError: If it cannot be written; the old file then stays.
    """
    from safetensors.torch import save

    tensors = {k: v.detach().cpu().contiguous() for k, v in module.state_dict().items()}
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_file(path) as stream:  # safetensors' own file is for its owner only
            stream.write(save(tensors, metadata=header))
    except OSError as error:
        raise DimeFMError(
            f"cannot write {path}: {error}", hint="free some space, or name another --out"
        ) from error


def load_student(path: Path | str) -> LoadedStudent:
    """Load a student from its file or from its run folder.

    Raises:
        CheckpointError: If the file is missing, truncated, not a student of ours, or does not
            hold the weights that its spec asks for.
    """
    return load_checkpoint(path, "student", _build)


def _build(spec: StudentSpec, tensors: dict[str, Tensor], _metadata: dict[str, str]) -> nn.Module:
    student = build_student(spec)
    student.load_state_dict(tensors)
    return student


def load_checkpoint(
    path: Path | str,
    kind: str,
    build: Callable[[StudentSpec, dict[str, Tensor], dict[str, str]], nn.Module],
) -> LoadedStudent:
    """Load what `save_student` wrote.

    Args:
        path: The file, or the run folder that it is in.
        kind: As it was saved.
        build: Makes the module of its spec, its weights and its metadata.

    Raises:
        CheckpointError: As `load_student`.
    """
    path = Path(path).expanduser()
    path = path / CHECKPOINT_FILE if path.is_dir() else path
    tensors, header = read_safetensors(path)
    if header.get("format") != _FORMATS[kind]:
        raise CheckpointError(
            f"{path} is a safetensors file, but not a{'n' * (kind[0] in 'aeiou')} {kind} of "
            "dimefm_edge",
            hint="name a run folder or its checkpoint.safetensors",
        )
    try:
        spec = StudentSpec.from_dict(json.loads(header["spec"]))
        preprocess = PreprocessSpec.from_dict(json.loads(header["preprocess"]))
        metadata = {str(k): str(v) for k, v in json.loads(header["metadata"]).items()}
        student = build(spec, tensors, metadata)
    except (KeyError, TypeError, ValueError, AttributeError, RuntimeError, DimeFMError) as error:
        reason = str(error).splitlines()[0]
        raise CheckpointError(
            f"{path} is damaged: its weights and its description disagree ({reason})",
            hint="copy it again, or train again with --resume from an earlier checkpoint",
        ) from error
    return LoadedStudent(student.eval(), spec, preprocess, metadata)


def read_safetensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The weights of a safetensors file, and what is said of them.

    Raises:
        CheckpointError: If it is missing, truncated or of another kind.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as reader:
            tensors = {key: reader.get_tensor(key) for key in reader.keys()}  # noqa: SIM118
            return tensors, reader.metadata() or {}
    except FileNotFoundError as error:
        raise CheckpointError(
            f"no checkpoint at {path}", hint="dimefm-edge distill writes one into its run folder"
        ) from error
    except (SafetensorError, OSError) as error:
        raise CheckpointError(
            f"{path} is truncated or not a safetensors file: {error}",
            hint="copy it again, or continue the run with --resume",
        ) from error


def _refuse_pretrained(spec: StudentSpec, pretrained: bool) -> None:
    if pretrained:
        raise ConfigError(
            f"student {spec.name} has no pretrained weights: only timm:NAME students do",
            hint="--student timm:NAME, or --init teacher, or --init random",
        )
