"""From a JPEG file to its top-5 labels: student bundles against eager open_clip ViT-B/32.

Both have 1,000 labels and one image a call, and take turns in one process on the same number of
threads; times are medians, ratios medians over rounds. The students are those that `fit` chooses
for this teacher on each target, with random weights, exported for ONNX Runtime on the CPU: what
is timed does not depend on the weights; each in fp32 and, calibrated, in int8 by the rules for this
CPU. The teacher has random weights too, and is used as its
README says: PIL, its own transform, eager PyTorch. The default budgets, half of the teacher's
estimate on the target and 0.4 of its arithmetic at most, are what holds the student back; the
rest of the ratio is the runtime's and the preprocessing's. Stages are timed one by one besides.

    OMP_NUM_THREADS=1 python benchmarks/bench_end_to_end.py --json \
        | python benchmarks/record.py end_to_end
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import psutil
import torch
from photos import jpeg, photo
from PIL import Image

from dimefm_edge.data.scenes import scene_image
from dimefm_edge.export import export_student, graph_spec
from dimefm_edge.fit import fit_student
from dimefm_edge.labels import LabelBank
from dimefm_edge.latency.measure import machine_info, sample_interleaved
from dimefm_edge.latency.trace import trace_ops
from dimefm_edge.model_input import load_inputs
from dimefm_edge.preprocess import PreprocessSpec, preprocess_images
from dimefm_edge.runtime import ZeroShotClassifier
from dimefm_edge.students import LoadedStudent, build_student
from dimefm_edge.students.vit import vit_geometry
from dimefm_edge.teacher import Teacher, load_teacher

SIZES = ((320, 240), (640, 480), (1280, 960), (4032, 3024))
TARGETS = ("x86-cpu", "jetson-orin")
PRECISIONS = ("fp32", "int8")
NUM_LABELS = 1000
_NUM_IMAGES = 80  # 64 for parity, those before calibrate


def random_labels(embed_dim: int) -> LabelBank:
    embeds = np.random.default_rng(0).standard_normal((NUM_LABELS, embed_dim)).astype(np.float32)
    embeds /= np.linalg.norm(embeds, axis=1, keepdims=True)
    return LabelBank("random", tuple(f"label {i}" for i in range(NUM_LABELS)), ("{c}",), embeds)


def fitted_bundles(target: str, teacher: Teacher, geometry: Any, folder: Path) -> dict[str, Path]:
    """The student that `fit` chooses for a target, random weights, as ONNX Runtime bundles."""
    preprocess = teacher.preprocess
    spec = fit_student(
        target, image_size=preprocess.image_size, embed_dim=teacher.embed_dim,
        teacher_geometry=geometry, teacher_ops=trace_ops(
            teacher.image_tower, preprocess.image_size, 1
        ),
    ).chosen  # fmt: skip
    loaded = LoadedStudent(build_student(spec).eval(), spec, preprocess, {})
    images = preprocess_images([scene_image(i) for i in range(_NUM_IMAGES)], preprocess)
    return {
        f"{spec.name} {precision} for {target}": export_student(
            loaded, folder / f"{target}-{precision}", graph=graph_spec(None, precision=precision),
            logit_scale=100.0, label_banks=[random_labels(teacher.embed_dim)], parity_images=images,
        )
        for precision in PRECISIONS
    }  # fmt: skip


class EagerClip:
    """open_clip as its README uses it."""

    def __init__(self, name: str) -> None:
        self.model, _, self.transform = open_clip.create_model_and_transforms(name)
        self.model.eval()
        bank = random_labels(self.model.visual.output_dim)
        self.names, self.texts = bank.classnames, torch.from_numpy(bank.embeds)

    def prepare(self, path: Path) -> torch.Tensor:
        tensor: torch.Tensor = self.transform(Image.open(path)).unsqueeze(0)
        return tensor

    @torch.no_grad()
    def embed(self, images: torch.Tensor) -> torch.Tensor:
        features: torch.Tensor = self.model.encode_image(images)
        return features / features.norm(dim=-1, keepdim=True)

    def rank(self, embeds: torch.Tensor) -> list[tuple[str, float]]:
        shares, order = (100.0 * embeds @ self.texts.T).softmax(-1).topk(5)
        return [
            (self.names[i], p) for i, p in zip(order[0].tolist(), shares[0].tolist(), strict=True)
        ]

    def classify(self, path: Path) -> list[tuple[str, float]]:
        return self.rank(self.embed(self.prepare(path)))


def classifier_calls(
    name: str, bundle: Path, path: Path, preprocess: PreprocessSpec, *, threads: int
) -> dict[str, Callable[[], object]]:
    """The whole way, the same prepared exactly, and the stages of the first."""
    fast = ZeroShotClassifier(bundle, threads=threads)
    exact = ZeroShotClassifier(bundle, threads=threads, exact=True)
    inputs = load_inputs([path], preprocess)
    return {
        name: lambda: fast.classify([path], top_k=5),
        f"{name}.exact": lambda: exact.classify([path], top_k=5),
        f"{name}.prepare": lambda: load_inputs([path], preprocess),
        f"{name}.embed": lambda: fast.engine.encode_image(inputs),
    }


def bench_size(
    size: tuple[int, int], bundles: dict[str, Path], clip: EagerClip, preprocess: PreprocessSpec,
    folder: Path, *, threads: int, seconds: float, runs: int,
) -> dict[str, Any]:  # fmt: skip
    """One photo: every subject in turn, and the stages of each."""
    path = folder / f"{size[0]}x{size[1]}.jpg"
    path.write_bytes(jpeg(photo(*size, seed=1)))
    tensor = clip.prepare(path)
    embeds = clip.embed(tensor)
    calls: dict[str, Callable[[], object]] = {
        "open_clip": lambda: clip.classify(path),
        "open_clip.prepare": lambda: clip.prepare(path),
        "open_clip.embed": lambda: clip.embed(tensor),
        "open_clip.rank": lambda: clip.rank(embeds),
    }
    for name, bundle in bundles.items():
        calls |= classifier_calls(name, bundle, path, preprocess, threads=threads)
    _, samples = sample_interleaved(calls, min_runs=runs, max_seconds=seconds)
    whole = [name for name in samples if "." not in name or name.endswith(".exact")]
    return {
        "name": f"{size[0]}x{size[1]}",
        "bytes": path.stat().st_size,
        "p50_ms": {name: float(np.median(times)) for name, times in samples.items()},
        "images_per_s": {name: 1e3 / float(np.median(samples[name])) for name in whole},
        "ratio": {
            name: float(np.median(samples["open_clip"] / samples[name]))
            for name in whole
            if name != "open_clip"
        },
        "rounds": len(samples["open_clip"]),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--teacher", default="ViT-B-32", help="an architecture of open_clip")
    parser.add_argument("--targets", nargs="*", default=TARGETS)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--runs", type=int, default=20)
    parser.add_argument("--seconds", type=float, default=2.0, help="of each subject and size")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    load = psutil.getloadavg()[0]
    teacher = load_teacher(f"{args.teacher}:random", device="cpu")
    geometry = vit_geometry(teacher.image_tower)
    with tempfile.TemporaryDirectory() as text:
        folder = Path(text)
        bundles: dict[str, Path] = {}
        for target in args.targets:
            bundles |= fitted_bundles(target, teacher, geometry, folder)
        clip = EagerClip(args.teacher)
        rows = [
            bench_size(
                size, bundles, clip, teacher.preprocess, folder,
                threads=args.threads, seconds=args.seconds, runs=args.runs,
            )
            for size in SIZES
        ]  # fmt: skip
    values = {
        "teacher": f"{args.teacher}, random weights, eager", "threads": args.threads,
        "sizes": rows, "load_average": {"before": load, "after": psutil.getloadavg()[0]},
        "machine": machine_info(),
    }  # fmt: skip
    print(json.dumps(values, indent=None if args.json else 1))


if __name__ == "__main__":
    main()
