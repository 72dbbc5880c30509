"""Compile the kernels for a GPU that is not here: PTX and cubin, and what they cost on it.

    python -m dimefm_kernels.ahead_of_time --sm 87 --out kernels-orin --json

Needs Triton, which brings its own ptxas, but no GPU. One file for each shape of a vision
transformer, since its sizes are compiled in. ptxas counts registers, shared memory and what it
spilled to memory, for the very file that is written.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dimefm_kernels.tiles import (
    SHARED_KIB,
    Tiles,
    backward_tiles,
    forward_tiles,
    whole_key_tiles,
)

if TYPE_CHECKING:
    from triton.compiler import CompiledKernel

ITEMSIZE = {"fp32": 4, "fp16": 2, "bf16": 2, "int8": 1}
_TRITON_TYPES = {"fp32": "fp32", "fp16": "fp16", "bf16": "bf16", "int8": "i8"}
_LOG2_E = 1.4426950408889634
# JetPack 6's driver is CUDA 12.6's, which reads PTX 8.5 at most (PTX ISA, "Release Notes").
_PTX_VERSION = {87: 85}


@dataclass(frozen=True)
class KernelSpec:
    """One kernel to compile: the shape of a model's attention, and its precision."""

    num_tokens: int
    head_dim: int
    num_heads: int
    precision: str
    """fp32, fp16, bf16 or int8."""
    out_precision: str | None = None
    """Default: as `precision`, fp16 for int8."""
    logit_scale: float | None = None
    """Multiplies q k^T; default head_dim ** -0.5. For int8 times the steps of q and k."""
    value_scale: float = 1.0
    """For int8: the step of v, over that of an int8 output."""
    is_backward: bool = False
    """The backward pass of training: two kernels."""

    @property
    def name(self) -> str:
        kind = "backward" if self.is_backward else "attention"
        return f"{kind}_{self.precision}_n{self.num_tokens}_d{self.head_dim}_h{self.num_heads}"


@dataclass(frozen=True)
class KernelRecord:
    """A compiled kernel: how it is launched and what it takes of a multiprocessor.

    Attributes:
        spec: What it was compiled of.
        entry: The kernel's symbol. A forward takes (qkv, int32 B * H, out).
        grid_x: Blocks of queries; grid_y is B * H, or fewer where grid_x is 1.
        shared_bytes: Dynamic shared memory of one block.
        spill_bytes: Registers written to memory and read back, per thread: 0 is wanted.
    """

    name: str
    spec: KernelSpec
    capability: int
    entry: str
    grid_x: int
    num_threads: int
    num_registers: int
    shared_bytes: int
    spill_bytes: int
    ptx: str
    cubin: str


def vit_specs() -> list[KernelSpec]:
    """What ships: ViT-Ti, -S and -B at 32, 16 and 14 px patches, the small students, fp16, int8."""
    tokens_heads = [(n, h) for h in (3, 6, 12) for n in (50, 197, 257)] + [(577, 16)]
    shapes = [(n, 64, h) for n, h in tokens_heads] + [(17, 32, 4), (65, 32, 4), (65, 32, 6)]
    shapes += [(n, d, 8) for d in (96, 128) for n in (50, 197, 257, 577)]
    return [KernelSpec(*shape, precision) for shape in shapes for precision in ("fp16", "int8")]


def compile_kernels(
    capability: int, out_dir: Path, *, specs: Sequence[KernelSpec] | None = None
) -> list[KernelRecord]:
    """Write `NAME.smXX.ptx` and `.cubin` for every spec into a folder.

    Args:
        capability: 87 (Orin), 90 (H100), 110 (Thor), or another from 80 on.
        out_dir: Made if missing.
        specs: Default: `vit_specs()`.

    Raises:
        ImportError: If Triton is not installed.
        ValueError: If the capability is below 80, or a precision is not known.
        RuntimeError: If ptxas refuses a kernel.
    """
    if capability < 80:
        raise ValueError(f"sm_{capability} is too old: the kernels need sm_80 or newer")
    out_dir.mkdir(parents=True, exist_ok=True)
    records = []
    for spec in vit_specs() if specs is None else specs:
        for name, tiles, built in build_kernels(spec, capability):
            records.append(_write(out_dir, name, spec, capability, tiles, built))
    return records


