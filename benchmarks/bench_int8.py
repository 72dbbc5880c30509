"""Is an int8 graph faster than fp32 on this CPU, how near are its answers, and is stock better?

Each subject's fp32 graph is quantised by our rules for this CPU and by ONNX Runtime's own
`quantize_static` (per channel, reduced range where it must be), with the same images, and timed
in turn on one thread by the processor's clock: the median, and the run least disturbed by
other work on the machine, which takes cache and memory from all and most from fp32.
Speed: random weights, sizes that people deploy. Accuracy: the sample teacher's image tower.

    python benchmarks/bench_int8.py --json | python benchmarks/record.py int8

`--memory` measures memory instead: the peak of a process that loads a file as the runtime does
and runs one image, and how much of it came with the graph; the median of several processes.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnxruntime
import torch
from onnxruntime import quantization as stock
from torch import nn

from dimefm_edge.data.images import open_images
from dimefm_edge.export.int8 import quantize_graph
from dimefm_edge.export.integer_kernels import count_integer_kernels
from dimefm_edge.export.onnx import export_onnx
from dimefm_edge.export.patches import patches_as_products
from dimefm_edge.export.quant_rules import QUANT_RULES, QuantRules
from dimefm_edge.latency.measure import machine_info
from dimefm_edge.manifest import INPUT_NAME
from dimefm_edge.preprocess import PreprocessSpec, preprocess_images
from dimefm_edge.students import build_student, hybrid_spec, student_spec, vit_spec
from dimefm_edge.targets.cpu import AVX2_RULES, cpu_quant_rules, unwanted_rewrites
from dimefm_edge.teacher import load_teacher

Images = npt.NDArray[np.float32]
_SIDE = 224
_NUM_PROCESSES = 5
_MEMORY = """
import json, sys
import numpy as np
from dimefm_edge.latency.measure import peak_rss_mib
from dimefm_edge.manifest import INPUT_NAME
from dimefm_edge.runtime.onnxruntime import load_session
import onnxruntime
path, side, precision = sys.argv[1], int(sys.argv[2]), sys.argv[3]
bare_mib = peak_rss_mib()
session = load_session(path, 1, ["CPUExecutionProvider"], precision=precision)
session.run(None, {INPUT_NAME: np.zeros((1, 3, side, side), np.float32)})
print(json.dumps([peak_rss_mib(), peak_rss_mib() - bare_mib]))
"""
_SHAPES = {
    "vit_s16": {"patch_size": 16, "width": 384, "num_heads": 6},
    "vit_b32": {"patch_size": 32, "width": 768, "num_heads": 12},
}


class _Unit(nn.Module):
    """A teacher's tower with its output at unit length, as a student's is."""

    def __init__(self, tower: nn.Module) -> None:
        super().__init__()
        self.tower = tower

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        return nn.functional.normalize(self.tower(image), dim=-1)


def subject(name: str) -> tuple[nn.Module, PreprocessSpec]:
    """A model with its preprocessing."""
    torch.manual_seed(0)
    if name == "sample_teacher":
        teacher = load_teacher("sample", device="cpu")
        return _Unit(teacher.image_tower), teacher.preprocess
    if name == "hybrid":
        spec = hybrid_spec(image_size=_SIDE, embed_dim=512, width=64, depth=(2, 2, 6, 2))
    elif name in _SHAPES:
        spec = vit_spec(image_size=_SIDE, embed_dim=512, depth=12, **_SHAPES[name])
    else:
        spec = student_spec(name, image_size=_SIDE, embed_dim=512)
    return build_student(spec).eval(), PreprocessSpec(_SIDE)


def stock_graph(path: Path, images: Images, *, weight: str, reduce_range: bool) -> onnx.ModelProto:
    """ONNX Runtime's own static quantisation, as its documentation recommends it."""

    class Reader(stock.CalibrationDataReader):  # type: ignore[misc]
        def __init__(self) -> None:
            self.pieces = iter([{INPUT_NAME: images[i : i + 1]} for i in range(len(images))])

        def get_next(self) -> Any:
            return next(self.pieces, None)

    out = path.with_name("stock.onnx")
    stock.quantize_static(
        str(path), str(out), Reader(), per_channel=True, reduce_range=reduce_range,
        activation_type=stock.QuantType.QUInt8,
        weight_type=stock.QuantType.QUInt8 if weight == "uint8" else stock.QuantType.QInt8,
    )  # fmt: skip
    return onnx.load(str(out))


def variants(path: Path, images: Images, rules: QuantRules) -> dict[str, Callable[[], Any]]:
    """What is compared: the rules of this CPU, the choices not taken, and stock."""
    model = onnx.load(str(path))
    others = {
        "ours": rules,
        "ours_7bit": replace(rules, weight="int8", weight_bits=7),
        "ours_s8": QUANT_RULES["onnxruntime-x86"],
        "ours_attention": replace(rules, attention_head_dims=(32, 64)),
        "ours_stem": replace(rules, is_stem_quantized=True),
        "ours_depthwise": replace(rules, is_depthwise_quantized=True),
        "ours_minmax": replace(rules, calibration="minmax"),
        "ours_mse": replace(rules, calibration="mse"),
    }
    made: dict[str, Callable[[], Any]] = {
        name: lambda r=other: quantize_graph(model, images, rules=r)  # type: ignore[misc]
        for name, other in others.items()
    }
    must_reduce = rules.name == AVX2_RULES
    made["stock"] = lambda: stock_graph(path, images, weight="int8", reduce_range=must_reduce)
    made["stock_u8"] = lambda: stock_graph(path, images, weight="uint8", reduce_range=False)
    return made


