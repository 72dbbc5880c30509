"""The eval command: which models, which sets, which measures; table, JSON, CSV and plots."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dimefm_edge.commands.outcome import Outcome
from dimefm_edge.errors import DataError, InputError
from dimefm_edge.tables import format_table

if TYPE_CHECKING:
    from dimefm_edge.data.images import LabelledSet
    from dimefm_edge.options import EvalOptions
    from dimefm_edge.scorecard import EvalPlan, Figure, SubjectScore
    from dimefm_edge.subjects import EncodeTexts, Subject
    from dimefm_edge.suites import EvalSet, MissingSet

_OWN = "own"
_SCORES = "scores"


def run_eval(options: EvalOptions) -> Outcome:
    """Accuracy of one model or several."""
    names = options.subjects or ("",)
    if len(set(names)) < len(names):
        raise InputError("a model is named twice", hint="name each model once")
    from dimefm_edge.scorecard import score_subject
    from dimefm_edge.subjects import load_subject

    _check_libraries(options)
    plan, missing = _make_plan(options)
    # All are loaded and timed before any is scored: what is wrong shows in seconds, not hours.
    subjects = [load_subject(name, engine=options.engine) for name in names]
    texts = [
        s.encode_texts if options.teacher is None else _text_side(options.teacher, s)
        for s in subjects
    ]
    where, latencies = _latencies(options)
    params = {}
    if len(names) > 1 or options.plot:
        from dimefm_edge.commands.sizing import count_params

        params = {subject.name: count_params(subject) for subject in subjects}
    scores = [
        score_subject(subject, plan, encode_texts)
        for subject, encode_texts in zip(subjects, texts, strict=True)
    ]
    return _tell(options, scores, missing, params, where, latencies)


# ---------------------------------------------------------------------- what is measured


def _check_libraries(options: EvalOptions) -> None:
    """What the measures need is there, or the run ends before it has begun.

    Raises:
        MissingExtraError: If it is not.
    """
    if options.linear_probe is not None:
        from dimefm_edge.evaluate.metrics import import_sklearn

        import_sklearn("linear_model")
    if options.corruptions:
        from dimefm_edge.evaluate.robustness import import_imagecorruptions

        import_imagecorruptions()
    if options.plot:
        from dimefm_edge.score_plots import import_matplotlib

        import_matplotlib()


def _make_plan(options: EvalOptions) -> tuple[EvalPlan, list[MissingSet]]:
    from dimefm_edge.data.captioned import open_captioned
    from dimefm_edge.scorecard import EvalPlan

    sets, reference, missing = _open_sets(options)
    captioned = tuple(open_captioned(source) for source in options.retrieval)
    for kind in ([s.name for s in sets], [c.name for c in captioned]):
        if len(set(kind)) < len(kind):
            double = next(name for name in kind if kind.count(name) > 1)
            raise InputError(f"two test sets are called '{double}'", hint="rename a folder")
    if options.shift:
        reference = reference or (sets[0].name if sets else None)
        if len(sets) < 2:
            raise InputError(
                "a shift is between two test sets", hint="--data REFERENCE SHIFTED --shift"
            )
    plan = EvalPlan(
        sets=tuple(sets),
        captioned=captioned,
        reference=reference,
        with_ece=options.ece,
        with_corruptions=options.corruptions,
        corruption_images=options.corruption_images,
        seed=options.seed,
        batch_size=options.batch_size,
        workers=options.workers,
    )
    return plan, missing


def _open_sets(options: EvalOptions) -> tuple[list[EvalSet], str | None, list[MissingSet]]:
    """Labelled sets of --data and --suite, the suite's reference, and what it lacks here."""
    from dimefm_edge.data.images import open_labelled
    from dimefm_edge.suites import EvalSet, load_suite, open_suite

    sources = options.data
    if not sources and options.suite is None and not options.retrieval:
        own = (_own_sets(name) for name in options.subjects)
        sources = next((found for found in own if found), ())
        if not sources and any(options.subjects):
            raise InputError(
                "eval needs a labelled set", hint="--data scenes, or a folder of classes"
            )
    probe = options.linear_probe
    shared = open_labelled(probe) if probe not in (None, _OWN) else None
    sets = []
    for source in sources:
        test = open_labelled(source)
        train = _own_train(source) if probe == _OWN else shared
        sets.append(EvalSet(test, train=_if_same_classes(train, test.classnames)))
    reference: str | None = None
    missing: list[MissingSet] = []
    if options.suite is not None:
        suite = load_suite(options.suite)
        found, missing = open_suite(suite, options.data_root, with_train=probe == _OWN)
        if shared is not None:
            found = [
                EvalSet(s.test, s.metric, _if_same_classes(shared, s.test.classnames))
                for s in found
            ]
        sets += found
        reference = suite.reference
    if probe is not None and all(s.train is None for s in sets):
        what = f"'{probe}' has" if shared is not None else "the sets' own training splits have"
        raise DataError(
            f"{what} not the classes of any test set, so no linear probe can be fitted",
            hint="--linear-probe with a training set of the same class names",
        )
    return sets, reference, missing


