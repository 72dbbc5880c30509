"""The command that builds on the device: a bundle becomes a TensorRT engine, and is checked."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dimefm_edge.commands.judging import evaluate_subject
from dimefm_edge.commands.outcome import Outcome
from dimefm_edge.errors import ConfigError, DimeFMError, InputError, ParityError
from dimefm_edge.tables import format_table

if TYPE_CHECKING:
    from dimefm_edge.options import BuildOptions
    from dimefm_edge.runtime.bundle import Bundle
    from dimefm_edge.runtime.tensorrt import TensorRtEngine
    from dimefm_edge.runtime.tensorrt_build import BuiltEngine, EngineOptions
    from dimefm_edge.runtime.tensorrt_rtx import DryBuild

_MIN_COSINE = {"fp32": 0.999, "fp16": 0.999}  # as the export's own for fp16
_MIN_COSINE_OTHERS = 0.99
_FUSE_HINT = "  try: with TensorRT 10, build the fp32 bundle with --precision fp16"
_PARITY_IMAGES = 8
_SLOWEST = 15


def run_build(options: BuildOptions) -> Outcome:
    """Build, load, compare with ONNX Runtime, and measure what is asked."""
    if not options.bundle:
        raise InputError("build needs a bundle", hint="dimefm-edge build runs/first/bundle")
    if options.out is not None and options.out.suffix != ".engine":
        raise InputError(f"--out must end in .engine, got {options.out}", hint="--out my.engine")
    from dimefm_edge.runtime.bundle import load_bundle
    from dimefm_edge.runtime.tensorrt import TensorRtEngine
    from dimefm_edge.runtime.tensorrt_build import EngineOptions, build_engine

    asked = EngineOptions(
        precision=options.precision,
        batch=parse_batch(options.batch),
        workspace_mib=options.workspace_mib,
        dla_core=options.dla_core,
        opt_level=options.opt_level,
        version_compatible=options.version_compatible,
        hardware_compatible=options.hardware_compatible,
        refit=options.refit,
        plugin_libraries=tuple(str(Path(p).resolve()) for p in options.plugin_library),
    )
    bundle = load_bundle(Path(options.bundle).expanduser())
    if options.dry_run:
        return _dry_run(options, bundle, asked)
    built = build_engine(
        bundle,
        asked,
        out=options.out,
        timing_cache=options.timing_cache,
        rebuild=options.rebuild,
    )
    engine = TensorRtEngine(built.artifact, bundle=bundle)
    try:
        return _report(options, bundle, built, engine)
    finally:
        engine.close()


def try_build(bundle: Bundle, asked: EngineOptions | None = None) -> DryBuild:
    """A dry build of a bundle as its engine will be on the device.

    TensorRT 10 lowers an fp32 graph to the precision of the target's budget there; TensorRT for
    RTX runs the types that a graph says. So the graph is lowered first, where that can be done.

    Raises:
        DimeFMError: As `dry_build`.
    """
    from dimefm_edge.runtime.tensorrt_build import EngineOptions, budget_precision
    from dimefm_edge.runtime.tensorrt_rtx import dry_build

    asked = asked or EngineOptions()
    wanted = asked.precision or budget_precision(bundle)
    if (bundle.precision, wanted) != ("fp32", "fp16"):
        return dry_build(bundle, asked)
    try:
        import onnx

        from dimefm_edge.export.fp16 import convert_to_fp16
        from dimefm_edge.export.trace import silence
    except ImportError:  # on a machine that exports nothing
        return dry_build(bundle, asked)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.onnx"
        with silence():
            onnx.save(convert_to_fp16(onnx.load(bundle.model_path)), path)
        manifest = bundle.manifest | {"precision": wanted}
        return dry_build(replace(bundle, model_path=path, manifest=manifest), asked)


def dry_build_values(built: DryBuild) -> dict[str, Any]:
    """A dry build as JSON has it."""
    from dimefm_edge.runtime.tensorrt_inspect import describe_layers, kernels_by_kind

    return asdict(built) | {
        "num_kernels": built.num_kernels,
        "kernels_by_kind": kernels_by_kind(built.layers),
        "layers": describe_layers(built.layers),
    }


def with_dry_build(outcome: Outcome, bundle: Bundle) -> Outcome:
    """For TensorRT: what NVIDIA's own compiler makes of an export, where it is installed."""
    from dimefm_edge.runtime.tensorrt_rtx import can_dry_build

    if not can_dry_build(bundle):
        return outcome
    try:
        built = try_build(bundle)
    except Exception as error:  # the bundle is whole, and the target's own TensorRT is another
        reason = str(error.args[0] if isinstance(error, DimeFMError) else repr(error))
        values, text = {"error": reason}, f"warning: {reason}"
    else:
        values, text = dry_build_values(built), built.describe()
    return Outcome(
        {**outcome.values, "dry_build": values}, f"{outcome.text}\n{text}", outcome.exit_code
    )


def _dry_run(options: BuildOptions, bundle: Bundle, asked: EngineOptions) -> Outcome:
    on_device = ("out", "timing_cache", "data", "profile", "rebuild", "refit",
                 "version_compatible", "hardware_compatible")  # fmt: skip
    if given := [name for name in on_device if getattr(options, name)]:
        raise InputError(
            f"--dry-run keeps and runs nothing: --{given[0].replace('_', '-')} is for a build on "
            "the device",
            hint=f"drop --{given[0].replace('_', '-')}",
        )
    built = try_build(bundle, asked)
    values = {"bundle": str(bundle.path)} | dry_build_values(built)
    lines = [
        f"{bundle.path}: {built.describe()}",
        f"{built.size_mib:.1f} MiB, {built.build_s:.1f} s; nothing was run or kept. On the device: "
        f"dimefm-edge build {bundle.path}",
        "",
        format_table(("kind", "kernels"), list(values["kernels_by_kind"].items())),
    ]
    return Outcome(values, "\n".join(lines))


