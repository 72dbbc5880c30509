"""Models made ready to be timed side by side, each in ONNX Runtime where it can be.

A teacher or a run is exported to a temporary file first, so that the ratio compares models
and not runtimes. `python -m dimefm_edge.bench FILE BATCH SIZE THREADS` runs one file and prints
the memory that took, in a process of its own.
"""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from dimefm_edge.errors import (
    CheckpointError,
    ExportError,
    InputError,
    ParityError,
)
from dimefm_edge.latency.measure import LatencyReport, measure_interleaved, peak_rss_mib
from dimefm_edge.preprocess import normalise_pixels
from dimefm_edge.runtime.onnxruntime import count_physical_cores, import_onnxruntime
from dimefm_edge.subjects import subject_kind

logger = logging.getLogger(__name__)

_DTYPES = {
    "tensor(float)": np.float32, "tensor(float16)": np.float16, "tensor(uint8)": np.uint8,
    "tensor(int64)": np.int64, "tensor(int32)": np.int32,
}  # fmt: skip
_MEMORY_TIMEOUT_S = 300


@dataclass(frozen=True)
class Runnable:
    """One call of a model on one batch."""

    name: str
    runtime: str
    """ONNX Runtime, another engine by name, or PyTorch for what cannot be exported."""
    call: Callable[[], object]
    size_mib: float | None
    memory_mib: float | None
    """Peak resident memory that loading and running it adds to a bare process."""
    owner: object = None
    """Kept alive with it: the files of a zipped bundle last as long as the bundle."""


@dataclass(frozen=True)
class BenchRow:
    """A model's latency here, beside that of the first model."""

    runtime: str
    memory_mib: float | None
    ratio: float
    """Its p50 over the first model's."""
    latency: LatencyReport

    def to_dict(self) -> dict[str, Any]:
        """Flat plain values, for JSON; the process's own peak is of no use here."""
        values = asdict(self.latency) | {
            "runtime": self.runtime, "memory_mib": self.memory_mib, "ratio": self.ratio,
        }  # fmt: skip
        del values["peak_rss_mib"]
        return values


def bench_models(
    names: Sequence[str],
    folder: Path,
    *,
    batch_size: int = 1,
    engine: str = "onnxruntime",
    threads: int = 0,
    seconds: float = 10.0,
    image_size: int = 224,
) -> list[BenchRow]:
    """Time models in turn.

    Args:
        names: Bundles, runs, ONNX files and teachers; the first is compared to.
        folder: Where teachers and runs are exported to; must live until this returns.
        batch_size: Images per call.
        engine: What runs bundles: see `load_engine`. TensorRT's times include the copies to
            the GPU and back.
        threads: CPU threads; 0 takes one per physical core.
        seconds: For each model's timed calls.
        image_size: Side, in pixels, for ONNX files that leave it open.

    Raises:
        InputError: If no model is named, one twice, or a number cannot be.
        DimeFMError: If a model cannot be loaded.
    """
    if not names:
        raise InputError("no model was named", hint="dimefm-edge bench RUN/bundle sample")
    if len(set(names)) < len(names):
        raise InputError("a model is named twice", hint="name each model once")
    if batch_size < 1 or threads < 0 or seconds <= 0 or image_size < 1:
        raise InputError("batch size, seconds and image size must be positive, threads >= 0")
    threads = threads or count_physical_cores()
    models = [
        _engine_runnable(name, engine, batch_size=batch_size)
        if engine != "onnxruntime" and subject_kind(name) == "bundle"
        else _load(
            name, folder / str(i), batch_size=batch_size, threads=threads, image_size=image_size
        )
        for i, name in enumerate(names)
    ]
    reports = measure_interleaved(
        {m.name: m.call for m in models},
        batch_size=batch_size,
        max_seconds=seconds,
        sizes_mib={m.name: m.size_mib for m in models if m.size_mib is not None},
    )
    return [
        BenchRow(model.runtime, model.memory_mib, report.p50_ms / reports[0].p50_ms, report)
        for model, report in zip(models, reports, strict=True)
    ]


def _load(name: str, folder: Path, *, batch_size: int, threads: int, image_size: int) -> Runnable:
    kind = subject_kind(name)
    path = Path(name).expanduser()
    sizes = {"batch_size": batch_size, "image_size": image_size, "threads": threads}
    if kind == "onnx":
        return _onnx_runnable(name, path, None, **sizes)
    if kind == "bundle":
        from dimefm_edge.runtime import load_bundle

        bundle = load_bundle(path)
        return _onnx_runnable(name, bundle.model_path, bundle, **sizes)
    folder.mkdir(parents=True)
    return _torch_runnable(name, folder / "model.onnx", kind=kind, **sizes)


def _engine_runnable(name: str, engine: str, *, batch_size: int) -> Runnable:
    """A bundle in an engine that is not ONNX Runtime on the CPU."""
    from dimefm_edge.runtime import load_bundle, load_engine

    bundle = load_bundle(Path(name).expanduser())
    loaded, side = load_engine(bundle, engine=engine), bundle.preprocess.image_size
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, size=(batch_size, side, side, 3)).astype(np.uint8)
    image = normalise_pixels(pixels, bundle.preprocess)

    def run() -> object:
        takes_numbers = bundle.image_input == "float"
        return loaded.encode_image(image) if takes_numbers else loaded.encode_pixels(pixels)

    return Runnable(name, engine, run, bundle.size_mib, None, bundle)


