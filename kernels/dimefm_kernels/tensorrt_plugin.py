"""The packed op as a TensorRT plugin in Python: `dimefm::fused_attention_qkv`.

A quickly deployable plugin with an ahead-of-time implementation: TensorRT asks for PTX once, while
it builds, and the engine then runs without Python. The PTX is one that a bundle carries
(ahead_of_time.py wrote it), so that the device needs no Triton, else it is compiled there. Needs
tensorrt.plugin with `aot_impl`, which TensorRT 10.3 (JetPack 6) lacks, 10.16 and 11.4 have;
tensorrt_glue.cpp is for 10.3. No torch here.

Proven without TensorRT: the PTX, its entry and its three arguments, and, against the Python part
of 10.16's and 11.4's bindings with their native part replaced, the registration and what TensorRT
is given (tests). Not run: TensorRT itself, which cannot be installed where this was written.
"""

# No `from __future__ import annotations`: tensorrt.plugin reads annotations as types.
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from dimefm_kernels.ahead_of_time import KernelSpec, build_kernels, drop_scratch
from dimefm_kernels.tiles import MAX_GRID_Y

PLUGIN_NAMESPACE, PLUGIN_NAME = "dimefm", "fused_attention_qkv"
PLUGIN_ID = f"{PLUGIN_NAMESPACE}::{PLUGIN_NAME}"
_PRECISIONS = {"HALF": "fp16", "BF16": "bf16", "FLOAT": "fp32", "INT8": "int8"}


@dataclass(frozen=True)
class CompiledKernel:
    """PTX and how it is launched: fields as in `ahead_of_time.KernelRecord`."""

    entry: str
    ptx: str
    grid_x: int
    num_threads: int
    shared_bytes: int


# As TensorRT's registry of plugins, which asks for them, of the whole process.
_COMPILED: dict[tuple[KernelSpec, int], CompiledKernel] = {}


def register_plugin(
    compiled: Mapping[KernelSpec, CompiledKernel] | None = None, *, capability: int | None = None
) -> None:
    """Make the plugin known to TensorRT in this process; a second call adds kernels only.

    Its attributes are num_heads, logit_scale (multiplies q k^T, for int8 times the steps of q
    and k) and value_scale (1; for int8 the step of v over that of the output). Input:
    (B, N, 3 * H * D), N and H * D fixed; output: (B, N, H * D) of the input's type.

    Args:
        compiled: Kernels for this GPU; what is missing is compiled by Triton.
        capability: The GPU's, such as 110; needed with `compiled`, else Triton tells it.

    Raises:
        ImportError: If TensorRT is not installed.
        RuntimeError: If it has no ahead-of-time Python plugins.
    """
    import tensorrt

    try:
        import tensorrt.plugin as trtp
    except ImportError:
        trtp = None
    if not hasattr(trtp, "aot_impl"):
        raise RuntimeError(
            f"TensorRT {tensorrt.__version__} has no ahead-of-time Python plugins; build "
            "dimefm_kernels/tensorrt_glue.cpp and load it instead"
        )
    if compiled and capability is None:
        raise ValueError("kernels are for one GPU: capability must say which")
    for spec, kernel in (compiled or {}).items():
        _COMPILED[spec, capability or 0] = kernel
    if PLUGIN_ID not in trtp._lib.QDP_REGISTRY:
        _define(trtp, capability)


def _define(trtp: Any, capability: int | None) -> None:
    @trtp.register(PLUGIN_ID)  # type: ignore[untyped-decorator]
    def describe(
        qkv: trtp.TensorDesc, num_heads: int, logit_scale: float, value_scale: float
    ) -> trtp.TensorDesc:
        batch, num_tokens, width = (qkv.shape_expr[i] for i in range(3))
        return trtp.from_shape_expr((batch, num_tokens, width // 3), qkv.dtype)

    @trtp.aot_impl(PLUGIN_ID)  # type: ignore[untyped-decorator]
    def implement(
        qkv: trtp.TensorDesc,
        num_heads: int,
        logit_scale: float,
        value_scale: float,
        outputs: tuple[trtp.TensorDesc],
        tactic: int,
    ) -> tuple[str, str, trtp.KernelLaunchParams, trtp.SymExprs]:
        num_tokens, width = (qkv.shape_expr[i].constant_value() for i in (1, 2))
        precision = _PRECISIONS[qkv.dtype.name]
        spec = KernelSpec(
            num_tokens, width // (3 * num_heads), num_heads, precision, precision,
            logit_scale, value_scale,
        )  # fmt: skip
        kernel = _find(spec, capability)
        num_items = qkv.shape_expr[0] * num_heads
        launch = trtp.KernelLaunchParams(
            grid_x=kernel.grid_x, grid_y=trtp.min(num_items, MAX_GRID_Y),
            block_x=kernel.num_threads, shared_mem=kernel.shared_bytes,
        )  # fmt: skip
        sizes = trtp.SymIntExprs(1)
        sizes[0] = trtp.SymInt32(num_items)
        return kernel.entry, kernel.ptx, launch, sizes


def _find(spec: KernelSpec, capability: int | None) -> CompiledKernel:
    """The kernel that was handed in, or a new one by Triton."""
    if capability is not None and (spec, capability) in _COMPILED:
        return _COMPILED[spec, capability]
    try:
        import triton
    except ImportError as error:
        raise RuntimeError(f"no kernel {spec.name} came along, and Triton is missing") from error
    capability = capability or triton.runtime.driver.active.get_current_target().arch
    ((_, tiles, built),) = build_kernels(spec, capability)
    return CompiledKernel(
        built.metadata.name, drop_scratch(built.asm["ptx"]), tiles.blocks, 32 * tiles.num_warps,
        built.metadata.shared,
    )  # fmt: skip
