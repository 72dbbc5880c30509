"""Converted tokenizers give open_clip's ids: on real sentences and on any Unicode."""

from __future__ import annotations

import gzip
import itertools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from open_clip.tokenizer import HFTokenizer, SimpleTokenizer

from dimefm_edge.errors import ExportError
from dimefm_edge.export.tokenizers import PROBES, convert_tokenizer
from dimefm_edge.tokenizer import Tokenizer, load_tokenizer

TEXT_DIR = Path(__file__).parents[4] / "shared" / "data" / "text"
CLIP = open_clip.get_tokenizer("ViT-B-32")


@pytest.fixture(scope="module")
def converted() -> Tokenizer:
    return convert_tokenizer(CLIP, name="ViT-B-32:random")


def real_sentences(step: int) -> Iterator[str]:
    paths = sorted(TEXT_DIR.glob("*.gz"))
    if not paths:
        pytest.skip(f"no sentences at {TEXT_DIR}")
    for path in paths:
        with gzip.open(path, "rt", encoding="utf-8") as stream:
            yield from itertools.islice(stream, 0, None, step)


def check(converted: Tokenizer, sentences: list[str], tokenize: Any = CLIP) -> None:
    wanted = tokenize(sentences).numpy()
    found = converted(sentences)
    assert found.dtype == np.int64
    np.testing.assert_array_equal(found, wanted)


def test_equal_on_a_sample_of_real_sentences(converted: Tokenizer) -> None:
    sentences = list(real_sentences(100))
    assert len(sentences) > 2_600
    check(converted, sentences)


@pytest.mark.slow
def test_equal_on_all_real_sentences(converted: Tokenizer) -> None:
    count, sentences = 0, real_sentences(1)
    while chunk := list(itertools.islice(sentences, 8192)):
        check(converted, chunk)
        count += len(chunk)
    assert count == 267_585


words = st.sampled_from(
    ["it's", "I'LL", "don't", "x'\u017f", "'S", "<start_of_text>", "<end_of_text>",
     "!<end_of_text>", "<START_of_text>", "<\u017ftart_of_text>", "&lt;", "&amp;amp;", "&#xFB06;",
     "&#xD800;", "&copy", "🏴‍☠️", "👩🏽‍🚀", "שלום", "مرحبا", "\u202e", "ﬁ", "\uff26\uff55\uff4c",
     "İ", "Σς", "ß", "\u212a", "\u0345", "\x1b[31m", "\x85", "\u2028", "\ufeff", "Ã©", "â€œ",
     "日本", "१२", "Ⅷ", "½", "Ĳ", "\u1df1", "\U00010ec5", "\U00012550", "_", "a_b", "</w>",
     "!" * 30, "a" * 90]
)  # fmt: skip
texts = st.lists(st.one_of(st.text(max_size=12), words), max_size=12).flatmap(
    lambda parts: st.sampled_from([" ", "", "\n", "\t "]).map(lambda glue: glue.join(parts))
)


@settings(max_examples=200, deadline=None)
@given(sentences=st.lists(texts, min_size=1, max_size=4))
def test_equal_on_any_unicode(converted: Tokenizer, sentences: list[str]) -> None:
    check(converted, sentences)


@settings(max_examples=80, deadline=None)
@given(text=texts)
def test_equal_where_punctuation_is_dropped(text: str) -> None:
    check(CANONICAL, [text], CANONICAL_CLIP)


CANONICAL_CLIP = SimpleTokenizer(context_length=16, clean="canonicalize")
CANONICAL = convert_tokenizer(CANONICAL_CLIP, name="canonical")


def test_start_end_truncation_and_padding(converted: Tokenizer) -> None:
    rows = converted(["", "a dog", "dog " * 200])
    start, end = CLIP.sot_token_id, CLIP.eot_token_id
    assert rows.shape == (3, 77)
    assert rows[0, :2].tolist() == [start, end]
    assert not rows[0, 2:].any()
    assert rows[1, :4].tolist() == [start, 320, 1929, end]
    assert rows[2, -1] == end
    assert (rows[2, 1:-1] == 1929).all()
    assert converted([]).shape == (0, 77)


