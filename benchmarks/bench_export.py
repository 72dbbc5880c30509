"""Is an exported student faster than PyTorch, and how near to what the machine can do?

Exports a student of the default's size (random weights) in fp32 and fp16 and times one image
(or more) in ONNX Runtime and in eager PyTorch, in turn within one process, on the same threads.
The floor: the student's multiplications and additions at the rate of a large fp32 matrix product,
timed in the same rounds. Beside it: parity, size, and how long a bundle takes to open.

    python benchmarks/bench_export.py --json | python benchmarks/record.py export
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from dimefm_edge.data.scenes import scene_image
from dimefm_edge.export import export_student, graph_spec
from dimefm_edge.labels import LabelBank
from dimefm_edge.latency.estimate import trace_ops
from dimefm_edge.latency.measure import machine_info, measure_interleaved
from dimefm_edge.latency.operators import total_gmacs
from dimefm_edge.preprocess import PreprocessSpec, preprocess_images
from dimefm_edge.runtime import load_bundle, load_engine
from dimefm_edge.runtime.onnxruntime import count_physical_cores
from dimefm_edge.students import LoadedStudent, build_student, vit_spec

SIDE, DIM = 64, 128
PRECISIONS = ("fp32", "fp16")
PRODUCT = 512  # rows of the square product that gives the floor


def default_like(width: int, depth: int) -> LoadedStudent:
    """A ViT student; norms and biases are moved off ones and zeros, as training does."""
    spec = vit_spec(
        image_size=SIDE, embed_dim=DIM, patch_size=8, width=width, depth=depth,
        num_heads=width // 32,
    )  # fmt: skip
    torch.manual_seed(0)
    student = build_student(spec).eval()
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.add_(0.01 * torch.randn_like(parameter))
    return LoadedStudent(student, spec, PreprocessSpec(SIDE), {})


def random_bank(classes: int) -> LabelBank:
    """Label embeddings of the size that a real label set has."""
    rows = np.random.default_rng(0).normal(size=(classes, DIM))
    embeds = (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)
    return LabelBank("random", tuple(map(str, range(classes))), ("{c}",), embeds)


def median_ms(call: Callable[[], object], *, rounds: int = 20) -> float:
    """Of a call that is made anew each time, such as opening a file."""
    times = []
    for _ in range(rounds):
        begun = time.perf_counter()
        call()
        times.append(1000 * (time.perf_counter() - begun))
    return statistics.median(times)


def bundle_figures(bundle_path: Path) -> dict[str, Any]:
    """Parity, size and opening time of one bundle; the disk's cache is warm."""
    bundle = load_bundle(bundle_path)
    return {
        "parity": bundle.manifest["parity"],
        "nodes": bundle.manifest["graph"]["nodes"],
        "size_mib": sum(p.stat().st_size for p in bundle_path.iterdir()) / 2**20,
        "load_bundle_ms": median_ms(lambda: load_bundle(bundle_path)),
        "load_engine_ms": median_ms(lambda: load_engine(bundle)),
    }


def latencies(
    loaded: LoadedStudent,
    bundles: dict[str, Path],
    image: npt.NDArray[np.float32],
    *,
    seconds: float,
    threads: int,
) -> dict[str, Any]:
    """Time PyTorch, ONNX Runtime and a plain matrix product in turn."""
    torch.set_num_threads(threads)
    batch = torch.from_numpy(image)
    square = torch.randn(PRODUCT, PRODUCT)

    def eager() -> object:
        with torch.inference_mode():
            return loaded.student(batch)

    calls: dict[str, Callable[[], object]] = {"pytorch_fp32": eager}
    for precision, path in bundles.items():
        engine = load_engine(load_bundle(path), threads=threads)
        calls[f"onnxruntime_{precision}"] = lambda e=engine: e.encode_image(image)  # type: ignore[misc]
    calls["product"] = lambda: square @ square
    reports = {
        report.name: report
        for report in measure_interleaved(
            calls, batch_size=len(image), min_runs=100, max_seconds=seconds
        )
    }
    product_ms = reports.pop("product").p50_ms
    gflops = 2 * PRODUCT**3 / 1e6 / product_ms
    gflop = 2 * total_gmacs(trace_ops(build_student(loaded.spec), SIDE, len(image)))
    base = reports["pytorch_fp32"].p50_ms
    return {
        "threads": threads,
        "p50_ms": {name: report.p50_ms for name, report in reports.items()},
        "p90_ms": {name: report.p90_ms for name, report in reports.items()},
        "speed_over_pytorch": {
            precision: base / reports[f"onnxruntime_{precision}"].p50_ms for precision in bundles
        },
        "gflop": gflop,
        "product_gflops": gflops,
        "floor_ms": 1000 * gflop / gflops,
        "floor_share_fp32": 1000 * gflop / gflops / reports["onnxruntime_fp32"].p50_ms,
        "steady": str(all(report.is_steady for report in reports.values())),
    }


def bench(
    loaded: LoadedStudent, *, batch_size: int, seconds: float, threads: int
) -> dict[str, Any]:
    """Export in each precision, then measure."""
    images = preprocess_images([scene_image(i) for i in range(64)], loaded.preprocess)
    values: dict[str, Any] = {"student": loaded.spec.name, "batch_size": batch_size}
    with tempfile.TemporaryDirectory() as folder:
        bundles = {}
        for precision in PRECISIONS:
            bundles[precision] = Path(folder, precision)
            begun = time.perf_counter()
            export_student(
                loaded, bundles[precision], graph=graph_spec(None, precision=precision),
                parity_images=images, logit_scale=100.0, label_banks=[random_bank(1000)],
            )  # fmt: skip
            values[precision] = {"export_s": time.perf_counter() - begun}
            values[precision] |= bundle_figures(bundles[precision])
        batch = images[np.arange(batch_size) % len(images)]
        values |= latencies(loaded, bundles, batch, seconds=seconds, threads=threads)
    values["machine"] = machine_info()
    return values


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--width", type=int, default=192)
    parser.add_argument("--depth", type=int, default=3)
    parser.add_argument("--batch-size", type=int, default=1)
    parser.add_argument("--threads", type=int, default=0, help="0: one per physical core")
    parser.add_argument("--seconds", type=float, default=5.0, help="of timed calls, for each")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    loaded = default_like(args.width, args.depth)
    threads = args.threads or count_physical_cores()
    values = bench(loaded, batch_size=args.batch_size, seconds=args.seconds, threads=threads)
    print(json.dumps(values, indent=None if args.json else 1))


if __name__ == "__main__":
    main()
