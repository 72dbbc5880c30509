"""The process that one model is timed in: loads it, and does what its parent asks, line by line.

`python -m dimefm_edge.bench.worker` reads one JSON object a line and answers each with one.
A process of its own gives a model its own memory, threads and crashes. What libraries print
goes to stderr.
"""

from __future__ import annotations

import ctypes
import gc
import json
import os
import signal
import sys
import time
from collections.abc import Callable
from typing import Any

import numpy as np

from dimefm_edge.errors import DimeFMError

Message = dict[str, Any]

_PR_SET_PDEATHSIG = 1  # <linux/prctl.h>
_UNTIMED_S = 0.02
"""Calls before a turn is timed, at least one: caches are cold after a pause."""


class Worker:
    """One model, loaded by `load`; each public method answers one kind of request."""

    def load(self, message: Message) -> Message:
        """Load the model and answer once: how long each took, and memory."""
        if message["pin"] and hasattr(os, "sched_setaffinity"):
            os.sched_setaffinity(0, message["pin"])
        from dimefm_edge.bench.prepare import Prepared
        from dimefm_edge.bench.runnable import Load, load_runnable, make_feed
        from dimefm_edge.latency.measure import peak_rss_mib

        self.prepared, self.options = Prepared(**message["prepared"]), Load(**message["load"])
        _import_runtime(self.prepared.loader)
        self.bare_mib = peak_rss_mib()
        started = time.perf_counter()
        self.runnable = load_runnable(self.prepared, self.options)
        loaded = time.perf_counter()
        feed = make_feed(self.runnable, self.options)
        begun = time.perf_counter()
        self.runnable.run(feed)
        self.call: Callable[[], Any] = lambda: self.runnable.run(feed)
        return {
            "load_ms": 1e3 * (loaded - started),
            "first_ms": 1e3 * (time.perf_counter() - begun),
            "ready_at": time.time(),
            "takes_images": self.runnable.of_pixels is not None,
        }

    def warm_up(self, message: Message) -> Message:
        """Call until times settle."""
        from dimefm_edge.latency.measure import warm_up

        runs, is_steady = warm_up(self.call, message["seconds"])
        gc.collect()
        gc.disable()
        return {"runs": runs, "is_steady": is_steady}

    def turn(self, message: Message) -> Message:
        """Time calls for some seconds, one at least: milliseconds each."""
        call, clock = self.call, time.perf_counter_ns
        until = clock() + int(1e9 * _UNTIMED_S)
        call()
        while clock() < until:
            call()
        times: list[float] = []
        now = clock()
        until = now + int(1e9 * message["seconds"])
        while not times or now < until:
            started = now
            call()
            now = clock()
            times.append((now - started) / 1e6)
        return {"ms": times}

    def stages(self, message: Message) -> Message:
        """Image files to labels, stage by stage."""
        from dimefm_edge.bench.stages import time_stages

        return time_stages(self.prepared, self.runnable, **message["options"])

    def load_generator(self, message: Message) -> Message:
        """One scenario of MLPerf LoadGen."""
        from dimefm_edge.bench.load_generator import run_scenario

        return run_scenario(self.runnable, self.options, **message["options"])

    def operators(self, message: Message) -> Message:
        """Where a call's time goes, operator by operator."""
        from dimefm_edge.bench.operators import profile_operators

        return profile_operators(self.prepared, self.runnable, self.options)

    def memory(self, message: Message) -> Message:
        """Peak resident memory of this process, and before the model was loaded."""
        from dimefm_edge.latency.measure import peak_rss_mib

        return {"peak_rss_mib": peak_rss_mib(), "bare_rss_mib": self.bare_mib}


def _import_runtime(loader: str) -> None:
    """The runtime's package is part of the bare process, not of the model's memory."""
    if loader == "torch":
        import torch  # noqa: F401
    elif loader == "openvino":
        import openvino  # noqa: F401
    elif loader != "python":
        import onnxruntime  # noqa: F401


def _main() -> int:
    _die_with_parent()
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # libraries print there
    sys.stdout = sys.stderr
    worker = Worker()
    for line in sys.stdin:
        message = json.loads(line)
        try:
            answer = getattr(worker, message["do"])(message)
        except DimeFMError as error:
            answer = {
                "error": str(error.args[0]), "hint": error.hint, "kind": type(error).__name__
            }  # fmt: skip
        except Exception as error:  # a model's own code may raise anything
            text = f"{type(error).__name__}: {error}".strip().splitlines()[0]
            answer = {"error": text, "hint": None, "kind": "DimeFMError"}
        answers.write(json.dumps(answer, default=_plain) + "\n")
        answers.flush()
    return 0


def _die_with_parent() -> None:
    """Linux ends this process when its parent is killed; stopped, it would not see that."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def _plain(value: Any) -> Any:
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, np.ndarray):
        return value.tolist()
    raise TypeError(f"not JSON: {type(value)}")


if __name__ == "__main__":
    sys.exit(_main())
