"""Text students: CLIP's text transformer, smaller, so that a teacher's can be inherited.

Fewer layers, and a token embedding of two factors (ALBERT, arXiv 1909.11942): a table of
`token_dim` numbers a word and one matrix up to the width. Of a CLIP text tower the table is most
of what is left when layers go. Words in, one embedding out, in the teacher's space and by the
teacher's tokenizer.
"""

from __future__ import annotations

import re
from collections import OrderedDict
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from open_clip.transformer import (
    QuickGELU,
    ResidualAttentionBlock,
    TextTransformer,
    Transformer,
    text_global_pool,
)
from torch import Tensor, nn

from dimefm_edge.errors import ConfigError, UnknownNameError, lookup
from dimefm_edge.students.heirs import inherited_layers
from dimefm_edge.students.vit import activation_name

_ACTIVATIONS: dict[str, Any] = {
    "gelu": nn.GELU, "gelu_tanh": partial(nn.GELU, approximate="tanh"), "quick_gelu": QuickGELU,
}  # fmt: skip
_POOLS = ("argmax", "eos", "first", "last")
_NAME = re.compile(r"text-w(\d+)-d(\d+)(?:-e(\d+))?")
_MAX_SIZE = 2**24
_AUTO_LAYERS, _AUTO_TOKEN_DIM = 3, 4
"""`auto` takes the teacher's layers and numbers a word, divided by these."""
SHARED_GEOMETRY = ("vocab_size", "width", "num_heads", "mlp_ratio", "act", "norm_eps", "is_causal",
                   "pool", "eos_id")  # fmt: skip
"""What a student and a teacher must have in common for layers to be handed down."""


@dataclass(frozen=True)
class TextSpec:
    """What a text student is: enough to build it with random weights."""

    name: str
    """For people: `text-w512-d4-e128`."""
    vocab_size: int
    """Tokens that there are."""
    context_length: int
    """L: tokens of a sentence, padding included."""
    width: int
    depth: int
    num_heads: int
    token_dim: int
    """Numbers of a token's row in the table; the width where it is not factorised."""
    embed_dim: int
    """Size E of the embeddings: the teacher's."""
    mlp_ratio: float = 4.0
    act: str = "gelu"
    norm_eps: float = 1e-5
    is_causal: bool = True
    """Whether a token sees those before it only, as in CLIP."""
    pool: str = "argmax"
    """Whose features are the sentence's: argmax, the token with the highest id, CLIP's end token;
    eos, the one that is `eos_id`; first; last."""
    eos_id: int = 2
    has_proj_bias: bool = False

    def __post_init__(self) -> None:
        sizes = ("vocab_size", "context_length", "width", "depth", "num_heads", "token_dim",
                 "embed_dim")  # fmt: skip
        for name in sizes:
            value = getattr(self, name)
            is_whole = isinstance(value, int) and not isinstance(value, bool)
            if not is_whole or not 0 < value <= _MAX_SIZE:
                raise ConfigError(f"text student {self.name}: {name} cannot be {value!r}")
        if self.width % self.num_heads:
            raise ConfigError(
                f"text student {self.name}: {self.num_heads} heads do not divide width {self.width}"
            )
        if self.token_dim > self.width:
            raise ConfigError(
                f"text student {self.name}: {self.token_dim} numbers a token are more than the "
                f"width {self.width}"
            )
        lookup(dict.fromkeys(_POOLS), self.pool, kind="pooling")
        lookup(_ACTIVATIONS, self.act, kind="activation")

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return asdict(self)

    def needed_length(self, tokens: npt.NDArray[np.int64]) -> int:
        """How much of (B, L) tokens tells the embeddings: in a causal student, what comes behind
        the last end token changes nothing."""
        if not self.is_causal or self.pool not in ("argmax", "eos"):
            return int(tokens.shape[1])
        ends = (tokens if self.pool == "argmax" else tokens == self.eos_id).argmax(axis=1)
        return int(ends.max()) + 1


