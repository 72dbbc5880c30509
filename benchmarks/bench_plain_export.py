"""Our graph of an open_clip image tower against the plain ones: same weights, one run, in turn.

The plain exports are what a user gets: `torch.onnx.export` of the tower as it is, at the newest
opset that ONNX Runtime fuses and at torch's default, and optimum's where it is installed (of
transformers' CLIP with the same weights, ViT-B-32 and ViT-B-16). Each graph is run in ONNX
Runtime; the ratio is the median over rounds of plain over ours. The floor: of our graph's time,
the share of matrix products and convolutions by ONNX Runtime's own profile. If all else took
no time, the graph would be 1 / share faster and no more; the plain one's share likewise.

    python benchmarks/bench_plain_export.py --json | python benchmarks/record.py plain_export

One model within a minute, most of which is spent on exporting:

    python benchmarks/bench_plain_export.py --models RN50 --against plain --seconds 5 --threads 2
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnxruntime
import torch

from dimefm_edge.bench.prepare import export_plain
from dimefm_edge.data.scenes import scene_image
from dimefm_edge.encoders import Normalised
from dimefm_edge.export import export_onnx, graph_spec
from dimefm_edge.latency.measure import machine_info, sample_interleaved
from dimefm_edge.preprocess import preprocess_images
from dimefm_edge.teacher import load_teacher

MODELS = ("ViT-S-16", "ViT-B-16", "ViT-B-32", "RN50", "MobileCLIP2-S0")
PLAIN_OPSETS = {"plain": None, "plain_opset20": 20}
AGAINST = (*PLAIN_OPSETS, "optimum")
PRODUCTS = {"MatMul", "Gemm", "Conv", "FusedMatMul", "FusedConv", "FusedGemm"}
ATTENTIONS = {"MultiHeadAttention", "Attention"}


def export_optimum(name: str, tower: Any, folder: Path) -> Path | None:
    """optimum's export of transformers' CLIP with the tower's weights; None without optimum."""
    try:
        from optimum.exporters.onnx import export
        from optimum.exporters.onnx.model_configs import CLIPVisionModelOnnxConfig
        from transformers import CLIPVisionConfig, CLIPVisionModel
    except ImportError:
        return None
    if name not in ("ViT-B-16", "ViT-B-32"):
        return None
    patch = int(name.rsplit("-", 1)[1])
    config = CLIPVisionConfig(patch_size=patch, hidden_act="gelu")
    model = CLIPVisionModel(config).eval()  # without the projection: 0.4 of 17,500 MMACs
    model.load_state_dict(_as_transformers(tower.state_dict()), strict=False)
    x = torch.randn(1, 3, 224, 224)
    with torch.no_grad():
        found, expected = model(x).pooler_output @ tower.proj, tower(x)
    assert torch.allclose(found, expected, atol=1e-4), "the weights were not carried over"
    path = folder / "optimum.onnx"
    export(model, CLIPVisionModelOnnxConfig(config), path, opset=18)
    return path


def _as_transformers(state: dict[str, Any]) -> dict[str, Any]:
    """open_clip's names to transformers'."""
    weights = {}
    renames = (
        ("transformer.resblocks.", "encoder.layers."), ("ln_1", "layer_norm1"),
        ("ln_2", "layer_norm2"), ("attn.out_proj", "self_attn.out_proj"),
        ("mlp.c_fc", "mlp.fc1"), ("mlp.c_proj", "mlp.fc2"), ("ln_pre", "pre_layrnorm"),
        ("ln_post", "post_layernorm"), ("class_embedding", "embeddings.class_embedding"),
        ("positional_embedding", "embeddings.position_embedding.weight"),
        ("conv1", "embeddings.patch_embedding"),
    )  # fmt: skip
    for key, value in state.items():
        for old, new in renames:
            key = key.replace(old, new)
        if "attn.in_proj_" in key:
            kind = key.rsplit("_", 1)[1]
            for part, piece in zip("qkv", value.chunk(3), strict=True):
                name = key.replace(f"attn.in_proj_{kind}", f"self_attn.{part}_proj.{kind}")
                weights["vision_model." + name] = piece
            continue
        weights["vision_model." + key] = value
    return weights


