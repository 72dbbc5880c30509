"""The two sides of the loop: what a student takes, what its answer is worth, what a run is."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch

from dimefm_edge.config import LossConfig
from dimefm_edge.distributed import Ranks
from dimefm_edge.losses import distillation_loss, text_distillation_loss
from dimefm_edge.sides import ImageSide, TextSide, image_layout, side_of, training_inputs

_SPEC = importlib.util.spec_from_file_location(
    "distill_case", Path(__file__).with_name("distill_case.py")
)
assert _SPEC is not None
assert _SPEC.loader is not None
case = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(case)

CPU = torch.device("cpu")


def test_a_data_set_tells_its_side(tmp_path: Path) -> None:
    images, texts = case.make_data(tmp_path), case.make_text_data(tmp_path)
    image_side = side_of(images, LossConfig(), case.TRAIN, Ranks(), CPU)
    text_side = side_of(texts, case.TEXT_LOSS, case.TRAIN, Ranks(), CPU)
    assert isinstance(image_side, ImageSide)
    assert isinstance(text_side, TextSide)
    assert (image_side.unit, image_side.num_rows) == ("images", 90)
    assert (text_side.unit, text_side.num_rows) == ("sentences", 50)
    shared = {"images": "images-fixed", "texts": "texts-fixed", "teacher": "0" * 16}
    for side in (image_side, text_side):
        assert shared.items() <= side.identity().items()
    assert text_side.identity()["text_images"] == 10
    with pytest.raises(TypeError, match="LossConfig holds no losses for TextData"):
        side_of(texts, LossConfig(), case.TRAIN, Ranks(), CPU)


def test_an_image_sides_inputs_and_terms(tmp_path: Path) -> None:
    data = case.make_data(tmp_path)
    side = ImageSide(data, LossConfig(), case.TRAIN, Ranks(), CPU)
    (batch,) = side.batches(4, 5)
    images = side.inputs(batch)
    assert images.shape == (16, 3, case.SIDE, case.SIDE)
    assert images.abs().max() < 3  # normalised, where pixels reach 255
    student = torch.nn.functional.normalize(torch.randn(16, case.EMBED_DIM), dim=1)
    terms = side.terms(student, batch, slice(0, 16))
    wanted = distillation_loss(
        student, batch.image_embeds, batch.text_embeds, config=LossConfig(), logit_scale=20.0
    )
    assert terms.keys() == wanted.keys()
    torch.testing.assert_close(terms["loss"], wanted["loss"])


def test_a_text_sides_inputs_and_terms_of_a_piece_of_each_rank(tmp_path: Path) -> None:
    data = case.make_text_data(tmp_path)
    side = TextSide(data, case.TEXT_LOSS, case.TRAIN, Ranks(1, 2), CPU)
    (batch,) = side.batches(4, 5)
    assert side.inputs(batch).shape == (8, batch.tokens.shape[1])
    # The second half of each rank's eight: rows 4 to 7 and 12 to 15 of the global batch.
    rows = torch.tensor([4, 5, 6, 7, 12, 13, 14, 15])
    student = torch.nn.functional.normalize(torch.randn(8, case.EMBED_DIM), dim=1)
    terms = side.terms(student, batch, slice(4, 8))
    wanted = text_distillation_loss(
        student, batch.text_embeds[rows], batch.image_embeds,
        config=case.TEXT_LOSS, logit_scale=20.0,
    )  # fmt: skip
    torch.testing.assert_close(terms["loss"], wanted["loss"])


def test_channels_lie_last_on_gpus_only() -> None:
    assert image_layout(CPU) is torch.contiguous_format
    assert image_layout(torch.device("cuda")) is torch.channels_last


def test_training_inputs_are_what_the_loop_gives_a_student(tmp_path: Path) -> None:
    data = case.make_data(tmp_path)
    side = ImageSide(data, LossConfig(), case.TRAIN, Ranks(), CPU)
    wanted = [side.inputs(batch) for batch in side.batches(0, 3)]
    found = list(training_inputs(data, LossConfig(), case.TRAIN, 3, CPU))
    assert len(found) == 3
    for mine, theirs in zip(found, wanted, strict=True):
        torch.testing.assert_close(mine, theirs)
    everything = list(training_inputs(data, LossConfig(), case.TRAIN, 100, CPU))
    assert len(everything) == 6  # 90 images in batches of 16, once
