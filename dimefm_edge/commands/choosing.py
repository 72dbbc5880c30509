"""Commands that choose before anything is trained: targets, estimate, fit."""

from __future__ import annotations

import math
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dimefm_edge.commands.outcome import Outcome
from dimefm_edge.errors import InputError, lookup
from dimefm_edge.tables import format_table

if TYPE_CHECKING:
    from dimefm_edge.cuts import ElasticRun
    from dimefm_edge.latency.onnx_costs import GraphCosts
    from dimefm_edge.options import (
        CalibrateOptions,
        EstimateOptions,
        FitOptions,
        TargetsOptions,
    )
    from dimefm_edge.students import StudentSpec


_DEFAULT_IMAGE_SIZE = 224
_SHOWN_ERRORS = 10
_DEFAULT_EMBED_DIM = 512


def run_targets(options: TargetsOptions) -> Outcome:
    """List every device in its default power mode."""
    from dimefm_edge.latency.estimate import place_on
    from dimefm_edge.targets import list_targets

    targets = [(t, place_on(t, t.precision).basis) for t in list_targets()]
    rows = [
        (
            t.name,
            t.mode,
            " ".join(m for m in t.modes if m != t.mode) or None,
            t.runtime,
            t.precision,
            t.latency_ms,
            t.peak_tflops[t.precision],
            t.bandwidth_gbs,
            basis,
            t.title,
            ", ".join(t.aliases) or None,
        )
        for t, basis in targets
    ]
    headers = (
        "target", "mode", "other modes", "runtime", "precision", "budget ms", "TFLOPS", "GB/s",
        "basis", "device", "also called",
    )  # fmt: skip
    text = format_table(headers, rows) + (
        "\n\nA name alone means the mode shown; `target@mode` takes another. Budgets are defaults "
        "for one image.\nbasis: how estimates in that mode and precision are known; calibrated "
        "beats published, published beats roofline;\nmeasure on the device: "
        "dimefm-edge bench BUNDLE"
    )
    values = [asdict(t) | {"full_name": t.full_name, "basis": basis} for t, basis in targets]
    return Outcome({"targets": values}, text)


def run_estimate(options: EstimateOptions) -> Outcome:
    """Estimate one model on one target, or a table of them."""
    from dimefm_edge.latency.estimate import estimate_latency
    from dimefm_edge.targets import load_target

    if options.rows is not None:
        return _estimate_rows(options)
    if not options.model:
        raise InputError("name a model, or a table with --rows", hint="dimefm-edge estimate --help")
    if options.out is not None:
        raise InputError("--out is where the estimates of --rows go", hint="drop --out, or --json")
    if options.batch_size < 1 or (options.image_size or 1) < 1:
        raise InputError("batch size and image size must be positive")
    target = load_target(options.target)
    costs, own = _costs(options)
    costs.warn(options.model)
    # A float graph runs in the target's precision: `build` lowers it, and so do NPUs' runtimes.
    is_own = own != "fp32" and own in target.peak_tflops
    precision = options.precision or (own if is_own else None) or target.precision
    estimate = estimate_latency(costs.ops, target, precision=precision)
    rows = [
        (
            options.model,
            estimate.params_m,
            estimate.gmacs,
            estimate.latency_ms,
            f"{estimate.low_ms:.3g} to {estimate.high_ms:.3g}",
        )
    ]
    table = format_table(("model", "params M", "GMACs", "estimate ms", "interval ms"), rows)
    text = (
        f"{table}\n\n{target.full_name}, {target.runtime} {precision}, batch "
        f"{options.batch_size}; {_BASES[estimate.basis]}"
    )
    if own not in (None, precision):
        text += f"\nthe graph is in {own}; --precision says what it is to run in there"
    values: dict[str, Any] = {
        "model": options.model,
        "target": target.full_name,
        "runtime": target.runtime,
    }
    values |= {"precision": precision, "batch_size": options.batch_size} | asdict(estimate)
    values["uncounted"] = [{"operator": name, "nodes": n} for name, n in costs.uncounted.items()]
    return Outcome(values, text)


_BASES = {
    "calibrated": "calibrated: by what was measured on this machine",
    "published": "published: fitted on published latencies of this device and of this runtime",
    "roofline": "roofline: scaled from the prices of another device, mode or precision: measure on "
    "the device before you promise anything",
}
_OF_ONE_MODEL = ("config", "target", "precision", "batch_size", "image_size", "embed_dim")


