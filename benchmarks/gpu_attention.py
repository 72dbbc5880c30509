"""Everything about the kernels that needs a GPU: built, checked and timed in one go.

    PYTHONPATH=kernels python benchmarks/gpu_attention.py [--quick]

Needs torch, Triton and this checkout, nothing else of the project. Checks first: forward, packed,
int8 and backward against float64 on fresh random inputs, outputs in memory that held NaN, equal
bits when repeated. Then times in CUDA graphs, in turn: forward against torch's backends, int8
against fp16, the backward pass, a whole encoder. Writes gpu_attention.json to
$OUT (else here) after each shape, and prints a short table last. Exits with 1 if a check failed.

All of it takes longer than one loan of a machine: 338 variants to compile. In four minutes or so:

    for i in 0 1 2 3 4 5; do
      python benchmarks/gpu_attention.py --check-only --part $i/6 --out $OUT/check_$i.json &
    done; wait
    python benchmarks/gpu_attention.py --time-only --no-compile --out $OUT/time.json
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from bench_attention import (
    TOKENS,
    Shape,
    bench,
    floor_ms,
    measure_peaks,
    median_ms,
    plain_attention,
    vit_shapes,
)
from torch import Tensor, nn

from dimefm_kernels import (
    attention_qkv_reference,
    fused_attention_qkv,
    fused_attention_qkv_int8,
)
from dimefm_kernels.reference import int8_error_bound

CHECKED_TOKENS = (17, 49, 50, 65, 197, 257, 577)
CHECKED_DIMS = (32, 64, 96, 128)
# Of the output; its gradients, relative to the largest, may be off by three times that.
TOLERANCES = {torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}
INT8_STEPS = (0.02, 0.03, 0.01)
Keep = Callable[[dict[str, Any]], None]
"""Called with what is known so far, after each shape."""
LARGE_BATCHES = (256, 1024)
"""Beyond an H200's 60 MB of L2 cache from 256 on: where int8's fewer bytes should count."""


def checked_shapes() -> list[Shape]:
    """Awkward shapes with odd batches: every tail of every tile size; a GPU that is full.

    With 804 heads Hopper's tiles of 128 queries are taken, and a program goes through several
    heads: of 15, each has one to itself.
    """
    full = [Shape(f"full_n{tokens}", 67, tokens, 12) for tokens in TOKENS.values()]
    return full + [
        Shape(f"n{tokens}_d{dim}", 5, tokens, 3, dim)
        for tokens in CHECKED_TOKENS
        for dim in CHECKED_DIMS
    ]


def poison(count: int, device: str) -> None:
    """Leave NaN in the memory that the next outputs will get."""
    for dtype in (torch.float16, torch.float32):
        blocks = [torch.full((count,), torch.nan, dtype=dtype, device=device) for _ in range(4)]
        del blocks


def float_errors(shape: Shape, dtype: torch.dtype, device: str) -> dict[str, float]:
    """Largest errors against float64 over what rounding allows: at most 1 is right."""
    qkv = shape.random_qkv(device, dtype).requires_grad_()
    exact = qkv.detach().double().requires_grad_()
    expected = attention_qkv_reference(exact, shape.num_heads)
    weights = torch.randn_like(expected).to(dtype)
    expected.backward(weights.double())
    poison(3 * qkv.numel(), device)
    out = fused_attention_qkv(qkv, shape.num_heads)
    (grad,) = torch.autograd.grad(out, qkv, weights)
    poison(3 * qkv.numel(), device)
    (again,) = torch.autograd.grad(fused_attention_qkv(qkv, shape.num_heads), qkv, weights)
    allowed = TOLERANCES[dtype]
    largest = exact.grad.abs().max()
    return {
        "out": worst((out.double() - expected) / allowed),
        "grad": worst((grad.double() - exact.grad) / (3 * allowed * largest)),
        "repeat": 0.0 if torch.equal(grad, again) else 2.0,
    }


def int8_errors(shape: Shape, device: str) -> dict[str, float]:
    """As float_errors, of the int8 op with half and with int8 outputs."""
    width = 3 * shape.num_heads * shape.head_dim
    qkv = torch.randint(
        -127, 128, (shape.batch, shape.num_tokens, width), dtype=torch.int8, device=device
    )
    steps = torch.tensor(INT8_STEPS, dtype=torch.float64, device=device).view(3, 1)
    exact = (qkv.double().view(*qkv.shape[:2], 3, -1) * steps).flatten(2)
    expected = attention_qkv_reference(exact, shape.num_heads)
    bound = int8_error_bound(
        qkv, shape.num_heads, qkv_scales=INT8_STEPS, scale=shape.head_dim**-0.5
    )
    out_step = expected.abs().max().item() / 100
    poison(qkv.numel(), device)
    half = fused_attention_qkv_int8(qkv, shape.num_heads, qkv_scales=INT8_STEPS)
    whole = fused_attention_qkv_int8(
        qkv, shape.num_heads, qkv_scales=INT8_STEPS, out_scale=out_step
    )
    return {
        "half": worst((half.double() - expected) / (bound + expected.abs() * 2**-10 + 1e-6)),
        "int8": worst((whole.double() * out_step - expected) / (bound + 0.501 * out_step)),
    }


def worst(ratio: Tensor) -> float:
    """The largest absolute value; infinite if one is NaN."""
    return float(ratio.detach().abs().nan_to_num(torch.inf).max())


def check(
    shapes: list[Shape], device: str, keep: Keep = lambda _: None
) -> dict[str, dict[str, float]]:
    """Every shape in every dtype; errors as shares of what is allowed."""
    found: dict[str, dict[str, float]] = {}
    for shape in shapes:
        for dtype in TOLERANCES:
            if dtype is torch.float32 and shape.batch > 5:
                continue  # as on a GPU that is not full, by the same tiles
            name = f"{shape.name}_{str(dtype).removeprefix('torch.')}"
            found[name] = float_errors(shape, dtype, device)
        found[f"{shape.name}_int8"] = int8_errors(shape, device)
        keep(found)
    return found


def time_int8(shapes: list[Shape], device: str, keep: Keep) -> dict[str, Any]:
    """int8 against our own fp16, with the floor of int8's bytes."""
    peaks = measure_peaks(device, torch.float16, size=8192)
    values = {}
    for shape in shapes:
        half = shape.random_qkv(device, torch.float16)
        int8 = (half.clamp(-3, 3) * 40).to(torch.int8)
        heads = shape.num_heads
        times = median_ms(
            {
                "fp16": lambda half=half, h=heads: fused_attention_qkv(half, h),
                "int8": lambda int8=int8, h=heads: fused_attention_qkv_int8(
                    int8, h, qkv_scales=INT8_STEPS, out_scale=0.01
                ),
            },
            device,
        )
        values[shape.name] = {
            "ms": times, "int8_over_fp16": times["fp16"] / times["int8"],
            "floor_ms": floor_ms(shape, peaks, 1),
        }  # fmt: skip
        keep(values)
    return values


