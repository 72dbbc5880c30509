"""The smaller students that an elastic run holds: scored, kept, and taken out as runs.

What a cut is, students/elastic.py says. A run keeps the largest student's weights in its checkpoint
and, beside them, each cut's scores and averages of batch norms, which are its own.
"""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

import torch
from safetensors.torch import save
from torch import Tensor, nn

from dimefm_edge import config as config_file
from dimefm_edge.config import TrainConfig
from dimefm_edge.distill import Evaluate
from dimefm_edge.errors import CheckpointError, ConfigError
from dimefm_edge.files import atomic_file
from dimefm_edge.latency.estimate import estimate_latency
from dimefm_edge.latency.trace import trace_student
from dimefm_edge.manifest import sha256_of
from dimefm_edge.progress import counting
from dimefm_edge.report import CutRow
from dimefm_edge.students import (
    CHECKPOINT_FILE,
    LoadedStudent,
    StudentSpec,
    load_student,
    read_safetensors,
    save_student,
)
from dimefm_edge.students.elastic import SANDWICH, cut_student, recalibrate
from dimefm_edge.students.text_checkpoint import copy_text_student
from dimefm_edge.targets import Target

CUTS_FILE = "cuts.safetensors"
NUM_BATCHES = 16
"""Of training images, that a cut's averages are taken from."""
_FORMAT = "dimefm_edge.cuts/1"
_ANEW = "dimefm-edge distill --resume --out {}  (scores the cuts anew)"


@dataclass(frozen=True)
class Cut:
    """A smaller student, or the largest itself."""

    spec: StudentSpec
    scores: dict[str, float]
    """As the run evaluates: zero-shot top-1 in percent, by test set; empty without test sets."""

    @property
    def top1_pct(self) -> float | None:
        """The mean over the test sets."""
        return fmean(self.scores.values()) if self.scores else None


@dataclass(frozen=True)
class ElasticRun:
    """A run that holds cuts."""

    folder: Path
    loaded: LoadedStudent
    cuts: tuple[Cut, ...]
    """The smallest first, the largest last, and in no order between."""
    averages: dict[str, dict[str, Tensor]]
    """Batch norms' buffers, by the cut's name and by theirs."""

    def take(self, spec: StudentSpec) -> nn.Module:
        """One of the cuts on its own, in eval mode.

        Raises:
            CheckpointError: If the averages that were kept of it are not all of its own.
        """
        if spec == self.loaded.spec:
            return self.loaded.student
        student = cut_student(self.loaded.student, self.loaded.spec, spec)
        found, wanted = self.averages.get(spec.name, {}), dict(student.named_buffers())
        if {k: v.shape for k, v in found.items()} != {k: v.shape for k, v in wanted.items()}:
            raise CheckpointError(
                f"{CUTS_FILE} is damaged: it lacks averages of {spec.name}",
                hint=_ANEW.format(self.folder),
            )
        student.load_state_dict(found, strict=False)
        return student.eval()


def elastic_stage(train: TrainConfig) -> TrainConfig:
    """A run's settings, for the training of an elastic student: as many steps, of a batch of that
    size for each of the cuts that a step trains."""
    return dataclasses.replace(
        train,
        batch_size=SANDWICH * train.batch_size,
        accumulate=SANDWICH * train.accumulate,
        epochs=None if train.epochs is None else SANDWICH * train.epochs,
    )


def keep_cuts(
    run_dir: Path,
    specs: Sequence[StudentSpec],
    inputs: Callable[[], Iterable[Tensor]],
    evaluate: Evaluate | None,
    device: torch.device,
) -> tuple[Cut, ...]:
    """Score the cuts of a run whose elastic student is trained, and keep what `load_cuts` reads.

    Args:
        run_dir: The run.
        specs: The smallest first, the run's own last.
        inputs: Gives batches of images as in training, the same each time, on the device.
        evaluate: Zero-shot scores by name; None: the cuts are kept unscored.
        device: Where they run.
    """
    loaded = load_student(run_dir)
    cuts: list[Cut] = []
    averages: dict[str, Tensor] = {}
    with counting("score cuts", len(specs)) as advance:
        for spec in specs:
            student = loaded.student
            if spec != loaded.spec:
                student = cut_student(student, loaded.spec, spec)
                recalibrate(student.to(device), inputs())
                averages |= {f"{spec.name}/{name}": t for name, t in student.named_buffers()}
            cuts.append(Cut(spec, evaluate(student.to(device).eval()) if evaluate else {}))
            advance(1)
    header = {
        "format": _FORMAT,
        "checkpoint": sha256_of(run_dir / CHECKPOINT_FILE),
        "cuts": json.dumps([{"spec": c.spec.to_dict(), "scores": c.scores} for c in cuts]),
    }
    with atomic_file(run_dir / CUTS_FILE) as stream:
        stream.write(save({name: t.cpu().contiguous() for name, t in averages.items()}, header))
    return tuple(cuts)


