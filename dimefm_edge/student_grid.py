"""What `fit` tries of each family: students from small to large, by the teacher's measures.

Used by fit.py; latency, memory and quality are judged there.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

from dimefm_edge.errors import ConfigError, lookup
from dimefm_edge.students import (
    NAMED_STUDENTS,
    STAGED_FAMILIES,
    StudentSpec,
    convnet_spec,
    heads_for,
    hybrid_spec,
    is_student_name,
    patch_for,
    student_spec,
    vit_spec,
)
from dimefm_edge.students.heirs import is_heir

CUTTABLE = ("vit", *STAGED_FAMILIES)
"""Families of ours: smaller students can be cut out of theirs."""
FAMILIES = (*CUTTABLE, "resnet")
"""Looked at by default."""

_VIT_WIDTHS = (64, 96, 128, 160, 192, 224, 256, 320, 384, 448, 512, 576, 640, 704, 768, 1024)
_VIT_DEPTHS = tuple(range(2, 13))
_MAX_WIDTH_PER_LAYER = 96
"""Wide and shallow ViTs fill a budget with arithmetic that they cannot use; ViT-B has 64."""
_MIN_DEPTH = 2
_MIN_HEADS_SHARE = 1 / 2
"""Of the teacher's heads, an heir's: a third of them with all layers came to less than a faster
hybrid (65.0% on scenes, for 66.4%)."""
_STAGED_WIDTHS = (8, 12, 16, 20, 24, 28, 32, 40, 48, 56, 64, 80, 96, 112, 128, 160, 192)
_STAGED_DEPTHS = (
    (1, 1, 1, 1), (1, 1, 2, 1), (2, 2, 4, 2), (2, 2, 6, 2), (3, 3, 9, 3), (4, 4, 12, 4),
)  # fmt: skip
_MAX_STAGED_WIDTH_PER_BLOCK = 10
"""Likewise, of the first stage's width; FastViT's own have 2 to 6."""
_SIDE_SHARES = (6 / 7, 5 / 7)
"""Of the teacher's images, an heir's on smaller ones: 192 and 160 px for 224."""
_CUT_WIDTHS, _CUT_DEPTHS = (1 / 2, 3 / 4, 1), (1 / 3, 1 / 2, 3 / 4, 1)
"""Of an elastic student's width and depth, its cuts': the smallest has 0.07 to 0.4 of the work."""
_EDGE_MODELS = (
    "mobilenetv3_small_050", "mobilenetv3_small_100", "mobilenetv3_large_100",
    "mobilenetv4_conv_small", "mobilenetv4_conv_medium", "mobilenetv4_conv_large",
    "efficientnet_lite0", "efficientnet_lite2", "efficientvit_b0", "efficientvit_b1",
    "efficientvit_b2", "repvit_m0_9", "repvit_m1_1", "repvit_m2_3", "resnet10t", "resnet18d",
    "resnet34d", "resnet50d", "regnetx_004", "regnety_008", "convnext_atto", "convnext_pico",
    "convnext_tiny", "edgenext_x_small", "mobilevitv2_100", "vit_tiny_patch16_224",
    "vit_small_patch16_224", "vit_base_patch16_224",
)  # fmt: skip
"""timm models that people put on devices."""
_RESNETS = tuple(name for name in _EDGE_MODELS if name.startswith("resnet"))
_MAX_RESNET_SIDE = 96
"""Of images, in pixels, up to which random ResNets are looked at beside ours: on 64 px they came to
more than convnets as fast, the others of timm's to less (`studies.py hand-picked`). On larger ones
FastViTs are the better of the two (arXiv 2303.14189)."""

Found = Iterator[tuple[StudentSpec, bool]]
CanInherit = Callable[[StudentSpec], bool]
Grid = Callable[[int, int, "dict[str, Any] | None"], Found]


def _vit_grid(image_size: int, embed_dim: int, teacher: dict[str, Any] | None) -> Found:
    """The teacher's own geometry with fewer layers and heads first, then everything else."""
    sizes: dict[str, Any] = {"image_size": image_size, "embed_dim": embed_dim}
    shape: dict[str, Any]
    for spec in _vit_heirs(image_size, embed_dim, teacher):
        yield spec, True
    patch = patch_for(image_size)
    for patch_size in (p for p in (patch, 2 * patch) if image_size % p == 0):
        for width in _VIT_WIDTHS:
            shape = {"patch_size": patch_size, "width": width, "num_heads": heads_for(width)}
            for depth in (d for d in _VIT_DEPTHS if width <= _MAX_WIDTH_PER_LAYER * d):
                yield vit_spec(**sizes, **shape, depth=depth), False


