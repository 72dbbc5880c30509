"""What a text student is worth beside its teacher's text tower: labels, size, latency here."""

from __future__ import annotations

import dataclasses
import logging
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from dimefm_edge.data.images import LabelledSet
from dimefm_edge.encoders import Normalised
from dimefm_edge.errors import ExportError, ParityError
from dimefm_edge.evaluate.features import Features, embed_pool
from dimefm_edge.evaluate.zero_shot import score_zero_shot
from dimefm_edge.export import graph_spec
from dimefm_edge.export.text import export_text_onnx
from dimefm_edge.export.tokenizers import PROBES
from dimefm_edge.labels import LabelBank, build_label_bank
from dimefm_edge.latency.measure import LatencyReport, measure_blocks
from dimefm_edge.report import TextAccuracyRow, TextReport, TextRow
from dimefm_edge.runtime import Bundle, load_engine, load_text_encoder
from dimefm_edge.runtime.text import TextEncoder
from dimefm_edge.students.text import TextStudent
from dimefm_edge.students.text_checkpoint import LoadedTextStudent, load_text_student
from dimefm_edge.teacher import Teacher
from dimefm_edge.tokenizer import Tokenizer

if TYPE_CHECKING:
    from dimefm_edge.text_stage import TrainedText

logger = logging.getLogger(__name__)

EncodeTexts = Callable[[Sequence[str]], npt.NDArray[np.float32]]

_SENTENCES_PER_CALL = 256
_LATENCY_SENTENCE = "a photo of a red ball on a green table."


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
        init_from=trained.init_from,
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
