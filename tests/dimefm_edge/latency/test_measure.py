"""Measured latency: on a clock that the calls set, and real memory in processes of their own."""

from __future__ import annotations

import gc
import itertools
import json
import os
import random
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import psutil
import pytest

from dimefm_edge.latency import measure
from dimefm_edge.latency.measure import (
    machine_info,
    measure_blocks,
    measure_interleaved,
    measure_latency,
    peak_rss_mib,
    sample_blocks,
    sample_interleaved,
)

ROOT = Path(__file__).parents[3]


class Clock:
    """A clock that stands still but for what calls take."""

    def __init__(self) -> None:
        self.ns = 12_345
        self.calls: list[str] = []

    def subject(self, name: str, *times_ms: float):
        """A call that takes these times in turn, and the last one from then on."""
        left = list(times_ms)

        def call() -> None:
            self.calls.append(name)
            self.ns += round(1e6 * (left.pop(0) if len(left) > 1 else left[0]))

        return call


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    fake = SimpleNamespace(perf_counter_ns=lambda: clock.ns, perf_counter=lambda: clock.ns / 1e9)
    monkeypatch.setattr(measure, "time", fake)
    return clock


def test_percentiles_of_given_times_without_the_warm_up(clock):
    times = list(range(1, 101))
    random.Random(0).shuffle(times)
    call = clock.subject("a", *[700] * 10, *times)
    report = measure_latency(
        call, name="a", batch_size=4, min_runs=10, max_seconds=100, size_mib=2.5
    )
    assert report.to_dict() == pytest.approx(
        {
            "name": "a",
            "batch_size": 4,
            "p50_ms": 50.5,
            "p90_ms": 90.1,
            "p99_ms": 99.01,
            "mean_ms": 50.5,
            "images_per_s": 4000 / 50.5,
            "warmup_runs": 10,
            "runs": 100,
            "is_steady": True,
            "peak_rss_mib": report.peak_rss_mib,
            "size_mib": 2.5,
        }
    )
    assert report.peak_rss_mib > 10


def test_warming_up_ends_when_two_windows_agree(clock):
    # Three of the last ten to sixth calls must be fast before the medians agree: call 13.
    report = measure_latency(
        clock.subject("a", *[1000] * 5, 10), name="a", min_runs=3, max_seconds=100
    )
    assert (report.warmup_runs, report.is_steady) == (13, True)
    assert report.p99_ms == pytest.approx(10)


def test_times_that_never_settle_are_told(clock):
    growing = [1.5**i for i in range(60)]
    report = measure_latency(clock.subject("a", *growing), name="a", min_runs=3, max_seconds=0.5)
    assert report.is_steady is False
    spent = np.cumsum(growing)
    assert report.warmup_runs == 1 + int(np.argmax(spent >= 500))


def test_subjects_take_turns(clock):
    subjects = {name: clock.subject(name, 5) for name in "abc"}
    reports = measure_interleaved(subjects, min_runs=4, max_seconds=100, sizes_mib={"b": 1.0})
    assert "".join(clock.calls[:30]) == "a" * 10 + "b" * 10 + "c" * 10
    assert "".join(clock.calls[30:]) == "abc" * 40
    assert [report.name for report in reports] == ["a", "b", "c"]
    assert [report.runs for report in reports] == [40, 40, 40]
    assert [report.size_mib for report in reports] == [None, 1.0, None]


def test_a_machine_that_slows_down_halfway_slows_all(clock):
    def call() -> None:
        clock.ns += 1_000_000 if clock.ns < 100_000_000 else 3_000_000

    first, second = measure_interleaved({"a": call, "b": call}, min_runs=10, max_seconds=100)
    assert first.p50_ms == second.p50_ms
    assert first.mean_ms == pytest.approx(second.mean_ms, rel=0.05)
    assert min(first.p90_ms, second.p90_ms) == pytest.approx(3)  # the slow part is in both