def _vit_heirs(
    image_size: int, embed_dim: int, teacher: dict[str, Any] | None
) -> Iterator[StudentSpec]:
    if teacher is None or image_size % teacher["patch_size"] != 0:
        return
    shared = {key: teacher[key] for key in ("patch_size", "mlp_ratio", "act")}
    head_dim = teacher["width"] // teacher["num_heads"]
    fewest = math.ceil(_MIN_HEADS_SHARE * teacher["num_heads"])
    for heads in range(fewest, teacher["num_heads"] + 1):
        for depth in range(_MIN_DEPTH, teacher["depth"] + 1):
            yield vit_spec(
                image_size=image_size, embed_dim=embed_dim, **shared,
                width=heads * head_dim, num_heads=heads, depth=depth,
            )  # fmt: skip


def _hybrid_grid(image_size: int, embed_dim: int, teacher: dict[str, Any] | None) -> Found:
    for sizes in _staged(image_size, embed_dim):
        yield hybrid_spec(**sizes), False


def _convnet_grid(image_size: int, embed_dim: int, teacher: dict[str, Any] | None) -> Found:
    for sizes in _staged(image_size, embed_dim):
        yield convnet_spec(**sizes), False


def _staged(image_size: int, embed_dim: int) -> Iterator[dict[str, Any]]:
    from dimefm_edge.students.hybrid import MIN_IMAGE_SIZE

    if image_size < MIN_IMAGE_SIZE:
        return
    for width in _STAGED_WIDTHS:
        for depth in (d for d in _STAGED_DEPTHS if width <= _MAX_STAGED_WIDTH_PER_BLOCK * sum(d)):
            yield {
                "image_size": image_size, "embed_dim": embed_dim, "width": width, "depth": depth,
            }  # fmt: skip


def _timm_grid(
    image_size: int, embed_dim: int, teacher: dict[str, Any] | None, *, names: Sequence[str]
) -> Found:
    for name in names:
        yield student_spec(f"timm:{name}", image_size=image_size, embed_dim=embed_dim), False


GRIDS: dict[str, Grid] = {
    "vit": _vit_grid,
    "hybrid": _hybrid_grid,
    "convnet": _convnet_grid,
    "resnet": partial(_timm_grid, names=_RESNETS),
    "timm": partial(_timm_grid, names=_EDGE_MODELS),
}
"""What is tried of each family: (image_size, embed_dim, teacher_geometry) -> spec, inherits."""


def student_grid(
    families: Sequence[str],
    *,
    image_size: int,
    embed_dim: int,
    teacher: dict[str, Any] | None,
    can_inherit: CanInherit | None = None,
    can_shrink: bool = False,
) -> list[tuple[StudentSpec, bool]]:
    """Every family's students, and whether each can inherit from the teacher.

    Args:
        families: Keys of `GRIDS`, or `timm:NAME` for one model.
        image_size: Side of the input, in pixels.
        embed_dim: Size of the teacher's embeddings.
        teacher: From `vit_geometry`; None if it is no ViT.
        can_inherit: Whether a student can start from a teacher of another kind: where the first,
            smallest one of a family cannot, none is asked, but for timm's.
        can_shrink: Whether heirs of a ViT are looked at on smaller images, too.

    Returns:
        Students of unlike names, or image sizes; of two with one name, the one that inherits.

    Raises:
        UnknownNameError: If a family is not known.
    """
    specs: dict[str, tuple[StudentSpec, bool]] = {}
    for family in families:
        if family.startswith("timm:"):
            grid: Grid = partial(_timm_grid, names=[family.removeprefix("timm:")])
        else:
            grid = lookup(GRIDS, family, kind="student family to fit")
        for spec, inherits in grid(image_size, embed_dim, teacher):
            specs.setdefault(spec.name, (spec, inherits))
    small: list[tuple[StudentSpec, bool]] = []
    if can_shrink and teacher is not None and "vit" in families:
        for side in _smaller_sides(image_size, teacher["patch_size"]):
            small += [(spec, True) for spec in _vit_heirs(side, embed_dim, teacher)]
    found = list(specs.values())
    if can_inherit is not None:
        smallest = {spec.family: spec for spec, _ in reversed(found)}
        able = {f for f, spec in smallest.items() if f == "timm" or can_inherit(spec)}
        found = [
            (spec, inherits or (spec.family in able and can_inherit(spec)))
            for spec, inherits in found
        ]
    has_heirs = any(inherits for _, inherits in found)
    if tuple(families) == FAMILIES and (has_heirs or image_size > _MAX_RESNET_SIDE):
        found = [(spec, inherits) for spec, inherits in found if inherits or spec.family != "timm"]
    return [*found, *small]