def _estimate_rows(options: EstimateOptions) -> Outcome:
    from dimefm_edge.latency.rows import count_rows, estimate_rows
    from dimefm_edge.progress import counting

    if options.model or options.rows is None or options.out is None:
        raise InputError(
            "--rows takes --out and no model",
            hint="dimefm-edge estimate --rows in.csv --out out.csv",
        )
    for name in _OF_ONE_MODEL:
        if getattr(options, name) != getattr(type(options)(), name):
            flag = _flag(name)
            raise InputError(
                f"{flag} is for one model: each row of a table says what it is of",
                hint=f"drop {flag}; columns: device, runtime, precision, batch, resolution",
            )
    with counting("estimate", count_rows(options.rows)) as advance:
        report = estimate_rows(options.rows, options.out, advance=advance)
    text = f"{report.estimated} of {report.rows} rows estimated: {options.out}"
    text += "".join(f"\nline {line}: {why}" for line, why in report.errors[:_SHOWN_ERRORS])
    if len(report.errors) > _SHOWN_ERRORS:
        text += f"\nand {len(report.errors) - _SHOWN_ERRORS} more; each row's basis says why"
    exit_code = InputError.exit_code if report.rows and not report.estimated else 0
    return Outcome(asdict(report) | {"out": str(options.out)}, text, exit_code)


def run_calibrate(options: CalibrateOptions) -> Outcome:
    """Measure this machine and keep what its costs are."""
    from dimefm_edge.latency.calibrate import MODELS, calibrate
    from dimefm_edge.latency.settle import MAX_ROUNDS
    from dimefm_edge.progress import counting

    total = len(MODELS) * (1 + len(options.precision)) + MAX_ROUNDS
    with counting("calibrate", total) as advance:
        report = calibrate(
            precisions=options.precision,
            threads=options.threads,
            progress=lambda what: advance(1),
        )
    rows = [
        (m.model, m.image_size, m.precision, m.latency_ms, m.predicted_ms, f"{m.error:+.1%}")
        for m in sorted(report.measured, key=lambda m: (m.precision, m.latency_ms))
    ]
    headers = ("model", "pixels", "precision", "measured ms", "by the others ms", "error")
    worth = "\n".join(
        f"{p.precision}: {p.models} models, each predicted by the others within "
        f"{p.median_error:.1%} (median), 80% within {100 * math.expm1(p.spread):.0f}%"
        for p in report.profiles
    )
    text = f"{format_table(headers, rows)}\n\n{worth}\n{report.path}: estimates for local use it"
    text += "".join(f"\nleft out: {name}: {why}" for name, why in report.skipped)
    values = {
        "path": str(report.path),
        "profiles": [p.to_dict() | {"precision": p.precision} for p in report.profiles],
        "measured": [asdict(m) | {"error": m.error} for m in report.measured],
        "skipped": [{"model": name, "why": why} for name, why in report.skipped],
    }
    return Outcome(values, text)


def _costs(options: EstimateOptions) -> tuple[GraphCosts, str | None]:
    """What the model does for a batch, and the precision of its graph, if it is a graph of ours.

    Raises:
        InputError: If flags ask for sizes that the model does not have.
    """
    from dimefm_edge.latency.estimate import graph_facts, trace_ops
    from dimefm_edge.latency.onnx_costs import GraphCosts, graph_costs
    from dimefm_edge.students import (
        NAMED_STUDENTS,
        is_student_name,
        load_student,
        student_spec,
    )
    from dimefm_edge.subjects import subject_kind

    name, batch = options.model, options.batch_size
    size = options.image_size
    if is_student_name(name):
        from dimefm_edge.latency.trace import trace_student

        side = size or _DEFAULT_IMAGE_SIZE
        spec = student_spec(name, image_size=side, embed_dim=options.embed_dim)
        return GraphCosts(list(trace_student(spec, batch))), None
    kind, path = subject_kind(name), Path(name).expanduser()
    if kind == "bundle":
        from dimefm_edge.runtime import load_bundle

        bundle = load_bundle(path)
        side, takes_any = bundle.preprocess.image_size, bundle.image_input == "image"
        _require_own(options, None if takes_any else side, bundle.embed_dim)
        costs = graph_costs(bundle.model_path, batch=batch, image_size=size or side)
        return costs, bundle.precision
    if kind == "onnx":
        facts = graph_facts(path)
        _require_own(options, None if facts.takes_any_size else facts.image_size, "fixed")
        costs = graph_costs(path, batch=batch, image_size=size or facts.image_size)
        return costs, facts.precision
    if kind == "run":
        from dimefm_edge.latency.trace import trace_student

        spec = load_student(path).spec
        _require_own(options, spec.image_size, spec.embed_dim)
        return GraphCosts(list(trace_student(spec, batch))), None
    from dimefm_edge.teacher import load_teacher

    if not (":" in name or "/" in name or path.exists() or name == "sample"):
        lookup(dict.fromkeys([*NAMED_STUDENTS, "sample"]), name, kind="model")
    teacher = load_teacher(name, device="cpu")
    _require_own(options, teacher.preprocess.image_size, teacher.embed_dim)
    ops = trace_ops(teacher.image_tower, teacher.preprocess.image_size, batch)
    return GraphCosts(ops), None