def _own_train(source: str) -> LabelledSet | None:
    """The training split of a CLIP-benchmark folder; None where there is none."""
    from dimefm_edge.data.images import open_labelled
    from dimefm_edge.data.labelled import list_tars

    if source == "scenes":
        return open_labelled("scenes-train")
    folder = Path(source).expanduser()
    return open_labelled(source, split="train") if list_tars(folder / "train") else None


def _if_same_classes(
    train: LabelledSet | None, classnames: tuple[str, ...]
) -> LabelledSet | None:
    return train if train is not None and train.classnames == classnames else None


def _own_sets(subject: str) -> tuple[str, ...]:
    """The test sets of the run that this is, or whose bundle it is."""
    from dimefm_edge.config import load_saved

    path = Path(subject).expanduser()
    if not path.is_dir():
        return ()
    saved = load_saved(path) or load_saved(path.parent)
    return saved.data.eval_sets if saved else ()


def _text_side(teacher: str, subject: Subject) -> EncodeTexts:
    from dimefm_edge.teacher import load_teacher

    loaded = load_teacher(teacher)
    if loaded.embed_dim != subject.embed_dim:
        raise InputError(
            f"teacher {teacher} answers in {loaded.embed_dim} dimensions, {subject.name} in "
            f"{subject.embed_dim}",
            hint="--teacher with the teacher that it was distilled from",
        )
    return loaded.encode_texts


def _latencies(options: EvalOptions) -> tuple[str, dict[str, float]]:
    if options.latency == "auto" and not options.plot:
        return "", {}
    from dimefm_edge.commands.sizing import find_latencies

    return find_latencies(options.subjects, options.latency, engine=options.engine)


# --------------------------------------------------------------------------- what is told


def _tell(
    options: EvalOptions,
    scores: Sequence[SubjectScore],
    missing: Sequence[MissingSet],
    params: dict[str, float | None],
    where: str,
    latencies: dict[str, float],
) -> Outcome:
    """One subject with nothing asked beyond zero-shot keeps its short table."""
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
            entry["latency_p50_ms"] = latencies[score.name]
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


def _write_files(
    options: EvalOptions,
    scores: Sequence[SubjectScore],
    figures: Sequence[Sequence[Figure]],
    values: dict[str, Any],
) -> list[Path]:
    """scores.json, scores.csv and, with --plot, the plots."""
    out = options.out or (Path(_SCORES) if options.plot else None)
    if out is None:
        return []
    from dimefm_edge.files import atomic_file

    out.mkdir(parents=True, exist_ok=True)
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
        first = scores[0].sets
        what = first[0].name if len(first) == 1 else f"mean of {len(first)} sets"
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