def build_kernels(spec: KernelSpec, capability: int) -> list[tuple[str, Tiles, CompiledKernel]]:
    """(name, tiles, Triton's result) of a spec: one kernel, or the two of a backward pass.

    Raises:
        ImportError: If Triton is not installed.
        ValueError: If the precision is not known.
    """
    if spec.precision not in ITEMSIZE:
        raise ValueError(f"unknown precision {spec.precision!r}: {', '.join(ITEMSIZE)}")
    from dimefm_kernels._attention_backward_triton import attention_backward_kernel

    itemsize, shape = ITEMSIZE[spec.precision], (spec.num_tokens, spec.head_dim)
    fixed: dict[str, Any] = {"NUM_TOKENS": spec.num_tokens, "HEAD_DIM": spec.head_dim}
    width = spec.num_heads * spec.head_dim
    if not spec.is_backward:
        scale = spec.head_dim**-0.5 if spec.logit_scale is None else spec.logit_scale
        fixed |= {"NUM_HEADS": spec.num_heads, "SCALE_LOG2": scale * _LOG2_E}
        out = spec.out_precision or ("fp16" if spec.precision == "int8" else spec.precision)
        kinds = {"qkv_ptr": spec.precision, "out_ptr": out}
        kernel, tiles, constants = _packed_kernel(spec, capability)
        built = _compile(kernel, kinds, {**fixed, **constants}, tiles, capability)
        return [(spec.name, tiles, built)]
    fixed |= {"STRIDE_N": 3 * width, "STRIDE_ON": width}
    tiles = backward_tiles(*shape, itemsize=itemsize)
    kernels = []
    for suffix, is_keys in (("q", False), ("kv", True)):
        kinds = {"lse_ptr": "fp32", "delta_ptr": "fp32"}
        for name in ("q", "k", "v", "out", "grad", "grads"):
            kinds[f"{name}_ptr"] = spec.precision
        values = {**fixed, **tiles.constants(), "IS_KEYS": is_keys}
        built = _compile(attention_backward_kernel, kinds, values, tiles, capability)
        kernels.append((f"{spec.name}_{suffix}", tiles, built))
    return kernels


def _packed_kernel(spec: KernelSpec, capability: int) -> tuple[Any, Tiles, dict[str, Any]]:
    """The forward kernel that a spec is compiled of, its tiles and what these fix."""
    from dimefm_kernels._attention_int8_triton import int8_constants, packed_attention_int8_kernel
    from dimefm_kernels._attention_triton import packed_attention_kernel

    is_int8, shape = spec.precision == "int8", (spec.num_tokens, spec.head_dim)
    whole = whole_key_tiles(*shape, capability=capability) if is_int8 else None
    if whole is not None:
        whole = replace(whole, num_stages=1)  # a program does one head: no next one's loads
        values = {"OUT_SCALE": spec.value_scale, **int8_constants(whole)}
        return packed_attention_int8_kernel, whole, values
    tiles = forward_tiles(*shape, itemsize=ITEMSIZE[spec.precision], capability=capability)
    values = {"OUT_SCALE": spec.value_scale / 127 if is_int8 else 1.0, **tiles.constants()}
    return packed_attention_kernel, tiles, values


def _compile(
    kernel: Any, kinds: dict[str, str], constants: dict[str, Any], tiles: Tiles, capability: int
) -> CompiledKernel:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    signature, attributes = {}, {}
    for index, name in enumerate(kernel.arg_names):
        if name in constants:
            signature[name] = "constexpr"
        elif name in kinds:
            signature[name] = "*" + _TRITON_TYPES[kinds[name]]
        else:
            signature[name] = "fp32" if name.startswith("scale") else "i32"
        # Pointers are aligned by every allocator, strides are multiples of head_dim.
        if name in kinds or ("stride_" in name and constants["HEAD_DIM"] % 16 == 0):
            attributes[(index,)] = [["tt.divisibility", 16]]
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=attributes)
    options = {"num_warps": tiles.num_warps, "num_stages": tiles.num_stages}
    options |= {"ptx_version": _PTX_VERSION[capability]} if capability in _PTX_VERSION else {}
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)


