"""Models brought into the file that their runtime takes; each in a process of its own.

`python -m dimefm_edge.bench.prepare JSON` does one and prints what it made: exporting must not
leave torch in the memory of the process that is measured. Runs and teachers are exported by us
(`onnxruntime`), or as torch alone does it (`plain`).
"""

from __future__ import annotations

import contextlib
import io
import json
import logging
import shutil
import sys
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dimefm_edge.bench.specs import SubjectSpec
from dimefm_edge.errors import (
    CheckpointError,
    DimeFMError,
    ExportError,
    MissingExtraError,
    ParityError,
    missing_package,
)
from dimefm_edge.preprocess import PreprocessSpec

if TYPE_CHECKING:
    from torch import nn

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Prepared:
    """What a worker loads."""

    loader: str
    """A name in `runnable.LOADERS`."""
    runtime: str
    """What runs it, as the table says it."""
    path: str
    """A file, a bundle's folder, or the model's name for what torch builds."""
    kind: str
    """The spec's."""
    option: str = ""
    """ONNX Runtime's execution provider, an engine's name, eager or compile."""
    precision: str = "fp32"
    """Of an ONNX file of ours, as it tells itself; a bundle tells its own."""
    image_size: int | None = None
    """Side of the square input in pixels, where it is known."""
    preprocess: dict[str, Any] | None = None
    """A `PreprocessSpec`; None where how images are prepared is not known."""
    size_mib: float | None = None
    """Of the model's file."""
    params_m: float | None = None
    """Parameters of the image side in millions, where torch built it."""
    counted_on: str = ""
    """The graph whose work is counted: quantising loses the shapes of some nodes."""
    notes: list[str] = field(default_factory=list)


def prepare(spec: SubjectSpec, folder: Path, *, seed: int = 0) -> Prepared:
    """Make what a runtime needs of a model.

    Args:
        spec: The model.
        folder: An empty folder for files; must outlive the worker.
        seed: For random weights, where a name asks for them.

    Raises:
        DimeFMError: If the model cannot be loaded or exported for this runtime.
    """
    runtime, _, option = spec.runtime.partition(":")
    if spec.kind == "python":
        return Prepared("python", "Python", spec.name, spec.kind)
    if spec.kind == "bundle":
        return _prepare_bundle(spec, folder, runtime, option)
    if spec.kind == "onnx":
        return _of_file(Path(spec.name).expanduser(), spec, folder, runtime, option)
    return _prepare_module(spec, folder, runtime, option, seed)


def _prepare_bundle(spec: SubjectSpec, folder: Path, runtime: str, option: str) -> Prepared:
    from dimefm_edge.runtime import load_bundle
    from dimefm_edge.runtime.engines import warn_of_quantization

    path = Path(spec.name).expanduser()
    bundle = load_bundle(path)
    if runtime == "onnxruntime":
        warn_of_quantization(bundle)  # here: what a worker logs is not shown
    known: dict[str, Any] = {
        "image_size": bundle.preprocess.image_size,
        "preprocess": bundle.preprocess.to_dict(),
    }
    if runtime in ("openvino", "dynamic-int8"):
        graph = folder / "bundle.onnx"
        shutil.copyfile(bundle.model_path, graph)  # a zipped bundle's files go with it
        return _of_file(graph, spec, folder, runtime, option, **known)
    title = "ONNX Runtime" if runtime == "onnxruntime" else spec.runtime
    title += f" ({option})" if option else ""
    return Prepared(
        "bundle", title, str(path), spec.kind, spec.runtime, size_mib=bundle.size_mib, **known
    )


def _of_file(
    path: Path, spec: SubjectSpec, folder: Path, runtime: str, option: str, **known: Any
) -> Prepared:
    if not path.is_file():
        raise CheckpointError(f"no ONNX file at {path}", hint="check the path")
    known["counted_on"] = str(path)
    if spec.kind == "onnx" and runtime == "onnxruntime":
        from dimefm_edge.runtime.onnxruntime import told_precision

        known["precision"] = told_precision(path)  # here: the worker's loading is timed
    if runtime == "dynamic-int8":
        path = _quantised(path, folder / "dynamic-int8.onnx")
    loader, title = ("openvino", "OpenVINO") if runtime == "openvino" else ("onnx", "ONNX Runtime")
    weights = path.with_name(path.name + ".data")
    size = sum(p.stat().st_size for p in (path, weights) if p.is_file()) / 2**20
    title += f" ({option})" if option else ""
    return Prepared(loader, title, str(path), spec.kind, option or "cpu", size_mib=size, **known)


def _quantised(path: Path, out: Path) -> Path:
    """ONNX Runtime's own dynamic int8: weights per channel, MatMuls and Gemms only."""
    try:
        from onnxruntime.quantization import QuantType, quantize_dynamic
    except ImportError as error:
        raise MissingExtraError(
            f"ONNX Runtime's quantiser needs {error.name}",
            hint="pip install 'dimefm_edge[bench]'",
        ) from error
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            # Convolutions would become ConvInteger, which ONNX Runtime lacks for many shapes.
            quantize_dynamic(
                path, out, per_channel=True, weight_type=QuantType.QInt8,
                op_types_to_quantize=["MatMul", "Gemm"],
            )  # fmt: skip
    except Exception as error:  # whatever onnx and its shape inference raise
        raise ExportError(
            f"ONNX Runtime cannot quantise {path.name}: {error}", hint="leave @dynamic-int8 out"
        ) from error
    return out


