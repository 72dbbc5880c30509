"""The command line from outside: exit codes, one JSON object, errors that name the mend."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from dimefm_edge import cli
from dimefm_edge.commands.outcome import Outcome
from dimefm_edge.errors import BudgetError, ConfigError, InputError

ROOT = Path(__file__).parents[2]


def _run(*words, **kwargs):
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, "-m", "dimefm_edge", *map(str, words)],
        capture_output=True,
        text=True,
        env=env,
        timeout=120,
        **kwargs,
    )


@pytest.fixture
def fake(monkeypatch):
    """Replace the work of `targets`: the words, the options and the printing stay real."""

    def install(function):
        monkeypatch.setattr("dimefm_edge.commands.choosing.run_targets", function)

    return install


def _raises(error):
    def work(options):
        raise error

    return work


def test_help_lists_every_command(capsys):
    assert cli.main(["--help"]) == 0
    said = capsys.readouterr().out
    for name, command in cli.COMMANDS.items():
        assert f"  {name} " in said
        assert command.title in said


@pytest.mark.parametrize("name", list(cli.COMMANDS))
def test_each_command_explains_its_flags(name, capsys):
    assert cli.main([name, "--help"]) == 0
    said = capsys.readouterr().out
    assert said.startswith(f"usage: dimefm-edge {name}")
    for flag in ("--json", "--config", "--verbose"):
        assert flag in said


def test_distill_help_has_the_config_fields_with_their_text(capsys):
    assert cli.main(["distill", "--help"]) == 0
    said = capsys.readouterr().out
    for flag in (
        "--target", "--teacher", "--images", "--texts", "--eval-sets", "--latency-ms", "--student",
        "--epochs", "--steps", "--batch-size", "--max-bad", "--out", "--store", "--precision",
        "--resume", "--dry-run", "--vl-weight", "--seed",
    ):  # fmt: skip
        assert f"{flag} " in said
    assert "Optimiser steps in all" in said


def test_version(capsys):
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out.startswith("dimefm-edge ")


def test_no_command_is_bad_usage(capsys):
    assert cli.main([]) == 2
    assert "usage: dimefm-edge COMMAND" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["distil"], "unknown command 'distil'. Did you mean 'distill'?"),
        (["distill", "--epoch", "3"], "Unrecognized options: --epoch, 3. Did you mean --epochs?"),
        (["distill", "--epochs", "three"], "could not convert string to float: 'three'"),
        (["distill", "--epochs", "0"], "epochs must be positive, got 0"),
        (["distill", "--precision", "int4"], "int4"),
        (["bench"], "no model was named"),
        (["estimate", "vit-tinny"], "unknown model 'vit-tinny'. Did you mean 'vit-tiny'?"),
        (["estimate", "vit-tiny", "--target", "jetson-orinn"], "unknown target 'jetson-orinn'"),
        (["embed"], "embed needs a folder for the embeddings"),
        (["embed", "--store", "x"], "embed needs something to embed"),
        (["eval", "sample"], "eval needs a labelled set"),
        (["export"], "export needs a run or a teacher"),
        (["targets", "--config", "none.toml"], "no config file at none.toml"),
    ],
)
def test_bad_usage_is_one_line_and_exit_2(words, message, capsys):
    assert cli.main(words) == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert message in said.err
    assert said.err.startswith("error: ")
    assert "Traceback" not in said.err
    assert len(said.err.splitlines()) <= 2


def test_bad_usage_with_json_is_one_object(capsys):
    assert cli.main(["distill", "--json", "--epoch", "3"]) == 2
    said = json.loads(capsys.readouterr().out)
    assert said["exit_code"] == 2
    assert "--epochs" in said["error"]
    assert said["hint"] == "dimefm-edge distill --help"


@pytest.mark.parametrize("is_json", [False, True])
@pytest.mark.parametrize(
    ("error", "code", "message", "hint"),
    [
        (BudgetError("too slow", hint="dimefm-edge fit"), 3, "too slow", "dimefm-edge fit"),
        (InputError("no such folder"), 2, "no such folder", None),
        (
            OSError(errno.ENOSPC, "No space left on device", "/runs/x"),
            1,
            "No space left on device: /runs/x",
            "free some space, or name another folder",
        ),
        (PermissionError(errno.EACCES, "x", "/root/y"), 1, "Permission denied: /root/y", "check"),
        (NotADirectoryError(errno.ENOTDIR, "x", "/a/y"), 2, "Not a directory: /a/y", "name"),
        (
            ModuleNotFoundError("No module named 'torch'", name="torch"),
            1,
            "this needs torch, which is not installed",
            "pip install 'dimefm_edge[train]'",
        ),
    ],
)
def test_what_a_user_can_mend(error, code, message, hint, is_json, fake, capsys):
    fake(_raises(error))
    assert cli.main(["targets", *(["--json"] if is_json else [])]) == code
    said = capsys.readouterr()
    assert f"error: {message}" in said.err
    assert "Traceback" not in said.err
    assert ("\n  try: " in said.err) == (hint is not None)
    if is_json:
        values = json.loads(said.out)
        assert (values["error"], values["exit_code"]) == (message, code)
        assert (values["hint"] or "").startswith(hint or "")
    else:
        assert said.out == ""


def test_a_bug_keeps_its_traceback(fake, capsys, caplog):
    fake(_raises(RuntimeError("shape mismatch")))
    assert cli.main(["targets", "--json"]) == 1
    assert json.loads(capsys.readouterr().out)["error"] == "RuntimeError: shape mismatch"
    assert "this is a bug" in caplog.text
    assert "Traceback" in caplog.text


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("distill", "stopped; run the same command with --resume to go on"),
        ("embed", "stopped; run the same command to go on"),
        ("bench", "stopped"),
    ],
)
def test_ctrl_c(command, message, monkeypatch, capsys):
    monkeypatch.setattr(cli, "_run", _raises(KeyboardInterrupt()))
    assert cli.main([command]) == 130
    assert capsys.readouterr().err == f"error: {message}\n"


def test_json_has_no_nan(fake, capsys):
    values = {"a": float("nan"), "b": (1.5, float("inf")), "c": Path("x")}
    fake(lambda options: Outcome(values, "text"))
    assert cli.main(["targets", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"a": None, "b": [1.5, None], "c": "x"}


def test_exit_code_and_text_of_an_outcome(fake, capsys):
    fake(lambda options: Outcome({}, "# over budget", 3, is_markdown=True))
    assert cli.main(["targets"]) == 3
    assert capsys.readouterr().out == "# over budget\n"


def test_other_ranks_say_nothing(fake, capsys):
    fake(lambda options: None)
    assert cli.main(["targets", "--json"]) == 0
    assert capsys.readouterr().out == ""


def test_with_json_nothing_else_reaches_stdout(tmp_path):
    """Not even what a C library or a child process writes to file descriptor 1."""
    code = """
