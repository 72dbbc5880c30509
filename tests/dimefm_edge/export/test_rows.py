"""Linear layers on rows: what is one, what stays as it is, and that the answers stay."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import helper

from dimefm_edge.data.scenes import scene_image
from dimefm_edge.export.attention_patterns import find_attentions
from dimefm_edge.export.graph_spec import GraphSpec
from dimefm_edge.export.onnx import export_onnx, report_fusion
from dimefm_edge.export.rows import linears_on_rows
from dimefm_edge.export.text import export_text_onnx
from dimefm_edge.export.weight_only import WEIGHT_FORMATS
from dimefm_edge.latency.onnx_costs import graph_costs
from dimefm_edge.preprocess import PreprocessSpec, preprocess_images
from dimefm_edge.students import build_student, vit_spec
from tests.dimefm_edge.export.int8_case import hand_made

TOKENS, WIDTH, HIDDEN = 5, 8, 12
ONNX_RUNTIME = GraphSpec(runtime="onnxruntime", attention="MultiHeadAttention")


def node(op_type: str, inputs: str, output: str, **attributes: Any) -> onnx.NodeProto:
    names = inputs.split()
    return helper.make_node(op_type, names, [output], name=f"{output}_node", **attributes)


def linear(tokens: str, output: str, weight: str = "w", bias: str = "b") -> list[onnx.NodeProto]:
    product = f"{output}_product"
    return [node("MatMul", f"{tokens} {weight}", product), node("Add", f"{product} {bias}", output)]


def graph(
    nodes: Sequence[onnx.NodeProto],
    *,
    shape: Sequence[int | str] = ("B", TOKENS, WIDTH),
    out: Sequence[int | str] = ("B", TOKENS, HIDDEN),
    **constants: Any,
) -> onnx.ModelProto:
    """A graph of `image` (B, 5, 8) with weights to 12 channels and back, and its shapes."""
    rng = np.random.default_rng(0)
    values = {
        "w": rng.normal(size=(WIDTH, HIDDEN)), "b": rng.normal(size=HIDDEN),
        "w_back": rng.normal(size=(HIDDEN, WIDTH)), "b_back": rng.normal(size=WIDTH),
        "scale": rng.normal(size=WIDTH), "shift": rng.normal(size=WIDTH),
        "half": 0.5, "axes": np.array([1], np.int64), "first": np.array([0], np.int64),
        "second": np.array([1], np.int64), **constants,
    }  # fmt: skip
    read = {name for made in nodes for name in made.input}
    weights = {
        name: np.asarray(value, None if np.asarray(value).dtype == np.int64 else np.float32)
        for name, value in values.items()
        if name in read
    }
    return with_shapes(hand_made(nodes, weights, shape=shape, out=out))


def with_shapes(model: onnx.ModelProto) -> onnx.ModelProto:
    """As torch writes it: also what ONNX Runtime's attention answers has a shape."""
    for made in model.graph.node:
        if made.op_type == "MultiHeadAttention":
            value = helper.make_tensor_value_info(made.output[0], 1, ("B", TOKENS, WIDTH))
            model.graph.value_info.append(value)
    return onnx.shape_inference.infer_shapes(model, data_prop=True)


def answers(model: onnx.ModelProto, image: np.ndarray) -> np.ndarray:
    session = onnxruntime.InferenceSession(
        model.SerializeToString(), providers=["CPUExecutionProvider"]
    )
    (found,) = session.run(None, {"image": image})
    return found


def rewritten(model: onnx.ModelProto, *, count: int, batches: Sequence[int] = (1, 3)) -> list[str]:
    """The operators after the rewrite, whose answers are those of before."""
    before = onnx.ModelProto.FromString(model.SerializeToString())
    assert linears_on_rows(model) == count
    onnx.checker.check_model(model, full_check=True)
    shape = [dim.dim_value for dim in model.graph.input[0].type.tensor_type.shape.dim]
    for batch in batches:
        image = np.random.default_rng(batch).normal(size=(batch, *shape[1:])).astype(np.float32)
        found, wanted = answers(model, image), answers(before, image)
        np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-5)
    assert linears_on_rows(model) == 0  # there is none left
    return [made.op_type for made in model.graph.node]


