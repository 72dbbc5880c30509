"""Processes of their own that need not import torch: forks of one that has, once a session."""

from __future__ import annotations

import multiprocessing
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

_CONTEXT = multiprocessing.get_context("forkserver")
# None of ours: what is installed may be another checkout than the one that is tested.
_CONTEXT.set_forkserver_preload(["torch._dynamo", "timm", "open_clip", "torch.utils.tensorboard"])


class Fork:
    """`target()` as a script with `words` behind its name; what it prints goes into `log`."""

    def __init__(self, target: Callable[[], object], words: Sequence[object], log: Path) -> None:
        self._log = log
        self._process = _CONTEXT.Process(target=_run, args=(target, [*map(str, words)], log))
        self._process.start()

    def poll(self) -> int | None:
        """The exit code; None while it runs."""
        return self._process.exitcode

    def send_signal(self, number: int) -> None:
        assert self._process.pid is not None
        os.kill(self._process.pid, number)

    def wait(self, timeout: float) -> int:
        self._process.join(timeout)
        code = self._process.exitcode
        assert code is not None, f"it still runs after {timeout:g} s: {self.said}"
        return code

    @property
    def said(self) -> str:
        return self._log.read_text() if self._log.exists() else ""


def _run(target: Callable[[], object], words: list[str], log: Path) -> None:
    with log.open("wb") as stream:
        for number in (1, 2):
            os.dup2(stream.fileno(), number)
    sys.argv = [target.__name__, *words]
    sys.exit(target())
