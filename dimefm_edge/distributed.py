"""One process or many: what torchrun tells, and the few collectives that training needs."""

from __future__ import annotations

import os
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor


@dataclass(frozen=True)
class Ranks:
    """This process among those of the run; (0, 1) without torchrun."""

    rank: int = 0
    world_size: int = 1

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def slice(self, size: int) -> slice:
        """This rank's contiguous part of a global batch of `size`.

        Raises:
            ValueError: If the ranks do not divide the batch.
        """
        if size % self.world_size:
            raise ValueError(f"a batch of {size} cannot be split over {self.world_size} ranks")
        part = size // self.world_size
        return slice(self.rank * part, (self.rank + 1) * part)

    def barrier(self) -> None:
        """Wait for every rank; returns at once when there is one."""
        if self.world_size > 1:
            dist.barrier()

    def gather_with_grad(self, local: Tensor) -> Tensor:
        """Concatenate (B_local, E) over ranks; gradients flow to this rank's part only.

        Every rank computes the same global loss, so after the gradient mean that DDP takes
        over ranks, a loss multiplied by world_size gives the gradient of one big batch.
        """
        if self.world_size == 1:
            return local
        parts = [torch.empty_like(local) for _ in range(self.world_size)]
        dist.all_gather(parts, local.detach().contiguous())
        parts[self.rank] = local
        return torch.cat(parts)


def piece_of_ranks(rows: Tensor, piece: slice, num_ranks: int) -> Tensor:
    """A micro-batch of a global batch: (B, ...) -> (b, ...), the `piece` of each rank's rows."""
    return rows.view(num_ranks, -1, *rows.shape[1:])[:, piece].flatten(0, 1)


def join_ranks() -> Ranks:
    """Join the process group that torchrun describes in the environment, if it does."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return Ranks()
    if not dist.is_initialized():
        on_gpu = torch.cuda.is_available()
        if on_gpu:
            torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
        # Rank 0 embeds the pools alone while the others wait: hours, for millions of images.
        dist.init_process_group("nccl" if on_gpu else "gloo", timeout=timedelta(days=7))
    return Ranks(dist.get_rank(), dist.get_world_size())


def leave_ranks() -> None:
    """Leave the process group, if one was joined."""
    if dist.is_initialized():
        dist.destroy_process_group()
