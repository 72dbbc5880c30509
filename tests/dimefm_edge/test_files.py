"""Whole files or none, and the user's folders."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from dimefm_edge.errors import InputError
from dimefm_edge.files import (
    atomic_file,
    held_folder,
    make_out_folder,
    run_folder,
    user_cache_dir,
    user_config_dir,
)

ROOT = Path(__file__).parents[2]


def child(code: str, *words: object) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", code, *map(str, words)],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def write_and_raise(path: Path, error: BaseException) -> None:
    with atomic_file(path) as stream:
        stream.write(b"x" * 100_000)
        raise error


class TestAtomicFile:
    def test_replaces_the_file_whole(self, tmp_path):
        path = tmp_path / "report.json"
        for content in (b"one", b"two, longer", b""):
            with atomic_file(path) as stream:
                stream.write(content)
                if content != b"one":
                    assert path.read_bytes() != content  # not before it is whole
            assert path.read_bytes() == content
        assert [p.name for p in tmp_path.iterdir()] == ["report.json"]

    def test_who_reads_the_former_file_reads_it_to_its_end(self, tmp_path):
        path = tmp_path / "report.json"
        path.write_bytes(b"former")
        with path.open("rb") as reader:
            with atomic_file(path) as stream:
                stream.write(b"next")
            assert reader.read() == b"former"  # put in place by rename, not written over

    @pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit])
    def test_an_error_leaves_the_former_file(self, tmp_path, error):
        path = tmp_path / "report.json"
        path.write_bytes(b"former")
        with pytest.raises(error):
            write_and_raise(path, error("no"))
        assert path.read_bytes() == b"former"
        assert [p.name for p in tmp_path.iterdir()] == ["report.json"]

    def test_an_error_leaves_nothing_where_nothing_was(self, tmp_path):
        with pytest.raises(ValueError, match="no"):
            write_and_raise(tmp_path / "report.json", ValueError("no"))
        assert list(tmp_path.iterdir()) == []

    def test_a_folder_that_is_not_there(self, tmp_path):
        with pytest.raises(FileNotFoundError), atomic_file(tmp_path / "no" / "a"):
            pass

    def test_a_kill_leaves_the_former_file_and_the_next_write_works(self, tmp_path):
        path = tmp_path / "report.json"
        path.write_bytes(b"former")
        code = (
            "import os, sys\n"
            "from pathlib import Path\n"
            "from dimefm_edge.files import atomic_file\n"
            "with atomic_file(Path(sys.argv[1])) as stream:\n"
            "    stream.write(b'x' * 100_000)\n"
            "    stream.flush()\n"
            "    os.kill(os.getpid(), 9)\n"
        )
        running = child(code, path)
        _, errors = running.communicate(timeout=60)
        assert running.returncode == -signal.SIGKILL, errors
        assert path.read_bytes() == b"former"
        with atomic_file(path) as stream:
            stream.write(b"next")
        assert path.read_bytes() == b"next"
        assert [p.name for p in tmp_path.iterdir()] == ["report.json"]


def test_folders_are_the_users_or_where_the_environment_says(monkeypatch, tmp_path):
    for name in ("XDG_CACHE_HOME", "XDG_CONFIG_HOME"):
        monkeypatch.delenv(name, raising=False)
    assert user_cache_dir("a", "b") == Path.home() / ".cache/dimefm_edge/a/b"
    assert user_config_dir() == Path.home() / ".config/dimefm_edge"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    assert user_cache_dir("a") == tmp_path / "cache/dimefm_edge/a"
    assert user_config_dir("a") == tmp_path / "config/dimefm_edge/a"


def test_a_folder_for_files_is_made_or_refused(tmp_path):
    make_out_folder(tmp_path / "a" / "b")
    assert (tmp_path / "a" / "b").is_dir()
    (tmp_path / "file").touch()
    for path, why in ((tmp_path / "file", "it is a file"), (tmp_path / "file" / "x", "Not a dir")):
        with pytest.raises(InputError, match=why):
            make_out_folder(path)


def test_one_process_at_a_time_works_in_a_held_folder(tmp_path):
    hold = "import pathlib, sys, time\nfrom dimefm_edge.files import held_folder\n"
    hold += "with held_folder(pathlib.Path(sys.argv[1])): print(1, flush=True); time.sleep(60)"
    path = tmp_path / "run"
    other = subprocess.Popen([sys.executable, "-c", hold, str(path)], stdout=subprocess.PIPE)
    assert other.stdout is not None
    assert other.stdout.readline() == b"1\n"
    with pytest.raises(InputError, match="another process is at work in"), held_folder(path):
        pass
    assert path.is_dir()  # still the other's
    other.kill()
    other.wait()
    with held_folder(path):
        (path / "left").touch()
    assert (path / "left").is_file()
    with held_folder(tmp_path / "empty"):
        pass
    assert not (tmp_path / "empty").exists()


def test_a_run_is_named_by_its_folder_or_its_checkpoint(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "checkpoint.safetensors").touch()
    for name in ("~/run", "~/run/checkpoint.safetensors", tmp_path / "run"):
        assert run_folder(name) == tmp_path / "run"
    assert run_folder("gone") == Path("gone")
