"""Can `dimefm-edge bench` be trusted: does it repeat itself, tell 5%, and agree with others?

One graph, the sample teacher's image side in ONNX Runtime. Repeats: the same graph twice in one
bench, and in two benches one after the other (`bench compare`). Tells: the same graph with a busy
wait of 5% of its median call. Agrees: the p50 of a bare loop in a process of its own, as
onnxruntime_perf_test runs one, between benches; the memory that the graph adds to that process,
by wait4's peaks, which /usr/bin/time prints; LoadGen's single-stream p50 against the closed loop's.

    python benchmarks/bench_instrument.py --json | python benchmarks/record.py instrument
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from dimefm_edge.bench import bench_models
from dimefm_edge.bench.compare import compare
from dimefm_edge.bench.prepare import prepare
from dimefm_edge.bench.results import BenchResult
from dimefm_edge.bench.specs import parse_subjects
from dimefm_edge.bench_config import BenchConfig
from dimefm_edge.latency.measure import machine_info

LOOP = """
import sys, time, json
import numpy as np, onnxruntime
path, threads, seconds = sys.argv[1], int(sys.argv[2]), float(sys.argv[3])
options = onnxruntime.SessionOptions()
options.intra_op_num_threads = threads
options.add_session_config_entry("session.set_denormal_as_zero", "1")
session = onnxruntime.InferenceSession(path, options)
image = {"image": np.random.default_rng(0).normal(size=(1, 3, 64, 64)).astype(np.float32)}
for _ in range(20):
    session.run(None, image)
times, until = [], time.perf_counter() + seconds
while time.perf_counter() < until:
    begun = time.perf_counter()
    session.run(None, image)
    times.append(1e3 * (time.perf_counter() - begun))
print(json.dumps(sorted(times)[len(times) // 2]))
"""

SLOWED = """
import time
import numpy as np, onnxruntime
def graph(batch_size, share=0.0):
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = {threads}
    options.add_session_config_entry("session.set_denormal_as_zero", "1")
    session = onnxruntime.InferenceSession("{path}", options)
    image = {{"image": np.random.default_rng(0).normal(size=(1, 3, 64, 64)).astype(np.float32)}}
    times = []
    for _ in range(200):
        begun = time.perf_counter()
        session.run(None, image)
        times.append(time.perf_counter() - begun)
    wait = share * sorted(times)[len(times) // 2]
    def call():
        session.run(None, image)
        until = time.perf_counter() + wait
        while time.perf_counter() < until:
            pass
    return call
def slowed(batch_size):
    return graph(batch_size, 0.05)
"""

IMPORTS = "import sys, time, json; import numpy as np, onnxruntime"

# A small process asks wait4, whose peak would else begin at that of a big one that forked.
TIME = """
import os, sys
pid = os.posix_spawn(sys.argv[1], sys.argv[1:], os.environ)
_, status, usage = os.wait4(pid, 0)
print(usage.ru_maxrss / 1024)
"""


def bare_loop(path: str, threads: int, seconds: float) -> tuple[float, float]:
    """p50 in ms, and MiB of peak memory above its imports, of a process that does nothing else."""
    words = [sys.executable, "-c", TIME, sys.executable, "-c", LOOP, path, str(threads)]
    done = subprocess.run([*words, str(seconds)], check=True, capture_output=True, text=True)
    p50, peak = done.stdout.split()
    words = [sys.executable, "-c", TIME, sys.executable, "-c", IMPORTS]
    bare = subprocess.run(words, check=True, capture_output=True, text=True).stdout
    return float(p50), float(peak) - float(bare)


def measure(seconds: float, threads: int) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (spec,) = parse_subjects(["sample"])
        path = prepare(spec, folder).path
        slowed = folder / "slowed.py"
        slowed.write_text(SLOWED.format(path=path, threads=threads))

        def bench(place: str, *models: str, **settings: Any) -> BenchResult:
            config = BenchConfig(models=models, seconds=seconds, threads=threads, **settings)
            return bench_models(config, folder / place)

        loops = [bare_loop(path, threads, seconds / 2)]
        words = (f"{slowed}:graph", f"{slowed}:graph", f"{slowed}:slowed")
        _, same, slower = bench("a", *words).subjects
        loops.append(bare_loop(path, threads, seconds / 2))
        old = bench("b", path, scenario=("single-stream",))
        loops.append(bare_loop(path, threads, seconds / 2))
        new = bench("c", path)
        loops.append(bare_loop(path, threads, seconds / 2))
        (compared,) = compare(old, new)
    (ours,) = old.subjects
    (again,) = new.subjects
    assert ours.p50_ms is not None
    assert again.p50_ms is not None
    assert ours.memory_mib is not None
    return {
        "same_twice": {"ratio": same.ratio, "low": same.ratio_low, "high": same.ratio_high},
        "slowed_5pct": {"ratio": slower.ratio, "low": slower.ratio_low, "high": slower.ratio_high},
        "two_benches": {
            "raw": compared.raw.value, "ratio": compared.ratio.value, "low": compared.ratio.low,
            "high": compared.ratio.high,
        },
        "bench_over_bare_loop_p50": statistics.mean([ours.p50_ms, again.p50_ms])
        / statistics.mean(loop for loop, _ in loops[1:]),
        "bench_over_wait4_memory": ours.memory_mib / statistics.median(m for _, m in loops),
        "loadgen_over_closed_loop_p50": ours.scenarios[0]["p50_ms"] / ours.p50_ms,
        "p50_ms": ours.p50_ms,
        "load_average": machine_info()["load_1min"],
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=15.0, help="of each model")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    found = measure(args.seconds, args.threads)
    print(json.dumps(found, indent=None if args.json else 1))


if __name__ == "__main__":
    main()
