"""Which models a page shows for what the user named: read from names and files, nothing loaded."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Literal

from dimefm_edge.config import load_saved
from dimefm_edge.errors import InputError, MissingExtraError
from dimefm_edge.files import run_folder
from dimefm_edge.manifest import MANIFEST_FILE
from dimefm_edge.subjects import subject_kind

SAMPLE = "sample"
FIRST_RUN = Path("runs/first")
"""Where the README's main job leaves its run; shown when no model is named."""


@dataclass(frozen=True)
class ModelSpec:
    """One model of the page, before it is loaded."""

    name: str
    """What the page calls it; unique on it."""
    source: str
    """What `load_subject` takes; of the sample, its precision."""
    kind: Literal["sample", "bundle", "subject"]
    engine: str = "onnxruntime"
    teaches: str = ""
    """Of a teacher: who it is, for the students that answer to its text side."""
    run_dir: Path | None = None
    """The run that it comes from, if any."""


def find_models(names: Sequence[str], *, engines: Sequence[str]) -> list[ModelSpec]:
    """What the page shows for what the user named; nothing is loaded.

    Args:
        names: Runs, bundles and teachers. A run brings its teacher and all of its bundles; none
            means the run that the README makes where it is there, else the sample teacher.
        engines: What runs bundles; each bundle is shown with each.

    Raises:
        InputError: If one is none of these, or needs torch, which is not there.
    """
    if not names:
        names = [str(FIRST_RUN)] if subject_kind(str(FIRST_RUN)) == "run" else [SAMPLE]
    specs: dict[str, ModelSpec] = {}
    for name in names:
        for spec in _expand(name, engines):
            unique, number = spec.name, 2
            while unique in specs:
                unique, number = f"{spec.name} ({number})", number + 1
            specs[unique] = dataclasses.replace(spec, name=unique)
    return list(specs.values())


def _expand(name: str, engines: Sequence[str]) -> list[ModelSpec]:
    if name == SAMPLE:
        return [_sample("fp32", name="sample fp32"), _sample("int8", name="sample int8")]
    kind, path = subject_kind(name), Path(name).expanduser()
    if kind == "onnx":
        raise InputError(
            f"{name} is a graph alone, which has no labels", hint="name the bundle that it is in"
        )
    if kind == "bundle":
        return _bundle(path, engines)
    if kind == "run":
        return _run(run_folder(path), engines)
    if name.startswith((".", "/", "~")) and not path.exists():
        raise InputError(f"there is nothing at {name}", hint="name a run, a bundle or a teacher")
    return [_teacher(name, name=name)]


def _run(run_dir: Path, engines: Sequence[str]) -> list[ModelSpec]:
    """The teacher, then every bundle of its student; without a bundle, the checkpoint itself."""
    saved = load_saved(run_dir)
    specs = []
    if saved is not None and (saved.teacher == SAMPLE or find_spec("torch") is not None):
        name = f"teacher {Path(saved.teacher).name}"
        is_sample = saved.teacher == SAMPLE
        specs += [_sample("fp32", name=name) if is_sample else _teacher(saved.teacher, name=name)]
    bundles = sorted(run_dir.glob(f"bundle*/{MANIFEST_FILE}"))
    for manifest in bundles:
        specs += _bundle(manifest.parent, engines, name="student", run_dir=run_dir)
    if not bundles:
        require_torch(f"{run_dir} has no bundle, and its checkpoint")
        specs.append(ModelSpec("student", str(run_dir), "subject", run_dir=run_dir))
    return specs


def _bundle(
    path: Path, engines: Sequence[str], *, name: str | None = None, run_dir: Path | None = None
) -> list[ModelSpec]:
    name = f"{name} {_precision(path)}" if name else path.stem
    return [
        ModelSpec(
            name if engine == "onnxruntime" else f"{name} {Path(engine).stem}",
            str(path), "bundle", engine, run_dir=run_dir,
        )
        for engine in engines
    ]  # fmt: skip


def _precision(bundle_dir: Path) -> str:
    """What the manifest says; it is checked when the bundle is loaded."""
    try:
        return str(json.loads((bundle_dir / MANIFEST_FILE).read_bytes())["precision"])
    except (OSError, ValueError, TypeError, KeyError, RecursionError):
        return bundle_dir.name


def _teacher(source: str, *, name: str) -> ModelSpec:
    require_torch(f"teacher {source}")
    return ModelSpec(name, source, "subject", teaches=teacher_id(source))


def _sample(precision: str, *, name: str) -> ModelSpec:
    teaches = SAMPLE if precision == "fp32" else ""
    return ModelSpec(name, precision, "sample", teaches=teaches)


def teacher_id(name: str) -> str:
    """Who a teacher is: the same for every way to write a folder."""
    path = Path(name).expanduser()
    return str(path.resolve()) if name and path.is_dir() else name


def require_torch(what: str) -> None:
    """
    Raises:
        MissingExtraError: If torch is not installed.
    """
    if find_spec("torch") is None:
        raise MissingExtraError(
            f"{what} needs torch, which is not installed",
            hint="pip install 'dimefm_edge[train]', or name a bundle: dimefm-edge demo BUNDLE",
        )
