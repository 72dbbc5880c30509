"""Build a TensorRT engine of a bundle, on the device that will run it: no torch, no ONNX here.

TensorRT's own Python API rather than polygraphy: JetPack ships it, and polygraphy, which wraps
these same calls, would be one more package on the board.

Types: a network is strongly typed wherever the graph already says every type, as ours does in
fp32 and fp16 (its norms and softmax are fp32 there), for TensorRT then neither lowers nor raises
any of them, in 10.x as in 11 where no other way is left. 10.x alone can also lower an fp32 graph
itself (weakly typed, by builder flags), which int8 and fp8 with Q/DQ need to run the rest in
fp16.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from dimefm_edge.errors import ConfigError, DimeFMError, ExportError, UnknownNameError, lookup
from dimefm_edge.manifest import INPUT_NAME, attention_nodes, kernels_of
from dimefm_edge.runtime.bundle import Bundle
from dimefm_edge.runtime.cuda import Cuda
from dimefm_edge.runtime.tensorrt_cache import (
    EngineArtifact,
    engine_path,
    load_artifact,
    machine_dir,
    save_engine,
    save_file,
)
from dimefm_edge.runtime.tensorrt_inspect import (
    attention_fusion,
    describe_layers,
    inspect_engine,
)
from dimefm_edge.runtime.tensorrt_machine import (
    Log,
    Machine,
    image_shape,
    import_tensorrt,
    load_machine,
    load_plugin_libraries,
    register_kernels,
)
from dimefm_edge.targets import LOCAL, load_target

logger = logging.getLogger(__name__)

# Least compute capability whose kernels take the type (TensorRT support matrix, "Hardware and
# Precision").
PRECISIONS: dict[str, tuple[int, int]] = {
    "fp32": (0, 0), "fp16": (5, 3), "bf16": (8, 0), "int8": (6, 1), "fp8": (8, 9),
}  # fmt: skip
_DLA_PRECISIONS = ("fp16", "int8")
_MAX_OPT_LEVEL = 5
_TIMING_CACHE = "timing.cache"
_LISTED_ERRORS = 5


@dataclass(frozen=True)
class EngineOptions:
    """What a user asks of an engine. Another value makes another engine in the cache."""

    precision: str | None = None
    """A name in `PRECISIONS`; when None the one that the bundle's target runs, where TensorRT can
    lower an fp32 graph to it, else the bundle's."""
    batch: tuple[int, int, int] = (1, 1, 8)
    """Least, usual and largest number of images per call."""
    workspace_mib: int | None = None
    """Most scratch memory of one layer; all of the GPU's when None."""
    dla_core: int | None = None
    """DLA to run on; what it cannot do runs on the GPU."""
    opt_level: int = 3
    """0 builds fastest, 5 tries most."""
    version_compatible: bool = False
    """May run on later TensorRT versions of the same major number."""
    hardware_compatible: bool = False
    """May run on other GPUs from Ampere on."""
    refit: bool = False
    """Its weights may be replaced."""
    plugin_libraries: tuple[str, ...] = ()
    """Shared libraries of plugins."""

    def __post_init__(self) -> None:
        least, usual, largest = self.batch
        if not 1 <= least <= usual <= largest:
            raise ConfigError(
                "batch sizes must rise from at least 1: min,opt,max, got "
                f"{least},{usual},{largest}",
                hint="--batch 1,1,8",
            )
        if self.precision is not None:
            lookup(PRECISIONS, self.precision, kind="engine precision")
        if not 0 <= self.opt_level <= _MAX_OPT_LEVEL:
            raise ConfigError(f"the optimisation level must be 0 to 5, got {self.opt_level}")
        if self.workspace_mib is not None and self.workspace_mib < 1:
            raise ConfigError(f"the workspace must be at least 1 MiB, got {self.workspace_mib}")


@dataclass(frozen=True)
class BuiltEngine:
    """An engine that may run here, and whether it was there already."""

    artifact: EngineArtifact
    machine: Machine
    was_cached: bool