@pytest.mark.parametrize("middle", [(TOKENS,), (2, 3)], ids=["tokens", "places"])
def test_a_linear_layer_becomes_a_product_with_its_bias(middle: tuple[int, ...]) -> None:
    model = graph(
        linear("image", "image_embeds"), shape=("B", *middle, WIDTH), out=("B", *middle, HIDDEN)
    )
    assert rewritten(model, count=1) == ["Reshape", "Gemm", "Reshape"]


def test_a_bias_may_come_first() -> None:
    nodes = [node("MatMul", "image w", "product"), node("Add", "b product", "image_embeds")]
    assert rewritten(graph(nodes), count=1) == ["Reshape", "Gemm", "Reshape"]


def test_a_batch_may_be_fixed() -> None:
    sizes = {"shape": (3, TOKENS, WIDTH), "out": (3, TOKENS, HIDDEN)}
    model = graph(linear("image", "image_embeds"), **sizes)
    assert rewritten(model, count=1, batches=[3]) == ["Reshape", "Gemm", "Reshape"]


@pytest.mark.parametrize(
    ("nodes", "changes"),
    [
        ([node("MatMul", "image w", "x"), node("Add", "x b", "y"),
          node("Mul", "x y", "image_embeds")], {}),
        ([node("Transpose", "w_back", "w_t", perm=[1, 0]), *linear("image", "image_embeds", "w_t")],
         {"w_back": np.ones((HIDDEN, WIDTH))}),
        (linear("image", "image_embeds"), {"shape": ("B", WIDTH), "out": ("B", HIDDEN)}),
        (linear("image", "image_embeds"), {"shape": ("B", "N", WIDTH), "out": ("B", "N", HIDDEN)}),
        (linear("image", "image_embeds"), {"w": np.ones((1, WIDTH, HIDDEN))}),
        (linear("image", "image_embeds"), {"b": np.ones((TOKENS, HIDDEN))}),
        (linear("image", "image_embeds"), {"b": 0.5}),
        ([node("MatMul", "image w", "image_embeds")], {}),
        ([node("MatMul", "left image", "x"), node("Add", "x b_back", "image_embeds")],
         {"left": np.ones((3, TOKENS)), "out": ("B", 3, WIDTH)}),
        ([node("ReduceMean", "image axes", "mean", keepdims=1), node("MatMul", "image w", "x"),
          node("MatMul", "mean w", "b_now"), node("Add", "x b_now", "image_embeds")], {}),
    ],
    ids=["two_readers", "computed_weight", "rank_2", "unknown_tokens", "rank_3_weight",
         "bias_of_tokens", "bias_of_one", "no_bias", "weight_first", "computed_bias"],
)  # fmt: skip
def test_what_only_looks_like_one_stays(
    nodes: list[onnx.NodeProto], changes: dict[str, Any]
) -> None:
    model = graph(nodes, **changes)
    before = model.SerializeToString(deterministic=True)
    assert linears_on_rows(model) == 0
    assert model.SerializeToString(deterministic=True) == before


def block() -> list[onnx.NodeProto]:
    """A ViT's block on `image` to `x`."""
    norm = {"axis": -1, "epsilon": 1e-5}
    return [
        node("LayerNormalization", "image scale shift", "normed", **norm),
        *linear("normed", "q", "w_q", "b_q"),
        *linear("normed", "k", "w_k", "b_q"),
        *linear("normed", "v", "w_v", "b_q"),
        node("MultiHeadAttention", "q k v", "mixed", domain="com.microsoft", num_heads=2),
        *linear("mixed", "out", "w_q", "b_back"),
        node("Add", "image out", "x_1"),
        node("LayerNormalization", "x_1 scale shift", "normed_1", **norm),
        *linear("normed_1", "hidden"),
        node("Gelu", "hidden", "active"),
        *linear("active", "back", "w_back", "b_back"),
        node("Mul", "back scale", "scaled"),
        node("Add", "x_1 scaled", "x"),
    ]


def square(seed: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(WIDTH, WIDTH)) / 3


def test_a_block_has_reshapes_around_its_attention_only() -> None:
    squares = {"w_q": square(1), "w_k": square(2), "w_v": square(3), "b_q": square(4)[0]}
    nodes = [*block(), *linear("x", "image_embeds", "w", "b")]
    ops = rewritten(graph(nodes, **squares), count=7)
    # normed; q, k, v back and mixed; the first residual; the answer
    assert ops.count("Reshape") == 7
    assert "MatMul" not in ops
    assert ops.count("Add") == 2  # the residuals
    assert ops[ops.index("MultiHeadAttention") :] == [
        "MultiHeadAttention", "Reshape", "Gemm", "Reshape", "Add", "LayerNormalization", "Gemm",
        "Gelu", "Gemm", "Mul", "Add", "Gemm", "Reshape",
    ]  # fmt: skip


