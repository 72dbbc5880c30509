"""ONNX export: what the graph looks like, that it answers as torch does, and how it fails."""

from __future__ import annotations

import re
import warnings
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import onnx
import onnxruntime
import pytest
import torch
from onnx.reference import ReferenceEvaluator
from torch import nn

from dimefm_edge.data.scenes import scene_image
from dimefm_edge.errors import ExportError, ParityError
from dimefm_edge.export.graph_spec import GraphSpec
from dimefm_edge.export.onnx import OnnxGraph, export_onnx
from dimefm_edge.export.parity import check_parity, module_embeds
from dimefm_edge.export.tensorrt import check_graph
from dimefm_edge.preprocess import PreprocessSpec, preprocess_images
from dimefm_edge.students import StudentSpec, build_student, hybrid_spec, vit_spec

SIDE = 32
SPECS: dict[str, StudentSpec] = {
    "vit": vit_spec(image_size=SIDE, embed_dim=48, patch_size=8, width=64, depth=2, num_heads=2),
    "hybrid": hybrid_spec(image_size=SIDE, embed_dim=48, width=16, depth=(1, 1, 1, 1)),
    "timm": StudentSpec("timm:test_resnet", "timm", SIDE, 48, {"model": "test_resnet"}),
}


@pytest.fixture(scope="module")
def images() -> npt.NDArray[np.float32]:
    """(9, 3, 32, 32) preprocessed scenes."""
    return preprocess_images([scene_image(i) for i in range(9)], PreprocessSpec(SIDE))


def trained_like(family: str) -> nn.Module:
    """A student without two equal weights, its norms with statistics of images."""
    torch.manual_seed(0)
    student = build_student(SPECS[family])
    pictures = [scene_image(1000 + i) for i in range(32)]
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.add_(0.01 * torch.randn_like(parameter))
        student(torch.from_numpy(preprocess_images(pictures, PreprocessSpec(SIDE))))
    return student.eval()


@dataclass(frozen=True)
class Exported:
    student: nn.Module
    graphs: dict[str, OnnxGraph]


@pytest.fixture(scope="module")
def vit(images: npt.NDArray[np.float32], tmp_path_factory: pytest.TempPathFactory) -> Exported:
    """One ViT student, exported once in each precision."""
    folder, student = tmp_path_factory.mktemp("vit"), trained_like("vit")
    return Exported(
        student,
        {
            precision: export_onnx(
                student, folder / f"{precision}.onnx", image_size=SIDE,
                spec=GraphSpec(precision=precision), parity_images=images, metadata={},
            )
            for precision in ("fp32", "fp16")
        },
    )  # fmt: skip


def check_tensorrt_limits(model: onnx.ModelProto, precision: str) -> None:
    """What can be told without TensorRT about whether JetPack 6's 10.3 and later read a graph."""
    assert model.ir_version <= 10  # onnx 1.16, which the parser of 10.3 is built with
    assert [(o.domain, o.version <= 20) for o in model.opset_import] == [("", True)]
    assert not model.functions
    for version in ("10.3", "10.16", "11"):
        assert check_graph(model, version, precision=precision) == []


def has_attention(student: nn.Module) -> bool:
    return any(type(m).__name__ == "AttentionBlock" for m in student.modules())


