"""What `fit` ranks by: more arithmetic is better, and convolutions and inheritance count more."""

from __future__ import annotations

import pytest

from dimefm_edge.latency.operators import cost_vector
from dimefm_edge.latency.trace import trace_student
from dimefm_edge.student_score import is_convolutional, learns_quickly, student_score
from dimefm_edge.students import student_spec

WAYS = [
    {"inherits": inherits, "is_convolutional": convolutional}
    for inherits in (False, True)
    for convolutional in (False, True)
]


@pytest.mark.parametrize("way", WAYS)
def test_more_arithmetic_is_better(way):
    assert 0 < student_score(0.1, **way) < student_score(0.2, **way)


def test_weights_that_are_inherited_and_convolutions_count_more():
    vit, conv, heir, conv_heir = (student_score(1.0, **way) for way in WAYS)
    assert vit < conv < conv_heir
    assert vit < heir


def test_an_heir_counts_by_its_share_of_the_layers():
    way = {"inherits": True, "is_convolutional": False}
    half, whole = (student_score(1.0, **way, layers=share) for share in (0.5, 1.0))
    assert whole == 2 * half
    assert student_score(1.0, **way) == half  # where it is not known
    other = {"inherits": False, "is_convolutional": False}
    assert student_score(1.0, **other, layers=1.0) == student_score(1.0, **other)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("vit-p32-w64-d2", False),
        ("vit-p8-w64-d2", False),
        ("vit-p16-w192-d6", False),
        ("hybrid-w16-d1.1.1.1", True),
        ("convnet-w32-d1.1.2.1", True),
        ("timm:resnet10t", True),
        ("timm:mobilenetv3_small_050", True),
        ("timm:convnext_tiny", True),
        ("timm:vit_tiny_patch16_224", False),
        ("timm:mixer_s32_224", False),
        ("timm:levit_128s", False),
    ],
)
def test_convolutional_is_what_looks_at_images_so(name, expected):
    spec = student_spec(name, image_size=224, embed_dim=64)
    assert is_convolutional(cost_vector(trace_student(spec))) is expected


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("convnet-w32-d1.1.2.1", True),
        ("hybrid-nano", True),
        ("timm:resnet10t", True),
        ("timm:fastvit_t8", True),
        ("timm:mobilenetv4_conv_small", False),
        ("timm:regnetx_004", False),
    ],
)
def test_resnets_and_fastvits_count_more_than_timms_other_convolutions(name, expected):
    spec = student_spec(name, image_size=64, embed_dim=64)
    assert learns_quickly(spec) is expected
    way = {"inherits": False, "is_convolutional": True}
    vit = student_score(1.0, inherits=False, is_convolutional=False)
    score = student_score(1.0, **way, learns_quickly=learns_quickly(spec))
    assert vit < score
    assert (score == student_score(1.0, **way)) is expected
