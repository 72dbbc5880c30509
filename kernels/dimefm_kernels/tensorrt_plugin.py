"""The packed op as a TensorRT plugin in Python: `dimefm::fused_attention_qkv`.

A quickly deployable plugin with an ahead-of-time implementation: TensorRT asks for PTX once, while
it builds, and the engine then runs without Python. Needs tensorrt.plugin with `aot_impl`, which
TensorRT 10.3 (JetPack 6) lacks and 11.4's bindings have; tensorrt_glue.cpp is for 10.3.

Proven without TensorRT: the PTX, its entry and its three arguments (tests); and this
registration once, by hand, against the Python part of 11.4's bindings with its native part
replaced. Not run: TensorRT itself, which cannot be installed where this was written.
"""

# No `from __future__ import annotations`: tensorrt.plugin reads annotations as types.
from typing import Any

from dimefm_kernels.ahead_of_time import KernelSpec, build_kernels, drop_scratch

PLUGIN_ID = "dimefm::fused_attention_qkv"
_PRECISIONS = {"HALF": "fp16", "BF16": "bf16", "FLOAT": "fp32", "INT8": "int8"}


def register_plugin() -> None:
    """Make the plugin known to TensorRT in this process; a second call does nothing.

    Its attributes are num_heads, logit_scale (multiplies q k^T, for int8 times the steps of q
    and k) and value_scale (1; for int8 the step of v over that of the output). Input:
    (B, N, 3 * H * D), N and H * D fixed; output: (B, N, H * D) of the input's type.

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
    if PLUGIN_ID not in trtp._lib.QDP_REGISTRY:
        _define(trtp)


def _define(trtp: Any) -> None:
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
        import triton

        from dimefm_kernels._attention_triton import MAX_GRID_Y

        capability = triton.runtime.driver.active.get_current_target().arch
        num_tokens, width = (qkv.shape_expr[i].constant_value() for i in (1, 2))
        precision = _PRECISIONS[qkv.dtype.name]
        spec = KernelSpec(
            num_tokens, width // (3 * num_heads), num_heads, precision, precision,
            logit_scale, value_scale,
        )  # fmt: skip
        ((_, tiles, built),) = build_kernels(spec, capability)
        num_items = qkv.shape_expr[0] * num_heads
        launch = trtp.KernelLaunchParams(
            grid_x=tiles.blocks, grid_y=trtp.min(num_items, MAX_GRID_Y),
            block_x=32 * tiles.num_warps, shared_mem=built.metadata.shared,
        )  # fmt: skip
        sizes = trtp.SymIntExprs(1)
        sizes[0] = trtp.SymInt32(num_items)
        return built.metadata.name, drop_scratch(built.asm["ptx"]), launch, sizes
