"""What `bench` measures, and how: its flags and its Python settings, said once."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from dimefm_edge.errors import InputError

Scenario = Literal["single-stream", "multi-stream", "offline", "server"]


@dataclass(frozen=True)
class BenchConfig:
    """Models in turn on this machine: how fast, how sure, at what cost."""

    models: tuple[str, ...] = ()
    """See `bench.specs.parse_subjects`; the first is what the others are compared to."""
    batch_size: int = 1
    """Images per call."""
    engine: str = "onnxruntime"
    """What runs bundles that name no runtime: onnxruntime, tensorrt, or an .engine file."""
    threads: int = 0
    """CPU threads; 0 takes one per physical core."""
    pin: tuple[int, ...] = ()
    """CPUs to run on, such as 0 1 2 3. Default: those that this process may use."""
    seconds: float = 10.0
    """Timed calls of each model, in turns; warming up takes at most as long again."""
    restarts: int = 3
    """Processes that each model gets, one after the other: each has its own luck with memory,
    which would otherwise pass for a difference of some percent."""
    image_size: int = 224
    """Side, in pixels, for ONNX files that leave it open."""
    scenario: tuple[Scenario, ...] = ()
    """Also MLPerf LoadGen's: single-stream, multi-stream, offline, server."""
    server_qps: float | None = None
    """Queries a second of the server scenario. Default: half of what the closed loop reached."""
    server_bound_ms: float | None = None
    """Latency that 99% of the server's queries must keep. Default: eight times the median call."""
    images: tuple[str, ...] = ()
    """Images (folders, .tar shards, scenes): also time files to labels, stage by stage."""
    data: tuple[str, ...] = ()
    """Labelled sets: also measure zero-shot accuracy."""
    operators: bool = False
    """Also profile each model operator by operator, by its own runtime. On with --out."""
    out: Path | None = None
    """Folder for bench.json, bench.csv and report.html, which holds every plot."""
    time_limit_s: float = 600.0
    """Longest that one step of one model may take; then it is ended and the others go on."""
    seed: int = 0
    """Of random inputs, random weights and the order of turns."""

    def __post_init__(self) -> None:
        for name in ("batch_size", "seconds", "restarts", "image_size", "time_limit_s"):
            if getattr(self, name) <= 0:
                flag = "--" + name.replace("_", "-")
                raise InputError(f"{flag} must be positive, got {getattr(self, name)}")
        if self.threads < 0 or self.seed < 0:
            raise InputError("--threads and --seed must not be negative")
        if (self.server_qps or 1) <= 0 or (self.server_bound_ms or 1) <= 0:
            raise InputError("--server-qps and --server-bound-ms must be positive")
        _check_cpus(self.pin)


def _check_cpus(pin: tuple[int, ...]) -> None:
    """Refuse CPUs that this process may not use; systems that pin none say only how many."""
    if hasattr(os, "sched_getaffinity"):
        usable = os.sched_getaffinity(0)
    else:
        usable = set(range(os.cpu_count() or 1))
    wrong = [cpu for cpu in pin if cpu not in usable]
    if wrong:
        named = " ".join(map(str, sorted(usable)))
        raise InputError(
            f"--pin names CPU {wrong[0]}, which this process may not use", hint=f"--pin {named}"
        )
