"""Which layers are handed down, and to whom."""

from __future__ import annotations

import pytest

from dimefm_edge.students.heirs import inherited_layers, is_heir, layers_share

TEACHER = {
    "patch_size": 16, "width": 768, "num_heads": 12, "mlp_ratio": 4.0, "act": "gelu", "depth": 12
}  # fmt: skip


@pytest.mark.parametrize(
    ("changes", "inherits"),
    [
        ({}, True),
        ({"depth": 2}, True),
        ({"width": 384, "num_heads": 6}, True),
        ({"width": 384, "num_heads": 12}, False),  # other heads
        ({"width": 832, "num_heads": 13}, False),
        ({"depth": 13}, False),
        ({"patch_size": 8}, False),
        ({"mlp_ratio": 3.0}, False),
        ({"mlp_ratio": 4.0 - 0.9 / 768}, True),  # less than a hidden unit
        ({"act": "quick_gelu"}, False),
    ],
)
def test_heirs_are_alike_and_no_larger(changes, inherits):
    assert is_heir(TEACHER | changes, TEACHER) == inherits


@pytest.mark.parametrize(
    ("student", "teacher", "layers"),
    [
        (1, 8, [7]),
        (2, 8, [0, 7]),
        (3, 8, [0, 4, 7]),
        (8, 8, list(range(8))),
        (4, 12, [0, 4, 7, 11]),
    ],
)
def test_inherited_layers(student, teacher, layers):
    assert inherited_layers(student, teacher) == layers


def test_the_share_of_layers_is_of_vits():
    assert layers_share(TEACHER | {"depth": 3}, TEACHER) == 0.25
    assert layers_share(TEACHER, None) is None
    assert layers_share({"width": 16, "depth": (1, 1, 2, 1)}, TEACHER) is None
    assert layers_share({"model": "resnet18"}, TEACHER) is None
