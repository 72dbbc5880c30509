"""What a TensorRT engine belongs to: one GPU and one TensorRT version; and how both are reached.

TensorRT is imported here only, when it is asked for.
"""

from __future__ import annotations

import logging
import shlex
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dimefm_edge.errors import (
    CheckpointError,
    ConfigError,
    DimeFMError,
    InputError,
    MissingExtraError,
)
from dimefm_edge.manifest import EXPORT_AGAIN, KERNELS_DIR, kernels_of
from dimefm_edge.runtime.bundle import Bundle
from dimefm_edge.runtime.cuda import Cuda, Gpu

logger = logging.getLogger(__name__)

_TEGRA = Path("/etc/nv_tegra_release")
_MIN_VERSION = (10, 0)
_MAX_KEPT_ERRORS = 20


@dataclass(frozen=True)
class Machine:
    """Where an engine is built or run."""

    gpu: Gpu
    tensorrt: str
    """Its full version, such as 10.3.0."""

    @property
    def version(self) -> tuple[int, int]:
        """TensorRT's major and minor version."""
        return parse_version(self.tensorrt)


def parse_version(text: str) -> tuple[int, int]:
    """Major and minor number of a version such as 10.3.0."""
    major, minor = text.split(".")[:2]
    return int(major), int(minor)


def load_machine(cuda: Cuda) -> Machine:
    """Say which GPU and TensorRT are here.

    Raises:
        MissingExtraError: If TensorRT cannot be imported.
    """
    return Machine(cuda.gpu, str(import_tensorrt().__version__))


def import_tensorrt() -> Any:
    """The `tensorrt` module.

    Raises:
        MissingExtraError: If it is not installed, cannot load its libraries, or is too old.
    """
    try:
        import tensorrt
    except ImportError as error:
        raise MissingExtraError(
            f"TensorRT's Python package cannot be imported: {str(error) or 'not installed'}",
            hint=_how_to_install(),
        ) from error
    if parse_version(tensorrt.__version__) < _MIN_VERSION:
        raise MissingExtraError(
            f"TensorRT {tensorrt.__version__} is too old: engines need 10.0 or newer",
            hint="JetPack 6 or newer; elsewhere: pip install --upgrade tensorrt",
        )
    return tensorrt


def image_shape(bundle: Bundle) -> tuple[int, int, int]:
    """Of one image as the bundle's graph takes it: (3, S, S) numbers or (S, S, 3) pixels.

    Raises:
        ConfigError: If it takes images of any size, for which no engine is built.
    """
    side = bundle.preprocess.image_size
    if bundle.image_input == "image":
        raise ConfigError(
            f"{bundle.path} resizes images in its graph, and an engine takes one size only",
            hint="dimefm-edge export RUN --input uint8, then build that",
        )
    return (side, side, 3) if bundle.image_input == "uint8" else (3, side, side)


def require_builder(*, export_command: str, bundle: Path) -> None:
    """Fail before an export that shall end in an engine writes anything.

    Args:
        export_command: What writes the bundle alone, without an engine.
        bundle: Where it goes.

    Raises:
        MissingExtraError: If TensorRT or a GPU is missing here; the hint is the two commands
            that do the same, here and on the device.
    """
    try:
        import_tensorrt()
        Cuda()
    except DimeFMError as error:  # no package, no driver, or a driver without a GPU
        raise MissingExtraError(
            f"no engine can be built here: {error.args[0]}",
            hint=f"{export_command}  here; then, where the bundle is on the device: "
            f"dimefm-edge build {shlex.quote(str(bundle))}",
        ) from error


def _how_to_install() -> str:
    if _TEGRA.is_file():
        return (
            "JetPack ships TensorRT with bindings for the system's Python (3.10 in JetPack 6): "
            "sudo apt install python3-libnvinfer, then an environment that sees it: "
            "/usr/bin/python3 -m venv --system-site-packages .venv"
        )
    return "on a machine with an NVIDIA GPU: pip install 'dimefm_edge[tensorrt]'"


