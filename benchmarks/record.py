"""Put a benchmark's JSON into results/NAME.csv, a row a figure; runs.csv says where and with what.

    python benchmarks/bench_store.py --json | python benchmarks/record.py store
    python benchmarks/record.py attention_gpu --machine "NVIDIA H200" --versions "torch=2.11.0" \
        --commit 6430dfa < gpu_attention.json

A figure's `run` is a row of runs.csv: machine, versions, commit, date. Figures that are there
already for the same benchmark and machine are replaced. What was measured elsewhere says where.
"""

from __future__ import annotations

import argparse
import csv
import datetime
import hashlib
import json
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from dimefm_edge.latency.measure import machine_info

RESULTS = Path(__file__).with_name("results")
FIELDS = ("figure", "value", "run")
RUN_FIELDS = ("run", "machine", "versions", "commit", "date")
_VERSIONS = ("python", "torch", "onnxruntime", "timm", "open_clip_torch", "numpy")


@dataclass(frozen=True)
class Run:
    """Where figures come from."""

    machine: str
    versions: str
    commit: str
    date: str

    @property
    def key(self) -> str:
        """8 hex digits."""
        return hashlib.sha256(json.dumps(asdict(self)).encode()).hexdigest()[:8]

    @classmethod
    def here(cls) -> Run:
        """This machine, these packages, this checkout, today."""
        info = machine_info()
        versions = {**info, **info.get("versions", {})}
        return cls(
            machine=f"{info.get('cpu', 'unknown CPU')}, {info['cores_available']} cores",
            versions=" ".join(f"{k}={versions[k]}" for k in _VERSIONS if versions.get(k)),
            commit=str(info.get("commit", "")),
            date=datetime.date.today().isoformat(),
        )


def figures(value: Any, prefix: str = "") -> Iterator[tuple[str, str]]:
    """Every number and short text of nested JSON, named by its path."""
    if isinstance(value, dict):
        for key, inner in value.items():
            if key != "machine":
                yield from figures(inner, f"{prefix}.{key}" if prefix else str(key))
    elif isinstance(value, list):
        for index, inner in enumerate(value):
            name = inner.get("name", index) if isinstance(inner, dict) else index
            yield from figures(inner, f"{prefix}.{name}")
    elif isinstance(value, float):
        yield prefix, f"{value:.6g}"
    elif isinstance(value, int | str):
        yield prefix, str(value)


def record(
    benchmark: str, values: dict[str, Any], folder: Path = RESULTS, run: Run | None = None
) -> int:
    """Write the figures of one benchmark run; returns how many."""
    run = run or Run.here()
    path, runs_path = folder / f"{benchmark}.csv", folder.with_name("runs.csv")
    runs = {row["run"]: row for row in _read(runs_path)}
    runs[run.key] = {"run": run.key, **asdict(run)}
    rows = [row for row in _read(path) if runs[row["run"]]["machine"] != run.machine]
    new = [{"figure": name, "value": value, "run": run.key} for name, value in figures(values)]
    _write(path, FIELDS, rows + new)
    used = {row["run"] for file in folder.glob("*.csv") for row in _read(file)}
    _write(runs_path, RUN_FIELDS, [row for key, row in runs.items() if key in used])
    return len(new)


def _read(path: Path) -> list[dict[str, str]]:
    if not path.is_file():
        return []
    with path.open(newline="") as stream:
        return list(csv.DictReader(stream))


def _write(path: Path, fields: tuple[str, ...], rows: list[dict[str, str]]) -> None:
    path.parent.mkdir(exist_ok=True)
    with path.open("w", newline="") as stream:
        writer = csv.DictWriter(stream, fields, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("benchmark")
    for name in asdict(here := Run.here()):
        parser.add_argument(f"--{name}", default=getattr(here, name), help="default: this one's")
    given = vars(parser.parse_args())
    benchmark = given.pop("benchmark")
    count = record(benchmark, json.load(sys.stdin), run=Run(**given))
    print(f"{count} figures in {RESULTS / benchmark}.csv", file=sys.stderr)


if __name__ == "__main__":
    main()
