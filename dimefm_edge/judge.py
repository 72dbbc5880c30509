"""What a student is worth beside its teacher: zero-shot accuracy, and latency here and there."""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from dimefm_edge.data.images import LabelledSet
from dimefm_edge.encoders import EncodePixels, Normalised, module_encoder
from dimefm_edge.errors import ExportError, ParityError
from dimefm_edge.evaluate.zero_shot import ZeroShotReport, evaluate_zero_shot
from dimefm_edge.export import export_onnx, graph_spec
from dimefm_edge.labels import LabelBank
from dimefm_edge.latency.estimate import estimate_latency, trace_ops
from dimefm_edge.latency.measure import LatencyReport, measure_blocks
from dimefm_edge.preprocess import PreprocessSpec
from dimefm_edge.report import AccuracyRow, ModelRow
from dimefm_edge.runtime import Bundle, load_engine
from dimefm_edge.runtime.onnxruntime import OnnxRuntimeEngine
from dimefm_edge.targets import Target
from dimefm_edge.teacher import Teacher

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Scorer:
    """Zero-shot top-1 of a module on every test set, in percent, by name."""

    eval_sets: Sequence[LabelledSet]
    banks: Sequence[LabelBank]
    preprocess: PreprocessSpec

    def __call__(self, module: nn.Module) -> dict[str, float]:
        encode = module_encoder(module, self.preprocess)
        reports = _score(encode, self.preprocess, self.eval_sets, self.banks)
        return {f"{r.name}_top1_pct": r.top1_pct for r in reports}


def _score(
    encode: EncodePixels,
    preprocess: PreprocessSpec,
    eval_sets: Sequence[LabelledSet],
    banks: Sequence[LabelBank],
) -> list[ZeroShotReport]:
    return [
        evaluate_zero_shot(encode, preprocess, labelled, bank)
        for labelled, bank in zip(eval_sets, banks, strict=True)
    ]


def compare_accuracy(
    eval_sets: Sequence[LabelledSet], banks: Sequence[LabelBank], teacher: Teacher, bundle: Bundle
) -> tuple[AccuracyRow, ...]:
    """The student's accuracy is that of the exported graph, not of the torch module."""
    engine = load_engine(bundle)
    teacher_reports = _score(teacher.encode_images, teacher.preprocess, eval_sets, banks)
    student_reports = _score(engine.encode_pixels, bundle.preprocess, eval_sets, banks)
    return tuple(AccuracyRow(t, s) for t, s in zip(teacher_reports, student_reports, strict=True))


def compare_latency(teacher: Teacher, bundle: Bundle) -> tuple[LatencyReport, LatencyReport]:
    """Teacher and student on one image, in turn, both as ONNX graphs in the same runtime.

    A teacher that cannot be exported is measured in PyTorch, and named so.
    """
    student = load_engine(bundle)
    side = teacher.preprocess.image_size
    image = np.random.default_rng(0).normal(size=(1, 3, side, side)).astype(np.float32)
    small = np.zeros((1, 3, *[bundle.preprocess.image_size] * 2), np.float32)
    tower = Normalised(teacher.image_tower).cpu()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "teacher.onnx"
        call: Callable[[], object]
        try:
            export_onnx(
                tower, path, image_size=side, parity_images=image, metadata={},
                spec=graph_spec(None),
            )  # fmt: skip
            engine = OnnxRuntimeEngine(
                path, preprocess=teacher.preprocess, embed_dim=teacher.embed_dim
            )
            name, call = "ONNX Runtime", lambda: engine.encode_image(image)
        except (ExportError, ParityError) as error:
            logger.warning("the teacher is measured in PyTorch: %s", error)
            name, call = "PyTorch", lambda: _run_eager(tower, image)
        first, second = measure_blocks({name: call, "student": lambda: student.encode_image(small)})
    return first, second


def _run_eager(tower: nn.Module, image: npt.NDArray[np.float32]) -> Tensor:
    with torch.inference_mode():
        embeds: Tensor = tower(torch.from_numpy(image))
        return embeds


def model_row(
    name: str,
    tower: nn.Module,
    target: Target,
    latency: LatencyReport,
    preprocess: PreprocessSpec,
) -> ModelRow:
    ops = trace_ops(tower, preprocess.image_size, 1)
    estimate = estimate_latency(ops, target, precision=target.precision)
    return ModelRow(
        name=name,
        params_m=sum(p.numel() for p in tower.parameters()) / 1e6,
        gmacs=estimate.gmacs,
        target_ms=estimate.latency_ms,
        target_low_ms=estimate.low_ms,
        target_high_ms=estimate.high_ms,
        here_runtime=latency.name if latency.name == "PyTorch" else "ONNX Runtime",
        here_p50_ms=latency.p50_ms,
        here_p90_ms=latency.p90_ms,
    )