def build_engine(
    bundle: Bundle,
    options: EngineOptions | None = None,
    *,
    cuda: Cuda | None = None,
    out: Path | None = None,
    timing_cache: Path | None = None,
    rebuild: bool = False,
) -> BuiltEngine:
    """Build a bundle's engine for this GPU, or find it in the cache.

    Args:
        bundle: A checked bundle.
        options: What is asked; the defaults when None.
        cuda: The GPU; the first one when None.
        out: An `.engine` file to write; its place in the cache when None.
        timing_cache: File of kernel timings, read and extended; the GPU's own when None.
        rebuild: Build even if the engine is there.

    Raises:
        ConfigError: If this GPU or TensorRT cannot do what is asked.
        ExportError: If TensorRT refuses the graph or fails to build it, or the engine cannot be
            written; nothing half-written is left.
        MissingExtraError: If TensorRT or NVIDIA's driver is missing.
    """
    options = options or EngineOptions()
    trt = import_tensorrt()
    cuda = cuda or Cuda()
    machine = load_machine(cuda)
    if options.precision is None:
        options = replace(options, precision=_default_precision(trt, bundle, machine))
    path = out or engine_path(bundle, machine, asdict(options))
    if not rebuild and path.is_file():
        try:
            artifact = load_artifact(path, bundle=bundle, machine=machine)
            if artifact.facts["options"].get("precision") == options.precision:
                return BuiltEngine(artifact, machine, was_cached=True)
            logger.warning("%s is in another precision; it is built again", path)
        except DimeFMError as error:
            logger.warning("%s; it is built again", error.args[0])
    cuda.activate()
    build = EngineBuild(trt, bundle, options, machine)
    begun = time.perf_counter()
    engine = build.run(timing_cache or machine_dir(machine) / _TIMING_CACHE)
    build_s = time.perf_counter() - begun
    artifact = save_engine(
        path,
        engine,
        bundle=bundle,
        machine=machine,
        options=asdict(options),
        typing=build.typing,
        build_s=build_s,
        **build.inspect(engine),
    )
    return BuiltEngine(artifact, machine, was_cached=False)


