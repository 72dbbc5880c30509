"""Distil a big CLIP-like model into a small one that fits an edge device.

    from dimefm_edge import RunConfig, run
    report = run(RunConfig(target="jetson-orin", out="runs/first"))

Names load when they are first used: importing the package imports neither torch nor a runtime.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dimefm_edge.config import RunConfig as RunConfig
    from dimefm_edge.errors import DimeFMError as DimeFMError
    from dimefm_edge.evaluate.zero_shot import evaluate_zero_shot as evaluate_zero_shot
    from dimefm_edge.export import export_student as export_student
    from dimefm_edge.fit import fit_student as fit_student
    from dimefm_edge.latency.estimate import estimate_latency as estimate_latency
    from dimefm_edge.latency.measure import measure_latency as measure_latency
    from dimefm_edge.pipeline import run as run
    from dimefm_edge.preprocess import PreprocessSpec as PreprocessSpec
    from dimefm_edge.report import RunReport as RunReport
    from dimefm_edge.runtime import ZeroShotClassifier as ZeroShotClassifier
    from dimefm_edge.runtime import load_bundle as load_bundle
    from dimefm_edge.students import StudentSpec as StudentSpec
    from dimefm_edge.students import build_student as build_student
    from dimefm_edge.students import load_student as load_student
    from dimefm_edge.subjects import load_subject as load_subject
    from dimefm_edge.targets import list_targets as list_targets
    from dimefm_edge.targets import load_target as load_target
    from dimefm_edge.teacher import load_teacher as load_teacher

_MODULES = {
    "DimeFMError": "errors",
    "PreprocessSpec": "preprocess",
    "RunConfig": "config",
    "RunReport": "report",
    "StudentSpec": "students",
    "ZeroShotClassifier": "runtime",
    "build_student": "students",
    "estimate_latency": "latency.estimate",
    "evaluate_zero_shot": "evaluate.zero_shot",
    "export_student": "export",
    "fit_student": "fit",
    "list_targets": "targets",
    "load_bundle": "runtime",
    "load_student": "students",
    "load_subject": "subjects",
    "load_target": "targets",
    "load_teacher": "teacher",
    "measure_latency": "latency.measure",
    "run": "pipeline",
}

__all__ = ["__version__", *_MODULES]


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from importlib.metadata import PackageNotFoundError, version

        try:
            return version("dimefm_edge")
        except PackageNotFoundError:  # a bare checkout
            return "0+unknown"
    if name in _MODULES:
        value = getattr(importlib.import_module(f"{__name__}.{_MODULES[name]}"), name)
        globals()[name] = value
        return value
    raise AttributeError(f"module '{__name__}' has no attribute '{name}'")


def __dir__() -> list[str]:
    return sorted(__all__)
