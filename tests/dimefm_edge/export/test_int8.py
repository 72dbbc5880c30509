"""int8 graphs: valid, small, near to fp32, the same answer by any kernel; and where Q/DQ stand."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import helper, numpy_helper
from onnx.reference import ReferenceEvaluator

from dimefm_edge.errors import ExportError
from dimefm_edge.export.int8 import quantize_graph
from dimefm_edge.export.integer_kernels import quantized_products
from dimefm_edge.export.quant_rules import QUANT_RULES
from dimefm_edge.runtime.onnxruntime import load_session
from dimefm_edge.targets.cpu import int8_products_saturate, unwanted_rewrites
from tests.dimefm_edge.export.int8_case import (
    FAMILIES,
    cosines,
    family_graph,
    hand_made,
    run,
    scenes,
)

X86 = QUANT_RULES["onnxruntime-x86"]
AVX2 = QUANT_RULES["onnxruntime-x86-avx2"]
ARM = QUANT_RULES["onnxruntime-arm"]
TENSORRT = QUANT_RULES["tensorrt"]
FP8 = QUANT_RULES["tensorrt-fp8"]
RNG = np.random.default_rng(0)
_START = RNG.bit_generator.state


@pytest.fixture(autouse=True)
def _same_numbers():
    """Whichever tests ran before."""
    RNG.bit_generator.state = _START


def normal(*shape: int) -> np.ndarray:
    return RNG.normal(size=shape).astype(np.float32)


def count(model: onnx.ModelProto) -> Counter[str]:
    return Counter(node.op_type for node in model.graph.node)


def weight(model: onnx.ModelProto, name: str) -> np.ndarray:
    return next(numpy_helper.to_array(t) for t in model.graph.initializer if t.name == name)


def readers(model: onnx.ModelProto, op_type: str) -> Counter[str]:
    """What reads the outputs of one kind of node."""
    made = {node.output[0] for node in model.graph.node if node.op_type == op_type}
    return Counter(n.op_type for n in model.graph.node for name in n.input if name in made)


# ------------------------------------------------------------------------- every family


@pytest.mark.parametrize("family", FAMILIES)
def test_valid_and_near_to_fp32(family):
    model, images = family_graph(family), scenes(24)
    before = model.SerializeToString(deterministic=True)
    wanted = run(model, images)
    for rules in QUANT_RULES.values():
        found = quantize_graph(model, images[:16], rules=rules)
        assert model.SerializeToString(deterministic=True) == before
        onnx.checker.check_model(found, full_check=True)
        answers = run(found, images, is_exact=True)
        assert cosines(answers, wanted).min() >= rules.min_cosine, rules.name
        # As written and by integer kernels: a rounding of a half may fall otherwise, no more.
        written = run(found, images, is_simulated=True)
        assert cosines(answers, written).min() > 0.9995, rules.name


def test_a_fixed_batch_and_a_second_time():
    model, images = family_graph("vit", batch=1), scenes(5)
    found = quantize_graph(model, images, rules=AVX2)
    onnx.checker.check_model(found, full_check=True)
    assert cosines(run(found, images), run(model, images)).min() >= AVX2.min_cosine
    again = quantize_graph(model, images, rules=AVX2)
    assert found.SerializeToString(deterministic=True) == again.SerializeToString(
        deterministic=True
    )


@pytest.mark.parametrize("rules", QUANT_RULES.values(), ids=lambda rules: rules.name)
def test_the_file_is_a_third_at_most(rules):
    """The share falls with the width: 0.30 here, 0.26 at width 384; no float copy is left."""
    model = family_graph("vit")
    found = quantize_graph(model, scenes(2), rules=rules)
    assert found.ByteSize() < 0.30 * model.ByteSize()
    read = {name for node in found.graph.node for name in node.input}
    assert {tensor.name for tensor in found.graph.initializer} <= read
    floats = [t for t in found.graph.initializer if t.data_type == onnx.TensorProto.FLOAT]
    largest = max(int(np.prod(tensor.dims)) for tensor in floats)
    stem = 192 * 3 * 8 * 8  # stays float in ONNX Runtime
    assert largest == (stem if not rules.is_stem_quantized else 17 * 192)  # then: positions


@pytest.mark.skipif(not int8_products_saturate(), reason="this CPU adds int8 products in 32 bits")
def test_saturation_is_real_and_avoided():
    """8-bit s8 weights go wrong on this CPU, by ONNX Runtime's own choice of kernels."""
    model, images = family_graph("vit"), scenes(16)
    vnni = quantize_graph(model, images, rules=QUANT_RULES["onnxruntime-x86"])
    written = run(vnni, images, is_simulated=True)
    assert cosines(run(vnni, images), written).min() < 0.9995
    for rules in (AVX2, replace(AVX2, weight="int8", weight_bits=7)):
        safe = quantize_graph(model, images, rules=rules)
        assert cosines(run(safe, images), run(safe, images, is_simulated=True)).min() > 0.9999


