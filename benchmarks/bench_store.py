"""Is a gather from the embedding store what it is from one big file, and opening free?

Times, in turn within one process and with a warm page cache, `EmbeddingStore.gather` of random
rows over several shards and numpy's fancy indexing of one memory map of the same rows. The
promise: at least 0.8 of its rows a second. The floor: the same bytes copied in one piece.
Then opens a store of 40M x 768 made of sparse files, each time in a fresh process: at most
100 ms and 50 MB.

    python benchmarks/bench_store.py --json | python benchmarks/record.py store
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from dimefm_edge.data.store import StoreManifest, StoreWriter
from dimefm_edge.latency.measure import machine_info

EMBED_DIM = 768
SPARSE_ROWS = 40_000_000
WANTED = StoreManifest(
    kind="images",
    teacher="none",
    weights_hash="0" * 16,
    preprocess_hash="0" * 16,
    source="benchmark",
    embed_dim=EMBED_DIM,
    logit_scale=100.0,
    num_rows=SPARSE_ROWS,
)

OPENER = """
import json, sys, time
from pathlib import Path
import psutil
from dimefm_edge.data.store import EmbeddingStore

before = psutil.Process().memory_info().rss
begun = time.perf_counter()
store = EmbeddingStore.open(Path(sys.argv[1]))
open_ms = 1000 * (time.perf_counter() - begun)
growth_mb = (psutil.Process().memory_info().rss - before) / 1e6
print(json.dumps({"open_ms": open_ms, "rss_growth_mb": growth_mb, "rows": len(store)}))
"""


def gather_figures(folder: Path, num_rows: int, batch_size: int, rounds: int) -> dict[str, Any]:
    """The store against one memory map of the same rows."""
    wanted = dataclasses.replace(WANTED, num_rows=num_rows)
    writer = StoreWriter.create_or_resume(folder / "store", wanted)
    rng = np.random.default_rng(0)
    one_path = folder / "one.f16"
    with one_path.open("wb") as stream:
        for shard in writer.missing_shards():
            shape = (len(wanted.rows_of(shard)), EMBED_DIM)
            embeds = rng.integers(0, 2**14, shape, dtype=np.uint16).view(np.float16)
            writer.write_shard(shard, embeds)
            stream.write(embeds.data)
    store = writer.finish()
    one = np.memmap(one_path, np.float16, "r", shape=(num_rows, EMBED_DIM))
    source = np.ones((batch_size, EMBED_DIM), np.float16)
    times: dict[str, list[float]] = {"store": [], "memmap": [], "copy": []}

    def timed(name: str, call: Callable[[], Any]) -> Any:
        begun = time.perf_counter()
        result = call()
        times[name].append(time.perf_counter() - begun)
        return result

    for start in range(0, num_rows, batch_size):  # warms both
        rows = np.arange(start, min(start + batch_size, num_rows))
        assert np.array_equal(store.gather(rows).view(np.uint16), one[rows].view(np.uint16))
    for turn in range(rounds):
        first, second = rng.integers(0, num_rows, (2, batch_size))
        calls = [
            ("store", lambda rows=first: store.gather(rows)),
            ("memmap", lambda rows=second: one[rows]),
        ]
        for name, call in calls if turn % 2 else calls[::-1]:
            timed(name, call)
        timed("copy", source.copy)
    medians = {name: statistics.median(values) for name, values in times.items()}
    megabytes = batch_size * EMBED_DIM * 2 / 1e6
    return {
        "store_rows": num_rows,
        "store_shards": wanted.num_shards,
        "batch_rows": batch_size,
        "batch_mb": megabytes,
        **{f"{name}_gather_ms": 1000 * medians[name] for name in ("store", "memmap")},
        "floor_copy_ms": 1000 * medians["copy"],
        "gather_ratio": medians["memmap"] / medians["store"],
        "gather_rows_per_s": batch_size / medians["store"],
        "gather_gb_per_s": megabytes / 1e3 / medians["store"],
    }


def open_figures(folder: Path, rounds: int) -> dict[str, Any]:
    """Opening 40M x 768 in fresh processes; the files are sparse and hold nothing."""
    writer = StoreWriter.create_or_resume(folder, WANTED)
    shards = []
    for index in writer.missing_shards():
        path, num_rows = folder / f"shard-{index:06d}.f16", len(WANTED.rows_of(index))
        with path.open("wb") as stream:
            stream.truncate(num_rows * EMBED_DIM * 2)
        shards.append({"file": path.name, "rows": num_rows, "sha256": "0" * 64})
    manifest = folder / "manifest.json"
    manifest.write_text(json.dumps({**json.loads(manifest.read_text()), "shards": shards}))
    runs = []
    for _ in range(rounds):
        command = [sys.executable, "-c", OPENER, str(folder)]
        done = subprocess.run(command, capture_output=True, check=True)
        runs.append(json.loads(done.stdout))
    assert runs[0]["rows"] == SPARSE_ROWS
    begun = time.perf_counter()
    json.loads(manifest.read_text())
    sum(path.stat().st_size for path in folder.iterdir())
    return {
        "sparse_rows": SPARSE_ROWS,
        "sparse_shards": WANTED.num_shards,
        "sparse_gb": SPARSE_ROWS * EMBED_DIM * 2 / 1e9,
        "open_ms": statistics.median(run["open_ms"] for run in runs),
        "open_max_ms": max(run["open_ms"] for run in runs),
        "floor_read_manifest_and_stat_ms": 1000 * (time.perf_counter() - begun),
        "open_rss_growth_mb": max(run["rss_growth_mb"] for run in runs),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=400_000)
    parser.add_argument("--batch-size", type=int, default=2048)
    parser.add_argument("--rounds", type=int, default=200)
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        report = gather_figures(Path(folder), args.rows, args.batch_size, args.rounds)
    with tempfile.TemporaryDirectory() as folder:
        report |= open_figures(Path(folder), rounds=9)
    report["machine"] = machine_info()
    if args.json:
        print(json.dumps(report))
    else:
        for name, value in report.items():
            print(f"{name:34} {value}")


if __name__ == "__main__":
    main()
