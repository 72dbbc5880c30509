"""Kernels of dimefm_edge, usable on their own: each op has a plain torch reference."""

from __future__ import annotations

from dimefm_kernels.attention import attention_reference, fused_attention

__all__ = ["attention_reference", "fused_attention"]
