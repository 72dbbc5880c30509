"""How attention is cut into tiles: which sizes, and what they cost over the true work.

A vision transformer's token count is one of a few odd numbers (a grid and a class token: 50,
197, 257), so that one padded power of two would waste 69% at 197. Here tokens are cut into full
tiles and a tail in steps of 16, the tensor cores' own (32 for int8), each of its own size.
No torch and no Triton here: kernels, plugin and benchmarks count with it alike.
"""

from __future__ import annotations

from dataclasses import dataclass

MAX_TOKENS = 577
"""A 24 x 24 grid and CLS (ViT-L/14 at 336 px)."""
MAX_HEAD_DIM = 128
MAX_HEAD_DIM_FP32 = 96  # more does not fit 255 registers a thread
MAX_GRID_Y = 65535
"""Of CUDA; programs loop over what is left."""
STEP = {1: 32, 2: 16, 4: 16}
"""Keys of the smallest tile by bytes of a value: the k of one int8 product is 32, of one half
product 16 (PTX ISA, `mma.m16n8k32` and `mma.m16n8k16`)."""
HOPPER_BUSY = 640
"""Programs of 128 queries from which on they are faster than of 64: of an H200's 132
multiprocessors each has four or five then."""
MAX_WHOLE_KEYS = 288
"""Keys whose logits one program of Hopper's int8 kernel has in registers: 257 in steps of 32."""
SHARED_KIB = {80: 163, 86: 99, 87: 163, 89: 99, 90: 227, 100: 227, 110: 227, 120: 99}
"""Shared memory that one block may have, by compute capability (CUDA C++ Programming Guide,
"Technical Specifications per Compute Capability")."""


@dataclass(frozen=True)
class Tiles:
    """The sizes that a kernel is compiled with.

    Attributes:
        rows: Queries of a full block, a power of two; one program does one block.
        full_blocks: Blocks without padding.
        tail_rows: Queries of the block after them, a power of two; 0 if there is none.
        tile: Keys of a full tile, a power of two.
        full_tiles: Tiles without padding.
        tails: Keys of the one or two tiles after them, 0 for none; only the last may be padded.
        dims: head_dim as one or two powers of two: 96 is (64, 32), 64 is (64, 0).
        num_warps: Of one program, 32 threads each.
        num_stages: Tiles of keys whose loads are under way at once.
    """

    rows: int
    full_blocks: int
    tail_rows: int
    tile: int
    full_tiles: int
    tails: tuple[int, int]
    dims: tuple[int, int]
    num_warps: int
    num_stages: int = 2

    @property
    def blocks(self) -> int:
        """Programs that share the queries of one head."""
        return self.full_blocks + (self.tail_rows > 0)

    @property
    def padded_rows(self) -> int:
        """Queries that are multiplied, padding included."""
        return self.rows * self.full_blocks + self.tail_rows

    @property
    def padded_keys(self) -> int:
        """Keys that are multiplied, padding included."""
        return self.tile * self.full_tiles + sum(self.tails)

    def constants(self) -> dict[str, int]:
        """The kernels' compile-time arguments by name."""
        return {
            "ROWS": self.rows, "FULL_BLOCKS": self.full_blocks, "TAIL_ROWS": self.tail_rows,
            "TILE": self.tile, "FULL_TILES": self.full_tiles,
            "TAIL_A": self.tails[0], "TAIL_B": self.tails[1],
            "D0": self.dims[0], "D1": self.dims[1],
        }  # fmt: skip


