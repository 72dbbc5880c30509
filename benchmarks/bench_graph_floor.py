"""How much faster than a plain export could our graph be? Each kind of operator and its floor.

ONNX Runtime's own profile of our fp32 graph at batch 1, kind by kind. Products and convolutions
are compared with the best rate of a large product here; every other kind gets a floor: its bytes
at the rate of a copy of as many, or its arithmetic at the rate of products, exponentials at the
best rate of ONNX Runtime, torch and numpy, erf likewise, whichever is longer. Two threads halve a
floor, as if all of it could be shared. Beside the ratio over the plain export, taken in turn, it
says what the ratio would be if all but products ran at their floors, and if it took no time.
Each node counts with its fastest run: other work on the machine only ever adds. Calls on one
thread are timed by the processor's clock, which does not run while another process does. Where the
profile adds up to more than the fastest call, it was disturbed all the same: no shares are given.

    python benchmarks/bench_graph_floor.py --json | python benchmarks/record.py graph_floor
"""

from __future__ import annotations

import argparse
import functools
import json
import math
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnxruntime
import torch
from bench_plain_export import PRODUCTS, session_of, time_graphs
from onnx import TensorProto, helper, numpy_helper

from dimefm_edge.bench.prepare import export_plain
from dimefm_edge.data.scenes import scene_image
from dimefm_edge.encoders import Normalised
from dimefm_edge.export import export_onnx, graph_spec
from dimefm_edge.latency.measure import machine_info
from dimefm_edge.preprocess import preprocess_images
from dimefm_edge.teacher import load_teacher

MOST_PROFILED = 1.1  # of the fastest call
MODELS = ("ViT-S-16", "ViT-B-16", "ViT-B-32")
ELEMENTS = 2**15  # 128 KiB: in the second-level cache, with its answer
SIDE = 512  # of the large product
# Operations of one value, beside exp and erf; fewer than any kernel needs.
SIMPLE = {"Add": 1, "LayerNormalization": 7, "SkipLayerNormalization": 8, "BiasGelu": 5, "Gelu": 4}
MOVES_NOTHING = {"Reshape", "Shape", "Squeeze", "Unsqueeze", "Identity"}
SCORE_OPS = 4  # of one attention score: its maximum, the difference, the sum, the quotient


@dataclass(frozen=True)
class Rates:
    """What one thread of this machine does in a second."""

    product_flop: float
    exp: float
    erf: float

    def copy_bytes(self, total: int) -> float:
        """Bytes read and written together, of a copy that moves `total` of them."""
        return copy_rate(2 ** max(12, round(math.log2(max(total, 1)))))


def best_s(call: Callable[[], object], *, seconds: float = 0.6) -> float:
    """The shortest of many calls: other work on the machine only ever adds."""
    call()
    best, end = math.inf, time.perf_counter() + seconds
    while time.perf_counter() < end:
        begun = time.perf_counter()
        call()
        best = min(best, time.perf_counter() - begun)
    return best


