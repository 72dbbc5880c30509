"""What do hard negatives cost: an index and a table once, and a gather in every step?

    python benchmarks/bench_hard_negatives.py --json | python benchmarks/record.py hard_negatives

Random unit vectors, fp16, in real stores: 1M sentences and 100,000 images of 64 dimensions. Random
vectors have no clusters, which is the worst case for an inverted file: `recall_at_16` of real
embeddings is higher. What is extrapolated to 30M x 768 is named so: training grows with
lists^2 x dimensions, adding with rows x dimensions; the table and a step's gather do not know how
many sentences there are.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from dimefm_edge.batches import BatchPlan, DistillData
from dimefm_edge.config import TrainConfig
from dimefm_edge.data.nearest import NearestRows, import_faiss
from dimefm_edge.data.neighbours import DEFAULT_NEIGHBOURS, open_neighbours
from dimefm_edge.data.store import DEFAULT_SHARD_ROWS, EmbeddingStore, StoreManifest, StoreWriter
from dimefm_edge.distributed import Ranks
from dimefm_edge.preprocess import PreprocessSpec

LARGE_ROWS, LARGE_DIM, LARGE_LISTS = 30_000_000, 768, 16_384


def random_store(folder: Path, kind: str, count: int, dim: int, seed: int) -> EmbeddingStore:
    manifest = StoreManifest(kind, "random", "0" * 16, "", kind, dim, 100.0, count)
    writer = StoreWriter.create_or_resume(folder, manifest)
    rng = np.random.default_rng(seed)
    for shard in range(-(-count // DEFAULT_SHARD_ROWS)):
        rows = rng.normal(size=(len(manifest.rows_of(shard)), dim)).astype(np.float32)
        rows /= np.linalg.norm(rows, axis=1, keepdims=True)
        writer.write_shard(shard, rows.astype(np.float16))
    return writer.finish()


def batch_ms(data: DistillData, share: float, repeats: int) -> float:
    """Median time to choose and gather a step's embeddings, pixels left out."""
    train = TrainConfig(steps=repeats, hard_negatives=share)
    plan, times = BatchPlan(data, train, Ranks()), []
    for step in range(repeats):
        begun = time.perf_counter()
        plan.batch(step, np.zeros(0, np.uint8))
        times.append(time.perf_counter() - begun)
    return 1000 * statistics.median(times)


def build_index(texts: EmbeddingStore, folder: Path) -> tuple[NearestRows, float, float]:
    """The index, and the seconds of its training and of all else."""
    faiss = import_faiss()
    train, times = faiss.IndexIVFPQ.train, []

    def timed(self: Any, rows: np.ndarray) -> None:
        begun = time.perf_counter()
        train(self, rows)
        times.append(time.perf_counter() - begun)

    faiss.IndexIVFPQ.train = timed
    try:
        begun = time.perf_counter()
        nearest = NearestRows.open(texts, folder, max_exact=0)
        whole = time.perf_counter() - begun
    finally:
        faiss.IndexIVFPQ.train = train
    return nearest, times[0], whole - times[0]


def recall(nearest: NearestRows, texts: EmbeddingStore, queries: np.ndarray, count: int) -> float:
    """Share of the true nearest rows that are found."""
    best = [np.empty((len(queries), 0), np.float32), np.empty((len(queries), 0), np.int64)]
    for start in range(0, len(texts), DEFAULT_SHARD_ROWS):
        rows = np.arange(start, min(start + DEFAULT_SHARD_ROWS, len(texts)))
        cosines = queries @ texts.gather(rows).astype(np.float32).T
        of_all = np.concatenate([best[0], cosines], 1)
        ids = np.concatenate([best[1], np.broadcast_to(rows, cosines.shape)], 1)
        order = np.argpartition(-of_all, count, axis=1)[:, :count]
        best = [np.take_along_axis(a, order, 1) for a in (of_all, ids)]
    found = nearest.search(queries, count)[1]
    return float(
        np.mean([len(set(a) & set(b)) / count for a, b in zip(found, best[1], strict=True)])
    )


def measure(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    texts = random_store(folder / "texts", "texts", args.texts, args.dim, 0)
    images = random_store(folder / "images", "images", args.images, args.dim, 1)
    before_mib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    nearest, train_s, add_s = build_index(texts, folder / "n")
    (path,) = (folder / "n").iterdir()
    begun = time.perf_counter()
    NearestRows.open(texts, folder / "n", max_exact=0)
    open_ms = 1000 * (time.perf_counter() - begun)
    begun = time.perf_counter()
    table = open_neighbours(images, texts, folder / "n", max_exact=0)
    table_s = time.perf_counter() - begun
    data = DistillData(
        images, texts, lambda batches: iter(()), PreprocessSpec(64), 100.0, neighbours=table
    )
    batch_ms(data, 0.5, args.repeats)  # pages come in
    plain, hard = batch_ms(data, 0.0, args.repeats), batch_ms(data, 0.5, args.repeats)
    lists = nearest._index.nlist
    train_h = train_s / 3600 * (LARGE_LISTS / lists) ** 2 * LARGE_DIM / args.dim
    add_h = add_s / 3600 * LARGE_ROWS / args.texts * LARGE_DIM / args.dim
    return {
        "texts": args.texts,
        "images": args.images,
        "dim": args.dim,
        "lists": lists,
        "index_train_s": train_s,
        "index_add_s": add_s,
        "index_mib": path.stat().st_size / 2**20,
        "index_open_ms": open_ms,
        "table_images_per_s": args.images / table_s,
        "recall_at_16": recall(
            nearest, texts, images.gather(np.arange(200)).astype(np.float32), DEFAULT_NEIGHBOURS
        ),
        "peak_mib_over_stores": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        - before_mib,
        "batch_plain_ms": plain,
        "batch_hard_ms": hard,
        "hard_over_plain_ms": hard - plain,
        "extrapolated_30m_x_768": {
            "index_train_h_here": train_h,
            "index_add_h_here": add_h,
            "index_gib": LARGE_ROWS * (LARGE_DIM / 8 + 8) / 2**30,
            "table_gib_of_40m_images": 40e6 * DEFAULT_NEIGHBOURS * 4 / 2**30,
        },
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--texts", type=int, default=1_000_000)
    parser.add_argument("--images", type=int, default=100_000)
    parser.add_argument("--dim", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=200)
    parser.add_argument("--json", action="store_true", help="this is all it prints anyway")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        print(json.dumps(measure(args, Path(folder)), indent=1))


if __name__ == "__main__":
    main()
