"""What NVIDIA's compiler makes of open_clip towers: kernels of a call, and attentions fused.

TensorRT for RTX compiles each graph for an Orin's stand-in (runtime/tensorrt_rtx.py), in each
precision: as we write it for TensorRT, with one projection for queries, keys and values, and with
three. Kernels are counted, not timed: no GPU is asked.

    python benchmarks/bench_dry_build.py --json | python benchmarks/record.py dry_build
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

from dimefm_edge.data.scenes import scene_image
from dimefm_edge.errors import ParityError
from dimefm_edge.export import export_student, graph_spec, image_tower
from dimefm_edge.latency.measure import machine_info
from dimefm_edge.preprocess import preprocess_images
from dimefm_edge.runtime import load_bundle
from dimefm_edge.runtime.tensorrt_rtx import dry_build
from dimefm_edge.targets import load_target
from dimefm_edge.teacher import load_teacher

MODELS = ("ViT-S-16", "ViT-B-32", "RN50", "MobileCLIP2-S0")
PRECISIONS = ("fp32", "fp16", "int8")
FORMS = ("packed", "decomposed")
TARGET = "jetson-orin"
IMAGES = 16


def bench(name: str, precision: str, form: str) -> dict[str, Any]:
    """One tower with random weights, exported and compiled."""
    teacher = load_teacher(f"{name}:random", device="cpu")
    images = preprocess_images([scene_image(i) for i in range(IMAGES)], teacher.preprocess)
    spec = graph_spec(load_target(TARGET), precision=precision, attention=form)
    with tempfile.TemporaryDirectory() as folder:
        try:
            bundle = export_student(
                image_tower(teacher), Path(folder) / "bundle", graph=spec,
                parity_images=images, logit_scale=teacher.logit_scale,
            )  # fmt: skip
        except ParityError:  # of random weights, some lose too much in int8
            return {"parity": "not reached"}
        built = dry_build(load_bundle(bundle))
    return {
        "compiler": built.compiler,
        "compiled_for": built.compiled_for,
        "kernels": built.num_kernels,
        "attentions": built.attention.expected,
        "attentions_fused": built.attention.fused,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="*", default=MODELS)
    parser.add_argument("--precisions", nargs="*", default=PRECISIONS)
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    values = {
        name: {
            precision: {form: bench(name, precision, form) for form in FORMS}
            for precision in args.precisions
        }
        for name in args.models
    } | {"machine": machine_info()}
    print(json.dumps(values, indent=None if args.json else 1))


if __name__ == "__main__":
    main()
