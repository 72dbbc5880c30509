"""Sentences: pools that stream from text, JSON lines, CSV and Parquet files in constant memory."""

from __future__ import annotations

import csv
import functools
import gzip
import hashlib
import io
import json
import logging
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, cast

from dimefm_edge.data.image_pools import import_pyarrow, no_column
from dimefm_edge.data.labelled import open_classes
from dimefm_edge.data.scenes import DEFAULT_NUM_SENTENCES, scene_sentence
from dimefm_edge.data.sources import (
    PROMPTS,
    digest_lines,
    expand_source,
    scenes_count,
    walk_files,
)
from dimefm_edge.errors import DataError

logger = logging.getLogger(__name__)

_MAX_LINE_BYTES = 1 << 20
_PARQUET_BATCH_ROWS = 4096
_GZIP_SUFFIX = ".gz"
_COLUMN_FLAG = "--text-column"
_NO_UTF8 = "not UTF-8"
_TOO_LONG = "longer than 1 MiB"


@dataclass(frozen=True)
class SentenceStats:
    """What reading every source once came to."""

    num_sentences: int = 0
    num_empty: int = 0
    """Lines or cells that are blank."""
    num_left_out: int = 0
    """Lines or cells that are not UTF-8, no record, without the key, no text, or over 1 MiB."""
    first_left_out: str = ""
    """FILE:LINE (why); of Parquet the row."""


class SentencePool:
    """Sentences in a fixed order, read anew by every iteration."""

    def __init__(self, sources: Sequence[_Source]) -> None:
        """Use `open_sentences`."""
        self._sources = sources

    def __iter__(self) -> Iterator[str]:
        for source in self._sources:
            for item in source.read():
                if isinstance(item, str):
                    yield item

    def __len__(self) -> int:
        return self._scanned[0].num_sentences

    @property
    def fingerprint(self) -> str:
        """16 hex digits over every sentence, in order."""
        return self._scanned[1]

    @property
    def stats(self) -> SentenceStats:
        """How many sentences there are, and how many lines were left out."""
        return self._scanned[0]

    @functools.cached_property
    def _scanned(self) -> tuple[SentenceStats, str]:
        """Counts and fingerprint, by reading everything once."""
        total, empty, left_out, first = 0, 0, 0, ""
        state = hashlib.blake2b(digest_size=8)
        for source in self._sources:
            if source.count is not None:
                total += source.count
                state.update(source.digest().encode())
                continue
            for item in source.read():
                if isinstance(item, str):
                    total += 1
                    state.update(item.encode() + b"\n")
                elif not item.why:
                    empty += 1
                else:
                    left_out += 1
                    first = first or f"{source.name}:{item.line} ({item.why})"
        if left_out:
            logger.warning(
                "%d of %d sentences left out; the first is %s", left_out, total + left_out, first
            )
        return SentenceStats(total, empty, left_out, first), state.hexdigest()


def open_sentences(sources: Sequence[str], *, column: str = "text") -> SentencePool:
    """Open sources of sentences as one pool, one after the other.

    Blank lines, and what is no sentence (not UTF-8, no text, no such key), are counted apart
    and left out: see `SentencePool.stats`.

    Args:
        sources: `.txt` (a sentence a line), `.jsonl`, `.csv` or `.parquet` files, each also
            `.gz`; globs, brace patterns, folders of such files; `prompts:TEST_SET`, the class
            names of what `open_classes` takes, in its templates; `scenes[:COUNT]`.
        column: The sentences' column, or key of a JSON record.

    Raises:
        DataError: If a source is missing, of an unknown kind, lacks the column, or holds no
            sentence. Reading raises it too, for a file that is damaged further on.
        MissingExtraError: If a source needs a package that is not installed.
    """
    opened: list[_Source] = []
    for text in sources:
        count = scenes_count(text, DEFAULT_NUM_SENTENCES)
        if count is not None:
            opened.append(_scenes(count))
            continue
        if text.startswith(f"{PROMPTS}:"):
            _, classnames, templates = open_classes(text.removeprefix(f"{PROMPTS}:"))
            opened.append(_given(class_prompts(classnames, templates)))
            continue
        found = [_open_file(p, column) for path in expand_source(text) for p in _files(path)]
        # Reads up to the first sentence of each file, so a wrong column is told at once.
        has_text = [any(isinstance(item, str) for item in source.read()) for source in found]
        if not any(has_text):
            stats = SentencePool(found).stats
            raise DataError(
                f"{text} holds no sentence ({stats.num_empty} empty and {stats.num_left_out} "
                f"unreadable lines{stats.first_left_out and f': {stats.first_left_out}'})",
                hint="sentences are UTF-8, in .txt, .jsonl, .csv or .parquet",
            )
        opened.extend(found)
    if not opened:
        raise DataError("no source of sentences was given", hint="--texts scenes")
    return SentencePool(opened)


