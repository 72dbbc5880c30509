"""What can be timed, and how it is named: MODEL, or MODEL@RUNTIME."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from dimefm_edge.errors import InputError, UnknownNameError, lookup
from dimefm_edge.subjects import subject_kind

Kind = Literal["bundle", "onnx", "run", "teacher", "timm", "python"]

RUNTIMES: dict[str, str] = {
    "onnxruntime": "our graph in ONNX Runtime; its execution provider may follow, as in "
    "onnxruntime:cuda",
    "plain": "the graph that torch.onnx.export makes, in ONNX Runtime",
    "dynamic-int8": "our graph through ONNX Runtime's own dynamic quantisation",
    "openvino": "our graph in OpenVINO",
    "eager": "PyTorch",
    "compile": "torch.compile",
    "tensorrt": "the TensorRT engine that `build` made of a bundle; or name the .engine file",
    "aot-inductor": "a bundle's .pt2",
}
"""What runs a model, by the name after @."""

_OF_FILES = ("onnxruntime", "dynamic-int8", "openvino")
_OF_MODULES = (*_OF_FILES, "plain", "eager", "compile")
_ALLOWED: dict[Kind, tuple[str, ...]] = {
    "bundle": (*_OF_FILES, "tensorrt", "aot-inductor"),
    "onnx": _OF_FILES,
    "run": _OF_MODULES,
    "teacher": _OF_MODULES,
    "timm": _OF_MODULES,
    "python": ("python",),
}
_TIMM = "timm:"


@dataclass(frozen=True)
class SubjectSpec:
    """One thing to time."""

    label: str
    """What the user typed; with (2), (3) where it was typed more than once."""
    name: str
    """The model: a path or a name."""
    kind: Kind
    runtime: str
    """A name in `RUNTIMES`, with `:option` where one was given; an .engine file; or python."""


def parse_subjects(
    words: Sequence[str], *, default_runtime: str = "onnxruntime"
) -> list[SubjectSpec]:
    """Read what the user named.

    Args:
        words: Bundles, runs, ONNX files, teachers (`ViT-B-32:openai`), `timm:NAME`, and
            `FILE.py:FUNCTION`, a function that takes the batch size and returns the call to
            time; each but the last may end in @RUNTIME. The same may come twice: two copies
            tell how far the machine repeats itself.
        default_runtime: For bundles without one.

    Raises:
        InputError: If nothing is named, or a model cannot run there.
        UnknownNameError: If there is no such runtime.
    """
    if not words:
        raise InputError("no model was named", hint="dimefm-edge bench RUN/bundle sample")
    seen: dict[str, int] = {}
    specs = []
    for word in words:
        name, runtime = _split(word)
        kind = _kind(name)
        if not runtime:
            runtime = default_runtime if kind == "bundle" else _ALLOWED[kind][0]
        _check(word, kind, runtime)
        seen[word] = seen.get(word, 0) + 1
        label = word if seen[word] == 1 else f"{word} ({seen[word]})"
        specs.append(SubjectSpec(label, name, kind, runtime))
    return specs


def _split(word: str) -> tuple[str, str]:
    name, mark, runtime = word.rpartition("@")
    if not mark or Path(word).expanduser().exists():
        return word, ""
    if not name:
        raise InputError(f"{word} names no model", hint=f"MODEL{word}")
    if not runtime.endswith(".engine"):
        lookup(RUNTIMES, runtime.partition(":")[0], kind="runtime")
    return name, runtime


def _kind(name: str) -> Kind:
    if name.startswith(_TIMM):
        return "timm"
    file, mark, function = name.rpartition(":")
    if mark and file.endswith(".py"):
        if not function.isidentifier():
            raise InputError(f"{name} names no function", hint="FILE.py:FUNCTION")
        if not Path(file).expanduser().is_file():
            raise InputError(f"no file at {file}", hint="check the path")
        return "python"
    if name.endswith(".engine"):
        raise InputError(f"{name} is an engine: it runs with its bundle", hint=f"BUNDLE@{name}")
    return subject_kind(name)


def _check(word: str, kind: Kind, runtime: str) -> None:
    allowed = _ALLOWED[kind]
    is_engine = runtime.endswith(".engine") and kind == "bundle"
    if not is_engine and runtime.partition(":")[0] not in allowed:
        raise UnknownNameError(
            f"{word} is a {kind}, which runs in {', '.join(allowed)}; not in {runtime}",
            hint="export it first: dimefm-edge export RUN" if kind != "python" else "leave @ out",
        )
