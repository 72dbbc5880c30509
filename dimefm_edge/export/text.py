"""The text side of a bundle: `text.onnx` and `tokenizer.json`, both proven on sentences.

With it a device names what nobody thought of at export. Tokens in, embeddings out: the end
token's place is found in the graph, the causal mask is one of its constants.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from dimefm_edge.encoders import Normalised
from dimefm_edge.errors import lookup
from dimefm_edge.export.graph_spec import GraphSpec
from dimefm_edge.export.onnx import (
    EXAMPLE_BATCH,
    OnnxGraph,
    in_precision,
    is_float_on_cpu,
    land_graph,
)
from dimefm_edge.export.parity import module_embeds
from dimefm_edge.export.rows import linears_on_rows
from dimefm_edge.export.tokenizers import PROBES, convert_tokenizer
from dimefm_edge.export.trace import trace
from dimefm_edge.export.weight_only import (
    WEIGHT_FORMATS,
    WeightFormat,
    quantize_weights,
    require_weight_only,
)
from dimefm_edge.manifest import TEXT_FILE, TEXT_INPUT_NAME, TEXT_OUTPUT_NAME, TOKENIZER_FILE

TEXT_PRECISIONS = ("fp32", "fp16", *WEIGHT_FORMATS)

_KIND = "sentence"
_MASKED = -1e4  # exp() of it is 0, and fp16 holds it: -inf is no number to a range check


class TextSource(Protocol):
    """Whose text side is written: a teacher's, or a text student's."""

    @property
    def name(self) -> str:
        """For the manifest and for errors."""

    @property
    def embed_dim(self) -> int:
        """Size E of the embeddings."""

    @property
    def text_tower(self) -> nn.Module:
        """(B, L) int64 tokens -> (B, E), normalised or not."""

    @property
    def tokenize(self) -> Callable[[Sequence[str]], Any]:
        """Sentences -> (B, L) int64 tokens."""


def write_text_side(
    folder: Path,
    teacher: TextSource,
    *,
    graph: GraphSpec,
    sentences: Sequence[str],
    precision: str | None = None,
) -> dict[str, Any]:
    """Put a text side into a bundle that is being built.

    Args:
        folder: Gets `text.onnx` and `tokenizer.json`.
        teacher: Whose text side.
        graph: The image graph's.
        sentences: Real ones, to check tokens and embeddings on; 64 are plenty.
        precision: A name in `TEXT_PRECISIONS`; int8 and int4 are of the weights alone. Default:
            fp16 where the images' is, else fp32: labels are embedded once.

    Returns:
        The manifest's `text`: what the tokenizer needs around it, nodes, parity.

    Raises:
        ExportError: If the tokenizer or the tower cannot be exported, or the runtime has no
            operators for its weights.
        ParityError: If the graph does not answer as the tower does.
    """
    precision = text_precision(graph, precision)
    sentences = [*PROBES, *sentences]
    tokenizer = convert_tokenizer(teacher.tokenize, name=teacher.name, sentences=sentences)
    (folder / TOKENIZER_FILE).write_bytes(tokenizer.to_bytes())
    attention = "decomposed" if graph.attention == "plugin" else graph.attention
    written = export_text_onnx(
        Normalised(teacher.text_tower),
        folder / TEXT_FILE,
        spec=dataclasses.replace(
            graph,
            precision="fp16" if precision == "fp16" else "fp32",
            quant_rules=None,
            calibration=None,
            attention=attention,
            batch_size=None,
            image_input="float",
        ),
        weights=WEIGHT_FORMATS.get(precision),
        parity_tokens=tokenizer(sentences),
        metadata={"producer": "dimefm_edge", "teacher": teacher.name, "precision": precision},
    )
    return {
        "name": teacher.name,
        **tokenizer.spec.to_dict(),
        "precision": precision,
        "opset": written.opset,
        "graph": written.to_dict(),
        "parity": written.parity.to_dict(_KIND),
    }


def text_precision(graph: GraphSpec, asked: str | None) -> str:
    """The precision of a bundle's text tower.

    Args:
        graph: The image graph's.
        asked: A name in `TEXT_PRECISIONS`, or None.

    Raises:
        ExportError: If the graph's runtime has no operators for it.
        UnknownNameError: If there is no such precision.
    """
    if asked is None:
        return "fp16" if graph.precision == "fp16" else "fp32"
    lookup(dict.fromkeys(TEXT_PRECISIONS), asked, kind="text precision")
    if asked in WEIGHT_FORMATS:
        require_weight_only(asked, runtime=graph.runtime)
    return asked


def export_text_onnx(
    tower: nn.Module,
    path: Path,
    *,
    parity_tokens: npt.NDArray[np.int64],
    metadata: Mapping[str, str],
    spec: GraphSpec | None = None,
    weights: WeightFormat | None = None,
) -> OnnxGraph:
    """Write a text tower as ONNX and check that it answers as torch does.

    Args:
        tower: (B, L) int64 tokens -> (B, E), L2-normalised; not changed.
        path: The file to write, which appears when its parity is proven; its folder exists.
        parity_tokens: (N, L) int64, of real sentences.
        metadata: Put into the graph's metadata.
        spec: Runtime, precision (fp32 or fp16), opset; default: fp32 for TensorRT 10.3.
        weights: Few bits for the weights of an fp32 graph for ONNX Runtime.

    Raises:
        ExportError: If torch cannot export the tower, or the graph is not valid or too large.
        ParityError: If the graph's embeddings are not the tower's, or leave fp16's range.
    """
    spec = spec or GraphSpec()
    expected = module_embeds(tower, parity_tokens, kind=_KIND)
    model = trace(
        _with_finite_masks(tower),
        torch.zeros(EXAMPLE_BATCH, parity_tokens.shape[1], dtype=torch.int64),
        input_name=TEXT_INPUT_NAME,
        output_name=TEXT_OUTPUT_NAME,
        opset=spec.opset,
        attention=spec.attention,
    )
    if weights is None and is_float_on_cpu(spec):
        linears_on_rows(model)
    model = in_precision(model, spec, parity_tokens, kind=_KIND)
    report = None if weights is None else quantize_weights(model, weights)
    written = land_graph(
        model, path, expected, inputs=parity_tokens, spec=spec, metadata=metadata, kind=_KIND,
        min_cosine=None if weights is None else weights.min_cosine,
        precision=None if weights is None else f"int{weights.bits}",
    )  # fmt: skip
    return dataclasses.replace(written, weights=report)


def _with_finite_masks(tower: nn.Module) -> nn.Module:
    copied = copy.deepcopy(tower)
    for part in copied.modules():
        mask = part._buffers.get("attn_mask")
        if mask is not None:
            part._buffers["attn_mask"] = mask.clamp(min=_MASKED)
    return copied
