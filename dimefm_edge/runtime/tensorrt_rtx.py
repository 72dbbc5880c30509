"""A dry build: what NVIDIA's own parser and compiler make of a bundle, where there is no GPU.

TensorRT for RTX reads ONNX and compiles for a GPU that is only named ("Working with Ahead-of-Time
Compilation" in its documentation), and its wheels are on PyPI. The bundle goes through the
steps of a build on the device (tensorrt_build.py), to the list of kernels; nothing is kept. It is
not the TensorRT of a Jetson: the version is another, and it compiles for few GPUs, of which
the newest that is not newer than the target's stands for it (sm_86 for an Orin's sm_87).
"""

from __future__ import annotations

import re
import time
from dataclasses import dataclass, replace
from typing import Any

from dimefm_edge.errors import CheckpointError, ConfigError, DimeFMError, MissingExtraError
from dimefm_edge.manifest import EXPORT_AGAIN, attention_nodes, kernels_of
from dimefm_edge.runtime.bundle import Bundle
from dimefm_edge.runtime.cuda import Gpu
from dimefm_edge.runtime.tensorrt_build import EngineBuild, EngineOptions
from dimefm_edge.runtime.tensorrt_inspect import (
    AttentionFusion,
    EngineLayer,
    attention_fusion,
    kernels_by_kind,
    parse_layer_log,
)
from dimefm_edge.runtime.tensorrt_machine import Log, Machine

_DEFAULT_SM = "sm_87"  # of a bundle that names no GPU
_SM = re.compile(r"sm_(\d+)")
_MEMBER = re.compile(r"SM(\d+)(\d)")


@dataclass(frozen=True)
class DryBuild:
    """What a bundle would be as an engine."""

    compiler: str
    """Name and version."""
    precision: str
    """Of the graph that was compiled."""
    compiled_for: str
    """The architecture that it was compiled for, such as sm_86."""
    stands_for: str
    """The target's own, such as sm_87."""
    layers: tuple[EngineLayer, ...]
    attention: AttentionFusion
    build_s: float
    size_mib: float

    @property
    def num_kernels(self) -> int:
        """How many kernels a call launches."""
        return sum(kernels_by_kind(self.layers).values())

    def describe(self) -> str:
        """One line for people."""
        is_other = self.compiled_for != self.stands_for
        instead = f", which stands for {self.stands_for}" if is_other else ""
        return (
            f"{self.compiler} compiles it in {self.precision} for {self.compiled_for}{instead}: "
            f"{self.num_kernels} kernels; {self.attention.describe()}"
        )


def can_dry_build(bundle: Bundle) -> bool:
    """Whether TensorRT for RTX is here and has a GPU that stands for the bundle's target."""
    try:
        _architecture(_import_rtx(), _target_sm(bundle))
    except DimeFMError:
        return False
    return bundle.manifest["graph"]["runtime"] == "tensorrt" and not kernels_of(bundle.manifest)


def dry_build(bundle: Bundle, options: EngineOptions | None = None) -> DryBuild:
    """Parse and compile a bundle's graph without a GPU.

    Args:
        bundle: A checked bundle.
        options: What would be asked of an engine. Default: the batches that the graph takes.

    Raises:
        CheckpointError: If the bundle names no GPU that can be.
        ConfigError: If it cannot compile for the bundle's target, or not what is asked.
        ExportError: If the parser refuses the graph or the compiler fails.
        MissingExtraError: If TensorRT for RTX is not installed.
    """
    trt = _import_rtx()
    if kernels_of(bundle.manifest):
        raise ConfigError(
            f"{bundle.path} brings kernels of its own, which TensorRT for RTX has no way to take",
            hint="dimefm-edge build on the device; or export it without --attention plugin",
        )
    options = _for_graph(options or EngineOptions(), bundle)
    target = _target_sm(bundle)
    name, capability = _architecture(trt, target)
    compiler = f"for RTX {trt.__version__}"
    machine = Machine(Gpu(f"an sm_{capability[0]}{capability[1]} GPU", capability, ""), compiler)

    def name_gpu(config: Any) -> None:
        config.num_compute_capabilities = 1
        config.set_compute_capability(getattr(trt.ComputeCapability, name), 0)

    messages: list[str] = []
    log = Log(trt, listener=messages.append)
    begun = time.perf_counter()
    engine = EngineBuild(trt, bundle, options, machine, log=log, configure=name_gpu).run(None)
    layers = parse_layer_log("\n".join(messages))
    return DryBuild(
        compiler=f"TensorRT {compiler}",
        precision=bundle.precision,
        compiled_for=machine.gpu.sm,
        stands_for=target,
        layers=tuple(layers),
        attention=attention_fusion(layers, attention_nodes(bundle.manifest)),
        build_s=time.perf_counter() - begun,
        size_mib=len(engine) / 2**20,
    )


def _for_graph(options: EngineOptions, bundle: Bundle) -> EngineOptions:
    """Options with the graph's own precision, and its own batch if that is fixed."""
    fixed = (bundle.manifest.get("graph") or {}).get("batch_size")
    if fixed and options.batch == EngineOptions().batch:
        options = replace(options, batch=(fixed, fixed, fixed))
    return replace(options, precision=options.precision or bundle.precision)


def _target_sm(bundle: Bundle) -> str:
    """The architecture of the GPU that a bundle is for."""
    return str((bundle.manifest.get("graph") or {}).get("sm") or _DEFAULT_SM)


def _import_rtx() -> Any:
    """The bindings of TensorRT for RTX.

    Raises:
        MissingExtraError: If they are not installed or cannot load their libraries.
    """
    try:
        import tensorrt_rtx_bindings
    except (ImportError, OSError) as error:
        raise MissingExtraError(
            f"TensorRT for RTX cannot be imported: {str(error) or 'not installed'}",
            hint="pip install 'dimefm_edge[rtx]'  (Linux or Windows; no GPU is needed)",
        ) from error
    return tensorrt_rtx_bindings


def _architecture(trt: Any, target: str) -> tuple[str, tuple[int, int]]:
    """Name and number of the newest architecture it compiles for that is not newer than one."""
    number = _SM.fullmatch(target)
    if number is None:
        raise CheckpointError(f"bad manifest: a GPU cannot be {target}", hint=EXPORT_AGAIN)
    wanted = int(number[1])
    known = {}
    for name in trt.ComputeCapability.__members__:
        match = _MEMBER.fullmatch(name)
        if match is not None:
            known[int(match[1] + match[2])] = (name, (int(match[1]), int(match[2])))
    older = [number for number in known if number <= wanted]
    if not older:
        raise ConfigError(
            f"TensorRT for RTX {trt.__version__} compiles for sm_{min(known)} and newer, not "
            f"for {target}",
            hint="dimefm-edge build on the device",
        )
    return known[max(older)]
