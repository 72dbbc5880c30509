"""What a worker calls: one model loaded in its runtime, with inputs made for it."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from dimefm_edge.bench.prepare import Prepared, image_module
from dimefm_edge.errors import CheckpointError, InputError, MissingExtraError
from dimefm_edge.manifest import INPUT_NAME
from dimefm_edge.preprocess import PreprocessSpec, normalise_pixels

Feed = dict[str, npt.NDArray[Any]]
"""Inputs by name, images along the first axis."""

_DTYPES = {
    "tensor(float)": np.float32, "tensor(float16)": np.float16, "tensor(uint8)": np.uint8,
    "tensor(int64)": np.int64, "tensor(int32)": np.int32, "tensor(bool)": np.bool_,
}  # fmt: skip
_ANY_SIZE = 224


@dataclass(frozen=True)
class Load:
    """How a worker is to load and feed its model."""

    batch_size: int = 1
    threads: int = 1
    image_size: int = _ANY_SIZE
    """For sides that a graph leaves open, in pixels."""
    seed: int = 0


@dataclass(frozen=True)
class Runnable:
    """A loaded model."""

    run: Callable[[Feed], Any]
    """One call; of image models, the embeddings (B, E)."""
    make: Callable[[np.random.Generator, int], Feed]
    """Random inputs for so many images."""
    of_pixels: Callable[[npt.NDArray[np.uint8]], Feed] | None = None
    """(B, S, S, 3) uint8, resized, RGB -> inputs; None where preprocessing is not known."""
    takes_pixels: bool = False
    """Whether its graph takes uint8 pixels and normalises them itself."""
    is_exact: bool = False
    """Whether its images are prepared as in training, not as the runtime does it."""
    fixed_batch: int | None = None
    """Images that a call must have, where the graph fixes them."""
    owner: object = None
    """The bundle, session or module; kept alive with it."""
    engine: object = None
    """A bundle's engine."""


def load_runnable(prepared: Prepared, load: Load) -> Runnable:
    """Load a model that was prepared.

    Raises:
        DimeFMError: If the runtime cannot load it, or it takes another batch size only.
    """
    return LOADERS[prepared.loader](prepared, load)


def make_feed(runnable: Runnable, load: Load) -> Feed:
    """One batch of random inputs, the same for the same seed."""
    return runnable.make(np.random.default_rng(load.seed), load.batch_size)


def stack(feeds: Sequence[Feed]) -> Feed:
    """Several inputs as one batch."""
    return {name: np.concatenate([feed[name] for feed in feeds]) for name in feeds[0]}


# ---------------------------------------------------------------------------- loaders


def _load_bundle(prepared: Prepared, load: Load) -> Runnable:
    from dimefm_edge.runtime import load_bundle, load_engine

    bundle = load_bundle(Path(prepared.path))
    fixed = bundle.manifest.get("graph", {}).get("batch_size")
    if fixed is not None:
        _check_batch(prepared.path, {int(fixed)}, load.batch_size)
    engine = load_engine(bundle, threads=load.threads, engine=prepared.option)
    side, takes_numbers = bundle.preprocess.image_size, bundle.image_input == "float"

    def of_pixels(pixels: npt.NDArray[np.uint8]) -> Feed:
        return {"image": normalise_pixels(pixels, bundle.preprocess) if takes_numbers else pixels}

    def make(rng: np.random.Generator, count: int) -> Feed:
        return of_pixels(rng.integers(0, 256, size=(count, side, side, 3)).astype(np.uint8))

    encode: Callable[[Any], Any] = engine.encode_image if takes_numbers else engine.encode_pixels
    return Runnable(lambda feed: encode(feed["image"]), make, of_pixels,
        takes_pixels=not takes_numbers, fixed_batch=fixed, owner=bundle, engine=engine)  # fmt: skip


def _load_onnx(prepared: Prepared, load: Load) -> Runnable:
    from dimefm_edge.runtime.onnxruntime import first_line, load_session
    from dimefm_edge.runtime.providers import choose_providers, session_providers

    import onnxruntime  # isort: skip

    path = Path(prepared.path)
    if not path.is_file():
        raise CheckpointError(f"no ONNX file at {path}", hint="check the path")
    names = choose_providers((), onnxruntime.get_available_providers(), asked=prepared.option)
    providers = session_providers(names, precision="fp32")
    session = load_session(path, load.threads, providers, precision=prepared.precision)
    entries = session.get_inputs()
    unknown = [entry.type for entry in entries if entry.type not in _DTYPES]
    if unknown:
        raise InputError(
            f"{path} takes {unknown[0]}, for which bench makes no inputs",
            hint="write FILE.py:FUNCTION that calls it",
        )
    fixed = {e.shape[0] for e in entries if e.shape and isinstance(e.shape[0], int)}
    if fixed:
        _check_batch(str(path), fixed, load.batch_size)
    side = prepared.image_size or load.image_size
    shapes = {e.name: (tuple(e.shape), np.dtype(_DTYPES[e.type])) for e in entries}

    takes_pixels = shapes[entries[0].name][1] == np.uint8

    def run(feed: Feed) -> Any:
        return session.run(None, feed)[0]

    runnable = Runnable(
        run, lambda rng, count: _random_feed(shapes, rng, count, side),
        _of_pixels(prepared, takes_pixels=takes_pixels), takes_pixels=takes_pixels,
        fixed_batch=load.batch_size if fixed else None, owner=session,
    )  # fmt: skip
    try:
        run(make_feed(runnable, load))
    except Exception as error:  # ONNX Runtime's errors share no public base
        raise CheckpointError(
            f"ONNX Runtime cannot run {path}: {first_line(error)}",
            hint="--image-size and --batch-size, if it wants others; else export it again",
        ) from error
    return runnable