@pytest.mark.parametrize(
    ("call_ms", "min_runs", "runs"),
    [
        (100, 50, 10),  # two subjects of 1 s each: the time is over before min_runs
        (100, 2, 10),
        (10, 2, 20),  # ten times min_runs, with time left
        (9000, 50, 3),  # too slow: three make a median
        (9000, 1, 1),
    ],
)
def test_how_many_calls_are_timed(clock, call_ms, min_runs, runs):
    subjects = {name: clock.subject(name, call_ms) for name in "ab"}
    warmups, samples = sample_interleaved(subjects, min_runs=min_runs, max_seconds=1)
    assert {name: len(values) for name, values in samples.items()} == {"a": runs, "b": runs}
    assert clock.calls.count("a") == warmups["a"][0] + runs
    assert all(value == pytest.approx(call_ms) for value in samples["a"])


def test_a_real_call_takes_the_time_it_takes():
    import time

    report = measure_latency(lambda: time.sleep(0.004), name="a", min_runs=5, max_seconds=0.1)
    assert 4 <= report.p50_ms < 40
    assert report.p50_ms <= report.p90_ms <= report.p99_ms
    assert report.images_per_s == pytest.approx(1000 / report.mean_ms)


@pytest.mark.parametrize("was_enabled", [True, False])
def test_garbage_is_not_collected_while_timing_and_is_afterwards(clock, was_enabled):
    seen = []

    def call() -> None:
        seen.append(gc.isenabled())
        clock.ns += 10_000
        if len(seen) == 15:
            raise RuntimeError("the model broke")

    (gc.enable if was_enabled else gc.disable)()
    try:
        with pytest.raises(RuntimeError, match="the model broke"):
            measure_latency(call, name="a", min_runs=10, max_seconds=100)
        assert gc.isenabled() is was_enabled
    finally:
        gc.enable()
    assert seen == [was_enabled] * 10 + [False] * 5


@pytest.mark.parametrize(
    "options",
    [
        {"min_runs": 0},
        {"max_seconds": 0},
        {"max_seconds": float("nan")},
        {"batch_size": 0},
        {"subjects": {}},
    ],
)
def test_what_cannot_be_measured_is_refused(clock, options):
    subjects = options.pop("subjects", {"a": clock.subject("a", 1)})
    with pytest.raises(ValueError, match=r"must be at least 1|needs a subject"):
        measure_interleaved(subjects, **options)
    assert clock.calls == []


def child(code: str, cwd: Path = ROOT) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": str(cwd)},
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_peak_memory_stays_after_it_is_freed():
    before, after = json.loads(
        child(
            "from dimefm_edge.latency.measure import peak_rss_mib\n"
            "before = peak_rss_mib()\n"
            "block = b'x' * (200 << 20)\n"
            "del block\n"
            "print([before, peak_rss_mib()])"
        )
    )
    assert 190 < after - before < 230


def test_peak_memory_is_not_that_of_the_process_that_started_this_one():
    code = "from dimefm_edge.latency.measure import peak_rss_mib; print(peak_rss_mib())"
    peak = child(
        "import subprocess, sys\n"
        "block = b'x' * (400 << 20)\n"
        f"sys.stdout.write(subprocess.check_output([sys.executable, '-c', {code!r}], text=True))"
    )
    assert 5 < float(peak) < 300
    assert peak_rss_mib() >= psutil.Process().memory_info().rss / 2**20 * 0.9


def test_machine_info_says_what_a_figure_was_measured_on():
    info = machine_info()
    assert json.loads(json.dumps(info, allow_nan=False)) == info
    assert info["cpu"]
    assert info["architecture"] in info["os"]
    assert info["cores_logical"] == os.cpu_count()
    assert info["cores_available"] == len(os.sched_getaffinity(0))
    assert info["memory_mib"] == round(psutil.virtual_memory().total / 2**20)
    assert info["load_1min"] >= 0
    assert info["python"] == sys.version.split()[0]
    assert info["versions"]["numpy"] == np.__version__