def time_backward(shapes: list[Shape], device: str, keep: Keep) -> dict[str, Any]:
    """Forward and backward together, as training has them; by events around twenty calls."""
    values = {}
    for shape in shapes:
        qkv = shape.random_qkv(device, torch.float16).requires_grad_()
        times = {}
        for name, attend in (("fused", fused_attention_qkv), ("sdpa", plain_attention)):
            grad = torch.randn_like(attend(qkv, shape.num_heads))
            times[name] = _training_ms(attend, qkv, shape.num_heads, grad)
        values[shape.name] = {"ms": times, "speed_over_sdpa": times["sdpa"] / times["fused"]}
        keep(values)
    return values


def _training_ms(attend: Any, qkv: Tensor, num_heads: int, grad: Tensor) -> float:
    samples = []
    for _ in range(13):
        first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        first.record()
        for _ in range(20):
            torch.autograd.grad(attend(qkv, num_heads), qkv, grad)
        last.record()
        last.synchronize()
        samples.append(first.elapsed_time(last) / 20)
    return sorted(samples[3:])[5]


class Block(nn.Module):
    """A transformer layer as in a ViT, with the attention it is given."""

    def __init__(self, num_heads: int, attend: Any) -> None:
        super().__init__()
        width = 64 * num_heads
        self.num_heads, self.attend = num_heads, attend
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(
            nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)
        )

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.proj(self.attend(self.qkv(self.norm1(x)), self.num_heads))
        return x + self.mlp(self.norm2(x))


def time_encoders(
    shapes: list[Shape], device: str, keep: Keep, *, compiled: bool
) -> dict[str, Any]:
    """Twelve layers, with the op and with torch's attention; both compiled too, if asked."""
    values = {}
    for shape in shapes:
        x = torch.randn(shape.batch, shape.num_tokens, 64 * shape.num_heads, device=device).half()
        calls = {}
        for name, attend in (("fused", fused_attention_qkv), ("sdpa", plain_attention)):
            blocks = [Block(shape.num_heads, attend) for _ in range(12)]
            encoder = nn.Sequential(*blocks).to(device).half().eval()
            calls[name] = lambda encoder=encoder, x=x: encoder(x)
            if compiled:
                # With a batch that may be any, the op cannot choose its tiles by it.
                fast = torch.compile(encoder, dynamic=False)
                calls[f"{name}_compiled"] = lambda fast=fast, x=x: fast(x)
        times = median_ms(calls, device, rounds=10)
        row = {"ms": times, "speed_over_sdpa": times["sdpa"] / times["fused"]}
        if compiled:
            row["compiled_speed_over_sdpa"] = times["sdpa_compiled"] / times["fused_compiled"]
        values[shape.name] = row
        keep(values)
        torch._dynamo.reset()  # its limit of compilations is of all encoders together
    return values


