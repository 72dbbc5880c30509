"""Anything that embeds images, by name or path: a teacher, a run, a bundle, an exported graph.

`eval` and `bench` take any of them and need not know which it is. torch is imported for
teachers and runs only.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import numpy.typing as npt

from dimefm_edge.errors import CheckpointError, InputError, lookup
from dimefm_edge.labels import LabelBank, build_label_bank
from dimefm_edge.manifest import IMAGE_INPUTS, MANIFEST_FILE
from dimefm_edge.preprocess import PreprocessSpec

if TYPE_CHECKING:
    from dimefm_edge.runtime.bundle import Bundle
    from dimefm_edge.runtime.engines import Engine

EncodePixels = Callable[[npt.NDArray[np.uint8]], npt.NDArray[np.float32]]
EncodeTexts = Callable[[Sequence[str]], npt.NDArray[np.float32]]
SubjectKind = Literal["teacher", "run", "bundle", "onnx"]

_CHECKPOINT_FILE = "checkpoint.safetensors"
_MARKS = (_CHECKPOINT_FILE, MANIFEST_FILE, "open_clip_config.json")


@dataclass(frozen=True)
class Subject:
    """Something that embeds images, ready to be asked."""

    kind: SubjectKind
    name: str
    """What the user typed."""
    preprocess: PreprocessSpec
    embed_dim: int
    encode_pixels: EncodePixels
    """(B, S, S, 3) uint8, resized, RGB -> (B, E) float32, L2-normalised."""
    logit_scale: float
    """Exponentiated."""
    label_banks: dict[str, LabelBank] = field(default_factory=dict)
    """Class names embedded at export; bundles only."""
    encode_texts: EncodeTexts | None = None
    """Sentences -> (B, E) float32, L2-normalised; None where there is no text side."""
    size_mib: float | None = None
    """Of the model's file; None for teachers."""
    params_m: float | None = None
    """Of the image tower, in millions; None for bundles and graphs, whose file says it."""
    owner: object = None
    """Kept alive with it: the files of a zipped bundle last as long as the bundle."""


def subject_kind(name: str) -> SubjectKind:
    """Tell what a name or path is, from the files there; anything else names a teacher.

    Raises:
        InputError: If the name is empty.
    """
    if not name:
        raise InputError("no model was named", hint="a run, a bundle, an ONNX file or a teacher")
    path = Path(name).expanduser()
    if path.suffix == ".onnx":
        return "onnx"
    if path.suffix == ".zip" or (path / MANIFEST_FILE).is_file():
        return "bundle"
    if (path / _CHECKPOINT_FILE).is_file() or path.name == _CHECKPOINT_FILE:
        return "run"
    return "teacher"


def load_subject(
    name_or_path: str | Path, *, device: str | None = None, engine: str = "onnxruntime"
) -> Subject:
    """Load a teacher, run, bundle or exported graph.

    Args:
        name_or_path: A run folder or its checkpoint, a bundle's folder or `.zip`, a
            `model.onnx` that we exported, or whatever `load_teacher` takes.
        device: For teachers and runs, such as `cuda`; default: a GPU where there is one.
        engine: For bundles: what `load_engine` takes.

    Raises:
        CheckpointError: If it is missing or damaged.
        UnknownNameError: If it is neither a path nor a teacher's name.
        InputError: If the name is empty.
    """
    name = str(name_or_path)
    path = Path(name).expanduser()
    if name and path.is_dir() and not any((path / file).is_file() for file in _MARKS):
        nested = path / "bundle"
        raise CheckpointError(
            f"{path} holds no model: none of {', '.join(_MARKS)}",
            hint=str(nested) if nested.is_dir() else "a run, a bundle, or a teacher's folder",
        )
    kind = subject_kind(name)
    if kind == "bundle":
        from dimefm_edge.runtime import load_bundle, load_engine

        bundle = load_bundle(path)
        return bundle_subject(bundle, load_engine(bundle, engine=engine), name=name)
    if engine != "onnxruntime":
        raise InputError(
            f"{name} is a {kind}; --engine {engine} runs bundles only",
            hint="export it, build the bundle, and name the bundle",
        )
    loaders: dict[SubjectKind, Callable[[str, str | None], Subject]] = {
        "onnx": _load_onnx,
        "run": _load_run,
        "teacher": _load_teacher,
    }
    return loaders[kind](name, device)


def onnx_metadata(path: Path) -> tuple[PreprocessSpec, int, float, str, str]:
    """What a graph of ours carries.

    Returns:
        Preprocessing, embedding size, logit scale, kind of input, precision.

    Raises:
        CheckpointError: If the file is missing, no ONNX graph, or not exported by us.
        MissingExtraError: If ONNX Runtime is not installed.
    """
    from dimefm_edge.runtime.onnxruntime import graph_metadata

    if not path.is_file():
        raise CheckpointError(f"no ONNX file at {path}", hint="check the path")
    values = graph_metadata(path)
    try:
        mean, std = (tuple(float(v) for v in values[key].split(",")) for key in ("mean", "std"))
        preprocess = PreprocessSpec.from_dict(
            {
                "image_size": int(values["image_size"]),
                "mean": mean,
                "std": std,
                "interpolation": values["interpolation"],
                "resize_mode": values["resize_mode"],
                "fill_color": int(values.get("fill_color", 0)),
            }
        )
        image_input = values.get("image_input", "float")
        lookup(dict.fromkeys(IMAGE_INPUTS), image_input, kind="input of a graph")
        scale, precision = float(values["logit_scale"]), values.get("precision", "fp32")
        return preprocess, int(values["embed_dim"]), scale, image_input, precision
    except (KeyError, ValueError) as error:
        raise CheckpointError(
            f"{path} does not say how images are prepared: it was not exported by dimefm_edge",
            hint=f"dimefm-edge bench {path}  (times any ONNX file)",
        ) from error


