"""Export: a trained student becomes a bundle that runs without torch; parity always checked."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from dimefm_edge.errors import ExportError, lookup
from dimefm_edge.export.aot_inductor import export_onnx_and_pt2
from dimefm_edge.export.bundle import building, record_accuracy, write_bundle
from dimefm_edge.export.onnx import OnnxGraph, ParityReport, check_parity, export_onnx
from dimefm_edge.labels import LabelBank
from dimefm_edge.manifest import MODEL_FILE

if TYPE_CHECKING:
    from dimefm_edge.students import LoadedStudent

__all__ = [
    "EXPORTERS", "OnnxGraph", "ParityReport", "check_parity", "export_onnx", "export_student",
    "record_accuracy",
]  # fmt: skip

EXPORTERS: dict[str, Callable[..., OnnxGraph]] = {
    "onnx": export_onnx,
    "pt2": export_onnx_and_pt2,
}
"""Formats; each writes one graph and checks its parity, with `export_onnx`'s arguments."""


def export_student(
    loaded: LoadedStudent,
    out: Path,
    *,
    fmt: str = "onnx",
    precision: str = "fp32",
    label_banks: Sequence[LabelBank] = (),
    parity_images: npt.NDArray[np.float32],
    logit_scale: float,
    extra: Mapping[str, Any] | None = None,
) -> Path:
    """Write a student as a bundle, which appears at `out` whole or not at all.

    Args:
        loaded: The student with its spec and preprocessing.
        out: Folder, or an archive when it ends in `.zip`. A bundle of ours there is replaced.
        fmt: A name in `EXPORTERS`.
        precision: fp32 or fp16.
        label_banks: Label sets to bake in, the default one first.
        parity_images: (N, 3, S, S) float32, preprocessed real images; 64 are plenty.
        logit_scale: Exponentiated; the teacher's.
        extra: JSON values for the manifest: `target` and `accuracy` get places of their own,
            the rest goes under `extra`.

    Returns:
        `out`.

    Raises:
        ExportError: If the student cannot be exported or `out` cannot be written.
        InputError: If `out` exists and is not a bundle of ours.
        ParityError: If the exported graph does not answer as the student does.
        UnknownNameError: If there is no such format or precision.
    """
    export = lookup(EXPORTERS, fmt, kind="export format")
    spec, preprocess = loaded.spec, loaded.preprocess
    if spec.image_size != preprocess.image_size:
        raise ExportError(
            f"the student takes {spec.image_size} px but its preprocessing gives "
            f"{preprocess.image_size} px"
        )
    for bank in label_banks:
        if bank.embeds.shape[1] != spec.embed_dim:
            raise ExportError(
                f"label set '{bank.name}' has {bank.embeds.shape[1]} dimensions, the student "
                f"{spec.embed_dim}: they are of different teachers"
            )
    others = dict(extra or {})
    target, accuracy = others.pop("target", None), others.pop("accuracy", None)
    with building(out) as folder:
        graph = export(
            loaded.student,
            folder / MODEL_FILE,
            image_size=spec.image_size,
            precision=precision,
            parity_images=parity_images,
            metadata=_graph_metadata(loaded, precision, logit_scale),
        )
        fields = {
            "name": spec.name,
            "spec": spec.to_dict(),
            "target": target,
            "precision": precision,
            "opset": graph.opset,
            "preprocess": preprocess.to_dict(),
            "embed_dim": spec.embed_dim,
            "logit_scale": float(logit_scale),
            "graph": {"nodes": sum(graph.op_counts.values()), "op_counts": graph.op_counts},
            "parity": asdict(graph.parity),
            "accuracy": accuracy,
            "extra": others,
        }
        write_bundle(folder, fields, label_banks=label_banks)
    return out


def _graph_metadata(loaded: LoadedStudent, precision: str, logit_scale: float) -> dict[str, str]:
    """What a `model.onnx` alone, without its bundle, should still tell."""
    preprocess = loaded.preprocess
    return {
        "producer": "dimefm_edge",
        "student": loaded.spec.name,
        "family": loaded.spec.family,
        "precision": precision,
        "image_size": str(preprocess.image_size),
        "embed_dim": str(loaded.spec.embed_dim),
        "logit_scale": f"{logit_scale:.6g}",
        "mean": ",".join(f"{v:.8g}" for v in preprocess.mean),
        "std": ",".join(f"{v:.8g}" for v in preprocess.std),
        "interpolation": preprocess.interpolation,
        "resize_mode": preprocess.resize_mode,
    }
