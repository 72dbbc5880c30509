"""Measured latency: warm up until steady, then time subjects in turn so that drift hits all.

A machine that slows down halfway slows every subject: A B C A B C, never A A A B B B. Used
by `dimefm-edge bench`, the run report and benchmarks/. No torch here.
"""

from __future__ import annotations

import contextlib
import gc
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

_WARMUP_WINDOW = 5
_STEADY_WITHIN = 0.05
_BLOCKS, _BLOCK_S = 20, 0.1
_PACKAGES = (
    "dimefm_edge", "numpy", "pillow", "onnxruntime", "torch", "torchvision", "timm",
    "open_clip_torch", "onnx", "tensorrt",
)  # fmt: skip

Samples = npt.NDArray[np.float64]


@dataclass(frozen=True)
class LatencyReport:
    """What one call of a subject took; a call is one batch."""

    name: str
    batch_size: int
    p50_ms: float
    p90_ms: float
    p99_ms: float
    mean_ms: float
    images_per_s: float
    """batch_size over the mean."""
    warmup_runs: int
    runs: int
    is_steady: bool
    """Whether warming up ended because the times had settled, not because it took too long."""
    peak_rss_mib: float
    """Of the whole process so far: measure one subject per process to compare memory."""
    size_mib: float | None
    """Of the model's file, where the caller knows it."""

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def measure_latency(
    call: Callable[[], object],
    *,
    name: str,
    batch_size: int = 1,
    min_runs: int = 50,
    max_seconds: float = 10.0,
    size_mib: float | None = None,
) -> LatencyReport:
    """Time one subject; see `measure_interleaved`."""
    (report,) = measure_interleaved(
        {name: call},
        batch_size=batch_size,
        min_runs=min_runs,
        max_seconds=max_seconds,
        sizes_mib={} if size_mib is None else {name: size_mib},
    )
    return report


