"""Commands that time models here: bench, bench compare."""

from __future__ import annotations

import json
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from dimefm_edge.commands.outcome import Outcome
from dimefm_edge.errors import InputError, MissingExtraError
from dimefm_edge.files import atomic_file, make_out_folder
from dimefm_edge.tables import Cell, format_table

if TYPE_CHECKING:
    from dimefm_edge.bench.results import BenchResult, SubjectResult
    from dimefm_edge.options import BenchOptions, CompareOptions

_FAILED, _OVER, _STOPPED = 1, 3, 130
_JSON, _CSV, _HTML = "bench.json", "bench.csv", "report.html"


def run_bench(options: BenchOptions) -> Outcome:
    """Time models side by side."""
    from dimefm_edge.bench import bench_models
    from dimefm_edge.bench.results import write_json

    out = options.out
    if out is not None:
        make_out_folder(out)
    with tempfile.TemporaryDirectory(prefix="dimefm_edge_bench_") as folder:
        result = bench_models(
            options,
            Path(folder),
            save=None if out is None else lambda partial: write_json(partial, out / _JSON),
        )
    text = _describe(result)
    if out is not None:
        text += f"\n\n{_write(result, out)}"
    code = _FAILED if any(s.error for s in result.subjects) else 0
    values = json.loads(json.dumps(result.to_dict(), default=str))
    return Outcome(values, text, _STOPPED if result.state == "stopped" else code)


def run_compare(options: CompareOptions) -> Outcome:
    """Hold a new bench against an old one."""
    from dimefm_edge.bench.compare import compare, left_out
    from dimefm_edge.bench.results import load_json

    if len(options.results) != 2:
        raise InputError(
            f"compare takes two results, got {len(options.results)}",
            hint="dimefm-edge bench compare old/bench.json new/bench.json",
        )
    old, new = map(load_json, options.results)
    found = compare(old, new, threshold_pct=options.threshold_pct)
    rows = [
        (
            c.label, c.old_ms, c.new_ms, c.raw.value, c.ratio.value, c.ratio.low, c.ratio.high,
            "slower" if c.is_slower else "",
        )
        for c in found
    ]  # fmt: skip
    headers = ("model", "old ms", "new ms", "ratio", "without drift", "95% from", "to", "")
    text = (
        f"{format_table(headers, rows)}\n\nratio: new median over old; without drift: each round "
        "divided by the machine's own speed in it\nslower: more than "
        f"{options.threshold_pct:g}% without drift, and the interval leaves out 1"
    )
    missing = left_out(old, new)
    text += "".join(f"\nnot compared: {m.label}, {m.reason}" for m in missing)
    is_slower = any(c.is_slower for c in found)
    values = {
        "is_slower": is_slower,
        "models": [c.to_dict() for c in found],
        "left_out": [asdict(m) for m in missing],
    }
    return Outcome(values, text, _OVER if is_slower else 0)


def _write(result: BenchResult, out: Path) -> str:
    """All three files; the report needs matplotlib, the others nothing."""
    from dimefm_edge.bench.html import report_html
    from dimefm_edge.bench.results import to_csv, write_json

    write_json(result, out / _JSON)
    with atomic_file(out / _CSV) as stream:
        stream.write(to_csv(result).encode())
    try:
        page = report_html(result)
    except MissingExtraError as error:
        return f"{out / _JSON} and {_CSV}; no {_HTML}: {error.args[0]}  ({error.hint})"
    with atomic_file(out / _HTML) as stream:
        stream.write(page.encode())
    return f"{out / _HTML}, {_JSON}, {_CSV}"


