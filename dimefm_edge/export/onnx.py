"""Students to ONNX: one file, dynamic batch, checked against torch before anyone sees it.

Opset 20: the newest that the parser of JetPack 6's TensorRT 10.3 reads (onnx-tensorrt's
operators.md: opsets 9 to 20 since 10.0), the first with GELU as one node; LayerNormalization
is one since 17. ONNX Runtime reads it from 1.17 on.
"""

from __future__ import annotations

import contextlib
import copy
import io
import logging
import os
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from dimefm_edge.errors import ExportError, ParityError, lookup
from dimefm_edge.export.fp16 import check_fp16_range, convert_to_fp16
from dimefm_edge.manifest import INPUT_NAME, OUTPUT_NAME

if TYPE_CHECKING:
    import onnx
    from torch import nn

logger = logging.getLogger(__name__)

DEFAULT_OPSET = 20
OPSETS = (18, 19, 20)
MAX_ABS_DIFF_FP32 = 1e-4
MIN_COSINE_FP16 = 0.999

_MAX_ONNX_BYTES = 2**31 - 1  # a protobuf message; more would need a second file
_EXAMPLE_BATCH = 2  # torch.export takes 0 and 1 for constants
_PARITY_BATCHES = (1, 7, 32)
_MAX_RANGE_IMAGES = 16


def _keep_fp32(model: onnx.ModelProto) -> onnx.ModelProto:
    return model


def _convert_fp16(model: onnx.ModelProto) -> onnx.ModelProto:
    with _silence():
        return convert_to_fp16(model)


_PRECISIONS = {"fp32": _keep_fp32, "fp16": _convert_fp16}


@dataclass(frozen=True)
class ParityReport:
    """How far an exported graph's embeddings are from the student's, over all images."""

    max_abs_diff: float
    min_cosine: float
    num_images: int


@dataclass(frozen=True)
class OnnxGraph:
    """A written graph: `op_counts` maps each operator to how often it occurs."""

    path: Path
    opset: int
    op_counts: dict[str, int]
    parity: ParityReport


def export_onnx(
    student: nn.Module,
    path: Path,
    *,
    image_size: int,
    precision: str,
    parity_images: npt.NDArray[np.float32],
    metadata: Mapping[str, str],
    opset: int = DEFAULT_OPSET,
) -> OnnxGraph:
    """Write a student as ONNX and check that it answers as torch does.

    Args:
        student: (B, 3, S, S) -> (B, E), L2-normalised; not changed.
        path: The file to write, which appears when its parity is proven; its folder exists.
        image_size: S.
        precision: fp32, or fp16 (weights and products; input, output, norms, softmax in fp32).
        parity_images: (N, 3, S, S) float32, preprocessed real images.
        metadata: Put into the graph's metadata.
        opset: 18 to 20.

    Raises:
        ExportError: If torch cannot export the student, or the graph is not valid.
        ParityError: If the graph's embeddings are not the student's, or leave fp16's range.
        UnknownNameError: If `precision` is neither fp32 nor fp16.
    """
    import onnx

    convert = lookup(_PRECISIONS, precision, kind="ONNX precision")
    if opset not in OPSETS:
        raise ExportError(
            f"opset {opset} is not one of {', '.join(map(str, OPSETS))}",
            hint="leave it out: 20 is what TensorRT 10.3 and ONNX Runtime 1.17 read",
        )
    _check_images(parity_images, image_size)
    expected = _student_embeds(student, parity_images)
    model = convert(_trace(student, image_size=image_size, opset=opset))
    _strip_debug_info(model)
    onnx.helper.set_model_props(model, dict(metadata))
    if model.ByteSize() > _MAX_ONNX_BYTES:
        raise ExportError(
            f"the graph has {model.ByteSize() / 2**30:.1f} GiB; one ONNX file holds 2 GiB",
            hint="export a smaller student, or --precision fp16",
        )
    try:
        onnx.checker.check_model(model, full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        reason = " ".join(str(error).split())
        raise ExportError(f"torch exported a graph that is not valid ONNX: {reason}") from error
    if precision == "fp16":
        with _onnxruntime_errors():
            peak = check_fp16_range(model, parity_images[:_MAX_RANGE_IMAGES])
        logger.info("the largest fp16 activation is %.4g of 65504", peak)
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        part.write_bytes(model.SerializeToString(deterministic=True))
        parity = check_parity(part, expected, images=parity_images, precision=precision)
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)
    return OnnxGraph(path, opset, _count_ops(model), parity)


