"""Counts from shallow students are those of a trace."""

from __future__ import annotations

import pytest

from dimefm_edge.latency.operators import (
    cost_vector,
    memory_elements,
    total_gmacs,
    total_params_m,
)
from dimefm_edge.latency.student_counts import count_student
from dimefm_edge.latency.trace import trace_student
from dimefm_edge.students import student_spec


@pytest.mark.parametrize(
    "name",
    ["vit-p8-w64-d1", "vit-p8-w64-d2", "vit-p8-w64-d7", "hybrid-w16-d1.1.1.1",
     "hybrid-w24-d3.2.5.1", "convnet-w16-d1.1.1.1", "convnet-w40-d1.3.2.4", "timm:resnet10t"],
)  # fmt: skip
def test_counts_are_those_of_a_trace(name):
    spec = student_spec(name, image_size=64, embed_dim=32)
    counts, ops = count_student(spec), trace_student(spec)
    assert counts.costs == pytest.approx(cost_vector(ops), abs=1e-9)
    assert counts.gmacs == pytest.approx(total_gmacs(ops))
    assert counts.params_m == pytest.approx(total_params_m(ops))
    assert counts.memory_elements == pytest.approx(memory_elements(ops), rel=0.02)