def measure_interleaved(
    subjects: Mapping[str, Callable[[], object]],
    *,
    batch_size: int = 1,
    min_runs: int = 50,
    max_seconds: float = 10.0,
    sizes_mib: Mapping[str, float] | None = None,
) -> list[LatencyReport]:
    """Time subjects in turn and summarise each.

    Args:
        subjects: Calls that return when their work is done, by name.
        batch_size: Images per call, the same for all.
        min_runs: Timed calls of each, at least, unless `max_seconds` ends them.
        max_seconds: Per subject, for its timed calls; warming up takes at most as long again.
            With time left after `min_runs`, up to ten times as many are made.
        sizes_mib: Sizes of the models' files, where known.

    Returns:
        One report per subject, in their order.

    Raises:
        ValueError: If there is no subject, or a count is not positive.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}")
    warmups, samples = sample_interleaved(subjects, min_runs=min_runs, max_seconds=max_seconds)
    peak = peak_rss_mib()
    return [
        _summarise(
            name,
            samples[name],
            batch_size=batch_size,
            warmup=warmups[name],
            peak=peak,
            size=(sizes_mib or {}).get(name),
        )
        for name in subjects
    ]


def measure_blocks(
    subjects: Mapping[str, Callable[[], object]], *, max_seconds: float = 10.0
) -> list[LatencyReport]:
    """Time subjects in turn, a block of calls at a time, and summarise each; a call is one image.

    For runtimes in one process, whose threads would slow each other call by call: `sample_blocks`.

    Args:
        subjects: As in `measure_interleaved`.
        max_seconds: Per subject, for its timed calls; warming up takes at most as long again.

    Raises:
        ValueError: If there is no subject, or `max_seconds` is not positive.
    """
    if not subjects or not max_seconds > 0:
        raise ValueError("measuring needs a subject and max_seconds > 0")
    warmups = {name: warm_up(call, max_seconds) for name, call in subjects.items()}
    samples = sample_blocks(
        subjects, rounds=_BLOCKS, block_seconds=min(_BLOCK_S, max_seconds / _BLOCKS),
        max_seconds=max_seconds * len(subjects),
    )  # fmt: skip
    peak = peak_rss_mib()
    return [
        _summarise(
            name, samples[name], batch_size=1, warmup=warmups[name], peak=peak, size=None
        )
        for name in subjects
    ]  # fmt: skip


def sample_interleaved(
    subjects: Mapping[str, Callable[[], object]],
    *,
    min_runs: int = 50,
    max_seconds: float = 10.0,
) -> tuple[dict[str, tuple[int, bool]], dict[str, Samples]]:
    """Time subjects in turn; sample i of each was taken in the same round.

    Args:
        subjects: As in `measure_interleaved`, like the rest.

    Returns:
        Warm-up calls and whether they ended steady, and (runs,) milliseconds, both by name.

    Raises:
        ValueError: If there is no subject, or a count is not positive.
    """
    if not subjects or min_runs < 1 or not max_seconds > 0:
        raise ValueError("measuring needs a subject, min_runs >= 1 and max_seconds > 0")
    warmups = {name: warm_up(call, max_seconds) for name, call in subjects.items()}
    times: dict[str, list[float]] = {name: [] for name in subjects}
    deadline = time.perf_counter() + max_seconds * len(subjects)
    with no_garbage_collection():
        for round_idx in range(10 * min_runs):
            # A late start of any round is the end; at least three make a median.
            if round_idx >= min(3, min_runs) and time.perf_counter() >= deadline:
                break
            for name, call in subjects.items():
                times[name].append(_time_ms(call))
    return warmups, {name: np.asarray(values) for name, values in times.items()}


def sample_blocks(
    subjects: Mapping[str, Callable[[], object]],
    *,
    rounds: int = 5,
    block_seconds: float = 0.1,
    max_seconds: float = float("inf"),
) -> dict[str, Samples]:
    """Time many subjects in turn, each a few calls at a time, the first of them not counted.

    After a call, a session's threads spin for some milliseconds, waiting for the next. With many
    sessions taking turns call by call, each is slowed by the threads of the one before.

    Args:
        subjects: As in `measure_interleaved`.
        rounds: Blocks of each subject.
        block_seconds: Of one block's timed calls; at least three are made.
        max_seconds: Of all rounds: a round that would begin later is left out, but the first.

    Returns:
        Milliseconds of each call, by name.
    """
    times: dict[str, list[float]] = {name: [] for name in subjects}
    end = time.perf_counter() + max_seconds
    with no_garbage_collection():
        for round_idx in range(rounds):
            if round_idx and time.perf_counter() >= end:
                break
            for name, call in subjects.items():
                times[name] += time_block(call, block_seconds)
    return {name: np.asarray(values) for name, values in times.items()}


def time_block(call: Callable[[], object], seconds: float) -> list[float]:
    """Milliseconds of one subject's calls, one after another, after two that are not counted.

    Args:
        call: Returns when its work is done.
        seconds: Of all calls; at least three are made.
    """
    call()
    call()
    deadline = time.perf_counter() + seconds
    block = [_time_ms(call) for _ in range(3)]
    while time.perf_counter() < deadline:
        block.append(_time_ms(call))
    return block


def peak_rss_mib() -> float:
    """The most memory that this process has had resident since it started."""
    # Not getrusage where there is a choice: its peak begins at that of the process that
    # started this one.
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) / 2**10
    try:
        import resource
    except ImportError:  # not on Windows
        import psutil  # type: ignore[import-untyped]

        return float(psutil.Process().memory_info().rss) / 2**20
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**20 if sys.platform == "darwin" else 2**10)


def machine_info() -> dict[str, Any]:
    """What a figure was measured on: JSON values, read without importing what they name."""
    import psutil

    available = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    versions = {}
    for package in _PACKAGES:
        with contextlib.suppress(PackageNotFoundError):
            versions[package] = version(package)
    return {
        "cpu": _cpu_model(),
        "architecture": platform.machine(),
        "cores_physical": psutil.cpu_count(logical=False),
        "cores_logical": psutil.cpu_count(),
        "cores_available": available,
        "load_1min": round(psutil.getloadavg()[0], 2),
        "memory_mib": round(psutil.virtual_memory().total / 2**20),
        "os": platform.platform(),
        "python": platform.python_version(),
        "versions": versions,
        "commit": _commit(),
    }


def _summarise(
    name: str,
    samples: Samples,
    *,
    batch_size: int,
    warmup: tuple[int, bool],
    peak: float,
    size: float | None,
) -> LatencyReport:
    p50, p90, p99 = (float(v) for v in np.percentile(samples, [50, 90, 99]))
    mean = float(samples.mean())
    return LatencyReport(
        name=name,
        batch_size=batch_size,
        p50_ms=p50,
        p90_ms=p90,
        p99_ms=p99,
        mean_ms=mean,
        images_per_s=1e3 * batch_size / mean if mean else float("inf"),
        warmup_runs=warmup[0],
        runs=len(samples),
        is_steady=warmup[1],
        peak_rss_mib=peak,
        size_mib=size,
    )


def warm_up(call: Callable[[], object], max_seconds: float) -> tuple[int, bool]:
    """Call until two windows in a row agree: how many calls, and whether they did."""
    deadline = time.perf_counter() + max_seconds
    times: list[float] = []
    while True:
        times.append(_time_ms(call))
        if len(times) >= 2 * _WARMUP_WINDOW:
            before = float(np.median(times[-2 * _WARMUP_WINDOW : -_WARMUP_WINDOW]))
            after = float(np.median(times[-_WARMUP_WINDOW:]))
            if abs(after - before) <= _STEADY_WITHIN * before:
                return len(times), True
        if time.perf_counter() >= deadline:
            return len(times), False


def _time_ms(call: Callable[[], object]) -> float:
    started = time.perf_counter_ns()
    call()
    return (time.perf_counter_ns() - started) / 1e6


@contextlib.contextmanager
def no_garbage_collection() -> Iterator[None]:
    """Collect once, which may take a second, and then not while something is timed."""
    was_enabled = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def _cpu_model() -> str:
    """The CPU's name; on boards whose kernel does not tell it, the board's.

    Clouds hide which CPU it is ("AMD EPYC" for any of them): then its family and model are added.
    """
    with contextlib.suppress(OSError):
        pairs = [line.partition(":") for line in Path("/proc/cpuinfo").read_text().splitlines()]
        told = {key.strip(): value.strip() for key, _, value in reversed(pairs)}
        name = told.get("model name") or told.get("Model")
        if name and not any(c.isdigit() for c in name) and "cpu family" in told:
            return f"{name} (family {told['cpu family']}, model {told.get('model', '?')})"
        if name:
            return name
    with contextlib.suppress(OSError):
        return Path("/proc/device-tree/model").read_text().strip("\0\n ")
    return platform.processor() or platform.machine()


def _commit() -> str | None:
    """The checkout this package runs from, `+` when it was edited; None when installed."""
    folder = Path(__file__).resolve().parents[2]
    if not (folder / ".git").exists():
        return None
    try:
        head = _git(folder, "rev-parse", "--short=12", "HEAD")
        edited = _git(folder, "status", "--porcelain", "--untracked-files=no")
    except (OSError, subprocess.SubprocessError):
        return None
    return head + ("+" if edited else "")


def _git(folder: Path, *arguments: str) -> str:
    done = subprocess.run(
        ["git", "--no-optional-locks", "-C", str(folder), *arguments],
        capture_output=True,
        text=True,
        timeout=10,
        check=True,
    )
    return done.stdout.strip()
