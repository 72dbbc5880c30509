"""What every test shares."""

from __future__ import annotations

import copy
import functools
import sys
from typing import Any

import pytest


@pytest.fixture(autouse=True)
def _torchs_operators_are_listed_once() -> None:
    """torch's exporter lists its 500 operators anew for each graph, which takes half of the time
    that a small graph takes. Each graph gets its own copy of one list: it adds to it."""
    found = sys.modules.get("torch.onnx._internal.exporter._registration")
    if found is None or hasattr(found.ONNXRegistry.from_torchlib, "lists"):
        return
    lists = functools.cache(found.ONNXRegistry.from_torchlib)

    def from_torchlib(**settings: Any) -> Any:
        registry = copy.copy(lists(**settings))
        registry.functions = {name: list(made) for name, made in registry.functions.items()}
        return registry

    from_torchlib.lists = lists  # type: ignore[attr-defined]
    found.ONNXRegistry.from_torchlib = staticmethod(from_torchlib)
