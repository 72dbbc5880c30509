"""Workers as the parent sees them: stopped between turns, ended when they hang, told when dead."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from dimefm_edge.bench.prepare import prepare
from dimefm_edge.bench.processes import (
    SubjectProcess,
    WorkerError,
    load_message,
    prepare_apart,
    subject_process,
)
from dimefm_edge.bench.runnable import Load
from dimefm_edge.bench.specs import parse_subjects
from dimefm_edge.errors import CheckpointError, DimeFMError
from tests.dimefm_edge.bench.conftest import SUBJECTS


def message(function, tmp_path):
    (spec,) = parse_subjects([f"{SUBJECTS}:{function}"])
    return load_message(prepare(spec, tmp_path), Load(), ())


def state(process: SubjectProcess) -> str:
    """Of Linux's: T is stopped."""
    return Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()[0]


def test_it_is_stopped_between_turns_and_gone_after(tmp_path):
    with subject_process("quick", threads=1) as process:
        process.ask("load", limit_s=60, **message("quick", tmp_path))
        for _ in range(100):
            if state(process) == "T":
                break
            time.sleep(0.02)
        assert state(process) == "T"
        assert process.ask("turn", limit_s=60, seconds=0.01)["ms"]
        pid = process.pid
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


@pytest.mark.skipif(sys.platform != "linux", reason="prctl is Linux's")
def test_it_does_not_outlive_a_killed_parent(tmp_path):
    """Stopped as it is between turns."""
    script = (
        "import time\n"
        "from dimefm_edge.bench.processes import SubjectProcess\n"
        "process = SubjectProcess('quick', threads=1)\n"
        f"process.ask('load', limit_s=60, **{message('quick', tmp_path)!r})\n"
        "print(process.pid, flush=True)\n"
        "time.sleep(60)\n"
    )
    parent = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE)
    assert parent.stdout is not None
    pid = int(parent.stdout.readline())
    parent.kill()
    parent.communicate()
    for _ in range(200):
        if not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE:
            return
        time.sleep(0.02)
    os.kill(pid, signal.SIGKILL)
    pytest.fail("the worker lives on")


def test_one_that_hangs_is_ended(tmp_path):
    with subject_process("hangs", threads=1) as process:
        with pytest.raises(WorkerError, match="hangs was ended: load took longer than 3 s"):
            process.ask("load", limit_s=3, **message("hangs", tmp_path))
        with pytest.raises(ProcessLookupError):
            os.kill(process.pid, 0)
        with pytest.raises(WorkerError, match="hangs was ended before run"):
            process.ask("run", limit_s=3)


def test_one_that_crashes_says_how(tmp_path):
    with (
        subject_process("crashes", threads=1) as process,
        pytest.raises(WorkerError, match="crashes died by SIGABRT"),
    ):
        process.ask("load", limit_s=60, **message("crashes", tmp_path))


def test_errors_come_as_what_they_were(tmp_path):
    with subject_process("raises", threads=1) as process:
        with pytest.raises(DimeFMError, match="RuntimeError: no such accelerator"):
            process.ask("load", limit_s=60, **message("raises", tmp_path))
        # It lives, and can be asked again.
        process.ask("load", limit_s=60, **message("quick", tmp_path))


def test_an_error_ends_the_process_at_once(tmp_path):
    with pytest.raises(KeyError), subject_process("quick", threads=1) as process:  # noqa: PT012
        process.ask("load", limit_s=60, **message("quick", tmp_path))
        raise KeyError
    with pytest.raises(ProcessLookupError):
        os.kill(process.pid, 0)


def test_prepare_apart(tiny_bundle_dir, tmp_path):
    (spec,) = parse_subjects([str(tiny_bundle_dir)])
    assert prepare_apart(spec, tmp_path, seed=0, limit_s=60).kind == "bundle"
    with pytest.raises(WorkerError, match="took longer than 0 s"):
        prepare_apart(spec, tmp_path, seed=0, limit_s=0.01)
    gone = parse_subjects([str(tmp_path / "gone.zip")])[0]
    with pytest.raises(CheckpointError, match="gone"):
        prepare_apart(gone, tmp_path, seed=0, limit_s=60)
