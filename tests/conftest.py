"""What every test shares."""

from __future__ import annotations

import functools
import sys

import pytest


@pytest.fixture(autouse=True)
def _operators_of_torch_are_listed_once() -> None:
    """torch's exporter lists its 500 operators anew for each graph: a quarter of the time."""
    found = sys.modules.get("torch.onnx._internal.exporter._registration")
    if found is not None and not hasattr(found.onnxscript_apis.get_torchlib_ops, "cache_info"):
        listed = functools.cache(found.onnxscript_apis.get_torchlib_ops)
        found.onnxscript_apis.get_torchlib_ops = listed
