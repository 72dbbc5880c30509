"""Is the distillation step nearly the bare student's forward and backward pass?

Times, in turn within one process, a whole step of the trainer (data, augmentation, losses,
clipping, AdamW, moving average) and the student's forward and backward alone on the same
batch; prints the ratio of medians and the data wait. The promise: at least 0.9, wait < 10%.
The floor: forward and backward cost three times the forward FLOPs, which are printed.

    python benchmarks/bench_distill_step.py --json | python benchmarks/record.py distill_step
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

from dimefm_edge.batches import BatchPlan, DistillData, prefetch
from dimefm_edge.config import LossConfig, TrainConfig
from dimefm_edge.data.images import PixelCache, decode_batches, open_images
from dimefm_edge.data.sentences import open_sentences
from dimefm_edge.distill import _Loop
from dimefm_edge.distributed import Ranks
from dimefm_edge.embed import embed_images, embed_texts
from dimefm_edge.latency.estimate import trace_ops
from dimefm_edge.latency.operators import total_gmacs
from dimefm_edge.sides import side_of
from dimefm_edge.students import build_student, vit_spec
from dimefm_edge.teacher import load_teacher


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--images", type=int, default=2048)
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--uncached", action="store_true", help="decode images in every step")
    parser.add_argument("--source", default=None, help="images; default: scenes")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    teacher = load_teacher("sample")
    pool = open_images([args.source or f"scenes:{args.images}"])
    sentences = open_sentences([f"scenes:{args.images}"])
    spec = vit_spec(image_size=64, embed_dim=128, patch_size=8, width=192, depth=3, num_heads=6)
    train = TrainConfig(steps=args.steps, batch_size=args.batch_size, flip=False)
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        cache = PixelCache.create(
            root / "pixels.u8", len(pool), teacher.preprocess, pool.fingerprint
        )
        images = embed_images(teacher, pool, root / "images", max_bad=0.01, cache=cache)
        texts = embed_texts(teacher, sentences, root / "texts")

        def cached(batches):  # type: ignore[no-untyped-def]
            return (cache.gather(rows) for rows in batches)

        def decoded(batches):  # type: ignore[no-untyped-def]
            return (b.pixels for b in decode_batches(pool, batches, teacher.preprocess))

        data = DistillData(
            images, texts, decoded if args.uncached else cached, teacher.preprocess,
            teacher.logit_scale,
        )  # fmt: skip
        ranks, device = Ranks(), torch.device("cuda" if torch.cuda.is_available() else "cpu")
        side = side_of(data, LossConfig(), train, ranks, device)
        loop = _Loop(build_student(spec), side, train, root, lambda *_: None, None, ranks, device)
        whole, bare, wait = [], [], []
        batches = prefetch(BatchPlan(data, train, Ranks()).batches(0, args.steps))
        for _ in range(args.steps):
            begun = time.perf_counter()
            batch = next(batches)
            got = time.perf_counter()
            loop.forward_backward(batch)
            loop.optimise()
            loop.step += 1
            whole.append(time.perf_counter() - begun)
            wait.append(got - begun)
            pixels = torch.from_numpy(np.array(batch.pixels)).permute(0, 3, 1, 2).float() / 255
            begun = time.perf_counter()
            with loop._precision():
                out = loop.net(pixels)
            with loop._precision():
                out.float().sum().backward()
            bare.append(time.perf_counter() - begun)
            loop.optimizer.zero_grad(set_to_none=True)
    skip = args.steps // 4
    step_s, bare_s = statistics.median(whole[skip:]), statistics.median(bare[skip:])
    gmacs = total_gmacs(trace_ops(build_student(spec), 64, 1))
    report = {
        "student": spec.name,
        "pixels": "decoded each step" if args.uncached else "cached",
        "batch_size": args.batch_size,
        "step_ms": 1000 * step_s,
        "forward_backward_ms": 1000 * bare_s,
        "throughput_ratio": bare_s / step_s,
        "data_wait_pct": 100 * statistics.median(wait[skip:]) / step_s,
        "images_per_s": args.batch_size / step_s,
        "forward_backward_gflop_per_image": 6 * gmacs,
        "achieved_gflops": 6 * gmacs * args.batch_size / bare_s,
        "amp": str(loop.amp_dtype),
    }
    if args.json:
        print(json.dumps(report))
    else:
        for name, value in report.items():
            print(f"{name:34} {value}")


if __name__ == "__main__":
    main()
