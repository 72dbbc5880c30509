"""The command that makes bundles, of runs and of teachers: export."""

from __future__ import annotations

import dataclasses
import itertools
import logging
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dimefm_edge.commands.outcome import Outcome
from dimefm_edge.errors import (
    CheckpointError,
    ConfigError,
    DataError,
    DimeFMError,
    InputError,
    lookup,
)
from dimefm_edge.files import run_folder

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    from dimefm_edge.export import GraphSpec
    from dimefm_edge.export.text import TextSource
    from dimefm_edge.export.towers import LoadedTeacher
    from dimefm_edge.labels import LabelBank
    from dimefm_edge.options import ExportOptions
    from dimefm_edge.preprocess import PreprocessSpec
    from dimefm_edge.runtime import Bundle
    from dimefm_edge.students import LoadedStudent
    from dimefm_edge.teacher import Teacher

logger = logging.getLogger(__name__)

_TENSORRT = "tensorrt"
_NUM_PARITY_IMAGES = 32
_NUM_CALIBRATION_IMAGES = 256
_NUM_PARITY_SENTENCES = 64
_FEW_IMAGES = 8
_RUN = "dimefm-edge export RUN"


@dataclass(frozen=True, eq=False)
class _Source:
    """What is exported."""

    loaded: LoadedStudent | LoadedTeacher
    out: Path
    label_banks: Sequence[LabelBank]
    images: tuple[Sequence[str], str]
    """Sources of parity images, and their column."""
    logit_scale: float
    extra: dict[str, Any]
    text_teacher: TextSource | None


def run_export(options: ExportOptions) -> Outcome:
    """Write a run or a teacher as a bundle; for TensorRT, build its engine here too."""
    try:
        return _export(options)
    except DimeFMError as error:
        if error.hint and _RUN in error.hint:  # steps below know the flag, but not of what
            error.hint = error.hint.replace(_RUN, _command_without(options, error.hint))
        raise


def _export(options: ExportOptions) -> Outcome:
    from dimefm_edge.commands.building import with_dry_build
    from dimefm_edge.export import EXPORTERS, export_student
    from dimefm_edge.export.graph_spec import QUANTIZED
    from dimefm_edge.runtime import load_bundle

    _check(options)
    lookup(dict.fromkeys((*EXPORTERS, _TENSORRT)), options.format, kind="export format")
    if options.format == _TENSORRT:
        _require_builder(options)
    source = _of_run(options) if options.run else _of_teacher(options)
    if options.text_precision != "auto" and source.text_teacher is None:
        raise InputError(
            f"--text-precision {options.text_precision} is of a text side, which is left out",
            hint="drop --image-only" if options.image_only else "add --text",
        )
    graph = _graph_spec(options, source.extra.get("target"))
    count = _NUM_CALIBRATION_IMAGES if graph.precision in QUANTIZED else _NUM_PARITY_IMAGES
    export_student(
        _trained_for(graph, options) or source.loaded,
        source.out,
        fmt="onnx" if options.format == _TENSORRT else options.format,
        graph=graph,
        head=options.head,
        label_banks=source.label_banks,
        parity_images=_parity_images(*source.images, source.loaded.preprocess, count=count),
        logit_scale=source.logit_scale,
        extra=source.extra,
        text_teacher=source.text_teacher,
        parity_sentences=_parity_sentences(options) if source.text_teacher else (),
        text_precision=None if options.text_precision == "auto" else options.text_precision,
    )
    bundle = load_bundle(source.out)
    outcome = with_dry_build(_outcome(bundle, source.out), bundle)
    return _with_engine(outcome, source.out) if options.format == _TENSORRT else outcome


def _graph_spec(options: ExportOptions, target_name: str | None) -> GraphSpec:
    from dimefm_edge.export import graph_spec
    from dimefm_edge.targets import load_target

    target = load_target(target_name) if target_name else None
    if options.format == _TENSORRT and (target is None or target.runtime != _TENSORRT):
        raise InputError(
            f"--format tensorrt needs a target that runs TensorRT, not {target_name or 'any'}",
            hint="--target jetson-orin  (dimefm-edge targets lists them)",
        )
    return graph_spec(
        target,
        precision=options.precision,
        opset=options.opset,
        attention=options.attention,
        batch_size=options.batch_size,
        image_input=options.input,
        calibration=None if options.calibration == "auto" else options.calibration,
    )


def _trained_for(graph: GraphSpec, options: ExportOptions) -> LoadedStudent | None:
    """The run's own int8 student, where int8 is asked for and there is one for this runtime."""
    if not options.run or graph.quant_rules is None:
        return None
    from dimefm_edge.precisions import float_products, load_trained_int8

    run = run_folder(options.run)
    trained = load_trained_int8(run, graph.quant_rules)
    if trained is not None and graph.calibration is None:
        return trained
    if trained is not None:
        logger.warning(
            "--calibration %s: the float student of %s is calibrated, what it learned in int8 is "
            "not used", graph.calibration, run,
        )  # fmt: skip
    if kept := float_products(run):
        logger.warning(
            "--max-drop of %s left %s in float: here all is quantised; %s/bundle keeps it",
            run, ", ".join(kept), run,
        )  # fmt: skip
    return None