def test_machine_info_imports_nothing_heavy_and_sees_the_cores_it_may_use():
    cores, loaded = json.loads(
        child(
            "import json, os, sys\n"
            "os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})\n"
            "from dimefm_edge.latency.measure import machine_info\n"
            "info = machine_info()\n"
            "heavy = sorted({'torch', 'timm', 'onnx', 'onnxruntime'} & sys.modules.keys())\n"
            "print(json.dumps([info['cores_available'], heavy]))"
        )
    )
    assert cores == 1
    assert loaded == []


def test_the_commit_is_that_of_the_checkout_it_runs_from(tmp_path):
    code = "from dimefm_edge.latency.measure import machine_info; print(machine_info()['commit'])"
    shutil.copytree(
        ROOT / "dimefm_edge",
        tmp_path / "dimefm_edge",
        ignore=shutil.ignore_patterns("__pycache__", "assets"),
    )
    assert child(code, tmp_path) == "None\n"  # installed, not a checkout

    def git(*words: str) -> str:
        who = ["-c", "user.name=a", "-c", "user.email=a@b"]
        return subprocess.check_output(["git", "-C", str(tmp_path), *who, *words], text=True)

    git("init", "-q")
    git("add", "dimefm_edge/errors.py")
    git("commit", "-q", "-m", "one")
    head = git("rev-parse", "HEAD").strip()
    assert child(code, tmp_path) == head[:12] + "\n"
    with (tmp_path / "dimefm_edge" / "errors.py").open("a") as file:
        file.write("# edited\n")
    assert child(code, tmp_path) == head[:12] + "+\n"


def test_blocks_leave_out_the_first_calls_and_take_turns():
    order = []
    samples = sample_blocks(
        {"a": lambda: order.append("a"), "b": lambda: order.append("b")}, rounds=2, block_seconds=0
    )
    assert {name: len(times) for name, times in samples.items()} == {"a": 6, "b": 6}
    assert "".join(order) == "aaaaabbbbb" * 2


def test_blocks_that_take_too_long_end_early_but_not_before_the_first(clock):
    subjects = {name: clock.subject(name, 100) for name in "ab"}
    samples = sample_blocks(subjects, rounds=9, block_seconds=0.1, max_seconds=1.5)
    assert {name: len(times) for name, times in samples.items()} == {"a": 6, "b": 6}
    samples = sample_blocks(subjects, rounds=9, block_seconds=0.1, max_seconds=0.01)
    assert {name: len(times) for name, times in samples.items()} == {"a": 3, "b": 3}


def test_reports_of_blocks(clock):
    subjects = {"a": clock.subject("a", 5), "b": clock.subject("b", 10)}
    first, second = measure_blocks(subjects, max_seconds=100)
    assert [first.name, second.name] == ["a", "b"]
    assert (first.runs, second.runs) == pytest.approx((20 * 20, 20 * 10), rel=0.05)
    assert (first.p50_ms, second.p50_ms) == pytest.approx((5, 10))
    assert first.is_steady
    assert first.warmup_runs == 10
    blocks = [len(list(block)) for _, block in itertools.groupby(clock.calls[20:])]
    assert len(blocks) == 2 * 20
    assert set(blocks) <= {22, 23, 12, 13}  # the first two of each are not counted
    first, second = measure_blocks({"a": subjects["a"], "b": clock.subject("b", 2000)},
                                   max_seconds=1)  # fmt: skip
    assert second.runs == 3


@pytest.mark.parametrize(("names", "max_seconds"), [("", 1.0), ("a", 0.0), ("a", float("nan"))])
def test_blocks_of_nothing_are_refused(clock, names, max_seconds):
    subjects = {name: clock.subject(name, 1) for name in names}
    with pytest.raises(ValueError, match="measuring needs a subject"):
        measure_blocks(subjects, max_seconds=max_seconds)
    assert clock.calls == []
