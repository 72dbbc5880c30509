"""The ONNX Runtime engine: runs a bundle's graph on the CPU of any device."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from dimefm_edge.errors import CheckpointError, DimeFMError, MissingExtraError
from dimefm_edge.manifest import EXPORT_AGAIN, INPUT_NAME, OUTPUT_NAME
from dimefm_edge.preprocess import PreprocessSpec, normalise_pixels
from dimefm_edge.targets.cpu import int8_products_saturate

_ERRORS_ONLY = 3
_CPUS = Path("/sys/devices/system/cpu")


class OnnxRuntimeEngine:
    """A graph in ONNX Runtime; calls from several threads are safe.

    Attributes:
        threads: Threads of one call.
        embed_dim: Size E of the embeddings.
    """

    def __init__(
        self, model_path: Path, *, preprocess: PreprocessSpec, embed_dim: int, threads: int = 0
    ) -> None:
        """Load a graph.

        Args:
            model_path: The `.onnx` file, already checked.
            preprocess: Gives the image size and the normalisation.
            embed_dim: Size E that the graph must answer in.
            threads: 0 takes one per physical core that this process may use.

        Raises:
            CheckpointError: If ONNX Runtime cannot load the graph, or it is not `image` to
                `image_embeds` of these sizes.
            MissingExtraError: If ONNX Runtime is not installed.
        """
        if threads < 0:
            raise ValueError(f"threads must not be negative, got {threads}")
        self.threads = threads or count_physical_cores()
        self.embed_dim = embed_dim
        self._preprocess = preprocess
        self._session = _load_session(model_path, self.threads)
        self._check_signature(model_path)

    def encode_image(self, image: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
        """Embed preprocessed images: (B, 3, S, S) float32 -> (B, E) float32, L2-normalised.

        Raises:
            DimeFMError: If ONNX Runtime fails, for want of memory say.
            ValueError: If the shape or type is another.
        """
        side = self._preprocess.image_size
        if image.ndim != 4 or image.shape[1:] != (3, side, side) or image.dtype != np.float32:
            raise ValueError(
                f"image must be (B, 3, {side}, {side}) float32, got {image.shape} {image.dtype}"
            )
        if not len(image):
            return np.empty((0, self.embed_dim), np.float32)
        try:
            (embeds,) = self._session.run([OUTPUT_NAME], {INPUT_NAME: image})
        except Exception as error:  # no public base but Exception
            raise DimeFMError(
                f"ONNX Runtime cannot run the model on {len(image)} images: {_reason(error)}",
                hint="fewer images at once, or close something: memory may have run out",
            ) from error
        return np.asarray(embeds, np.float32)

    def encode_pixels(self, pixels: npt.NDArray[np.uint8]) -> npt.NDArray[np.float32]:
        """Embed resized images: (B, S, S, 3) uint8, RGB -> (B, E) float32, L2-normalised."""
        if pixels.ndim != 4 or pixels.shape[3] != 3 or pixels.dtype != np.uint8:
            raise ValueError(
                f"pixels must be (B, S, S, 3) uint8, got {pixels.shape} {pixels.dtype}"
            )
        return self.encode_image(normalise_pixels(pixels, self._preprocess))

    def _check_signature(self, model_path: Path) -> None:
        side = self._preprocess.image_size
        inputs = {i.name: (i.type, list(i.shape[1:])) for i in self._session.get_inputs()}
        outputs = {o.name: (o.type, list(o.shape[1:])) for o in self._session.get_outputs()}
        wanted_in = {INPUT_NAME: ("tensor(float)", [3, side, side])}
        wanted_out = {OUTPUT_NAME: ("tensor(float)", [self.embed_dim])}
        if inputs != wanted_in or outputs != wanted_out:
            raise CheckpointError(
                f"{model_path} takes {inputs} and gives {outputs}; the manifest says {wanted_in} "
                f"and {wanted_out}",
                hint=EXPORT_AGAIN,
            )


def _load_session(model_path: Path, threads: int) -> Any:
    try:
        import onnxruntime  # type: ignore[import-untyped]
    except ImportError as error:
        raise MissingExtraError(
            "ONNX Runtime is not installed", hint="pip install onnxruntime"
        ) from error
    options = onnxruntime.SessionOptions()
    # A count of our own also stops ONNX Runtime from pinning threads to cores, which fails
    # loudly where a container does not own them all.
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.execution_mode = onnxruntime.ExecutionMode.ORT_SEQUENTIAL
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL
    options.log_severity_level = _ERRORS_ONLY
    options.add_session_config_entry("session.set_denormal_as_zero", "1")
    if int8_products_saturate():  # a graph made for another CPU answers right here too
        options.add_session_config_entry("session.x64quantprecision", "1")
    try:
        return onnxruntime.InferenceSession(
            str(model_path), options, providers=["CPUExecutionProvider"]
        )
    # ONNX Runtime's own exceptions share no public base but Exception.
    except Exception as error:
        raise CheckpointError(
            f"ONNX Runtime {onnxruntime.__version__} cannot load {model_path}: {_reason(error)}",
            hint="pip install --upgrade onnxruntime, or " + EXPORT_AGAIN,
        ) from error


def _reason(error: Exception) -> str:
    """The first line of what ONNX Runtime says."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def count_physical_cores() -> int:
    """Cores that this process may use, hyper-threads counted once; at least 1."""
    if not hasattr(os, "sched_getaffinity"):
        return os.cpu_count() or 1
    cpus = os.sched_getaffinity(0)
    cores = set()
    for cpu in cpus:
        try:
            siblings = (_CPUS / f"cpu{cpu}/topology/thread_siblings_list").read_text().strip()
        except OSError:
            siblings = str(cpu)
        cores.add(siblings)
    return max(1, len(cores))