def parse_batch(text: str) -> tuple[int, int, int]:
    """`min,opt,max`, or one number for all three.

    Raises:
        ConfigError: If it is neither.
    """
    try:
        sizes = [int(part) for part in text.split(",")]
        least, usual, largest = sizes * 3 if len(sizes) == 1 else sizes
    except ValueError as error:
        raise ConfigError(
            f"--batch is min,opt,max or one number, got '{text}'", hint="--batch 1,1,8"
        ) from error
    return least, usual, largest


def check_against_onnx(engine: TensorRtEngine, bundle: Bundle, *, precision: str) -> float:
    """Least cosine of the engine's embeddings to ONNX Runtime's of the same graph, over scenes.

    Raises:
        ParityError: If it is below 0.999 in fp32 and fp16, 0.99 in others: TensorRT has computed
            something else.
    """
    import numpy as np

    from dimefm_edge.data.scenes import scene_image
    from dimefm_edge.preprocess import resize_image
    from dimefm_edge.runtime.engines import load_engine

    scenes = [scene_image(row) for row in range(_PARITY_IMAGES)]
    pixels = np.stack([resize_image(scene, bundle.preprocess) for scene in scenes])
    cosines = (engine.encode_pixels(pixels) * load_engine(bundle).encode_pixels(pixels)).sum(1)
    least, allowed = float(cosines.min()), _MIN_COSINE.get(precision, _MIN_COSINE_OTHERS)
    if not least >= allowed:  # NaN is not
        raise ParityError(
            f"the engine does not answer as ONNX Runtime does: least cosine {least:.4f} over "
            f"{len(pixels)} images (allowed: {allowed})",
            hint=f"dimefm-edge build {bundle.path} --precision fp32 --rebuild",
        )
    return least


def _report(
    options: BuildOptions, bundle: Bundle, built: BuiltEngine, engine: TensorRtEngine
) -> Outcome:
    facts, machine = built.artifact.facts, built.machine
    precision = facts["options"]["precision"] or bundle.precision
    cosine = check_against_onnx(engine, bundle, precision=precision)
    reports = _accuracy(options.data, bundle, engine)
    times = engine.layer_times_ms(engine.min_batch) if options.profile else {}
    values = {
        "engine": str(built.artifact.path),
        "was_cached": built.was_cached,
        "size_mib": built.artifact.size_mib,
        "gpu": facts["gpu"],
        "tensorrt": machine.tensorrt,
        "precision": precision,
        "typing": facts["typing"],
        "options": facts["options"],
        "build_s": facts["build_s"],
        "attention": facts["attention"],
        "layers": [
            layer | ({"time_ms": times.get(layer["name"])} if times else {})
            for layer in facts["layers"]
        ],
        "min_cosine": cosine,
        "accuracy": reports,
    }
    return Outcome(values, _text(values, times))


def _accuracy(
    sources: Sequence[str], bundle: Bundle, engine: TensorRtEngine
) -> list[dict[str, Any]]:
    if not sources:
        return []
    from dimefm_edge.data.images import open_labelled
    from dimefm_edge.subjects import bundle_subject

    sets = [open_labelled(source) for source in sources]
    subject = bundle_subject(bundle, engine)
    return [asdict(report) for report in evaluate_subject(subject, sets)]


def _text(values: dict[str, Any], times: dict[str, float]) -> str:
    from dimefm_edge.runtime.tensorrt_inspect import AttentionFusion

    how = "found in the cache" if values["was_cached"] else f"built in {values['build_s']:.0f} s"
    least, usual, largest = values["options"]["batch"]
    fusion = AttentionFusion(**values["attention"])
    lines = [
        f"{values['engine']}: {values['precision']}, {values['typing'].split(':')[0]}ly typed, "
        f"{values['size_mib']:.1f} MiB, {how}",
        f"{values['gpu']['name']} ({values['gpu']['sm']}), TensorRT {values['tensorrt']}; batch "
        f"{least} to {largest}, best at {usual}",
        f"{len(values['layers'])} layers; {fusion.describe()}",
        *([_FUSE_HINT] if fusion.unfused and values["typing"] == "strong" else []),
        f"least cosine to ONNX Runtime: {values['min_cosine']:.6f}",
    ]
    if values["accuracy"]:
        rows = [
            (r["name"], r["num_classes"], r["num_images"], r["top1_pct"], r["top5_pct"])
            for r in values["accuracy"]
        ]
        headers = ("zero-shot, on the engine", "classes", "images", "top-1 %", "top-5 %")
        lines += ["", format_table(headers, rows)]
    if times:
        slowest = sorted(times.items(), key=lambda item: -item[1])[:_SLOWEST]
        kinds = {layer["name"]: layer["kind"] for layer in values["layers"]}
        layers = [(name, kinds.get(name, ""), 1000 * ms) for name, ms in slowest]
        lines += ["", format_table(("slowest layers", "kind", "us"), layers)]
    return "\n".join(lines)
