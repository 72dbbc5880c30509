"""The table of tokens: as the tokenizer gives them, row by row, written once."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from dimefm_edge.data import tokens as tokens_module
from dimefm_edge.data.sentences import open_sentences
from dimefm_edge.data.tokens import open_tokens, write_tokens
from dimefm_edge.errors import DataError
from dimefm_edge.teacher import SAMPLE_DIR
from dimefm_edge.tokenizer import load_tokenizer

VOCAB = 426
TOKENIZER = load_tokenizer(SAMPLE_DIR / "tokenizer.json")
POOL = open_sentences(["scenes:50"])


def test_rows_are_the_tokenizers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokens_module, "_SENTENCES_PER_CALL", 7)
    table = write_tokens(POOL, TOKENIZER, tmp_path, vocab_size=VOCAB)
    rows = np.asarray([49, 0, 13, 13])
    found = table.gather(rows)
    np.testing.assert_array_equal(found, TOKENIZER(list(POOL))[rows])
    assert found.dtype == np.int64
    assert len(table) == 50
    assert [p.name for p in tmp_path.iterdir()] == [table.path.name]
    assert open_tokens(POOL, TOKENIZER, tmp_path, vocab_size=VOCAB) == table


def test_a_table_that_is_there_is_not_written_again(tmp_path: Path) -> None:
    table = write_tokens(POOL, TOKENIZER, tmp_path, vocab_size=VOCAB)
    before = table.path.stat().st_mtime_ns
    assert write_tokens(POOL, TOKENIZER, tmp_path, vocab_size=VOCAB) == table
    assert table.path.stat().st_mtime_ns == before
    other = write_tokens(open_sentences(["scenes:51"]), TOKENIZER, tmp_path, vocab_size=VOCAB)
    assert other.path != table.path


def test_ids_beyond_16_bits_are_kept(tmp_path: Path) -> None:
    small = write_tokens(POOL, TOKENIZER, tmp_path, vocab_size=VOCAB)
    large = write_tokens(POOL, TOKENIZER, tmp_path, vocab_size=2**17)
    assert large.path.stat().st_size == 2 * small.path.stat().st_size
    np.testing.assert_array_equal(large.gather(np.arange(50)), small.gather(np.arange(50)))


def test_damage_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="there are no tokens at"):
        open_tokens(POOL, TOKENIZER, tmp_path, vocab_size=VOCAB)
    table = write_tokens(POOL, TOKENIZER, tmp_path, vocab_size=VOCAB)
    table.path.write_bytes(table.path.read_bytes()[:-1])
    with pytest.raises(DataError, match="is truncated") as caught:
        write_tokens(POOL, TOKENIZER, tmp_path, vocab_size=VOCAB)
    assert "delete it" in str(caught.value.hint)


def test_a_tokenizer_of_another_tower_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"gives token \d+, and the text tower knows 20"):
        write_tokens(POOL, TOKENIZER, tmp_path, vocab_size=20)
    assert list(tmp_path.iterdir()) == []
