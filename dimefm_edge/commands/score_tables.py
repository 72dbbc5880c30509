"""Scores of models as a table, JSON, CSV and plots: what `eval` prints and writes."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dimefm_edge.commands.outcome import Outcome
from dimefm_edge.errors import DataError
from dimefm_edge.files import make_out_folder
from dimefm_edge.tables import format_table

if TYPE_CHECKING:
    from dimefm_edge.options import EvalOptions
    from dimefm_edge.scorecard import Figure, SubjectScore
    from dimefm_edge.suites import MissingSet

_SCORES = "scores"


def tell_scores(
    options: EvalOptions,
    scores: Sequence[SubjectScore],
    missing: Sequence[MissingSet],
    params: dict[str, float | None],
    where: str,
    latencies: dict[str, float],
) -> Outcome:
    """Say and write what was measured.

    Args:
        options: Of the command: where files go, and whether plots are wanted.
        scores: One a model, in the order that the user typed.
        missing: Sets of the suite that are not here.
        params: Millions of parameters by model.
        where: The machine that latencies are of.
        latencies: p50 of one image in ms, by model.

    Returns:
        The outcome; one model with nothing but zero-shot asked has a short table.
    """
    from dimefm_edge.scorecard import figures_of, is_zero_shot_only

    first = scores[0] if len(scores) > 1 else None
    figures = [figures_of(score, first) for score in scores]
    _add_effective_robustness(scores, figures)
    subjects = []
    for score, own in zip(scores, figures, strict=True):
        entry = _compared(score, own, figures[0]) if first is not None else score.to_dict()
        if score.name in params:
            entry["params_m"] = params[score.name]
        if latencies:
            entry["latency_p50_ms"] = latencies.get(score.name)
        subjects.append(entry)
    values: dict[str, Any] = {"subjects": subjects}
    if len(scores) == 1:
        reports = [s.zero_shot for s in scores[0].sets if s.zero_shot is not None]
        values = {
            "subject": scores[0].name, "kind": scores[0].kind,
            "results": [asdict(report) for report in reports], **subjects[0],
        }  # fmt: skip
    if latencies:
        values["latency_on"] = where
    values["missing"] = [asdict(item) for item in missing]
    files = _write_files(options, scores, figures, values)
    values["files"] = [str(path) for path in files]
    is_short = len(scores) == 1 and not missing and is_zero_shot_only(scores[0])
    text = _short_text(scores[0]) if is_short else _long_text(scores, figures, values)
    return Outcome(values, text + "".join(f"\n{path}" for path in files))


def _compared(
    score: SubjectScore, figures: Sequence[Figure], first: Sequence[Figure]
) -> dict[str, Any]:
    from dimefm_edge.scorecard import retention_pct

    return score.to_dict() | {
        "figures": [asdict(f) | {"retention_pct": retention_pct(f, first)} for f in figures]
    }


def _add_effective_robustness(
    scores: Sequence[SubjectScore], figures: Sequence[list[Figure]]
) -> None:
    """Where three models or more were tested on a shift: what each has beyond their line."""
    from dimefm_edge.evaluate.robustness import effective_robustness
    from dimefm_edge.scorecard import Figure

    for place in range(len(scores[0].sets)):
        shifts = [score.sets[place].shift for score in scores]
        known = [shift for shift in shifts if shift is not None]
        if len(known) < len(shifts):
            continue
        try:
            values = effective_robustness(
                [s.reference_top1_pct for s in known], [s.top1_pct for s in known]
            )
        except DataError:
            continue
        for own, value in zip(figures, values, strict=True):
            own.append(Figure(known[0].name, "effective robustness, points", value, False))


def _short_text(score: SubjectScore) -> str:
    rows = [
        (r.name, r.num_classes, r.num_images, r.num_bad, r.chance_pct, r.top1_pct, r.top5_pct)
        for r in (entry.zero_shot for entry in score.sets)
        if r is not None
    ]
    headers = ("zero-shot", "classes", "images", "unreadable", "chance %", "top-1 %", "top-5 %")
    return f"{score.kind} {score.name}\n\n{format_table(headers, rows)}"


def _long_text(
    scores: Sequence[SubjectScore], figures: Sequence[Sequence[Figure]], values: dict[str, Any]
) -> str:
    from dimefm_edge.scorecard import retention_pct

    letters = [_letter(number) for number in range(len(scores))]
    keys = dict.fromkeys((f.set_name, f.measure) for own in figures for f in own)
    rows = []
    for key in keys:
        cells: list[float | None] = []
        for number, own in enumerate(figures):
            figure = next((f for f in own if (f.set_name, f.measure) == key), None)
            cells.append(figure.value if figure else None)
            if number:
                cells.append(retention_pct(figure, figures[0]) if figure else None)
        rows.append((*key, *cells))
    headers = ["set", "measure", "A %"]
    for letter in letters[1:]:
        headers += [f"{letter} %", f"{letter} / A %"]
    if len(scores) == 1:
        headers[2] = "%"
        lines = [f"{scores[0].kind} {scores[0].name}"]
    else:
        lines = [f"{a}: {s.kind} {s.name}" for a, s in zip(letters, scores, strict=True)]
    parts = ["\n".join(lines), format_table(headers, rows)]
    sizes = values.get("subjects", [values])
    if any("params_m" in entry or "latency_p50_ms" in entry for entry in sizes):
        table = [
            (a, entry.get("params_m"), entry.get("latency_p50_ms"))
            for a, entry in zip(letters, sizes, strict=True)
        ]
        parts.append(format_table(("model", "parameters M", "p50 ms of one image"), table))
    if "latency_on" in values:
        parts.append(f"latency on {values['latency_on']}")
    if values["missing"]:
        parts.append(
            "not there, so left out of every mean:\n"
            + "\n".join(f"  {item['name']}: {item['reason']}" for item in values["missing"])
        )
    return "\n\n".join(parts)


def _letter(number: int) -> str:
    return chr(ord("A") + number) if number < 26 else f"M{number + 1}"


# ------------------------------------------------------------------------------- files


def out_folder(options: EvalOptions) -> Path | None:
    """Where `eval` writes its files, if it does."""
    return options.out or (Path(_SCORES) if options.plot else None)


def _write_files(
    options: EvalOptions,
    scores: Sequence[SubjectScore],
    figures: Sequence[Sequence[Figure]],
    values: dict[str, Any],
) -> list[Path]:
    """scores.json, scores.csv and, with --plot, the plots."""
    out = out_folder(options)
    if out is None:
        return []
    from dimefm_edge.files import atomic_file

    make_out_folder(out)
    entries = values.get("subjects", [values])
    written = [out / f"{_SCORES}.json", out / f"{_SCORES}.csv"]
    texts = (json.dumps(values, indent=2, default=str), _csv(scores, figures, entries))
    for path, text in zip(written, texts, strict=True):
        with atomic_file(path) as stream:
            stream.write(text.encode())
    return written + (_plot(scores, entries, values, out) if options.plot else [])


def _csv(
    scores: Sequence[SubjectScore],
    figures: Sequence[Sequence[Figure]],
    entries: Sequence[dict[str, Any]],
) -> str:
    """One row a figure."""
    from dimefm_edge.scorecard import retention_pct

    stream = io.StringIO()
    writer = csv.writer(stream, lineterminator="\n")
    writer.writerow(
        ("subject", "kind", "set", "measure", "value", "retention_pct", "params_m",
         "latency_p50_ms")
    )  # fmt: skip
    for score, own, entry in zip(scores, figures, entries, strict=True):
        for figure in own:
            cells = (
                figure.value, retention_pct(figure, figures[0]), entry.get("params_m"),
                entry.get("latency_p50_ms"),
            )  # fmt: skip
            numbers = ("" if cell is None else f"{cell:.6g}" for cell in cells)
            writer.writerow((score.name, score.kind, figure.set_name, figure.measure, *numbers))
    return stream.getvalue()


def _plot(
    scores: Sequence[SubjectScore],
    entries: Sequence[dict[str, Any]],
    values: dict[str, Any],
    out: Path,
) -> list[Path]:
    from dimefm_edge.score_plots import ScorePoint, plot_reliability, plot_scores

    points = [
        ScorePoint(score.name, accuracy, entry.get("latency_p50_ms"), entry.get("params_m"))
        for score, entry in zip(scores, entries, strict=True)
        if (accuracy := _accuracy(score)) is not None
    ]
    if scores[0].sets:
        averaged = scores[0].averaged
        what = averaged[0].name if len(averaged) == 1 else f"mean of {len(averaged)} sets"
        title = f"zero-shot, {what} (%)"
    else:
        title = "mean recall of retrieval (%)"
    where = values.get("latency_on", "not asked for")
    written = plot_scores(points, out / "accuracy", accuracy=title, latency=where)
    calibrated = [
        (score.name, entry.calibration)
        for score in scores
        for entry in score.sets
        if entry.calibration is not None
    ]
    if calibrated:
        written += plot_reliability(calibrated, out / "reliability")
    return written


def _accuracy(score: SubjectScore) -> float | None:
    if score.sets:
        return score.mean_pct
    recalls = [report.mean_recall_pct for report in score.retrieval]
    return sum(recalls) / len(recalls) if recalls else None
