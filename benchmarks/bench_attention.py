"""Is fused attention faster than torch's, and how near to what the machine can do?

Every subject goes from the packed qkv projection (B, N, 3 * H * D) to what the output projection
takes, (B, N, H * D), on the shapes of ViT-Ti, -S and -B at 32, 16 and 14 px patches. Medians of
calls made in turn. The floor: 4 B H N^2 D operations at the rate of a large product, or the bytes
of qkv and output at the rate of a large copy, whichever is longer, both measured here. On a CPU
the op is torch's own attention and ONNX Runtime's MultiHeadAttention is timed beside it.

    python benchmarks/bench_attention.py --json | python benchmarks/record.py attention
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from dimefm_kernels import fused_attention_qkv
from dimefm_kernels.attention import split_qkv

HEADS = {"Ti": 3, "S": 6, "B": 12}
TOKENS = {32: 50, 16: 197, 14: 257}  # of 224 px and the class token
HEAD_DIM = 64
BATCHES = (1, 8, 64)
BACKENDS = {
    "flash": SDPBackend.FLASH_ATTENTION, "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION, "math": SDPBackend.MATH,
}  # fmt: skip
Call = Callable[[], object]


@dataclass(frozen=True)
class Shape:
    """One attention layer of a model."""

    model: str
    batch: int
    num_tokens: int
    num_heads: int
    head_dim: int = HEAD_DIM

    @property
    def name(self) -> str:
        return f"{self.model}_b{self.batch}"

    @property
    def flop(self) -> int:
        """Of the two products."""
        return 4 * self.batch * self.num_heads * self.num_tokens**2 * self.head_dim

    def bytes_moved(self, itemsize: int, out_itemsize: int | None = None) -> int:
        """qkv read once, the output written once."""
        values = self.batch * self.num_tokens * self.num_heads * self.head_dim
        return values * (3 * itemsize + (out_itemsize or itemsize))

    def random_qkv(self, device: str, dtype: torch.dtype) -> Tensor:
        width = 3 * self.num_heads * self.head_dim
        return torch.randn(self.batch, self.num_tokens, width, device=device).to(dtype)


def vit_shapes(batches: Iterable[int] = BATCHES) -> list[Shape]:
    """ViT-Ti/32 to ViT-B/14 at each batch size."""
    return [
        Shape(f"ViT-{size}/{patch}", batch, tokens, heads)
        for size, heads in HEADS.items()
        for patch, tokens in TOKENS.items()
        for batch in batches
    ]


def floor_ms(shape: Shape, peaks: dict[str, float], itemsize: int) -> float:
    """The longer of its operations and its bytes at the machine's measured rates."""
    compute = shape.flop / peaks["tflops"] / 1e9
    memory = shape.bytes_moved(itemsize) / peaks["gbs"] / 1e6
    return max(compute, memory)


def plain_attention(qkv: Tensor, num_heads: int) -> Tensor:
    """What a model without the op does: split, torch's attention, join."""
    q, k, v = split_qkv(qkv, num_heads)
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(*qkv.shape[:2], -1)


def subjects(qkv: Tensor, num_heads: int, *, compiled: bool) -> dict[str, Call]:
    """Calls by name; SDPA backends that refuse the shape are left out."""
    calls: dict[str, Call] = {"fused": lambda: fused_attention_qkv(qkv, num_heads)}
    for name, backend in BACKENDS.items():

        def call(backend: SDPBackend = backend) -> Tensor:
            with sdpa_kernel(backend):
                return plain_attention(qkv, num_heads)

        try:
            call()
        except RuntimeError:
            continue
        calls[f"sdpa_{name}"] = call
    if compiled:
        compiled_plain = torch.compile(plain_attention)
        calls["compiled"] = lambda: compiled_plain(qkv, num_heads)
    if not qkv.is_cuda and qkv.dtype is torch.float32:
        calls["onnxruntime"] = onnxruntime_attention(qkv, num_heads)
    return calls


def onnxruntime_attention(qkv: Tensor, num_heads: int) -> Call:
    """ONNX Runtime's fused MultiHeadAttention on the same threads."""
    import onnxruntime
    from onnx import TensorProto, checker, helper

    shape = ["B", "N", qkv.shape[2]]
    width = qkv.shape[2] // 3
    float_info = helper.make_tensor_value_info
    graph = helper.make_graph(
        [
            helper.make_node("Split", ["qkv"], ["q", "k", "v"], axis=2, num_outputs=3),
            helper.make_node("MultiHeadAttention", ["q", "k", "v"], ["out"],
                             domain="com.microsoft", num_heads=num_heads),
        ],
        "attention",
        [float_info("qkv", TensorProto.FLOAT, shape)],
        [float_info("out", TensorProto.FLOAT, ["B", "N", width])],
    )  # fmt: skip
    opsets = [helper.make_opsetid("", 18), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=9)
    checker.check_model(model)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    array = qkv.numpy()
    return lambda: session.run(None, {"qkv": array})[0]