# ---------------------------------------------------------------------------------- fp8


def test_fp8_is_e4m3_with_one_scale_for_each_tensor():
    model = quantize_graph(family_graph("vit"), scenes(4), rules=FP8)
    onnx.checker.check_model(model, full_check=True)
    kinds = {t.name: t.data_type for t in model.graph.initializer}
    pairs = [n for n in model.graph.node if n.op_type.endswith("izeLinear")]
    assert {kinds[n.input[2]] for n in pairs} == {onnx.TensorProto.FLOAT8E4M3FN}
    assert all(not weight(model, n.input[1]).shape for n in pairs)
    products = [n for n in model.graph.node if n.op_type in ("Conv", "MatMul", "Gemm")]
    assert count(model)["DequantizeLinear"] > len(products)
    stem = next(n for n in products if n.op_type == "Conv")
    assert kinds[stem.input[1]] == onnx.TensorProto.FLOAT


def test_fp8_answers_as_torch_and_as_onnx_define_it():
    """ONNX Runtime, ONNX's own reference and torch's cast: clip at 448, round to the nearest."""
    weights = {"w": normal(16, 8)}
    node = helper.make_node("MatMul", ["image", "w"], ["image_embeds"], "product")
    model = hand_made([node], weights, shape=["B", 16], out=["B", 8])
    rows = normal(64, 16)
    found = quantize_graph(model, rows, rules=FP8)
    wider = 1.5 * rows  # some are clipped
    scales = [torch.tensor(weight(found, name)) for name in ("image_scale", "w_scale")]
    assert float(scales[0]) == pytest.approx(float(np.abs(rows).max()) / 448)
    left, right = (
        (torch.from_numpy(x) / scale).clamp(-448, 448).to(torch.float8_e4m3fn).float() * scale
        for x, scale in zip((wider, weights["w"]), scales, strict=True)
    )
    wanted = (left @ right).numpy()
    np.testing.assert_allclose(run(found, wider), wanted, atol=1e-5)
    np.testing.assert_allclose(run(found, wider, is_simulated=True), wanted, atol=1e-5)
    reference = ReferenceEvaluator(found).run(None, {"image": wider})[0]
    np.testing.assert_allclose(reference, wanted, atol=1e-5)


@pytest.mark.parametrize("clip", ["Relu", "Clip"])
def test_the_runtime_keeps_what_stands_before_fp8(clip, tmp_path):
    """ONNX Runtime by itself drops the Relu, and fails at the Clip."""
    limits = ["low", "high"] if clip == "Clip" else []
    nodes = [
        helper.make_node("MatMul", ["image", "w0"], ["a"], "first"),
        helper.make_node(clip, ["a", *limits], ["b"]),
        helper.make_node("MatMul", ["b", "w1"], ["image_embeds"], "second"),
    ]
    ends = {"low": np.float32(0), "high": np.float32(6)} if limits else {}
    weights = {"w0": normal(16, 8), "w1": normal(8, 8), **{k: np.array(v) for k, v in ends.items()}}
    model = hand_made(nodes, weights, shape=["B", 16], out=["B", 8])
    rows = normal(32, 16)
    onnx.save(quantize_graph(model, rows, rules=FP8), str(tmp_path / "model.onnx"))
    session = load_session(tmp_path / "model.onnx", 1, precision="fp8")
    found = session.run(None, {"image": rows})[0]
    assert cosines(found, run(model, rows)).min() > 0.99