def _describe(result: BenchResult) -> str:
    """The terminal's table and what must be said below it."""
    rows: list[list[Cell]] = []
    for s in result.subjects:
        interval = f"{s.ratio_low:.3f}-{s.ratio_high:.3f}" if s.ratio_low and s.ratio_high else None
        rows.append([
            s.label, s.runtime, s.ratio, interval, s.p50_ms, s.p90_ms, s.p99_ms, s.images_per_s,
            s.memory_mib, s.size_mib, s.time_to_first_ms,
        ])  # fmt: skip
    headers = (
        "model", "runtime", "ratio", "95%", "p50 ms", "p90 ms", "p99 ms", "images/s",
        "memory MiB", "file MiB", "first ms",
    )  # fmt: skip
    parts = [format_table(headers, rows), *_more_tables(result), _remarks(result)]
    return "\n\n".join(part for part in parts if part)


def _more_tables(result: BenchResult) -> list[str]:
    tables = []
    staged = [s for s in result.subjects if s.stages_ms]
    if staged:
        cells: list[list[Cell]] = [
            [s.label, *map(s.end_to_end.get, ("ratio", "images_per_s")), *s.stages_ms.values()]
            for s in staged
        ]
        headers = ("file to labels", "ratio", "images/s", *staged[0].stages_ms)
        tables.append(format_table(headers, cells))
    scenarios = [(s.label, e) for s in result.subjects for e in s.scenarios]
    if scenarios:
        keys = ("p50_ms", "p90_ms", "p99_ms", "samples_per_s")
        lines: list[list[Cell]] = [
            [label, e["scenario"], *(e.get(key) for key in keys),
             "valid" if e["is_valid"] else e["why_invalid"]]
            for label, e in scenarios
        ]  # fmt: skip
        headers = ("LoadGen", "scenario", "p50 ms", "p90 ms", "p99 ms", "samples/s", "it says")
        tables.append(format_table(headers, lines))
    profiled = [s for s in result.subjects if s.operators]
    if profiled and result.config.get("operators"):
        tables += _operator_tables(profiled)
    accurate = [s for s in result.subjects if s.top1_pct]
    if accurate:
        sets = list(dict.fromkeys(name for s in accurate for name in s.top1_pct))
        told: list[list[Cell]] = [
            [s.label, *(s.top1_pct.get(name) for name in sets)] for s in accurate
        ]
        tables.append(format_table(("zero-shot top-1 %", *sets), told))
    return tables


def _operator_tables(profiled: list[SubjectResult]) -> list[str]:
    """Shares by kind, side by side; then the slowest nodes of each."""
    kinds = list(dict.fromkeys(kind for s in profiled for kind in s.operators["kinds"]))
    shares: list[list[Cell]] = [
        [s.label, *(100 * s.operators["kinds"].get(kind, 0.0) for kind in kinds)] for s in profiled
    ]
    tables = [format_table(("% of operators' time", *kinds), shares)]
    for s in profiled:
        rows: list[list[Cell]] = [
            [n["node"], n["operator"], n["ms"], 100 * n["share"]] for n in s.operators["top"]
        ]
        headers = (f"slowest of {s.label}", "operator", "ms", "%")
        tables.append(format_table(headers, rows))
    return tables


def _remarks(result: BenchResult) -> str:
    first = result.subjects[0]
    lines = [
        f"batch {first.batch_size}, {first.threads} threads, {result.machine['cpu']}; ratio: time "
        f"over {first.label}'s, round by round; memory: what a model adds to a bare process",
    ]
    if result.state == "stopped":
        lines.append("stopped halfway: partial results")
    for s in result.subjects:
        if s.error:
            hint = f"  try: {s.hint}" if s.hint else ""
            lines.append(f"{s.label} {s.state}: {s.error}{hint}")
        lines += [f"{s.label}: {note}" for note in s.notes]
    unsteady = [s.label for s in result.subjects if s.rounds_ms and not s.is_steady]
    if unsteady:
        lines.append(f"not steady after warming up, so doubtful: {', '.join(unsteady)}")
    lines += [f"throttled: {name}" for name in result.throttled]
    return "\n".join([*lines, *result.notes])