def load_cuts(run: Path | str) -> ElasticRun:
    """Open a run of `distill --elastic`.

    Args:
        run: Its folder, or the checkpoint in it.

    Raises:
        CheckpointError: If it is no run, holds no cuts, or is damaged.
    """
    path = Path(run).expanduser()
    folder, path = (path, path / CHECKPOINT_FILE) if path.is_dir() else (path.parent, path)
    loaded = load_student(path)
    if not (folder / CUTS_FILE).is_file():
        raise CheckpointError(
            f"{folder} holds no smaller students", hint="dimefm-edge distill --elastic makes them"
        )
    tensors, header = read_safetensors(folder / CUTS_FILE)
    try:
        rows = json.loads(header["cuts"])
        cuts = tuple(Cut(StudentSpec.from_dict(r["spec"]), dict(r["scores"])) for r in rows)
        is_of_it = header["format"] == _FORMAT and cuts[-1].spec == loaded.spec
        averages: dict[str, dict[str, Tensor]] = {}
        for key, value in tensors.items():
            name, _, buffer = key.partition("/")
            averages.setdefault(name, {})[buffer] = value
    except (KeyError, TypeError, ValueError, IndexError, AttributeError, ConfigError) as error:
        raise CheckpointError(
            f"{folder / CUTS_FILE} is damaged: {error!r}", hint=_ANEW.format(folder)
        ) from error
    if not is_of_it or header.get("checkpoint") != sha256_of(path):
        raise CheckpointError(
            f"{folder / CUTS_FILE} is of another checkpoint than {path}",
            hint=_ANEW.format(folder),
        )
    return ElasticRun(folder.resolve(), loaded, cuts, averages)


def require_new(out: Path) -> None:
    """Refuse to write into a folder that holds something.

    Raises:
        ConfigError: If it does, or is a file.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ConfigError(f"{out} is there already", hint="another --out")


def save_cut(
    run: ElasticRun, spec: StudentSpec, out: Path, *, target: str, latency_ms: float | None
) -> None:
    """Take a cut out of a run as a run of its own, which `eval`, `export` and `demo` take.

    Its config.toml is for `distill --config`: to train it on, on the same data, in another folder.
    What is made is whole or not there.

    Args:
        run: As `load_cuts` gives it.
        spec: One of its cuts.
        out: A new or empty folder.
        target: What it was chosen for.
        latency_ms: The budget that training on is to keep; None: the default.

    Raises:
        CheckpointError: As `ElasticRun.take`.
        ConfigError: If `out` holds something.
    """
    out = out.resolve()
    require_new(out)
    student, loaded = run.take(spec), run.loaded
    metadata = loaded.metadata | {"target": target, "cut_from": str(run.folder)}
    part = out.with_name(f".{out.name}.{os.getpid()}.part")
    try:
        save_student(part / CHECKPOINT_FILE, student, spec, loaded.preprocess, metadata)
        copy_text_student(run.folder, part)
        settings = config_file.load_saved(run.folder)
        if settings is not None:
            begun = config_file.StudentConfig(
                init_from=str(out),
                latency_ms=latency_ms,
                max_memory_mib=settings.student.max_memory_mib,
            )
            settings = dataclasses.replace(
                settings,
                target=target,
                out=f"{out}-tuned",
                store=settings.store or str(run.folder / "store"),
                student=begun,
            )
            config_file.save(settings, part / config_file.RUN_FILE)
        part.replace(out)
    finally:
        shutil.rmtree(part, ignore_errors=True)


def cut_rows(cuts: Sequence[Cut], target: Target) -> tuple[CutRow, ...]:
    """What a report says of the cuts: size, estimate and scores."""
    rows = []
    for cut in cuts:
        found = estimate_latency(trace_student(cut.spec), target, precision=target.precision)
        rows.append(
            CutRow(
                name=cut.spec.name,
                params_m=found.params_m,
                gmacs=found.gmacs,
                target_ms=found.latency_ms,
                top1_pct={k.removesuffix("_top1_pct"): v for k, v in cut.scores.items()},
            )
        )
    return tuple(rows)
