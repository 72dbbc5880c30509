"""A run's text student: sized after the teacher's text tower, or another run's, and distilled.

Called by pipeline.py beside the image student. What a text student is, students/text.py says; its
losses are in losses.py, its loop is the image student's (distill.py).
"""

from __future__ import annotations

import dataclasses
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import torch
from torch import nn

from dimefm_edge.batches import DistillData
from dimefm_edge.config import TextStudentConfig, TrainConfig
from dimefm_edge.data.sentences import SentencePool
from dimefm_edge.data.tokens import open_tokens, write_tokens
from dimefm_edge.distill import DistillReport, Evaluate, distill
from dimefm_edge.distributed import Ranks
from dimefm_edge.encoders import JoinedTowers
from dimefm_edge.errors import CheckpointError, ConfigError
from dimefm_edge.export.tokenizers import convert_tokenizer
from dimefm_edge.files import run_folder
from dimefm_edge.students.text import TextSpec, TextStudent, inherit_text, text_geometry, text_spec
from dimefm_edge.students.text_checkpoint import (
    TEXT_DIR,
    has_text_student,
    load_text_student,
    save_text_student,
    save_tokenizer,
)
from dimefm_edge.teacher import Teacher
from dimefm_edge.text_batches import TextData
from dimefm_edge.tokenizer import Tokenizer

logger = logging.getLogger(__name__)

_INIT_FROM = "init_from"  # in the checkpoint's metadata
_NO_TEXT_STUDENT = "--text-student none  (the text side stays the teacher's)"


@dataclass(frozen=True)
class TextPlan:
    """A text student that is to be trained, and what turns sentences into its tokens."""

    spec: TextSpec
    tokenizer: Tokenizer
    init_from: str | None = None
    """A run whose text student is trained on, in place of the teacher's layers."""
    is_begun: bool = False
    """Its weights are in the run's state: nothing else is read."""


@dataclass(frozen=True)
class TrainedText:
    """What training a text student came to."""

    training: DistillReport
    inherited: tuple[str, ...]
    init_from: str | None
    """The run that it was trained on from."""


def plan_text(
    config: TextStudentConfig,
    train: TrainConfig,
    teacher: Teacher,
    ranks: Ranks,
    *,
    init_from: str | None = None,
    run_dir: Path | None = None,
) -> TextPlan | None:
    """Say before hours of training whether there can be a text student, and which.

    With `init_from`, a run that the image student begins from: its text student, where it has one
    and no other, nor random weights, are asked for. It is not needed where `run_dir`, a run that
    is resumed, has begun with it.

    Returns:
        None where none is asked for.

    Raises:
        ConfigError: If the teacher's text tower is of a kind that none can be sized after, or
            ranks do not divide the sentences of a step.
        ExportError: If the teacher's tokenizer cannot run without open_clip.
        CheckpointError: If `init_from` is gone, and this run has not begun with its text student.
        UnknownNameError: If the student's name is neither `auto` nor of the form that names have.
    """
    if config.text_student == "none":
        if init_from is not None and has_text_student(run_folder(init_from)):
            logger.warning(
                "the text student of %s is left behind; --text-student auto trains it on", init_from
            )
        return None
    if train.text_batch_size % ranks.world_size:
        raise ConfigError(
            f"text_batch_size {train.text_batch_size} cannot be split over {ranks.world_size} ranks"
        )
    if init_from is not None and (plan := _plan_on(init_from, config, run_dir)) is not None:
        return plan
    geometry = text_geometry(teacher.text_tower)
    if geometry is None:
        raise ConfigError(
            f"no text student can be sized after the text side of teacher {teacher.name}: it is "
            f"{_kind_of(teacher.text_tower)}, not a text transformer of open_clip's",
            hint=_NO_TEXT_STUDENT,
        )
    tokenizer = convert_tokenizer(teacher.tokenize, name=teacher.name)
    spec = text_spec(config.text_student, geometry)
    return TextPlan(
        dataclasses.replace(spec, context_length=tokenizer.spec.context_length), tokenizer
    )


