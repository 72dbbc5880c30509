"""A text student on disk: what is saved is loaded, and nothing else is."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from dimefm_edge.errors import CheckpointError
from dimefm_edge.students.text import TextSpec, TextStudent
from dimefm_edge.students.text_checkpoint import (
    TEXT_DIR,
    has_text_student,
    load_text_student,
    save_text_student,
    save_tokenizer,
)
from dimefm_edge.teacher import SAMPLE_DIR
from dimefm_edge.tokenizer import load_tokenizer

SPEC = TextSpec(
    "text-w16-d1-e4", vocab_size=426, context_length=32, width=16, depth=1, num_heads=2,
    token_dim=4, embed_dim=8,
)  # fmt: skip
TOKENIZER = load_tokenizer(SAMPLE_DIR / "tokenizer.json")
SENTENCES = ["a red ball", "two small blue rings on a green ground"]


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    (tmp_path / TEXT_DIR).mkdir()
    save_tokenizer(tmp_path / TEXT_DIR, TOKENIZER)
    save_text_student(
        tmp_path / TEXT_DIR / "checkpoint.safetensors", TextStudent(SPEC), TOKENIZER,
        {"teacher": "sample", "logit_scale": "87.5"},
    )  # fmt: skip
    return tmp_path


def test_what_is_saved_is_loaded(run_dir: Path) -> None:
    assert has_text_student(run_dir)
    assert not has_text_student(run_dir / TEXT_DIR)
    loaded = load_text_student(run_dir)
    assert (loaded.spec, loaded.name, loaded.embed_dim) == (SPEC, SPEC.name, 8)
    assert (loaded.logit_scale, loaded.metadata["teacher"]) == (87.5, "sample")
    assert not loaded.student.training
    torch.manual_seed(0)
    tokens = torch.from_numpy(TOKENIZER(SENTENCES))
    with torch.no_grad():
        wanted = TextStudent(SPEC).eval()(tokens)
        found = loaded.text_tower(torch.from_numpy(loaded.tokenize(SENTENCES)))
    assert torch.equal(found, wanted)


def _resaved(path: Path, **header: str) -> None:
    from safetensors import safe_open

    with safe_open(path, framework="pt") as reader:
        former = reader.metadata()
    save_file(load_file(path), path, metadata={**former, **header})


@pytest.mark.parametrize(
    ("header", "message"),
    [
        ({"format": "dimefm_edge.student/1"}, "not a text student of dimefm_edge"),
        ({"spec": "{}"}, "its weights and its description disagree"),
        ({"spec": json.dumps({**SPEC.to_dict(), "width": 10**9})}, "width cannot be 1000000000"),
        ({"spec": json.dumps({**SPEC.to_dict(), "depth": 2})}, "description disagree"),
        ({"metadata": '{"logit_scale": "x"}'}, "description disagree"),
        ({"tokenizer_sha256": "0" * 64}, "is not the tokenizer that .* was trained with"),
    ],
)
def test_a_file_that_disagrees_with_itself_is_refused(
    run_dir: Path, header: dict[str, str], message: str
) -> None:
    _resaved(run_dir / TEXT_DIR / "checkpoint.safetensors", **header)
    with pytest.raises(CheckpointError, match=message) as caught:
        load_text_student(run_dir)
    assert caught.value.hint


def test_missing_and_cut_files_are_named(run_dir: Path, tmp_path: Path) -> None:
    folder = run_dir / TEXT_DIR
    tokenizer = (folder / "tokenizer.json").read_bytes()
    (folder / "tokenizer.json").unlink()
    with pytest.raises(CheckpointError, match=r"no tokenizer at .*tokenizer\.json"):
        load_text_student(run_dir)
    (folder / "tokenizer.json").write_bytes(tokenizer)
    path = folder / "checkpoint.safetensors"
    path.write_bytes(path.read_bytes()[:500])
    with pytest.raises(CheckpointError, match="truncated"):
        load_text_student(run_dir)
    with pytest.raises(CheckpointError, match="no checkpoint at"):
        load_text_student(tmp_path / "nowhere")
