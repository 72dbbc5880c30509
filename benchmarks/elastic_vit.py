"""An elastic ViT: the weights of its largest student, of which every smaller one is a cut.

A narrower student has the first channels, heads and hidden units, a shallower one the first
blocks and the last. Cuts are views: what one learns, the largest has learned. Each micro-batch
of a step trains another (slimmable networks' sandwich, arXiv 1903.05134; MatFormer, arXiv
2310.07707): the largest, the smallest, then one by chance.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from dimefm_edge.students import StudentSpec, build_student

SANDWICH = 3
"""Micro-batches a step: largest, smallest, any."""


class ElasticVit(nn.Module):
    """The largest student, trained through its cuts; evaluated as itself."""

    def __init__(self, specs: Sequence[StudentSpec]) -> None:
        """Start at random; `specs` are ViTs of one patch and head size, smallest to largest."""
        super().__init__()
        self.specs = tuple(specs)
        self.student = build_student(specs[-1])
        self._calls = 0

    def forward(self, image: Tensor) -> Tensor:
        """Embed (B, 3, S, S) images, in training by the cut whose turn it is: (B, E)."""
        if not self.training:
            return self.student(image)  # type: ignore[no-any-return]
        turn, self._calls = self._calls % SANDWICH, self._calls + 1
        place = (-1, 0, int(torch.randint(len(self.specs), ())))[turn]
        return self.embed(self.specs[place], image)

    def embed(self, spec: StudentSpec, image: Tensor) -> Tensor:
        """Embed images by a cut, with gradients."""
        weights = self.cut(spec)
        return torch.func.functional_call(_skeleton(spec), weights, (image,))  # type: ignore[no-any-return]

    def cut(self, spec: StudentSpec) -> dict[str, Tensor]:
        """Views of the weights that a cut has, by its own names."""
        return cut_weights(dict(self.student.named_parameters()), self.specs[-1], spec)

    def cut_student(self, spec: StudentSpec) -> nn.Module:
        """A cut on its own, with weights of its own."""
        student = build_student(spec)
        student.load_state_dict({name: value.detach() for name, value in self.cut(spec).items()})
        return student


def cut_weights(
    weights: Mapping[str, Tensor], largest: StudentSpec, spec: StudentSpec
) -> dict[str, Tensor]:
    """Views of the largest ViT's weights in the shapes of a smaller one, by its names."""
    last, own_last = largest.args["depth"] - 1, spec.args["depth"] - 1
    found = {}
    for name, wanted in _skeleton(spec).named_parameters():
        source = re.sub(rf"\bblocks\.{own_last}\.", f"blocks.{last}.", name)
        found[name] = _leading(weights[source], wanted.shape, is_qkv=".qkv." in name)
    return found


def _leading(value: Tensor, shape: torch.Size, *, is_qkv: bool) -> Tensor:
    """The first channels of every axis; of queries, keys and values each its first heads."""
    if is_qkv:
        parts = value.unflatten(0, (3, -1))[:, : shape[0] // 3]
        value = parts.flatten(0, 1)
    return value[tuple(slice(size) for size in shape)]


@functools.lru_cache(maxsize=64)
def _skeleton(spec: StudentSpec) -> nn.Module:
    """A student without weights."""
    with torch.device("meta"):
        return build_student(spec)