def _write(
    out_dir: Path,
    name: str,
    spec: KernelSpec,
    capability: int,
    tiles: Tiles,
    built: CompiledKernel,
) -> KernelRecord:
    """The files of one kernel, assembled from the PTX without Triton's scratch arguments."""
    from triton.backends.nvidia.compiler import get_ptxas

    ptx, shared = drop_scratch(built.asm["ptx"]), built.metadata.shared
    limit = SHARED_KIB.get(capability, 99) * 1024
    if shared > limit:
        raise RuntimeError(f"{name} takes {shared} bytes of shared memory of {limit}")
    ptx_path = out_dir / f"{name}.sm{capability}.ptx"
    cubin_path = ptx_path.with_suffix(".cubin")
    ptx_path.write_text(ptx, encoding="utf-8")
    target = re.search(r"^\.target (\w+)", ptx, flags=re.MULTILINE)
    assert target is not None
    words = [get_ptxas(capability).path, "-v", "--gpu-name", target[1], str(ptx_path)]
    done = subprocess.run([*words, "-o", str(cubin_path)], capture_output=True, text=True)
    registers = re.search(r"Used (\d+) registers", done.stderr)
    if done.returncode or registers is None:
        raise RuntimeError(f"ptxas refuses {name}: {done.stderr.strip()[-500:]}")
    spills = re.findall(r"(\d+) bytes spill (?:stores|loads)", done.stderr)
    return KernelRecord(
        name=name,
        spec=spec,
        capability=capability,
        entry=built.metadata.name,
        grid_x=tiles.blocks,
        num_threads=32 * tiles.num_warps,
        num_registers=int(registers[1]),
        shared_bytes=shared,
        spill_bytes=sum(map(int, spills)),
        ptx=ptx_path.name,
        cubin=cubin_path.name,
    )


def drop_scratch(ptx: str) -> str:
    """PTX without the last parameters that its body never reads.

    Triton adds two scratch pointers to every kernel; whoever launches the file (TensorRT, the
    driver) gives inputs, sizes and outputs only.
    """
    head = re.search(r"\.entry (\w+)\((.*?)\)", ptx, flags=re.DOTALL)
    assert head is not None
    params = [line.strip() for line in head[2].strip().split(",\n")]
    body = ptx[head.end() :]
    while params and f"[{params[-1].split()[-1]}" not in body:
        params.pop()
    kept = ",\n".join(f"\t{param}" for param in params)
    return f"{ptx[: head.start(2)]}\n{kept}\n{ptx[head.end(2) :]}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sm", type=int, default=87, help="compute capability: 87, 90, 110")
    parser.add_argument("--out", type=Path, default=Path("kernels-compiled"))
    parser.add_argument("--backward", action="store_true", help="the kernels of training too")
    parser.add_argument("--json", action="store_true", help="one object on stdout")
    args = parser.parse_args()
    specs = vit_specs()
    if args.backward:
        shapes = [s for s in specs if s.precision == "fp16"]
        specs += [KernelSpec(s.num_tokens, s.head_dim, s.num_heads, p, is_backward=True)
                  for s in shapes for p in ("fp16", "bf16")]  # fmt: skip
    records = compile_kernels(args.sm, args.out, specs=specs)
    if args.json:
        print(json.dumps({"kernels": [asdict(record) for record in records]}))
        return
    for r in records:
        print(f"{r.name:<32} {r.num_registers:>4} registers  {r.shared_bytes / 1024:5.1f} KiB "
              f"shared  {r.spill_bytes:>4} bytes spilled")  # fmt: skip


if __name__ == "__main__":
    main()
