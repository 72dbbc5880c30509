"""Zero-shot accuracy beside the times: `dimefm-edge eval`, in a process of its own."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence

from dimefm_edge.bench.processes import worker_environment
from dimefm_edge.bench.specs import SubjectSpec
from dimefm_edge.errors import DimeFMError

_SAME_ANSWERS = ("onnxruntime", "plain", "openvino", "eager", "compile")
"""Runtimes that compute a model's own numbers, up to rounding."""


def zero_shot_top1(spec: SubjectSpec, data: Sequence[str], *, limit_s: float) -> dict[str, float]:
    """Top-1 in percent by labelled set.

    Raises:
        DimeFMError: If `eval` cannot tell: what it said, or that the time was up.
    """
    if spec.kind == "bundle" and spec.runtime not in ("openvino", "dynamic-int8"):
        engine = ["--engine", spec.runtime]
    elif spec.runtime.partition(":")[0] in _SAME_ANSWERS:
        engine = []
    else:
        raise DimeFMError(f"accuracy: eval does not run {spec.runtime}")
    command = [
        sys.executable, "-m", "dimefm_edge", "eval", spec.name, "--json", *engine, "--data", *data
    ]  # fmt: skip
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=limit_s, env=worker_environment(0),
            check=False,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        raise DimeFMError(f"accuracy: eval took longer than {limit_s:.0f} s") from None
    try:
        answer = json.loads(done.stdout)
        if "error" in answer:
            raise DimeFMError(f"accuracy: {answer['error']}", hint=answer.get("hint"))
        return {row["name"]: float(row["top1_pct"]) for row in answer["results"]}
    except (ValueError, KeyError, TypeError) as error:
        said = done.stderr.strip().splitlines()
        raise DimeFMError(f"accuracy: {said[-1] if said else 'eval said nothing'}") from error
