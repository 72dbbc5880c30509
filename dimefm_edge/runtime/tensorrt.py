"""The TensorRT engine: runs what tensorrt_build.py built, on the GPU that it was built for.

Pinned buffers, one stream, and a CUDA graph for each batch size that comes twice: at batch 1 a
small encoder is a hundred kernels of a few microseconds, and launching them one by one takes
longer than running them.
"""

from __future__ import annotations

import contextlib
import logging
import threading
import weakref
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from dimefm_edge.errors import CheckpointError, DimeFMError
from dimefm_edge.manifest import INPUT_NAME, OUTPUT_NAME
from dimefm_edge.preprocess import normalise_pixels
from dimefm_edge.runtime.bundle import Bundle
from dimefm_edge.runtime.cuda import Cuda
from dimefm_edge.runtime.tensorrt_cache import EngineArtifact, find_engine, load_artifact
from dimefm_edge.runtime.tensorrt_inspect import EngineLayer, inspect_engine
from dimefm_edge.runtime.tensorrt_machine import (
    Log,
    image_shape,
    import_tensorrt,
    load_machine,
    load_plugin_libraries,
    register_kernels,
)

logger = logging.getLogger(__name__)

_MAX_GRAPHS = 4  # each holds an execution context with its activations


def open_engine(bundle: Bundle, path: Path | None = None) -> TensorRtEngine:
    """Load the engine that was built of a bundle, on the first GPU.

    Args:
        bundle: A checked bundle.
        path: An `.engine` file; the newest in the cache when None.

    Raises:
        CheckpointError: If there is none, it is damaged, or it belongs to another bundle, GPU
            or TensorRT; the hint is the command that builds it.
        MissingExtraError: If TensorRT or NVIDIA's driver is missing.
    """
    import_tensorrt()  # what is missing is told before what was not built
    cuda = Cuda()
    machine = load_machine(cuda)
    artifact = (
        load_artifact(path, bundle=bundle, machine=machine)
        if path is not None
        else find_engine(bundle, machine)
    )
    return TensorRtEngine(artifact, bundle=bundle, cuda=cuda)


