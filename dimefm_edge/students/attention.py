"""Fused attention in students: the same weights and answers, through dimefm_kernels.

A timm attention keeps its qkv and output projections; what is between them becomes one op on
the packed projection, without permutes. Used when training on a GPU and in the AOTInductor
export; ONNX export has its own forms.
"""

from __future__ import annotations

from importlib.util import find_spec

from timm.models.fastvit import Attention as FastVitAttention
from timm.models.vision_transformer import Attention  # type: ignore[attr-defined]
from torch import Tensor, nn

from dimefm_edge.errors import MissingExtraError
from dimefm_edge.students.class_token import ClassTokenBlock


class _FusedAttention(Attention):
    """timm's ViT attention without its mask, dropout, gate and norms of q and k."""

    def forward(
        self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False
    ) -> Tensor:
        from dimefm_kernels import fused_attention_qkv

        if attn_mask is not None or is_causal:
            raise ValueError("fused attention takes no mask")
        out = fused_attention_qkv(self.qkv(x), self.num_heads, scale=self.scale)
        projected: Tensor = self.proj_drop(self.proj(self.norm(out)))
        return projected


class _FusedFastVitAttention(FastVitAttention):
    """FastViT's attention: tokens are the positions of a feature map."""

    def forward(self, x: Tensor) -> Tensor:
        from dimefm_kernels import fused_attention_qkv

        tokens = x.flatten(2).transpose(1, 2)
        out = fused_attention_qkv(self.qkv(tokens), self.num_heads, scale=self.scale)
        projected: Tensor = self.proj_drop(self.proj(out))
        return projected.transpose(1, 2).reshape(x.shape)


_FUSED: dict[type[nn.Module], type[nn.Module]] = {
    Attention: _FusedAttention,
    FastVitAttention: _FusedFastVitAttention,
}


def use_fused_attention(module: nn.Module) -> int:
    """Swap every plain attention inside for the fused one, in place.

    Weights, their names and answers stay; deep copies and checkpoints work as before.

    Args:
        module: A student, or any module made of timm's.

    Returns:
        How many were swapped. Those with dropout of attention, norms of q and k, or a gate are
        left as they are, and so is that of a `ClassTokenBlock`, which has one query.
    """
    others = {part.attn for part in module.modules() if isinstance(part, ClassTokenBlock)}
    found = [
        part
        for part in module.modules()
        if type(part) in _FUSED and part not in others and _is_plain(part)
    ]
    for part in found:
        part.__class__ = _FUSED[type(part)]
    return len(found)


def wants_fused_attention(choice: str, device_type: str) -> bool:
    """Whether training on a device goes through the kernels.

    Args:
        choice: `on`; `off`; or `auto`, which is off: on an H200 a step of attention, forward and
            backward, takes them 1.4 to 3 times as long as torch's own (gpu_attention.py).
        device_type: `cuda`, `cpu`, ...

    Raises:
        MissingExtraError: If they are asked for on CUDA and Triton is not installed.
    """
    if choice == "on" and device_type == "cuda" and find_spec("triton") is None:
        raise MissingExtraError(
            "fused attention on a GPU needs Triton", hint="pip install triton, or off"
        )
    return choice == "on"


def _is_plain(part: nn.Module) -> bool:
    norms = (getattr(part, "q_norm", None), getattr(part, "k_norm", None))
    has_norms = any(not isinstance(norm, nn.Identity | None) for norm in norms)
    dropout = getattr(part, "attn_drop", None)
    drops = isinstance(dropout, nn.Dropout) and dropout.p > 0
    return not has_norms and not drops and getattr(part, "gate", None) is None