@pytest.mark.parametrize(
    ("shape", "group", "is_taken"),
    [((32, 32, 3, 3), 1, True), ((16, 32, 3, 3), 1, False), ((32, 32, 7, 7), 1, False),
     ((32, 1, 3, 3), 32, False), ((32, 16, 1, 1), 2, False)],
)  # fmt: skip
def test_convolutions_without_an_fp8_kernel_stay_float(shape, group, is_taken):
    nodes = [
        helper.make_node("Conv", ["image", "w0"], ["a"], "first"),
        helper.make_node("Conv", ["a", "w1"], ["b"], "second", group=group),
        helper.make_node("GlobalAveragePool", ["b"], ["c"]),
        helper.make_node("Flatten", ["c"], ["d"]),
        helper.make_node("Gemm", ["d", "w2"], ["image_embeds"], "last"),
    ]
    weights = {"w0": normal(32, 3, 1, 1), "w1": normal(*shape), "w2": normal(shape[0], 8)}
    model = hand_made(nodes, weights, shape=["B", 3, 32, 32], out=["B", 8])
    told = quantized_products(quantize_graph(model, scenes(2), rules=FP8))
    assert ("second" in told.quantized) == is_taken
    assert "last" in told.quantized


# ---------------------------------------------------------------------------- placement


def test_tensorrt_pairs_stand_before_products_only():
    """Nothing on residual adds, norms and GELU; zero points are 0, activations have one scale."""
    model = quantize_graph(family_graph("vit"), scenes(4), rules=TENSORRT)
    assert set(readers(model, "DequantizeLinear")) <= {"Conv", "MatMul", "Gemm"}
    assert set(readers(model, "QuantizeLinear")) == {"DequantizeLinear"}
    zeros = {n.input[2] for n in model.graph.node if n.op_type.endswith("izeLinear")}
    assert all(not weight(model, name).any() for name in zeros)
    assert all(
        not weight(model, n.input[1]).shape
        for n in model.graph.node if n.op_type == "QuantizeLinear"
    )  # fmt: skip


def test_both_products_of_an_attention():
    """TensorRT: queries, keys, probabilities (a known range) and values; ONNX Runtime: none."""
    model = family_graph("vit")
    found = quantize_graph(model, scenes(4), rules=TENSORRT)
    producers = {name: node for node in found.graph.node for name in node.output}
    products = [n for n in found.graph.node if n.op_type == "MatMul"]
    assert all(producers[name].op_type == "DequantizeLinear" for n in products for name in n.input)
    softmaxes = [n.output[0] for n in found.graph.node if n.op_type == "Softmax"]
    assert len(softmaxes) == 2
    for name in softmaxes:
        np.testing.assert_allclose(weight(found, f"{name}_scale"), 1 / 127, rtol=1e-6)
    plain = quantize_graph(model, scenes(4), rules=AVX2)
    producers = {name: node for node in plain.graph.node for name in node.output}
    assert {producers[n.input[0]].op_type for n in plain.graph.node if n.op_type == "Softmax"} == {
        "MatMul"
    }
    assert readers(plain, "Softmax") == {"MatMul": 2}


@pytest.mark.parametrize(
    "rules",
    [replace(TENSORRT, attention_head_dims=(64,)), replace(TENSORRT, attention_max_tokens=16)],
    ids=["head_dim 32", "17 tokens"],
)
def test_attention_that_would_not_fuse_stays_float(rules):
    found = quantize_graph(family_graph("vit"), scenes(2), rules=rules)
    assert readers(found, "Softmax") == {"MatMul": 2}


@pytest.mark.parametrize("rules", [AVX2, TENSORRT], ids=lambda rules: rules.name)
@pytest.mark.parametrize("domain", ["", "com.microsoft"])
def test_an_attention_that_is_one_node(domain, rules):
    """It reads and answers in float; the products around it are quantised."""
    kind = "MultiHeadAttention" if domain else "Attention"
    heads = {"num_heads": 2} if domain else {"q_num_heads": 2, "kv_num_heads": 2}
    nodes = [helper.make_node("MatMul", ["image", f"w{x}"], [x]) for x in "qkv"]
    nodes += [
        helper.make_node(kind, ["q", "k", "v"], ["a"], domain=domain, **heads),
        helper.make_node("MatMul", ["a", "wo"], ["image_embeds"]),
    ]
    weights = {f"w{x}": normal(32, 32) / 5 for x in "qkvo"}
    model = hand_made(nodes, weights, shape=["B", 9, 32], out=["B", 9, 32], opset=23)
    rows = normal(16, 9, 32)
    found = quantize_graph(model, rows, rules=rules)
    onnx.checker.check_model(found, full_check=True)
    assert count(found) == Counter(
        {"MatMul": 4, kind: 1, "QuantizeLinear": 2, "DequantizeLinear": 6}
    )
    answers, wanted = run(found, rows, is_exact=True), run(model, rows)
    assert cosines(answers.reshape(16, -1), wanted.reshape(16, -1)).min() > 0.99


