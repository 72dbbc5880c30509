"""benchmarks/record.py: figures by path, replaced by machine, each with a run that is told."""

from __future__ import annotations

import csv
import importlib
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def script(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    yield importlib.import_module("record")
    sys.modules.pop("record", None)


def read(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as stream:
        return list(csv.DictReader(stream))


def test_a_rerun_replaces_its_own_figures_only(script, tmp_path):
    path = tmp_path / "results"
    old = script.Run("board", "torch=1", "aaaa", "2026-01-01")
    new = script.Run("board", "torch=2", "bbbb", "2026-02-02")
    other = script.Run("desktop", "torch=1", "aaaa", "2026-01-01")
    assert script.record("one", {"a": 1, "b": {"c": 0.123456789}}, path, old) == 2
    script.record("one", {"a": 7}, path, other)
    script.record("two", {"a": 8}, path, old)
    script.record("one", {"a": 2, "machine": {"cpu": "not a figure"}}, path, new)
    found = {
        (file.stem, r["figure"], r["run"]): r["value"]
        for file in path.iterdir()
        for r in read(file)
    }
    assert found == {
        ("one", "a", other.key): "7", ("two", "a", old.key): "8", ("one", "a", new.key): "2",
    }  # fmt: skip
    script.record("two", {"a": 9}, path, new)
    assert [r["versions"] for r in read(tmp_path / "runs.csv")] == ["torch=1", "torch=2"]


def test_every_committed_figure_has_its_run(script):
    runs = {row["run"]: row for row in read(BENCHMARKS / "runs.csv")}
    files = (BENCHMARKS / "results").iterdir()
    used = {row["run"] for file in files for row in read(file)}
    assert used == set(runs)
    for key, row in runs.items():
        told = {name: row[name] for name in ("machine", "versions", "commit", "date")}
        assert script.Run(**told).key == key
        assert all(told.values()), key


def test_here_is_complete(script):
    here = script.Run.here()
    assert here.machine.endswith("cores")
    assert "python=" in here.versions
    assert len(here.date) == 10