class TextStudent(nn.Module):
    """A text encoder that answers in the teacher's embedding space."""

    def __init__(self, spec: TextSpec) -> None:
        """Build `spec` with random weights, as open_clip initialises its text towers."""
        super().__init__()
        self.spec = spec
        table = nn.Embedding(spec.vocab_size, spec.token_dim)
        nn.init.normal_(table.weight, std=0.02)
        self.token_embedding: nn.Module = table
        if spec.token_dim < spec.width:
            up = nn.Linear(spec.token_dim, spec.width, bias=False)
            nn.init.normal_(up.weight, std=spec.token_dim**-0.5)
            self.token_embedding = nn.Sequential(OrderedDict(table=table, up=up))
        self.positional_embedding = nn.Parameter(torch.empty(spec.context_length, spec.width))
        nn.init.normal_(self.positional_embedding, std=0.01)
        norm = partial(nn.LayerNorm, eps=spec.norm_eps)
        self.transformer = Transformer(
            spec.width, spec.depth, spec.num_heads, spec.mlp_ratio,
            act_layer=_ACTIVATIONS[spec.act], norm_layer=norm,
        )  # fmt: skip
        self.ln_final = norm(spec.width)
        self.proj = nn.Linear(spec.width, spec.embed_dim, bias=spec.has_proj_bias)
        nn.init.normal_(self.proj.weight, std=spec.width**-0.5)
        self.attn_mask: Tensor | None
        mask = torch.full([spec.context_length] * 2, -torch.inf).triu_(1)
        self.register_buffer("attn_mask", mask if spec.is_causal else None, persistent=False)
        self._init_blocks()

    def _init_blocks(self) -> None:
        width, depth = self.spec.width, self.spec.depth
        for block in self.transformer.resblocks:
            nn.init.normal_(block.attn.in_proj_weight, std=width**-0.5)
            nn.init.normal_(block.attn.out_proj.weight, std=(2 * depth * width) ** -0.5)
            nn.init.normal_(block.mlp.c_fc.weight, std=(2 * width) ** -0.5)
            nn.init.normal_(block.mlp.c_proj.weight, std=(2 * depth * width) ** -0.5)

    def forward(self, tokens: Tensor) -> Tensor:
        """Embed (B, N) tokens, N up to the context length: (B, E), L2-normalised."""
        # 32 bits hold any vocabulary, and TensorRT's parser finds the end token in them.
        tokens = tokens.int()
        length = tokens.shape[1]
        mask = None if self.attn_mask is None else self.attn_mask[:length, :length]
        x = self.token_embedding(tokens) + self.positional_embedding[:length]
        x = self.ln_final(self.transformer(x, attn_mask=mask))
        pooled = text_global_pool(x, tokens, self.spec.pool, eos_token_id=self.spec.eos_id)
        return F.normalize(self.proj(pooled).float(), dim=-1)


def text_geometry(teacher_text_tower: nn.Module) -> dict[str, Any] | None:
    """How a text tower is shaped, in the words of `TextSpec`.

    Args:
        teacher_text_tower: A teacher's, or a text student.

    Returns:
        Every field of a `TextSpec` but its name; None if the tower is of another architecture
        (Hugging Face's, an ensemble's), or has parts that text students lack.
    """
    if isinstance(teacher_text_tower, TextStudent):
        return {k: v for k, v in teacher_text_tower.spec.to_dict().items() if k != "name"}
    tower = _open_clip_tower(teacher_text_tower)
    if tower is None:
        return None
    blocks = list(tower.transformer.resblocks)
    scales = [m for b in blocks for m in (b.ls_1, b.ls_2) if not isinstance(m, nn.Identity)]
    act = activation_name(blocks[0].mlp.gelu)
    projection = tower.text_projection
    if any(type(b) is not ResidualAttentionBlock for b in blocks) or scales or act is None:
        return None
    if projection is None:
        return None
    is_linear = isinstance(projection, nn.Linear)
    width = tower.token_embedding.embedding_dim
    return {
        "vocab_size": tower.token_embedding.num_embeddings,
        "context_length": len(tower.positional_embedding),
        "width": width,
        "depth": len(blocks),
        "num_heads": blocks[0].attn.num_heads,
        "token_dim": width,
        "embed_dim": projection.out_features if is_linear else projection.shape[1],
        "mlp_ratio": blocks[0].mlp.c_fc.out_features / width,
        "act": act,
        "norm_eps": tower.ln_final.eps,
        "is_causal": tower.attn_mask is not None,
        "pool": tower.pool_type if isinstance(tower, TextTransformer) else tower.text_pool_type,
        "eos_id": int(getattr(tower, "eos_id", getattr(tower, "text_eos_id", None)) or 0),
        "has_proj_bias": is_linear and projection.bias is not None,
    }