def test_depthwise_and_stem_by_rule():
    model = family_graph("hybrid")
    dims = {t.name: tuple(t.dims) for t in model.graph.initializer}
    convs = [n for n in model.graph.node if n.op_type == "Conv"]
    depthwise = [n for n in convs if dims[n.input[1]][1] == 1 and dims[n.input[1]][0] > 1]
    stem = [n for n in convs if n.input[0] == "image"]
    assert depthwise
    assert len(stem) == 1
    for rules, kept in ((AVX2, depthwise + stem), (ARM, stem), (TENSORRT, [])):
        found = quantize_graph(model, scenes(2), rules=rules)
        floats = {t.name for t in found.graph.initializer if t.name in dims and len(t.dims) == 4}
        assert floats == {node.input[1] for node in kept}


def test_one_pair_for_a_tensor_that_many_read():
    """Queries, keys and values of one norm; a residual reads the float tensor itself."""
    nodes = [helper.make_node("Gelu", ["image"], ["x"])]
    nodes += [helper.make_node("MatMul", ["x", f"w{i}"], [f"y{i}"]) for i in range(3)]
    nodes.append(helper.make_node("Sum", ["y0", "y1", "y2", "x"], ["image_embeds"]))
    model = hand_made(nodes, {f"w{i}": normal(8, 8) for i in range(3)}, shape=["B", 8],
                      out=["B", 8])  # fmt: skip
    found = quantize_graph(model, normal(64, 8), rules=AVX2)
    assert count(found)["QuantizeLinear"] == 1
    assert readers(found, "Gelu") == {"QuantizeLinear": 1, "Sum": 1}
    assert all(node.name for node in found.graph.node)


def test_a_shared_weight_is_stored_once():
    nodes = [
        helper.make_node("MatMul", ["image", "w"], ["x"]),
        helper.make_node("MatMul", ["x", "w"], ["image_embeds"]),
    ]
    model = hand_made(nodes, {"w": normal(64, 64) / 8}, shape=["B", 64], out=["B", 64])
    found = quantize_graph(model, normal(64, 64), rules=AVX2)
    stored = [tuple(t.dims) for t in found.graph.initializer if len(t.dims) == 2]
    assert stored == [(64, 64)]
    assert count(found)["QuantizeLinear"] == 2
    rows = normal(16, 64)
    assert cosines(run(found, rows), run(model, rows)).min() > 0.999


@pytest.mark.parametrize("trans_b", [0, 1])
@pytest.mark.parametrize("rules", [AVX2, TENSORRT], ids=lambda rules: rules.name)
def test_gemm_weights_by_channel_and_biases(trans_b, rules):
    w, b = normal(24, 40) * np.geomspace(0.01, 10, 40, dtype=np.float32), normal(40)
    nodes = [helper.make_node("Gemm", ["image", "w", "b"], ["image_embeds"], transB=trans_b)]
    weights = {"w": np.ascontiguousarray(w.T) if trans_b else w, "b": b}
    model = hand_made(nodes, weights, shape=["B", 24], out=["B", 40])
    found = quantize_graph(model, normal(256, 24), rules=rules)
    scale = weight(found, "w_scale")
    np.testing.assert_allclose(scale, np.abs(w).max(axis=0) / 127, rtol=1e-6)
    stored = weight(found, "w_quantized").astype(np.int32)
    stored = (stored.T if trans_b else stored) - (128 if rules.weight == "uint8" else 0)
    assert (np.abs(stored * scale - w).max(axis=0) <= scale / 2 * 1.001).all()
    if rules.is_bias_quantized:
        bias = weight(found, "b_quantized")
        assert bias.dtype == np.int32
        step = weight(found, "b_scale")
        assert (np.abs(bias * step - b) <= step / 2 * 1.001 + 1e-6).all()
    else:
        np.testing.assert_array_equal(weight(found, "b"), b)
    rows = normal(16, 24)
    assert cosines(run(found, rows, is_exact=True), run(model, rows)).min() > 0.998


