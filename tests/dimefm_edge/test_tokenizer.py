"""Tokenizer files: open_clip's cleaning to the letter, and nothing in a file is trusted."""

from __future__ import annotations

import copy
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from open_clip.tokenizer import get_clean_fn

from dimefm_edge.errors import CheckpointError, ConfigError, MissingExtraError, UnknownNameError
from dimefm_edge.teacher import SAMPLE_DIR
from dimefm_edge.tokenizer import MAX_TOKENIZER_BYTES, Tokenizer, TokenizerSpec, load_tokenizer

SAMPLE = json.loads((SAMPLE_DIR / "tokenizer.json").read_text(encoding="utf-8"))
LENGTH = 32


def cleaned(text: str, clean: str) -> str:
    """What a tokenizer with this cleaning is given."""
    from dimefm_edge.tokenizer import _CLEANERS

    return _CLEANERS[clean](text)


awkward = st.sampled_from(
    ["&amp;", "&lt;b&gt;", "&#x1F600;", "â€œ", "ﬃ", "\uff21", "\x1b[1m", "\r\n", "\x1c", "\x7f",
     "_", "…", "İ", "&AMP", "é", "e\u0301"]
)  # fmt: skip
texts = st.lists(st.text(max_size=8) | awkward, max_size=8).map("".join)


@settings(max_examples=300, deadline=None)
@given(text=texts, clean=st.sampled_from(["lower", "whitespace", "canonicalize"]))
def test_cleaning_is_open_clips(text: str, clean: str) -> None:
    assert cleaned(text, clean) == get_clean_fn(clean)(text)


@settings(max_examples=200)
@given(text=st.text(st.characters(min_codepoint=0x20, max_codepoint=0x7E), max_size=40))
def test_plain_ascii_needs_no_ftfy(text: str) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "ftfy", None)  # import ftfy raises ImportError
        if "&" not in text:
            found = cleaned(text, "lower")
        else:
            with pytest.raises(MissingExtraError, match="needs ftfy, which is not installed"):
                cleaned(text, "lower")
            return
    assert found == get_clean_fn("lower")(text)


@pytest.mark.parametrize("text", ["naïve", "a\tdog", "a &amp; b", "“a”"])
def test_without_ftfy_the_rest_is_refused_not_changed(
    text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer = Tokenizer(json.dumps(SAMPLE).encode(), TokenizerSpec(LENGTH, "lower"), where="t")
    assert tokenizer(["a dog", text]).shape == (2, LENGTH)
    monkeypatch.setitem(sys.modules, "ftfy", None)
    assert tokenizer(["a dog"]).shape == (1, LENGTH)
    with pytest.raises(MissingExtraError) as caught:
        tokenizer(["a dog", text])
    assert caught.value.hint == "pip install ftfy"


def test_a_file_of_its_own_length() -> None:
    tokenizer = load_tokenizer(SAMPLE_DIR / "tokenizer.json")
    assert tokenizer.spec == TokenizerSpec(LENGTH)
    rows = tokenizer(["a red circle", "", "red " * 100])
    assert rows.dtype == np.int64
    assert rows.shape == (3, LENGTH)
    assert (rows[:, 0] == 1).all()
    assert [int((row == 425).argmax()) for row in rows] == [4, 1, LENGTH - 1]
    assert tokenizer([]).shape == (0, LENGTH)
    assert tokenizer.to_bytes() == (SAMPLE_DIR / "tokenizer.json").read_bytes()


def test_a_token_may_be_zeroed() -> None:
    data = json.dumps(SAMPLE).encode()
    rows = Tokenizer(data, TokenizerSpec(LENGTH, "none", 425), where="t")(["a red circle"])
    assert 425 not in rows
    assert rows[0, :4].all()
    assert not rows[0, 4:].any()


@pytest.mark.parametrize(
    ("values", "kind", "message"),
    [
        ((0,), ConfigError, "context_length must be 1 to 4096, got 0"),
        ((5000,), ConfigError, "context_length must be 1 to 4096, got 5000"),
        ((77, "uper"), UnknownNameError, "unknown way to clean text 'uper'"),
    ],
)
def test_bad_specs(values: tuple[Any, ...], kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=message):
        TokenizerSpec(*values)


def changed(path: tuple[str | int, ...], value: Any) -> bytes:
    values: Any = copy.deepcopy(SAMPLE)
    place = values
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = value
    return json.dumps(values).encode()


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "t is not a tokenizer file of ours: "),
        (b"PK\x03\x04", "t is not a tokenizer file of ours: "),
        (b"[" * 100_000, "t is not a tokenizer file of ours: "),
        (json.dumps(SAMPLE).encode()[:-40], "t is not a tokenizer file of ours: "),
        (changed(("padding",), None), "it cuts to 32 tokens and pads to None"),
        (changed(("truncation",), None), "it cuts to None tokens and pads to 32"),
        (changed(("padding", "strategy"), "BatchLongest"), "it cuts to 32 tokens and pads to None"),
        (changed(("padding", "pad_to_multiple_of"), 8), "it cuts to 32 tokens and pads to 32"),
        (changed(("padding", "strategy", "Fixed"), 10**12), "pads to 1000000000000"),
        (changed(("post_processor", "special_tokens"), {}), "is not a tokenizer file of ours"),
        (changed(("model", "vocab"), {}), "is not a tokenizer file of ours"),
    ],
)
def test_damaged_and_hostile_files(data: bytes, message: str) -> None:
    with pytest.raises(CheckpointError) as caught:
        Tokenizer(data, where="t")
    assert message in str(caught.value)
    assert len(str(caught.value)) < 400


