"""What a training run shows and leaves behind: progress, metrics, and the state to resume from."""

from __future__ import annotations

import io
import json
import logging
import math
import signal
import threading
import zipfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import IO, Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from dimefm_edge.errors import CheckpointError
from dimefm_edge.files import atomic_file

logger = logging.getLogger(__name__)

METRICS_FILE = "metrics.jsonl"
STATE_FILE = "training_state.pt"


class RunLog:
    """Appends metrics to `metrics.jsonl` and TensorBoard; on resuming, forgets later steps."""

    def __init__(self, run_dir: Path, *, start_step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._path = run_dir / METRICS_FILE
        kept = [row for row in read_metrics(run_dir) if row["step"] < start_step]
        with atomic_file(self._path) as stream:
            stream.write("".join(json.dumps(row) + "\n" for row in kept).encode())
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
    """Every row of a run's metrics; a line that a kill cut or a crash damaged is left out."""
    path = run_dir / METRICS_FILE
    if not path.is_file():
        return []
    rows = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if isinstance(row, dict) and isinstance(row.get("step"), int):
            rows.append(row)
    return rows


def save_state(run_dir: Path, state: dict[str, Any]) -> None:
    """Write the training state: whole or not at all."""
    buffer = io.BytesIO()  # torch.save hides why a write to disk fails
    torch.save(state, buffer)
    with atomic_file(run_dir / STATE_FILE) as stream:
        stream.write(buffer.getbuffer())


def load_state(run_dir: Path) -> dict[str, Any]:
    """Read the training state through torch's weights-only loader.

    Raises:
        CheckpointError: If it is missing or damaged.
    """
    path = run_dir / STATE_FILE
    try:
        with zipfile.ZipFile(path) as archive:  # torch writes checksums and never looks at them
            if damaged := archive.testzip():
                raise zipfile.BadZipFile(f"{damaged} does not match its checksum")
        state = torch.load(path, map_location="cpu", weights_only=True)
        if not isinstance(state, dict):
            raise TypeError(f"it holds a {type(state).__name__}, not a state")
    except FileNotFoundError as error:
        raise CheckpointError(f"nothing to resume: {path} does not exist") from error
    except PermissionError:
        raise
    except Exception as error:  # on damaged bytes zipfile and torch raise nearly anything
        reason = (str(error).strip() or type(error).__name__).splitlines()[0][:200]
        raise CheckpointError(
            f"{path} is damaged: {reason}",
            hint=f"delete {path} and run again: the embeddings are kept, training starts anew",
        ) from error
    return state


def require_same(run_dir: Path, wanted: Mapping[str, Any], before: Mapping[str, Any]) -> None:
    """Refuse to go on with a run by other settings than it began with.

    Args:
        run_dir: The run.
        wanted: What must be as it was, by name.
        before: What it was.

    Raises:
        CheckpointError: With each setting that changed.
    """
    changed = [key for key in wanted if wanted[key] != before.get(key)]
    if changed:
        pairs = ", ".join(f"{key} was {before.get(key)} and is {wanted[key]}" for key in changed)
        raise CheckpointError(
            f"cannot resume {run_dir}: {pairs}", hint="give the same flags, or another --out"
        )


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
    total: int, done: int, *, unit: str = "images", show: bool
) -> Iterator[Callable[[float, float], None]]:
    columns = (
        TextColumn("distil"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[rate]:,.0f} " + unit + "/s  loss {task.fields[loss]:.3f}"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True), disable=not show) as bar:
        task = bar.add_task("distil", total=total, completed=done, rate=0.0, loss=math.nan)
        yield lambda rate, loss: bar.update(task, advance=1, rate=rate, loss=loss)