def test_a_dead_channel_keeps_its_bias():
    """Weights of zero, or next to it, would ask for a bias beyond 32 bits."""
    w, b = normal(16, 3), np.array([0.5, 70.0, -70.0], np.float32)
    w[:, 1], w[:, 2] = 0, 1e-12
    nodes = [helper.make_node("Gemm", ["image", "w", "b"], ["image_embeds"])]
    model = hand_made(nodes, {"w": w, "b": b}, shape=["B", 16], out=["B", 3])
    found = quantize_graph(model, normal(64, 16), rules=AVX2)
    answers = run(found, normal(4, 16))
    np.testing.assert_allclose(answers[:, 1:], [[70.0, -70.0]] * 4, rtol=1e-4)


def test_grouped_convolutions_and_what_follows_them():
    """A Relu behind an integer kernel is clipped by it: one pair, after the Relu."""
    nodes = [
        helper.make_node("Conv", ["image", "w0"], ["a"], pads=[1] * 4),
        helper.make_node("Conv", ["a", "w1", "b1"], ["b"], group=4, pads=[1] * 4),
        helper.make_node("Relu", ["b"], ["c"]),
        helper.make_node("Conv", ["c", "w2"], ["d"]),
        helper.make_node("GlobalAveragePool", ["d"], ["e"]),
        helper.make_node("Flatten", ["e"], ["image_embeds"]),
    ]
    weights = {"w0": normal(8, 3, 3, 3), "w1": normal(16, 2, 3, 3), "b1": normal(16),
               "w2": normal(24, 16, 1, 1)}  # fmt: skip
    model = hand_made(nodes, weights, shape=["B", 3, 32, 32], out=["B", 24])
    found = quantize_graph(model, scenes(8), rules=AVX2)
    quantized = [n.input[0] for n in found.graph.node if n.op_type == "QuantizeLinear"]
    assert sorted(quantized) == ["a", "c", "d"]
    assert weight(found, "w1_scale").shape == (16,)
    assert cosines(run(found, scenes(12)), run(model, scenes(12))).min() > 0.995


def test_what_cannot_be_quantised_stays_float():
    """A constant on the left, two activations, a bias that is computed, a factor."""
    nodes = [
        helper.make_node("MatMul", ["w", "image"], ["a"]),
        helper.make_node("MatMul", ["a", "a"], ["b"]),
        helper.make_node("Gemm", ["b", "w", "a"], ["c"]),
        helper.make_node("Gemm", ["c", "w"], ["d"], alpha=0.5),
        helper.make_node("MatMul", ["d", "w"], ["image_embeds"]),
    ]
    model = hand_made(nodes, {"w": normal(8, 8) / 3}, shape=[8, 8], out=[8, 8])
    rows = normal(8, 8)
    found = quantize_graph(model, rows, rules=AVX2)
    assert [n.input[0] for n in found.graph.node if n.op_type == "QuantizeLinear"] == ["d"]
    assert count(found)["DequantizeLinear"] == 2
    assert cosines(run(found, rows), run(model, rows)).min() > 0.99


# ------------------------------------------------------------------------------- errors


def test_nothing_to_quantise():
    nodes = [helper.make_node("Relu", ["image"], ["image_embeds"])]
    model = hand_made(nodes, {}, shape=["B", 4], out=["B", 4])
    with pytest.raises(ExportError, match=r"no product that tensorrt runs in int8\n  try: dimefm"):
        quantize_graph(model, normal(4, 4), rules=TENSORRT)


def test_activations_that_are_not_finite():
    nodes = [
        helper.make_node("Log", ["image"], ["x"]),
        helper.make_node("MatMul", ["x", "w"], ["image_embeds"]),
    ]
    model = hand_made(nodes, {"w": normal(4, 4)}, shape=["B", 4], out=["B", 4])
    with pytest.raises(ExportError, match=r"activation 'x' is not finite on one of .* number 0 on"):
        quantize_graph(model, -np.ones((2, 4), np.float32), rules=AVX2)


# ------------------------------------------------------------------------------- GELU


