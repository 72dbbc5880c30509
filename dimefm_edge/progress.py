"""Progress bars of long work, on stderr. No torch here."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn


@contextlib.contextmanager
def counting(
    title: str, total: int, *, is_transient: bool = False
) -> Iterator[Callable[[int], None]]:
    """A progress bar on stderr with rate and remaining time; silent when nothing is to do.

    A transient one leaves nothing behind, and is not shown but on terminals.
    """
    columns = (
        TextColumn(title),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[rate]:,.0f}/s"),
        TimeRemainingColumn(),
    )
    begun, done = time.perf_counter(), 0
    console = Console(stderr=True)
    is_silent = not total or (is_transient and not console.is_terminal)
    with Progress(*columns, console=console, disable=is_silent, transient=is_transient) as bar:
        task = bar.add_task(title, total=total, rate=0.0)

        def advance(count: int) -> None:
            nonlocal done
            done += count
            bar.update(task, advance=count, rate=done / (time.perf_counter() - begun))

        yield advance
