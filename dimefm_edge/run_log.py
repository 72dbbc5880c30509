"""What a training run shows and leaves behind: progress, metrics, and the state to resume from."""

from __future__ import annotations

import json
import logging
import math
import os
import pickle
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import IO, Any
from zipfile import BadZipFile

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from dimefm_edge.errors import CheckpointError

logger = logging.getLogger(__name__)

METRICS_FILE = "metrics.jsonl"
STATE_FILE = "training_state.pt"


class RunLog:
    """Appends metrics to `metrics.jsonl` and TensorBoard; on resuming, forgets later steps."""

    def __init__(self, run_dir: Path, *, start_step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._path = run_dir / METRICS_FILE
        kept = [line for line in _lines(self._path) if _step(line) < start_step]
        with atomic_file(self._path) as stream:
            stream.write("".join(kept).encode())
        self._file: IO[str] = self._path.open("a", encoding="utf-8")
        self._events = SummaryWriter(str(run_dir / "tensorboard"), purge_step=start_step)

    def write(self, step: int, values: dict[str, float]) -> None:
        """Record values of one step."""
        self._file.write(json.dumps({"step": step, **values}) + "\n")
        self._file.flush()
        for name, value in values.items():
            self._events.add_scalar(name, value, step)

    def __enter__(self) -> RunLog:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._file.close()
        self._events.close()


def read_metrics(run_dir: Path) -> list[dict[str, float]]:
    """Every row of a run's metrics; a last line cut by a kill is left out."""
    return [json.loads(line) for line in _lines(run_dir / METRICS_FILE)]


def save_state(run_dir: Path, state: dict[str, Any]) -> None:
    """Write the training state: whole or not at all."""
    with atomic_file(run_dir / STATE_FILE) as stream:
        torch.save(state, stream)


def load_state(run_dir: Path) -> dict[str, Any]:
    """Read the training state through torch's weights-only loader.

    Raises:
        CheckpointError: If it is missing or damaged.
    """
    path = run_dir / STATE_FILE
    try:
        state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError as error:
        raise CheckpointError(f"nothing to resume: {path} does not exist") from error
    except (
        RuntimeError,
        EOFError,
        pickle.UnpicklingError,
        BadZipFile,
        ValueError,
    ) as error:
        raise CheckpointError(
            f"{path} is damaged: {str(error).splitlines()[0][:200]}",
            hint=f"delete {path} and run again: the embeddings are kept, training starts anew",
        ) from error
    return state


@contextmanager
def atomic_file(path: Path) -> Iterator[IO[bytes]]:
    """Open a file to replace `path` with: whole on leaving, or not at all on an error."""
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with temporary.open("wb") as stream:
            yield stream
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


class StopSignal:
    """Turns the first Ctrl-C or SIGTERM into a flag, so that a step is never half done."""

    def __init__(self) -> None:
        self.is_set = False
        self._former: dict[int, Any] = {}

    def __enter__(self) -> StopSignal:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._former[number] = signal.signal(number, self._stop)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._former.items():
            signal.signal(number, handler)

    def _stop(self, number: int, _frame: object) -> None:
        self.is_set = True
        logger.warning("stopping after this step; the state is saved")
        signal.signal(number, self._former[number])  # a second one stops at once


@contextmanager
def training_progress(
    total: int, done: int, *, show: bool
) -> Iterator[Callable[[float, float], None]]:
    columns = (
        TextColumn("distil"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[rate]:,.0f} images/s  loss {task.fields[loss]:.3f}"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True), disable=not show) as bar:
        task = bar.add_task("distil", total=total, completed=done, rate=0.0, loss=math.nan)
        yield lambda rate, loss: bar.update(task, advance=1, rate=rate, loss=loss)


def _lines(path: Path) -> list[str]:
    if not path.is_file():
        return []
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True)
    return [line for line in lines if line.endswith("}\n")]


def _step(line: str) -> int:
    return int(json.loads(line)["step"])