def run_fit(options: FitOptions) -> Outcome:
    """Choose a student for a budget."""
    from dimefm_edge.fit import fit_student
    from dimefm_edge.fit_plot import plot_fit
    from dimefm_edge.latency.calibrate import measure_student
    from dimefm_edge.targets import LOCAL, load_target

    if options.elastic is None and options.out is not None:
        raise InputError("--out takes a student out of a run", hint="--elastic RUN")
    side, embed_dim = options.image_size, options.embed_dim
    from_teacher: dict[str, Any] = {}
    elastic = _elastic_run(options)
    given: tuple[tuple[StudentSpec, float | None], ...] = ()
    if elastic is not None:
        given = tuple((cut.spec, cut.top1_pct) for cut in elastic.cuts)
        side = elastic.loaded.spec.image_size
    if options.teacher is not None and not (given and options.latency_ms):
        from dimefm_edge.choice import teacher_facts
        from dimefm_edge.teacher import load_teacher

        teacher = load_teacher(options.teacher, device="cpu")
        side, embed_dim = side or teacher.preprocess.image_size, embed_dim or teacher.embed_dim
        from_teacher = teacher_facts(teacher)
    target = load_target(options.target)
    report = fit_student(
        target,
        latency_ms=options.latency_ms,
        image_size=side or _DEFAULT_IMAGE_SIZE,
        embed_dim=embed_dim or _DEFAULT_EMBED_DIM,
        precision=options.precision,
        families=options.families,
        given=given,
        max_memory_mib=options.max_memory_mib,
        can_shrink=options.image_size is None,
        measure=measure_student if target.name == LOCAL else None,
        **from_teacher,
    )
    if options.plot is not None:
        plot_fit(report, options.plot)
    if elastic is not None and options.out is not None:
        from dimefm_edge.cuts import save_cut

        is_as_trained = report.precision == target.precision  # in which `distill` looks at budgets
        save_cut(
            elastic, report.chosen, options.out, target=report.target,
            latency_ms=report.budget_ms if is_as_trained else None,
        )  # fmt: skip
    best = report.chosen_candidate
    was_measured = {c for c in report.candidates if c.measured_ms}
    shown = sorted({best, *was_measured, *report.pareto}, key=lambda c: c.latency_ms)
    rows = [
        (
            "*" if c.spec == report.chosen else "",
            c.name,
            c.params_m,
            c.gmacs,
            c.score,
            c.memory_mib,
            c.latency_ms,
            f"{c.low_ms:.3g} to {c.high_ms:.3g}",
            c.measured_ms,
            c.inherits,
            c.fits,
        )
        for c in shown
    ]
    headers = (
        "", "student", "params M", "GMACs", "score" if best.top1_pct is None else "top-1 %", "MiB",
        "estimate ms", "interval ms", "measured ms", "inherits", "fits",
    )  # fmt: skip
    text = (
        f"{format_table(headers, rows)}\n\n* chosen for {report.target} {report.precision}, budget "
        f"{report.budget_ms:.3g} ms; the other rows are the Pareto front of "
        f"{len(report.candidates)} students"
    )
    if best.resolution < 1:
        flags = f"--student {best.spec.name} --image-size {best.spec.image_size}"
        text += f"\nby name, for distill: {flags}"
    if report.teacher_fits:
        text += f"\n{report.teacher_note(str(options.teacher))}"
    if options.out is not None:
        text += f"\n{options.out}: the student as a run; next: dimefm-edge export {options.out}"
    values = report.to_dict() | {
        "plot": str(options.plot) if options.plot else None,
        "out": str(options.out) if options.out else None,
    }
    return Outcome(values, text)


def _elastic_run(options: FitOptions) -> ElasticRun | None:
    """The run whose students are to be chosen among, if there is one.

    Raises:
        InputError: If flags ask for what its students are not.
        ConfigError: If there is something where the chosen one should go.
    """
    if options.elastic is None:
        return None
    from dimefm_edge.cuts import load_cuts, require_new
    from dimefm_edge.student_grid import FAMILIES

    if options.families != FAMILIES:
        raise InputError("--families: the run has the students that it has", hint="drop --families")
    if options.out is not None:
        require_new(options.out)
    run = load_cuts(options.elastic)
    _require_own(options, run.loaded.spec.image_size, run.loaded.spec.embed_dim, what="run")
    return run


def _require_own(
    options: EstimateOptions | FitOptions,
    image_size: int | None,
    embed_dim: int | str,
    *,
    what: str = "model",
) -> None:
    """Refuse flags that ask for other sizes than a model's own; an image size of None is any."""
    own = {"image_size": image_size, "embed_dim": embed_dim}
    for name, value in own.items():
        unset = getattr(type(options)(), name)
        if value is not None and getattr(options, name) not in (unset, value):
            raise InputError(f"{_flag(name)}: the {what}'s is {value}", hint=f"drop {_flag(name)}")


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"