class EngineBuild:
    """One build, step by step; `typing` says in words how the network is typed."""

    def __init__(
        self,
        trt: Any,
        bundle: Bundle,
        options: EngineOptions,
        machine: Machine,
        *,
        log: Log | None = None,
        configure: Callable[[Any], object] | None = None,
    ) -> None:
        """Begin a build, or ConfigError; `configure` gets the IBuilderConfig when all is set."""
        self.trt, self.bundle, self.options, self.machine = trt, bundle, options, machine
        self.log = log or Log(trt)
        self._finish = configure
        image_shape(bundle)  # before anything is built
        self.precision = options.precision or bundle.precision
        _check_precision(self.precision, machine)
        self.flags = _precision_flags(trt, bundle, self.precision, options, machine)
        self.typing = "weak: " + " ".join(self.flags) if self.flags else "strong"
        self.builder = trt.Builder(self.log.trt_logger)
        self.libraries = tuple(map(Path, options.plugin_libraries))
        load_plugin_libraries(self.builder.get_plugin_registry(), self.libraries)
        register_kernels(bundle, machine)

    def run(self, timing_cache: Path | None) -> bytes:
        """The engine, serialised; what kernels took is read from a file and kept there."""
        network = self._parse()
        config = self._configure()
        self._add_profile(config, network)
        if self.flags:
            self._keep_end_in_fp32(network)
        timings = self._read_timings(config, timing_cache) if timing_cache else b""
        engine = self.builder.build_serialized_network(network, config)
        if engine is None:
            raise ExportError(
                f"TensorRT {self.machine.tensorrt} cannot build {self.bundle.path} for "
                f"{self.machine.gpu.name}: {self.log.reason()}",
                hint=f"dimefm-edge build {self.bundle.path} --verbose  (its whole log)",
            )
        if timing_cache is not None:
            after = bytes(config.get_timing_cache().serialize())
            if after != timings:
                save_file(timing_cache, after)
        return bytes(engine)

    def inspect(self, engine: bytes) -> dict[str, Any]:
        """Load an engine just built and say what it is made of."""
        runtime = self.trt.Runtime(self.log.trt_logger)
        load_plugin_libraries(runtime.get_plugin_registry(), self.libraries)
        runtime.engine_host_code_allowed = self.options.version_compatible
        if self.options.dla_core is not None:
            runtime.DLA_core = self.options.dla_core
        loaded = runtime.deserialize_cuda_engine(engine)
        if loaded is None:
            raise ExportError(f"TensorRT cannot load what it built: {self.log.reason()}")
        layers = inspect_engine(self.trt, loaded)
        fusion = attention_fusion(layers, attention_nodes(self.bundle.manifest))
        return {"layers": describe_layers(layers), "attention": asdict(fusion)}

    def _parse(self) -> Any:
        flag = self.trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED
        network = self.builder.create_network(0 if self.flags else 1 << int(flag))
        parser = self.trt.OnnxParser(network, self.log.trt_logger)
        if parser.parse_from_file(str(self.bundle.model_path)):
            return network
        errors = [parser.get_error(i) for i in range(parser.num_errors)]
        listed = [f"{e.node_operator() or 'graph'} {e.node_name()}: {e.desc()}" for e in errors]
        more = f"; and {len(listed) - _LISTED_ERRORS} more" if len(listed) > _LISTED_ERRORS else ""
        raise ExportError(
            f"TensorRT {self.machine.tensorrt} cannot read the graph of {self.bundle.path} (opset "
            f"{self.bundle.manifest['opset']}): "
            + ("; ".join(listed[:_LISTED_ERRORS]) or self.log.reason()) + more,
            hint="export it for this device's TensorRT: dimefm-edge export RUN --target DEVICE",
        )  # fmt: skip

    def _configure(self) -> Any:
        trt, options = self.trt, self.options
        config = self.builder.create_builder_config()
        # The engine's own layer list is what tells whether attention was fused.
        config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
        config.builder_optimization_level = options.opt_level
        flags = [*self.flags, *(["OBEY_PRECISION_CONSTRAINTS"] if self.flags else [])]
        if options.version_compatible:
            flags.append("VERSION_COMPATIBLE")
        if options.refit:
            flags.append("REFIT")
        if options.hardware_compatible:
            config.hardware_compatibility_level = trt.HardwareCompatibilityLevel.AMPERE_PLUS
        if options.workspace_mib is not None:
            config.set_memory_pool_limit(
                trt.MemoryPoolType.WORKSPACE, options.workspace_mib * 2**20
            )
        if options.dla_core is not None:
            if self.precision not in _DLA_PRECISIONS:
                raise ConfigError(
                    f"a DLA runs {' and '.join(_DLA_PRECISIONS)}, not {self.precision}",
                    hint="--precision fp16, or leave out --dla-core",
                )
            cores = self.builder.num_DLA_cores
            if not 0 <= options.dla_core < cores:
                raise ConfigError(
                    f"there is no DLA {options.dla_core} on {self.machine.gpu.name}: TensorRT "
                    f"finds {cores or 'none'}",
                    hint="leave out --dla-core",
                )
            config.default_device_type = trt.DeviceType.DLA
            config.DLA_core = options.dla_core
            flags.append("GPU_FALLBACK")
        for name in flags:
            config.set_flag(getattr(trt.BuilderFlag, name))
        if self._finish is not None:
            self._finish(config)
        return config

    def _add_profile(self, config: Any, network: Any) -> None:
        """Say which batch sizes the engine is for; a graph of one fixed batch needs no profile."""
        inputs = [network.get_input(i) for i in range(network.num_inputs)]
        fixed = next((int(tensor.shape[0]) for tensor in inputs if tensor.name == INPUT_NAME), -1)
        if fixed > 0:
            if self.options.batch != (fixed,) * 3:
                raise ConfigError(
                    f"{self.bundle.path} was exported for batches of {fixed} only",
                    hint=f"--batch {fixed},{fixed},{fixed}, or export it with a dynamic batch",
                )
            return
        profile = self.builder.create_optimization_profile()
        shape = image_shape(self.bundle)
        profile.set_shape(INPUT_NAME, *((size, *shape) for size in self.options.batch))
        config.add_optimization_profile(profile)

    def _keep_end_in_fp32(self, network: Any) -> None:
        """Keep what follows the last product in fp32, as export/fp16.py does: the L2 norm.

        TensorRT computes a LayerNormalization node in fp32 anyway (INormalizationLayer's
        `compute_precision`).
        """
        trt = self.trt
        products = (trt.LayerType.MATRIX_MULTIPLY, trt.LayerType.CONVOLUTION, trt.LayerType.EINSUM)
        for i in reversed(range(network.num_layers)):
            layer = network.get_layer(i)
            if layer.type in products:
                return
            if layer.num_outputs and layer.get_output(0).dtype == trt.DataType.FLOAT:
                layer.precision = trt.DataType.FLOAT
                layer.set_output_type(0, trt.DataType.FLOAT)

    def _read_timings(self, config: Any, path: Path) -> bytes:
        """Give the builder what it measured before on this GPU; a damaged file counts as none."""
        try:
            before = path.read_bytes()
        except OSError:
            before = b""
        cache = config.create_timing_cache(before)
        if cache is None or not config.set_timing_cache(cache, ignore_mismatch=False):
            logger.warning("the timing cache %s is not of this GPU and TensorRT: begun anew", path)
            config.set_timing_cache(config.create_timing_cache(b""), ignore_mismatch=False)
        return before