def _plan_on(init_from: str, config: TextStudentConfig, run_dir: Path | None) -> TextPlan | None:
    """The text student of another run, or of this one if it has begun; None: of the teacher."""
    if config.text_init == "random":
        return None
    is_begun = run_dir is not None and has_text_student(run_dir)
    folder = run_dir if run_dir is not None and is_begun else run_folder(init_from)
    if not folder.is_dir():
        raise CheckpointError(
            f"{init_from} is gone, whose text student was to be trained on",
            hint="put it back, or --text-student none",
        )
    if not has_text_student(folder):
        return None
    found = load_text_student(folder)
    if config.text_student not in ("auto", found.name):
        return None
    name = found.metadata.get(_INIT_FROM) if is_begun else str(folder)
    return TextPlan(found.spec, found.tokenizer, name, is_begun)


def _kind_of(tower: nn.Module) -> str:
    if isinstance(tower, JoinedTowers):
        return "an ensemble's, with a tokenizer for each of its teachers"
    inner = getattr(getattr(tower, "model", tower), "text", tower)
    return f"a {type(inner).__name__} with parts of its own"


def train_text(
    run_dir: Path,
    plan: TextPlan,
    teacher: Teacher,
    data: DistillData,
    sentences: SentencePool,
    *,
    config: TextStudentConfig,
    train: TrainConfig,
    steps: int,
    store_dir: Path,
    evaluate: Evaluate | None = None,
    metadata: dict[str, str],
    resume: bool = False,
    ranks: Ranks | None = None,
) -> TrainedText:
    """Distil a text student into the folder `text` of a run.

    Args:
        run_dir: Gets the folder.
        plan: Which student.
        teacher: Whose text tower it inherits from; its embeddings are in `data`.
        data: Of the image student; its stores and its choice of rows are used.
        sentences: Those of the text store, in its order.
        config: Losses, steps, rate.
        train: Of the image student; `text_batch_size` sentences a step.
        steps: Where `config` names none.
        store_dir: Gets the tokens.
        evaluate: Scores of the module, such as a `TextScorer`; keeps the best weights too.
        metadata: For the checkpoint.
        resume: Go on from where it stopped.
        ranks: This process among those of the run.

    Raises:
        DimeFMError: As `distill`.
    """
    ranks = ranks or Ranks()
    folder = run_dir / TEXT_DIR
    if ranks.is_main:
        folder.mkdir(exist_ok=True)
        save_tokenizer(folder, plan.tokenizer)
        write_tokens(sentences, plan.tokenizer, store_dir, vocab_size=plan.spec.vocab_size)
    ranks.barrier()
    tokens = open_tokens(sentences, plan.tokenizer, store_dir, vocab_size=plan.spec.vocab_size)
    student, inherited = _initial_student(plan, config, teacher, seed=train.seed)
    begun = {} if plan.init_from is None else {_INIT_FROM: plan.init_from}
    training = distill(
        student,
        TextData(
            data.texts, data.images, tokens, plan.spec, data.logit_scale,
            text_rows=data.text_rows, image_rows=data.image_rows,
        ),
        loss=config,
        train=text_stage(train, config, steps),
        run_dir=folder,
        save_weights=_Saver(plan.tokenizer, metadata | begun),
        evaluate=evaluate,
        resume=resume,
        ranks=ranks,
    )  # fmt: skip
    return TrainedText(training, inherited, plan.init_from)


def text_stage(train: TrainConfig, config: TextStudentConfig, steps: int) -> TrainConfig:
    """The settings of a text student beside an image student of so many steps."""
    return dataclasses.replace(
        train,
        steps=config.text_steps or steps,
        batch_size=train.text_batch_size,
        lr=config.text_lr,
        accumulate=1,
        hard_negatives=0.0,
        views=0,
        eval_every=0,
    )


def _initial_student(
    plan: TextPlan, config: TextStudentConfig, teacher: Teacher, *, seed: int
) -> tuple[TextStudent, tuple[str, ...]]:
    torch.manual_seed(seed)
    if plan.init_from is not None and not plan.is_begun:
        return load_text_student(Path(plan.init_from)).student, ()
    student = TextStudent(plan.spec)
    if plan.init_from is not None:
        return student, ()
    if config.text_init == "random":
        return student, ()
    return student, tuple(inherit_text(student, teacher.text_tower))


@dataclass(frozen=True)
class _Saver:
    tokenizer: Tokenizer
    metadata: dict[str, str]

    def __call__(self, path: Path, module: nn.Module) -> None:
        save_text_student(path, cast(TextStudent, module), self.tokenizer, self.metadata)
