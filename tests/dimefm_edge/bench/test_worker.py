"""A worker's answers, asked in this process and line by line in its own."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import asdict

from dimefm_edge.bench.prepare import prepare
from dimefm_edge.bench.runnable import Load
from dimefm_edge.bench.specs import parse_subjects


def lines(*messages):
    done = subprocess.run(
        [sys.executable, "-m", "dimefm_edge.bench.worker"],
        input="".join(json.dumps(message) + "\n" for message in messages),
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    return [json.loads(line) for line in done.stdout.splitlines()]


def test_a_bundle_from_load_to_memory(tiny_bundle_dir, tmp_path):
    (spec,) = parse_subjects([str(tiny_bundle_dir)])
    load = {"prepared": asdict(prepare(spec, tmp_path)), "load": asdict(Load()), "pin": [0]}
    loaded, warm, turn, memory = lines(
        {"do": "load", **load}, {"do": "warm_up", "seconds": 0.2}, {"do": "turn", "seconds": 0.05},
        {"do": "memory"},
    )  # fmt: skip
    assert loaded["takes_images"]
    assert loaded["load_ms"] > 0
    assert warm["runs"] >= 10
    assert sum(turn["ms"]) >= 50
    assert all(ms > 0 for ms in turn["ms"])
    assert memory["peak_rss_mib"] > memory["bare_rss_mib"] > 10


def test_errors_are_answers(tmp_path):
    noisy = tmp_path / "noisy.py"
    noisy.write_text(
        "print('to stdout')\ndef make(batch_size):\n    print('made')\n    return lambda: 1 / 0\n"
    )
    (spec,) = parse_subjects([f"{noisy}:make"])
    load = {"prepared": asdict(prepare(spec, tmp_path)), "load": asdict(Load()), "pin": []}
    (failed,) = lines({"do": "load", **load})
    assert failed == {
        "error": "ZeroDivisionError: division by zero", "hint": None, "kind": "DimeFMError"
    }  # fmt: skip