def class_prompts(classnames: Sequence[str], templates: Sequence[str]) -> list[str]:
    """Every class name in every template, at `{c}`."""
    return [template.replace("{c}", name) for name in classnames for template in templates]


@dataclass(frozen=True)
class _Skipped:
    """A line that is no sentence: blank, or left out for a reason."""

    why: str = ""
    line: int = 0


_EMPTY = _Skipped()
_Item = str | _Skipped


@dataclass(frozen=True)
class _Source:
    read: Callable[[], Iterator[_Item]]
    count: int | None = None  # known without reading
    digest: Callable[[], str] = lambda: ""
    name: str = ""


def _scenes(count: int) -> _Source:
    def digest() -> str:
        # A few sentences stand for the grammar and numpy's random numbers.
        return digest_lines(["scenes", str(count), *(scene_sentence(i) for i in range(32))])

    return _Source(lambda: (scene_sentence(i) for i in range(count)), count, digest)


def _given(sentences: list[str]) -> _Source:
    return _Source(lambda: iter(sentences), len(sentences), lambda: digest_lines(sentences))


def _files(path: Path) -> list[Path]:
    if not path.is_dir():
        return [path]
    return [path / name for name, _ in walk_files(path) if _kind(path / name) in _READERS]


def _kind(path: Path) -> str:
    name = path.name.lower().removesuffix(_GZIP_SUFFIX)
    return name[name.rfind(".") :] if "." in name else ""


def _open_file(path: Path, column: str) -> _Source:
    reader = _READERS.get(_kind(path))
    if reader is None:
        raise DataError(
            f"{path} is not a source of sentences: its name ends in '{path.suffix}'",
            hint=f"a file that ends in {' '.join(_READERS)}, each also with {_GZIP_SUFFIX}",
        )

    def read() -> Iterator[_Item]:
        try:
            with open(path, "rb") as file:
                packed = path.name.lower().endswith(_GZIP_SUFFIX)
                stream = cast(BinaryIO, gzip.GzipFile(fileobj=file)) if packed else file
                yield from reader(path, stream, column)
        except (EOFError, OSError, zlib.error) as error:
            raise DataError(
                f"{path} cannot be read to its end: {error}", hint="download or pack it again"
            ) from error

    return _Source(read, name=str(path))


def _sentence(text: object, line: int) -> _Item:
    if text is None:
        return _Skipped("null", line)
    try:
        if isinstance(text, bytes):
            text = text.decode()
        if not isinstance(text, str):
            return _Skipped(f"{type(text).__name__}, not text", line)
        text.encode()
    except UnicodeError:  # encoding: half of a surrogate pair, which JSON can write
        return _Skipped(_NO_UTF8, line)
    if "\0" in text:  # UTF-16 read as UTF-8 is full of them
        return _Skipped("NUL characters", line)
    # One line, whatever the file: a sentence with line ends in it is still one sentence.
    return " ".join(text.split()) or _EMPTY


def _lines(stream: BinaryIO) -> Iterator[bytes | None]:
    """Lines with their ends, without a byte order mark; None for one that is too long."""
    is_first = True
    while line := stream.readline(_MAX_LINE_BYTES):
        if len(line) == _MAX_LINE_BYTES and not line.endswith(b"\n"):
            while (rest := stream.readline(_MAX_LINE_BYTES)) and not rest.endswith(b"\n"):
                pass
            yield None
        else:
            yield line.removeprefix(b"\xef\xbb\xbf") if is_first else line
        is_first = False


