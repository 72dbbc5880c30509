"""An elastic student: the weights of the largest, of which every smaller one is a cut.

A narrower student has the first channels, heads and hidden units, a shallower one the first blocks
of every stage and the last. Cuts are views: what one learns, the largest has learned. Each
micro-batch of a step trains another (the sandwich of slimmable networks, arXiv 1903.05134;
MatFormer, arXiv 2310.07707): the smallest, one between by chance, the largest.

Averages of batch norms are kept of the largest only; a cut's are taken anew from images
(`recalibrate`), as slimmable networks do.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.optim.swa_utils import update_bn

from dimefm_edge.students import StudentSpec, build_student

SANDWICH = 3
"""Micro-batches a step: smallest, one between, largest."""

_STREAM = 9  # of a run's random numbers; others have 0 to 8


class ElasticStudent(nn.Module):
    """The largest student, trained through its cuts; evaluated as itself."""

    def __init__(self, student: nn.Module, specs: Sequence[StudentSpec], *, seed: int = 0) -> None:
        """Make a student elastic.

        Args:
            student: The largest, as `build_student` made it.
            specs: Its cuts, the smallest first, itself last.
            seed: Of the cuts between that are chosen by chance.
        """
        super().__init__()
        self.student = student
        self.specs = tuple(specs)
        self._seed, self._step, self._turn = seed, 0, 0

    def warm_up(self, batches: Iterable[Tensor]) -> None:
        """Nothing to see before the first step; part of `distill.FollowsTraining`."""

    def on_step(self, step: int, total: int) -> None:
        """Begin a step: its cuts depend on its number only, on every rank and after resuming."""
        self._step, self._turn = step, 0

    def forward(self, image: Tensor) -> Tensor:
        """Embed (B, 3, S, S) images, in training by the cut whose turn it is: (B, E)."""
        if not self.training:
            return self.student(image)  # type: ignore[no-any-return]
        place, self._turn = self._turn % SANDWICH, self._turn + 1
        if place == SANDWICH - 1:  # last: DistributedDataParallel then sees every weight used
            return self.student(image)  # type: ignore[no-any-return]
        return self.embed(self.specs[0] if place == 0 else self._between(), image)

    def embed(self, spec: StudentSpec, image: Tensor) -> Tensor:
        """Embed images by a cut, with gradients, each batch's own statistics, torch's attention."""
        weights = cut_weights(dict(self.student.named_parameters()), self.specs[-1], spec)
        return torch.func.functional_call(_skeleton(spec), weights, (image,))  # type: ignore[no-any-return]

    def _between(self) -> StudentSpec:
        among = self.specs[1:-1] or self.specs
        rng = np.random.default_rng((self._seed, _STREAM, self._step, self._turn))
        return among[int(rng.integers(len(among)))]


@torch.no_grad()
def cut_student(student: nn.Module, largest: StudentSpec, spec: StudentSpec) -> nn.Module:
    """A smaller student out of a trained one, with weights of its own.

    Its batch norms' averages are the first channels of the larger one's, which hardly serve: see
    `recalibrate`.

    Args:
        student: Of `largest`; unchanged.
        largest: What it is.
        spec: What to cut: of the same family, narrower or shallower.
    """
    cut = build_student(spec)
    state = cut_weights(student.state_dict(), largest, spec, shapes=cut.state_dict())
    cut.load_state_dict(state)
    return cut


@torch.no_grad()
def recalibrate(student: nn.Module, batches: Iterable[Tensor]) -> bool:
    """Take the averages of a student's batch norms anew, in place.

    Args:
        student: In any mode, which it keeps.
        batches: (B, 3, S, S) images, preprocessed and cropped as in training.

    Returns:
        False, and nothing read of `batches`, if it has no batch norms.
    """
    if not any(isinstance(part, _BatchNorm) for part in student.modules()):
        return False
    update_bn(batches, student)
    return True


def cut_weights(
    weights: Mapping[str, Tensor],
    largest: StudentSpec,
    spec: StudentSpec,
    *,
    shapes: Mapping[str, Tensor] | None = None,
) -> dict[str, Tensor]:
    """The largest student's tensors in the shapes of a smaller one, by its names; with gradients.

    Args:
        weights: The largest's.
        largest: What it is.
        spec: The smaller one.
        shapes: Tensors as they are wanted; default: the smaller one's parameters.
    """
    wanted = dict(_skeleton(spec).named_parameters()) if shapes is None else shapes
    return {
        name: _leading(weights[_counterpart(name, spec, largest)], like.shape, ".qkv." in name)
        for name, like in wanted.items()
    }


def _counterpart(name: str, spec: StudentSpec, largest: StudentSpec) -> str:
    """A tensor's name in the largest student: its last blocks are the cut's last."""
    full = _depths(largest)
    for blocks, depth in _depths(spec).items():
        last = f"{blocks}{depth - 1}."
        if name.startswith(last):
            return f"{blocks}{full[blocks] - 1}.{name.removeprefix(last)}"
    return name


def _depths(spec: StudentSpec) -> dict[str, int]:
    """How many blocks there are, by what their names begin with."""
    depth = spec.args["depth"]
    if isinstance(depth, int):
        return {"trunk.blocks.": depth}
    return {f"trunk.stages.{stage}.blocks.": count for stage, count in enumerate(depth)}


def _leading(value: Tensor, shape: torch.Size, is_qkv: bool) -> Tensor:
    """The first channels of every axis; of queries, keys and values each its first heads."""
    if is_qkv:
        heads = slice(shape[0] // 3)
        value = torch.cat([part[heads] for part in value.chunk(3)])
    return value[tuple(slice(size) for size in shape)]


@functools.lru_cache(maxsize=64)
def _skeleton(spec: StudentSpec) -> nn.Module:
    """A student without weights; its batch norms go by each batch alone."""
    with torch.device("meta"):
        student = build_student(spec)
    for part in student.modules():
        if isinstance(part, _BatchNorm):
            part.track_running_stats = False
            part.running_mean = part.running_var = part.num_batches_tracked = None
    return student
