"""Our exports against what one would pick instead, with the same weights: one run, all in turn.

Three models: open_clip's ViT-B/32 at 224 px and the student that `fit` chooses for it on this
kind of CPU, both with random weights, for time does not depend on them; and the sample teacher.
Each in seven ways, timed by `dimefm_edge.bench`: a process each, rounds of short turns in random
order, three generations of processes. A ratio is a way's time over that of our fp32 graph, with
its 95% interval: above 1, ours is faster.

- `ours`, `ours_int8`: our graph in ONNX Runtime; the same through our int8 rules for this CPU.
- `eager`, `compile`: open_clip's (or our) module in PyTorch, and by torch.compile's defaults.
- `plain`: torch.onnx.export's graph in ONNX Runtime; `openvino`, `dynamic_int8`: that graph in
  OpenVINO (float32), and through ONNX Runtime's own dynamic quantisation.

`cosine` is the mean over images that no calibration saw of a way's embedding with eager fp32's.

    OMP_NUM_THREADS=1 python benchmarks/bench_side_by_side.py --json \
        | python benchmarks/record.py side_by_side
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import psutil
import torch

from dimefm_edge.bench import bench_models
from dimefm_edge.bench.prepare import Prepared, prepare
from dimefm_edge.bench.processes import prepare_apart
from dimefm_edge.bench.runnable import Load, load_runnable
from dimefm_edge.bench.specs import parse_subjects
from dimefm_edge.bench_config import BenchConfig
from dimefm_edge.data.images import open_images
from dimefm_edge.export.int8 import quantize_graph
from dimefm_edge.export.quant_rules import QUANT_RULES
from dimefm_edge.fit import fit_student
from dimefm_edge.latency.measure import machine_info
from dimefm_edge.latency.trace import trace_ops
from dimefm_edge.manifest import INPUT_NAME
from dimefm_edge.preprocess import PreprocessSpec, preprocess_images
from dimefm_edge.students import build_student, save_student
from dimefm_edge.students.vit import vit_geometry
from dimefm_edge.targets.cpu import cpu_quant_rules
from dimefm_edge.teacher import load_teacher

Images = npt.NDArray[np.float32]

TEACHER = "ViT-B-32:random"
TARGET = "x86-cpu"
MODELS = ("vit_b32", "student", "sample_teacher")
SEED = 0
LIMIT_S = 600.0


def fitted_student(folder: Path) -> Path:
    """A run folder with what `fit` chooses below ViT-B/32 for this kind of CPU."""
    teacher = load_teacher(TEACHER, device="cpu")
    side = teacher.preprocess.image_size
    spec = fit_student(
        TARGET, image_size=side, embed_dim=teacher.embed_dim,
        teacher_geometry=vit_geometry(teacher.image_tower),
        teacher_ops=trace_ops(teacher.image_tower, side, 1),
    ).chosen  # fmt: skip
    torch.manual_seed(SEED)
    folder.mkdir()
    path = folder / "checkpoint.safetensors"
    save_student(path, build_student(spec).eval(), spec, teacher.preprocess, {})
    return folder


def prepared_apart(word: str, folder: Path) -> Prepared:
    """A model's file, exported by a process of its own: same seed, same weights."""
    folder.mkdir()
    (spec,) = parse_subjects([word])
    return prepare_apart(spec, folder, seed=SEED, limit_s=LIMIT_S)


def pictures(preprocess: PreprocessSpec, count: int) -> tuple[Images, Images]:
    """(N, 3, S, S) to calibrate on, and as many others to compare on."""
    pool = open_images(["scenes"])
    rows = [i * 37 % len(pool) for i in range(2 * count)]
    images = preprocess_images([pool.load(row) for row in rows], preprocess)
    return images[:count], images[count:]


def ways_of(name: str, folder: Path, *, num_images: int) -> tuple[dict[str, str], Images]:
    """What `bench` is to be given for each way, ours first; and the images to compare on."""
    ours = prepared_apart(name, folder / "ours")
    plain = prepared_apart(f"{name}@plain", folder / "plain")
    assert ours.preprocess is not None
    calibration, test = pictures(PreprocessSpec.from_dict(ours.preprocess), num_images)
    int8 = folder / "ours_int8.onnx"
    rules = QUANT_RULES[cpu_quant_rules()]
    onnx.save(quantize_graph(onnx.load(ours.path), calibration, rules=rules), str(int8))
    return {
        "ours": ours.path,
        "ours_int8": str(int8),
        "eager": f"{name}@eager",
        "compile": f"{name}@compile",
        "plain": plain.path,
        "openvino": f"{plain.path}@openvino",
        "dynamic_int8": f"{plain.path}@dynamic-int8",
    }, test


def embeds_of(word: str, images: Images, folder: Path, threads: int) -> Images:
    """(N, E) at unit length, one image a call, by the same loaders that the bench times."""
    folder.mkdir()
    (spec,) = parse_subjects([word])
    load = Load(threads=threads, seed=SEED, image_size=images.shape[-1])
    runnable = load_runnable(prepare(spec, folder, seed=SEED), load)
    found = np.concatenate([
        np.array(runnable.run({INPUT_NAME: images[i : i + 1]}), np.float32)
        for i in range(len(images))
    ])  # fmt: skip
    unit: Images = found / np.linalg.norm(found, axis=1, keepdims=True)
    return unit


def bench(
    name: str, folder: Path, *, seconds: float, threads: int, num_images: int
) -> dict[str, Any]:
    """One model in every way: times from one bench, then what each answers."""
    folder.mkdir()
    ways, images = ways_of(name, folder, num_images=num_images)
    embeds = {
        way: embeds_of(word, images, folder / f"{way}_embeds", threads)
        for way, word in ways.items()
    }
    result = bench_models(
        BenchConfig(
            models=tuple(ways.values()), seconds=seconds, threads=threads, seed=SEED,
            image_size=images.shape[-1], time_limit_s=LIMIT_S,
        ),
        folder / "bench",
    )  # fmt: skip
    values: dict[str, Any] = {}
    for way, found in zip(ways, result.subjects, strict=True):
        if found.error:
            values[way] = {"error": found.error}
            continue
        values[way] = {
            "p50_ms": found.p50_ms, "ratio": found.ratio, "low": found.ratio_low,
            "high": found.ratio_high,
            "cosine": float((embeds[way] * embeds["eager"]).sum(axis=1).mean()),
        }  # fmt: skip
    return values


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", choices=MODELS, default=MODELS)
    parser.add_argument("--seconds", type=float, default=10.0, help="of each way of each model")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--num-images", type=int, default=64, help="to calibrate, and to compare")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    before = psutil.getloadavg()[0]
    values: dict[str, Any] = {"threads": args.threads, "int8_rules": cpu_quant_rules()}
    with tempfile.TemporaryDirectory() as text:
        folder = Path(text)
        names = {"vit_b32": TEACHER, "sample_teacher": "sample"}
        if "student" in args.models:
            names["student"] = str(fitted_student(folder / "run"))
        for model in args.models:
            values[model] = bench(
                names[model], folder / model, seconds=args.seconds, threads=args.threads,
                num_images=args.num_images,
            )  # fmt: skip
    values["load_average"] = {"before": before, "after": psutil.getloadavg()[0]}
    values["machine"] = machine_info()
    print(json.dumps(values, indent=None if args.json else 1))


if __name__ == "__main__":
    main()
