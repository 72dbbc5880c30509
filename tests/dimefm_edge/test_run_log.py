"""What a run leaves behind: whole files or none, and damage that is told, never run."""

from __future__ import annotations

import json
import os
import pickle
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dimefm_edge.errors import CheckpointError
from dimefm_edge.run_log import (
    METRICS_FILE,
    STATE_FILE,
    RunLog,
    StopSignal,
    load_state,
    read_metrics,
    save_state,
    training_progress,
)

ROOT = Path(__file__).parents[2]
STATE = {"step": 3, "student": {"w": torch.arange(1000.0)}, "best": {}, "loss": 0.5, "ema": None}


def child(code: str, *words: object) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", code, *map(str, words)],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


FULL = """
import json, resource, sys
from pathlib import Path
import torch
from dimefm_edge.files import atomic_file
from dimefm_edge.run_log import RunLog, save_state

run_dir = Path(sys.argv[1])
resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
said = {}

def write_file():
    with atomic_file(run_dir / "report.json") as stream:
        stream.write(b"x" * 50_000)

def write_metrics():
    with RunLog(run_dir, start_step=1) as log:
        for step in range(1, 2000):
            log.write(step, {"loss": 1.0})

for name, write in {
    "file": write_file,
    "state": lambda: save_state(run_dir, {"w": torch.zeros(20_000)}),
    "metrics": write_metrics,
}.items():
    try:
        write()
    except OSError as error:
        said[name] = [error.strerror, error.filename]
    except BaseException as error:
        said[name] = repr(error)
print(json.dumps(said))
"""


def test_a_full_disk_leaves_the_former_files_and_is_an_os_error(tmp_path):
    (tmp_path / "report.json").write_bytes(b"former")
    save_state(tmp_path, STATE)
    (tmp_path / METRICS_FILE).write_text('{"step": 0, "loss": 2.0}\n')
    output, errors = child(FULL, tmp_path).communicate(timeout=60)
    said = json.loads(output or "null")
    assert said is not None, errors
    assert said["file"][0] == "File too large"  # the limit's way to say "disk full"
    assert said["state"] == ["File too large", str(tmp_path / STATE_FILE)]
    assert said["metrics"][0] == "File too large"
    assert (tmp_path / "report.json").read_bytes() == b"former"
    assert load_state(tmp_path)["step"] == 3
    rows = read_metrics(tmp_path)
    assert [row["step"] for row in rows] == list(range(len(rows)))
    assert 300 < len(rows) < 800  # 20,000 bytes of them, or of TensorBoard's
    assert not list(tmp_path.glob(".*.tmp"))


class TestRunLog:
    def write(self, run_dir: Path, start: int, stop: int, **values: float) -> None:
        with RunLog(run_dir, start_step=start) as log:
            for step in range(start, stop):
                log.write(step, {"loss": 10.0 + step, **values})

    def test_rows_are_there_as_soon_as_they_are_written(self, tmp_path):
        with RunLog(tmp_path, start_step=0) as log:
            assert read_metrics(tmp_path) == []
            log.write(0, {"loss": 0.1 + 0.2})
            assert read_metrics(tmp_path) == [{"step": 0, "loss": 0.1 + 0.2}]

    def test_resuming_forgets_later_steps(self, tmp_path):
        self.write(tmp_path, 0, 6)
        self.write(tmp_path, 3, 5, again=1.0)
        assert read_metrics(tmp_path) == [
            {"step": 0, "loss": 10.0},
            {"step": 1, "loss": 11.0},
            {"step": 2, "loss": 12.0},
            {"step": 3, "loss": 13.0, "again": 1.0},
            {"step": 4, "loss": 14.0, "again": 1.0},
        ]

    def test_starting_anew_forgets_all(self, tmp_path):
        self.write(tmp_path, 0, 6)
        self.write(tmp_path, 0, 1)
        assert read_metrics(tmp_path) == [{"step": 0, "loss": 10.0}]

    def test_resuming_at_the_end_changes_no_byte(self, tmp_path):
        self.write(tmp_path, 0, 4, tiny=1e-17)
        before = (tmp_path / METRICS_FILE).read_bytes()
        self.write(tmp_path, 4, 4)
        assert (tmp_path / METRICS_FILE).read_bytes() == before

    def test_tensorboard_shows_each_step_once(self, tmp_path):
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

        self.write(tmp_path, 0, 6)
        self.write(tmp_path, 3, 5)
        events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
        scalars = events.Scalars("loss")
        assert [(event.step, event.value) for event in scalars] == [
            (step, 10.0 + step) for step in range(5)
        ]

    @pytest.mark.parametrize("cut", range(1, 26))
    def test_a_line_cut_by_a_kill_is_left_out_and_resumed_over(self, tmp_path, cut):
        self.write(tmp_path, 0, 3)
        path = tmp_path / METRICS_FILE
        path.write_bytes(path.read_bytes()[:-cut])
        steps = [row["step"] for row in read_metrics(tmp_path)]
        assert steps == ([0, 1, 2] if cut == 1 else [0, 1])
        self.write(tmp_path, 2, 4)
        assert [row["step"] for row in read_metrics(tmp_path)] == [0, 1, 2, 3]
        assert all(json.loads(line) for line in path.read_text().splitlines())

    @settings(deadline=None, max_examples=80)
    @given(st.binary(max_size=40) | st.sampled_from([b"{}\n", b"[1]\n", b"\0" * 30, b"3\n"]))
    def test_damage_after_a_crash_costs_no_whole_row(self, tmp_path_factory, damage):
        folder = tmp_path_factory.mktemp("run")
        whole = b'{"step": 0, "loss": 1.0}\n'
        (folder / METRICS_FILE).write_bytes(whole + damage + b"\n" + b'{"step": 1}\n')
        rows = read_metrics(folder)
        assert rows[0] == {"step": 0, "loss": 1.0}
        assert rows[-1] == {"step": 1}

    def test_a_run_without_metrics(self, tmp_path):
        assert read_metrics(tmp_path) == []


