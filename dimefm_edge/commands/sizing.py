"""How big and how quick models are, for `eval`: from files, reports of runs, or a clock."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dimefm_edge.errors import DimeFMError, InputError

if TYPE_CHECKING:
    from dimefm_edge.subjects import Subject

_REPORT_FILE = "report.json"
_SECONDS = 3.0


@dataclass(frozen=True)
class ModelSize:
    """Parameters and latency of one image tower."""

    params_m: float | None
    latency_ms: float | None
    """p50 of one image."""


def count_params(subject: Subject) -> float | None:
    """Millions of parameters; None where the file cannot say, as without the onnx package."""
    if subject.params_m is not None:
        return subject.params_m
    from dimefm_edge.latency.onnx_costs import onnx_ops
    from dimefm_edge.latency.operators import total_params_m

    path = getattr(subject.owner, "model_path", Path(subject.name).expanduser())
    try:
        return total_params_m(onnx_ops(path, image_size=subject.preprocess.image_size))
    except DimeFMError:
        return None


def reported_latencies(
    names: Sequence[str], *, estimated: bool = False
) -> tuple[str, dict[str, float]]:
    """What the runs' reports say of runs, their bundles, and the teacher that they name.

    Args:
        names: Subjects as the user typed them.
        estimated: The estimate for the run's target, rather than what was measured.

    Returns:
        The machine that the times were taken on, or the target, and ms of one image by name.

    Raises:
        InputError: If a model has no report, or two are of different machines or targets.
    """
    reports = [report for name in names if (report := _report_beside(name)) is not None]
    found: dict[str, float] = {}
    machines: set[str] = set()
    for name in names:
        own = _report_beside(name)
        side, report = ("student", own) if own else ("teacher", _report_of_teacher(name, reports))
        if report is None:
            raise InputError(
                f"no report says how quick {name} is", hint="--latency measured times it here"
            )
        found[name] = float(report[side]["target_ms" if estimated else "here_p50_ms"])
        machines.add(f"{report['target']}, estimated" if estimated else report["machine"]["cpu"])
    if len(machines) != 1:
        raise InputError(
            f"the reports are of different places ({', '.join(sorted(machines))})",
            hint="--latency measured times all models here",
        )
    return machines.pop(), found


def measure_latencies(names: Sequence[str], *, engine: str) -> tuple[str, dict[str, float]]:
    """Time one image here, the models in turn.

    Returns:
        This machine, and p50 in ms by name; models that could not be timed are left out.

    Raises:
        DimeFMError: If none could be.
    """
    from dimefm_edge.bench import bench_models
    from dimefm_edge.bench_config import BenchConfig

    config = BenchConfig(models=tuple(names), engine=engine, seconds=_SECONDS, restarts=1)
    with tempfile.TemporaryDirectory(prefix="dimefm_edge_eval_") as folder:
        result = bench_models(config, Path(folder))
    found = {
        name: subject.p50_ms
        for name, subject in zip(names, result.subjects, strict=True)
        if subject.p50_ms is not None
    }
    return str(result.machine["cpu"]), found


def find_latencies(
    names: Sequence[str], choice: str, *, engine: str
) -> tuple[str, dict[str, float]]:
    """Latencies as `--latency` asks; auto: as reported, else measured."""
    if choice == "none":
        return "", {}
    if choice == "estimated":
        return reported_latencies(names, estimated=True)
    if choice in ("auto", "reported"):
        try:
            return reported_latencies(names)
        except InputError:
            if choice == "reported":
                raise
    return measure_latencies(names, engine=engine)


def _report_beside(name: str) -> Mapping[str, Any] | None:
    """The report of the run that this is, or whose bundle it is."""
    path = Path(name).expanduser()
    if path.is_dir() and (report := _read(path / _REPORT_FILE)) is not None:
        return report
    report = _read(path.parent / _REPORT_FILE) if path.name else None
    # Its figures are of one bundle: not of another that was exported into the same run.
    is_its_bundle = report is not None and Path(str(report.get("bundle"))).name == path.name
    return report if is_its_bundle else None


def _report_of_teacher(name: str, reports: Sequence[Mapping[str, Any]]) -> Mapping[str, Any] | None:
    return next((r for r in reports if r["teacher"].get("name") == name), None)


def _read(path: Path) -> Mapping[str, Any] | None:
    """A run's report, if it is one."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        is_report = isinstance(values["machine"]["cpu"], str) and isinstance(values["target"], str)
        for side in ("teacher", "student"):
            float(values[side]["here_p50_ms"]), float(values[side]["target_ms"])
    except (OSError, ValueError, LookupError, TypeError):
        return None
    return values if is_report else None
