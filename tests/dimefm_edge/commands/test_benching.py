"""bench and bench compare, through the command line; Ctrl-C in a real process."""

from __future__ import annotations

import csv
import json
import signal
import subprocess
import sys
import time

import pytest

from dimefm_edge import cli
from tests.dimefm_edge.bench.conftest import SUBJECTS

QUICK, SLOWER = f"{SUBJECTS}:quick", f"{SUBJECTS}:slower"


def _json(capsys, *words):
    code = cli.main([*map(str, words), "--json"])
    return code, json.loads(capsys.readouterr().out)


def test_bench_table_json_and_files(tiny_run_dir, tiny_bundle_dir, tmp_path, capsys):
    flags = ("--seconds", "0.5", "--threads", "1")
    code, values = _json(capsys, "bench", tiny_bundle_dir, tiny_run_dir, *flags)
    assert code == 0
    assert [m["label"] for m in values["subjects"]] == [str(tiny_bundle_dir), str(tiny_run_dir)]
    assert values["subjects"][0]["ratio"] == 1
    out = tmp_path / "out"
    words = ["bench", str(tiny_bundle_dir), *flags, "--out", str(out), "--images", "scenes:2"]
    assert cli.main(words) == 0
    said = capsys.readouterr().out
    for word in ("ratio", "images/s", "file to labels", "batch 1, 1 threads", "report.html"):
        assert word in said
    assert json.loads((out / "bench.json").read_text())["state"] == "complete"
    assert len(list(csv.DictReader((out / "bench.csv").open()))) == 1
    assert "<svg" in (out / "report.html").read_text()


def test_bench_of_one_that_fails_is_told_and_exits_1(tmp_path, capsys):
    code, values = _json(capsys, "bench", QUICK, f"{SUBJECTS}:raises", "--seconds", "0.3")
    assert code == 1
    assert [s["state"] for s in values["subjects"]] == ["measured", "failed"]
    assert cli.main(["bench", f"{SUBJECTS}:raises", "--seconds", "0.3"]) == 1
    assert "no such accelerator" in capsys.readouterr().err


def test_a_missing_file_is_told_and_nothing_else(tmp_path):
    """No bar of timing that never began, and no second spent on the machine's own figures."""
    gone = tmp_path / "gone.onnx"
    words = [sys.executable, "-m", "dimefm_edge", "bench", str(gone)]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr == f"error: no ONNX file at {gone}\n  try: check the path\n"


def test_a_model_that_cannot_be_loaded_leaves_no_empty_bar(capsys):
    assert cli.main(["bench", f"{SUBJECTS}:raises", "--seconds", "0.3"]) == 1
    assert "timing" not in capsys.readouterr().err


@pytest.mark.parametrize("below", [(), ("deeper",)], ids=["file", "below a file"])
def test_an_output_folder_that_cannot_be_is_told_before_the_bench(
    below, tmp_path, capsys, monkeypatch
):
    file = tmp_path / "file"
    file.write_text("words that stay")
    monkeypatch.setattr("dimefm_edge.bench.bench_models", None)
    out = file.joinpath(*below)
    assert cli.main(["bench", QUICK, "--out", str(out)]) == 2
    assert f"{out} cannot be the output folder: " in capsys.readouterr().err
    assert file.read_text() == "words that stay"


def benched(capsys, out, model):
    """Bench a model as `quick`; a busy machine slows the yardstick, but not those that sleep."""
    words = ("bench", model, "--seconds", "1.5", "--threads", "1", "--out", out)
    assert _json(capsys, *words)[0] == 0
    path = out / "bench.json"
    values = json.loads(path.read_text())
    (subject,) = values["subjects"]
    rounds = len(subject["rounds_ms"])
    assert len(values["yardstick_ms"]) == rounds
    values["yardstick_ms"] = [1.0] * rounds
    subject["label"] = QUICK
    path.write_text(json.dumps(values))
    return path


def test_compare(tmp_path, capsys):
    first, again = (benched(capsys, tmp_path / str(i), QUICK) for i in range(2))
    slower = benched(capsys, tmp_path / "slower", SLOWER)  # as if the same model had become slower
    code, values = _json(capsys, "bench", "compare", first, again, "--threshold-pct", "20")
    assert (code, values["is_slower"]) == (0, False)
    code, values = _json(capsys, "bench", "compare", first, slower)
    assert (code, values["is_slower"]) == (3, True)
    assert values["models"][0]["ratio"]["value"] == pytest.approx(1.5, abs=0.3)
    assert cli.main(["bench", "compare", str(first), str(slower)]) == 3
    assert "slower" in capsys.readouterr().out
    values = json.loads(slower.read_text())
    values["subjects"].append(values["subjects"][0] | {"label": "added"})
    slower.write_text(json.dumps(values))
    code, values = _json(capsys, "bench", "compare", first, slower)
    assert (code, [m["label"] for m in values["models"]]) == (3, [QUICK])
    assert values["left_out"] == [{"label": "added", "reason": "the old bench has it not"}]
    assert cli.main(["bench", "compare", str(first), str(slower)]) == 3
    assert "\nnot compared: added, the old bench has it not" in capsys.readouterr().out
    assert cli.main(["bench", "compare", str(first)]) == 2
    assert "compare takes two results, got 1" in capsys.readouterr().err


def test_ctrl_c_halfway_keeps_partial_results_and_leaves_no_process(tmp_path):
    out = tmp_path / "out"
    words = ["bench", QUICK, SLOWER, "--seconds", "60", "--threads", "1", "--out", str(out)]
    process = subprocess.Popen(
        [sys.executable, "-m", "dimefm_edge", *words, "--json"],
        stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
    )  # fmt: skip
    deadline = time.monotonic() + 100
    while not (out / "bench.json").is_file():
        assert time.monotonic() < deadline
        assert process.poll() is None
        time.sleep(0.1)
    children = [child.pid for child in _children(process.pid)]
    assert len(children) == 3  # two models and the machine's yardstick
    process.send_signal(signal.SIGINT)
    said, _ = process.communicate(timeout=60)
    assert process.returncode == 130
    values = json.loads(said)
    assert values["state"] == "stopped"
    assert [s["state"] for s in values["subjects"]] == ["partial", "partial"]
    assert all(s["p50_ms"] > 0 for s in values["subjects"])
    assert json.loads((out / "bench.json").read_text())["state"] == "stopped"
    assert "partial results" in (out / "report.html").read_text()
    assert not [pid for pid in children if _is_alive(pid)]


def _children(pid):
    import psutil

    return psutil.Process(pid).children(recursive=True)


def _is_alive(pid):
    import psutil

    return psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