def table(values: dict[str, Any]) -> str:
    """One line a shape, and the verdict of the checks."""
    lines = [f"{'shape':<16}{'fused us':>9}{'best sdpa':>10}{'x':>7}{'floor us':>9}{'int8 x':>8}"]
    for name, row in values["forward"].items():
        if not isinstance(row, dict) or "ms" not in row:
            continue
        fused, ratio = 1000 * row["ms"]["fused"], row["speed_over_best_sdpa"]
        int8 = values["int8"].get(name, {}).get("int8_over_fp16", float("nan"))
        floor = 1000 * row["floor_ms"]
        numbers = f"{fused:9.1f}{ratio * fused:10.1f}{ratio:7.2f}{floor:9.1f}{int8:8.2f}"
        lines.append(f"{name:<16}{numbers}")
    for name, row in values["int8"].items():
        if name not in values["forward"]:
            us, floor = 1000 * row["ms"]["int8"], 1000 * row["floor_ms"]
            lines.append(f"int8 {name:<16} {us:.1f} us, floor {floor:.1f}, "
                         f"{row['int8_over_fp16']:.2f} x fp16")  # fmt: skip
    for name, row in values["backward"].items():
        lines.append(f"training {name:<16} {row['speed_over_sdpa']:.2f} x sdpa")
    for name, row in values["encoders"].items():
        compiled = row.get("compiled_speed_over_sdpa")
        more = "" if compiled is None else f", compiled {compiled:.2f} x"
        lines.append(f"encoder {name:<16} {row['speed_over_sdpa']:.2f} x sdpa{more}")
    wrong = [name for name, errors in values["checks"].items() if max(errors.values()) > 1]
    verdict = f"WRONG: {', '.join(wrong)}" if wrong else f"all {len(values['checks'])} are right"
    return "\n".join([*lines, f"checks against float64: {verdict}"])


def parse(words: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="fewer shapes: a few minutes")
    parser.add_argument("--check-only", action="store_true", help="time nothing")
    parser.add_argument("--time-only", action="store_true", help="check nothing")
    parser.add_argument("--no-compile", action="store_true", help="leave torch.compile out")
    parser.add_argument("--part", default="0/1", help="I/N: every Nth check from the Ith on")
    out = Path(os.environ.get("OUT", "."))
    parser.add_argument("--out", type=Path, default=out / "gpu_attention.json")
    return parser.parse_args(words)


def main() -> None:
    args = parse()
    if not torch.cuda.is_available():
        sys.exit("gpu_attention.py needs a CUDA device; bench_attention.py runs without one")
    import triton

    part, parts = map(int, args.part.split("/"))
    compiled = not args.no_compile
    torch.manual_seed(int.from_bytes(os.urandom(4), "little"))
    timed = [s for s in vit_shapes() if not args.quick or s.model.startswith("ViT-B")]
    few = [shape for shape in timed if shape.model in ("ViT-S/16", "ViT-B/16")]
    large = [shape for shape in vit_shapes(LARGE_BATCHES) if shape.model.startswith("ViT-B")]
    values: dict[str, Any] = {
        "device": torch.cuda.get_device_name(),
        "versions": f"python {platform.python_version()}, torch {torch.__version__}, "
        f"triton {triton.__version__}",
        "checks": {}, "forward": {}, "int8": {}, "backward": {}, "encoders": {},
    }  # fmt: skip

    def keeper(name: str) -> Keep:
        """Writes what is known so far: the machine may be gone before the end."""

        def keep(found: dict[str, Any]) -> None:
            values[name] = found
            args.out.write_text(json.dumps(values, indent=1) + "\n")

        return keep

    if not args.time_only:
        check(checked_shapes()[part::parts], "cuda", keeper("checks"))
    if not args.check_only:
        # Not compiled: 27 compilations of which no figure is reported.
        bench(timed, "cuda", torch.float16, rounds=30, compiled=False, keep=keeper("forward"))
        time_int8([*timed, *large], "cuda", keeper("int8"))
        time_backward(few, "cuda", keeper("backward"))
        time_encoders(few, "cuda", keeper("encoders"), compiled=compiled)
    print(values["device"], values["versions"], args.out, sep="\n")
    print(table(values))
    sys.exit(any(max(errors.values()) > 1 for errors in values["checks"].values()))


if __name__ == "__main__":
    main()