def test_the_file_is_all_that_is_needed(converted: Tokenizer, tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.json"
    path.write_bytes(converted.to_bytes())
    assert path.stat().st_size < 3 * 2**20
    loaded = load_tokenizer(path, converted.spec)
    check(loaded, list(PROBES))
    assert convert_tokenizer(loaded, name="again") is loaded


@pytest.mark.parametrize(
    ("tokenize", "message"),
    [
        (lambda sentences: None, "its tokenizer is a function"),
        (SimpleTokenizer(reduction_mask="shuffle"), "it drops words of long sentences by chance"),
        (SimpleTokenizer(clean="whitespace"), "it keeps upper case"),
        (SimpleTokenizer(additional_special_tokens=["<x>"]), "it has special tokens of its own"),
    ],
)
def test_what_cannot_be_converted_is_named(tokenize: Any, message: str) -> None:
    with pytest.raises(ExportError) as caught:
        convert_tokenizer(tokenize, name="my-clip")
    assert f"the tokenizer of my-clip cannot run without open_clip: {message}" in str(caught.value)
    assert "--image-only" in str(caught.value.hint)


def test_a_cleaning_of_its_own_is_refused() -> None:
    tokenizer = SimpleTokenizer()
    tokenizer.clean_fn = str.upper
    with pytest.raises(ExportError, match="it cleans sentences in a way of its own"):
        convert_tokenizer(tokenizer, name="shouting")


def test_other_ids_are_noticed() -> None:
    class Reversed(SimpleTokenizer):
        def encode(self, text: str) -> list[int]:
            return super().encode(text)[::-1]

    with pytest.raises(ExportError, match=r"gives other ids for 'a photo of a dog\.'.* differ"):
        convert_tokenizer(Reversed(), name="reversed")


# ----------------------------------------------------------------------- Hugging Face


@pytest.fixture(scope="module")
def hugging_face_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small fast tokenizer of the unigram kind, as SigLIP has, trained here."""
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    from tokenizers import Tokenizer as JsonTokenizer
    from tokenizers import models, pre_tokenizers, processors, trainers

    inner = JsonTokenizer(models.Unigram())
    inner.pre_tokenizer = pre_tokenizers.Metaspace()
    trainer = trainers.UnigramTrainer(
        vocab_size=200, special_tokens=["<pad>", "</s>", "<unk>", "[SEP]"], unk_token="<unk>"
    )
    inner.train_from_iterator(["a photo of a dog", "two cats sat on the mat"] * 20, trainer)
    inner.post_processor = processors.TemplateProcessing(
        single="$A [SEP] </s>", special_tokens=[("</s>", 1), ("[SEP]", 3)]
    )
    folder = tmp_path_factory.mktemp("hugging_face")
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="<pad>", eos_token="</s>", unk_token="<unk>",
        sep_token="[SEP]",
    )  # fmt: skip
    fast.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("clean", ["whitespace", "lower", "canonicalize"])
@pytest.mark.parametrize("strip", [False, True])
def test_hugging_face_tokenizers(hugging_face_dir: Path, clean: str, strip: bool) -> None:
    tokenize = HFTokenizer(
        str(hugging_face_dir), context_length=12, clean=clean, strip_sep_token=strip
    )
    converted = convert_tokenizer(tokenize, name="siglip")
    assert converted.spec.to_dict() == {
        "context_length": 12, "clean": clean, "zeroed_id": 3 if strip else None,
    }  # fmt: skip
    check(converted, [*PROBES, "A dog, two CATS_&amp;_mats!", "dog " * 40, "[SEP] dog"], tokenize)
    assert (converted(["a dog"]) == 3).any() != strip


def test_hugging_face_modes_that_only_open_clip_has(hugging_face_dir: Path) -> None:
    tokenize = HFTokenizer(str(hugging_face_dir), context_length=12, tokenizer_mode="clips")
    with pytest.raises(ExportError, match="its mode 'clips' is open_clip's own"):
        convert_tokenizer(tokenize, name="clips")


def test_the_file_names_no_special_tokens_that_words_could_hit(converted: Tokenizer) -> None:
    values = json.loads(converted.to_bytes())
    assert values["added_tokens"] == []
    check(converted, ["!<start_of_text>", "x<end_of_text>y", " <end_of_text> ", "<end_OF_text>"])