def budget_precision(bundle: Bundle) -> str:
    """The precision of a bundle's target's budget; the graph's own where none is known."""
    name = bundle.manifest.get("target")
    try:
        return bundle.precision if name in (None, LOCAL) else load_target(name).precision
    except UnknownNameError:  # another version's target
        return bundle.precision


def _default_precision(trt: Any, bundle: Bundle, machine: Machine) -> str:
    """What the budget of a bundle's target is of, where it can be had; else the graph's own."""
    name, wanted = bundle.manifest.get("target"), budget_precision(bundle)
    is_lower = bundle.precision == "fp32" and wanted in ("fp16", "bf16")
    if not is_lower or machine.gpu.compute_capability < PRECISIONS[wanted]:
        return bundle.precision
    if hasattr(trt.BuilderFlag, "FP16") and not kernels_of(bundle.manifest):
        return wanted
    logger.warning(
        "%s is an fp32 graph and its engine runs so; budgets of %s are of %s. "
        "try: dimefm-edge export RUN --precision %s, then build that",
        bundle.path, name, wanted, wanted,
    )  # fmt: skip
    return bundle.precision


def _check_precision(precision: str, machine: Machine) -> None:
    least = lookup(PRECISIONS, precision, kind="engine precision")
    if machine.gpu.compute_capability < least:
        raise ConfigError(
            f"{machine.gpu.name} ({machine.gpu.sm}) has no {precision}: it begins with "
            f"sm_{least[0]}{least[1]}",
            hint="--precision fp16",
        )


def _precision_flags(
    trt: Any, bundle: Bundle, precision: str, options: EngineOptions, machine: Machine
) -> tuple[str, ...]:
    """Builder flags of a weakly typed network; none for a strongly typed one.

    Raises:
        ConfigError: If the graph cannot become an engine of this precision with this TensorRT.
    """
    has_flags = hasattr(trt.BuilderFlag, "FP16")
    if precision != bundle.precision and kernels_of(bundle.manifest):
        raise ConfigError(
            f"{bundle.path} brings kernels for {bundle.precision} and cannot become an "
            f"{precision} engine",
            hint=f"dimefm-edge export RUN --attention plugin --precision {precision}",
        )
    if precision == bundle.precision:
        # DLA takes fp16 and int8 only, and chooses by the flags.
        has_qdq = precision in ("int8", "fp8")
        is_lowered = has_qdq or (options.dla_core is not None and precision == "fp16")
        if not is_lowered or not has_flags:
            return ()
        return (precision.upper(), "FP16") if has_qdq else ("FP16",)
    if bundle.precision == "fp32" and precision in ("fp16", "bf16") and has_flags:
        return (precision.upper(),)
    why = (
        f"TensorRT {machine.tensorrt} runs the types that the graph says"
        if bundle.precision == "fp32" and precision in ("fp16", "bf16")
        else "only an fp32 graph can be lowered, and int8 and fp8 need Q/DQ nodes in it"
    )
    raise ConfigError(
        f"{bundle.path} is an {bundle.precision} graph and cannot become an {precision} engine: "
        f"{why}",
        hint=f"dimefm-edge export RUN --precision {precision}, then build that",
    )
