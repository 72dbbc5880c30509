"""Fake-quantised students: they train, their graphs answer as they do, by every runtime's rules."""

from __future__ import annotations

import copy
import dataclasses
import functools
from pathlib import Path

import pytest
import torch
from torch import nn

from dimefm_edge.errors import ExportError, UnknownNameError
from dimefm_edge.export import GraphSpec, export_onnx, export_student, graph_spec
from dimefm_edge.export.integer_kernels import count_integer_kernels
from dimefm_edge.export.parity import module_embeds
from dimefm_edge.export.quant_rules import QUANT_RULES
from dimefm_edge.preprocess import PreprocessSpec
from dimefm_edge.quantize.fake_quant import ActivationFakeQuant, BiasFakeQuant
from dimefm_edge.quantize.qat import FakeQuantStudent, qat_prepare
from dimefm_edge.runtime import load_bundle
from dimefm_edge.students import LoadedStudent, build_student, vit_spec
from dimefm_edge.targets import load_target
from dimefm_edge.targets.cpu import cpu_quant_rules
from tests.dimefm_edge.quantize.int8_students import (
    ARM,
    AVX2,
    SIDE,
    SPECS,
    TENSORRT,
    cosines,
    images,
    student,
)


@functools.cache
def _prepared(family: str, rules_name: str, keep_float: tuple[str, ...]) -> FakeQuantStudent:
    made = qat_prepare(
        student(family), image_size=SIDE, rules_name=rules_name, keep_float=keep_float
    )
    made.warm_up([images(16), images(32)[16:]])
    return made


def prepared(
    family: str = "vit", rules_name: str = AVX2, keep_float: tuple[str, ...] = ()
) -> FakeQuantStudent:
    return copy.deepcopy(_prepared(family, rules_name, keep_float))


def train_a_little(made: FakeQuantStudent, steps: int = 3) -> None:
    """Away from the float student: nothing that was computed before holds any more."""
    made.train().freeze_ranges(False)
    wanted = torch.nn.functional.normalize(torch.randn(32, 24), dim=1)
    optimizer = torch.optim.SGD(made.parameters(), lr=0.5)
    for _ in range(steps):
        optimizer.zero_grad()
        (made(images(32)) - wanted).square().sum().backward()
        optimizer.step()
    made.freeze_ranges()
    made.eval()


def spec(rules_name: str) -> GraphSpec:
    runtime = "tensorrt" if rules_name == TENSORRT else "onnxruntime"
    return GraphSpec(
        runtime=runtime, attention="decomposed", precision="int8", quant_rules=rules_name
    )


SLOW = pytest.mark.slow
CASES = [
    ("vit", AVX2),
    ("vit", TENSORRT),
    pytest.param("hybrid", AVX2, marks=SLOW),
    pytest.param("hybrid", ARM, marks=SLOW),
    pytest.param("resnet", AVX2, marks=SLOW),
    pytest.param("resnet", TENSORRT, marks=SLOW),
]


@pytest.mark.parametrize(("family", "rules_name"), CASES)
def test_the_graph_answers_as_the_student_was_trained(family, rules_name, tmp_path):
    torch.manual_seed(0)
    made = prepared(family, rules_name)
    train_a_little(made)
    path = tmp_path / "model.onnx"
    graph = export_onnx(
        made, path, image_size=SIDE, parity_images=images(32).numpy(), metadata={},
        spec=spec(rules_name),
    )  # fmt: skip
    assert graph.parity.min_cosine >= 0.999
    with torch.no_grad():
        moved = cosines(made(images(32)), student(family)(images(32)))
    assert moved.min() < 0.99  # else the training above proves nothing
    stored = [name for name in graph.op_counts if name == "DequantizeLinear"]
    assert stored
    if rules_name == cpu_quant_rules():
        kernels = count_integer_kernels(path, images(1).numpy())
        assert kernels.fallen_back == ()
        assert kernels.num_integer == len(made.product_names)


