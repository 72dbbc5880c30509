"""Modules made ready for tracing: a copy with the same answers and fewer operations.

Train-time branches are merged; every attention becomes three projections (the scale inside the
first), one product of softmax and one projection, whichever library wrote it; what a pooling
throws away is not computed. The graph that is traced from it has no slices of packed weights,
no shape arithmetic and one attention operator, which lower.py spells as the runtime likes it.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dimefm_edge.students.class_token import (
    ClassTokenBlock,
    is_plain_attention,
    read_class_token_only,
)

_READY = "is_ready_for_tracing"


def ready_for_tracing(module: nn.Module) -> nn.Module:
    """Copy a module to the CPU, in eval mode and float32, with its attentions spelt one way.

    Args:
        module: A student, or an open_clip or timm tower; not changed. What is ready stays so.
    """
    from timm.models.vision_transformer import VisionTransformer
    from timm.utils.model import reparameterize_model

    ready = copy.deepcopy(module).cpu().float().eval().requires_grad_(False)
    if getattr(ready, _READY, False):  # merged branches cannot be merged again
        return ready
    for part in list(ready.modules()):
        if type(part) is VisionTransformer:
            read_class_token_only(part)
        _read_class_token_of_open_clip(part)
    ready = reparameterize_model(ready, inplace=True)
    _replace_attentions(ready)
    setattr(ready, _READY, True)
    return ready.eval().requires_grad_(False)


class TracedAttention(nn.Module):
    """Multi-head attention as three projections, softmax(QK')V and an output projection."""

    def __init__(
        self, q: nn.Linear, k: nn.Linear, v: nn.Linear, out: nn.Linear, *, num_heads: int
    ) -> None:
        """Join the projections; `q` gives queries that are scaled already."""
        super().__init__()
        self.q, self.k, self.v, self.out = q, k, v, out
        self.num_heads = num_heads
        self.is_spelt_out = False
        """As two products and a softmax, for quantisation to reach into (quantize/)."""

    def forward(
        self, queries: Tensor, tokens: Tensor, values: Tensor, mask: Tensor | None = None
    ) -> Tensor:
        """(B, M, D), (B, N, D) and (B, N, D) -> (B, M, D)."""
        q, k, v = (
            self._split(project(x))
            for project, x in ((self.q, queries), (self.k, tokens), (self.v, values))
        )
        if self.is_spelt_out:
            logits = q @ k.transpose(2, 3)
            mixed = (logits if mask is None else logits + mask).softmax(dim=-1) @ v
        else:
            mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=1.0)
        out: Tensor = self.out(mixed.transpose(1, 2).flatten(2))
        return out

    def _split(self, x: Tensor) -> Tensor:
        """(B, N, H * D) -> (B, H, N, D)."""
        batch, tokens, _ = x.shape
        return x.reshape(batch, tokens, self.num_heads, -1).transpose(1, 2)


class _OnTokens(nn.Module):
    """In the place of timm's `Attention`: (B, N, D) -> (B, N, D)."""

    def __init__(self, core: TracedAttention) -> None:
        super().__init__()
        self.core = core

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, **_: Any) -> Tensor:
        out: Tensor = self.core(x, x, x, attn_mask)
        return out


class _OnMap(nn.Module):
    """In the place of FastViT's `Attention`: (B, D, H, W) -> (B, D, H, W)."""

    def __init__(self, core: TracedAttention) -> None:
        super().__init__()
        self.core = core

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.flatten(2).transpose(1, 2)
        out: Tensor = self.core(tokens, tokens, tokens)
        return out.transpose(1, 2).reshape(x.shape)


class _OnThree(nn.Module):
    """In the place of torch's `MultiheadAttention`, whose answer is a pair."""

    def __init__(self, core: TracedAttention, *, is_batch_first: bool) -> None:
        super().__init__()
        self.core, self.is_batch_first = core, is_batch_first

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, **_: Any
    ) -> tuple[Tensor, None]:
        if attn_mask is not None and attn_mask.ndim == 3:  # CoCa's: one for each head of each
            attn_mask = attn_mask.reshape(-1, self.core.num_heads, *attn_mask.shape[1:])
        if self.is_batch_first:
            return self.core(query, key, value, attn_mask), None
        query, key, value = (x.transpose(0, 1) for x in (query, key, value))
        out: Tensor = self.core(query, key, value, attn_mask)
        return out.transpose(0, 1), None


