"""What a student should come to once it is trained, guessed before it is: `fit` ranks by it.

Its multiply-adds, times what they count for. Measured by `benchmarks/studies.py students`, short
distillations of ViTs, hybrids, convnets and timm's models: README says how well the guess ranks
them ("Which student"). Long training on millions of images evens families out; the order stayed in
MobileCLIP's (arXiv 2311.17049), whose hybrids are better than ViTs as fast as they are. No torch
here.
"""

from __future__ import annotations

from dimefm_edge.latency.operators import COST_NAMES, Vector
from dimefm_edge.students import STAGED_FAMILIES, StudentSpec

CONVOLUTION_BONUS = 16.0
"""A convolutional student counts as a ViT of so many times the arithmetic: what a ViT must learn of
images first, it is built with."""
OTHER_CONVOLUTION_BONUS = 3.0
"""Likewise, of timm's other than ResNets and FastViTs, which ours are: MobileNets, EfficientNet,
RegNet and ConvNeXt came to less than convnets of a third of their arithmetic
(`studies.py hand-picked`)."""
INHERITANCE_BONUS = 40.0
"""So does a ViT that starts from all of its teacher's layers, as wide or narrower; from a part of
them, that part of it: deep and narrow heirs came to more than shallow and wide ones."""
USUAL_LAYERS = 0.5
"""Share of the teacher's layers, where it is not known."""
CONVOLUTION_HEIR_BONUS = 4.0
"""On top of its own, for a convolutional student that starts from the teacher's weights. Two came
to what random ones of 4.6 and 8 times the arithmetic would (`benchmarks/bench_inherit.py`)."""

RESOLUTION_POWER = 2.0
"""On images of 3/4 of the teacher's side, a student counts 3/4 to this power: with it, 8 students
on scenes of 32 to 48 px rank among 23 on whole ones as training ranks them."""

_CONVOLUTIONS = ("macs_conv", "macs_grouped", "macs_depthwise")
_MACS = (*_CONVOLUTIONS, "macs_linear", "macs_attention")
_MIN_SHARE = 0.8  # of multiply-adds: of a small ViT's, those of its patches are up to 0.75
_MIN_DEPTHWISE = 4  # their 1 x 1 convolutions are linear layers in some of timm's models


def student_score(
    gmacs: float,
    *,
    inherits: bool,
    is_convolutional: bool,
    learns_quickly: bool = True,
    layers: float | None = None,
    resolution: float = 1.0,
) -> float:
    """Multiply-adds of a ViT that starts at random and should come to the same, in 1e9.

    Args:
        gmacs: The student's own, in 1e9.
        inherits: Whether it starts from the teacher's weights.
        is_convolutional: As the function of that name says.
        learns_quickly: Likewise; of convolutional students only.
        layers: Share of the teacher's layers that a ViT inherits.
        resolution: Side of its images, as a share of the teacher's.
    """
    gmacs *= resolution**RESOLUTION_POWER
    if is_convolutional:
        bonus = CONVOLUTION_BONUS if learns_quickly else OTHER_CONVOLUTION_BONUS
        return gmacs * bonus * (CONVOLUTION_HEIR_BONUS if inherits else 1.0)
    share = USUAL_LAYERS if layers is None else layers
    return gmacs * (INHERITANCE_BONUS * share if inherits else 1.0)


def is_convolutional(costs: Vector) -> bool:
    """Whether a model's counts, (len(COSTS),), say that it looks at images by convolutions.

    Not for its stem or patches alone: most of its multiply-adds are theirs, or several of them
    are depthwise. A transformer with depthwise position encodings (PVTv2, CoaT) is taken for one.
    """
    counts = dict(zip(COST_NAMES, costs, strict=True))
    share = sum(counts[name] for name in _CONVOLUTIONS) / sum(counts[name] for name in _MACS)
    return bool(share > _MIN_SHARE or counts["kernels_depthwise"] >= _MIN_DEPTHWISE)


def learns_quickly(spec: StudentSpec) -> bool:
    """Whether it is a FastViT or a ResNet: see `OTHER_CONVOLUTION_BONUS`."""
    is_ours = spec.family in STAGED_FAMILIES
    return is_ours or str(spec.args.get("model")).startswith(("fastvit", "resnet"))