def forward_tiles(
    num_tokens: int, head_dim: int, *, itemsize: int, capability: int = 87, num_items: int = 0
) -> Tiles:
    """Tiles of the forward kernel, as large as sm_87's registers allow by Triton 3.6 and 3.8.

    Hopper's were the fastest of up to 24 on an H200 at 197 and 257 tokens of 64 (Triton 3.6):
    its products are of 64 rows and more, and 128 rows pay once all multiprocessors are busy.

    Args:
        num_tokens: N, at least 1.
        head_dim: D, at least 1.
        itemsize: Bytes of one value: 4 (fp32), 2 (fp16, bf16) or 1 (int8).
        capability: Compute capability of the GPU, as 87.
        num_items: B * H; 0 where it is not known.
    """
    if capability == 90 and itemsize == 2 and head_dim <= 64 and num_tokens > 64:
        is_busy = num_items * -(-num_tokens // 128) >= HOPPER_BUSY
        return _cut(
            num_tokens, head_dim, rows=128 if is_busy else 64, tile=64, itemsize=itemsize,
            num_warps=4, num_stages=3 if is_busy else 2,
        )  # fmt: skip
    rows = 32 if head_dim > 96 or itemsize == 4 else 64
    is_one_tile = itemsize == 2 and num_tokens <= 64 and head_dim <= 96
    tile = 64 if itemsize == 1 or is_one_tile else 32
    return _cut(num_tokens, head_dim, rows=rows, tile=tile, itemsize=itemsize, num_warps=4)


def whole_key_tiles(num_tokens: int, head_dim: int, *, capability: int) -> Tiles | None:
    """Tiles of the int8 kernel that has all keys at once; None where `forward_tiles`' is taken.

    On an H200 that was 1.3 to 1.7 times as fast (Triton 3.6); other GPUs were not measured.
    """
    is_small = -(-num_tokens // 32) * 32 <= MAX_WHOLE_KEYS and head_dim <= 64
    if capability != 90 or not is_small:
        return None
    # Of two, Triton waits for the next head's loads before this one's products. Three of 257 tokens
    # would leave shared memory for one program a multiprocessor.
    stages = 3 if num_tokens <= 224 else 2
    return _cut(num_tokens, head_dim, rows=64, tile=128, itemsize=1, num_warps=4, num_stages=stages)


def backward_tiles(num_tokens: int, head_dim: int, *, itemsize: int) -> Tiles:
    """Tiles of the backward kernels, for queries and for keys alike; as `forward_tiles`."""
    rows, tile, num_warps = 32, 16, 8 if head_dim > 96 else 4
    if head_dim <= 64 and itemsize == 2:
        rows, tile, num_warps = 64, 32, 8
    return _cut(num_tokens, head_dim, rows=rows, tile=tile, itemsize=itemsize, num_warps=num_warps)


def waste(num_tokens: int, head_dim: int, *, itemsize: int) -> float:
    """Multiplications of the forward kernel spent on padding, as a share of the true ones."""
    cut = forward_tiles(num_tokens, head_dim, itemsize=itemsize)
    padded = cut.padded_rows * cut.padded_keys * sum(cut.dims)
    return padded / (num_tokens**2 * head_dim) - 1


def is_supported(num_tokens: int, head_dim: int, *, itemsize: int) -> bool:
    """Whether the kernels take N tokens of head_dim values; others go to torch's attention."""
    most = MAX_HEAD_DIM_FP32 if itemsize == 4 else MAX_HEAD_DIM
    return 0 < num_tokens <= MAX_TOKENS and 0 < head_dim <= most


def _cut(
    num_tokens: int, head_dim: int, *, rows: int, tile: int, itemsize: int, num_warps: int,
    num_stages: int = 2,
) -> Tiles:  # fmt: skip
    step = STEP[itemsize]
    full_blocks, rest_rows = divmod(num_tokens, rows)
    full_tiles, rest = divmod(num_tokens, tile)
    keys = -(-rest // step) * step
    # In steps of 16 up to 64, of 32 up to 128: 48 is 32 and 16, 96 is 64 and 32.
    tails = [size for size in (128, 64, 32, 16) if size & keys] + [0, 0]
    return Tiles(
        rows=rows,
        full_blocks=full_blocks,
        tail_rows=max(16, _power_of_two(rest_rows)) if rest_rows else 0,
        tile=tile,
        full_tiles=full_tiles,
        tails=(tails[0], tails[1]),
        dims=_split_dim(head_dim, step=step),
        num_warps=2 if num_tokens <= 32 else num_warps,
        num_stages=num_stages,
    )


def _split_dim(head_dim: int, *, step: int) -> tuple[int, int]:
    padded = -(-head_dim // step) * step
    first = 1 << (padded.bit_length() - 1)
    return first, max(step, _power_of_two(padded - first)) if padded > first else 0


def _power_of_two(value: int) -> int:
    return 1 << (value - 1).bit_length()