def _onnx_runnable(
    name: str, path: Path, owner: object, *, batch_size: int, image_size: int, threads: int
) -> Runnable:
    call = onnx_call(path, batch_size=batch_size, image_size=image_size, threads=threads)
    memory = _memory_mib(path, batch_size=batch_size, image_size=image_size, threads=threads)
    weights = path.with_name(path.name + ".data")
    size = path.stat().st_size + (weights.stat().st_size if weights.is_file() else 0)
    return Runnable(name, "ONNX Runtime", call, size / 2**20, memory, owner)


def _torch_runnable(
    name: str, path: Path, *, kind: str, batch_size: int, image_size: int, threads: int
) -> Runnable:
    import torch

    from dimefm_edge.export import export_onnx, graph_spec

    module, side = _image_module(name, kind)
    image = np.random.default_rng(0).normal(size=(batch_size, 3, side, side)).astype(np.float32)
    try:
        export_onnx(
            module, path, image_size=side, parity_images=image[:4], metadata={},
            spec=graph_spec(None),
        )  # fmt: skip
    except (ExportError, ParityError) as error:
        logger.warning("%s is measured in PyTorch: %s", name, error.args[0])
        torch.set_num_threads(threads)
        batch = torch.from_numpy(image)

        def run() -> object:
            with torch.inference_mode():
                return module(batch)

        return Runnable(name, "PyTorch", run, None, None)
    return _onnx_runnable(name, path, None, batch_size=batch_size, image_size=side, threads=threads)


def _image_module(name: str, kind: str) -> tuple[Any, int]:
    """A model's image side on the CPU, giving L2-normalised embeddings, and its image size."""
    if kind == "run":
        from dimefm_edge.students import load_student

        loaded = load_student(Path(name).expanduser())
        return loaded.student, loaded.spec.image_size
    from dimefm_edge.encoders import Normalised
    from dimefm_edge.teacher import load_teacher

    teacher = load_teacher(name, device="cpu")
    return Normalised(teacher.image_tower).eval(), teacher.preprocess.image_size


def onnx_call(
    path: Path, *, batch_size: int, image_size: int, threads: int
) -> Callable[[], list[npt.NDArray[Any]]]:
    """One run of any ONNX file on random inputs.

    Args:
        path: The file.
        batch_size: For an input's first dimension where it is free.
        image_size: For its other free dimensions.
        threads: CPU threads.

    Raises:
        CheckpointError: If ONNX Runtime cannot load or run it.
        InputError: If it takes another batch size only.
        MissingExtraError: If ONNX Runtime is not installed.
    """
    onnxruntime = import_onnxruntime()
    if not path.is_file():
        raise CheckpointError(f"no ONNX file at {path}", hint="check the path")
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3
    options.add_session_config_entry("session.set_denormal_as_zero", "1")
    rng = np.random.default_rng(0)
    try:
        session = onnxruntime.InferenceSession(
            str(path), options, providers=["CPUExecutionProvider"]
        )
        inputs = {}
        for entry in session.get_inputs():
            shape = [
                size if isinstance(size, int) else image_size if i else batch_size
                for i, size in enumerate(entry.shape)
            ]
            dtype = _DTYPES[entry.type]
            is_real = np.issubdtype(dtype, np.floating)
            values = rng.normal(size=shape) if is_real else rng.integers(0, 2, size=shape)
            inputs[entry.name] = values.astype(dtype)
        session.run(None, inputs)
    except Exception as error:  # ONNX Runtime's errors share no public base
        raise CheckpointError(
            f"ONNX Runtime cannot run {path}: {(str(error) or repr(error)).splitlines()[0]}",
            hint="--image-size and --batch-size, if it wants others; else export it again",
        ) from error
    batches = {len(values) for values in inputs.values() if values.ndim}
    if batches and batch_size not in batches:
        fixed = ", ".join(map(str, sorted(batches)))
        raise InputError(
            f"{path} takes batches of {fixed} only, not {batch_size}", hint=f"--batch-size {fixed}"
        )
    return lambda: session.run(None, inputs)


def _memory_mib(path: Path, *, batch_size: int, image_size: int, threads: int) -> float | None:
    words = [str(path), str(batch_size), str(image_size), str(threads)]
    try:
        done = subprocess.run(
            [sys.executable, "-m", "dimefm_edge.bench", *words],
            capture_output=True,
            text=True,
            timeout=_MEMORY_TIMEOUT_S,
            check=True,
            env=os.environ | {"PYTHONPATH": str(Path(__file__).resolve().parents[1])},
        )
        return float(json.loads(done.stdout)["memory_mib"])
    except (OSError, subprocess.SubprocessError, ValueError, KeyError) as error:
        logger.warning("the memory of %s could not be measured: %s", path, error)
        return None


def _main(words: Sequence[str]) -> None:
    import onnxruntime  # type: ignore[import-untyped]  # noqa: F401  (part of the bare process)

    path, batch_size, image_size, threads = words
    before = peak_rss_mib()
    call = onnx_call(
        Path(path), batch_size=int(batch_size), image_size=int(image_size), threads=int(threads)
    )
    for _ in range(3):
        call()
    sys.stdout.write(json.dumps({"memory_mib": peak_rss_mib() - before}))


if __name__ == "__main__":
    _main(sys.argv[1:])
