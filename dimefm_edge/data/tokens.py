"""Tokens of a pool of sentences in one memory-mapped file: tokenised once, gathered by row."""

from __future__ import annotations

import functools
import hashlib
import itertools
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from dimefm_edge.data.sentences import SentencePool
from dimefm_edge.errors import DataError
from dimefm_edge.progress import counting
from dimefm_edge.tokenizer import Tokenizer

_SENTENCES_PER_CALL = 4096


@dataclass(frozen=True)
class TokenTable:
    """(N, L) token ids in a file; `fingerprint` tells sentences and tokenizer."""

    path: Path
    fingerprint: str
    num_rows: int
    context_length: int
    dtype: npt.DTypeLike

    def __len__(self) -> int:
        return self.num_rows

    def gather(self, rows: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """(B,) rows -> (B, L) int64, a copy."""
        return np.take(self._table, rows, axis=0).astype(np.int64)

    @functools.cached_property
    def _table(self) -> npt.NDArray[Any]:
        shape = (self.num_rows, self.context_length)
        return np.memmap(self.path, self.dtype, "r", shape=shape)


def write_tokens(
    sentences: SentencePool, tokenizer: Tokenizer, folder: Path, *, vocab_size: int
) -> TokenTable:
    """Tokenise a pool into a file, or find the one that is there.

    Args:
        sentences: All of them, in order.
        tokenizer: What the student takes.
        folder: Gets the file, whose name tells the sentences and the tokenizer.
        vocab_size: Tokens that the student knows.

    Raises:
        DataError: If a token is unknown to the student, the sentences changed while they were
            read, or the file is not as long as it should be.
    """
    table = _describe(sentences, tokenizer, folder, vocab_size)
    if not table.path.is_file():
        part = table.path.with_name(f".{table.path.name}.{os.getpid()}.part")
        try:
            folder.mkdir(parents=True, exist_ok=True)
            _fill(part, sentences, tokenizer, table, vocab_size)
            part.replace(table.path)
        finally:
            part.unlink(missing_ok=True)
    return _checked(table)


def open_tokens(
    sentences: SentencePool, tokenizer: Tokenizer, folder: Path, *, vocab_size: int
) -> TokenTable:
    """Open what `write_tokens` wrote.

    Raises:
        DataError: If it is not there, or not as long as it should be.
    """
    return _checked(_describe(sentences, tokenizer, folder, vocab_size))


def _describe(
    sentences: SentencePool, tokenizer: Tokenizer, folder: Path, vocab_size: int
) -> TokenTable:
    dtype = "<u2" if vocab_size <= 2**16 else "<i4"
    parts = (sentences.fingerprint.encode(), tokenizer.to_bytes(), repr(tokenizer.spec).encode())
    digest = hashlib.sha256(b"\0".join((*parts, dtype.encode()))).hexdigest()[:16]
    path = folder / f"{digest}.tokens"
    return TokenTable(path, digest, len(sentences), tokenizer.spec.context_length, dtype)


def _fill(
    path: Path, sentences: SentencePool, tokenizer: Tokenizer, table: TokenTable, vocab_size: int
) -> None:
    stream, done = iter(sentences), 0
    with path.open("wb") as file, counting("tokenise sentences", len(sentences)) as advance:
        while batch := list(itertools.islice(stream, _SENTENCES_PER_CALL)):
            tokens = tokenizer(batch)
            if tokens.max() >= vocab_size or tokens.min() < 0:
                raise DataError(
                    f"the tokenizer gives token {tokens.max()}, and the text tower knows "
                    f"{vocab_size}: they do not belong together"
                )
            file.write(np.ascontiguousarray(tokens, table.dtype).data)
            done += len(batch)
            advance(len(batch))
        file.flush()
        os.fsync(file.fileno())
    if done != len(sentences):
        raise DataError(
            f"{done} sentences were read where {len(sentences)} had been counted",
            hint="leave their files alone and run again",
        )


def _checked(table: TokenTable) -> TokenTable:
    if not table.path.is_file():
        raise DataError(f"there are no tokens at {table.path}", hint="run the same command again")
    size = table.path.stat().st_size
    expected = len(table) * table.context_length * np.dtype(table.dtype).itemsize
    if size != expected:
        raise DataError(
            f"{table.path} is truncated: {size} of {expected} bytes",
            hint="delete it: it is made again",
        )
    return table
