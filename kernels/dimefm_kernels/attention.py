"""Fused attention for small vision transformers: signature, checks, dispatch and reference.

`fused_attention` is the custom op `dimefm::fused_attention`, so it composes with torch.compile
and torch.export. On CUDA it runs the Triton kernel of `_attention_triton.py`, elsewhere torch's
own scaled_dot_product_attention.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

MAX_TOKENS = 577
"""A 24 x 24 grid and CLS (ViT-L/14 at 336 px): all keys and values of a head stay on chip."""
MAX_HEAD_DIM = 128


def fused_attention(q: Tensor, k: Tensor, v: Tensor, *, scale: float | None = None) -> Tensor:
    """Attend every token to every other, without mask or dropout.

    Args:
        q: (B, num_heads, N, head_dim), float32, float16 or bfloat16.
        k: (B, num_heads, N, head_dim), same dtype and device.
        v: (B, num_heads, N, head_dim), same dtype and device.
        scale: Multiplies the logits; default head_dim ** -0.5.

    Returns:
        (B, num_heads, N, head_dim), contiguous, in the dtype of `q`.

    Raises:
        ValueError: If shapes, dtypes or devices differ, or are not of the kinds above.
    """
    if q.ndim != 4 or q.shape != k.shape or q.shape != v.shape:
        raise ValueError(
            "q, k and v must all be (B, num_heads, N, head_dim), got "
            f"{tuple(q.shape)}, {tuple(k.shape)} and {tuple(v.shape)}"
        )
    if len({q.dtype, k.dtype, v.dtype}) > 1 or len({q.device, k.device, v.device}) > 1:
        raise ValueError("q, k and v must share one dtype and one device")
    if q.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        raise ValueError(f"q, k and v must be float32, float16 or bfloat16, got {q.dtype}")
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    out: Tensor = _fused_attention(q, k, v, scale)
    return out


def attention_reference(q: Tensor, k: Tensor, v: Tensor, *, scale: float | None = None) -> Tensor:
    """The same in plain torch, with the softmax in float32: what `fused_attention` must match."""
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    logits = (q.float() @ k.float().transpose(-2, -1)) * scale
    return (logits.softmax(dim=-1) @ v.float()).to(q.dtype).contiguous()


def block_sizes(num_tokens: int, head_dim: int) -> tuple[int, int, int]:
    """Queries of one program, all keys padded, head_dim padded: what the kernel works on."""
    block_n, block_d = (max(16, 1 << (size - 1).bit_length()) for size in (num_tokens, head_dim))
    # Fewer queries at a time where the row of logits is long: it lives in registers.
    block_m = 64 if block_n <= 128 else 32 if block_n <= 256 else 16
    return block_m, block_n, block_d


def kernel_shared_bytes(num_tokens: int, head_dim: int, itemsize: int) -> int:
    """Most shared memory that the kernel takes: the keys, and the probabilities of a block."""
    block_m, block_n, block_d = block_sizes(num_tokens, head_dim)
    return block_n * (block_d + block_m) * itemsize


def fits_kernel(q: Tensor, *, shared_bytes: int) -> bool:
    """Whether the Triton kernel takes (B, num_heads, N, head_dim) in that much shared memory.

    Other sizes go to torch's own attention.
    """
    num_tokens, head_dim = q.shape[2:]
    return (
        q.numel() > 0
        and num_tokens <= MAX_TOKENS
        and head_dim <= MAX_HEAD_DIM
        and kernel_shared_bytes(num_tokens, head_dim, q.element_size()) <= shared_bytes
    )


@torch.library.custom_op("dimefm::fused_attention", mutates_args=())
def _fused_attention(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, scale=scale).contiguous()


@_fused_attention.register_kernel("cuda")
def _fused_attention_cuda(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    device = torch.cuda.get_device_properties(q.device)
    if not fits_kernel(q, shared_bytes=device.shared_memory_per_block_optin):
        return F.scaled_dot_product_attention(q, k, v, scale=scale).contiguous()
    from dimefm_kernels._attention_triton import attention_forward

    return attention_forward(q, k, v, scale)


@_fused_attention.register_fake
def _fused_attention_fake(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    return torch.empty_like(q, memory_format=torch.contiguous_format)


def _save_inputs(ctx: torch.autograd.function.FunctionCtx, inputs: tuple, output: Tensor) -> None:  # type: ignore[type-arg]
    q, k, v, scale = inputs
    ctx.save_for_backward(q, k, v)
    ctx.scale = scale  # type: ignore[attr-defined]


def _backward(
    ctx: torch.autograd.function.FunctionCtx, grad: Tensor
) -> tuple[Tensor, Tensor, Tensor, None]:
    """Recompute the probabilities: N is small, and nothing of size N x N is kept."""
    q, k, v = (x.float() for x in ctx.saved_tensors)  # type: ignore[attr-defined]
    scale, dtype = ctx.scale, grad.dtype  # type: ignore[attr-defined]
    grad = grad.float()
    probs = ((q @ k.transpose(-2, -1)) * scale).softmax(dim=-1)
    grad_v = probs.transpose(-2, -1) @ grad
    grad_probs = grad @ v.transpose(-2, -1)
    grad_logits = probs * (grad_probs - (grad_probs * probs).sum(dim=-1, keepdim=True)) * scale
    grad_q, grad_k = grad_logits @ k, grad_logits.transpose(-2, -1) @ q
    return grad_q.to(dtype), grad_k.to(dtype), grad_v.to(dtype), None


_fused_attention.register_autograd(_backward, setup_context=_save_inputs)