def gelu_graph(*, before: str = "Conv", behind: str = "Conv", is_read_twice: bool = False):
    """A stem, `before`, GELU, `behind`: what is no convolution leaves its side in float."""
    ends = {"Conv": lambda x, w, y: helper.make_node("Conv", [x, w], [y], f"of_{w}"),
            "Softsign": lambda x, w, y: helper.make_node("Softsign", [x], [y])}  # fmt: skip
    nodes = [
        helper.make_node("Conv", ["image", "w0"], ["s"], "stem"),
        ends[before]("s", "w1", "a"),
        helper.make_node("Gelu", ["a"], ["b"], "gelu"),
        ends[behind]("b", "w2", "c"),
        helper.make_node("Add", ["c", "b" if is_read_twice else "s"], ["d"]),
        helper.make_node("Conv", ["d", "w3"], ["image_embeds"], "last"),
    ]
    weights = {"w0": normal(8, 3, 1, 1)} | {f"w{i}": normal(8, 8, 1, 1) / 2 for i in (1, 2, 3)}
    return hand_made(nodes, weights, shape=["B", 3, 32, 32], out=["B", 8, 32, 32])


@pytest.mark.parametrize("rules", [X86, AVX2], ids=lambda rules: rules.name)
def test_gelu_between_integers_is_made_of_them(rules, tmp_path):
    model = gelu_graph()
    wanted = flat(model)
    found = quantize_graph(model, scenes(4), rules=rules)
    onnx.checker.check_model(found, full_check=True)
    assert count(found)["Gelu"] == 0
    assert count(found)["Sigmoid"] == 1
    answers = flat(found, is_exact=True)
    in_float = quantize_graph(model, scenes(4), rules=replace(rules, has_integer_sigmoid=False))
    assert count(in_float)["Gelu"] == 1
    lost, lost_in_float = (1 - cosines(a, wanted).mean() for a in (answers, flat(in_float)))
    assert lost < 0.003
    assert lost < 1.25 * lost_in_float
    assert cosines(answers, flat(found, is_simulated=True)).min() > 0.9999
    onnx.save(found, str(tmp_path / "int8.onnx"))
    kinds = Counter(node.op_type for node in load_optimised(tmp_path / "int8.onnx").graph.node)
    assert (kinds["QLinearSigmoid"], kinds["QLinearMul"], kinds["Gelu"]) == (1, 1, 0)


def flat(model: onnx.ModelProto, **how: bool) -> np.ndarray:
    """One row an image."""
    return run(model, scenes(4), **how).reshape(4, -1)


def load_optimised(path) -> onnx.ModelProto:
    """The graph that ONNX Runtime makes of another, as our loader asks it."""
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(path.with_name("optimised.onnx"))
    options.log_severity_level = 3
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
    onnxruntime.InferenceSession(
        str(path), options, providers=["CPUExecutionProvider"],
        disabled_optimizers=unwanted_rewrites("int8"),
    )  # fmt: skip
    return onnx.load(str(path.with_name("optimised.onnx")))


def run_all(model, images):
    session = onnxruntime.InferenceSession(
        model.SerializeToString(), providers=["CPUExecutionProvider"]
    )
    names = [value.name for value in session.get_outputs()]
    return dict(zip(names, session.run(names, {"image": images}), strict=True))


def test_gelu_in_integers_is_gelu_within_its_steps():
    """Every integer that a convolution may answer, by ONNX Runtime's table and by torch."""
    model = gelu_graph()
    found = quantize_graph(model, scenes(4), rules=X86)
    for value in ("a", "b_share_dequantized", "b"):
        found.graph.output.append(helper.make_tensor_value_info(value, 1, None))
    answers = run_all(found, scenes(4))
    exact = torch.nn.functional.gelu(torch.from_numpy(answers["a"]))
    step = float(weight(found, "b_scale"))
    assert float((torch.from_numpy(answers["b"]) - exact).abs().max()) < 0.021 + step
    assert 0 <= answers["b_share_dequantized"].min() < answers["b_share_dequantized"].max() <= 1


@pytest.mark.parametrize(
    ("shape", "rules"),
    [
        ({"before": "Softsign"}, X86),
        ({"behind": "Softsign"}, X86),
        ({"is_read_twice": True}, X86),
        ({}, TENSORRT),
        ({}, ARM),
    ],
)
def test_gelu_with_a_neighbour_in_float_stays(shape, rules):
    found = count(quantize_graph(gelu_graph(**shape), scenes(4), rules=rules))
    assert (found["Gelu"], found["Sigmoid"]) == (1, 0)