def check_parity(
    path: Path,
    expected: npt.NDArray[np.float32],
    *,
    images: npt.NDArray[np.float32],
    precision: str,
) -> ParityReport:
    """Compare a graph in ONNX Runtime with the student's own embeddings.

    The images go through in batches of 1, 7 and 32, so a batch size baked into the graph
    shows here.

    Args:
        path: The `.onnx` file.
        expected: (N, E) the student's embeddings, L2-normalised.
        images: (N, 3, S, S) float32, preprocessed.
        precision: fp32 allows a difference of 1e-4 in any value, fp16 a cosine of 0.999.

    Raises:
        ParityError: If an image differs by more; it names the worst one.
    """
    found, rows = _graph_embeds(path, images)
    wanted = expected[rows]
    diffs = np.abs(found - wanted).max(axis=1)
    cosines = (found * wanted).sum(axis=1) / (
        np.maximum(np.linalg.norm(found, axis=1) * np.linalg.norm(wanted, axis=1), 1e-12)
    )
    is_fp16 = precision == "fp16"
    is_good = cosines >= MIN_COSINE_FP16 if is_fp16 else diffs <= MAX_ABS_DIFF_FP32
    if not is_good.all():  # NaN is not good either
        badness = np.nan_to_num(1 - cosines if is_fp16 else diffs, nan=np.inf)
        worst = int(badness.argmax())
        allowed = (
            f"cosine of at least {MIN_COSINE_FP16}"
            if is_fp16
            else f"difference of at most {MAX_ABS_DIFF_FP32:g}"
        )
        raise ParityError(
            f"the {precision} graph does not answer as the student does: worst on image "
            f"{rows[worst]} of {len(images)}, max abs difference {diffs[worst]:.3g}, cosine "
            f"{cosines[worst]:.6f} (allowed: {allowed}); "
            f"{len(set(rows[~is_good].tolist()))} images differ too much",
            hint="dimefm-edge export RUN --precision fp32"
            if is_fp16
            else "another torch or onnxscript release: pip install --upgrade torch onnxscript",
        )
    return ParityReport(float(diffs.max()), min(1.0, float(cosines.min())), len(images))


def _check_images(images: npt.NDArray[np.float32], image_size: int) -> None:
    shape = (3, image_size, image_size)
    if images.ndim != 4 or images.shape[1:] != shape or images.dtype != np.float32:
        raise ExportError(
            f"parity images must be (N, 3, {image_size}, {image_size}) float32, "
            f"got {images.shape} {images.dtype}"
        )
    if not len(images) or not np.isfinite(images).all():
        raise ExportError("parity needs at least one image, without NaN or infinity")


