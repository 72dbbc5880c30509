"""What a runtime wants of a graph, and what contradicts it."""

from __future__ import annotations

import pytest

from dimefm_edge.errors import DimeFMError, ExportError, UnknownNameError
from dimefm_edge.export.graph_spec import GraphSpec, graph_spec
from dimefm_edge.targets import load_target


@pytest.mark.parametrize(
    ("target", "opset", "attention", "providers"),
    [
        ("jetson-orin", 20, "packed", ("tensorrt", "cuda", "cpu")),
        ("raspberry-pi-5", 20, "MultiHeadAttention", ("cpu",)),
        (None, 20, "MultiHeadAttention", ("cpu",)),
    ],
)
def test_the_target_chooses(target, opset, attention, providers):
    spec = graph_spec(None if target is None else load_target(target))
    assert (spec.opset, spec.attention, spec.providers) == (opset, attention, providers)
    assert spec.batch_size is None


def test_what_is_asked_for_wins():
    spec = graph_spec(None, attention="Attention", batch_size=4, image_input="uint8")
    assert (spec.opset, spec.batch_size, spec.image_input) == (23, 4, "uint8")
    assert spec.to_dict()["attention"] == "Attention"


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"precision": "fp61"}, UnknownNameError, "mean 'fp16'.* Known: fp16, fp32, fp8, int8"),
        ({"opset": 17}, ExportError, r"opset 17 is not one of 18, 19, .*\n  try: leave it out"),
        ({"runtime": "onnxruntim"}, UnknownNameError, "unknown runtime .* mean 'onnxruntime'"),
        ({"attention": "Attention"}, UnknownNameError, "attention form for tensorrt 'Attention'"),
        (
            {"runtime": "onnxruntime", "attention": "Attention"},
            ExportError,
            r"opset 20 has no Attention operator: it came with 23\n  try: --opset 23",
        ),
        ({"batch_size": 0}, ExportError, "batch size must be positive, got 0"),
    ],
)
def test_contradictions(change: dict[str, object], error: type[DimeFMError], message: str):
    with pytest.raises(error, match=message):
        GraphSpec(**change)
