"""The last block of a ViT that is read at its class token only: same answers, less work.

Every token is a key and a value, but one query, one projection and one row through the MLP are
all that the pooling reads. Of a ViT of depth d that is 10/12 of one block's products: 7% at
depth 12, 28% at depth 3. Weights, their names and the answers stay what they were.
"""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from timm.layers.attention import Attention
from timm.models.vision_transformer import Block, VisionTransformer
from torch import Tensor, nn


class ClassTokenBlock(nn.Module):
    """A timm `Block` that gives only the class token: (B, N, D) -> (B, 1, D)."""

    def __init__(self, block: Block) -> None:
        """Take over a block's parts, under their own names."""
        super().__init__()
        for name, part in block.named_children():
            setattr(self, name, part)

    def forward(self, x: Tensor, **_: Any) -> Tensor:
        """Answer with what the block would say of token 0."""
        parts: Any = self
        token = x[:, :1]
        mixed = _attend_from_first(parts.attn, parts.norm1(x))
        token = token + parts.drop_path1(parts.ls1(mixed))
        out: Tensor = token + parts.drop_path2(parts.ls2(parts.mlp(parts.norm2(token))))
        return out


def read_class_token_only(vit: VisionTransformer) -> bool:
    """Let a timm ViT's last block compute its class token only, in place.

    Returns:
        False, and the ViT untouched, where another token is read too, or a block is not plain.
    """
    trunk: Any = vit
    block = trunk.blocks[-1]
    is_plain = type(block) is Block and is_plain_attention(block.attn)
    is_read_alone = trunk.global_pool == "token" and trunk.attn_pool is None
    if not (is_plain and is_read_alone and trunk.cls_token is not None):
        return False
    trunk.blocks[-1] = ClassTokenBlock(block)
    return True


def is_plain_attention(attention: nn.Module) -> bool:
    """Whether an attention is softmax(QK')V between two linear layers and nothing else."""
    if type(attention) is not Attention:
        return False
    parts: Any = attention
    others = (parts.q_norm, parts.k_norm, parts.norm)
    return parts.gate is None and all(isinstance(part, nn.Identity) for part in others)


def _attend_from_first(attention: Attention, x: Tensor) -> Tensor:
    """(B, N, D) -> (B, 1, D): the first token asks, all answer."""
    parts: Any = attention
    width = parts.attn_dim
    weight, bias = parts.qkv.weight, parts.qkv.bias
    q = F.linear(x[:, :1], weight[:width], None if bias is None else bias[:width])
    k, v = F.linear(x, weight[width:], None if bias is None else bias[width:]).chunk(2, dim=-1)
    q, k, v = (
        part.reshape(*part.shape[:2], parts.num_heads, -1).transpose(1, 2) for part in (q, k, v)
    )
    dropout = parts.attn_drop.p if attention.training else 0.0
    mixed = F.scaled_dot_product_attention(q, k, v, dropout_p=dropout)
    out: Tensor = parts.proj_drop(parts.proj(mixed.transpose(1, 2).flatten(2)))
    return out
