"""The parent's side of a worker: asks it, waits no longer than allowed, and stops it between turns.

A stopped process burns no CPU: a runtime's threads spin for milliseconds after each call, waiting
for the next, and would slow whoever has the turn.
"""

from __future__ import annotations

import contextlib
import json
import os
import queue
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import IO, Any

import dimefm_edge.errors
from dimefm_edge.bench.prepare import Prepared
from dimefm_edge.bench.runnable import Load
from dimefm_edge.bench.specs import SubjectSpec
from dimefm_edge.errors import DimeFMError

Message = dict[str, Any]

_CAN_STOP = hasattr(signal, "SIGSTOP")
_CLOSING_S = 5.0
_ROOTS = [str(Path(__file__).resolve().parents[2])]


class WorkerError(DimeFMError):
    """A model's process died, or took longer than allowed."""


class SubjectProcess:
    """One model in a process of its own; stopped unless it is asked something."""

    def __init__(self, label: str, *, threads: int) -> None:
        self.label = label
        self._errors: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115  (closed by close)
        self.started_at = time.time()
        self._process = subprocess.Popen(
            [sys.executable, "-m", "dimefm_edge.bench.worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            env=worker_environment(threads),
            # Ctrl-C is for the parent, which then ends its workers in order.
            start_new_session=True,
        )
        self._answers: queue.Queue[bytes | None] = queue.Queue()
        threading.Thread(target=self._read, daemon=True).start()
        self._is_stopped = False

    @property
    def pid(self) -> int:
        return self._process.pid

    def ask(self, what: str, *, limit_s: float, **values: Any) -> Message:
        """Ask for one thing and wait for the answer.

        Raises:
            DimeFMError: What went wrong there, as the same kind of error.
            WorkerError: If the process dies, or takes longer than `limit_s`; then it is ended.
        """
        assert self._process.stdin is not None
        if self._process.stdin.closed:
            raise WorkerError(f"{self.label} was ended before {what}")
        self._signal_on()
        try:
            self._process.stdin.write(json.dumps({"do": what, **values}).encode() + b"\n")
            self._process.stdin.flush()
            line = self._answers.get(timeout=limit_s)
        except queue.Empty:
            self.close(now=True)
            raise WorkerError(
                f"{self.label} was ended: {what} took longer than {limit_s:.0f} s",
                hint="--time-limit-s, if it needs more",
            ) from None
        except OSError:
            line = None
        if line is None:
            raise WorkerError(self._last_words())
        answer: Message = json.loads(line)
        if "error" in answer:
            raise known_error(answer)
        self._stop()
        return answer

    def close(self, *, now: bool = False) -> None:
        """End the process; it gets some seconds unless `now`."""
        self._signal_on()
        with contextlib.suppress(OSError):
            if self._process.stdin is not None:
                self._process.stdin.close()
        if not now:
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(_CLOSING_S)
        if self._process.poll() is None:
            self._process.kill()
            self._process.wait()
        self._errors.close()

    def _read(self) -> None:
        assert self._process.stdout is not None
        with contextlib.suppress(OSError, ValueError):
            for line in self._process.stdout:
                self._answers.put(line)
        self._answers.put(None)

    def _stop(self) -> None:
        if _CAN_STOP and not self._is_stopped:
            with contextlib.suppress(ProcessLookupError):
                self._process.send_signal(signal.SIGSTOP)
            self._is_stopped = True

    def _signal_on(self) -> None:
        if self._is_stopped:
            with contextlib.suppress(ProcessLookupError):
                self._process.send_signal(signal.SIGCONT)
            self._is_stopped = False

    def _last_words(self) -> str:
        self._process.wait()
        code = self._process.returncode
        how = f"by {signal.Signals(-code).name}" if code < 0 else f"with exit code {code}"
        self._errors.seek(0)
        said = self._errors.read().decode(errors="replace").strip().splitlines()
        return f"{self.label} died {how}" + (f": {said[-1]}" if said else "")


@contextlib.contextmanager
def subject_process(label: str, *, threads: int) -> Iterator[SubjectProcess]:
    """A worker that is ended on leaving, whatever happens."""
    process = SubjectProcess(label, threads=threads)
    try:
        yield process
    except BaseException:
        process.close(now=True)
        raise
    process.close()


def prepare_apart(spec: SubjectSpec, folder: Path, *, seed: int, limit_s: float) -> Prepared:
    """`prepare` in a process of its own.

    Raises:
        DimeFMError: What went wrong there, as the same kind of error.
        WorkerError: If it dies or takes longer than `limit_s`.
    """
    request = json.dumps({"spec": asdict(spec), "folder": str(folder), "seed": seed})
    command = [sys.executable, "-m", "dimefm_edge.bench.prepare", request]
    try:
        done = subprocess.run(
            command, capture_output=True, timeout=limit_s, env=worker_environment(0), check=False
        )
    except subprocess.TimeoutExpired as error:
        raise WorkerError(
            f"{spec.label}: making it ready took longer than {limit_s:.0f} s",
            hint="--time-limit-s, if it needs more",
        ) from error
    lines = done.stdout.decode(errors="replace").strip().splitlines()
    if not lines:
        said = done.stderr.decode(errors="replace").strip().splitlines()
        why = said[-1] if said else f"exit code {done.returncode}"
        raise WorkerError(f"{spec.label} cannot be made ready: {why}")
    answer = json.loads(lines[-1])
    if "error" in answer:
        raise known_error(answer)
    return Prepared(**answer)


def load_message(prepared: Prepared, load: Load, pin: tuple[int, ...]) -> Message:
    """What a worker's `load` wants."""
    return {"prepared": asdict(prepared), "load": asdict(load), "pin": list(pin)}


def known_error(answer: Message) -> DimeFMError:
    """An error that another process told, as the class that it had there."""
    kind = getattr(dimefm_edge.errors, str(answer["kind"]), DimeFMError)
    error: DimeFMError = kind(answer["error"], hint=answer.get("hint"))
    return error


def worker_environment(threads: int) -> dict[str, str]:
    """The parent's, finding this package; BLAS and OpenMP get so many threads, 0 leaves them."""
    paths = [*_ROOTS, os.environ.get("PYTHONPATH", "")]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, paths))}
    if threads:
        for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
            environment[name] = str(threads)
    return environment