import os, sys
from dimefm_edge import cli
from dimefm_edge.commands import choosing
from dimefm_edge.commands.outcome import Outcome

def work(options):
    print("from Python")
    os.write(1, b"from C\\n")
    os.system("echo from a child")
    return Outcome({"answer": 42}, "")

choosing.run_targets = work
sys.exit(cli.main(["targets", "--json"]))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0
    assert json.loads(done.stdout) == {"answer": 42}
    for words in ("from Python", "from C", "from a child"):
        assert words in done.stderr


def test_a_reader_that_leaves_is_no_error():
    command = f"{sys.executable} -m dimefm_edge targets | head -n 1; echo ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, cwd=ROOT)
    assert done.stdout.splitlines()[-1] == "0"
    assert done.stderr == ""


def test_ctrl_c_from_outside(tmp_path):
    """A real signal while the local machine is measured."""
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    code = (
        "import time, sys\nfrom dimefm_edge import cli\nfrom dimefm_edge.commands import choosing\n"
        "def work(options):\n    print('ready', file=sys.stderr, flush=True)\n    time.sleep(60)\n"
        "choosing.run_targets = work\nsys.exit(cli.main(['targets']))"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code], env=env, stderr=subprocess.PIPE, stdout=subprocess.PIPE,
        text=True,
    )  # fmt: skip
    assert process.stderr is not None
    assert process.stderr.readline() == "ready\n"
    time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=30)
    assert (process.returncode, out, err) == (130, "", "error: stopped\n")


def test_config_gives_what_flags_give_and_flags_win(tmp_path):
    path = tmp_path / "run.toml"
    path.write_text(
        'target = "jetson-nano"\nteacher = "ViT-B-32:openai"\n[data]\nimages = ["a", "b"]\n'
        "[student]\nlatency_ms = 3\n[train]\nepochs = 2\nbatch_size = 64\n"
    )
    words = ["--config", str(path), "--epochs", "5", "--images", "c", "d", "e"]
    options = cli.parse_options("distill", words)
    assert options.run.target == "jetson-nano"
    assert options.run.teacher == "ViT-B-32:openai"
    assert options.run.student.latency_ms == 3.0
    assert options.run.train.epochs == 5.0
    assert options.run.train.batch_size == 64
    assert options.run.data.images == ("c", "d", "e")


def test_resume_takes_the_runs_own_settings(tmp_path):
    (tmp_path / "config.toml").write_text('target = "jetson-nano"\n[train]\nepochs = 7\n')
    options = cli.parse_options("distill", ["--resume", "--out", str(tmp_path), "--seed", "3"])
    assert options.run.target == "jetson-nano"
    assert options.run.train.epochs == 7.0
    assert options.run.train.seed == 3
    assert options.run.out == str(tmp_path)
    fresh = cli.parse_options("distill", ["--out", str(tmp_path)])
    assert fresh.run.target == "jetson-orin"


def test_a_misspelt_config_key_is_answered(tmp_path):
    path = tmp_path / "run.toml"
    path.write_text("[train]\nepoch = 3\n")
    with pytest.raises(ConfigError, match=r"unknown key 'epoch'\. Did you mean 'epochs'"):
        cli.parse_options("distill", ["--config", str(path)])


def test_python_m_is_the_command():
    done = _run("estimate", "nothing-like-it", "--json")
    assert done.returncode == 2
    assert json.loads(done.stdout)["exit_code"] == 2
    assert "Traceback" not in done.stderr


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs Linux's /dev/full")
@pytest.mark.parametrize("flags", ["", "--json"])
@pytest.mark.parametrize(("where", "code"), [(">&-", 0), ("> /dev/full", 1)])
def test_a_stdout_that_takes_nothing_is_no_bug(where, code, flags):
    command = f"{sys.executable} -m dimefm_edge doctor {flags} {where}"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=False)
    assert done.returncode == code, done.stderr
    assert "Traceback" not in done.stderr
    assert ("stdout cannot be written to: No space left" in done.stderr) == bool(code)


def test_of_several_ranks_one_tells_the_error(capsys, monkeypatch):
    for rank, told in (("0", '"exit_code": 2'), ("1", "")):
        monkeypatch.setenv("RANK", rank)
        assert cli.main(["distill", "--json", "--epoch", "3"]) == 2
        said = capsys.readouterr()
        assert told in said.out
        assert bool(said.out) == bool(told)
        assert "--epochs" in said.err