def test_what_needs_the_shape_gets_it_once() -> None:
    nodes = [
        *linear("image", "hidden"),
        node("Gelu", "hidden", "active"),
        node("Transpose", "hidden", "turned", perm=[0, 2, 1]),
        node("Transpose", "turned", "again", perm=[0, 2, 1]),
        node("Slice", "hidden first second axes", "one"),
        *linear("active", "back", "w_back", "b_back"),
        node("Add", "back image", "sum"),
        *linear("sum", "wide"),
        node("Add", "again one", "mixed"),
        node("Add", "wide mixed", "image_embeds"),
    ]
    ops = rewritten(graph(nodes), count=3)
    # image as rows, hidden back, and the last layer back: its sum is read by nothing that has rows
    assert ops.count("Reshape") == 3
    assert ops[-2:] == ["Reshape", "Add"]


def test_answers_keep_their_shapes() -> None:
    model = graph(
        [*linear("image", "image_embeds"), node("Gelu", "image_embeds", "active"),
         *linear("active", "back", "w_back", "b_back")]
    )  # fmt: skip
    model.graph.output.append(helper.make_tensor_value_info("back", 1, ("B", TOKENS, WIDTH)))
    assert linears_on_rows(model) == 2
    session = onnxruntime.InferenceSession(model.SerializeToString())
    found = session.run(None, {"image": np.ones((2, TOKENS, WIDTH), np.float32)})
    assert [answer.shape for answer in found] == [(2, TOKENS, HIDDEN), (2, TOKENS, WIDTH)]


@pytest.mark.parametrize(
    "middle",
    [
        [node("Add", "hidden places", "y")],  # a constant of each token
        [node("Add", "hidden one", "y")],  # one token, added to all
        [node("Softmax", "hidden", "y", axis=1)],
        [node("LayerNormalization", "hidden wide", "y", axis=1)],
        [node("ReduceMean", "hidden axes", "mean", keepdims=1), node("Mul", "hidden mean", "y")],
    ],
    ids=["places", "one_token", "softmax", "norm_of_tokens", "mean"],
)
def test_what_looks_across_tokens_gets_the_shape(middle: list[onnx.NodeProto]) -> None:
    nodes = [
        *linear("image", "linear"),
        node("Gelu", "linear", "hidden"),
        node("Slice", "hidden first second axes", "one"),
        *middle,
        node("Neg", "y", "image_embeds"),
    ]
    rng = np.random.default_rng(1)
    wide = rng.normal(size=(TOKENS, HIDDEN))
    ops = rewritten(graph(nodes, places=wide, wide=wide), count=1)
    assert ops[:4] == ["Reshape", "Gemm", "Gelu", "Reshape"]
    assert ops.count("Reshape") == 2


def test_reshapes_on_the_way_read_and_make_rows() -> None:
    """Heads are split from rows at once, and what was put together is rows at once."""
    nodes = [
        *linear("image", "hidden"),
        node("Reshape", "hidden split", "heads"),
        node("Transpose", "heads", "turned", perm=[0, 2, 1, 3]),
        node("Transpose", "turned", "again", perm=[0, 2, 1, 3]),
        node("Reshape", "again joined", "tokens"),
        *linear("tokens", "image_embeds", "w_back", "b_back"),
    ]
    constants = {
        "split": np.array([-1, TOKENS, 3, 4]), "joined": np.array([-1, TOKENS, HIDDEN]),
        "out": ("B", TOKENS, WIDTH),
    }  # fmt: skip
    ops = rewritten(graph(nodes, **constants), count=2)
    turned = ["Transpose", "Transpose"]
    assert ops == ["Reshape", "Gemm", "Reshape", *turned, "Reshape", "Gemm", "Reshape"]
    # A size of 0 is the input's own, which rows do not have.
    constants["split"] = np.array([0, TOKENS, 3, 4])
    assert rewritten(graph(nodes, **constants), count=2).count("Reshape") == 5


