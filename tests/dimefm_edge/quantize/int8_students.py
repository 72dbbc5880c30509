"""Small students with weights and BatchNorm statistics that are not those of a fresh module."""

from __future__ import annotations

import copy
import functools

import torch
from torch import Tensor, nn

from dimefm_edge.data.scenes import scene_image
from dimefm_edge.preprocess import PreprocessSpec, preprocess_images
from dimefm_edge.quantize.deployed import deployed_form
from dimefm_edge.students import StudentSpec, build_student, hybrid_spec, vit_spec

SIDE = 32
AVX2, ARM, TENSORRT = "onnxruntime-x86-avx2", "onnxruntime-arm", "tensorrt"
SPECS = {
    "vit": vit_spec(image_size=SIDE, embed_dim=24, patch_size=8, width=64, depth=2, num_heads=2),
    "hybrid": hybrid_spec(image_size=SIDE, embed_dim=24, width=16, depth=(1, 1, 1, 1)),
    "resnet": StudentSpec("timm:resnet10t", "timm", SIDE, 24, {"model": "resnet10t"}),
    "mobilenet": StudentSpec(
        "timm:mobilenetv3_small_050", "timm", SIDE, 24, {"model": "mobilenetv3_small_050"}
    ),
}


@functools.cache
def student(family: str) -> nn.Module:
    """In eval mode; not to be changed."""
    torch.manual_seed(0)
    made = build_student(SPECS[family]).train()
    with torch.no_grad():
        for _ in range(3):
            made(images(32))  # BatchNorm sees something
        for name, value in made.named_parameters():
            if name.endswith(("norm.weight", "bn.weight", "bn1.weight", "bn2.weight")):
                value.uniform_(0.5, 1.5)
    return made.eval()


@functools.cache
def _deployed(family: str) -> nn.Module:
    return deployed_form(student(family), SIDE)


def deployed(family: str) -> nn.Module:
    """A student's deployed form, to be changed at will."""
    return copy.deepcopy(_deployed(family))


@functools.cache
def images(count: int) -> Tensor:
    """(count, 3, 32, 32) preprocessed scenes."""
    pixels = [scene_image(index) for index in range(count)]
    return torch.from_numpy(preprocess_images(pixels, PreprocessSpec(SIDE)))


def cosines(one: Tensor, other: Tensor) -> Tensor:
    """(N,) of embeddings at unit length."""
    return (one * other).sum(dim=1)