class TensorRtEngine:
    """An engine on a GPU; calls from several threads take turns.

    Attributes:
        embed_dim: Size E of the embeddings.
        min_batch, max_batch: Batch sizes it was built for; others are padded or cut.
    """

    def __init__(
        self,
        artifact: EngineArtifact,
        *,
        bundle: Bundle,
        cuda: Cuda | None = None,
        use_cuda_graphs: bool = True,
    ) -> None:
        """Load an engine.

        Args:
            artifact: As `find_engine` or `load_artifact` checked it.
            bundle: What it was built of.
            cuda: The GPU; the first one when None.
            use_cuda_graphs: Record batch sizes that come again.

        Raises:
            CheckpointError: If TensorRT cannot load it, or it is not `image` to
                `image_embeds` of the bundle's sizes.
            MissingExtraError: If TensorRT or NVIDIA's driver is missing.
        """
        self.embed_dim = bundle.embed_dim
        self.takes_any_size = False
        self._trt = import_tensorrt()
        self._cuda = cuda or Cuda()
        self._cuda.activate()
        self._preprocess = bundle.preprocess
        self._dtype = np.uint8 if bundle.image_input == "uint8" else np.float32
        self._use_cuda_graphs = use_cuda_graphs
        self._lock = threading.Lock()
        self._log = Log(self._trt)
        register_kernels(bundle, load_machine(self._cuda))
        self._engine = _deserialise(self._trt, self._log, artifact, bundle)
        self.min_batch, self.max_batch = self._check_signature(artifact, bundle)
        self._image_shape = image_shape(bundle)
        self._image = self._cuda.pinned_array((self.max_batch, *self._image_shape), self._dtype)
        self._embeds = self._cuda.pinned_array((self.max_batch, self.embed_dim), np.float32)
        self._stream = self._cuda.create_stream()
        self._addresses = {
            INPUT_NAME: self._cuda.allocate(self._image.nbytes),
            OUTPUT_NAME: self._cuda.allocate(self._embeds.nbytes),
        }
        self._context = self._create_context()
        self._graphs: OrderedDict[int, tuple[int, Any]] = OrderedDict()
        self._seen: set[int] = set()
        self._release = weakref.finalize(
            self, _release, self._cuda, self._stream, list(self._addresses.values()), self._graphs
        )

    def encode_image(self, image: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
        """Embed preprocessed images: (B, 3, S, S) float32 -> (B, E) float32, L2-normalised.

        Raises:
            DimeFMError: If the GPU fails, for want of memory say.
            ValueError: If the shape or type is another, or the graph takes pixels.
        """
        if self._dtype is np.uint8:
            raise ValueError("this graph takes pixels and prepares them itself: encode_pixels")
        if image.ndim != 4 or image.shape[1:] != self._image_shape or image.dtype != np.float32:
            wanted = ", ".join(map(str, self._image_shape))
            raise ValueError(
                f"image must be (B, {wanted}) float32, got {image.shape} {image.dtype}"
            )
        return self._encode(image)

    def encode_pixels(self, pixels: npt.NDArray[np.uint8]) -> npt.NDArray[np.float32]:
        """Embed resized images: (B, S, S, 3) uint8, RGB -> (B, E) float32, L2-normalised."""
        side = self._preprocess.image_size
        if pixels.shape[1:] != (side, side, 3) or pixels.dtype != np.uint8:
            raise ValueError(
                f"pixels must be (B, {side}, {side}, 3) uint8, got {pixels.shape} {pixels.dtype}"
            )
        if self._dtype is np.uint8:
            return self._encode(pixels)
        return self._encode(normalise_pixels(pixels, self._preprocess))

    def _encode(self, image: npt.NDArray[Any]) -> npt.NDArray[np.float32]:
        """Any number of images, as the graph takes them."""
        embeds = np.empty((len(image), self.embed_dim), np.float32)
        with self._lock:
            if self._engine is None:
                raise ValueError("the engine is closed")
            self._cuda.activate()
            for start in range(0, len(image), self.max_batch):
                piece = image[start : start + self.max_batch]
                embeds[start : start + len(piece)] = self._run(piece)
        return embeds

    def layer_times_ms(self, batch_size: int, *, repeats: int = 20) -> dict[str, float]:
        """Mean time of each layer by TensorRT's own profiler, in the engine's order.

        Timing each layer slows the whole: the sum is more than a call takes.

        Args:
            batch_size: Images per call; between `min_batch` and `max_batch`.
            repeats: Calls; one more before them warms up.

        Raises:
            ValueError: If the engine was not built for the batch size.
        """
        if not self.min_batch <= batch_size <= self.max_batch:
            raise ValueError(f"batch size must be {self.min_batch} to {self.max_batch}")
        sums: dict[str, float] = {}

        class Profiler(self._trt.IProfiler):  # type: ignore[misc, name-defined]
            def __init__(profiler) -> None:  # noqa: N805
                self._trt.IProfiler.__init__(profiler)

            def report_layer_time(profiler, layer_name: str, ms: float) -> None:  # noqa: N805
                sums[layer_name] = sums.get(layer_name, 0.0) + ms

        with self._lock:
            self._cuda.activate()
            context, profiler = self._create_context(), Profiler()
            self._enqueue(context, batch_size)
            self._cuda.synchronise(self._stream)
            context.profiler = profiler
            for _ in range(repeats):
                self._enqueue(context, batch_size)
                self._cuda.synchronise(self._stream)
        return {name: total / repeats for name, total in sums.items()}

    def layers(self) -> list[EngineLayer]:
        """The engine's layers, in order, as its inspector tells them."""
        return inspect_engine(self._trt, self._engine)

    def close(self) -> None:
        """Give back the GPU's memory; the engine cannot be used any more."""
        with self._lock:
            self._release()
            self._context = self._engine = None

    def _run(self, piece: npt.NDArray[Any]) -> npt.NDArray[np.float32]:
        """Embed up to `max_batch` images; the answer is in the pinned buffer until the next."""
        batch_size = max(len(piece), self.min_batch)
        self._image[: len(piece)] = piece
        self._image[len(piece) : batch_size] = 0
        graph = self._graph(batch_size)
        if graph is None:
            self._enqueue(self._context, batch_size)
        else:
            self._cuda.launch(graph, stream=self._stream)
        self._cuda.synchronise(self._stream)
        return np.asarray(self._embeds[: len(piece)])

    def _enqueue(self, context: Any, batch_size: int) -> None:
        """Put the copy in, the engine and the copy out on the stream."""
        shape = (batch_size, *self._image_shape)
        if not context.set_input_shape(INPUT_NAME, shape):
            raise DimeFMError(f"TensorRT refuses images of shape {shape}: {self._log.reason()}")
        self._cuda.copy_in(
            self._addresses[INPUT_NAME], self._image[:batch_size], stream=self._stream
        )
        if not context.execute_async_v3(self._stream):
            raise DimeFMError(
                f"TensorRT cannot run the engine on {batch_size} images: {self._log.reason()}",
                hint="close something: memory may have run out",
            )
        self._cuda.copy_out(
            self._embeds[:batch_size], self._addresses[OUTPUT_NAME], stream=self._stream
        )

    def _graph(self, batch_size: int) -> int | None:
        """The graph of a batch size, recorded when it comes for the second time.

        A graph holds for the shapes and the context it was recorded with ("CUDA Graphs",
        TensorRT developer guide), so each has a context of its own.
        """
        if batch_size in self._graphs:
            self._graphs.move_to_end(batch_size)
            return self._graphs[batch_size][0]
        if not self._use_cuda_graphs or batch_size not in self._seen:
            self._seen.add(batch_size)
            return None
        context = self._create_context()
        self._enqueue(context, batch_size)  # the first run of a context may not be recorded
        self._cuda.synchronise(self._stream)
        try:
            graph = self._cuda.capture(self._stream, lambda: self._enqueue(context, batch_size))
        except DimeFMError as error:  # a layer, or a plugin, that synchronises
            logger.warning("TensorRT runs without CUDA graphs: %s", error)
            self._use_cuda_graphs = False
            return None
        while len(self._graphs) >= _MAX_GRAPHS:
            _, (oldest, _) = self._graphs.popitem(last=False)
            self._cuda.destroy_graph(oldest)
        self._graphs[batch_size] = (graph, context)
        return graph

    def _create_context(self) -> Any:
        context = self._engine.create_execution_context()
        if context is None:
            raise DimeFMError(
                f"TensorRT cannot make an execution context: {self._log.reason()}",
                hint="close something: memory may have run out",
            )
        for name, address in self._addresses.items():
            context.set_tensor_address(name, address)
        return context

    def _check_signature(self, artifact: EngineArtifact, bundle: Bundle) -> tuple[int, int]:
        """Least and largest batch size, once the engine is known to be of the bundle's sizes."""
        engine, trt = self._engine, self._trt
        found = {}
        for i in range(engine.num_io_tensors):
            name = engine.get_tensor_name(i)
            found[name] = (engine.get_tensor_dtype(name), tuple(engine.get_tensor_shape(name))[1:])
        float32 = trt.DataType.FLOAT
        taken = trt.DataType.UINT8 if self._dtype is np.uint8 else float32
        wanted = {
            INPUT_NAME: (taken, image_shape(bundle)), OUTPUT_NAME: (float32, (self.embed_dim,)),
        }  # fmt: skip
        if found != wanted:
            raise CheckpointError(
                f"the engine {artifact.path} takes and gives {found}; the bundle says {wanted}",
                hint=f"dimefm-edge build {bundle.path}",
            )
        shapes = engine.get_tensor_profile_shape(INPUT_NAME, 0)
        return int(shapes[0][0]), int(shapes[2][0])


def _deserialise(trt: Any, log: Log, artifact: EngineArtifact, bundle: Bundle) -> Any:
    runtime = trt.Runtime(log.trt_logger)
    load_plugin_libraries(runtime.get_plugin_registry(), artifact.plugin_libraries)
    if artifact.facts["options"].get("version_compatible"):
        # Such an engine carries the code that runs it; its hash was checked against our own.
        runtime.engine_host_code_allowed = True
    if artifact.facts["options"].get("dla_core") is not None:
        runtime.DLA_core = artifact.facts["options"]["dla_core"]
    engine = runtime.deserialize_cuda_engine(artifact.path.read_bytes())
    if engine is None:
        raise CheckpointError(
            f"TensorRT {trt.__version__} cannot load the engine {artifact.path}: {log.reason()}",
            hint=f"dimefm-edge build {bundle.path} --rebuild",
        )
    return engine


def _release(
    cuda: Cuda, stream: int, addresses: list[int], graphs: OrderedDict[int, tuple[int, Any]]
) -> None:
    """Free what the driver holds; a process that ends may have lost its driver already."""
    with contextlib.suppress(DimeFMError):
        cuda.activate()
        cuda.synchronise(stream)
        for graph, _ in graphs.values():
            cuda.destroy_graph(graph)
        graphs.clear()
        for address in addresses:
            cuda.free(address)
        cuda.destroy_stream(stream)
