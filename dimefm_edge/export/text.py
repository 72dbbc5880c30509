"""The text side of a bundle: `text.onnx` and `tokenizer.json`, both proven on sentences.

With it a device names what nobody thought of at export. Tokens in, embeddings out: the end
token's place is found in the graph, the causal mask is one of its constants.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from dimefm_edge.encoders import Normalised
from dimefm_edge.errors import ExportError, ParityError, lookup
from dimefm_edge.export.fp16 import check_fp16_range
from dimefm_edge.export.onnx import (
    _PRECISIONS,
    DEFAULT_OPSET,
    MAX_ABS_DIFF_FP32,
    MIN_COSINE_FP16,
    _count_ops,
    _onnxruntime_errors,
    _silence,
    _strip_debug_info,
)
from dimefm_edge.export.tokenizers import PROBES, convert_tokenizer
from dimefm_edge.manifest import TEXT_FILE, TEXT_INPUT_NAME, TEXT_OUTPUT_NAME, TOKENIZER_FILE

if TYPE_CHECKING:
    import onnx

    from dimefm_edge.teacher import Teacher

_MAX_ONNX_BYTES = 2**31 - 1  # a protobuf message
_EXAMPLE_BATCH = 2  # torch.export takes 0 and 1 for constants
_PARITY_BATCHES = (1, 7, 32)
_MAX_RANGE_SENTENCES = 16
_MASKED = -1e4  # exp() of it is 0, and fp16 holds it: -inf is no number to a range check


@dataclass(frozen=True)
class TextParity:
    """How far a text graph's embeddings are from the tower's, over all sentences."""

    max_abs_diff: float
    min_cosine: float
    num_sentences: int


@dataclass(frozen=True)
class TextGraph:
    """A written text tower: `op_counts` maps each operator to how often it occurs."""

    path: Path
    opset: int
    op_counts: dict[str, int]
    parity: TextParity


def write_text_side(
    folder: Path, teacher: Teacher, *, precision: str, sentences: Sequence[str]
) -> dict[str, Any]:
    """Put a teacher's text side into a bundle that is being built.

    Args:
        folder: Gets `text.onnx` and `tokenizer.json`.
        teacher: Whose text side.
        precision: Of the graph: fp32 or fp16.
        sentences: Real ones, to check tokens and embeddings on; 64 are plenty.

    Returns:
        The manifest's `text`: what the tokenizer needs around it, nodes, parity.

    Raises:
        ExportError: If the tokenizer or the tower cannot be exported.
        ParityError: If the graph does not answer as the tower does.
    """
    sentences = [*PROBES, *sentences]
    tokenizer = convert_tokenizer(teacher.tokenize, name=teacher.name, sentences=sentences)
    (folder / TOKENIZER_FILE).write_bytes(tokenizer.to_bytes())
    graph = export_text_onnx(
        Normalised(teacher.text_tower),
        folder / TEXT_FILE,
        precision=precision,
        parity_tokens=tokenizer(sentences),
        metadata={"producer": "dimefm_edge", "teacher": teacher.name, "precision": precision},
    )
    parity = graph.parity
    return {
        **tokenizer.spec.to_dict(),
        "precision": precision,
        "opset": graph.opset,
        "graph": {"nodes": sum(graph.op_counts.values()), "op_counts": graph.op_counts},
        "parity": {
            "max_abs_diff": parity.max_abs_diff,
            "min_cosine": parity.min_cosine,
            "num_sentences": parity.num_sentences,
        },
    }


def export_text_onnx(
    tower: nn.Module,
    path: Path,
    *,
    precision: str,
    parity_tokens: npt.NDArray[np.int64],
    metadata: Mapping[str, str],
    opset: int = DEFAULT_OPSET,
) -> TextGraph:
    """Write a text tower as ONNX and check that it answers as torch does.

    Args:
        tower: (B, L) int64 tokens -> (B, E), L2-normalised; not changed.
        path: The file to write, which appears when its parity is proven; its folder exists.
        precision: fp32, or fp16 (input int64, output, norms and softmax in fp32).
        parity_tokens: (N, L) int64, of real sentences.
        metadata: Put into the graph's metadata.
        opset: Of the graph.

    Raises:
        ExportError: If torch cannot export the tower, or the graph is not valid or too large.
        ParityError: If the graph's embeddings are not the tower's, or leave fp16's range.
        UnknownNameError: If `precision` is neither fp32 nor fp16.
    """
    import onnx

    convert = lookup(_PRECISIONS, precision, kind="ONNX precision")
    expected = _tower_embeds(tower, parity_tokens)
    length = parity_tokens.shape[1]
    model = convert(_trace(_made_ready(tower), context_length=length, opset=opset))
    _strip_debug_info(model)
    model.graph.name = "text"
    onnx.helper.set_model_props(model, dict(metadata))
    if model.ByteSize() > _MAX_ONNX_BYTES:
        raise ExportError(
            f"the text tower has {model.ByteSize() / 2**30:.1f} GiB; one ONNX file holds 2 GiB",
            hint="--precision fp16, or --image-only",
        )
    try:
        onnx.checker.check_model(model, full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        reason = " ".join(str(error).split())
        raise ExportError(f"torch exported a text tower that is not valid: {reason}") from error
    if precision == "fp16":
        with _onnxruntime_errors():
            check_fp16_range(model, parity_tokens[:_MAX_RANGE_SENTENCES], kind="sentence")
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        part.write_bytes(model.SerializeToString(deterministic=True))
        parity = check_text_parity(part, expected, tokens=parity_tokens, precision=precision)
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)
    return TextGraph(path, opset, _count_ops(model), parity)


def check_text_parity(
    path: Path,
    expected: npt.NDArray[np.float32],
    *,
    tokens: npt.NDArray[np.int64],
    precision: str,
) -> TextParity:
    """Compare a text graph in ONNX Runtime with the tower's own embeddings.

    The sentences go through in batches of 1, 7 and 32, so a batch size baked into the graph
    shows here.

    Args:
        path: The `.onnx` file.
        expected: (N, E) the tower's embeddings, L2-normalised.
        tokens: (N, L) int64.
        precision: fp32 allows a difference of 1e-4 in any value, fp16 a cosine of 0.999.

    Raises:
        ParityError: If a sentence differs by more; it names the worst one.
    """
    found, rows = _graph_embeds(path, tokens)
    diffs = np.abs(found - expected[rows]).max(axis=1)
    cosines = (found * expected[rows]).sum(axis=1)
    is_fp16 = precision == "fp16"
    is_good = cosines >= MIN_COSINE_FP16 if is_fp16 else diffs <= MAX_ABS_DIFF_FP32
    if not is_good.all():  # NaN is not good either
        badness = np.nan_to_num(1 - cosines if is_fp16 else diffs, nan=np.inf)
        worst = int(badness.argmax())
        raise ParityError(
            f"the {precision} text graph does not answer as the text tower does: worst on "
            f"sentence {rows[worst]} of {len(tokens)}, max abs difference {diffs[worst]:.3g}, "
            f"cosine {cosines[worst]:.6f}; {len(set(rows[~is_good].tolist()))} differ too much",
            hint="--precision fp32"
            if is_fp16
            else "another torch or onnxscript release: pip install --upgrade torch onnxscript",
        )
    return TextParity(float(diffs.max()), min(1.0, float(cosines.min())), len(tokens))


def _tower_embeds(tower: nn.Module, tokens: npt.NDArray[np.int64]) -> npt.NDArray[np.float32]:
    """(N, E) of the tower as it is, on its own device, in float32."""
    device = next(tower.parameters()).device
    with torch.no_grad():
        pieces = [
            tower(torch.from_numpy(tokens[i : i + 32]).to(device)).float().cpu().numpy()
            for i in range(0, len(tokens), 32)
        ]
    embeds: npt.NDArray[np.float32] = np.concatenate(pieces)
    if not np.isfinite(embeds).all():
        raise ExportError("the text tower itself answers with values that are not numbers")
    return embeds


class _SelfAttention(nn.Module):
    """torch's MultiheadAttention of one batch of sequences, with the sequences last but one.

    torch's own puts them first: its transposes cost time, and in fp16 they crash ONNX Runtime
    1.32 as it loads the graph (its NchwcTransformer).
    """

    def __init__(self, original: nn.MultiheadAttention) -> None:
        super().__init__()
        self.original = original

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, **_: Any
    ) -> tuple[Tensor, None]:
        """(B, N, D), three times the same -> (B, N, D) and no weights."""
        own = self.original
        packed = nn.functional.linear(query, own.in_proj_weight, own.in_proj_bias)
        q, k, v = packed.unflatten(-1, (3, own.num_heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        if attn_mask is not None and attn_mask.ndim == 3:  # CoCa's: one for each head of each
            attn_mask = attn_mask.unflatten(0, (query.shape[0], own.num_heads))
        scores = (q * own.head_dim**-0.5) @ k.transpose(-2, -1)
        weights = (scores if attn_mask is None else scores + attn_mask).softmax(dim=-1)
        return own.out_proj((weights @ v).transpose(1, 2).flatten(2)), None


def _made_ready(tower: nn.Module) -> nn.Module:
    """A copy on the CPU whose attentions are spelt out and whose causal masks are finite."""
    from open_clip.transformer import ResidualAttentionBlock

    copied = copy.deepcopy(tower).cpu().float().eval().requires_grad_(False)
    for part in list(copied.modules()):
        mask = part._buffers.get("attn_mask")
        if mask is not None:
            part._buffers["attn_mask"] = mask.clamp(min=_MASKED)
        if type(part) is ResidualAttentionBlock and part.attn.batch_first:
            part.attn = _SelfAttention(part.attn)
    return copied


def _trace(tower: nn.Module, *, context_length: int, opset: int) -> onnx.ModelProto:
    """Run torch's exporter on a tower made ready; it prints nothing."""
    example = torch.zeros(_EXAMPLE_BATCH, context_length, dtype=torch.int64)
    try:
        with _silence(), torch.no_grad():
            program = torch.onnx.export(
                tower,
                (example,),
                dynamo=True,
                opset_version=opset,
                input_names=[TEXT_INPUT_NAME],
                output_names=[TEXT_OUTPUT_NAME],
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
            f"torch {torch.__version__} cannot export the text tower to ONNX: {reason}",
            hint="--image-only leaves the text side out; --verbose shows the exporter's report",
        ) from error
    return model


def _graph_embeds(
    path: Path, tokens: npt.NDArray[np.int64]
) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.int64]]:
    """Embeddings by the graph, and the sentence that each row is of."""
    import onnxruntime  # type: ignore[import-untyped]

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    with _onnxruntime_errors():
        session = onnxruntime.InferenceSession(
            str(path), options, providers=["CPUExecutionProvider"]
        )
        # Few sentences are repeated, so that every batch size is run.
        rows = np.arange(max(len(tokens), sum(_PARITY_BATCHES))) % len(tokens)
        pieces: list[npt.NDArray[np.float32]] = []
        start = 0
        while start < len(rows):
            size = _PARITY_BATCHES[min(len(pieces), len(_PARITY_BATCHES) - 1)]
            batch = tokens[rows[start : start + size]]
            (embeds,) = session.run([TEXT_OUTPUT_NAME], {TEXT_INPUT_NAME: batch})
            pieces.append(np.asarray(embeds, np.float32))
            start += size
    return np.concatenate(pieces), rows
