"""One file that one can send to a colleague: tables, plots, machine and flags; nothing fetched."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from typing import Any

from dimefm_edge.bench.plots import draw_all
from dimefm_edge.bench.results import BenchResult, SubjectResult
from dimefm_edge.tables import Cell, format_cell

_STYLE = """
:root { color-scheme: light dark; --line: #8884; --soft: #8882; }
body { font: 15px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.4rem; } h2 { font-size: 1.1rem; margin-top: 2.2rem; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: .9rem; }
th, td { padding: .25rem .6rem; border-bottom: 1px solid var(--line); text-align: left; }
td.number, th.number { text-align: right; }
figure { margin: 1rem 0; padding: .6rem; background: #fff; color: #222;
  border: 1px solid var(--line); }
figure svg { width: 100%; height: auto; }
figcaption { font-size: .85rem; color: #555; }
.bad { background: #c6282822; }
code { background: var(--soft); padding: 0 .2rem; }
"""
_SUMMARY = (
    ("ratio", "ratio"), ("ratio_low", "95% from"), ("ratio_high", "to"), ("p50_ms", "p50 ms"),
    ("p90_ms", "p90 ms"), ("p99_ms", "p99 ms"), ("p999_ms", "p99.9 ms"),
    ("images_per_s", "images/s"),
)  # fmt: skip
_COSTS = (
    ("load_ms", "load ms"), ("first_ms", "first call ms"),
    ("time_to_first_ms", "start to first ms"), ("memory_mib", "memory MiB"),
    ("peak_rss_mib", "peak RSS MiB"), ("gpu_memory_mib", "GPU MiB"), ("size_mib", "file MiB"),
    ("params_m", "params M"), ("gmacs", "GMAC"), ("power_w", "W"),
    ("energy_mj_per_image", "mJ an image"),
)  # fmt: skip


def report_html(result: BenchResult) -> str:
    """The whole page.

    Raises:
        MissingExtraError: If matplotlib is not installed.
    """
    machine = result.machine
    title = f"{len(result.subjects)} models on {machine.get('cpu', 'this machine')}"
    parts = [
        f"<h1>{escape(title)}</h1>",
        _state(result),
        "<h2>Which is faster</h2>",
        _subject_table(result.subjects, _SUMMARY),
        f"<p>Ratios are times over those of <b>{escape(result.subjects[0].label)}</b>, round by "
        "round, medians with 95% bootstrap intervals; one that holds 1 tells no difference.</p>",
        "<h2>What it costs</h2>",
        _subject_table(result.subjects, _COSTS),
        *_end_to_end(result.subjects),
        *_scenarios(result.subjects),
        *[
            f"<h2>{escape(name)}</h2><figure>{svg}<figcaption>{escape(text)}</figcaption></figure>"
            for name, svg, text in draw_all(result)
        ],
        *_operators(result.subjects),
        *_accuracy(result.subjects),
        "<h2>Notes</h2>",
        _notes(result),
        "<h2>How and where</h2>",
        _pairs(_where(result)),
    ]
    body = "\n".join(parts)
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>{_STYLE}</style></head>\n<body>{body}</body></html>\n"
    )


def _state(result: BenchResult) -> str:
    said = []
    if result.state == "stopped":
        said.append("The bench was stopped halfway: these are partial results.")
    said += [
        f"{s.label}: {s.state}" + (f", {s.error}" if s.error else "")
        for s in result.subjects
        if s.error or (s.state == "partial" and result.state == "complete")
    ]
    said += [f"Throttled: {name}" for name in result.throttled]
    unsteady = [s.label for s in result.subjects if s.rounds_ms and not s.is_steady]
    if unsteady:
        said.append(f"Not steady after warming up, so doubtful: {', '.join(unsteady)}")
    return "".join(f'<p class="bad">{escape(line)}</p>' for line in said)


def _subject_table(subjects: Sequence[SubjectResult], columns: Sequence[tuple[str, str]]) -> str:
    told = [
        (key, name) for key, name in columns if any(getattr(s, key) is not None for s in subjects)
    ]
    rows: list[list[Cell]] = [
        [s.label, s.runtime, *(getattr(s, key) for key, _ in told)] for s in subjects
    ]
    return _table(["model", "runtime", *(name for _, name in told)], rows)


def _end_to_end(subjects: Sequence[SubjectResult]) -> list[str]:
    rows: list[list[Cell]] = [
        [
            s.label, *(s.end_to_end.get(k) for k in ("ratio", "ratio_low", "ratio_high")),
            *(s.end_to_end.get(k) for k in ("p50_ms", "p99_ms", "images_per_s")),
            *s.stages_ms.values(),
        ]
        for s in subjects if s.stages_ms
    ]  # fmt: skip
    if not rows:
        return []
    stages = next(list(s.stages_ms) for s in subjects if s.stages_ms)
    headers = ["model", "ratio", "95% from", "to", "p50 ms", "p99 ms", "images/s", *stages]
    return ["<h2>From a file to labels</h2>", _table(headers, rows)]


def _scenarios(subjects: Sequence[SubjectResult]) -> list[str]:
    keys = ("p50_ms", "p90_ms", "p99_ms", "p999_ms", "samples_per_s", "queries")
    rows: list[list[Cell]] = [
        [
            s.label, entry["scenario"], *(entry.get(k) for k in keys),
            "valid" if entry["is_valid"] else str(entry["why_invalid"]),
        ]
        for s in subjects for entry in s.scenarios
    ]  # fmt: skip
    if not rows:
        return []
    headers = ["model", "scenario", "p50 ms", "p90 ms", "p99 ms", "p99.9 ms", "samples/s",
               "queries", "LoadGen says"]  # fmt: skip
    return ["<h2>MLPerf LoadGen</h2>", _table(headers, rows)]


def _operators(subjects: Sequence[SubjectResult]) -> list[str]:
    parts = []
    for s in subjects:
        if not s.operators:
            continue
        rows: list[list[Cell]] = [
            [n["node"], n["operator"], n["ms"], 100 * n["share"]] for n in s.operators["top"]
        ]
        parts.append(f"<h2>The slowest operators of {escape(s.label)}</h2>")
        parts.append(_table(["node", "operator", "ms", "%"], rows))
    return parts


def _accuracy(subjects: Sequence[SubjectResult]) -> list[str]:
    sets = list(dict.fromkeys(name for s in subjects for name in s.top1_pct))
    if not sets:
        return []
    rows: list[list[Cell]] = [[s.label, *(s.top1_pct.get(name) for name in sets)] for s in subjects]
    return ["<h2>Zero-shot top-1 %</h2>", _table(["model", *sets], rows)]


def _notes(result: BenchResult) -> str:
    notes = [*result.notes, *(f"{s.label}: {note}" for s in result.subjects for note in s.notes)]
    return "<ul>" + "".join(f"<li>{escape(note)}</li>" for note in notes or ["none"]) + "</ul>"


def _where(result: BenchResult) -> list[tuple[str, Any]]:
    machine = dict(result.machine)
    versions = machine.pop("versions", {})
    asked = {k: v for k, v in result.config.items() if v not in (None, [], (), False)}
    peaks = {
        "fp32 product, GFLOP/s": result.peak_gflop_per_s,
        "copy, GB/s": result.copy_gb_per_s,
    }
    return [*machine.items(), *versions.items(), *peaks.items(), *asked.items()]


def _pairs(pairs: Sequence[tuple[str, Any]]) -> str:
    rows: list[list[Cell]] = [[key, str(_plain(value))] for key, value in pairs]
    return _table(["what", "value"], rows)


def _plain(value: Any) -> Any:
    if isinstance(value, list | tuple):
        return " ".join(map(str, value))
    return f"{value:.4g}" if isinstance(value, float) else value


def _table(headers: Sequence[str], rows: Sequence[Sequence[Cell]]) -> str:
    def cell(tag: str, value: Cell) -> str:
        number = isinstance(value, int | float) and not isinstance(value, bool)
        kind = ' class="number"' if number else ""
        return f"<{tag}{kind}>{escape(format_cell(value))}</{tag}>"

    head = "".join(f"<th>{escape(name)}</th>" for name in headers)
    lines = "".join("<tr>" + "".join(cell("td", v) for v in row) + "</tr>" for row in rows)
    return f'<div class="wide"><table><tr>{head}</tr>{lines}</table></div>'
