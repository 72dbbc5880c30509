"""A run's text student: sized after the teacher's text tower, distilled, and compared with it.

Called by pipeline.py beside the image student. What a text student is, students/text.py says; its
losses are in losses.py, its loop is the image student's (distill.py).
"""

from __future__ import annotations

import dataclasses
import logging
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from dimefm_edge.batches import DistillData
from dimefm_edge.config import TextStudentConfig, TrainConfig
from dimefm_edge.data.images import LabelledSet
from dimefm_edge.data.sentences import SentencePool
from dimefm_edge.data.tokens import open_tokens, write_tokens
from dimefm_edge.distill import DistillReport, Evaluate, distill
from dimefm_edge.distributed import Ranks
from dimefm_edge.encoders import JoinedTowers, Normalised
from dimefm_edge.errors import ConfigError, ExportError, ParityError
from dimefm_edge.evaluate.features import Features, embed_pool
from dimefm_edge.evaluate.zero_shot import score_zero_shot
from dimefm_edge.export import graph_spec
from dimefm_edge.export.text import export_text_onnx
from dimefm_edge.export.tokenizers import PROBES, convert_tokenizer
from dimefm_edge.labels import LabelBank, build_label_bank
from dimefm_edge.latency.measure import LatencyReport, measure_blocks
from dimefm_edge.report import TextAccuracyRow, TextReport, TextRow
from dimefm_edge.runtime import Bundle, load_engine, load_text_encoder
from dimefm_edge.runtime.text import TextEncoder
from dimefm_edge.students.text import TextSpec, TextStudent, inherit_text, text_geometry, text_spec
from dimefm_edge.students.text_checkpoint import (
    TEXT_DIR,
    LoadedTextStudent,
    load_text_student,
    save_text_student,
    save_tokenizer,
)
from dimefm_edge.teacher import Teacher
from dimefm_edge.text_batches import TextData
from dimefm_edge.tokenizer import Tokenizer

logger = logging.getLogger(__name__)

EncodeTexts = Callable[[Sequence[str]], npt.NDArray[np.float32]]

_SENTENCES_PER_CALL = 256
_LATENCY_SENTENCE = "a photo of a red ball on a green table."
_NO_TEXT_STUDENT = "--text-student none  (the text side stays the teacher's)"


@dataclass(frozen=True)
class TextPlan:
    """A text student that is to be trained, and what turns sentences into its tokens."""

    spec: TextSpec
    tokenizer: Tokenizer


@dataclass(frozen=True)
class TrainedText:
    """What training a text student came to."""

    training: DistillReport
    inherited: tuple[str, ...]


def plan_text(
    config: TextStudentConfig, train: TrainConfig, teacher: Teacher, ranks: Ranks
) -> TextPlan | None:
    """Say before hours of training whether there can be a text student, and which.

    Returns:
        None where none is asked for.

    Raises:
        ConfigError: If the teacher's text tower is of a kind that none can be sized after, or
            ranks do not divide the sentences of a step.
        ExportError: If the teacher's tokenizer cannot run without open_clip.
        UnknownNameError: If the student's name is neither `auto` nor of the form that names have.
    """
    if config.text_student == "none":
        return None
    if train.text_batch_size % ranks.world_size:
        raise ConfigError(
            f"text_batch_size {train.text_batch_size} cannot be split over {ranks.world_size} ranks"
        )
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
    student, inherited = _initial_student(plan.spec, config, teacher, seed=train.seed)
    training = distill(
        student,
        TextData(
            data.texts, data.images, tokens, plan.spec, data.logit_scale,
            text_rows=data.text_rows, image_rows=data.image_rows,
        ),
        loss=config,
        train=text_stage(train, config, steps),
        run_dir=folder,
        save_weights=_Saver(plan.tokenizer, metadata),
        evaluate=evaluate,
        resume=resume,
        ranks=ranks,
    )  # fmt: skip
    return TrainedText(training, inherited)


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
    spec: TextSpec, config: TextStudentConfig, teacher: Teacher, *, seed: int
) -> tuple[TextStudent, tuple[str, ...]]:
    torch.manual_seed(seed)
    student = TextStudent(spec)
    if config.text_init == "random":
        return student, ()
    return student, tuple(inherit_text(student, teacher.text_tower))


@dataclass(frozen=True)
class _Saver:
    tokenizer: Tokenizer
    metadata: dict[str, str]

    def __call__(self, path: Path, module: nn.Module) -> None:
        save_text_student(path, cast(TextStudent, module), self.tokenizer, self.metadata)


def text_encoder(student: TextStudent, tokenizer: Tokenizer) -> EncodeTexts:
    """A text student as a function: sentences -> (B, E) float32, L2-normalised."""
    device = next(student.parameters()).device

    def encode(sentences: Sequence[str]) -> npt.NDArray[np.float32]:
        embeds = []
        with torch.inference_mode():
            for start in range(0, len(sentences), _SENTENCES_PER_CALL):
                tokens = tokenizer(sentences[start : start + _SENTENCES_PER_CALL])
                needed = tokens[:, : student.spec.needed_length(tokens)]
                embeds.append(student(torch.from_numpy(needed).to(device)).cpu().numpy())
        return np.concatenate(embeds)

    return encode


@dataclass(frozen=True)
class TextScorer:
    """Zero-shot top-1 of the teacher's images by a text student's labels, in percent, by name."""

    eval_sets: Sequence[LabelledSet]
    features: Sequence[Features]
    """The teacher's, of each set."""
    tokenizer: Tokenizer

    def __call__(self, module: nn.Module) -> dict[str, float]:
        encode = text_encoder(cast(TextStudent, module), self.tokenizer)
        scores = {}
        for labelled, features in zip(self.eval_sets, self.features, strict=True):
            bank = _bank(labelled, encode)
            top1 = score_zero_shot(features, labelled, bank).top1_pct
            scores[f"{labelled.name}_top1_pct"] = top1
        return scores