def bundle_subject(bundle: Bundle, engine: Engine, *, name: str | None = None) -> Subject:
    """A bundle as a subject, run by an engine that is loaded; `name` is what the user typed."""
    return Subject(
        "bundle",
        name or str(bundle.path),
        bundle.preprocess,
        bundle.embed_dim,
        engine.encode_pixels,
        bundle.logit_scale,
        label_banks=bundle.label_banks,
        encode_texts=_bundle_texts(bundle),
        size_mib=bundle.size_mib,
        owner=bundle,
    )


def _bundle_texts(bundle: Bundle) -> EncodeTexts | None:
    """A bundle's text side, loaded when it is first asked."""
    from dimefm_edge.runtime import load_text_encoder

    if bundle.text is None:
        return None
    encoder = functools.cache(lambda: load_text_encoder(bundle))
    return lambda sentences: encoder().encode_texts(sentences)


def _load_onnx(name: str, device: str | None) -> Subject:
    from dimefm_edge.runtime.onnxruntime import OnnxRuntimeEngine

    path = Path(name).expanduser()
    preprocess, embed_dim, logit_scale, image_input, precision = onnx_metadata(path)
    engine = OnnxRuntimeEngine(
        path, preprocess=preprocess, embed_dim=embed_dim, image_input=image_input,
        precision=precision,
    )  # fmt: skip
    return Subject(
        "onnx",
        name,
        preprocess,
        embed_dim,
        engine.encode_pixels,
        logit_scale,
        size_mib=path.stat().st_size / 2**20,
    )


def _load_run(name: str, device: str | None) -> Subject:
    import torch

    from dimefm_edge.encoders import module_encoder
    from dimefm_edge.students import load_student

    path = Path(name).expanduser()
    loaded = load_student(path)
    where = device or ("cuda" if torch.cuda.is_available() else "cpu")
    file = path / _CHECKPOINT_FILE if path.is_dir() else path
    return Subject(
        "run",
        name,
        loaded.preprocess,
        loaded.spec.embed_dim,
        module_encoder(loaded.student.to(where), loaded.preprocess),
        run_logit_scale(loaded.metadata, name),
        encode_texts=_TextSide(loaded.metadata, name, device, file.parent),
        size_mib=file.stat().st_size / 2**20,
        params_m=sum(p.numel() for p in loaded.student.parameters()) / 1e6,
    )


def _load_teacher(name: str, device: str | None) -> Subject:
    from dimefm_edge.teacher import load_teacher

    teacher = load_teacher(name, device=device)
    return Subject(
        "teacher",
        name,
        teacher.preprocess,
        teacher.embed_dim,
        teacher.encode_images,
        teacher.logit_scale,
        encode_texts=teacher.encode_texts,
        params_m=sum(p.numel() for p in teacher.image_tower.parameters()) / 1e6,
    )


def label_bank_of(
    subject: Subject,
    name: str,
    classnames: tuple[str, ...],
    templates: tuple[str, ...],
    encode_texts: EncodeTexts | None = None,
) -> LabelBank:
    """A test set's class names as embeddings: embedded now, else those that the bundle carries.

    Args:
        subject: Whose they are.
        name: Of the set.
        classnames: Its classes.
        templates: Sentences with `{c}`.
        encode_texts: The text side, where there is one.

    Raises:
        CheckpointError: If there is neither a text side nor a label set of those classes.
    """
    if encode_texts is not None:
        return build_label_bank(name, classnames, templates, encode_texts)
    for bank in subject.label_banks.values():
        if bank.classnames == classnames:
            return bank
    carried = ", ".join(subject.label_banks) or "none"
    raise CheckpointError(
        f"{subject.name} has no text side and does not carry the class names of '{name}' "
        f"(it carries: {carried})",
        hint="--teacher with the teacher that it was distilled from, or evaluate the run",
    )


def run_logit_scale(metadata: dict[str, str], name: str) -> float:
    """The logit scale of a run's teacher, which its checkpoint carries.

    Raises:
        CheckpointError: If it does not.
    """
    try:
        return float(metadata["logit_scale"])
    except (KeyError, ValueError) as error:
        raise CheckpointError(f"the checkpoint of {name} carries no logit scale") from error


class _TextSide:
    """A run's text side, its own or its teacher's, loaded when it is first asked."""

    def __init__(
        self, metadata: dict[str, str], name: str, device: str | None, run_dir: Path
    ) -> None:
        self._metadata, self._name, self._device = metadata, name, device
        self._run_dir = run_dir
        self._teacher: Any = None

    def __call__(self, sentences: Sequence[str]) -> npt.NDArray[np.float32]:
        from dimefm_edge.students.text_checkpoint import has_text_student
        from dimefm_edge.teacher import TEXT_TEACHER_KEY, load_teacher

        if self._teacher is None:
            own = str(self._run_dir) if has_text_student(self._run_dir) else None
            teacher = own or self._metadata.get(TEXT_TEACHER_KEY)
            if teacher is None:
                raise CheckpointError(f"the checkpoint of {self._name} names no teacher")
            self._teacher = load_teacher(teacher, device=self._device)
        embeds: npt.NDArray[np.float32] = self._teacher.encode_texts(sentences)
        return embeds
