"""ViT students: timm's VisionTransformer in CLIP's layout, so that a teacher can be inherited.

Layout: patch convolution without bias, class token, LayerNorm before the blocks, eps 1e-5,
projection of the class token. A teacher of equal patch and head size hands down everything: of its
layers, evenly spaced ones, the first and the last included; where it is wider, evenly spaced
channels, heads and hidden units ("weight selection", arXiv 2311.18823).
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from timm.layers.activations import QuickGELU
from timm.layers.pos_embed import resample_abs_pos_embed
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from dimefm_edge.errors import ConfigError, lookup
from dimefm_edge.students import StudentSpec
from dimefm_edge.students.class_token import read_class_token_only
from dimefm_edge.students.heirs import inherited_layers, is_heir
from dimefm_edge.students.student import Student

_ACTIVATIONS: dict[str, type[nn.Module]] = {"gelu": nn.GELU, "quick_gelu": QuickGELU}
_NORM_EPS = 1e-5


def build_vit(spec: StudentSpec) -> Student:
    """Build a ViT student with random weights.

    Raises:
        ConfigError: If the patch does not divide the image, or the heads the width.
    """
    args = spec.args
    if spec.image_size % args["patch_size"]:
        raise ConfigError(
            f"student {spec.name}: patch {args['patch_size']} does not divide the image side "
            f"{spec.image_size}"
        )
    if args["width"] % args["num_heads"]:
        raise ConfigError(
            f"student {spec.name}: {args['num_heads']} heads do not divide width {args['width']}"
        )
    trunk = VisionTransformer(
        img_size=spec.image_size,
        patch_size=args["patch_size"],
        embed_dim=args["width"],
        depth=args["depth"],
        num_heads=args["num_heads"],
        mlp_ratio=args["mlp_ratio"],
        num_classes=0,
        pre_norm=True,
        norm_layer=partial(nn.LayerNorm, eps=_NORM_EPS),
        act_layer=lookup(_ACTIVATIONS, args["act"], kind="activation"),
    )
    read_class_token_only(trunk)
    return Student(trunk, num_features=args["width"], embed_dim=spec.embed_dim)


def vit_geometry(teacher_image_tower: nn.Module) -> dict[str, Any] | None:
    """How a CLIP ViT is shaped, in the words of a ViT student's args.

    Args:
        teacher_image_tower: An open_clip `VisionTransformer`, or a ViT student of ours.

    Returns:
        image_size, patch_size, width, depth, num_heads, mlp_ratio, act and embed_dim; None if
        the tower is of another architecture, or has parts that ViT students lack.
    """
    if isinstance(teacher_image_tower, Student):
        return _student_geometry(teacher_image_tower)
    from open_clip.transformer import ResidualAttentionBlock
    from open_clip.transformer import VisionTransformer as OpenClipViT

    tower: Any = teacher_image_tower
    if not isinstance(tower, OpenClipViT) or not isinstance(tower.ln_pre, nn.LayerNorm):
        return None
    blocks = list(tower.transformer.resblocks)
    square = (
        tower.image_size[0] == tower.image_size[1] and tower.patch_size[0] == tower.patch_size[1]
    )
    if not square or tower.attn_pool is not None or tower.pool_type != "tok":
        return None
    if any(type(b) is not ResidualAttentionBlock for b in blocks) or tower.ln_pre.eps != _NORM_EPS:
        return None
    if any(
        isinstance(m, nn.Module) and list(m.parameters()) for b in blocks for m in (b.ls_1, b.ls_2)
    ):
        return None
    act = activation_name(blocks[0].mlp.gelu)
    if act not in _ACTIVATIONS or tower.conv1.bias is not None or tower.proj is None:
        return None
    width = tower.conv1.out_channels
    return {
        "image_size": int(tower.image_size[0]),
        "patch_size": int(tower.patch_size[0]),
        "width": int(width),
        "depth": len(blocks),
        "num_heads": int(blocks[0].attn.num_heads),
        "mlp_ratio": blocks[0].mlp.c_fc.out_features / width,
        "act": act,
        "embed_dim": int(tower.proj.shape[1]),
    }


@torch.no_grad()
def inherit_layers(student: nn.Module, teacher_image_tower: nn.Module) -> list[str]:
    """Copy the teacher's weights into a ViT student, in place.

    Args:
        student: Changed in place. Its image size may differ from the teacher's: the position
            embeddings are then resampled.
        teacher_image_tower: An open_clip ViT or a ViT student.

    Returns:
        What was inherited: `patch_embed`, `blocks.0 <- 0` (student's and teacher's layer), ...;
        `proj` only if the embedding sizes agree. Empty, and the student untouched, if the two
        are not ViTs of equal patch size, head size and activation, or the student is larger.
    """
    teacher = vit_geometry(teacher_image_tower)
    mine = vit_geometry(student)
    if teacher is None or mine is None or not is_heir(mine, teacher):
        return []
    source = _in_student_layout(teacher_image_tower)
    state = student.state_dict()
    chosen = _chosen(mine, teacher)
    layers = inherited_layers(mine["depth"], teacher["depth"])
    for student_layer, teacher_layer in enumerate(layers):
        old, new = f"trunk.blocks.{teacher_layer}.", f"trunk.blocks.{student_layer}."
        for key in [k for k in state if k.startswith(new)]:
            name = key.removeprefix(new)
            state[key].copy_(_selected(source[old + name], name, chosen))
    for key in ("cls_token", "patch_embed.proj.weight", "norm_pre.weight", "norm_pre.bias",
                "norm.weight", "norm.bias"):  # fmt: skip
        state["trunk." + key].copy_(_selected(source["trunk." + key], key, chosen))
    grid = mine["image_size"] // mine["patch_size"]
    positions = resample_abs_pos_embed(source["trunk.pos_embed"], [grid, grid], num_prefix_tokens=1)
    state["trunk.pos_embed"].copy_(_selected(positions, "pos_embed", chosen))
    inherited = ["patch_embed", "cls_token", "pos_embed", "norm_pre", "norm"]
    inherited += [f"blocks.{i} <- {j}" for i, j in enumerate(layers)]
    if mine["embed_dim"] == teacher["embed_dim"]:
        state["proj.weight"].copy_(_selected(source["proj.weight"], "proj.weight", chosen))
        inherited.append("proj")
    return inherited


_AXES: dict[str, tuple[str | None, ...]] = {
    "cls_token": (None, None, "width"),
    "pos_embed": (None, None, "width"),
    "proj.weight": (None, "width"),
    "attn.qkv.weight": ("qkv", "width"),
    "attn.qkv.bias": ("qkv",),
    "attn.proj.weight": ("width", "heads"),
    "mlp.fc1.weight": ("hidden", "width"),
    "mlp.fc1.bias": ("hidden",),
    "mlp.fc2.weight": ("width", "hidden"),
}
"""What the axes of a tensor are, by its name in a block or beside them; of all others the first is
the width."""


def _chosen(mine: Mapping[str, Any], teacher: Mapping[str, Any]) -> dict[str, Tensor]:
    """Which of the teacher's a student takes, by what an axis is; heads are taken whole."""
    width, full, ratio = mine["width"], teacher["width"], mine["mlp_ratio"]
    heads = mine["num_heads"], teacher["num_heads"], width // mine["num_heads"]
    return {
        "width": evenly_spaced(width, full),
        "heads": head_rows(*heads),
        "qkv": head_rows(*heads, parts=3),
        "hidden": evenly_spaced(round(ratio * width), round(ratio * full)),
    }


