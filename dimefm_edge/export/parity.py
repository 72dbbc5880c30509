"""Parity: an exported graph must answer as the module that it was made from."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from dimefm_edge.errors import ExportError, ParityError
from dimefm_edge.targets.cpu import int8_products_saturate, unwanted_rewrites

if TYPE_CHECKING:
    from torch import nn

MAX_ABS_DIFF_FP32 = 1e-4
MIN_COSINE = {"fp16": 0.999, "int8": 0.98, "fp8": 0.98}
"""Least cosine allowed; in 8 bits that of the least strict rules (quant_rules.py has each)."""

PARITY_BATCHES = (1, 7, 32)


@dataclass(frozen=True)
class ParityReport:
    """How far an exported graph's embeddings are from the module's, over all inputs."""

    max_abs_diff: float
    min_cosine: float
    num_inputs: int

    def to_dict(self, kind: str = "image") -> dict[str, float | int]:
        """Plain values, for a manifest: the last one is `num_images`, or whatever they are."""
        return {
            "max_abs_diff": self.max_abs_diff,
            "min_cosine": self.min_cosine,
            f"num_{kind}s": self.num_inputs,
        }


def module_embeds(
    module: nn.Module, inputs: npt.NDArray[Any], *, kind: str = "image"
) -> npt.NDArray[np.float32]:
    """(N, E) of a module as it is, on its own device, in float32.

    Args:
        module: (B, ...) -> (B, E), L2-normalised.
        inputs: (N, ...), as the module takes them.
        kind: What one of them is, for errors.

    Raises:
        ExportError: If an embedding is not of unit length: the module itself is broken.
    """
    import torch

    device = next(module.parameters()).device
    was_training = module.training
    module.eval()
    try:
        with torch.no_grad():
            pieces = [
                module(torch.from_numpy(inputs[i : i + 32]).to(device)).float().cpu().numpy()
                for i in range(0, len(inputs), 32)
            ]
    finally:
        module.train(was_training)
    embeds: npt.NDArray[np.float32] = np.concatenate(pieces)
    norms = np.linalg.norm(embeds, axis=1)
    wrong = np.flatnonzero(~(np.abs(norms - 1) < 1e-3))
    if wrong.size:
        raise ExportError(
            f"the model itself answers {kind} {wrong[0]} with an embedding of length "
            f"{norms[wrong[0]]:.4g}, not 1",
            hint="the checkpoint is broken or the training diverged: use an earlier one",
        )
    return embeds


def check_parity(
    path: Path,
    expected: npt.NDArray[np.float32],
    *,
    inputs: npt.NDArray[Any],
    precision: str,
    batch_size: int | None = None,
    kind: str = "image",
    min_cosine: float | None = None,
) -> ParityReport:
    """Compare a graph in ONNX Runtime with the module's own embeddings.

    The inputs go through in batches of 1, 7 and 32, so a batch size baked into the graph
    shows here.

    Args:
        path: The `.onnx` file, of one input; its first output is compared.
        expected: (N, E) the module's embeddings, L2-normalised.
        inputs: (N, ...) as the graph takes them.
        precision: fp32 allows a difference of 1e-4 in any value, fp16 a cosine of 0.999, int8
            one of 0.98.
        batch_size: The graph's, where it is fixed.
        kind: What an input is, for errors.
        min_cosine: Demanded instead of what the precision allows.

    Raises:
        ExportError: If ONNX Runtime cannot run the graph.
        ParityError: If an embedding differs by more; it names the worst one.
    """
    found, rows = _graph_embeds(path, inputs, batch_size, precision)
    wanted = expected[rows]
    diffs = np.abs(found - wanted).max(axis=1)
    cosines = (found * wanted).sum(axis=1) / (
        np.maximum(np.linalg.norm(found, axis=1) * np.linalg.norm(wanted, axis=1), 1e-12)
    )
    min_cosine = MIN_COSINE.get(precision) if min_cosine is None else min_cosine
    is_good = diffs <= MAX_ABS_DIFF_FP32 if min_cosine is None else cosines >= min_cosine
    if not is_good.all():  # NaN is not good either
        badness = np.nan_to_num(diffs if min_cosine is None else 1 - cosines, nan=np.inf)
        worst = int(badness.argmax())
        allowed = (
            f"difference of at most {MAX_ABS_DIFF_FP32:g}"
            if min_cosine is None
            else f"cosine of at least {min_cosine}"
        )
        raise ParityError(
            f"the {precision} graph does not answer as the model does: worst on {kind} "
            f"{rows[worst]} of {len(inputs)}, max abs difference {diffs[worst]:.3g}, cosine "
            f"{cosines[worst]:.6f} (allowed: {allowed}); "
            f"{len(set(rows[~is_good].tolist()))} {kind}s differ too much",
            hint=_mend(precision, kind, is_float=min_cosine is None),
        )
    return ParityReport(float(diffs.max()), min(1.0, float(cosines.min())), len(inputs))


def _mend(precision: str, kind: str, *, is_float: bool) -> str:
    if is_float:
        return "another torch or onnxscript release: pip install --upgrade torch onnxscript"
    if kind == "sentence":
        return "dimefm-edge export RUN --text-precision fp32"
    worst = "; or distill --ptq int8 --max-drop 1, which leaves the worst layers in float"
    return f"dimefm-edge export RUN --precision fp32{worst if precision == 'int8' else ''}"


def _graph_embeds(
    path: Path, inputs: npt.NDArray[Any], batch_size: int | None, precision: str
) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.int64]]:
    """Embeddings by the graph, and the input that each row is of."""
    with onnxruntime_errors():
        session = cpu_session(str(path), precision=precision)
        batches = PARITY_BATCHES if batch_size is None else (batch_size,)
        input_name, output_name = session.get_inputs()[0].name, session.get_outputs()[0].name
        # Few inputs are repeated, so that every batch size is run, and fixed ones are full.
        least = max(len(inputs), sum(batches[:2]))
        count = least if batch_size is None else -(-least // batch_size) * batch_size
        rows = np.arange(count) % len(inputs)
        pieces: list[npt.NDArray[np.float32]] = []
        start = 0
        while start < len(rows):
            size = batches[min(len(pieces), len(batches) - 1)]
            batch = inputs[rows[start : start + size]]
            (embeds,) = session.run([output_name], {input_name: batch})
            pieces.append(np.asarray(embeds, np.float32))
            start += size
    return np.concatenate(pieces), rows


def cpu_session(model: bytes | str, *, precision: str = "fp32", profile: str | None = None) -> Any:
    """An ONNX Runtime session of a graph, or of its file, that an export runs to look at it.

    Args:
        model: The graph, or its file.
        precision: The graph's.
        profile: How a file begins that each kernel's time is written to; None writes none.
    """
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    if profile is not None:
        options.enable_profiling = True
        options.profile_file_prefix = profile
    if int8_products_saturate():  # as the runtime does: a graph may be for another CPU
        options.add_session_config_entry("session.x64quantprecision", "1")
    return onnxruntime.InferenceSession(
        model, options, providers=["CPUExecutionProvider"],
        disabled_optimizers=unwanted_rewrites(precision),
    )  # fmt: skip


@contextlib.contextmanager
def onnxruntime_errors() -> Iterator[None]:
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