def open_session(path: Path) -> Any:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    is_ours = path.name.startswith("ours")  # what runs them asks for this
    return onnxruntime.InferenceSession(
        str(path), options, providers=["CPUExecutionProvider"],
        disabled_optimizers=unwanted_rewrites("int8" if is_ours else "fp32"),
    )  # fmt: skip


def embeds(session: Any, images: Images) -> Images:
    """(N, E), at unit length; one image at a time."""
    rows = [session.run(None, {INPUT_NAME: images[i : i + 1]})[0] for i in range(len(images))]
    found = np.concatenate(rows)
    unit: Images = found / np.linalg.norm(found, axis=1, keepdims=True)
    return unit


def cpu_ms(sessions: dict[str, Any], image: Images, *, rounds: int) -> dict[str, list[float]]:
    """Processor times of single runs, sessions in turn."""
    times: dict[str, list[float]] = {name: [] for name in sessions}
    for round_idx in range(rounds + 2):
        for name, session in sessions.items():
            begun = time.process_time_ns()
            session.run(None, {INPUT_NAME: image})
            if round_idx >= 2:
                times[name].append((time.process_time_ns() - begun) / 1e6)
    return times


def peaks_mib(path: Path, side: int) -> tuple[float, float]:
    """Peak memory of a process that answers once, and how much of it came with the graph."""
    precision = "int8" if path.name.startswith("ours") else "fp32"
    command = [sys.executable, "-c", _MEMORY, str(path), str(side), precision]
    found = []
    for _ in range(_NUM_PROCESSES):
        done = subprocess.run(command, check=True, capture_output=True, text=True)
        found.append(json.loads(done.stdout))
    peak, of_graph = (statistics.median(values) for values in zip(*found, strict=True))
    return peak, of_graph


def prepare(
    folder: str, name: str, sources: list[str], *, num_images: int
) -> tuple[Path, Images, Images]:
    """A subject's fp32 graph, images to calibrate on and others to test on."""
    module, preprocess = subject(name)
    pool = open_images(sources)
    rows = [i * 37 % len(pool) for i in range(2 * num_images)]
    images = preprocess_images([pool.load(row) for row in rows], preprocess)
    path = Path(folder, "fp32.onnx")
    export_onnx(module, path, image_size=preprocess.image_size,
                parity_images=images[: min(8, num_images)], metadata={})  # fmt: skip
    model = onnx.load(str(path))
    patches_as_products(model)  # as in every export for ONNX Runtime
    onnx.save(model, str(path))
    return path, images[:num_images], images[num_images:]


def bench(name: str, sources: list[str], *, num_images: int, rounds: int) -> dict[str, Any]:
    """Quantise one subject in every way, then time and compare."""
    rules = QUANT_RULES[cpu_quant_rules()]
    values: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        path, calibration, test = prepare(folder, name, sources, num_images=num_images)
        sessions = {"fp32": open_session(path)}
        expected = embeds(sessions["fp32"], test)
        for variant, make in variants(path, calibration, rules).items():
            out = Path(folder, f"{variant}.onnx")
            onnx.save(make(), str(out))
            sessions[variant] = open_session(out)
            cosines = (embeds(sessions[variant], test) * expected).sum(axis=1)
            kernels = count_integer_kernels(out, test[:1])
            values[variant] = {
                "mean_cosine": float(cosines.mean()), "min_cosine": float(cosines.min()),
                "size_share": out.stat().st_size / path.stat().st_size,
                "integer_kernels": kernels.num_integer, "fallen_back": len(kernels.fallen_back),
            }  # fmt: skip
        times = cpu_ms(sessions, test[:1], rounds=rounds)
    figures: dict[str, Callable[[list[float]], float]] = {"median": statistics.median, "least": min}
    values["fp32"] = {f"{label}_ms": of(times["fp32"]) for label, of in figures.items()}
    del times["fp32"]
    for variant, ms in times.items():
        for label, of in figures.items():
            fp32_ms = values["fp32"][f"{label}_ms"]
            values[variant][f"{label}_speed_over_fp32"] = fp32_ms / of(ms)
    return values


def memory(name: str, sources: list[str], *, num_images: int) -> dict[str, Any]:
    """Peaks in MiB of fp32 and of int8 by the rules of this CPU, a process for each run."""
    with tempfile.TemporaryDirectory() as folder:
        path, images, _ = prepare(folder, name, sources, num_images=num_images)
        int8 = quantize_graph(onnx.load(str(path)), images, rules=QUANT_RULES[cpu_quant_rules()])
        onnx.save(int8, str(path.with_name("ours.onnx")))
        values: dict[str, Any] = {}
        for variant in ("fp32", "ours"):
            peak, of_graph = peaks_mib(path.with_name(f"{variant}.onnx"), images.shape[-1])
            values[variant] = {"peak_mib": peak, "peak_of_graph_mib": of_graph}
    for figure in ("peak_mib", "peak_of_graph_mib"):
        values[f"{figure}_share"] = values["ours"][figure] / values["fp32"][figure]
    return values


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--subjects", nargs="+", help="or any student's name",
                        default=["sample_teacher", "vit_s16", "vit_b32", "hybrid"])  # fmt: skip
    parser.add_argument("--images", nargs="+", default=["scenes"], help="to calibrate and test on")
    parser.add_argument("--num-images", type=int, default=64, help="of each")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--memory", action="store_true", help="only how much they need")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    values: dict[str, Any] = {"rules": cpu_quant_rules()}
    for name in args.subjects:
        if args.memory:
            values[name] = memory(name, args.images, num_images=args.num_images)
            continue
        values[name] = bench(name, args.images, num_images=args.num_images, rounds=args.rounds)
    values["machine"] = machine_info()
    print(json.dumps(values, indent=None if args.json else 1))


if __name__ == "__main__":
    main()
