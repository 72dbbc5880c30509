"""Export: a student or a teacher becomes a bundle that runs without torch; parity checked."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from dimefm_edge.errors import ExportError, lookup
from dimefm_edge.export.aot_inductor import export_onnx_and_pt2
from dimefm_edge.export.bundle import building, record_accuracy, write_bundle
from dimefm_edge.export.graph_spec import GraphSpec, graph_spec
from dimefm_edge.export.learned import FakeQuantised
from dimefm_edge.export.onnx import FusionReport, OnnxGraph, export_onnx
from dimefm_edge.export.parity import ParityReport, check_parity
from dimefm_edge.export.plugin import write_kernels
from dimefm_edge.export.text import TextSource, write_text_side
from dimefm_edge.export.towers import LoadedTeacher, image_tower
from dimefm_edge.labels import LabelBank
from dimefm_edge.manifest import MODEL_FILE

if TYPE_CHECKING:
    from dimefm_edge.students import LoadedStudent

__all__ = [
    "EXPORTERS", "FusionReport", "GraphSpec", "OnnxGraph", "ParityReport", "check_parity",
    "export_onnx", "export_student", "graph_spec", "image_tower", "record_accuracy",
]  # fmt: skip

EXPORTERS: dict[str, Callable[..., OnnxGraph]] = {
    "onnx": export_onnx,
    "pt2": export_onnx_and_pt2,
}
"""Formats; each writes one graph and checks its parity, with `export_onnx`'s arguments."""


def export_student(
    loaded: LoadedStudent | LoadedTeacher,
    out: Path,
    *,
    fmt: str = "onnx",
    graph: GraphSpec | None = None,
    head: str | None = None,
    label_banks: Sequence[LabelBank] = (),
    parity_images: npt.NDArray[np.float32],
    logit_scale: float,
    extra: Mapping[str, Any] | None = None,
    text_teacher: TextSource | None = None,
    parity_sentences: Sequence[str] = (),
    text_precision: str | None = None,
) -> Path:
    """Write a student or a teacher's `image_tower` as a bundle, whole or not at all at `out`.

    Args:
        loaded: The student with its spec and preprocessing.
        out: Folder, or an archive when it ends in `.zip`. A bundle of ours there is replaced.
        fmt: A name in `EXPORTERS`.
        graph: Runtime, precision, opset, input; default: fp32 for TensorRT 10.3.
        head: Name of a label set whose class scores the graph gives as well.
        label_banks: Label sets to bake in, the default one first.
        parity_images: (N, 3, S, S) float32, preprocessed real images; 64 are plenty.
        logit_scale: Exponentiated; the teacher's.
        extra: JSON values for the manifest: `target` and `accuracy` get places of their own,
            the rest goes under `extra`.
        text_teacher: Whose text side goes into the bundle, a teacher's or a text student's; None
            for label sets only.
        parity_sentences: Real sentences; 64 are plenty.
        text_precision: fp32, fp16, int8 or int4 of the text side; default: fp16 where the
            images' is, else fp32.

    Returns:
        `out`.

    Raises:
        ExportError: If the student cannot be exported or `out` cannot be written.
        InputError: If `out` exists and is not a bundle of ours.
        ParityError: If the exported graph does not answer as the student does.
        UnknownNameError: If there is no such format or label set.
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
    if text_teacher is not None and text_teacher.embed_dim != spec.embed_dim:
        raise ExportError(
            f"{text_teacher.name} answers in {text_teacher.embed_dim} dimensions, the "
            f"student in {spec.embed_dim}: it was taught by another"
        )
    graph = graph or GraphSpec()
    if graph.attention == "packed" and isinstance(loaded.student, FakeQuantised):
        graph = replace(graph, attention="decomposed")  # ranges were learned of each projection
    banks = {bank.name: bank for bank in label_banks}
    head_bank = None if head is None else lookup(banks, head, kind="label set for the head")
    others = dict(extra or {})
    target, accuracy = others.pop("target", None), others.pop("accuracy", None)
    with building(out) as folder:
        text = None
        if text_teacher is not None:  # first: not every tokenizer can come along
            text = write_text_side(
                folder, text_teacher, graph=graph, sentences=parity_sentences,
                precision=text_precision,
            )  # fmt: skip
        written = export(
            loaded.student,
            folder / MODEL_FILE,
            image_size=spec.image_size,
            parity_images=parity_images,
            metadata=_graph_metadata(loaded, graph, logit_scale),
            spec=graph,
            preprocess=preprocess,
            head=head_bank,
            logit_scale=logit_scale,
        )
        kernels = None
        if graph.attention == "plugin":
            assert graph.sm is not None
            kernels = write_kernels(folder, written.path, precision=graph.precision, sm=graph.sm)
        fields = {
            "name": spec.name,
            "spec": spec.to_dict(),
            "target": target,
            "precision": graph.precision,
            "opset": graph.opset,
            "preprocess": preprocess.to_dict(),
            "embed_dim": spec.embed_dim,
            "logit_scale": float(logit_scale),
            "graph": graph.to_dict() | {"head": head, "kernels": kernels} | written.to_dict(),
            "parity": written.parity.to_dict(),
            "quantization": graph.quant_rules and {"rules": graph.quant_rules},
            "accuracy": accuracy,
            "extra": others,
            "text": text,
        }
        write_bundle(folder, fields, label_banks=label_banks)
    return out


def _graph_metadata(
    loaded: LoadedStudent | LoadedTeacher, graph: GraphSpec, logit_scale: float
) -> dict[str, str]:
    """What a `model.onnx` alone, without its bundle, should still tell."""
    preprocess = loaded.preprocess
    return {
        "producer": "dimefm_edge",
        "student": loaded.spec.name,
        "family": loaded.spec.family,
        "precision": graph.precision,
        "image_input": graph.image_input,
        "image_size": str(preprocess.image_size),
        "embed_dim": str(loaded.spec.embed_dim),
        "logit_scale": f"{logit_scale:.6g}",
        "mean": ",".join(f"{v:.8g}" for v in preprocess.mean),
        "std": ",".join(f"{v:.8g}" for v in preprocess.std),
        "interpolation": preprocess.interpolation,
        "resize_mode": preprocess.resize_mode,
        "fill_color": str(preprocess.fill_color),
    }