class Mine:
    """A pickle that makes a folder when it is loaded."""

    def __init__(self, path: Path) -> None:
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


@pytest.fixture(scope="module")
def state_bytes(tmp_path_factory) -> bytes:
    folder = tmp_path_factory.mktemp("state")
    save_state(folder, STATE)
    return (folder / STATE_FILE).read_bytes()


class TestState:
    def test_comes_back_as_it_was(self, tmp_path):
        save_state(tmp_path, STATE)
        loaded = load_state(tmp_path)
        assert loaded.keys() == STATE.keys()
        assert torch.equal(loaded["student"]["w"], STATE["student"]["w"])
        assert (loaded["step"], loaded["best"], loaded["ema"]) == (3, {}, None)
        assert [p.name for p in tmp_path.iterdir()] == [STATE_FILE]

    def test_an_optimizers_state_comes_back(self, tmp_path):
        layer = torch.nn.Linear(3, 2)
        optimizer = torch.optim.AdamW(layer.parameters())
        layer(torch.ones(1, 3)).sum().backward()
        optimizer.step()
        save_state(tmp_path, {"optimizer": optimizer.state_dict()})
        other = torch.optim.AdamW(torch.nn.Linear(3, 2).parameters())
        other.load_state_dict(load_state(tmp_path)["optimizer"])
        moments = [o.state_dict()["state"][0]["exp_avg"] for o in (optimizer, other)]
        assert torch.equal(*moments)

    def test_missing(self, tmp_path):
        with pytest.raises(CheckpointError, match=r"nothing to resume: .*does not exist"):
            load_state(tmp_path)

    @pytest.mark.parametrize("keep", [0, 1, 30, 500, 2000, -200, -1])
    def test_truncated(self, tmp_path, state_bytes, keep):
        (tmp_path / STATE_FILE).write_bytes(state_bytes[:keep])
        with pytest.raises(CheckpointError, match=r"is damaged: .") as caught:
            load_state(tmp_path)
        assert "\n" not in str(caught.value.args[0])
        assert f"delete {tmp_path / STATE_FILE}" in str(caught.value)

    def test_one_flipped_bit_of_a_weight(self, tmp_path, state_bytes):
        place = state_bytes.index(torch.tensor([500.0, 501.0]).numpy().tobytes())
        damaged = bytearray(state_bytes)
        damaged[place] ^= 1
        (tmp_path / STATE_FILE).write_bytes(damaged)
        with pytest.raises(CheckpointError, match="does not match its checksum"):
            load_state(tmp_path)

    @settings(deadline=None, max_examples=150)
    @given(st.data())
    def test_fuzzed_bytes_are_told_or_harmless(self, tmp_path_factory, state_bytes, data):
        damaged = bytearray(state_bytes)
        for _ in range(data.draw(st.integers(1, 4))):
            start = data.draw(st.integers(0, len(damaged) - 1))
            piece = data.draw(st.binary(min_size=1, max_size=8))
            damaged[start : start + len(piece)] = piece
        folder = tmp_path_factory.mktemp("fuzz")
        (folder / STATE_FILE).write_bytes(damaged)
        try:
            loaded = load_state(folder)
        except CheckpointError:
            return
        assert torch.equal(loaded["student"]["w"], STATE["student"]["w"])
        assert loaded["step"] == 3

    @settings(deadline=None, max_examples=60)
    @given(st.binary(max_size=200))
    def test_any_bytes_are_no_state(self, tmp_path_factory, content):
        folder = tmp_path_factory.mktemp("fuzz")
        (folder / STATE_FILE).write_bytes(content)
        with pytest.raises(CheckpointError, match=r"is damaged: ."):
            load_state(folder)

    def test_a_tensor_alone_is_no_state(self, tmp_path):
        torch.save(torch.zeros(3), tmp_path / STATE_FILE)
        with pytest.raises(CheckpointError, match="holds a Tensor, not a state"):
            load_state(tmp_path)

    def test_a_folder_is_no_state(self, tmp_path):
        (tmp_path / STATE_FILE).mkdir()
        with pytest.raises(CheckpointError, match="is damaged"):
            load_state(tmp_path)

    def test_code_in_a_pickle_is_not_run(self, tmp_path):
        mine = tmp_path / "exploded"
        path = tmp_path / STATE_FILE
        torch.save({"step": 3, "plan": Mine(mine)}, path)
        torch.load(path, weights_only=False)
        assert mine.is_dir()  # it would
        mine.rmdir()
        with pytest.raises(CheckpointError, match="is damaged"):
            load_state(tmp_path)
        path.write_bytes(pickle.dumps({"step": 3, "plan": Mine(mine)}))
        with pytest.raises(CheckpointError, match="is damaged"):
            load_state(tmp_path)
        assert not mine.exists()