def _require_builder(options: ExportOptions) -> None:
    """Before anything is loaded or written."""
    from dimefm_edge.runtime.tensorrt_machine import require_builder

    out = options.out or _default_out(options)
    onnx = dataclasses.replace(
        options, format="onnx", target=options.target or "jetson-orin", out=out, json=False
    )
    require_builder(export_command=_command(onnx), bundle=out)


def _default_out(options: ExportOptions) -> Path:
    from dimefm_edge.export.towers import file_name_of

    if options.teacher:
        return Path(f"{file_name_of(options.teacher)}-bundle")
    return run_folder(options.run) / f"bundle-{options.precision}"


def _command_without(options: ExportOptions, hint: str) -> str:
    """The user's own command, but for the flags that a hint gives another value."""
    changed: dict[str, Any] = {
        field.name: field.default
        for field in dataclasses.fields(options)
        if f"--{field.name.replace('_', '-')} " in f"{hint} "
    }
    return _command(dataclasses.replace(options, json=False, **changed))


def _command(options: ExportOptions) -> str:
    """What a user types to get these options."""
    words = ["dimefm-edge", "export", *([options.run] if options.run else [])]
    for field in dataclasses.fields(options):
        value = getattr(options, field.name)
        if field.name == "run" or value == field.default:
            continue
        words.append("--" + field.name.replace("_", "-"))
        if not isinstance(value, bool):
            words += map(str, value if isinstance(value, tuple) else [value])
    return shlex.join(words)


def _with_engine(outcome: Outcome, out: Path) -> Outcome:
    from dimefm_edge.commands.building import run_build
    from dimefm_edge.options import BuildOptions

    built = run_build(BuildOptions(bundle=str(out)))
    values = {**outcome.values, "engine": built.values}
    return Outcome(values, f"{outcome.text}\n\n{built.text}", built.exit_code)


def _check(options: ExportOptions) -> None:
    hint = "dimefm-edge export runs/first, or dimefm-edge export --teacher sample"
    if not options.run and not options.teacher:
        raise InputError("export needs a run or a teacher", hint=hint)
    if options.run and options.teacher:
        raise InputError(
            f"export takes a run or a teacher, not both: {options.run} and {options.teacher}",
            hint=f"dimefm-edge export {options.run} --text  (adds its teacher's text side)",
        )
    if options.image_only and (options.text or options.teacher_text):
        word = "--text" if options.text else "--teacher-text"
        raise InputError(f"{word} and --image-only contradict each other", hint="drop one of them")


def _outcome(bundle: Bundle, out: Path) -> Outcome:
    from dimefm_edge.manifest import kernels_of

    parity, text = bundle.manifest["parity"], bundle.manifest.get("text")
    graph = bundle.manifest["graph"]
    integers = graph.get("integer_kernels")
    lines = [
        f"{out}: {bundle.name}, {bundle.precision}, {bundle.size_mib:.2f} MiB, label sets: "
        f"{', '.join(bundle.label_banks) or 'none'}",
        f"for {graph['runtime']}, opset {bundle.manifest['opset']}, {graph['nodes']} nodes; "
        f"{graph['fusion']['summary']}",
        f"parity on {parity['num_images']} images: {_parity(parity)}",
        *([f"{bundle.precision}: {graph['quantized']['summary']}"] if graph["quantized"] else []),
        *([f"int8 on this CPU: {integers['summary']}"] if integers else []),
        *(
            f"kernel for sm_{k['capability']}: {k['name']}, {k['num_registers']} registers, "
            f"{k['shared_bytes'] / 1024:.1f} KiB shared, {k['spill_bytes']} bytes spilled"
            for k in kernels_of(bundle.manifest)
        ),
        *(f"warning: {text}" for text in graph["warnings"]),
    ]
    values = {
        "bundle": str(out),
        "name": bundle.name,
        "precision": bundle.precision,
        "size_mib": bundle.size_mib,
        "label_sets": list(bundle.label_banks),
        "opset": bundle.manifest["opset"],
        "graph": graph,
        "parity": parity,
        "text": text,
    }
    if bundle.text is not None and text is not None:
        values["text_size_mib"] = bundle.text.model_path.stat().st_size / 2**20
        lines.append(
            f"text side: {text['precision']}, {values['text_size_mib']:.2f} MiB, "
            f"{text['context_length']} tokens; "
            f"parity on {text['parity']['num_sentences']} sentences: {_parity(text['parity'])}"
        )
        if text["graph"].get("weights"):
            lines.append(f"text side: {text['graph']['weights']['summary']}")
    return Outcome(values, "\n".join(lines))


