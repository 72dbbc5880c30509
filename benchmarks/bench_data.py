"""Images a second of decoding and resizing, of gathering from the pixel cache, and of scenes.

    python benchmarks/bench_data.py --json | python benchmarks/record.py data

Without --source the images are JPEGs made here from scenes: 64 pixels a side, and 480 x 360.
"""

from __future__ import annotations

import argparse
import io
import json
import multiprocessing
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from dimefm_edge.data.decode import available_cores
from dimefm_edge.data.images import ImagePool, PixelCache, decode_batches, open_images
from dimefm_edge.data.scenes import scene_image
from dimefm_edge.data.sentences import open_sentences
from dimefm_edge.latency.measure import machine_info
from dimefm_edge.preprocess import PreprocessSpec

BATCH = 256


def images_per_s(call: Callable[[], int], *, rounds: int = 3) -> float:
    """The median of some rounds of a call that returns how many images it did."""
    rates = []
    for _ in range(rounds):
        begun = time.perf_counter()
        rates.append(call() / (time.perf_counter() - begun))
    return float(np.median(rates))


def decode_all(pool: ImagePool, spec: PreprocessSpec, workers: int) -> int:
    """Decode a pool once, in batches."""
    batches = np.split(np.arange(len(pool)), range(BATCH, len(pool), BATCH))
    return sum(len(b.rows) for b in decode_batches(pool, batches, spec, workers=workers))


def write_jpegs(path: Path, count: int, size: tuple[int, int]) -> Path:
    """A tar of JPEGs drawn as scenes."""
    with tarfile.open(path, "w") as archive:
        for row in range(count):
            stream = io.BytesIO()
            scene_image(row).resize(size).save(stream, "JPEG", quality=90)
            info = tarfile.TarInfo(f"{row:06d}.jpg")
            info.size = stream.tell()
            stream.seek(0)
            archive.addfile(info, stream)
    return path


def draw_scene(row: int) -> int:
    """For processes: draw, and send only a number back."""
    return scene_image(row).size[0]


def scenes_in_processes(count: int) -> dict[str, float]:
    """Spawned processes against the same images on threads; starting them is counted apart."""
    begun = time.perf_counter()
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(available_cores(), mp_context=context) as executor:
        list(executor.map(draw_scene, range(2 * available_cores())))
        start_s = time.perf_counter() - begun
        rate = images_per_s(lambda: len(list(executor.map(draw_scene, range(count), chunksize=32))))
    return {"images_per_s": rate, "start_s": start_s}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--source", default=None, help="images to decode as well")
    parser.add_argument("--image-size", type=int, default=64)
    parser.add_argument("--images", type=int, default=1500)
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    spec = PreprocessSpec(image_size=args.image_size)
    values: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        small = write_jpegs(Path(folder, "small.tar"), args.images, (64, 64))
        large = write_jpegs(Path(folder, "large.tar"), args.images // 4, (480, 360))
        pools = {
            "jpeg_64px": open_images([str(small)]),
            "jpeg_480x360": open_images([str(large)]),
            "scenes": open_images([f"scenes:{args.images}"]),
        }
        if args.source:
            pools["source"] = open_images([args.source])
        for name, pool in pools.items():
            for workers in dict.fromkeys((1, available_cores(), 2 * available_cores())):
                rate = images_per_s(lambda p=pool, w=workers: decode_all(p, spec, w))
                values[f"{name}_threads{workers}_images_per_s"] = rate
        values["scenes_processes"] = scenes_in_processes(args.images)
        pool = pools["scenes"]
        cache = PixelCache.create(Path(folder, "p.u8"), len(pool), spec, pool.fingerprint)
        for batch in decode_batches(pool, [np.arange(len(pool))], spec):
            cache.write(batch.rows, batch.pixels)
        cache.mark_complete()
        cache = PixelCache.open(Path(folder, "p.u8"), len(pool), spec, pool.fingerprint)
        rng = np.random.default_rng(0)
        orders = [rng.integers(0, len(pool), BATCH) for _ in range(40)]
        values["cached_gather_images_per_s"] = images_per_s(
            lambda: sum(len(cache.gather(rows)) for rows in orders)
        )
        text = Path(folder, "s.txt")
        text.write_text("".join(f"a sentence with the number {i}\n" for i in range(200_000)))
        values["txt_sentences_per_s"] = images_per_s(
            lambda: sum(1 for _ in open_sentences([str(text)]))
        )
    values["image_size"] = args.image_size
    values["machine"] = machine_info()
    if args.json:
        json.dump(values, sys.stdout, indent=1)
        sys.stdout.write("\n")
    else:
        for name, value in values.items():
            sys.stdout.write(f"{name:38} {value}\n")


if __name__ == "__main__":
    main()