def _smaller_sides(image_size: int, patch: int) -> list[int]:
    sides = (patch * round(share * image_size / patch) for share in _SIDE_SHARES)
    return [side for side in dict.fromkeys(sides) if side < image_size]


def elastic_cuts(spec: StudentSpec) -> tuple[StudentSpec, ...]:
    """Students that can be cut out of a larger one: three widths, four depths.

    Returns:
        The smallest first, `spec` itself last; between them by width, then by depth.

    Raises:
        ConfigError: If it is one of timm's, or so small that there is none.
    """
    if spec.family not in CUTTABLE:
        raise ConfigError(
            f"student {spec.name} cannot be elastic: smaller ones are cut out of ViTs, hybrids and "
            "convnets only",
            hint="--student hybrid, or without --elastic",
        )
    cuts = _vit_cuts(spec) if spec.family == "vit" else _staged_cuts(spec)
    if len(cuts) < 2:
        raise ConfigError(
            f"student {spec.name} cannot be elastic: it has no smaller one",
            hint="a larger --latency-ms, or without --elastic",
        )
    return cuts


def _vit_cuts(spec: StudentSpec) -> tuple[StudentSpec, ...]:
    args = dict(spec.args)
    width, heads, depth = args.pop("width"), args.pop("num_heads"), args.pop("depth")
    sizes: dict[str, Any] = {"image_size": spec.image_size, "embed_dim": spec.embed_dim}
    least = min(_MIN_DEPTH, depth)
    depths = sorted({max(least, round(share * depth)) for share in _CUT_DEPTHS})
    return tuple(
        vit_spec(**sizes, **args, width=count * width // heads, num_heads=count, depth=blocks)
        for count in sorted({max(1, round(share * heads)) for share in _CUT_WIDTHS})
        for blocks in depths
    )


def _staged_cuts(spec: StudentSpec) -> tuple[StudentSpec, ...]:
    args = dict(spec.args)
    width, depth = args.pop("width"), args.pop("depth")
    make = hybrid_spec if spec.family == "hybrid" else convnet_spec
    widths = sorted({max(4, 4 * round(share * width / 4)) for share in _CUT_WIDTHS})
    depths = dict.fromkeys(
        tuple(max(1, round(share * count)) for count in depth) for share in _CUT_DEPTHS
    )
    return tuple(
        make(image_size=spec.image_size, embed_dim=spec.embed_dim, **args, width=w, depth=d)
        for w in widths
        for d in depths
    )


def find_student(
    name: str,
    *,
    image_size: int,
    embed_dim: int,
    teacher: dict[str, Any] | None,
    can_inherit: CanInherit | None = None,
) -> tuple[StudentSpec, bool]:
    """One student by the name that it has in a grid, or that `student_spec` takes.

    Raises:
        UnknownNameError: If it is neither; the message offers the nearest.
    """
    sizes: dict[str, Any] = {"image_size": image_size, "embed_dim": embed_dim}
    grid = {
        spec.name: (spec, heir) for spec, heir in student_grid(FAMILIES, **sizes, teacher=teacher)
    }
    if name not in grid and not is_student_name(name):
        lookup(dict.fromkeys(("auto", *GRIDS, *NAMED_STUDENTS)), name, kind="student")
    spec, inherits = grid.get(name) or (student_spec(name, **sizes), False)
    is_vits = spec.family == "vit" and teacher is not None and is_heir(spec.args, teacher)
    return spec, inherits or is_vits or (can_inherit is not None and can_inherit(spec))