def _parity(parity: dict[str, Any]) -> str:
    return (
        f"max abs difference {parity['max_abs_diff']:.1e}, least cosine {parity['min_cosine']:.6f}"
    )


# -------------------------------------------------------------------------- a teacher


def _of_teacher(options: ExportOptions) -> _Source:
    from dimefm_edge.export.bundle import check_destination
    from dimefm_edge.export.towers import image_tower
    from dimefm_edge.teacher import RUN_CHECKPOINT, load_teacher

    assert options.teacher is not None
    if (Path(options.teacher).expanduser() / RUN_CHECKPOINT).is_file():
        raise InputError(
            f"{options.teacher} is a run", hint=f"dimefm-edge export {options.teacher} --text"
        )
    out = options.out or _default_out(options)
    check_destination(out)  # a big teacher takes a while to load
    teacher = load_teacher(options.teacher)
    return _Source(
        image_tower(teacher),
        out,
        _label_banks(options.labels, teacher),
        (options.images or ("scenes",), options.image_column),
        teacher.logit_scale,
        {
            "target": options.target,
            "teacher": teacher.name,
            "teacher_weights": teacher.weights_hash,
        },
        None if options.image_only else teacher,
    )


# ------------------------------------------------------------------------------ a run


def _of_run(options: ExportOptions) -> _Source:
    from dimefm_edge.config import load_saved
    from dimefm_edge.students import load_student
    from dimefm_edge.students.text_checkpoint import has_text_student, load_text_student
    from dimefm_edge.subjects import run_logit_scale
    from dimefm_edge.teacher import TEXT_TEACHER_KEY, load_teacher

    loaded = load_student(Path(options.run).expanduser())
    run_dir = run_folder(options.run)
    saved = load_saved(run_dir)
    images, column = options.images, options.image_column
    if not images:
        if saved is None:
            raise ConfigError(
                f"{run_dir} has no config.toml that names images to check parity on",
                hint="--images with a folder of real images",
            )
        images, column = saved.data.images, saved.data.image_column
    name = loaded.metadata.get(TEXT_TEACHER_KEY)
    sources = options.labels or (saved.data.eval_sets if saved else ())
    banks = None if options.labels else _banks_of(run_dir / "bundle")
    own_text = has_text_student(run_dir) and not options.teacher_text and not options.image_only
    teacher_text = (options.text or options.teacher_text) and not own_text
    needs_teacher = teacher_text or options.labels or (sources and banks is None and name)
    if needs_teacher and name is None:
        raise CheckpointError(f"the checkpoint of {options.run} names no teacher")
    teacher = load_teacher(name) if needs_teacher and name else None
    return _Source(
        loaded,
        options.out or _default_out(options),
        _label_banks(sources, teacher) if banks is None else banks,
        (images, column),
        run_logit_scale(loaded.metadata, options.run),
        {"target": options.target or loaded.metadata.get("target"), "teacher": name},
        load_text_student(run_dir) if own_text else teacher if teacher_text else None,
    )


def _banks_of(bundle_dir: Path) -> Sequence[LabelBank] | None:
    """The label sets of a run's own bundle; None where there is none, or it is damaged."""
    from dimefm_edge.runtime import load_bundle

    if not (bundle_dir / "manifest.json").is_file():
        return None
    try:
        return list(load_bundle(bundle_dir).label_banks.values())
    except CheckpointError as error:
        logger.warning("%s; label sets are made again", error.args[0])
        return None


# ------------------------------------------------------------------------------- both


def _label_banks(sources: Sequence[str], teacher: Teacher | None) -> Sequence[LabelBank]:
    from dimefm_edge.data.labelled import open_classes
    from dimefm_edge.labels import build_label_bank

    if teacher is None:
        return []
    return [build_label_bank(*open_classes(source), teacher.encode_texts) for source in sources]


def _parity_images(
    sources: Sequence[str], column: str, preprocess: PreprocessSpec, *, count: int
) -> npt.NDArray[np.float32]:
    from dimefm_edge.data.images import open_images, some_images
    from dimefm_edge.preprocess import preprocess_images

    images, bad = some_images(open_images(sources, column=column), count)
    if not images:
        raise DataError("none of the images can be read", hint="--images with real images")
    if bad:
        logger.warning("%d images cannot be read and are left out; the first: %s", len(bad), bad[0])
    if len(images) < _FEW_IMAGES:
        logger.warning("%d images are few: --images with %d and more says more", len(images), count)
    return preprocess_images(images, preprocess)


def _parity_sentences(options: ExportOptions) -> list[str]:
    from dimefm_edge.data.sentences import open_sentences

    sentences = open_sentences(options.sentences, column=options.text_column)
    return list(itertools.islice(sentences, _NUM_PARITY_SENTENCES))
