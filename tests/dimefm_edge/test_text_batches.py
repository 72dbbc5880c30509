"""A text student's batches: functions of (seed, step), rows and tokens that belong together."""

from __future__ import annotations

import dataclasses
import importlib.util
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from dimefm_edge.data.sentences import open_sentences
from dimefm_edge.distributed import Ranks
from dimefm_edge.teacher import SAMPLE_DIR
from dimefm_edge.text_batches import TextBatchPlan, TextData
from dimefm_edge.tokenizer import load_tokenizer

_SPEC = importlib.util.spec_from_file_location(
    "distill_case", Path(__file__).with_name("distill_case.py")
)
assert _SPEC is not None
assert _SPEC.loader is not None
case = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(case)

TRAIN = dataclasses.replace(case.TRAIN, seed=5)


@pytest.fixture
def data(tmp_path: Path) -> TextData:
    return case.make_text_data(tmp_path / "store")


def plan_of(data: TextData, rank: int = 0, world_size: int = 1) -> TextBatchPlan:
    return TextBatchPlan(data, TRAIN, Ranks(rank, world_size), num_images=10)


def test_tokens_and_embeddings_are_of_the_same_sentences(data: TextData) -> None:
    batch = plan_of(data).batch(3)
    sentences = list(open_sentences([f"scenes:{case.NUM_TEXTS}"]))
    tokenizer = load_tokenizer(SAMPLE_DIR / "tokenizer.json")
    tokens = tokenizer([sentences[row] for row in batch.text_rows])
    length = batch.tokens.shape[1]
    assert length == int(tokens.argmax(1).max()) + 1 < 32
    np.testing.assert_array_equal(batch.tokens, tokens[:, :length])
    assert not tokens[:, length:].any()
    np.testing.assert_array_equal(
        batch.text_embeds, data.texts.gather(batch.text_rows).astype(np.float32)
    )
    np.testing.assert_array_equal(
        batch.image_embeds, data.images.gather(batch.image_rows).astype(np.float32)
    )
    assert batch.image_embeds.shape == (10, case.EMBED_DIM)


def test_a_batch_is_a_function_of_seed_and_step(data: TextData) -> None:
    plan = plan_of(data)
    again = list(plan_of(data).batches(2, 6))
    for step, batch in zip(range(2, 6), again, strict=True):
        alone = plan.batch(step)
        for name in ("tokens", "text_embeds", "image_embeds"):
            assert torch.equal(getattr(batch, name), getattr(alone, name)), name
    rows = np.concatenate([plan.batch(step).text_rows for step in range(50)])  # 16 epochs of 50
    assert all(sorted(e) == list(range(50)) for e in rows.reshape(16, 50))
    images = np.concatenate([plan.batch(step).image_rows for step in range(50)])
    assert len(set(images.tolist())) > 80  # of 90: drawn anew in every step


def test_ranks_split_the_sentences_and_share_the_embeddings(data: TextData) -> None:
    whole = plan_of(data).batch(1)
    halves = [plan_of(data, rank, 2).batch(1) for rank in (0, 1)]
    for rank, half in enumerate(halves):
        part = whole.tokens[8 * rank : 8 * rank + 8, : half.tokens.shape[1]]
        assert torch.equal(half.tokens, part)
        assert torch.equal(half.text_embeds, whole.text_embeds)
        assert torch.equal(half.image_embeds, whole.image_embeds)


def test_chosen_rows_only(data: TextData) -> None:
    chosen = dataclasses.replace(
        data, text_rows=np.asarray([3, 17, 40]), image_rows=np.asarray([1, 2, 88])
    )
    batch = plan_of(chosen).batch(0)
    assert set(batch.text_rows) == {3, 17, 40}
    assert set(batch.image_rows) <= {1, 2, 88}
    assert set(chosen.extras()) == {"tokens", "text_rows", "image_rows"}
    assert set(data.extras()) == {"tokens"}


def test_a_batch_can_be_saved_to_look_at(data: TextData, tmp_path: Path) -> None:
    batch = plan_of(data).batch(0)
    batch.save(tmp_path / "batch.safetensors")
    found = load_file(tmp_path / "batch.safetensors")
    assert torch.equal(found["tokens"], batch.tokens)
    np.testing.assert_array_equal(found["text_rows"], batch.text_rows)
