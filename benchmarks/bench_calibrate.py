"""What are estimates for `local` worth after `calibrate`, on models that it never saw?

Measures the models that `calibrate` measures and 40 others, of timm and of our students, in one
run, in turn, fp32 and int8; fits on the first and predicts the others.

    python benchmarks/bench_calibrate.py --json | python benchmarks/record.py calibrate_unseen

--keep FILE saves costs and times, --use FILE takes them: for trying other fits.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from dimefm_edge.latency.calibrate import (
    MODELS,
    PRECISIONS,
    export_models,
    fit_profile,
    measure_graphs,
    prior,
)
from dimefm_edge.latency.measure import machine_info

UNSEEN = (
    ("timm:resnet34", 160), ("timm:resnet14t", 176), ("timm:resnet10t", 176),
    ("timm:seresnet18", 224), ("timm:mobilenetv2_050", 224), ("timm:mobilenetv2_140", 192),
    ("timm:mobilenetv4_conv_small", 224), ("timm:mobilenetv4_conv_medium", 192),
    ("timm:efficientnet_b0", 192), ("timm:tinynet_c", 184), ("timm:mnasnet_100", 224),
    ("timm:fbnetc_100", 192), ("timm:regnetx_002", 224), ("timm:regnety_008", 160),
    ("timm:convnext_femto", 192), ("timm:convnextv2_atto", 160), ("timm:densenetblur121d", 96),
    ("timm:mobilevitv2_050", 192), ("timm:levit_192", 224), ("timm:fastvit_t12", 160),
    ("timm:repvit_m1", 192), ("timm:edgenext_xx_small", 256), ("timm:ghostnetv2_100", 192),
    ("timm:dla34", 160), ("timm:vgg11", 96), ("timm:cspresnet50", 128),
    ("timm:deit_tiny_patch16_224", 224), ("timm:vit_tiny_r_s16_p8_224", 224),
    ("timm:mixer_b32_224", 224), ("timm:efficientvit_b0", 224), ("timm:poolformer_s12", 160),
    ("timm:hardcorenas_a", 224),
    ("vit-p8-w192-d3", 64), ("vit-p16-w256-d8", 160), ("vit-p16-w384-d12", 128),
    ("vit-p32-w768-d6", 224), ("vit-p14-w128-d10", 140), ("hybrid-w24-d1.1.2.1", 96),
    ("hybrid-w40-d2.2.2.2", 192), ("hybrid-w56-d1.2.4.1", 160),
)  # fmt: skip
"""None is in `calibrate.MODELS`."""


def measure() -> dict[str, Any]:
    """Costs by model, times by precision and model, and what could not be run."""
    costs: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        graphs, skipped = export_models(
            (*MODELS, *UNSEEN), PRECISIONS, Path(folder), costs,
            lambda what: print(what, file=sys.stderr),
        )  # fmt: skip
        times = measure_graphs(graphs)
    return {
        "costs": {name: cost.tolist() for name, cost in costs.items()},
        "times": {p: {n: t for (n, kind), t in times.items() if kind == p} for p in PRECISIONS},
        "skipped": dict(skipped),
    }


def judge(found: dict[str, Any]) -> dict[str, Any]:
    """Errors on the models that the fit never saw."""
    known = {f"{model}@{size}" for model, size in MODELS}
    answer: dict[str, Any] = {"skipped": len(found["skipped"]), "machine": machine_info()}
    answer["load_average"] = answer["machine"]["load_1min"]
    start = None
    for precision in PRECISIONS:
        times, costs = found["times"][precision], found["costs"]
        seen = [name for name in times if name in known]
        rest = [name for name in times if name not in known]
        profile, _ = fit_profile(
            np.array([costs[n] for n in seen]), np.array([times[n] for n in seen]),
            prior=prior(precision) if start is None else start, precision=precision,
        )  # fmt: skip
        start = profile.log_prices
        truth = np.array([times[n] for n in rest])
        ratio = np.array([costs[n] for n in rest]) @ np.exp(profile.log_prices) / truth
        off = abs(ratio - 1)
        answer[precision] = {
            "models": len(rest),
            "median_error_pct": 100 * float(np.median(off)),
            "p90_error_pct": 100 * float(np.quantile(off, 0.9)),
            "inside_80pct": float(np.mean(abs(np.log(ratio)) <= profile.spread)),
            "left_out_median_error_pct": 100 * profile.median_error,
        }
        for place in np.argsort(-off)[:8]:
            print(f"{precision} {rest[place]} {truth[place]:.2f} ms, {ratio[place]:.2f} of it",
                  file=sys.stderr)  # fmt: skip
    return answer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--keep", type=Path)
    parser.add_argument("--use", type=Path)
    args = parser.parse_args()
    found = json.loads(args.use.read_text()) if args.use else measure()
    if args.keep:
        args.keep.write_text(json.dumps(found))
    print(json.dumps(judge(found), indent=None if args.json else 1))


if __name__ == "__main__":
    main()