class _FromMean(nn.Module):
    """In the place of open_clip's `AttentionPool2d`: the mean asks, which is all that is read."""

    def __init__(self, core: TracedAttention, positions: Tensor) -> None:
        super().__init__()
        self.core = core
        self.positions = nn.Parameter(positions, requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.flatten(2).transpose(1, 2)
        tokens = torch.cat([tokens.mean(dim=1, keepdim=True), tokens], dim=1) + self.positions
        out: Tensor = self.core(tokens[:, :1], tokens, tokens)
        return out[:, 0]


class _FromFirst(nn.Module):
    """In the place of a `ClassTokenBlock`: (B, N, D) -> (B, 1, D)."""

    def __init__(self, block: nn.Module, core: TracedAttention) -> None:
        super().__init__()
        block.attn = nn.Identity()  # the core has its projections
        self.block, self.core = block, core

    def forward(self, x: Tensor, **_: Any) -> Tensor:
        parts: Any = self.block
        tokens = parts.norm1(x)
        x = x[:, :1] + parts.ls1(self.core(tokens[:, :1], tokens, tokens))
        out: Tensor = x + parts.ls2(parts.mlp(parts.norm2(x)))
        return out


def _replace_attentions(module: nn.Module) -> None:
    for name, child in list(module.named_children()):
        replace = next((make for kind, make in _replacements() if type(child) is kind), None)
        new = replace(child) if replace is not None else None
        if new is None:
            _replace_attentions(child)
        else:
            setattr(module, name, new)


def _replacements() -> list[tuple[type, Callable[[Any], nn.Module | None]]]:
    from open_clip.modified_resnet import AttentionPool2d
    from timm.layers.attention import Attention
    from timm.models.fastvit import Attention as FastVitAttention

    return [
        (ClassTokenBlock, lambda block: _FromFirst(block, _packed(block.attn))),
        (Attention, lambda part: _OnTokens(_packed(part)) if is_plain_attention(part) else None),
        (FastVitAttention, lambda part: _OnMap(_packed(part))),
        (nn.MultiheadAttention, _from_torch),
        (AttentionPool2d, _from_pool),
    ]


def _packed(attention: Any) -> TracedAttention:
    """Of timm's attentions, which pack the three projections into one."""
    q, k, v = _split(attention.qkv.weight, attention.qkv.bias)
    return _core(q, k, v, attention.proj, attention.num_heads)


def _from_torch(attention: nn.MultiheadAttention) -> nn.Module | None:
    if not attention._qkv_same_embed_dim or attention.bias_k is not None:
        return None
    q, k, v = _split(attention.in_proj_weight, attention.in_proj_bias)
    core = _core(q, k, v, attention.out_proj, attention.num_heads)
    return _OnThree(core, is_batch_first=attention.batch_first)


def _from_pool(pool: Any) -> nn.Module:
    core = _core(pool.q_proj, pool.k_proj, pool.v_proj, pool.c_proj, pool.num_heads)
    return _FromMean(core, pool.positional_embedding.data[None])


def _split(weight: Tensor, bias: Tensor | None) -> list[nn.Linear]:
    biases = [None] * 3 if bias is None else bias.chunk(3)
    return [_linear(w, b) for w, b in zip(weight.chunk(3), biases, strict=True)]


def _core(
    q: nn.Linear, k: nn.Linear, v: nn.Linear, out: nn.Linear, num_heads: int
) -> TracedAttention:
    """Fold the scale into the queries' projection: exact when the head's size is 4^n."""
    scale = (q.out_features // num_heads) ** -0.5
    scaled = _linear(q.weight * scale, None if q.bias is None else q.bias * scale)
    return TracedAttention(scaled, k, v, out, num_heads=num_heads)


def _linear(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None)
    linear.weight.data = weight.detach().clone()
    if bias is not None:
        linear.bias.data = bias.detach().clone()
    return linear


class _OpenClipClassToken(nn.Module):
    """In the place of the last block of an open_clip ViT: (B, N, D) -> (B, 1, D)."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block = block

    def forward(self, x: Tensor, **_: Any) -> Tensor:
        parts: Any = self.block
        tokens = parts.ln_1(x)
        mixed = parts.attn(tokens[:, :1], tokens, tokens, need_weights=False)[0]
        x = x[:, :1] + parts.ls_1(mixed)
        out: Tensor = x + parts.ls_2(parts.mlp(parts.ln_2(x)))
        return out


def _read_class_token_of_open_clip(tower: nn.Module) -> None:
    from open_clip.transformer import ResidualAttentionBlock, VisionTransformer

    if type(tower) is not VisionTransformer:
        return
    parts: Any = tower
    blocks = parts.transformer.resblocks
    is_read_alone = parts.attn_pool is None and parts.pool_type == "tok"
    is_plain = type(blocks[-1]) is ResidualAttentionBlock and parts.transformer.batch_first
    if is_plain and is_read_alone and not parts.output_tokens:
        blocks[-1] = _OpenClipClassToken(blocks[-1])