def _student_embeds(student: nn.Module, images: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """(N, E) of the student as it is, on its own device, in float32."""
    import torch

    device = next(student.parameters()).device
    was_training = student.training
    student.eval()
    try:
        with torch.no_grad():
            pieces = [
                student(torch.from_numpy(images[i : i + 32]).to(device)).float().cpu().numpy()
                for i in range(0, len(images), 32)
            ]
    finally:
        student.train(was_training)
    embeds: npt.NDArray[np.float32] = np.concatenate(pieces)
    norms = np.linalg.norm(embeds, axis=1)
    wrong = np.flatnonzero(~(np.abs(norms - 1) < 1e-3))
    if wrong.size:
        raise ExportError(
            f"the student itself answers image {wrong[0]} with an embedding of length "
            f"{norms[wrong[0]]:.4g}, not 1",
            hint="the checkpoint is broken or the training diverged: use an earlier one",
        )
    return embeds


def _trace(student: nn.Module, *, image_size: int, opset: int) -> onnx.ModelProto:
    """Run torch's exporter on a copy of the student; it prints nothing."""
    import torch

    module = _for_inference(student)
    example = torch.zeros(_EXAMPLE_BATCH, 3, image_size, image_size)
    try:
        with _silence(), torch.no_grad():
            program = torch.onnx.export(
                module,
                (example,),
                dynamo=True,
                opset_version=opset,
                input_names=[INPUT_NAME],
                output_names=[OUTPUT_NAME],
                dynamic_shapes=({0: torch.export.Dim("batch")},),
                optimize=True,
                verbose=False,
            )
            assert program is not None
            model: onnx.ModelProto = program.model_proto
    # The exporter wraps whatever its dozen passes raise.
    except Exception as error:
        reason = next((line for line in str(error).splitlines() if line.strip()), repr(error))
        raise ExportError(
            f"torch {torch.__version__} cannot export the student to ONNX: {reason}",
            hint="run with --log-level debug for the exporter's own report",
        ) from error
    found = next(o.version for o in model.opset_import if o.domain in ("", "ai.onnx"))
    if found != opset:
        raise ExportError(f"torch wrote opset {found} when asked for {opset}")
    return model


def _for_inference(student: nn.Module) -> nn.Module:
    """A CPU copy in eval mode and float32, with train-time branches merged.

    A ViT's attention spells itself out: torch's fused one becomes a dozen shape computations
    around the same two products, which hide them from TensorRT's fused kernel. FastViT's
    stays: ONNX Runtime 1.32 fails on an fp16 graph of its spelt-out form (AttentionFusion).
    """
    from timm.models.vision_transformer import Attention  # type: ignore[attr-defined]
    from timm.utils.model import reparameterize_model

    module = copy.deepcopy(student).cpu().float().eval()
    for parameter in module.parameters():
        parameter.requires_grad_(False)
    for part in module.modules():
        if isinstance(part, Attention):
            part.fused_attn = False  # type: ignore[misc]
    merged: nn.Module = reparameterize_model(module, inplace=True)
    return merged


@contextlib.contextmanager
def _silence() -> Iterator[None]:
    """Send what the exporter prints and warns to the debug log."""
    noise = io.StringIO()
    with (
        contextlib.redirect_stdout(noise),
        contextlib.redirect_stderr(noise),
        warnings.catch_warnings(record=True) as caught,
    ):
        warnings.simplefilter("always")
        levels = {
            name: logging.getLogger(name).level for name in ("torch", "onnxscript", "onnx_ir")
        }
        for name in levels:
            logging.getLogger(name).setLevel(logging.ERROR)
        try:
            yield
        finally:
            for name, level in levels.items():
                logging.getLogger(name).setLevel(level)
    for line in noise.getvalue().splitlines() + [str(w.message) for w in caught]:
        logger.debug("torch.onnx: %s", line)


def _strip_debug_info(model: onnx.ModelProto) -> None:
    """Drop stack traces: they hold paths of the machine that exported."""
    graph = model.graph
    for items in (graph.node, graph.input, graph.output, graph.value_info, graph.initializer):
        for item in items:
            item.ClearField("metadata_props")
            item.ClearField("doc_string")
    graph.ClearField("metadata_props")
    graph.ClearField("doc_string")
    graph.name = "student"


def _count_ops(model: onnx.ModelProto) -> dict[str, int]:
    counts: dict[str, int] = {}
    for node in model.graph.node:
        counts[node.op_type] = counts.get(node.op_type, 0) + 1
    return dict(sorted(counts.items()))


def _graph_embeds(
    path: Path, images: npt.NDArray[np.float32]
) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.int64]]:
    """Embeddings by the graph, and the image that each row is of."""
    import onnxruntime  # type: ignore[import-untyped]

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    with _onnxruntime_errors():
        session = onnxruntime.InferenceSession(
            str(path), options, providers=["CPUExecutionProvider"]
        )
        # Few images are repeated, so that every batch size is run.
        rows = np.arange(max(len(images), sum(_PARITY_BATCHES[:2]))) % len(images)
        pieces: list[npt.NDArray[np.float32]] = []
        start = 0
        while start < len(rows):
            size = _PARITY_BATCHES[min(len(pieces), len(_PARITY_BATCHES) - 1)]
            batch = images[rows[start : start + size]]
            (embeds,) = session.run([OUTPUT_NAME], {INPUT_NAME: batch})
            pieces.append(np.asarray(embeds, np.float32))
            start += size
    return np.concatenate(pieces), rows


@contextlib.contextmanager
def _onnxruntime_errors() -> Iterator[None]:
    """Turn what ONNX Runtime raises, which has no base but Exception, into ExportErrors."""
    import onnxruntime

    try:
        yield
    except ParityError:
        raise
    except Exception as error:
        raise ExportError(
            f"ONNX Runtime {onnxruntime.__version__} cannot run the exported graph: "
            + " ".join(str(error).split())
        ) from error
