"""What is installed, what works, and the command that mends what does not.

Versions are read without importing; what can be proven cheaply is tried. No torch at import.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Literal

from dimefm_edge.errors import DimeFMError

_MIN_PYTHON = (3, 10)
_MIN_DISK_GIB = 5.0
_MIN_MEMORY_GIB = 2.0
_INSTALL_TRAIN = "pip install 'dimefm_edge[train]'"
_INSTALL_EVAL = "pip install 'dimefm_edge[eval]'"
_TEXT = ("tokenizers", "ftfy")
_INSTALL_DEMO = "pip install 'dimefm_edge[demo]'"
_TRAIN = (
    "torchvision", "timm", "open_clip_torch", "onnx", "onnxscript", "safetensors", "torchao",
    "tensorboard",
)  # fmt: skip
_SOURCES = ("braceexpand", "pyarrow")
_FAISS = ("faiss-cpu", "faiss-gpu", "faiss")
"""Of pip and conda; all are imported as faiss."""
_EVAL = ("scikit-learn", "imagecorruptions-imaug", "matplotlib")
_BENCH = {
    "openvino": ("bench compares with it: MODEL@openvino", "pip install openvino"),
    "mlcommons-loadgen": ("MLPerf's, for bench --scenario", "pip install 'dimefm_edge[bench]'"),
}
"""What nothing but a comparison needs: its use, and the command that installs it."""
_CPUINFO = Path("/proc/cpuinfo")
_CPU_FEATURES = {
    "AVX2": ("avx2",),
    "AVX-512": ("avx512f",),
    "VNNI": ("avx512_vnni", "avx_vnni"),
    "bf16": ("avx512_bf16", "amx_bf16", "bf16"),
    "AMX": ("amx_int8",),
    "NEON": ("asimd", "neon"),
    "dot product": ("asimddp",),
    "i8mm": ("i8mm",),
}


@dataclass(frozen=True)
class Check:
    """One thing that was looked at."""

    name: str
    status: Literal["ok", "missing", "note"]
    """note: neither needed nor wrong."""
    detail: str
    mend: str | None = None
    """The command that mends it."""
    is_required: bool = False
    """Nothing works without it."""


def examine(folder: Path = Path()) -> list[Check]:
    """Look at this machine.

    Args:
        folder: Whose disk's free space is looked at.
    """
    return [
        _python(),
        *_onnxruntime(),
        *(_installed(name, f"pip install {name}", is_required=True) for name in _TEXT),
        *_torch(),
        *(_installed(name, _INSTALL_TRAIN) for name in (*_TRAIN, *_SOURCES)),
        _faiss(),
        *(_installed(name, _INSTALL_EVAL) for name in _EVAL),
        _installed("gradio", _INSTALL_DEMO),
        *(_optional(name, use, mend) for name, (use, mend) in _BENCH.items()),
        *_tensorrt(),
        *_cpu(),
        _memory(),
        _disk(folder),
    ]


def _python() -> Check:
    is_ok = sys.version_info >= _MIN_PYTHON
    mend = None if is_ok else "install Python 3.11 and make the environment with it"
    status: Literal["ok", "missing"] = "ok" if is_ok else "missing"
    return Check("Python", status, platform.python_version(), mend, is_required=True)


def _installed(name: str, mend: str, *, is_required: bool = False) -> Check:
    found = _version(name)
    if found is None:
        return Check(name, "missing", "not installed", mend, is_required)
    return Check(name, "ok", found, is_required=is_required)


def _optional(name: str, use: str, mend: str) -> Check:
    found = _version(name)
    if found is None:
        return Check(name, "note", f"not installed; {use}", mend)
    return Check(name, "ok", found)


def _faiss() -> Check:
    """For corpus, hard negatives and the demo."""
    found = next((name for name in _FAISS if _version(name) is not None), _FAISS[0])
    return _installed(found, _INSTALL_TRAIN)


def _version(name: str) -> str | None:
    with contextlib.suppress(PackageNotFoundError):
        return version(name)
    return None


def _onnxruntime() -> Iterator[Check]:
    """Its wheels have several names (onnxruntime-gpu, Jetson's own): the import decides."""
    try:
        runtime = importlib.import_module("onnxruntime")
        providers = [p.removesuffix("ExecutionProvider") for p in runtime.get_available_providers()]
    except Exception as error:  # a broken wheel fails in many ways
        yield Check(
            "ONNX Runtime",
            "missing",
            _first_line(error),
            "pip install --upgrade onnxruntime",
            is_required=True,
        )
        return
    detail = f"{runtime.__version__}, providers {', '.join(providers)}"
    yield Check("ONNX Runtime", "ok", detail, is_required=True)


def _torch() -> Iterator[Check]:
    if _version("torch") is None:
        yield Check("torch", "missing", "not installed: bundles run, nothing trains",
                    _INSTALL_TRAIN)  # fmt: skip
        return
    try:
        torch = importlib.import_module("torch")
        (torch.ones(2, 2) @ torch.ones(2, 2)).sum().item()
    except Exception as error:
        yield Check("torch", "missing", _first_line(error), f"{_INSTALL_TRAIN} --force-reinstall")
        return
    yield Check("torch", "ok", f"{torch.__version__}, {torch.get_num_threads()} threads")
    yield _cuda(torch)


def _cuda(torch: object) -> Check:
    cuda, built_for = torch.cuda, torch.version.cuda  # type: ignore[attr-defined]
    driver = _nvidia_driver()
    if cuda.is_available():
        names = ", ".join(cuda.get_device_name(i) for i in range(cuda.device_count()))
        return Check("CUDA", "ok", f"{built_for}, driver {driver}: {names}")
    if driver is None:
        return Check("CUDA", "note", "no NVIDIA driver here: training uses the CPU")
    if built_for is None:
        return Check("CUDA", "missing", f"driver {driver}, but torch is built for the CPU",
                     "pip install --force-reinstall torch torchvision")  # fmt: skip
    return Check("CUDA", "missing", f"driver {driver}, but torch for CUDA {built_for} sees no GPU",
                 "nvidia-smi  (then update the driver, or install a torch for its CUDA)"
                 )  # fmt: skip


def _nvidia_driver() -> str | None:
    if shutil.which("nvidia-smi") is None:
        return None
    try:
        done = subprocess.run(
            ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"],
            capture_output=True,
            text=True,
            timeout=20,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip().splitlines()[0] if done.stdout.strip() else None


def _tensorrt() -> Iterator[Check]:
    """Its package, and the driver that an engine is built and run with."""
    from dimefm_edge.runtime.cuda import Cuda
    from dimefm_edge.runtime.tensorrt_machine import import_tensorrt

    try:
        yield Check("TensorRT", "ok", str(import_tensorrt().__version__))
    except DimeFMError as error:
        is_jetson = Path("/etc/nv_tegra_release").is_file()
        detail = "this is a Jetson, and its Python cannot see TensorRT" if is_jetson else (
            "not installed; JetPack ships it, and only NVIDIA GPUs use it")  # fmt: skip
        yield Check("TensorRT", "missing" if is_jetson else "note", detail, error.hint)
    yield _optional(
        "tensorrt_rtx_cu13_libs", "with it exports for TensorRT are compiled as a trial, by CPU",
        "pip install 'dimefm_edge[rtx]'",
    )  # fmt: skip
    try:
        gpu = Cuda().gpu
        yield Check("GPU for TensorRT", "ok", f"{gpu.name}, {gpu.sm}, CUDA {gpu.cuda}")
    except DimeFMError as error:
        yield Check("GPU for TensorRT", "note", str(error.args[0]), error.hint)


def _cpu() -> Iterator[Check]:
    available = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    yield Check("CPU", "ok", f"{platform.machine()}, {available} of {os.cpu_count()} logical cores")
    flags = cpu_flags()
    if not flags:
        yield Check("CPU features", "note", f"{_CPUINFO} does not list them on this system")
        return
    present = [name for name, any_of in _CPU_FEATURES.items() if flags & set(any_of)]
    yield Check("CPU features", "ok", ", ".join(present) or "none that matter here")


def cpu_flags(path: Path = _CPUINFO) -> set[str]:
    """Flags of the first core: `flags` on x86, `Features` on Arm; empty where unknown."""
    with contextlib.suppress(OSError):
        for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
            key, _, value = line.partition(":")
            if key.strip() in ("flags", "Features"):
                return set(value.split())
    return set()


def _memory() -> Check:
    import psutil  # type: ignore[import-untyped]

    memory = psutil.virtual_memory()
    available, total = memory.available / 2**30, memory.total / 2**30
    detail = f"{available:.1f} of {total:.1f} GiB available"
    if available < _MIN_MEMORY_GIB:
        return Check("memory", "note", detail, "close something, or distill with --batch-size 64")
    return Check("memory", "ok", detail)


def _disk(folder: Path) -> Check:
    existing = next(p for p in (folder.absolute(), *folder.absolute().parents) if p.exists())
    free = shutil.disk_usage(existing).free / 2**30
    detail = f"{free:.1f} GiB free at {existing}"
    if not os.access(existing, os.W_OK):
        return Check("disk", "missing", f"{existing} cannot be written", "another --out")
    if free < _MIN_DISK_GIB:
        return Check("disk", "note", detail, "free some space, or --out on another disk")
    return Check("disk", "ok", detail)


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:200]
