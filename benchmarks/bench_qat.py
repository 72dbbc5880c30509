"""Is a student that was trained in int8 as good as in fp32, and better than calibration makes it?

Distils students with several seeds, each in a float and an int8 stage, and tests the graphs in
ONNX Runtime: fp32, int8 by our calibration, int8 trained, and the fp32 graph quantised by ONNX
Runtime's own `quantize_static` in the ways its documentation names for this CPU, and by
nvidia-modelopt where it is installed.

    python benchmarks/bench_qat.py --json | python benchmarks/record.py qat_scenes
    python benchmarks/bench_qat.py --teacher /tmp/teacher --data ../shared/data --json \\
        | python benchmarks/record.py qat_real

`--step-time` measures a training step of each kind instead. Resumable, as runs are.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from dimefm_edge.config import DataConfig, QuantConfig, RunConfig, StudentConfig, TrainConfig
from dimefm_edge.data.images import open_images, open_labelled, sample_rows
from dimefm_edge.evaluate.zero_shot import evaluate_zero_shot
from dimefm_edge.latency.measure import machine_info
from dimefm_edge.manifest import INPUT_NAME
from dimefm_edge.pipeline import run
from dimefm_edge.preprocess import preprocess_images
from dimefm_edge.quantize.qat import qat_prepare
from dimefm_edge.runtime import Bundle, load_bundle
from dimefm_edge.runtime.onnxruntime import OnnxRuntimeEngine
from dimefm_edge.students import build_student, student_spec
from dimefm_edge.targets.cpu import AVX2_RULES, cpu_quant_rules

if __package__:
    from benchmarks.bench_int8 import stock_graph
else:
    from bench_int8 import stock_graph

Images = npt.NDArray[np.float32]
_SIDE, _BATCH = 64, 64
_MODELOPT = """
import sys
import numpy as np
from modelopt.onnx.quantization import quantize
path, images, out, name = sys.argv[1:]
quantize(
    onnx_path=path, calibration_data={name: np.load(images)}, quantize_mode="int8",
    calibration_eps=["cpu"], high_precision_dtype="fp32", output_path=out,
)
"""


def config_of(args: argparse.Namespace, student: str, seed: int) -> RunConfig:
    """One run, with both stages."""
    if args.data is None:
        data = DataConfig()
    else:
        tests = tuple(str(args.data / "zeroshot" / n) for n in ("cifar10", "tiny-imagenet"))
        data = DataConfig(
            images=(str(args.data / "images/cifar10*.tar"), str(args.data / "images/*1.tar")),
            texts=(str(args.data / "text/coco*.gz"), *(f"prompts:{test}" for test in tests)),
            eval_sets=tests,
        )
    return RunConfig(
        target=args.target,
        teacher=args.teacher,
        out=str(args.out / f"{student.replace(':', '-')}-{seed}"),
        store=args.store or str(args.out / "store"),
        data=data,
        student=StudentConfig(student=student, init="auto"),
        train=TrainConfig(
            steps=args.steps, batch_size=_BATCH, text_batch_size=256, seed=seed,
            eval_every=10**6, threads=args.threads,
        ),
        quant=QuantConfig(qat="int8", qat_steps_ratio=args.qat_steps_ratio),
    )  # fmt: skip


def other_tools(bundle: Bundle, images: Images, eval_sets: Sequence[str]) -> dict[str, Any]:
    """Zero-shot top-1 of the fp32 graph as others quantise it, by tool and test set."""
    with tempfile.TemporaryDirectory() as folder:  # the bundle stays as it is
        source = Path(shutil.copy(bundle.model_path, folder))
        must_reduce = cpu_quant_rules() == AVX2_RULES
        graphs = {
            "stock u8s8": stock_graph(source, images, weight="int8", reduce_range=must_reduce),
            "stock u8u8": stock_graph(source, images, weight="uint8", reduce_range=False),
        }
        if find_spec("modelopt") is not None:
            graphs["modelopt"] = modelopt_graph(source, images)
        made = {}
        for name, graph in graphs.items():
            path = source.with_name("other.onnx")
            path.write_bytes(graph.SerializeToString())
            engine = OnnxRuntimeEngine(
                path, preprocess=bundle.preprocess, embed_dim=bundle.embed_dim, precision="int8"
            )
            made[name] = {
                test.name: evaluate_zero_shot(
                    engine.encode_pixels, bundle.preprocess, test, bundle.label_banks[test.name]
                ).top1_pct
                for test in map(open_labelled, eval_sets)
            }
    return made


def modelopt_graph(path: Path, images: Images) -> onnx.ModelProto:
    """nvidia-modelopt's int8 ONNX PTQ with its defaults, on the CPU; not a dependency of ours.

    In a process of its own: it changes ONNX Runtime's quantiser for all who come later.
    """
    given, out = path.with_name("modelopt.npy"), path.with_name("modelopt.onnx")
    np.save(given, images)
    words = (str(path), str(given), str(out), INPUT_NAME)
    subprocess.run([sys.executable, "-c", _MODELOPT, *words], check=True, stdout=sys.stderr)
    return onnx.load(str(out))


def study(args: argparse.Namespace, student: str, seed: int) -> dict[str, Any]:
    """Top-1 by precision and test set, cosine to fp32 and size, of one student and seed."""
    config = config_of(args, student, seed)
    report = run(config, resume=Path(config.out, "config.toml").is_file())
    assert report is not None
    plain = load_bundle(Path(config.out, "bundle-fp32"))
    pool = open_images(config.data.images)
    sample = sample_rows(len(pool), 256)  # as ours is calibrated on
    images = preprocess_images([pool.load(int(row)) for row in sample], plain.preprocess)
    rows = {row.name: row for row in report.precisions}
    fp32 = rows["fp32"]
    return {
        "top1_pct": {name: row.top1_pct for name, row in rows.items()}
        | other_tools(plain, images, config.data.eval_sets or list(fp32.top1_pct)),
        "cosine": {name: row.mean_cosine for name, row in rows.items()},
        "size_share": {name: row.size_mib / fp32.size_mib for name, row in rows.items()},
        "integer_products": {name: row.integer_products for name, row in rows.items()},
        "float_products": {name: len(row.float_products) for name, row in rows.items()},
    }


def losses_of(runs: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Points of top-1 lost to fp32, mean over seeds and test sets, and the largest."""
    names = [name for name in runs[0]["top1_pct"] if name != "fp32"]
    found = {}
    for name in names:
        drops = [
            found_run["top1_pct"]["fp32"][test] - top1
            for found_run in runs
            for test, top1 in found_run["top1_pct"][name].items()
        ]
        found[name] = {"mean": statistics.fmean(drops), "largest": max(drops)}
    return found


