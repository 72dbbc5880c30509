"""Append a benchmark's JSON to results.csv: one row a figure, with machine, versions, commit.

    python benchmarks/bench_store.py --json | python benchmarks/record.py store

A figure that is there already for the same benchmark and machine is replaced.
"""

from __future__ import annotations

import argparse
import csv
import datetime
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from dimefm_edge.latency.measure import machine_info

RESULTS = Path(__file__).with_name("results.csv")
FIELDS = ("benchmark", "figure", "value", "machine", "versions", "commit", "date")
_VERSIONS = ("python", "torch", "onnxruntime", "timm", "open_clip_torch", "numpy")


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


def record(benchmark: str, values: dict[str, Any], path: Path = RESULTS) -> int:
    """Write the figures of one benchmark run; returns how many."""
    info = machine_info()
    machine = f"{info.get('cpu', 'unknown CPU')}, {info['cores_available']} cores"
    versions = {**info, **info.get("versions", {})}
    shared = {
        "benchmark": benchmark,
        "machine": machine,
        "versions": " ".join(f"{k}={versions[k]}" for k in _VERSIONS if versions.get(k)),
        "commit": str(info.get("commit", "")),
        "date": datetime.date.today().isoformat(),
    }
    rows: list[dict[str, str]] = []
    if path.is_file():
        with path.open(newline="") as stream:
            rows = list(csv.DictReader(stream))
    new = [{**shared, "figure": name, "value": value} for name, value in figures(values)]
    kept = [r for r in rows if (r["benchmark"], r["machine"]) != (benchmark, machine)]
    with path.open("w", newline="") as stream:
        writer = csv.DictWriter(stream, FIELDS)
        writer.writeheader()
        writer.writerows(kept + new)
    return len(new)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("benchmark")
    args = parser.parse_args()
    count = record(args.benchmark, json.load(sys.stdin))
    print(f"{count} figures of {args.benchmark} in {RESULTS}", file=sys.stderr)


if __name__ == "__main__":
    main()