def test_a_length_that_no_text_tower_has() -> None:
    huge = copy.deepcopy(SAMPLE)
    huge["padding"]["strategy"]["Fixed"] = huge["truncation"]["max_length"] = 10**9
    with pytest.raises(CheckpointError, match="it pads to 1000000000 tokens; 1 to 4096 can be"):
        Tokenizer(json.dumps(huge).encode(), where="t")
    with pytest.raises(CheckpointError, match="it pads to 32 tokens, the text tower takes 77"):
        Tokenizer(json.dumps(SAMPLE).encode(), TokenizerSpec(77), where="t")


def test_missing_and_too_large_files(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"no tokenizer at .*none\.json: No such file"):
        load_tokenizer(tmp_path / "none.json")
    with (tmp_path / "huge.json").open("wb") as stream:
        stream.truncate(MAX_TOKENIZER_BYTES + 1)
    with pytest.raises(CheckpointError, match="it has 64 MiB, which none has"):
        load_tokenizer(tmp_path / "huge.json")


def places(value: Any, path: tuple[str | int, ...] = ()) -> list[tuple[str | int, ...]]:
    """Every place of a tokenizer's JSON but the words themselves."""
    if not isinstance(value, dict | list) or path[-1:] in (("vocab",), ("merges",)):
        return [path]
    inner: Any = value.items() if isinstance(value, dict) else enumerate(value)
    return [path, *(p for key, v in inner for p in places(v, (*path, key)))]


json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**63) | st.floats() | st.text(max_size=9),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=9), inner),
    max_leaves=5,
)


@settings(max_examples=150, deadline=None)
@given(path=st.sampled_from(places(SAMPLE)[1:]), value=json_values)
def test_any_value_anywhere_is_a_tokenizer_or_a_checkpoint_error(path: Any, value: Any) -> None:
    try:
        tokenizer = Tokenizer(changed(path, value), where="t")
        rows = tokenizer(["a red circle", "", "x " * 99, "é😀"])
    except CheckpointError:
        return
    assert rows.shape == (4, tokenizer.spec.context_length)
    assert rows.dtype == np.int64


@settings(max_examples=100, deadline=None)
@given(data=st.binary(max_size=200) | json_values.map(lambda v: json.dumps(v).encode()))
def test_any_bytes_are_a_checkpoint_error(data: bytes) -> None:
    with pytest.raises(CheckpointError):
        Tokenizer(data, where="t")
