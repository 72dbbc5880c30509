"""Operators of torch modules: known counts, merged branches, and modules left alone."""

from __future__ import annotations

from collections import Counter

import pytest
import timm
import torch
from torch import nn

from dimefm_edge.errors import InputError, UnknownNameError
from dimefm_edge.latency.operators import COST_NAMES, cost_vector, total_gmacs, total_params_m
from dimefm_edge.latency.trace import trace_classifier, trace_ops, trace_student, trace_timm
from dimefm_edge.students import build_student, hybrid_spec, vit_spec

VIT = vit_spec(image_size=32, embed_dim=16, patch_size=8, width=32, depth=2, num_heads=2)
HYBRID = hybrid_spec(image_size=32, embed_dim=16, width=8, depth=(1, 1, 1, 1))


@pytest.mark.parametrize(
    ("name", "gmacs", "params_m", "convolutions"),
    [  # timm's own counts, classifiers left out
        ("resnet50", 4.09, 23.51, 53),
        ("mobilenetv2_100", 0.30, 2.22, 52),
        ("vit_base_patch16_224", 17.56, 85.80, 1),
    ],
)
def test_counts_of_known_models(name, gmacs, params_m, convolutions):
    ops = trace_timm(name, 224)
    assert total_gmacs(ops) == pytest.approx(gmacs, rel=0.01)
    assert total_params_m(ops) == pytest.approx(params_m, rel=0.005)
    kinds = [op.kind for op in ops]
    assert sum(kind in ("conv", "depthwise", "grouped") for kind in kinds) == convolutions
    assert "batch_norm" not in kinds  # each follows a convolution, which takes it in


def test_a_classifier_is_traced_as_it_is_published():
    ops = trace_classifier("resnet18.a1_in1k", 160)
    assert total_params_m(ops) == pytest.approx(11.69, rel=0.001)  # torchvision's page
    assert ops[-1].kind == "linear"
    assert ops[-1].macs == 512 * 1000
    merged = trace_classifier("repvgg_a0", 64)
    assert sum(op.kind == "conv" for op in merged) == 22  # one a block, not three


def test_operators_that_are_free_alone_and_together():
    """A batch norm without a convolution costs; one after it, a ReLU, a factor, a clamp and a
    view do not."""

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm, self.conv = nn.BatchNorm2d(3), nn.Conv2d(3, 8, 3, groups=1, padding=1)
            self.after = nn.BatchNorm2d(8)

        def forward(self, image):
            features = torch.relu(self.after(self.conv(self.norm(image))))
            return (0.5 * features).clamp(max=3.0).flatten(1)

    ops = trace_ops(Net(), 8)
    assert [op.kind for op in ops] == ["batch_norm", "conv"]
    assert ops[1].macs == 8 * 8 * 8 * 27
    assert ops[1].padded_macs == 8 * 8 * 32 * 32 * 9
    assert sum(op.params for op in ops) == 6 + 3 * 8 * 9 + 8 + 16


def test_names_and_sizes_that_do_not_work_are_told():
    with pytest.raises(UnknownNameError, match="unknown timm model 'resnet51'"):
        trace_classifier("resnet51")
    with pytest.raises(InputError, match=r"vit_tiny_patch16_224 cannot be traced at 8 px"):
        trace_classifier("vit_tiny_patch16_224", 8)
    assert "beit_base_patch16_224" in timm.list_models()


def test_tracing_leaves_the_module_alone():
    student = build_student(VIT)
    student.trunk.blocks[0].eval()
    before = {k: v.clone() for k, v in student.state_dict().items()}
    flags = [m.training for m in student.modules()]
    ops = trace_ops(student, 32, 1)
    assert [m.training for m in student.modules()] == flags
    assert all(torch.equal(v, before[k]) for k, v in student.state_dict().items())
    assert all(p.device.type == "cpu" for p in student.parameters())
    assert tuple(ops) == trace_student(VIT)
    assert sum(op.params for op in ops) == sum(p.numel() for p in student.parameters())
    assert sum(op.kind in ("attention", "softmax") for op in ops) == 2


def test_branches_are_merged_before_tracing():
    student = build_student(HYBRID)
    keys = set(student.state_dict())
    ops = trace_ops(student, 32)
    assert [(o.macs, o.read) for o in ops] == [(o.macs, o.read) for o in trace_student(HYBRID)]
    assert set(student.state_dict()) == keys


@pytest.mark.parametrize("name", ["repvit_m0_9", "fastvit_t8", "levit_128s"])
def test_a_student_of_timm_is_traced_with_its_branches_merged(name):
    """As its classifier is, whose merged form the published latencies were fitted with."""
    image_size = 224
    student, classifier = (
        Counter(op.kind for op in ops)
        for ops in (trace_timm(name, image_size), trace_classifier(name, image_size))
    )
    assert student["conv"] + student["depthwise"] == classifier["conv"] + classifier["depthwise"]
    assert student["batch_norm"] <= classifier["batch_norm"]


def test_arithmetic_grows_with_the_batch():
    one, three = (cost_vector(trace_student(HYBRID, batch)) for batch in (1, 3))
    for name, a, b in zip(COST_NAMES, one, three, strict=True):
        if name.endswith("_move"):  # torch copies where batches are no longer contiguous
            continue
        is_shared = name == "weights" or name.startswith(("kernels", "calls"))
        assert b == pytest.approx(a if is_shared else 3 * a), name
