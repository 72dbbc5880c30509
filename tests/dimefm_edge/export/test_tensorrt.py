"""What TensorRT would refuse or run badly is told from the graph, by version."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from dimefm_edge.errors import ExportError
from dimefm_edge.export.tensorrt import check_graph, require_graph, rules_for

VERSIONS = ("10.3", "10.16", "11")


def node(op: str, inputs: str, output: str, **attributes: Any) -> onnx.NodeProto:
    names = ["" if name == "-" else name for name in inputs.split()]
    domain = attributes.pop("domain", "")
    return helper.make_node(
        op, names, output.split(), name=f"{op}_{output.split()[0]}", domain=domain, **attributes
    )


def graph(
    *nodes: onnx.NodeProto,
    constants: dict[str, np.ndarray] | None = None,
    opset: int = 20,
    x: tuple[Any, ...] = ("b", 4, 8, 32),
    kind: int = TensorProto.FLOAT,
) -> onnx.ModelProto:
    """A graph over inputs x, y and z of one shape and type."""
    inputs = [helper.make_tensor_value_info(name, kind, x) for name in "xyz"]
    initializers = [numpy_helper.from_array(v, k) for k, v in (constants or {}).items()]
    body = helper.make_graph(
        nodes, "g", inputs, [helper.make_empty_tensor_value_info(nodes[-1].output[0])], initializers
    )
    opsets = [helper.make_opsetid("", opset), helper.make_opsetid("com.microsoft", 1)]
    return helper.make_model(body, opset_imports=opsets, ir_version=10)


def told(model: onnx.ModelProto, version: str = "10.3", precision: str = "fp16") -> list[str]:
    """`severity node: what` of each finding."""
    findings = check_graph(model, version, precision=precision)
    return [f"{f.severity} {f.node}: {f.what}" for f in findings]


def attention(*, scale_after: bool = False, head_dim: int = 32, tokens: int = 8) -> Any:
    steps = (
        [node("MatMul", "x y", "s0"), node("Mul", "s0 k", "s1")]
        if scale_after
        else [node("Mul", "x k", "xs"), node("MatMul", "xs y", "s1")]
    )
    # x and y are (b, 4, tokens, head_dim); a square shape lets one shape serve all three.
    transposed = node("Transpose", "y", "yt", perm=[0, 1, 3, 2])
    product = next(n for n in steps if n.op_type == "MatMul")
    product.input[1] = "yt"
    nodes = [transposed, *steps, node("Softmax", "s1", "p"), node("MatMul", "p z", "o")]
    return graph(*nodes, constants={"k": np.float32(0.2)}, x=("b", 4, tokens, head_dim))


def quantised_attention(
    *, skipped: str = "", head_dim: int = 32, tokens: int = 8
) -> onnx.ModelProto:
    nodes: list[onnx.NodeProto] = [node("Transpose", "y", "yt", perm=[0, 1, 3, 2])]

    def quantised(name: str) -> str:
        if name == skipped:
            return name
        nodes.extend([node("QuantizeLinear", f"{name} s zero", f"{name}_q"),
                      node("DequantizeLinear", f"{name}_q s zero", f"{name}_d")])  # fmt: skip
        return f"{name}_d"

    nodes.append(node("MatMul", f"{quantised('x')} {quantised('yt')}", "scores"))
    nodes.append(node("Softmax", "scores", "p"))
    nodes.append(node("MatMul", f"{quantised('p')} {quantised('z')}", "o"))
    nodes.append(node("Relu", quantised("o"), "out"))
    constants = {"s": np.float32(0.1), "zero": np.int8(0)}
    return graph(*nodes, constants=constants, x=("b", 4, tokens, head_dim))


# ------------------------------------------------------------------------------ rules


def test_each_version_builds_on_the_one_before() -> None:
    old, new, newest = map(rules_for, VERSIONS)
    assert (old.max_opset, new.max_opset, newest.max_opset) == (20, 24, 24)
    assert "Attention" not in old.operators
    assert "Attention" in new.operators
    assert newest.operators == new.operators
    assert (old.is_strongly_typed_only, newest.is_strongly_typed_only) == (False, True)
    assert old.operators["LayerNormalization"] == {"fp32", "fp16", "bf16"}
    assert old.constant_inputs["Squeeze"] == (1,)
    assert "Squeeze" not in new.constant_inputs
    assert len(old.operators) > 130


@pytest.mark.parametrize(
    ("version", "found"),
    [("10.3.0", "10.3"), ("10.7", "10.3"), ("10.16.2", "10.16"), ("11.4.0.106", "11"),
     ("12", "11")],
)  # fmt: skip
def test_a_version_takes_the_newest_rules_below_it(version: str, found: str) -> None:
    assert rules_for(version).version == found


def test_a_version_older_than_all_rules_is_an_error() -> None:
    with pytest.raises(ExportError, match=r"what TensorRT 8\.5 reads is not known.*10\.3"):
        check_graph(attention(), "8.5", precision="fp16")


# ----------------------------------------------------------------------------- errors


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("precision", ["fp32", "fp16", "int8"])
def test_good_graphs_have_no_findings(version: str, precision: str) -> None:
    assert told(attention(), version, precision) == []
    assert told(quantised_attention(), version, precision) == []


def test_an_opset_too_new_is_an_error_for_the_versions_that_lack_it() -> None:
    model = graph(node("Relu", "x", "o"), opset=23)
    assert told(model, "10.3") == ["error graph: opset 23"]
    assert told(model, "10.16") == []
    model.opset_import[0].version = 25
    assert told(model, "11") == ["error graph: opset 25"]


@pytest.mark.parametrize(
    ("bad", "expected"),
    [
        (node("Det", "x", "o"), "error Det_o: operator Det"),
        (node("MultiHeadAttention", "x x x", "o", domain="com.microsoft", num_heads=4),
         "error MultiHeadAttention_o: operator com.microsoft::MultiHeadAttention"),
        (node("Resize", "x - k", "o", antialias=1, mode="linear"),
         "error Resize_o: Resize with antialias 1"),
        (node("Resize", "x - k", "o", mode="cubic"), "error Resize_o: Resize with mode cubic"),
        (node("ReduceMean", "x a", "o"), "error ReduceMean_o: input 1 of ReduceMean is computed"),
        (node("LayerNormalization", "x w", "o m v"),
         "error LayerNormalization_o: more than one output of LayerNormalization"),
        (node("MaxPool", "x", "o", kernel_shape=[2, 2], dilations=[1, 2]),
         "error MaxPool_o: MaxPool with dilations 1, 2"),
    ],
    ids=lambda value: value.op_type if isinstance(value, onnx.NodeProto) else "",
)  # fmt: skip
def test_what_the_parser_refuses(bad: onnx.NodeProto, expected: str) -> None:
    constants = {"k": np.ones(4, np.float32), "w": np.ones(32, np.float32)}
    before = node("Cast", "y", "a", to=TensorProto.INT64)
    for version in VERSIONS:
        assert told(graph(before, bad, constants=constants), version)[:1] == [expected]


def test_a_type_that_an_operator_lacks() -> None:
    relu, sigmoid = node("Relu", "x", "r"), node("Sigmoid", "r", "o")
    assert told(graph(relu, sigmoid, kind=TensorProto.INT32)) == [
        "error Sigmoid_o: Sigmoid of int32"
    ]


def test_attention_as_one_node_is_for_new_versions_and_four_dimensions() -> None:
    model = graph(node("Attention", "x y z", "o"), opset=23)
    assert "error Attention_o: operator Attention" in told(model, "10.3")
    assert told(model, "10.16") == []
    flat = graph(node("Attention", "x y z", "o", q_num_heads=4, kv_num_heads=4), opset=23,
                 x=("b", 8, 128))  # fmt: skip
    assert told(flat, "11")[0] == "error Attention_o: input 0 of Attention has 3 dimensions"


def test_what_plugins_and_functions_provide_is_no_error() -> None:
    model = graph(node("Fused", "x", "o", domain="mine"))
    assert told(model) == ["error Fused_o: operator mine::Fused"]
    assert check_graph(model, "10.3", precision="fp16", plugins=["mine::Fused"]) == []
    body = helper.make_function(
        "mine", "Fused", ["a"], ["b"], [helper.make_node("Relu", ["a"], ["b"])],
        [helper.make_opsetid("", 20)],
    )  # fmt: skip
    model.functions.append(body)
    assert told(model) == []


@pytest.mark.parametrize(
    ("zero", "scale", "what"),
    [
        (np.int8(3), np.float32(0.1), "a zero point that is not zero"),
        (np.zeros(4, np.int8), np.full(4, 0.1, np.float32), "an activation quantised per channel"),
    ],
)
def test_asymmetric_and_per_channel_activations(zero: Any, scale: Any, what: str) -> None:
    nodes = [node("QuantizeLinear", "x s zero", "q", axis=1),
             node("DequantizeLinear", "q s zero", "o", axis=1)]  # fmt: skip
    model = graph(*nodes, constants={"s": scale, "zero": zero})
    assert told(model) == [f"error QuantizeLinear_q: {what}", f"error DequantizeLinear_o: {what}"]


def test_weights_may_be_quantised_per_channel() -> None:
    constants = {
        "w": np.ones((4, 32, 8), np.int8),
        "s": np.full(4, 0.1, np.float32),
        "zero": np.zeros(4, np.int8),
    }
    nodes = [node("DequantizeLinear", "w s zero", "wd", axis=0), node("MatMul", "x wd", "o")]
    assert told(graph(*nodes, constants=constants), precision="int8") == []


def test_require_graph_names_nodes_and_the_fix() -> None:
    bad = graph(node("Det", "x", "d"), node("Unique", "d", "o"), opset=23)
    with pytest.raises(ExportError) as caught:
        require_graph(bad, "10.3", precision="fp16")
    text = str(caught.value)
    assert "TensorRT 10.3 cannot read this graph: graph: opset 23" in text
    assert "Det_d: operator Det (TensorRT 10.3 has none)" in text
    assert "try: export it for this target, or with opset 20" in text
    (warning,) = require_graph(attention(scale_after=True), "10.3", precision="fp16")
    assert "scale the queries" in str(warning)


def test_a_resize_in_the_graph_is_told_with_what_to_do_instead() -> None:
    resize = graph(node("Resize", "x - k", "o", antialias=1, mode="linear"),
                   constants={"k": np.ones(4, np.float32)})  # fmt: skip
    with pytest.raises(ExportError, match=r"Resize with antialias 1 .*has 0") as caught:
        require_graph(resize, "10.3", precision="fp16")
    assert str(caught.value.hint).startswith("export with --input uint8: the device resizes")


# --------------------------------------------------------------------------- warnings


@pytest.mark.parametrize(
    ("model", "precision", "expected"),
    [
        (attention(scale_after=True), "fp32", "MatMul_s0: scores are scaled after the first"),
        (attention(head_dim=20, tokens=8), "fp16", "Mul_xs: head_dim 20"),
        (quantised_attention(skipped="p"), "int8",
         "MatMul_scores: no Q/DQ after the softmax nor around the second product"),
        (quantised_attention(skipped="yt"), "int8",
         "MatMul_scores: no Q/DQ before the first product"),
        (quantised_attention(head_dim=48), "int8", "MatMul_scores: int8 attention with head_dim"),
        (quantised_attention(tokens=577), "int8", "MatMul_scores: int8 attention over 577"),
    ],
    ids=["scale", "head", "softmax", "bmm1", "int8 head", "tokens"],
)  # fmt: skip
def test_attention_that_will_not_fuse(
    model: onnx.ModelProto, precision: str, expected: str
) -> None:
    (found,) = told(model, precision=precision)
    assert found.startswith(f"warning {expected}")


def test_an_odd_head_is_no_matter_in_fp32() -> None:
    assert told(attention(head_dim=20), precision="fp32") == []


def test_a_lone_softmax_is_told() -> None:
    (found,) = told(graph(node("Softmax", "x", "o")))
    assert found == "warning Softmax_o: a softmax that is part of no attention"


def test_a_layer_norm_spelt_out_is_told_where_it_overflows() -> None:
    axes = {"axes": np.int64([-1]), "two": np.float32(2), "eps": np.float32(1e-5)}
    spelt = graph(
        node("ReduceMean", "x axes", "m"), node("Sub", "x m", "d"), node("Pow", "d two", "d2"),
        node("ReduceMean", "d2 axes", "v"), node("Add", "v eps", "ve"), node("Sqrt", "ve", "sd"),
        node("Div", "d sd", "o"), constants=axes,
    )  # fmt: skip
    assert told(spelt, precision="fp16") == ["warning Sqrt_sd: a layer norm spelt out"]
    assert told(spelt, precision="fp32") == []


def test_qdq_on_the_residual_stream_and_norms_is_told() -> None:
    qdq = [node("QuantizeLinear", "x s zero", "q"), node("DequantizeLinear", "q s zero", "d")]
    constants = {"s": np.float32(0.1), "zero": np.int8(0), "w": np.ones(32, np.float32)}
    model = graph(*qdq, node("Add", "d y", "a"), node("LayerNormalization", "d w", "n"),
                  node("Add", "d w", "o"), constants=constants)  # fmt: skip
    assert told(model, precision="int8") == [
        "warning Add_a: Q/DQ on the residual stream",
        "warning LayerNormalization_n: Q/DQ on a layer norm's input",
    ]


def test_a_cast_between_qdq_and_a_product_is_told() -> None:
    nodes = [
        node("QuantizeLinear", "x s zero", "q"), node("DequantizeLinear", "q s zero", "d"),
        node("Cast", "d", "half", to=TensorProto.FLOAT16), node("MatMul", "half w", "o"),
    ]  # fmt: skip
    constants = {"s": np.float32(0.1), "zero": np.int8(0), "w": np.ones((32, 8), np.float16)}
    assert told(graph(*nodes, constants=constants), precision="int8") == [
        "warning Cast_half: a cast behind a DequantizeLinear"
    ]