def step_time(student: str, *, rounds: int) -> dict[str, float]:
    """Processor seconds of a training step, forward and backward, kinds in turn; the least."""
    torch.manual_seed(0)
    torch.set_num_threads(1)
    module = build_student(student_spec(student, image_size=_SIDE, embed_dim=256)).train()
    trained = qat_prepare(module, image_size=_SIDE, rules_name=cpu_quant_rules())
    images = torch.randn(_BATCH, 3, _SIDE, _SIDE)
    trained.warm_up([images])
    times: dict[str, list[float]] = {"float": [], "observing": [], "frozen": []}
    for _ in range(rounds):
        for name in times:
            trained.freeze_ranges(name == "frozen")
            begun = time.process_time()
            with sdpa_kernel(SDPBackend.MATH):
                embeds = (module if name == "float" else trained)(images)
                (embeds @ embeds.T).square().mean().backward()
            times[name].append(time.process_time() - begun)
    least = {name: min(values) for name, values in times.items()}
    return {f"{name}_s": value for name, value in least.items()} | {
        f"{name}_over_float": value / least["float"] for name, value in least.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--students", nargs="+", default=["vit-p8-w96-d8", "hybrid-nano"])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=400, help="of the float stage")
    parser.add_argument("--qat-steps-ratio", type=float, default=0.3)
    parser.add_argument("--store", help="of a run on the same data, to embed nothing anew")
    parser.add_argument("--target", default="x86-cpu", help="by whose runtime's rules")
    parser.add_argument("--teacher", default="sample")
    parser.add_argument("--data", type=Path, help="real images instead of scenes")
    parser.add_argument("--out", type=Path, default=Path("runs/qat"))
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--step-time", action="store_true")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    values: dict[str, Any] = {"target": args.target, "cpu_rules": cpu_quant_rules()}
    for student in args.students:
        if args.step_time:
            values[student] = step_time(student, rounds=5)
            continue
        with contextlib.redirect_stdout(sys.stderr):  # modelopt logs there
            runs = [study(args, student, seed) for seed in args.seeds]
        values[student] = {f"seed{s}": r for s, r in zip(args.seeds, runs, strict=True)}
        values[student]["lost"] = losses_of(runs)
    values["machine"] = machine_info()
    print(json.dumps(values, indent=None if args.json else 1))


if __name__ == "__main__":
    main()