class Log:
    """TensorRT's own log, sent to Python's; what it called an error is kept for messages.

    Attributes:
        trt_logger: What TensorRT's objects take.
    """

    def __init__(self, trt: Any, *, listener: Callable[[str], object] | None = None) -> None:
        """Make a logger for a `tensorrt` module; `listener` hears every message, whole."""
        self.errors: list[str] = []
        severity = trt.ILogger.Severity
        levels = {
            severity.INTERNAL_ERROR: logging.ERROR,
            severity.ERROR: logging.ERROR,
            severity.WARNING: logging.INFO,
            severity.INFO: logging.DEBUG,
            severity.VERBOSE: logging.DEBUG,
        }
        errors = self.errors

        class TrtLogger(trt.ILogger):  # type: ignore[misc]
            def __init__(self) -> None:
                trt.ILogger.__init__(self)  # pybind11 wants it spelt out

            def log(self, severity: Any, msg: str) -> None:
                level = levels.get(severity, logging.DEBUG)
                if listener is not None:
                    listener(msg)
                if level == logging.ERROR and len(errors) < _MAX_KEPT_ERRORS:
                    errors.append(" ".join(msg.split()))
                logger.log(min(level, logging.INFO), "TensorRT: %s", msg)

        self.trt_logger = TrtLogger()

    def reason(self) -> str:
        """Why the last thing failed, as far as TensorRT told."""
        return "; ".join(self.errors) or "it gives no reason (--verbose shows its log)"


def load_plugin_libraries(registry: Any, paths: tuple[Path, ...]) -> None:
    """Let TensorRT load shared libraries of plugins, which run as code of this process.

    Args:
        registry: TensorRT's IPluginRegistry.
        paths: Files that the user named.

    Raises:
        InputError: If one is missing or TensorRT cannot load it.
    """
    for path in paths:
        if not path.is_file():
            raise InputError(f"no plugin library at {path}", hint="--plugin-library PATH.so")
        try:
            handle = registry.load_library(str(path.resolve()))
        except Exception as error:  # pybind11 raises what it likes
            raise InputError(f"TensorRT cannot load the plugin library {path}: {error}") from error
        if handle is None:
            raise InputError(f"TensorRT cannot load the plugin library {path}")


def register_kernels(bundle: Bundle, machine: Machine) -> None:
    """Let TensorRT find the kernels that a bundle brings along; nothing where it brings none.

    Raises:
        CheckpointError: If they are for another GPU, or described in a way that is not known.
        MissingExtraError: If TensorRT cannot take them.
    """
    recorded = kernels_of(bundle.manifest)
    if not recorded:
        return
    from dimefm_kernels.ahead_of_time import KernelSpec
    from dimefm_kernels.tensorrt_plugin import CompiledKernel, register_plugin

    major, minor = machine.gpu.compute_capability
    capability = 10 * major + minor
    made_for = {entry["capability"] for entry in recorded}
    if made_for != {capability}:
        found = ", ".join(f"sm_{number}" for number in sorted(made_for))
        raise CheckpointError(
            f"{bundle.path} brings kernels for {found}, and {machine.gpu.name} is sm_{capability}",
            hint="export it for this device: dimefm-edge export RUN --target DEVICE, or without "
            "--attention plugin",
        )
    folder = bundle.model_path.parent / KERNELS_DIR
    compiled = {}
    for entry in recorded:
        try:
            spec = KernelSpec(**entry["spec"])
        except TypeError as error:
            raise CheckpointError(
                f"{bundle.path}: bad manifest: a kernel's spec cannot be {entry['spec']}",
                hint=EXPORT_AGAIN,
            ) from error
        compiled[spec] = CompiledKernel(
            entry["entry"], (folder / entry["ptx"]).read_text(encoding="utf-8"),
            entry["grid_x"], entry["num_threads"], entry["shared_bytes"],
        )  # fmt: skip
    try:
        register_plugin(compiled, capability=capability)
    except RuntimeError as error:
        raise MissingExtraError(
            f"TensorRT {machine.tensorrt} cannot take the kernels of {bundle.path}: it has no "
            "ahead-of-time Python plugins",
            hint="JetPack 7.2 or newer, or export it without --attention plugin",
        ) from error