@pytest.mark.parametrize("seed", range(12))
def test_answers_stay_whatever_is_between(seed: int) -> None:
    rng = np.random.default_rng(seed)
    nodes: list[onnx.NodeProto] = []
    narrow, now = ["image"], "image"
    for i in range(12):
        out, other = f"x{i}", str(rng.choice(narrow))
        kind = int(rng.integers(7))
        if kind == 0:
            nodes += [*linear(now, f"h{i}"), node("Gelu", f"h{i}", f"a{i}")]
            nodes += linear(f"a{i}", out, "w_back", "b_back")
        elif kind == 1:
            nodes.append(node("Slice", f"{other} first second axes", f"one{i}"))
            nodes.append(node("Add", f"{now} one{i}", out))
        elif kind == 2:
            nodes.append(node("LayerNormalization", f"{now} scale shift", out, axis=2))
        else:
            op, second = {
                3: ("Add", other), 4: ("Mul", "half"), 5: ("Sub", "shift"), 6: ("Mul", other),
            }[kind]  # fmt: skip
            nodes.append(node(op, f"{now} {second}", out))
        narrow.append(out)
        now = str(rng.choice(narrow[-2:]))
    nodes += linear(now, "image_embeds")
    count = sum(made.op_type == "MatMul" for made in nodes)
    ops = rewritten(graph(nodes), count=count)
    assert "MatMul" not in ops
    assert ops.count("Gemm") <= count  # what nothing reads is gone


def student() -> torch.nn.Module:
    torch.manual_seed(0)
    return build_student(
        vit_spec(image_size=32, embed_dim=16, patch_size=8, width=32, depth=2, num_heads=1)
    ).eval()


def scenes() -> np.ndarray:
    return preprocess_images([scene_image(i) for i in range(4)], PreprocessSpec(32))


@pytest.mark.parametrize(
    ("spec", "is_rows"),
    [
        (ONNX_RUNTIME, True),
        (GraphSpec(runtime="onnxruntime", attention="decomposed", batch_size=2), True),
        (GraphSpec(), False),  # TensorRT
        (GraphSpec(runtime="onnxruntime", attention="decomposed", precision="fp16"), False),
        (GraphSpec(runtime="onnxruntime", attention="decomposed", providers=("qnn", "cpu")), False),
    ],
)
def test_only_graphs_for_a_cpu_in_fp32_have_it(
    spec: GraphSpec, is_rows: bool, tmp_path: Path
) -> None:
    found = export_onnx(
        student(), tmp_path / "m.onnx", image_size=32, spec=spec, parity_images=scenes(),
        metadata={},
    )  # fmt: skip
    # One Gemm has rows anyway: the projection of the class token.
    assert found.op_counts["Gemm"] == (12 if is_rows else 0) + 1
    assert found.parity.min_cosine > 0.9999


def test_what_a_graph_does_and_fuses_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def write(name: str) -> Path:
        path = tmp_path / name
        export_onnx(
            student(), path, image_size=32, spec=ONNX_RUNTIME, parity_images=scenes(), metadata={}
        )
        return path

    rows = write("rows.onnx")
    monkeypatch.setattr("dimefm_edge.export.onnx.linears_on_rows", lambda model: 0)
    plain = write("plain.onnx")
    sums = [
        {
            (op.kind, name): sum(getattr(o, name) for o in costs.ops if o.kind == op.kind)
            for op in costs.ops
            for name in ("macs", "read", "written")
        }
        for costs in (graph_costs(rows, batch=3), graph_costs(plain, batch=3))
    ]
    assert sums[0] == sums[1]
    models = [onnx.load(path) for path in (rows, plain)]
    fusions = [report_fusion(model, find_attentions(model)) for model in models]
    assert fusions[0] == fusions[1]


class Words(torch.nn.Module):
    """The least text tower with a linear layer of tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.linear = torch.nn.Embedding(40, 32), torch.nn.Linear(32, 32)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.normalize(self.linear(self.embed(tokens)).amax(1), dim=-1)


@pytest.mark.parametrize("weights", [None, "int8"])
def test_text_towers_have_it_but_those_of_integer_weights(
    weights: str | None, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    found = export_text_onnx(
        Words().eval(), tmp_path / "text.onnx", metadata={}, spec=ONNX_RUNTIME,
        parity_tokens=np.random.default_rng(0).integers(0, 40, (4, 6)),
        weights=None if weights is None else WEIGHT_FORMATS[weights],
    )  # fmt: skip
    assert found.op_counts.get("Gemm", 0) == (weights is None)