def evenly_spaced(size: int, full: int, *, together: int = 1) -> Tensor:
    """Which of `full` channels a tensor of `size` takes, (size,) int64; so many stay together."""
    first = torch.arange(size // together) * full // size
    return (first[:, None] * together + torch.arange(together)).flatten()


def head_rows(mine: int, theirs: int, head_dim: int, *, parts: int = 1) -> Tensor:
    """Rows of whole heads, evenly spaced: of `mine` out of `theirs`; of queries, keys and values
    below each other, with three parts, alike."""
    rows = evenly_spaced(mine * head_dim, theirs * head_dim, together=head_dim)
    return torch.cat([rows + part * theirs * head_dim for part in range(parts)])


def _selected(theirs: Tensor, name: str, chosen: Mapping[str, Tensor]) -> Tensor:
    for axis, what in enumerate(_AXES.get(name, ("width",))):
        if what is not None:
            theirs = theirs.index_select(axis, chosen[what].to(theirs.device))
    return theirs


def _student_geometry(student: Student) -> dict[str, Any] | None:
    trunk: Any = student.trunk
    if type(trunk) is not VisionTransformer or not isinstance(trunk.norm_pre, nn.LayerNorm):
        return None
    vit: Any = trunk
    act = activation_name(vit.blocks[0].mlp.act)
    if act not in _ACTIVATIONS:
        return None
    return {
        "image_size": int(vit.patch_embed.img_size[0]),
        "patch_size": int(vit.patch_embed.patch_size[0]),
        "width": int(vit.embed_dim),
        "depth": len(vit.blocks),
        "num_heads": int(vit.blocks[0].attn.num_heads),
        "mlp_ratio": vit.blocks[0].mlp.fc1.out_features / vit.embed_dim,
        "act": act,
        "embed_dim": student.proj.out_features,
    }


def activation_name(module: nn.Module) -> str | None:
    """gelu, gelu_tanh or quick_gelu, as student specs call them; None of any other module."""
    if isinstance(module, nn.GELU):
        return "gelu" if module.approximate == "none" else "gelu_tanh"
    return "quick_gelu" if type(module).__name__ == "QuickGELU" else None


def _in_student_layout(tower: nn.Module) -> dict[str, Tensor]:
    """The tower's weights under a student's names; open_clip to timm."""
    if isinstance(tower, Student):
        return tower.state_dict()
    renames = (
        ("conv1", "patch_embed.proj"), ("positional_embedding", "pos_embed"),
        ("class_embedding", "cls_token"), ("transformer.resblocks.", "blocks."),
        ("ln_pre", "norm_pre"), ("ln_post", "norm"), ("ln_", "norm"), ("in_proj_", "qkv."),
        ("out_proj", "proj"), ("mlp.c_fc", "mlp.fc1"), ("mlp.c_proj", "mlp.fc2"),
    )  # fmt: skip
    weights = {}
    for key, value in tower.state_dict().items():
        if key == "proj":
            weights["proj.weight"] = value.T
            continue
        for old, new in renames:
            key = key.replace(old, new)
        if key == "cls_token":
            value = value[None, None]
        elif key == "pos_embed":
            value = value[None]
        weights["trunk." + key] = value
    return weights