def _prepare_module(
    spec: SubjectSpec, folder: Path, runtime: str, option: str, seed: int
) -> Prepared:
    module, preprocess = image_module(spec.name, spec.kind, seed=seed)
    known: dict[str, Any] = {
        "image_size": preprocess.image_size,
        "preprocess": preprocess.to_dict(),
        "params_m": sum(p.numel() for p in module.parameters()) / 1e6,
    }
    in_torch = Prepared(
        "torch", "PyTorch" if runtime != "compile" else "torch.compile", spec.name, spec.kind,
        runtime if runtime == "compile" else "eager", **known,
    )  # fmt: skip
    if runtime in ("eager", "compile"):
        return in_torch
    path = folder / "model.onnx"
    try:
        if runtime == "plain":
            export_plain(module, path, side=preprocess.image_size)
        else:
            _export_ours(module, path, preprocess.image_size)
    except (ExportError, ParityError) as error:
        if runtime != "onnxruntime":
            raise
        note = f"measured in PyTorch, it cannot be exported: {error.args[0]}"
        return Prepared(**(asdict(in_torch) | {"notes": [note]}))
    return _of_file(path, spec, folder, runtime, option, **known)


def image_module(name: str, kind: str, *, seed: int) -> tuple[nn.Module, PreprocessSpec]:
    """A model's image side on the CPU, (B, 3, S, S) float32 -> (B, E), and its preprocessing.

    Raises:
        DimeFMError: If it cannot be loaded.
    """
    import torch

    torch.manual_seed(seed)
    if kind == "timm":
        return _timm_module(name.partition(":")[2])
    if kind == "run":
        from dimefm_edge.students import load_student

        loaded = load_student(Path(name).expanduser())
        return loaded.student.eval(), loaded.preprocess
    from dimefm_edge.encoders import Normalised
    from dimefm_edge.teacher import load_teacher

    teacher = load_teacher(name, device="cpu")
    return Normalised(teacher.image_tower).eval(), teacher.preprocess


def _timm_module(name: str) -> tuple[nn.Module, PreprocessSpec]:
    """A timm model without its classifier, random weights: nothing is downloaded."""
    import timm
    from timm.data.config import resolve_data_config

    from dimefm_edge.errors import lookup

    lookup(dict.fromkeys(timm.list_models()), name.partition(".")[0], kind="timm model")
    model = timm.create_model(name.partition(".")[0], pretrained=False, num_classes=0).eval()
    config: dict[str, Any] = resolve_data_config(model=model)  # type: ignore[no-untyped-call]
    preprocess = PreprocessSpec(
        config["input_size"][-1], tuple(config["mean"]), tuple(config["std"]),
        config["interpolation"] if config["interpolation"] != "random" else "bicubic",
    )  # fmt: skip
    return model, preprocess


def _export_ours(module: nn.Module, path: Path, side: int) -> None:
    import numpy as np

    from dimefm_edge.export import export_onnx, graph_spec

    images = np.random.default_rng(0).normal(size=(4, 3, side, side)).astype(np.float32)
    export_onnx(
        module, path, image_size=side, parity_images=images, metadata={}, spec=graph_spec(None)
    )


def export_plain(module: nn.Module, path: Path, *, side: int, opset: int | None = None) -> None:
    """torch's exporter with its defaults and a dynamic batch: what a user would get.

    Args:
        module: (B, 3, S, S) -> (B, E), in eval mode.
        path: The file to write.
        side: S, in pixels.
        opset: None: torch's own choice.

    Raises:
        ExportError: If torch cannot export it.
    """
    import torch

    chosen: dict[str, Any] = {} if opset is None else {"opset_version": opset}
    with contextlib.redirect_stdout(io.StringIO()), torch.no_grad():
        try:
            program = torch.onnx.export(
                module, (torch.zeros(2, 3, side, side),), dynamo=True, verbose=False,
                input_names=["image"], output_names=["image_embeds"],
                dynamic_shapes=({0: torch.export.Dim("batch")},), **chosen,
            )  # fmt: skip
            assert program is not None
            program.save(path)
        except Exception as error:  # the exporter's errors share no base
            first = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise ExportError(
                f"torch.onnx.export cannot export it: {first}", hint="leave @plain out"
            ) from error


def _main(words: list[str]) -> int:
    values = json.loads(words[0])
    logging.basicConfig(level=logging.WARNING, stream=sys.stderr)
    try:
        with contextlib.redirect_stdout(sys.stderr):
            prepared = prepare(
                SubjectSpec(**values["spec"]), Path(values["folder"]), seed=values["seed"]
            )
    except (DimeFMError, ModuleNotFoundError) as error:
        known = error if isinstance(error, DimeFMError) else missing_package(error)
        answer = {"error": str(known.args[0]), "hint": known.hint, "kind": type(known).__name__}
        print(json.dumps(answer))
        return known.exit_code
    print(json.dumps(asdict(prepared)))
    return 0


if __name__ == "__main__":
    sys.exit(_main(sys.argv[1:]))
