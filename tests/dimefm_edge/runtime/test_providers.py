"""Execution providers: the target's that are there, and no silent fall back to the CPU."""

from __future__ import annotations

import pytest

from dimefm_edge.errors import DimeFMError, MissingExtraError, UnknownNameError
from dimefm_edge.runtime.providers import (
    PROVIDERS,
    check_started,
    choose_providers,
    session_providers,
)

CPU, CUDA = "CPUExecutionProvider", "CUDAExecutionProvider"
JETSON = ("tensorrt", "cuda", "cpu")


def test_names_are_onnx_runtimes_own():
    import onnxruntime

    assert {p.ort_name for p in PROVIDERS.values()} <= set(onnxruntime.get_all_providers())


@pytest.mark.parametrize(
    ("wanted", "available", "asked", "chosen"),
    [
        (JETSON, [CPU], "auto", ["cpu"]),
        (JETSON, [CUDA, CPU], "auto", ["cuda", "cpu"]),
        (JETSON, ["TensorrtExecutionProvider", CUDA, CPU], "auto", ["tensorrt", "cuda", "cpu"]),
        (JETSON, ["TensorrtExecutionProvider", CUDA, CPU], "cuda", ["cuda", "cpu"]),
        (JETSON, [CUDA, CPU], "cpu", ["cpu"]),
        (("of another release",), [CUDA, CPU], "auto", ["cpu"]),
        ((), [CUDA, CPU], "auto", ["cpu"]),
    ],
)
def test_the_preferred_ones_that_are_there(wanted, available, asked, chosen):
    assert choose_providers(wanted, available, asked=asked) == chosen


def test_tensorrt_gets_the_graphs_precision():
    (tensorrt, cpu) = session_providers(["tensorrt", "cpu"], precision="fp32")
    assert tensorrt[1]["trt_fp16_enable"] == "0"
    assert session_providers(["tensorrt"], precision="fp16")[0][1]["trt_fp16_enable"] == "1"
    assert cpu == CPU


def test_missing_ones_and_those_that_do_not_start(caplog: pytest.LogCaptureFixture):
    with pytest.raises(MissingExtraError, match=r"no CUDAExecutionProvider.*\n  try: pip install"):
        choose_providers(JETSON, [CPU], asked="cuda")
    with pytest.raises(UnknownNameError, match=r"unknown execution provider 'cud'\. Did you"):
        choose_providers(JETSON, [CPU], asked="cud")
    assert check_started(["cuda", "cpu"], [CUDA, CPU], asked="cuda") == "cuda"
    with pytest.raises(DimeFMError, match=r"did not start; .* on the cpu provider\n  try: dimefm"):
        check_started(["cuda", "cpu"], [CPU], asked="cuda")
    assert check_started(["cuda", "cpu"], [CPU], asked="auto") == "cpu"
    assert "CUDAExecutionProvider did not start" in caplog.text