def test_what_was_trained_for_tensorrt_becomes_a_bundle(tmp_path):
    torch.manual_seed(0)
    made = prepared("vit", TENSORRT)
    train_a_little(made)
    path = export_student(
        LoadedStudent(made, SPECS["vit"], PreprocessSpec(SIDE), {}), tmp_path / "bundle",
        graph=graph_spec(load_target("jetson-orin"), precision="int8"),
        parity_images=images(32).numpy(), logit_scale=100.0,
    )  # fmt: skip
    graph = load_bundle(path).manifest["graph"]
    assert graph["attention"] == "decomposed"  # three projections, each with ranges of its own
    assert len(graph["quantized"]["quantized"]) == len(made.product_names)
    assert [entry["has_qdq_around_bmm2"] for entry in graph["attentions"]] == [True, True]


def test_ranges_follow_until_half_of_the_training_then_stay():
    made = prepared()
    before = made.ranges()
    made.train()
    made.on_step(4, 10)
    made(3 * images(16))
    followed = made.ranges()
    assert followed != before
    made.on_step(5, 10)
    made(5 * images(16))
    assert made.ranges() == followed
    made.on_step(0, 10)
    made.eval()
    made(5 * images(16))
    assert made.ranges() == followed


def test_calibration_by_percentile_clips_what_the_largest_value_does_not():
    made = prepared()
    reaches = {}
    for method in ("minmax", "percentile", "mse"):
        made.calibrate([images(16)], method)
        reaches[method] = made.ranges()["trunk.blocks.0.mlp.fc2"][0]
    assert reaches["minmax"][1] >= reaches["percentile"][1] >= reaches["mse"][1] * 0.5
    assert reaches["minmax"] != reaches["mse"]
    with pytest.raises(UnknownNameError, match="unknown calibration method 'entropy'"):
        made.calibrate([images(8)], "entropy")


def test_products_can_be_rounded_alone_and_none_is_the_float_student():
    made = prepared().eval()
    with torch.no_grad():
        with made.rounding_only(()):
            torch.testing.assert_close(made(images(8)), student("vit")(images(8)))
        with made.rounding_only(("trunk.blocks.1.core.v",)):
            one = made(images(8))
        everything = made(images(8))
    assert not torch.equal(one, everything)
    assert (1 - cosines(one, everything)).max() > 0


def test_kept_float_products_are_float_in_the_graph(tmp_path):
    made = prepared(keep_float=("proj", "trunk.blocks.0.mlp.fc1")).eval()
    assert "proj" not in made.product_names
    graph = export_onnx(
        made, tmp_path / "model.onnx", image_size=SIDE, parity_images=images(8).numpy(),
        metadata={}, spec=spec(AVX2),
    )  # fmt: skip
    kernels = count_integer_kernels(graph.path, images(1).numpy())
    assert len(kernels.left_float) == 2 + 4  # and attention


def test_patches_that_stay_float_are_told_as_what_reads_the_image(tmp_path):
    made = prepared(keep_float=("trunk.patch_embed.proj",)).eval()
    graph = export_onnx(
        made, tmp_path / "model.onnx", image_size=SIDE, parity_images=images(8).numpy(),
        metadata={}, spec=spec(AVX2),
    )  # fmt: skip
    assert "1 on the image" in str(graph.quantized)


@pytest.mark.parametrize("batch_size", [1, 2])
def test_a_fixed_batch_runs_in_integers_too(batch_size, tmp_path):
    made = prepared("vit", cpu_quant_rules()).eval()
    graph = export_onnx(
        made, tmp_path / "model.onnx", image_size=SIDE, parity_images=images(8).numpy(),
        metadata={}, spec=dataclasses.replace(spec(cpu_quant_rules()), batch_size=batch_size),
    )  # fmt: skip
    kernels = count_integer_kernels(graph.path, images(batch_size).numpy())
    assert kernels.fallen_back == ()
    assert kernels.num_integer == len(made.product_names)


def test_a_copy_keeps_its_own_ranges_and_modes():
    made = prepared()
    other = copy.deepcopy(made).eval()
    made.train().freeze_ranges(False)
    made(9 * images(8))
    assert other.ranges() != made.ranges()
    assert made.training
    assert not other.training


def test_rules_that_do_not_exist_or_do_nothing_are_refused():
    with pytest.raises(UnknownNameError, match="unknown int8 rules 'onnxruntime-arn'"):
        qat_prepare(student("vit"), image_size=SIDE, rules_name="onnxruntime-arn")
    names = prepared().product_names
    with pytest.raises(ExportError, match="no product that onnxruntime-x86-avx2 runs in int8"):
        qat_prepare(student("vit"), image_size=SIDE, rules_name=AVX2, keep_float=names)