def text_spec(name: str, teacher: dict[str, Any]) -> TextSpec:
    """The spec of a text student by name, for a teacher's text tower.

    Args:
        name: `auto`: a third of the teacher's layers, a quarter of its numbers a token; or
            `text-wWIDTH-dDEPTH`, with `-eTOKEN_DIM` where the token embedding is of two factors.
        teacher: Its `text_geometry`.

    Raises:
        UnknownNameError: If the name is neither.
        ConfigError: If its numbers contradict each other.
    """
    if name == "auto":
        width, depth = teacher["width"], max(1, round(teacher["depth"] / _AUTO_LAYERS))
        token_dim = max(1, width // _AUTO_TOKEN_DIM)
    else:
        found = _NAME.fullmatch(name)
        if found is None:
            raise UnknownNameError(
                f"unknown text student '{name}'",
                hint="--text-student auto, none, or a name such as "
                f"text-w{teacher['width']}-d2 or text-w{teacher['width']}-d2-e64",
            )
        width, depth = int(found[1]), int(found[2])
        token_dim = int(found[3] or width)
    head_dim = teacher["width"] // teacher["num_heads"]
    sizes = {
        "width": width,
        "depth": depth,
        "token_dim": token_dim,
        "num_heads": max(1, width // head_dim),
    }
    name = f"text-w{width}-d{depth}" + (f"-e{token_dim}" if token_dim < width else "")
    return TextSpec(name, **{**teacher, **sizes})


@torch.no_grad()
def inherit_text(student: TextStudent, teacher_text_tower: nn.Module) -> list[str]:
    """Copy the teacher's weights into a text student, in place.

    A token embedding of two factors gets the nearest that there is to the teacher's table of
    that rank: its truncated singular value decomposition.

    Args:
        student: Changed in place.
        teacher_text_tower: A teacher's, or a text student.

    Returns:
        What was inherited: `token_embedding`, `blocks.0 <- 0` (student's and teacher's layer),
        ...; `proj` only if the embedding sizes agree. Empty, and the student untouched, if the
        two are not text transformers of equal width, heads, activation and pooling, or the
        student is deeper.
    """
    teacher, mine = text_geometry(teacher_text_tower), student.spec
    if teacher is None or mine.depth > teacher["depth"]:
        return []
    if any(getattr(mine, key) != teacher[key] for key in SHARED_GEOMETRY):
        return []
    source = _weights(teacher_text_tower)
    state = student.state_dict()
    _inherit_tokens(student, source["token_embedding.weight"])
    length = min(mine.context_length, teacher["context_length"])
    state["positional_embedding"][:length].copy_(source["positional_embedding"][:length])
    layers = inherited_layers(mine.depth, teacher["depth"])
    for student_layer, teacher_layer in enumerate(layers):
        new, old = f"transformer.resblocks.{student_layer}.", f"resblocks.{teacher_layer}."
        for key in [k for k in state if k.startswith(new)]:
            state[key].copy_(source["transformer." + old + key.removeprefix(new)])
    inherited = ["token_embedding", "positional_embedding", "ln_final"]
    inherited += [f"blocks.{i} <- {j}" for i, j in enumerate(layers)]
    for key in ("ln_final.weight", "ln_final.bias"):
        state[key].copy_(source[key])
    if mine.embed_dim == teacher["embed_dim"] and mine.has_proj_bias == teacher["has_proj_bias"]:
        for key in [k for k in state if k.startswith("proj.")]:
            state[key].copy_(source[key])
        inherited.append("proj")
    return inherited


def _inherit_tokens(student: TextStudent, table: Tensor) -> None:
    state, rank = student.state_dict(), student.spec.token_dim
    if rank == student.spec.width:
        state["token_embedding.weight"].copy_(table)
        return
    # The eigenvectors of a width x width matrix, rather than a decomposition of the whole table.
    _, vectors = torch.linalg.eigh(table.double().T @ table.double())
    basis = vectors[:, -rank:]
    rows = table.double() @ basis
    # Both factors of one size, so that one learning rate fits both.
    scale = rows.square().mean().sqrt().clamp(min=1e-12) / 0.02
    state["token_embedding.table.weight"].copy_(rows / scale)
    state["token_embedding.up.weight"].copy_(basis * scale)


def _open_clip_tower(tower: nn.Module) -> Any:
    """The module that has the layers, where it is one of open_clip's own; else None."""
    import open_clip

    model: Any = getattr(tower, "model", None)  # of an encoders.TextTower
    found = model if isinstance(model, open_clip.CLIP) else getattr(model, "text", None)
    if not isinstance(found, open_clip.CLIP | TextTransformer):
        return None
    if isinstance(found, TextTransformer) and (found.cls_emb is not None or found.use_pad_mask):
        return None
    return found if isinstance(found.ln_final, nn.LayerNorm) else None


def _weights(tower: nn.Module) -> dict[str, Tensor]:
    """The tower's weights under a text student's names; the token embedding multiplied out."""
    if isinstance(tower, TextStudent):
        found = dict(tower.state_dict())
        if tower.spec.token_dim < tower.spec.width:
            found["token_embedding.weight"] = (
                found.pop("token_embedding.table.weight") @ found.pop("token_embedding.up.weight").T
            )
        return found
    core = _open_clip_tower(tower)
    found = {key: value.detach() for key, value in core.state_dict().items()}
    if isinstance(core.text_projection, nn.Linear):
        renamed = {k.replace("text_projection.", "proj."): v for k, v in found.items()}
        return renamed
    found["proj.weight"] = found.pop("text_projection").T
    return found
