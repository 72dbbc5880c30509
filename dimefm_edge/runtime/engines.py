"""Engines: what can run a bundle's graph, by name."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

import numpy as np
import numpy.typing as npt

from dimefm_edge.errors import lookup
from dimefm_edge.runtime.aot_inductor import AotInductorEngine
from dimefm_edge.runtime.bundle import Bundle
from dimefm_edge.runtime.onnxruntime import OnnxRuntimeEngine
from dimefm_edge.runtime.providers import AUTO
from dimefm_edge.targets.cpu import cpu_quant_rules

logger = logging.getLogger(__name__)


class Engine(Protocol):
    """The thing that runs a bundle's graph."""

    embed_dim: int
    takes_any_size: bool
    """Whether `encode_pixels` takes (B, H, W, 3) and resizes: then nobody else should."""

    def encode_image(self, image: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
        """(B, 3, S, S) float32, preprocessed -> (B, E) float32, L2-normalised."""

    def encode_pixels(self, pixels: npt.NDArray[np.uint8]) -> npt.NDArray[np.float32]:
        """(B, S, S, 3) uint8, resized, RGB -> (B, E) float32, L2-normalised."""


def _load_onnxruntime(bundle: Bundle, threads: int, provider: str) -> Engine:
    warn_of_quantization(bundle)
    graph = bundle.manifest.get("graph", {})
    return OnnxRuntimeEngine(
        bundle.model_path,
        preprocess=bundle.preprocess,
        embed_dim=bundle.embed_dim,
        threads=threads,
        batch_size=graph.get("batch_size"),
        image_input=bundle.image_input,
        precision=bundle.precision,
        providers=graph.get("providers", ()),
        provider=provider or AUTO,
    )


def warn_of_quantization(bundle: Bundle) -> None:
    """Say so when 8 bits were made for another place: right answers, but not this CPU's speed."""
    made_for = (bundle.manifest.get("quantization") or {}).get("rules")
    if made_for is None:
        return
    here = cpu_quant_rules()
    if made_for != here:
        _tell_once(bundle.precision, made_for, here)


@functools.cache
def _tell_once(precision: str, made_for: str, here: str) -> None:
    logger.warning(
        "this %s is made for %s and this CPU wants %s: the answers are right, but others would "
        "come faster. try: dimefm-edge export RUN --precision int8 --target local",
        precision, made_for, here,
    )  # fmt: skip


def _load_tensorrt(bundle: Bundle, threads: int, option: str) -> Engine:
    from dimefm_edge.runtime.tensorrt import open_engine

    return open_engine(bundle)


def _load_aot_inductor(bundle: Bundle, threads: int, option: str) -> Engine:
    return AotInductorEngine(bundle, threads=threads)


ENGINES: dict[str, Callable[[Bundle, int, str], Engine]] = {
    "onnxruntime": _load_onnxruntime,
    "tensorrt": _load_tensorrt,
    "aot-inductor": _load_aot_inductor,
}
"""By name: (bundle, threads, what follows the name and a colon)."""


def load_engine(bundle: Bundle, *, threads: int = 0, engine: str = "onnxruntime") -> Engine:
    """Load a bundle's graph into an engine.

    Args:
        bundle: A checked bundle; keep it while the engine is loaded.
        threads: CPU threads of one call; 0 takes one per physical core.
        engine: A name in `ENGINES`, or an `.engine` file that TensorRT built of this bundle.
            ONNX Runtime's execution provider may follow, as in `onnxruntime:cuda`, else it is
            the first of the target's that is installed.

    Raises:
        CheckpointError: If the engine cannot load the graph; if TensorRT's was not built yet,
            or was built for another GPU, TensorRT or bundle.
        DimeFMError: If the execution provider does not start.
        MissingExtraError: If the engine's package is not installed.
        UnknownNameError: If there is no such engine or provider.
    """
    if engine.endswith(".engine"):
        from dimefm_edge.runtime.tensorrt import open_engine

        return open_engine(bundle, Path(engine).expanduser())
    name, _, option = engine.partition(":")
    return lookup(ENGINES, name, kind="engine")(bundle, threads, option)