def session_of(path: Path, threads: int, *, profile: Path | None = None) -> Any:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3
    if profile is not None:
        options.enable_profiling = True
        options.profile_file_prefix = str(profile)
    return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def profile_of(path: Path, batch: npt.NDArray[np.float32], folder: Path) -> dict[str, Any]:
    """Share of each kind of kernel in the time of a graph, on one thread; and how many fused."""
    session = session_of(path, 1, profile=folder / "profile")
    name = session.get_inputs()[0].name
    for _ in range(6):
        session.run(None, {name: batch})
    events = json.loads(Path(session.end_profiling()).read_text())
    time_us: Counter[str] = Counter()
    runs: Counter[str] = Counter()
    for event in events:
        if event.get("cat") == "Node" and event["name"].endswith("kernel_time"):
            time_us[event["args"]["op_name"]] += event["dur"]
            runs[event["args"]["op_name"]] += 1
    total = sum(time_us.values())
    return {
        "product_share": sum(time_us[op] for op in PRODUCTS) / total,
        "attention_nodes_run": sum(runs[op] for op in ATTENTIONS) // 6,
        "kernels_run": sum(runs.values()) // 6,
    }


def bench(
    name: str, *, batch_size: int, threads: int, seconds: float, against: Sequence[str] = AGAINST
) -> dict[str, Any]:
    """Export one tower in every way, then time the graphs in turn."""
    teacher = load_teacher(f"{name}:random", device="cpu")
    tower, side = teacher.image_tower, teacher.preprocess.image_size
    images = preprocess_images([scene_image(i) for i in range(batch_size)], teacher.preprocess)
    with tempfile.TemporaryDirectory() as text:
        folder = Path(text)
        ours = export_onnx(
            Normalised(tower).eval(), folder / "ours.onnx", image_size=side, metadata={},
            parity_images=images, spec=graph_spec(None),
        )  # fmt: skip
        paths = {"ours": ours.path}
        for kind in (kind for kind in PLAIN_OPSETS if kind in against):
            paths[kind] = folder / f"{kind}.onnx"
            export_plain(tower, paths[kind], side=side, opset=PLAIN_OPSETS[kind])
        optimum = export_optimum(name, tower, folder) if "optimum" in against else None
        if optimum is not None:
            paths["optimum"] = optimum
        samples = time_graphs(paths, images, threads=threads, seconds=seconds)
        return {
            "name": name,
            "fusion": str(ours.fusion),
            "max_abs_diff": ours.parity.max_abs_diff,
            "p50_ms": {kind: float(np.median(times)) for kind, times in samples.items()},
            "ratio": {
                kind: float(np.median(times / samples["ours"]))
                for kind, times in samples.items()
                if kind != "ours"
            },
            "rounds": len(samples["ours"]),
            "profile": {kind: profile_of(path, images, folder) for kind, path in paths.items()},
        }


def time_graphs(
    paths: Mapping[str, Path], images: npt.NDArray[np.float32], *, threads: int, seconds: float
) -> dict[str, npt.NDArray[np.float64]]:
    """Milliseconds of each graph, taken in the same rounds, half of them loaded in each order.

    A copy of a graph, loaded third in a process, ran 1.075 times as fast as the same graph loaded
    first (ViT-B/32, one thread): where weights come to lie in memory is chance, and order.
    """
    halves = []
    for kinds in (list(paths), list(paths)[::-1]):
        calls = {}
        for kind in kinds:
            session = session_of(paths[kind], threads)
            feed = {session.get_inputs()[0].name: images}
            calls[kind] = lambda s=session, f=feed: s.run(None, f)
        _, samples = sample_interleaved(calls, min_runs=15, max_seconds=seconds / 2)
        halves.append(samples)
    return {kind: np.concatenate([half[kind] for half in halves]) for kind in paths}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="*", default=MODELS)
    parser.add_argument("--against", nargs="*", choices=AGAINST, default=AGAINST)
    parser.add_argument("--batch-size", type=int, default=1)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=20.0, help="of timed calls, for each")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    how = {"batch_size": args.batch_size, "threads": args.threads, "seconds": args.seconds}
    rows = [bench(name, against=args.against, **how) for name in args.models]
    values = {
        "batch_size": args.batch_size, "threads": args.threads, "models": rows,
        "machine": machine_info(),
    }  # fmt: skip
    print(json.dumps(values, indent=None if args.json else 1))


if __name__ == "__main__":
    main()
