"""The ONNX Runtime engine: runs a bundle's graph on the CPU of any device, or what it has."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from dimefm_edge.errors import CheckpointError, DimeFMError, MissingExtraError
from dimefm_edge.manifest import EXPORT_AGAIN, INPUT_NAME, LOGITS_NAME, OUTPUT_NAME
from dimefm_edge.preprocess import PreprocessSpec, normalise_pixels
from dimefm_edge.runtime.providers import (
    AUTO,
    check_started,
    choose_providers,
    session_providers,
)
from dimefm_edge.targets.cpu import int8_products_saturate, unwanted_rewrites

_ERRORS_ONLY = 3
_CPUS = Path("/sys/devices/system/cpu")


class OnnxRuntimeEngine:
    """A graph in ONNX Runtime; calls from several threads are safe.

    Attributes:
        threads: Threads of one call.
        embed_dim: Size E of the embeddings.
        takes_any_size: Whether the graph resizes.
        provider: What runs the graph, a name in `providers.PROVIDERS`.
    """

    def __init__(
        self,
        model_path: Path,
        *,
        preprocess: PreprocessSpec,
        embed_dim: int,
        threads: int = 0,
        batch_size: int | None = None,
        image_input: str = "float",
        precision: str = "fp32",
        providers: Sequence[str] = ("cpu",),
        provider: str = AUTO,
    ) -> None:
        """Load a graph.

        Args:
            model_path: The `.onnx` file, already checked.
            preprocess: Gives the image size and the normalisation.
            embed_dim: Size E that the graph must answer in.
            threads: 0 takes one per physical core that this process may use.
            batch_size: The graph's, where it is fixed.
            image_input: One of `manifest.IMAGE_INPUTS`.
            precision: The graph's.
            providers: Names in `providers.PROVIDERS` that the target prefers, in order.
            provider: One of them that must run the model, or `auto`.

        Raises:
            CheckpointError: If ONNX Runtime cannot load the graph, or it is not `image` to
                `image_embeds` of these sizes.
            MissingExtraError: If ONNX Runtime, or the provider, is not installed.
            UnknownNameError: If there is no such provider.
        """
        if threads < 0:
            raise ValueError(f"threads must not be negative, got {threads}")
        self.threads = threads or count_physical_cores()
        self.embed_dim = embed_dim
        self._preprocess = preprocess
        self._batch_size, self._image_input = batch_size, image_input
        self.takes_any_size = image_input == "image"
        names = choose_providers(providers, _available_providers(), asked=provider)
        given = session_providers(names, precision=precision)
        self._session = load_session(model_path, self.threads, given, precision=precision)
        self.provider = check_started(names, self._session.get_providers(), asked=provider)
        self._check_signature(model_path)

    def encode_image(self, image: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
        """Embed preprocessed images: (B, 3, S, S) float32 -> (B, E) float32, L2-normalised.

        Raises:
            DimeFMError: If ONNX Runtime fails, for want of memory say.
            ValueError: If the shape or type is another, or the graph takes pixels.
        """
        if self._image_input != "float":
            raise ValueError("this graph takes pixels and prepares them itself: encode_pixels")
        side = self._preprocess.image_size
        if image.ndim != 4 or image.shape[1:] != (3, side, side) or image.dtype != np.float32:
            raise ValueError(
                f"image must be (B, 3, {side}, {side}) float32, got {image.shape} {image.dtype}"
            )
        return self._run(image)

    def encode_pixels(self, pixels: npt.NDArray[np.uint8]) -> npt.NDArray[np.float32]:
        """Embed resized images: (B, S, S, 3) uint8, RGB -> (B, E) float32, L2-normalised.

        A graph that resizes takes (B, H, W, 3) of any height and width.
        """
        side = self._preprocess.image_size
        is_resized = self.takes_any_size or pixels.shape[1:3] == (side, side)
        if pixels.ndim != 4 or pixels.shape[3] != 3 or pixels.dtype != np.uint8 or not is_resized:
            sides = "H, W" if self.takes_any_size else f"{side}, {side}"
            raise ValueError(
                f"pixels must be (B, {sides}, 3) uint8, got {pixels.shape} {pixels.dtype}"
            )
        if self._image_input != "float":
            return self._run(pixels)
        return self.encode_image(normalise_pixels(pixels, self._preprocess))

    def _run(self, batch: npt.NDArray[Any]) -> npt.NDArray[np.float32]:
        """Any number of images; a graph of a fixed batch gets full ones, the last repeated."""
        count = len(batch)
        if not count:
            return np.empty((0, self.embed_dim), np.float32)
        size = self._batch_size or count
        if missing := -count % size:
            batch = np.concatenate([batch, np.repeat(batch[-1:], missing, axis=0)])
        try:
            pieces = [
                self._session.run([OUTPUT_NAME], {INPUT_NAME: batch[i : i + size]})[0]
                for i in range(0, len(batch), size)
            ]
        except Exception as error:  # no public base but Exception
            raise DimeFMError(
                f"ONNX Runtime cannot run the model on {count} images: {first_line(error)}",
                hint="fewer images at once, or close something: memory may have run out",
            ) from error
        return np.asarray(np.concatenate(pieces)[:count], np.float32)

    def _check_signature(self, model_path: Path) -> None:
        side = self._preprocess.image_size
        inputs = {i.name: (i.type, list(i.shape[1:])) for i in self._session.get_inputs()}
        outputs = {o.name: (o.type, list(o.shape[1:])) for o in self._session.get_outputs()}
        outputs.pop(LOGITS_NAME, None)
        kinds = {
            "float": ("tensor(float)", [3, side, side]),
            "uint8": ("tensor(uint8)", [side, side, 3]),
            "image": ("tensor(uint8)", ["height", "width", 3]),
        }
        wanted_in = {INPUT_NAME: kinds[self._image_input]}
        wanted_out = {OUTPUT_NAME: ("tensor(float)", [self.embed_dim])}
        if inputs != wanted_in or outputs != wanted_out:
            raise CheckpointError(
                f"{model_path} takes {inputs} and gives {outputs}; the manifest says {wanted_in} "
                f"and {wanted_out}",
                hint=EXPORT_AGAIN,
            )
        fixed = self._session.get_inputs()[0].shape[0]
        if isinstance(fixed, int):  # the graph knows best
            self._batch_size = fixed


def import_onnxruntime() -> Any:
    """The package.

    Raises:
        MissingExtraError: If it is not installed.
    """
    try:
        import onnxruntime
    except ImportError as error:
        raise MissingExtraError(
            "ONNX Runtime is not installed", hint="pip install onnxruntime"
        ) from error
    return onnxruntime


def _available_providers() -> list[str]:
    names: list[str] = import_onnxruntime().get_available_providers()
    return names


def load_session(
    model_path: Path,
    threads: int,
    providers: Sequence[Any] = ("CPUExecutionProvider",),
    *,
    precision: str = "fp32",
    profile_prefix: str | None = None,
) -> Any:
    """An InferenceSession; `providers` are as it takes them, `precision` is the graph's.

    With `profile_prefix` it profiles its operators, into a file whose name begins so.

    Raises:
        CheckpointError: If ONNX Runtime cannot load the graph.
        MissingExtraError: If ONNX Runtime is not installed.
    """
    onnxruntime = import_onnxruntime()
    options = onnxruntime.SessionOptions()
    # A count of our own also stops ONNX Runtime from pinning threads to cores, which fails
    # loudly where a container does not own them all.
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.execution_mode = onnxruntime.ExecutionMode.ORT_SEQUENTIAL
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL
    options.log_severity_level = _ERRORS_ONLY
    if profile_prefix is not None:
        options.enable_profiling, options.profile_file_prefix = True, profile_prefix
    options.add_session_config_entry("session.set_denormal_as_zero", "1")
    if int8_products_saturate():  # a graph made for another CPU answers right here too
        options.add_session_config_entry("session.x64quantprecision", "1")
    try:
        return onnxruntime.InferenceSession(
            str(model_path), options, providers=list(providers),
            disabled_optimizers=unwanted_rewrites(precision),
        )  # fmt: skip
    # ONNX Runtime's own exceptions share no public base but Exception.
    except Exception as error:
        raise CheckpointError(
            f"ONNX Runtime {onnxruntime.__version__} cannot load {model_path}: {first_line(error)}",
            hint="pip install --upgrade onnxruntime, or " + EXPORT_AGAIN,
        ) from error


def graph_metadata(model_path: Path) -> dict[str, str]:
    """What an exporter wrote into a graph beside its nodes, by key.

    Raises:
        CheckpointError: If ONNX Runtime cannot load the graph.
        MissingExtraError: If ONNX Runtime is not installed.
    """
    return dict(load_session(model_path, 1).get_modelmeta().custom_metadata_map)


def told_precision(model_path: Path) -> str:
    """The precision that a graph of ours tells of itself; fp32 of any other.

    Raises:
        CheckpointError, MissingExtraError: As `graph_metadata`.
    """
    told = graph_metadata(model_path)
    return told.get("precision", "fp32") if told.get("producer") == "dimefm_edge" else "fp32"


def first_line(error: Exception) -> str:
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