SIGNALLED = """
import signal, sys, time
from dimefm_edge.run_log import StopSignal

signal.signal(signal.SIGINT, signal.default_int_handler)
before = [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)]
with StopSignal() as stop:
    assert not stop.is_set
    print("ready", flush=True)
    while not stop.is_set:
        time.sleep(0.01)
    print("this step is whole", flush=True)
    if sys.argv[1] == "stubborn":
        time.sleep(60)
assert [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)] == before
print("done", flush=True)
"""


class TestStopSignal:
    @pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
    def test_the_first_signal_lets_the_step_end(self, number):
        running = child(SIGNALLED, "polite")
        assert running.stdout is not None
        assert running.stdout.readline() == "ready\n"
        running.send_signal(number)
        output, errors = running.communicate(timeout=30)
        assert output == "this step is whole\ndone\n"
        assert running.returncode == 0
        assert "stopping after this step; the state is saved" in errors

    @pytest.mark.parametrize(
        ("number", "code"), [(signal.SIGINT, -signal.SIGINT), (signal.SIGTERM, -signal.SIGTERM)]
    )
    def test_the_second_stops_at_once(self, number, code):
        running = child(SIGNALLED, "stubborn")
        assert running.stdout is not None
        assert running.stdout.readline() == "ready\n"
        running.send_signal(number)
        assert running.stdout.readline() == "this step is whole\n"
        running.send_signal(number)
        output, errors = running.communicate(timeout=30)
        assert running.returncode == code, errors
        assert output == ""

    def test_in_another_thread_it_changes_nothing(self):
        before = signal.getsignal(signal.SIGTERM)
        seen = []

        def work() -> None:
            with StopSignal() as stop:
                seen.extend([signal.getsignal(signal.SIGTERM), stop.is_set])

        thread = threading.Thread(target=work)
        thread.start()
        thread.join()
        assert seen == [before, False]

    def test_the_handlers_come_back_after_an_error(self):
        before = signal.getsignal(signal.SIGTERM)
        seen = []

        def work() -> None:
            with StopSignal() as stop:
                os.kill(os.getpid(), signal.SIGTERM)
                seen.append(stop.is_set)
                raise ValueError("no")

        with pytest.raises(ValueError, match="no"):
            work()
        assert seen == [True]
        assert signal.getsignal(signal.SIGTERM) is before


def test_progress_is_on_stderr_or_nowhere(capsys):
    for show in (True, False):
        with training_progress(3, 1, show=show) as advance:
            advance(100.0, 0.5)
            advance(100.0, 0.25)
        output = capsys.readouterr()
        assert output.out == ""
        assert ("3/3" in output.err) is show