@functools.cache
def copy_rate(total: int) -> float:
    source = np.ones(total // 8, np.float32)
    target = np.empty_like(source)
    repeats = max(1, 2**18 // total)

    def copy() -> None:
        for _ in range(repeats):
            np.copyto(target, source)

    return 2 * source.nbytes * repeats / best_s(copy, seconds=1)


def onnx_call(op_type: str, x: npt.NDArray[np.float32], weight: Any = None) -> Callable[[], Any]:
    """One operator of ONNX Runtime on one thread."""
    inputs = ["x"] if weight is None else ["x", "w"]
    graph = helper.make_graph(
        [helper.make_node(op_type, inputs, ["y"])], "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, x.shape)],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
        [] if weight is None else [numpy_helper.from_array(weight, "w")],
    )  # fmt: skip
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = 1, 3
    session = onnxruntime.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    return lambda: session.run(None, {"x": x})


def measure_rates() -> tuple[Rates, dict[str, float]]:
    """The best of what is installed here, and what each of them does, in billions a second."""
    torch.set_num_threads(1)
    rng = np.random.default_rng(0)
    x = rng.uniform(-3, 0, ELEMENTS).astype(np.float32)
    square = rng.normal(size=(SIDE, SIDE)).astype(np.float32)
    out, tensor, matrix = np.empty_like(x), torch.from_numpy(x), torch.from_numpy(square)
    flop = 2 * SIDE**3
    counts = {"exp": ELEMENTS, "erf": ELEMENTS, "product": flop}
    calls: dict[str, dict[str, Callable[[], Any]]] = {
        "exp": {"onnxruntime": onnx_call("Exp", x), "torch": lambda: torch.exp(tensor),
                "numpy": lambda: np.exp(x, out=out)},
        "erf": {"onnxruntime": onnx_call("Erf", x), "torch": lambda: torch.erf(tensor)},
        "product": {"onnxruntime": onnx_call("MatMul", square, square),
                    "torch": lambda: matrix @ matrix},
    }  # fmt: skip
    found = {
        f"{kind}_{library}": counts[kind] / best_s(call)
        for kind, named in calls.items()
        for library, call in named.items()
    }
    best = {k: max(v for n, v in found.items() if n.startswith(k)) for k in calls}
    rates = Rates(best["product"], best["exp"], best["erf"])
    shown = {f"{name}_g_per_s": rate / 1e9 for name, rate in found.items()}
    return rates, shown | {"copy_256_kib_gb_per_s": copy_rate(2**18) / 1e9}


def sample_ms(
    paths: Mapping[str, Path], images: npt.NDArray[np.float32], *, threads: int, seconds: float
) -> dict[str, npt.NDArray[np.float64]]:
    """Milliseconds of each graph in the same rounds, half of them loaded in each order."""
    if threads > 1:
        return time_graphs(paths, images, threads=threads, seconds=seconds)
    taken: dict[str, list[float]] = {kind: [] for kind in paths}
    for kinds in (list(paths), list(paths)[::-1]):
        calls = {}
        for kind in kinds:
            session = session_of(paths[kind], 1)
            feed = {session.get_inputs()[0].name: images}
            calls[kind] = lambda s=session, f=feed: s.run(None, f)
            calls[kind]()
        end = time.perf_counter() + seconds / 2
        while time.perf_counter() < end:
            kinds.reverse()
            for kind in kinds:
                begun = time.thread_time()
                calls[kind]()
                taken[kind].append(1000 * (time.thread_time() - begun))
    return {kind: np.array(ms) for kind, ms in taken.items()}


def profile(
    path: Path, batch: npt.NDArray[np.float32], threads: int, folder: Path, *, seconds: float
) -> list[Any]:
    """(operator, least us, the profiler's own arguments) of each node that ran."""
    session = session_of(path, threads, profile=folder / "profile")
    name = session.get_inputs()[0].name
    end = time.perf_counter() + seconds
    while time.perf_counter() < end:
        session.run(None, {name: batch})
    times: dict[str, list[float]] = defaultdict(list)
    arguments = {}
    for event in json.loads(Path(session.end_profiling()).read_text()):
        if event.get("cat") == "Node" and event["name"].endswith("kernel_time"):
            times[event["name"]].append(event["dur"])
            arguments[event["name"]] = event["args"]
    return [
        (arguments[node]["op_name"], min(taken), arguments[node]) for node, taken in times.items()
    ]


def shapes(entries: list[dict[str, list[int]]]) -> list[list[int]]:
    return [next(iter(entry.values())) for entry in entries if entry]


def product_flop(op: str, args: dict[str, Any]) -> float:
    """Of a MatMul, a Gemm or a convolution."""
    inputs, (out, *_) = shapes(args["input_type_shape"]), shapes(args["output_type_shape"])
    if "Conv" in op:  # each value out: the weights of one channel
        return 2 * math.prod(out) * math.prod(inputs[1][1:])
    return 2 * math.prod(out) * inputs[0][-1]


def floor_s(op: str, args: dict[str, Any], rates: Rates, num_heads: int) -> float:
    """The least that one thread can need for a node that is no product."""
    if op in MOVES_NOTHING:
        return 0.0
    size = sum(int(args[f"{kind}_size"]) for kind in ("activation", "parameter", "output"))
    (out, *_) = shapes(args["output_type_shape"])
    count = math.prod(out)
    arithmetic = SIMPLE.get(op, 0) * count / rates.product_flop
    if op in ("Gelu", "BiasGelu"):
        arithmetic += count / rates.erf
    if op == "MultiHeadAttention":
        queries, keys = (shape for shape in shapes(args["input_type_shape"])[:2])
        scores = queries[0] * num_heads * queries[1] * keys[1]
        flop = 4 * scores * queries[2] / num_heads + SCORE_OPS * scores
        arithmetic = flop / rates.product_flop + scores / rates.exp
    return max(size / rates.copy_bytes(size), arithmetic)


def summarise(nodes: list[Any], rates: Rates, threads: int, num_heads: int) -> dict[str, Any]:
    """Shares of the graph's time: products, the others, and the others' floors."""
    total = sum(us for _, us, _ in nodes) / 1e6
    product_s = sum(us for op, us, _ in nodes if op in PRODUCTS) / 1e6
    flop = sum(product_flop(op, args) for op, _, args in nodes if op in PRODUCTS)
    taken: dict[str, float] = defaultdict(float)
    floors: dict[str, float] = defaultdict(float)
    for op, us, args in nodes:
        if op not in PRODUCTS:
            taken[op] += us / 1e6 / total
            floors[op] += floor_s(op, args, rates, num_heads) / threads / total
    return {
        "product_share": product_s / total,
        "product_over_peak": flop / product_s / (rates.product_flop * threads),
        "others_share": sum(taken.values()),
        "others_floor_share": sum(floors.values()),
        "kinds": {
            op: {"share": share, "floor_share": floors[op]}
            for op, share in sorted(taken.items(), key=lambda item: -item[1])
            if share > 0.01
        },
    }


def with_ratios(found: dict[str, Any], ratio: float) -> dict[str, Any]:
    """What would be left of a ratio over the plain export."""
    products, floors = found["product_share"], found["others_floor_share"]
    at_peak = products * found["product_over_peak"]
    return found | {
        "ratio": ratio,
        "ratio_others_at_floor": ratio / (products + floors),
        "ratio_others_free": ratio / products,
        "ratio_all_at_floor": ratio / (at_peak + floors),
    }


def bench(name: str, rates: Rates, *, seconds: float, threads: tuple[int, ...]) -> dict[str, Any]:
    """One tower: exported both ways, timed in turn, ours profiled."""
    teacher = load_teacher(f"{name}:random", device="cpu")
    side = teacher.preprocess.image_size
    images = preprocess_images([scene_image(0)], teacher.preprocess)
    values: dict[str, Any] = {"name": name}
    with tempfile.TemporaryDirectory() as text:
        folder = Path(text)
        ours = export_onnx(
            Normalised(teacher.image_tower).eval(), folder / "ours.onnx", image_size=side,
            metadata={}, parity_images=images, spec=graph_spec(None),
        ).path  # fmt: skip
        paths = {"ours": ours, "plain": folder / "plain.onnx"}
        export_plain(teacher.image_tower, paths["plain"], side=side, opset=None)
        num_heads = next(
            attribute.i
            for node in onnx.load(ours).graph.node
            for attribute in node.attribute
            if attribute.name == "num_heads"
        )
        for count in threads:
            samples = sample_ms(paths, images, threads=count, seconds=seconds)
            nodes = profile(ours, images, count, folder, seconds=seconds / 2)
            best = {kind: float(ms.min()) for kind, ms in samples.items()}
            ratio = float(np.median(samples["plain"] / samples["ours"]))
            profiled = sum(us for _, us, _ in nodes) / 1000 / best["ours"]
            found = summarise(nodes, rates, count, num_heads) if profiled < MOST_PROFILED else {}
            values[f"threads_{count}"] = {
                "best_ms": best,
                "rounds": len(samples["ours"]),
                "ratio_of_best": best["plain"] / best["ours"],
                "profiled_over_best": profiled,
                **(with_ratios(found, ratio) if found else {"ratio": ratio}),
            }
    return values


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="*", default=MODELS)
    parser.add_argument("--threads", nargs="*", type=int, default=(1, 2))
    parser.add_argument("--seconds", type=float, default=20.0, help="of timed calls, for each")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    rates, shown = measure_rates()
    rows = [
        bench(name, rates, seconds=args.seconds, threads=tuple(args.threads))
        for name in args.models
    ]
    values = {"rates": shown, "models": rows, "machine": machine_info()}
    print(json.dumps(values, indent=None if args.json else 1))


if __name__ == "__main__":
    main()