def _read_text(path: Path, stream: BinaryIO, column: str) -> Iterator[_Item]:
    for number, line in enumerate(_lines(stream), 1):
        yield _Skipped(_TOO_LONG, number) if line is None else _sentence(line, number)


def _read_jsonl(path: Path, stream: BinaryIO, column: str) -> Iterator[_Item]:
    has_column = False
    for number, line in enumerate(_lines(stream), 1):
        if line is None:
            yield _Skipped(_TOO_LONG, number)
            continue
        if not line.strip():
            yield _EMPTY
            continue
        record, why = None, "no JSON record"
        try:
            record = json.loads(line)
        except UnicodeDecodeError:
            why = _NO_UTF8
        except (ValueError, RecursionError):
            pass
        if not isinstance(record, dict):
            yield _Skipped(why, number)
            continue
        if column not in record and not has_column:
            raise no_column(path, column, [str(key) for key in record], flag=_COLUMN_FLAG)
        has_column = True
        yield _cell(record, column, number)


def _cell(record: dict[str, object], column: str, line: int) -> _Item:
    if column not in record:
        return _Skipped(f"no '{column}'", line)
    return _sentence(record[column], line)


def _read_csv(path: Path, stream: BinaryIO, column: str) -> Iterator[_Item]:
    # Bytes that are not UTF-8 become lone surrogates, which `_sentence` turns away.
    text = ((line or b"").decode("utf-8", "surrogateescape") for line in _lines(stream))
    rows = csv.reader(text)
    try:
        header = next(rows, None)
    except csv.Error as error:
        raise DataError(f"the first line of {path} is no CSV header: {error}") from error
    if header is None:
        return
    if column not in header:
        raise no_column(path, column, [_shown(name) for name in header], flag=_COLUMN_FLAG)
    place = header.index(column)
    while True:
        number = rows.line_num + 1  # a row may be of several lines
        try:
            row = next(rows)
        except StopIteration:
            return
        except csv.Error as error:
            yield _Skipped(f"no CSV row: {error}", number)
            continue
        if place < len(row):
            yield _sentence(row[place], number)
        else:
            is_blank = not "".join(row).strip()
            yield _EMPTY if is_blank else _Skipped(f"no '{column}'", number)


def _shown(name: str) -> str:
    return name.encode("utf-8", "surrogateescape").decode("utf-8", "replace")


def _read_parquet(path: Path, stream: BinaryIO, column: str) -> Iterator[_Item]:
    pa, parquet = import_pyarrow(path)
    source: Any = path
    if path.name.lower().endswith(_GZIP_SUFFIX):
        source = io.BytesIO(stream.read())  # Parquet is read from its end
    try:
        with parquet.ParquetFile(source) as file:
            schema = file.schema_arrow
            if column not in schema.names:
                raise no_column(path, column, list(schema.names), flag=_COLUMN_FLAG)
            kind = schema.field(column).type
            if pa.types.is_dictionary(kind):
                kind = kind.value_type
            if not (pa.types.is_string(kind) or pa.types.is_large_string(kind)):
                raise DataError(
                    f"column '{column}' of {path} holds {kind}, not text",
                    hint=f"{_COLUMN_FLAG} with another of: {', '.join(schema.names)}",
                )
            number = 0
            for batch in file.iter_batches(batch_size=_PARQUET_BATCH_ROWS, columns=[column]):
                cells = batch.column(0)
                if pa.types.is_dictionary(cells.type):
                    cells = cells.dictionary_decode()
                # As bytes: one cell that is not UTF-8 must not spoil the others.
                for cell in cells.cast(pa.large_binary()).to_pylist():
                    number += 1
                    yield _sentence(cell, number)
    except (pa.ArrowException, UnicodeDecodeError) as error:  # names of columns, too
        raise DataError(f"{path} is truncated or not a Parquet file: {error}") from error


_READERS: dict[str, Callable[[Path, BinaryIO, str], Iterator[_Item]]] = {
    ".txt": _read_text,
    ".jsonl": _read_jsonl,
    ".csv": _read_csv,
    ".parquet": _read_parquet,
}
