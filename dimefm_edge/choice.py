"""The student that a run chose: once, kept in its folder, and not chosen anew by --resume; and what
it begins with."""

from __future__ import annotations

import dataclasses
import json
import logging
from pathlib import Path
from typing import Any

import torch
from torch import nn

from dimefm_edge.config import RunConfig, StudentConfig
from dimefm_edge.errors import CheckpointError, ConfigError
from dimefm_edge.files import atomic_file
from dimefm_edge.fit import FitReport, fit_student
from dimefm_edge.fit_plot import plot_fit
from dimefm_edge.latency.calibrate import measure_student
from dimefm_edge.latency.estimate import trace_ops
from dimefm_edge.run_log import STATE_FILE, require_same
from dimefm_edge.student_grid import CUTTABLE, FAMILIES, elastic_cuts
from dimefm_edge.students import CHECKPOINT_FILE, StudentSpec, build_student, load_student
from dimefm_edge.students.inherit import can_inherit, inherit_from_teacher
from dimefm_edge.students.vit import vit_geometry
from dimefm_edge.targets import LOCAL, Target
from dimefm_edge.teacher import Teacher, absolute_teacher

logger = logging.getLogger(__name__)

FIT_FILE, INHERITED_FILE = "fit.json", "inherited.json"


def choose_student(config: RunConfig, target: Target, teacher: Teacher) -> FitReport:
    """Fit a student to the budget, measured on `local`; or take what the run chose before.

    Raises:
        BudgetError: As `fit_student`.
        CheckpointError: If the run chose by other settings, or its file is damaged.
    """
    path = Path(config.out, FIT_FILE)
    if path.is_file():
        return _chosen_before(path, _asked(config))
    student, side = config.student, teacher.preprocess.image_size
    facts = teacher_facts(teacher, inherits=student.init in ("auto", "teacher"))
    fit = fit_student(
        target,
        latency_ms=student.latency_ms,
        max_memory_mib=student.max_memory_mib,
        image_size=student.image_size or side,
        embed_dim=teacher.embed_dim,
        precision=target.precision,
        families=CUTTABLE if student.elastic else FAMILIES,
        student=student.student,
        given=() if student.init_from is None else ((_begun(student.init_from, teacher), None),),
        **facts,
        can_shrink=student.image_size is None,
        measure=measure_student if target.name == LOCAL else None,
    )
    if student.elastic:
        elastic_cuts(fit.chosen)  # says now what it would lack after hours
    if fit.teacher_fits:
        logger.warning("%s", fit.teacher_note(config.teacher))
    return fit


def _begun(init_from: str, teacher: Teacher) -> StudentSpec:
    """What a student that is trained on is."""
    loaded = load_student(init_from)
    spec, side = loaded.spec, teacher.preprocess.image_size
    if spec.embed_dim != teacher.embed_dim:
        raise ConfigError(
            f"{init_from} has embeddings of {spec.embed_dim} numbers, teacher {teacher.name} of "
            f"{teacher.embed_dim}",
            hint="the --teacher that it was distilled from",
        )
    if dataclasses.replace(loaded.preprocess, image_size=side) != teacher.preprocess:
        raise ConfigError(
            f"{init_from} was trained on images prepared otherwise than teacher {teacher.name}'s",
            hint="the --teacher that it was distilled from",
        )
    return spec


def teacher_facts(teacher: Teacher, *, inherits: bool = True) -> dict[str, Any]:
    """What `fit_student` takes of a teacher: its work and, if a student `inherits`, who can."""
    tower = teacher.image_tower
    work = {"teacher_ops": trace_ops(tower, teacher.preprocess.image_size, 1)}
    if not inherits:
        return work
    return work | {
        "teacher_geometry": vit_geometry(tower),
        "can_inherit": lambda spec: can_inherit(spec, tower),
    }


def initial_student(
    student: StudentConfig, spec: StudentSpec, teacher: Teacher, *, seed: int, is_begun: bool
) -> tuple[nn.Module, tuple[str, ...]]:
    """A student before training, and what it inherited; one that is resumed has weights already."""
    if student.init_from is not None:
        module = build_student(spec) if is_begun else load_student(student.init_from).student
        return module, ()
    torch.manual_seed(seed)
    module = build_student(spec, pretrained=student.init == "pretrained")
    if student.init in ("random", "pretrained"):
        return module, ()
    inherited = tuple(inherit_from_teacher(module, teacher.image_tower))
    if student.init == "teacher" and not inherited:
        raise ConfigError(
            f"student {spec.name} cannot inherit from teacher {teacher.name}: their shapes differ",
            hint="--init auto",
        )
    return module, inherited


def begins_from(student: StudentConfig, out: Path) -> StudentConfig:
    """Its settings, with the whole path of what it begins from: it may be resumed from elsewhere.

    Raises:
        ConfigError: If that is the run itself.
    """
    if student.init_from is None:
        return student
    begun = Path(student.init_from).expanduser().resolve()
    if begun in (out.resolve(), out.resolve() / CHECKPOINT_FILE):
        raise ConfigError(
            f"{out} is the run that is trained on, and would be lost", hint="another --out"
        )
    return dataclasses.replace(student, init_from=str(begun))


def keep_choice(fit: FitReport, config: RunConfig) -> None:
    """Write it into the run's folder, with its plot, unless it is there."""
    path = Path(config.out, FIT_FILE)
    if path.is_file():
        return
    with atomic_file(path) as stream:
        values = fit.to_dict() | {"asked": _asked(config)}
        stream.write((json.dumps(values, indent=1) + "\n").encode())
    plot_fit(fit, path.with_suffix(".png"))


def forget_choice(run_dir: Path) -> None:
    """Remove what an earlier start chose that never began to train."""
    for name in (FIT_FILE, INHERITED_FILE):
        (run_dir / name).unlink(missing_ok=True)


def inherited_by(run_dir: Path, found: tuple[str, ...], *, keep: bool) -> tuple[str, ...]:
    """What a run's student began with: as its folder says, else `found`, which is then kept.

    A run from before it was kept took layers of a ViT only, not the tensors of a trunk.
    """
    path = run_dir / INHERITED_FILE
    if path.is_file():
        return tuple(json.loads(path.read_text(encoding="utf-8")))
    if (run_dir / STATE_FILE).is_file():
        return () if any(name.startswith("trunk.") for name in found) else found
    if keep:
        with atomic_file(path) as stream:
            stream.write(json.dumps(found).encode())
    return found


def _chosen_before(path: Path, asked: dict[str, Any]) -> FitReport:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        before = {"init_from": None, "elastic": False} | values["asked"]  # older files lack them
        before["teacher"] = absolute_teacher(before["teacher"])  # or have it as it was given
        report = FitReport.from_dict(values)
    except (ValueError, KeyError, TypeError, AttributeError, ConfigError) as error:
        raise CheckpointError(
            f"{path} is damaged: {error}", hint="delete it: the student is then chosen again"
        ) from error
    require_same(path.parent, asked, before)
    return report


def _asked(config: RunConfig) -> dict[str, Any]:
    """What the choice hangs on."""
    asked = {"target": config.target, "teacher": config.teacher}
    return asked | dataclasses.asdict(config.student)