def compile_openvino(path: str, load: Load, **more: Any) -> Any:
    """A graph compiled for the CPU, in float32, for latency; `more`: OpenVINO's own settings.

    Raises:
        CheckpointError: If OpenVINO cannot load it.
        MissingExtraError: If OpenVINO is not installed.
    """
    try:
        import openvino
    except ImportError as error:
        raise MissingExtraError("OpenVINO is not installed", hint="pip install openvino") from error
    settings = {"PERFORMANCE_HINT": "LATENCY", "INFERENCE_NUM_THREADS": load.threads}
    # By default OpenVINO may compute float graphs in bf16 where the CPU has it.
    settings["INFERENCE_PRECISION_HINT"] = "f32"
    try:
        core = openvino.Core()
        return core.compile_model(core.read_model(path), "CPU", settings | more)
    except Exception as error:  # RuntimeError and whatever its plugins raise
        raise CheckpointError(
            f"OpenVINO cannot load {path}: {str(error).strip().splitlines()[0]}",
            hint="leave @openvino out",
        ) from error


def _load_openvino(prepared: Prepared, load: Load) -> Runnable:
    side = prepared.image_size or load.image_size
    compiled = compile_openvino(prepared.path, load)
    shapes = {}
    for entry in compiled.inputs:
        shape = tuple(d.get_length() if d.is_static else None for d in entry.partial_shape)
        shapes[entry.any_name] = (shape, np.dtype(entry.element_type.to_dtype()))
    fixed = {shape[0] for shape, _ in shapes.values() if shape and shape[0] is not None}
    if fixed:
        _check_batch(prepared.path, fixed, load.batch_size)
    request = compiled.create_infer_request()
    return Runnable(
        lambda feed: request.infer(feed, share_inputs=True)[0],
        lambda rng, count: _random_feed(shapes, rng, count, side),
        _of_pixels(prepared, takes_pixels=False),
        fixed_batch=load.batch_size if fixed else None,
        owner=compiled,
    )


def _load_torch(prepared: Prepared, load: Load) -> Runnable:
    import torch

    torch.set_num_threads(load.threads)
    module, spec = image_module(prepared.path, prepared.kind, seed=load.seed)
    for parameter in module.parameters():
        parameter.requires_grad_(False)
    if prepared.option == "compile":
        module = torch.compile(module)  # type: ignore[assignment]

    def run(feed: Feed) -> Any:
        with torch.inference_mode():
            return module(torch.from_numpy(feed["image"])).numpy()

    side = spec.image_size
    shapes = {"image": ((None, 3, side, side), np.dtype(np.float32))}
    return Runnable(
        run, lambda rng, count: _random_feed(shapes, rng, count, side),
        lambda pixels: {"image": normalise_pixels(pixels, spec)}, is_exact=True, owner=module,
    )  # fmt: skip


def _load_python(prepared: Prepared, load: Load) -> Runnable:
    """A user's own function: it takes the batch size and gives the call to time."""
    file, _, name = prepared.path.rpartition(":")
    path = Path(file).expanduser()
    module_spec = importlib.util.spec_from_file_location(path.stem, path)
    if module_spec is None or module_spec.loader is None:
        raise InputError(f"{path} is not a Python file", hint="FILE.py:FUNCTION")
    module = importlib.util.module_from_spec(module_spec)
    module_spec.loader.exec_module(module)
    function = getattr(module, name, None)
    if not callable(function):
        raise InputError(f"{path} has no function {name}", hint="FILE.py:FUNCTION")
    call = function(load.batch_size)
    if not callable(call):
        raise InputError(
            f"{prepared.path} gave no call to time", hint="return a function without arguments"
        )
    return Runnable(lambda feed: call(), lambda rng, count: {})


LOADERS: dict[str, Callable[[Prepared, Load], Runnable]] = {
    "bundle": _load_bundle,
    "onnx": _load_onnx,
    "openvino": _load_openvino,
    "torch": _load_torch,
    "python": _load_python,
}


# ----------------------------------------------------------------------------- inputs


def _random_feed(
    shapes: dict[str, tuple[tuple[Any, ...], np.dtype[Any]]],
    rng: np.random.Generator,
    count: int,
    side: int,
) -> Feed:
    feed = {}
    for name, (shape, dtype) in shapes.items():
        sizes = [d if isinstance(d, int) else side if i else count for i, d in enumerate(shape)]
        is_real = np.issubdtype(dtype, np.floating)
        values = rng.normal(size=sizes) if is_real else rng.integers(0, 2, size=sizes)
        feed[name] = values.astype(dtype)
    return feed


def _of_pixels(
    prepared: Prepared, *, takes_pixels: bool
) -> Callable[[npt.NDArray[np.uint8]], Feed] | None:
    if prepared.preprocess is None:
        return None
    spec = PreprocessSpec.from_dict(prepared.preprocess)
    if takes_pixels:
        return lambda pixels: {INPUT_NAME: pixels}
    return lambda pixels: {INPUT_NAME: normalise_pixels(pixels, spec)}


def _check_batch(path: str, fixed: set[int], batch_size: int) -> None:
    if batch_size in fixed:
        return
    sizes = ", ".join(map(str, sorted(fixed)))
    raise InputError(
        f"{path} takes batches of {sizes} only, not {batch_size}", hint=f"--batch-size {sizes}"
    )
