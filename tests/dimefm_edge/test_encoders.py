"""A module as a function of pixels: the runtime's normalisation, no gradients, any memory."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from dimefm_edge.encoders import Normalised, module_encoder
from dimefm_edge.preprocess import PreprocessSpec, normalise_pixels
from dimefm_edge.students import build_student, hybrid_spec, vit_spec

VIT = vit_spec(image_size=16, embed_dim=8, patch_size=8, width=32, depth=2, num_heads=2)
HYBRID = hybrid_spec(image_size=32, embed_dim=8, width=8, depth=(1, 1, 1, 1))
SPEC = PreprocessSpec(image_size=16, mean=(0.1, 0.5, 0.9), std=(0.2, 0.3, 0.4))


def pixels(count: int, side: int = 16) -> np.ndarray:
    return np.random.default_rng(count).integers(0, 256, (count, side, side, 3), dtype=np.uint8)


class Flat(nn.Module):
    """Answers with its own input, so that the test sees it."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return (images * self.scale).flatten(1)


def test_the_module_is_given_what_the_runtime_gives_a_graph():
    answer = module_encoder(Flat(), SPEC)(pixels(150))  # more than one piece
    wanted = normalise_pixels(pixels(150), SPEC).reshape(150, -1)
    wanted /= np.linalg.norm(wanted, axis=1, keepdims=True)
    assert answer.shape == wanted.shape
    np.testing.assert_allclose(answer, wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("spec", [VIT, HYBRID], ids=["vit", "hybrid"])
def test_a_student_answers_as_when_called_by_hand(spec):
    torch.manual_seed(0)
    student = build_student(spec).eval()
    preprocess = PreprocessSpec(image_size=spec.image_size)
    images = pixels(5, spec.image_size)
    answer = module_encoder(student, preprocess)(images)
    with torch.no_grad():
        wanted = student(torch.from_numpy(normalise_pixels(images, preprocess))).numpy()
    assert answer.dtype == np.float32
    np.testing.assert_allclose(answer, wanted, atol=2e-5)
    np.testing.assert_allclose(np.linalg.norm(answer, axis=1), 1, atol=1e-4)
    assert np.ptp(answer, axis=0).max() > 1e-3  # the images are told apart
    for place in (0, 4):  # and each is embedded by itself
        alone = module_encoder(student, preprocess)(images[place : place + 1])
        np.testing.assert_allclose(alone[0], answer[place], atol=2e-5)


def test_read_only_and_strided_pixels_are_taken_and_left_as_they_are(tmp_path):
    images = pixels(4)
    encode = module_encoder(Flat(), SPEC)
    wanted = encode(images)
    images.tofile(tmp_path / "pixels.u8")
    mapped = np.memmap(tmp_path / "pixels.u8", np.uint8, "r", shape=images.shape)
    np.testing.assert_array_equal(encode(mapped), wanted)
    np.testing.assert_array_equal(encode(mapped[::-1])[::-1], wanted)
    np.testing.assert_array_equal(mapped, images)


def test_nothing_is_kept_for_a_backward_pass():
    module = Flat()
    seen = []
    module.register_forward_hook(lambda _m, _i, output: seen.append(output.requires_grad))
    module_encoder(module, SPEC)(pixels(2))
    assert seen == [False]
    assert module.scale.requires_grad  # and the module can go on training
    module(torch.ones(1, 3, 16, 16)).sum().backward()
    assert module.scale.grad is not None


def test_weights_changed_by_training_are_seen():
    module = Flat()
    encode = module_encoder(module, SPEC)
    before = encode(pixels(1))
    with torch.no_grad():
        module.scale.mul_(-2)
    np.testing.assert_allclose(encode(pixels(1)), -before, rtol=1e-6)


def test_bfloat16_answers_come_back_as_float32():
    class Half(Flat):
        def forward(self, images: torch.Tensor) -> torch.Tensor:
            return super().forward(images).bfloat16()

    answer = module_encoder(Half(), SPEC)(pixels(2))
    assert answer.dtype == np.float32
    np.testing.assert_allclose(answer, module_encoder(Flat(), SPEC)(pixels(2)), rtol=0.01)


@pytest.mark.parametrize("is_training", [False, True])
def test_a_normalised_tower_keeps_the_mode_of_what_it_wraps(is_training):
    tower = nn.Sequential(nn.Flatten(), nn.BatchNorm1d(12)).train(is_training)
    wrapped = Normalised(tower)
    assert wrapped.training == tower[1].training == is_training
    wrapped.train(wrapped.training)  # as whoever leaves it as it was
    assert tower[1].training == is_training
    answer = wrapped(torch.randn(4, 3, 2, 2))
    torch.testing.assert_close(answer.norm(dim=1), torch.ones(4))