def test_another_graph_is_not_taken_for_the_trained_one(tmp_path: Path):
    class Mixed(FakeQuantStudent):
        """Trained on, but the float student inside is an older one."""

        def deployed(self):
            return student("vit")

    made = prepared()
    train_a_little(made)
    made.__class__ = Mixed
    with pytest.raises(ExportError, match="lacks 14 of 14 products that were trained in int8"):
        export_onnx(
            made, tmp_path / "model.onnx", image_size=SIDE, parity_images=images(8).numpy(),
            metadata={}, spec=spec(AVX2),
        )  # fmt: skip


def test_embeddings_are_of_unit_length():
    found = module_embeds(prepared(), images(8).numpy())
    assert found.shape == (8, 24)
    assert QUANT_RULES[AVX2].name == prepared().rules_name


def test_it_runs_under_autocast():
    made = prepared()
    made.warm_up([images(8)])
    with torch.autocast("cpu", torch.bfloat16):
        found = made(images(4))
    with torch.no_grad():
        assert cosines(found.float(), made(images(4))).min() > 0.99


def test_gelus_are_trained_as_they_will_run(tmp_path):
    """The exported graph has the integer sigmoid where the trained one has its own."""
    made = prepared("hybrid", AVX2)
    named = [node.name for node in made.graph.graph.nodes if "sigmoid" in node.name]
    gelus = sum("gelu" in node.name for node in made.graph.graph.nodes)
    graph = export_onnx(
        made, tmp_path / "model.onnx", image_size=SIDE, parity_images=images(8).numpy(),
        metadata={}, spec=spec(AVX2),
    )  # fmt: skip
    assert graph.parity.min_cosine > 0.99999  # the same integers nearly everywhere
    assert graph.op_counts["Gelu"] == gelus > 0
    assert graph.op_counts["Sigmoid"] == len(named) > 4  # one is of squeeze and excitation
    other = prepared("hybrid", TENSORRT).graph.graph
    assert sum("gelu" in node.name for node in other.nodes) == gelus + 4


@pytest.mark.parametrize("rules_name", [AVX2, ARM, TENSORRT])
def test_a_quick_gelu_of_the_students_own_is_not_rounded(rules_name):
    args = {"patch_size": 8, "width": 32, "num_heads": 1, "depth": 2}
    counts = {}
    for act in ("gelu", "quick_gelu"):
        vit = build_student(vit_spec(image_size=SIDE, embed_dim=16, act=act, **args))
        made = qat_prepare(vit, image_size=SIDE, rules_name=rules_name)
        counts[act] = sum(isinstance(m, ActivationFakeQuant) for m in made.modules())
    assert counts["gelu"] == counts["quick_gelu"] > 4


class Headed(nn.Module):
    """A convolution and two linear layers of (B, C) with biases, which become Gemm."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, stride=2)
        self.second = nn.Conv2d(8, 32, 3, stride=2)
        self.hidden, self.last = nn.Linear(32, 48), nn.Linear(48, 16)

    def forward(self, image):
        maps = torch.relu(self.second(torch.relu(self.conv(image))))
        out = self.last(torch.relu(self.hidden(maps.mean(dim=(2, 3)))))
        return nn.functional.normalize(out, dim=-1)


def test_biases_of_gemm_are_rounded_as_they_are_added(tmp_path):
    torch.manual_seed(0)
    made = qat_prepare(Headed(), image_size=SIDE, rules_name=AVX2)
    made.warm_up([images(16)])
    rounded = [name for name, part in made.named_modules() if isinstance(part, BiasFakeQuant)]
    assert len(rounded) == 3  # all but the stem's, which stays float
    graph = export_onnx(
        made, tmp_path / "model.onnx", image_size=SIDE, parity_images=images(8).numpy(),
        metadata={}, spec=spec(AVX2),
    )  # fmt: skip
    assert graph.op_counts["Gemm"] == 2
    assert graph.parity.min_cosine > 0.999999


def test_a_copy_rounds_biases_by_its_own_steps():
    made = prepared("hybrid", AVX2)
    other = copy.deepcopy(made)
    for one in (made, other):
        parts = set(one.graph.modules())
        biases = [part for part in parts if isinstance(part, BiasFakeQuant)]
        assert len(biases) > 8
        assert all(parts.issuperset(bias._rounded) for bias in biases)