def measure_peaks(device: str, dtype: torch.dtype, *, size: int) -> dict[str, float]:
    """TFLOP/s of a square product and GB/s of a copy, bytes read and written."""
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    source = torch.randn(size * size * 4, device=device)
    target = torch.empty_like(source)
    # A kernel, no copy_: in a graph that is a memcpy node, which an H200's fp16 attention outran.
    copy = {"copy": lambda: torch.neg(source, out=target)}
    times = median_ms({"product": lambda: a @ b, **copy}, device)
    return {
        "tflops": 2 * size**3 / times["product"] / 1e9,
        "gbs": 2 * source.numel() * 4 / times["copy"] / 1e6,
    }


def median_ms(calls: dict[str, Call], device: str, *, rounds: int = 30) -> dict[str, float]:
    """Of each call, in turn: on a GPU by events around a batch of calls, else by the clock."""
    is_cuda = device == "cuda"
    timers = {name: _cuda_timer(call) if is_cuda else _timer(call) for name, call in calls.items()}
    times: dict[str, list[float]] = {name: [] for name in calls}
    with torch.inference_mode():
        for index in range(rounds + 3):
            for name, timer in timers.items():
                value = timer()
                if index >= 3:  # the first rounds warm up
                    times[name].append(value)
    return {name: statistics.median(values) for name, values in times.items()}


def _timer(call: Call) -> Callable[[], float]:
    def timer() -> float:
        begun = time.perf_counter()
        call()
        return 1000 * (time.perf_counter() - begun)

    return timer


def _cuda_timer(call: Call, repeats: int = 20) -> Callable[[], float]:
    """Milliseconds of one call in a CUDA graph of twenty: without the cost of launching."""
    with torch.inference_mode():
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):
                call()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for _ in range(repeats):
                call()

    def timer() -> float:
        first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        first.record()
        graph.replay()
        last.record()
        last.synchronize()
        return float(first.elapsed_time(last)) / repeats

    return timer


def bench(
    shapes: Iterable[Shape], device: str, dtype: torch.dtype, *, rounds: int, compiled: bool,
    keep: Callable[[dict[str, Any]], None] = lambda _: None,
) -> dict[str, Any]:  # fmt: skip
    """Every shape's medians, its floor, and the op against the best of torch; `keep` after each."""
    peaks = measure_peaks(device, dtype, size=8192 if device == "cuda" else 1024)
    values: dict[str, Any] = {"peaks": peaks, "dtype": str(dtype).removeprefix("torch.")}
    for shape in shapes:
        qkv = shape.random_qkv(device, dtype)
        calls = subjects(qkv, shape.num_heads, compiled=compiled)
        times = median_ms(calls, device, rounds=rounds)
        best = min(ms for name, ms in times.items() if name.startswith("sdpa_"))
        floor = floor_ms(shape, peaks, qkv.element_size())
        row = {"ms": times, "floor_ms": floor, "floor_share": floor / times["fused"]}
        row["speed_over_best_sdpa"] = best / times["fused"]
        if "onnxruntime" in times:
            row["speed_over_onnxruntime"] = times["onnxruntime"] / times["fused"]
        values[shape.name] = row
        keep(values)
    return values


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    is_cuda = torch.cuda.is_available()
    parser.add_argument("--device", default="cuda" if is_cuda else "cpu")
    parser.add_argument("--dtype", default="float16" if is_cuda else "float32")
    parser.add_argument("--batch", type=int, nargs="+", default=list(BATCHES))
    parser.add_argument("--threads", type=int, default=0, help="of the CPU; 0 leaves torch's")
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--no-compile", action="store_true", help="without torch.compile")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    values = bench(
        vit_shapes(args.batch), args.device, getattr(torch, args.dtype),
        rounds=args.rounds, compiled=not args.no_compile,
    )  # fmt: skip
    values["threads"] = torch.get_num_threads()
    print(json.dumps(values, indent=None if args.json else 1))


if __name__ == "__main__":
    main()
