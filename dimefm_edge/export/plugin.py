"""Attention as an operator of our own, `dimefm::fused_attention_qkv`, and the kernels that run it.

lower.py writes the operator where `--attention plugin` asks for it. Here it is given a meaning in
plain ONNX, so that any runtime can answer and parity is proven on the very file; TensorRT's
parser takes a plugin of that name before the function of that name (onnx-tensorrt,
ModelImporter.cpp). And here the plugin's kernels are compiled for the target's GPU, so that the
device needs no Triton.
"""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dimefm_edge.errors import ExportError, MissingExtraError
from dimefm_edge.manifest import KERNELS_DIR
from dimefm_kernels.tensorrt_plugin import PLUGIN_NAME, PLUGIN_NAMESPACE

if TYPE_CHECKING:
    import onnx

    from dimefm_kernels.ahead_of_time import KernelSpec

_ATTRIBUTES = ("num_heads", "logit_scale", "value_scale", "plugin_namespace", "plugin_version")
# (B, N, 3 * H * D) to (B, N, H * D); in fp32, as the kernel adds up.
_BODY = f"""
<opset_import: ["" : %d], domain: "{PLUGIN_NAMESPACE}">
{PLUGIN_NAME} <{", ".join(_ATTRIBUTES)}> (qkv) => (out)
{{
   x = Cast <to = 1> (qkv)
   heads = Constant <value_int: int = @num_heads> ()
   axis = Constant <value_ints = [0]> ()
   one_head = Unsqueeze (heads, axis)
   rows = Constant <value_ints = [0, 0, 3]> ()
   rest = Constant <value_ints = [-1]> ()
   apart = Concat <axis = 0> (rows, one_head, rest)
   five = Reshape (x, apart)
   first = Transpose <perm = [2, 0, 3, 1, 4]> (five)
   q5, k5, v5 = Split <axis = 0, num_outputs = 3> (first)
   q = Squeeze (q5, axis)
   k = Squeeze (k5, axis)
   v = Squeeze (v5, axis)
   turned = Transpose <perm = [0, 1, 3, 2]> (k)
   products = MatMul (q, turned)
   scale = Constant <value_float: float = @logit_scale> ()
   logits = Mul (products, scale)
   probs = Softmax <axis = -1> (logits)
   mixed = MatMul (probs, v)
   back = Transpose <perm = [0, 2, 1, 3]> (mixed)
   flat = Constant <value_ints = [0, 0, -1]> ()
   wide = Reshape (back, flat)
   out = CastLike (wide, qkv)
}}
"""


def add_meaning(model: onnx.ModelProto, opset: int) -> None:
    """Give a graph that holds the operator its function in plain ONNX; in place."""
    import onnx

    if any(node.domain == PLUGIN_NAMESPACE for node in model.graph.node):
        model.functions.append(onnx.parser.parse_function(_BODY % opset))


def kernel_specs(model: onnx.ModelProto, precision: str) -> list[KernelSpec]:
    """What a graph's operators need: one for each shape and scale."""
    import onnx

    from dimefm_kernels.ahead_of_time import KernelSpec

    inferred = onnx.shape_inference.infer_shapes(model).graph
    shapes = {
        v.name: [d.dim_value for d in v.type.tensor_type.shape.dim] for v in inferred.value_info
    }
    specs: dict[KernelSpec, None] = {}
    for node in model.graph.node:
        if (node.domain, node.op_type) == (PLUGIN_NAMESPACE, PLUGIN_NAME):
            values = {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}
            _, num_tokens, width = shapes[node.input[0]]
            heads = values["num_heads"]
            spec = KernelSpec(
                num_tokens, width // (3 * heads), heads, precision, precision,
                values["logit_scale"], values["value_scale"],
            )  # fmt: skip
            specs[spec] = None
    return list(specs)


def write_kernels(
    folder: Path, model_path: Path, *, precision: str, sm: str
) -> list[dict[str, Any]]:
    """Compile what a graph's operators need into a bundle's `kernels/`.

    Args:
        folder: The bundle, being built.
        model_path: Its graph.
        precision: Of the graph: fp32 or fp16.
        sm: CUDA architecture, such as sm_110.

    Returns:
        Each kernel's `KernelRecord`, for the manifest.

    Raises:
        ExportError: If there is no attention that the kernels can compute, or one does not fit.
        MissingExtraError: If Triton, which compiles, is not installed.
    """
    import onnx

    from dimefm_kernels.ahead_of_time import compile_kernels

    specs = kernel_specs(onnx.load(str(model_path)), precision)
    if not specs:
        raise ExportError(
            "the model has no attention of all tokens to all tokens that the kernels compute",
            hint="leave out --attention plugin",
        )
    capability = int(sm.removeprefix("sm_"))
    try:
        records = compile_kernels(capability, folder / KERNELS_DIR, specs=specs)
    except ImportError as error:
        raise MissingExtraError(
            "the kernels of --attention plugin are compiled by Triton, which is not installed",
            hint="pip install triton, or leave out --attention plugin",
        ) from error
    except (ValueError, RuntimeError) as error:
        raise ExportError(
            f"the kernels cannot be compiled for {sm}: {error}",
            hint="leave out --attention plugin",
        ) from error
    return [asdict(record) for record in records]