def teacher_features(teacher: Teacher, eval_sets: Sequence[LabelledSet]) -> tuple[Features, ...]:
    """The teacher's embeddings of the images of each test set."""
    return tuple(
        embed_pool(teacher.encode_images, teacher.preprocess, s.pool, name=s.name)
        for s in eval_sets
    )


def _bank(labelled: LabelledSet, encode: EncodeTexts) -> LabelBank:
    return build_label_bank(labelled.name, labelled.classnames, labelled.templates, encode)


# --------------------------------------------------------------------------- the report


def compare_text(
    run_dir: Path,
    trained: TrainedText,
    teacher: Teacher,
    bundle: Bundle,
    eval_sets: Sequence[LabelledSet],
    banks: Sequence[LabelBank],
    features: Sequence[Features],
) -> TextReport:
    """Teacher's and student's text side: size, latency here, and what their labels are worth.

    Args:
        run_dir: Of a run whose text student is trained.
        trained: What `train_text` returned.
        teacher: Whose text side is compared.
        bundle: That carries the text student; what is measured is its graph.
        eval_sets: Labelled sets.
        banks: Their labels by the teacher.
        features: Their images by the teacher.
    """
    loaded = load_text_student(run_dir)
    accuracy = _compare_accuracy(features, bundle, eval_sets, banks)
    rows = compare_text_towers(teacher, loaded, bundle)
    assert bundle.manifest["text"] is not None
    training = dataclasses.asdict(trained.training)
    training["sentences_per_s"] = training.pop("images_per_s")
    return TextReport(
        teacher=rows[0],
        student=rows[1],
        spec=loaded.spec.to_dict(),
        inherited=trained.inherited,
        accuracy=accuracy,
        parity=bundle.manifest["text"]["parity"],
        training=training,
    )


def _compare_accuracy(
    features_of_sets: Sequence[Features],
    bundle: Bundle,
    eval_sets: Sequence[LabelledSet],
    banks: Sequence[LabelBank],
) -> tuple[TextAccuracyRow, ...]:
    engine, encoder = load_engine(bundle), load_text_encoder(bundle)
    rows = []
    for labelled, features, bank in zip(eval_sets, features_of_sets, banks, strict=True):
        own = _bank(labelled, encoder.encode_texts)
        student_features = embed_pool(
            engine.encode_pixels, bundle.preprocess, labelled.pool, name=labelled.name
        )
        cosines = (own.embeds * bank.embeds).sum(axis=1)
        top1 = {
            f"{images}_image_{texts}_text_pct": score_zero_shot(side, labelled, labels).top1_pct
            for images, side in (("teacher", features), ("student", student_features))
            for texts, labels in (("teacher", bank), ("student", own))
        }
        rows.append(
            TextAccuracyRow(
                name=labelled.name,
                label_cosine_mean=float(cosines.mean()),
                label_cosine_min=float(cosines.min()),
                **top1,
            )
        )
    return tuple(rows)


def compare_text_towers(
    teacher: Teacher, loaded: LoadedTextStudent, bundle: Bundle
) -> tuple[TextRow, TextRow]:
    """Size, and latency of one sentence from its words on, both in ONNX Runtime, in turn.

    A teacher whose text tower cannot be exported is measured in PyTorch, and named so.
    """
    assert bundle.text is not None
    assert bundle.manifest["text"] is not None
    student = load_text_encoder(bundle)
    tower = Normalised(teacher.text_tower).cpu()
    runtime, size_mib = "ONNX Runtime", None
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "teacher.onnx"
        encode: EncodeTexts
        try:
            export_text_onnx(
                tower, path, parity_tokens=loaded.tokenizer(PROBES), metadata={},
                spec=graph_spec(None, precision=bundle.manifest["text"]["precision"]),
            )  # fmt: skip
            encode = TextEncoder(path, loaded.tokenizer, embed_dim=teacher.embed_dim).encode_texts
            size_mib = path.stat().st_size / 2**20
        except (ExportError, ParityError) as error:
            logger.warning("the teacher's text tower is measured in PyTorch: %s", error)
            runtime, encode = "PyTorch", _eager(tower, loaded.tokenizer)
        first, second = measure_blocks(
            {
                "teacher": lambda: encode([_LATENCY_SENTENCE]),
                "student": lambda: student.encode_texts([_LATENCY_SENTENCE]),
            }
        )
    student_mib = bundle.text.model_path.stat().st_size / 2**20
    return (
        _row(teacher.name, tower, size_mib, runtime, first),
        _row(loaded.spec.name, loaded.student, student_mib, "ONNX Runtime", second),
    )


def _eager(tower: nn.Module, tokenizer: Tokenizer) -> EncodeTexts:
    def encode(sentences: Sequence[str]) -> npt.NDArray[np.float32]:
        with torch.inference_mode():
            embeds: npt.NDArray[np.float32] = tower(torch.from_numpy(tokenizer(sentences))).numpy()
        return embeds

    return encode


def _row(
    name: str, tower: nn.Module, size_mib: float | None, runtime: str, latency: LatencyReport
) -> TextRow:
    weights: dict[Any, int] = {id(p): p.numel() for p in tower.parameters()}
    return TextRow(
        name=name,
        params_m=sum(weights.values()) / 1e6,
        size_mib=size_mib,
        here_runtime=runtime,
        here_p50_ms=latency.p50_ms,
        here_p90_ms=latency.p90_ms,
    )