@pytest.fixture(scope="module", params=sorted(SPECS))
def student(request: pytest.FixtureRequest) -> nn.Module:
    return trained_like(request.param)


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_every_family_exports_and_answers_as_torch_does(
    student: nn.Module,
    precision: str,
    images: npt.NDArray[np.float32],
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:
    path = tmp_path / "model.onnx"
    before = {k: v.clone() for k, v in student.state_dict().items()}
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        graph = export_onnx(
            student, path, image_size=SIDE, spec=GraphSpec(precision=precision),
            parity_images=images, metadata={"student": "a test"},
        )  # fmt: skip
    assert capfd.readouterr() == ("", "")
    assert not caught
    assert student.state_dict().keys() == before.keys()
    assert all(torch.equal(v, before[k]) for k, v in student.state_dict().items())

    assert [p.name for p in tmp_path.iterdir()] == ["model.onnx"]
    model = onnx.load(path)
    assert [(o.domain, o.version) for o in model.opset_import] == [("", 20)]
    assert {p.key: p.value for p in model.metadata_props} == {"student": "a test"}
    check_tensorrt_limits(model, precision)
    norms = [m for m in student.modules() if isinstance(m, nn.LayerNorm)]
    assert graph.op_counts.get("LayerNormalization", 0) == len(norms)
    assert not any(node.metadata_props or node.doc_string for node in model.graph.node)
    assert str(Path(torch.__file__).parent).encode() not in path.read_bytes()
    # The hybrid's attention has one in front, which no convolution can absorb.
    assert graph.op_counts.get("BatchNormalization", 0) == (1 if has_attention(student) else 0)

    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    assert [(i.name, i.type, i.shape) for i in session.get_inputs()] == [
        ("image", "tensor(float)", ["batch", 3, SIDE, SIDE])
    ]
    assert [(o.name, o.type, o.shape) for o in session.get_outputs()] == [
        ("image_embeds", "tensor(float)", ["batch", 48])
    ]
    for size in (1, 7, 9):
        (embeds,) = session.run(None, {"image": images[:size]})
        with torch.no_grad():
            expected = student(torch.from_numpy(images[:size])).numpy()
        assert embeds.shape == (size, 48)
        np.testing.assert_allclose(np.linalg.norm(embeds, axis=1), 1, atol=1e-5)
        if precision == "fp32":
            np.testing.assert_allclose(embeds, expected, atol=1e-4)
        assert (embeds * expected).sum(axis=1).min() >= 0.999
    assert graph.parity.num_inputs == 9
    assert graph.parity.min_cosine >= 0.999


def test_vit_graph_has_norms_and_gelu_as_single_nodes(vit: Exported) -> None:
    norms = sum(isinstance(m, nn.LayerNorm) for m in vit.student.modules())
    for graph in vit.graphs.values():
        assert graph.op_counts["LayerNormalization"] == norms
        assert graph.op_counts["Gelu"] == 2
        assert graph.op_counts["Softmax"] == 2
        assert graph.op_counts["MatMul"] == 2 * 8  # q, k, v, both products, output, mlp
        assert graph.op_counts["Shape"] == 1  # of the batch: attention computes no shapes
        assert not {"Erf", "Sqrt", "Pow", "Constant", "Identity"} & set(graph.op_counts)
    half = {k: n for k, n in vit.graphs["fp16"].op_counts.items() if k != "Cast"}
    assert half == vit.graphs["fp32"].op_counts
    sizes = {k: graph.path.stat().st_size for k, graph in vit.graphs.items()}
    assert sizes["fp16"] < 0.6 * sizes["fp32"]


def test_fp16_keeps_norms_softmax_and_the_last_division_in_fp32(vit: Exported) -> None:
    path = vit.graphs["fp16"].path
    graph = onnx.shape_inference.infer_shapes(onnx.load(path), strict_mode=True).graph
    types = {v.name: v.type.tensor_type.elem_type for v in [*graph.value_info, *graph.output]}
    types |= {i.name: i.data_type for i in graph.initializer}
    half, full = onnx.TensorProto.FLOAT16, onnx.TensorProto.FLOAT
    wanted = {
        "LayerNormalization": full, "Softmax": full, "ReduceL2": full, "Clip": full, "Div": full,
        "MatMul": half, "Gemm": half, "Conv": half, "Gelu": half,
    }  # fmt: skip
    seen = set()
    producers = {name: node for node in graph.node for name in node.output}
    for node in graph.node:
        if node.op_type == "LayerNormalization":
            assert [types[name] for name in node.input] == [full] * 3
            assert set(node.input[1:]) <= {i.name for i in graph.initializer}
        if node.op_type in wanted:
            seen.add(node.op_type)
            assert types[node.output[0]] == wanted[node.op_type], node.op_type
        if node.op_type == "Cast" and node.input[0] in producers:
            assert producers[node.input[0]].op_type != "Cast"
    assert seen == set(wanted)


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_parity_error_names_the_worst_image_and_both_figures(
    precision: str, images: npt.NDArray[np.float32], vit: Exported
) -> None:
    path = vit.graphs[precision].path
    with torch.no_grad():
        expected = vit.student(torch.from_numpy(images)).numpy()
    check_parity(path, expected, inputs=images, precision=precision)
    expected[2] = np.roll(expected[2], 1)
    expected[5] = -expected[5]
    with pytest.raises(
        ParityError,
        match=rf"the {precision} graph does not answer as the model does: worst on image 5 of "
        r"9, max abs difference 0\.\d+, cosine -(1\.0000|0\.999).* 2 images differ too much",
    ) as caught:
        check_parity(path, expected, inputs=images, precision=precision)
    assert caught.value.exit_code == 3
    assert ("--precision fp32" in str(caught.value)) == (precision == "fp16")
    expected[:] = np.nan
    with pytest.raises(ParityError, match="max abs difference nan, cosine nan"):
        check_parity(path, expected, inputs=images, precision=precision)


@pytest.mark.parametrize("name", ["onnxruntime-x86-avx2", "tensorrt"])
def test_int8_must_reach_what_its_rules_ask(
    name: str, images: npt.NDArray[np.float32], vit: Exported, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """An answer at a cosine of 0.985 is good enough for TensorRT's rules, not for the others'."""
    rng = np.random.default_rng(0)
    embeds = module_embeds(vit.student, images)
    aside = rng.normal(size=embeds.shape).astype(np.float32)
    aside -= (aside * embeds).sum(1, keepdims=True) * embeds
    aside /= np.linalg.norm(aside, axis=1, keepdims=True)
    moved = 0.985 * embeds + np.sqrt(1 - 0.985**2) * aside
    monkeypatch.setattr("dimefm_edge.export.onnx.module_embeds", lambda *_: moved)
    spec = GraphSpec(runtime=name.split("-")[0], attention="decomposed", precision="int8",
                     quant_rules=name)  # fmt: skip

    def export() -> OnnxGraph:
        return export_onnx(vit.student, tmp_path / "model.onnx", image_size=SIDE, spec=spec,
                           parity_images=images, metadata={})  # fmt: skip

    if name == "tensorrt":
        assert 0.98 <= export().parity.min_cosine < 0.99
        return
    with pytest.raises(ParityError, match=r"allowed: cosine of at least 0\.99\)"):
        export()


@pytest.mark.parametrize(
    ("precision", "hint"),
    [
        ("fp32", "another torch or onnxscript release"),
        ("fp16", "--precision fp32$"),
        ("int8", "--precision fp32; or distill --ptq int8 --max-drop 1"),
    ],
)
def test_a_parity_error_says_what_to_do(
    precision: str, hint: str, images: npt.NDArray[np.float32], vit: Exported
) -> None:
    wrong = -module_embeds(vit.student, images)
    with pytest.raises(ParityError) as said:
        check_parity(vit.graphs["fp32"].path, wrong, inputs=images, precision=precision)
    assert re.search(hint, str(said.value.hint))


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_a_failed_export_keeps_the_file_that_was_there(
    precision: str,
    images: npt.NDArray[np.float32],
    vit: Exported,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    path = tmp_path / "model.onnx"
    path.write_bytes(b"good")
    wrong = -module_embeds(vit.student, images)
    monkeypatch.setattr("dimefm_edge.export.onnx.module_embeds", lambda *_: wrong)
    with pytest.raises(ParityError, match="does not answer as the model does"):
        export_onnx(
            vit.student, path, image_size=SIDE, spec=GraphSpec(precision=precision),
            parity_images=images, metadata={},
        )  # fmt: skip
    assert [(p.name, p.read_bytes()) for p in tmp_path.iterdir()] == [("model.onnx", b"good")]


def test_parity_runs_every_batch_size_on_a_single_image(
    images: npt.NDArray[np.float32], vit: Exported, tmp_path: Path
) -> None:
    path = vit.graphs["fp32"].path
    with torch.no_grad():
        expected = vit.student(torch.from_numpy(images[:1])).numpy()
    assert check_parity(path, expected, inputs=images[:1], precision="fp32").num_inputs == 1
    model = onnx.load(path)
    model.graph.input[0].type.tensor_type.shape.dim[0].dim_value = 1  # a baked batch size
    onnx.save(model, tmp_path / "baked.onnx")
    with pytest.raises(ExportError, match=r"cannot run the exported graph: .*Got: 7 Expected: 1"):
        check_parity(tmp_path / "baked.onnx", expected, inputs=images[:1], precision="fp32")


def test_fp16_holds_where_every_operation_rounds(
    images: npt.NDArray[np.float32], vit: Exported
) -> None:
    """ONNX's reference implementation computes in fp16 what ONNX Runtime's CPU kernels do not."""
    path = vit.graphs["fp16"].path
    (embeds,) = ReferenceEvaluator(onnx.load(path)).run(None, {"image": images[:2]})
    with torch.no_grad():
        expected = vit.student(torch.from_numpy(images[:2])).numpy()
    difference = np.abs(embeds - expected).max()
    assert (embeds * expected).sum(axis=1).min() >= 0.999
    assert difference > 1e-6  # it did round


def test_overflow_in_fp16_is_a_parity_error(
    images: npt.NDArray[np.float32], tmp_path: Path
) -> None:
    class Loud(nn.Module):
        """Activations of 1e6 on the way, which fp32 carries and fp16 does not."""

        def __init__(self) -> None:
            super().__init__()
            self.student = trained_like("vit")
            self.loud = nn.Conv2d(3, 3, 1)
            self.quiet = nn.Conv2d(3, 3, 1)
            with torch.no_grad():
                for layer, gain in ((self.loud, 1e6), (self.quiet, 1e-6)):
                    layer.weight.copy_(gain * torch.eye(3).view(3, 3, 1, 1))
                    layer.bias.zero_()

        def forward(self, image: torch.Tensor) -> torch.Tensor:
            embeds: torch.Tensor = self.student(self.quiet(self.loud(image).relu()))
            return embeds

    student = Loud()
    with pytest.raises(
        ParityError,
        match=r"leaves fp16's range \(65504\) on image 0 of 9: Conv .* gives inf\n  try: .*fp32",
    ):
        export_onnx(
            student, tmp_path / "m.onnx", image_size=SIDE, spec=GraphSpec(precision="fp16"),
            parity_images=images, metadata={},
        )  # fmt: skip
    assert not list(tmp_path.iterdir())


def test_a_student_that_cannot_be_exported(
    images: npt.NDArray[np.float32], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    class Baked(nn.Module):
        """Depends on the values of its input, which no graph can."""

        def __init__(self) -> None:
            super().__init__()
            self.student = trained_like("vit")

        def forward(self, image: torch.Tensor) -> torch.Tensor:
            embeds: torch.Tensor = self.student(image if image.mean() > 0 else -image)
            return embeds

    with pytest.raises(ExportError, match=r"torch 2\S+ cannot export the model to ONNX: \S+"):
        export_onnx(
            Baked(), tmp_path / "m.onnx", image_size=SIDE, spec=GraphSpec(),
            parity_images=images, metadata={},
        )  # fmt: skip
    assert capfd.readouterr() == ("", "")


def test_a_diverged_student_is_named(images: npt.NDArray[np.float32], tmp_path: Path) -> None:
    student = trained_like("vit")
    with torch.no_grad():
        next(student.parameters()).fill_(float("nan"))
    with pytest.raises(ExportError, match=r"the model itself answers image 0 .* length nan"):
        export_onnx(
            student, tmp_path / "m.onnx", image_size=SIDE, spec=GraphSpec(),
            parity_images=images, metadata={},
        )  # fmt: skip


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"image_size": 64}, ExportError, r"must be \(N, 3, 64, 64\) float32, got \(9, 3, 32, 32"),
        ({"parity_images": np.empty((0, 3, SIDE, SIDE), np.float32)}, ExportError, "at least one"),
        (
            {"parity_images": np.full((1, 3, SIDE, SIDE), np.nan, np.float32)},
            ExportError,
            "without NaN",
        ),
    ],
)
def test_bad_arguments(
    change: dict[str, object],
    error: type[Exception],
    message: str,
    images: npt.NDArray[np.float32],
    vit: Exported,
    tmp_path: Path,
) -> None:
    arguments = {
        "image_size": SIDE, "parity_images": images, "metadata": {}, **change,
    }  # fmt: skip
    with pytest.raises(error, match=message):
        export_onnx(vit.student, tmp_path / "m.onnx", **arguments)  # type: ignore[arg-type]
    assert not list(tmp_path.iterdir())
