"""What a bench found: plain dataclasses, JSON and CSV."""

from __future__ import annotations

import csv
import io
import json
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

from dimefm_edge.errors import InputError
from dimefm_edge.files import atomic_file

FORMAT = 1
"""Raised when the JSON changes so that older readers would go wrong."""

State = Literal["measured", "partial", "failed"]


@dataclass
class SubjectResult:
    """One model; what was not measured is None or empty."""

    label: str
    runtime: str = ""
    state: State = "partial"
    """measured; partial: stopped or ended halfway, with what there was; failed: nothing."""
    error: str | None = None
    hint: str | None = None
    notes: list[str] = field(default_factory=list)
    batch_size: int = 1
    threads: int = 1
    image_size: int | None = None
    runs: int = 0
    """Timed calls."""
    rounds_ms: list[float] = field(default_factory=list)
    """(R,) median call of each round."""
    quantiles_ms: list[float] = field(default_factory=list)
    """The 0, 0.5, ... 100% quantiles of all calls."""
    p50_ms: float | None = None
    p90_ms: float | None = None
    p95_ms: float | None = None
    p99_ms: float | None = None
    p999_ms: float | None = None
    mean_ms: float | None = None
    images_per_s: float | None = None
    """batch_size over the mean."""
    ratio: float | None = None
    """Median over rounds of its time over the first model's in the same round."""
    ratio_low: float | None = None
    """Of the ratio's 95% interval."""
    ratio_high: float | None = None
    warmup_runs: int = 0
    is_steady: bool = False
    """Whether warming up ended because the times had settled."""
    load_ms: float | None = None
    """From the file to a model that can be called."""
    first_ms: float | None = None
    """The first call."""
    time_to_first_ms: float | None = None
    """From the start of the process, Python's imports too, to the first answer."""
    peak_rss_mib: float | None = None
    """Of the whole process, as /usr/bin/time tells it."""
    memory_mib: float | None = None
    """Of it, what the model adds to a process that has imported its runtime."""
    gpu_memory_mib: float | None = None
    size_mib: float | None = None
    """Of the model's file."""
    params_m: float | None = None
    gmacs: float | None = None
    """Multiply-adds of a call in billions."""
    moved_mib: float | None = None
    """Weights and activations that a call reads and writes at least once, in 4 bytes each."""
    power_w: float | None = None
    energy_mj_per_image: float | None = None
    top1_pct: dict[str, float] = field(default_factory=dict)
    """Zero-shot accuracy by test set."""
    stages_ms: dict[str, float] = field(default_factory=dict)
    """Medians from an image file to labels, by stage."""
    end_to_end: dict[str, float] = field(default_factory=dict)
    """Percentiles, images_per_s, ratio, ratio_low and ratio_high of files to labels."""
    scenarios: list[dict[str, Any]] = field(default_factory=list)
    """Of MLPerf LoadGen."""
    operators: dict[str, Any] = field(default_factory=dict)
    """Shares by kind and the slowest nodes."""


@dataclass
class BenchResult:
    """All models of one bench."""

    subjects: list[SubjectResult]
    machine: dict[str, Any]
    config: dict[str, Any]
    state: Literal["complete", "stopped"] = "stopped"
    notes: list[str] = field(default_factory=list)
    """What could not be read, and why."""
    peak_gflop_per_s: float | None = None
    """Measured: a float32 product, see `machine.gemm`."""
    copy_gb_per_s: float | None = None
    """Measured: bytes read and written by a copy of a large array."""
    starts: list[int] = field(default_factory=list)
    """Rounds at which the models' processes were started anew, besides the first."""
    yardstick_ms: list[float] = field(default_factory=list)
    """(R,) the same product in each round: how fast the machine itself was."""
    throttled: list[str] = field(default_factory=list)
    trace: list[dict[str, Any]] = field(default_factory=list)
    """Power, temperature and clock over time."""

    def to_dict(self) -> dict[str, Any]:
        return {"format": FORMAT, **asdict(self)}


def write_json(result: BenchResult, path: Path) -> None:
    """Whole or not at all."""
    with atomic_file(path) as stream:
        stream.write(json.dumps(result.to_dict(), indent=1, allow_nan=False, default=str).encode())


def load_json(path: Path) -> BenchResult:
    """Read what `write_json` wrote, or what `bench --json` printed.

    Raises:
        InputError: If the file is missing, or no such JSON.
    """
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}", hint="check the path") from error
    except ValueError as error:
        raise InputError(f"{path} is not JSON: {error}", hint="a bench.json of --out") from error
    hint = "dimefm-edge bench MODEL ... --out FOLDER writes bench.json"
    if not isinstance(values, dict) or values.get("format") != FORMAT:
        raise InputError(f"{path} is not the result of a bench of this version", hint=hint)
    try:
        subjects = [
            SubjectResult(**_known(SubjectResult, entry)) for entry in values.pop("subjects")
        ]
        return BenchResult(subjects=subjects, **_known(BenchResult, values))
    except (TypeError, KeyError, AttributeError) as error:
        raise InputError(f"{path} is not the result of a bench: {error}", hint=hint) from error


def to_csv(result: BenchResult) -> str:
    """One line per model: every figure, then machine, versions and commit."""
    lists = {"rounds_ms", "quantiles_ms", "scenarios", "operators", "notes"}
    machine = result.machine
    rows = []
    for subject in result.subjects:
        row: dict[str, Any] = {}
        for key, value in asdict(subject).items():
            if key in lists:
                continue
            if isinstance(value, dict):
                row |= {f"{key}.{inner}": v for inner, v in value.items()}
            else:
                row[key] = value
        row |= {
            f"{s['scenario']}.{key}": s.get(key)
            for s in subject.scenarios
            for key in ("p90_ms", "p99_ms", "samples_per_s", "is_valid")
        }
        row |= {
            "seconds": result.config.get("seconds"), "seed": result.config.get("seed"),
            "device": machine.get("cpu"), "cores": machine.get("cores_available"),
            "os": machine.get("os"), "load_1min": machine.get("load_1min"),
            "throttled": "; ".join(result.throttled), "commit": machine.get("commit"),
            **machine.get("versions", {}),
        }  # fmt: skip
        rows.append(row)
    columns = list(dict.fromkeys(key for row in rows for key in row))
    stream = io.StringIO()
    writer = csv.DictWriter(stream, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return stream.getvalue()


def _known(kind: type, values: dict[str, Any]) -> dict[str, Any]:
    names = {f.name for f in fields(kind)}
    return {key: value for key, value in values.items() if key in names}
