"""Hybrid and convolutional students: timm's FastViT (arXiv 2303.14189), width and depth settable.

Convolutional stages of re-parametrisable branches; hybrids have attention in the last stage,
where tokens are few, and convnets have none, as FastViT-T8 to S12. Chosen over the others in timm
because it is MobileCLIP's image tower, becomes plain convolutions for export, and needs nothing
but convolution, matmul and softmax.

Mixers are FastViT's, 3 x 3, or larger (`-k5` in a name). Activations are its GELUs, or ReLUs
(`-relu`), which runtimes take into the convolution before them and for which int8 need not go back
to float.

The stem's stride follows the image: FastViT's own 32x reduction leaves 2 x 2 positions of a
64 px image, so small images are reduced by 16 or 8 instead, to 4 x 4 or more.
"""

from __future__ import annotations

from functools import partial
from typing import Any

from timm.models.fastvit import FastVit, MobileOneBlock, RepConditionalPosEnc
from timm.utils.model import reparameterize_model
from torch import nn

from dimefm_edge.errors import ConfigError, lookup
from dimefm_edge.students import StudentSpec
from dimefm_edge.students.student import Student

MIN_IMAGE_SIZE = 32
_HEAD_DIM = 32
_ACTIVATIONS: dict[str, type[nn.Module]] = {"relu": nn.ReLU, "gelu": nn.GELU}
_LAYER_SCALE = (
    0.1  # FastViT's 1e-5 is for 300 epochs; CaiT (arXiv 2103.17239) uses 0.1 when shallow
)


def build_hybrid(spec: StudentSpec, *, is_merged: bool = False) -> Student:
    """Build a student of family `hybrid` or `convnet` with random weights.

    Args:
        spec: What to build.
        is_merged: Build what `reparameterise` would make of it, without the branches.

    Raises:
        ConfigError: If the image is too small, or a setting cannot be.
    """
    width, depth = spec.args["width"], tuple(spec.args["depth"])
    if spec.image_size < MIN_IMAGE_SIZE:
        raise ConfigError(
            f"student {spec.name}: hybrids and convnets need images of {MIN_IMAGE_SIZE} px or "
            f"more, "
            f"got {spec.image_size}",
            hint="--student vit",
        )
    if len(depth) != 4 or min(depth) < 1:
        raise ConfigError(f"student {spec.name}: depth must be four positive counts, got {depth}")
    if width < 4 or (8 * width) % _HEAD_DIM:
        raise ConfigError(f"student {spec.name}: width must be a multiple of 4, got {width}")
    kernel = spec.args.get("kernel", 3)
    if kernel % 2 == 0:
        raise ConfigError(f"student {spec.name}: the mixers' kernel must be odd, got {kernel}")
    is_small = spec.image_size < 128
    has_attention = spec.family == "hybrid"
    pos_emb: Any = partial(RepConditionalPosEnc, spatial_shape=(7, 7)) if has_attention else None
    act = lookup(_ACTIVATIONS, spec.args.get("act", "gelu"), kind="activation")
    trunk = FastVit(
        layers=depth,
        embed_dims=(width, 2 * width, 4 * width, 8 * width),
        mlp_ratios=(3, 3, 3, 3),
        token_mixers=(*["repmixer"] * 3, "attention" if has_attention else "repmixer"),
        pos_embs=(None, None, None, pos_emb),
        repmixer_kernel_size=kernel,
        down_patch_size=5 if is_small else 7,
        layer_scale_init_value=_LAYER_SCALE,
        act_layer=act,
        num_classes=0,
        inference_mode=is_merged,
    )
    trunk.stem = _stem(width, stem_stride(spec.image_size), act, is_merged=is_merged)
    return Student(trunk, num_features=trunk.head_hidden_size, embed_dim=spec.embed_dim)


def stem_stride(image_size: int) -> int:
    """Reduction of the stem: 4 as in FastViT from 128 px on, 2 from 64 px, else 1."""
    return 4 if image_size >= 128 else 2 if image_size >= 64 else 1


def reparameterise(student: nn.Module) -> nn.Module:
    """A copy in eval mode whose branches are merged into plain convolutions: same answers.

    Students without branches come back as plain copies.
    """
    merged: nn.Module = reparameterize_model(student, inplace=False)
    return merged.eval()


def _stem(width: int, stride: int, act: type[nn.Module], *, is_merged: bool) -> nn.Sequential:
    first, second = {4: (2, 2), 2: (2, 1), 1: (1, 1)}[stride]
    block = partial(MobileOneBlock, act_layer=act, inference_mode=is_merged)
    return nn.Sequential(
        block(3, width, kernel_size=3, stride=first),
        block(width, width, kernel_size=3, stride=second, group_size=1),
        block(width, width, kernel_size=1, stride=1),
    )
