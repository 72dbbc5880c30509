from __future__ import annotations

import contextlib
import csv
import gzip
import io
import json
import sys
import tempfile
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from dimefm_edge.data.sentences import SentenceStats, open_sentences
from dimefm_edge.errors import DataError, MissingExtraError

WANTED = ["a red star", "ein grüner Kreis", 'say "hi", twice']
any_text = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=20)


def write(path: Path, sentences: list[str]) -> Path:
    """Sentences in the format that the file's name says."""
    kind = path.name.removesuffix(".gz").rpartition(".")[2]
    stream = io.StringIO(newline="")
    if kind == "txt":
        data = "".join(f"{s}\n" for s in sentences).encode()
    elif kind == "jsonl":
        data = "".join(json.dumps({"id": 1, "text": s}) + "\n" for s in sentences).encode()
    elif kind == "csv":
        csv.writer(stream).writerows([["id", "text"], *([1, s] for s in sentences)])
        data = stream.getvalue().encode()
    else:
        sink = io.BytesIO()
        pq.write_table(pa.table({"text": pa.array(sentences, pa.string())}), sink)
        data = sink.getvalue()
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
    return path


@pytest.mark.parametrize("suffix", ["", ".gz"])
@pytest.mark.parametrize("kind", ["txt", "jsonl", "csv", "parquet"])
def test_each_format(tmp_path, kind, suffix):
    pool = open_sentences([str(write(tmp_path / f"s.{kind}{suffix}", WANTED))])
    assert list(pool) == WANTED
    assert list(pool) == WANTED  # again from the start
    assert len(pool) == 3
    assert pool.stats == SentenceStats(3, 0, 0)


@settings(max_examples=40, deadline=None)
@given(st.lists(any_text, max_size=12), st.sampled_from(["jsonl", "csv", "parquet"]))
def test_any_text_comes_back_on_one_line(texts, kind):
    wanted = [joined for text in texts if (joined := " ".join(text.split()))]
    with tempfile.TemporaryDirectory() as folder:
        path = write(Path(folder, f"s.{kind}"), texts)
        if not wanted:
            with pytest.raises(DataError, match="holds no sentence"):
                open_sentences([str(path)])
            return
        pool = open_sentences([str(path)])
        assert list(pool) == wanted
        assert len(pool) == len(wanted)
        assert pool.stats.num_left_out == 0


@settings(max_examples=100, deadline=None)
@given(st.binary(max_size=300), st.sampled_from(["txt", "jsonl", "csv", "parquet", "txt.gz"]))
def test_any_bytes_raise_data_errors_only(junk, kind):
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, f"s.{kind}")
        path.write_bytes(b"text\n" + junk if kind == "csv" else junk)
        try:
            pool = open_sentences([str(path)])
            assert len(list(pool)) == len(pool) > 0
        except DataError:
            pass


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10_000), st.integers(0, 255))
@example(4177, 128)  # a column's name
def test_damaged_parquet_raises_data_errors_only(place, value):
    with tempfile.TemporaryDirectory() as folder:
        path = write(Path(folder, "s.parquet"), [f"sentence {i}" for i in range(50)])
        data = bytearray(path.read_bytes())
        data[place % len(data)] = value
        path.write_bytes(data)
        with contextlib.suppress(DataError):
            list(open_sentences([str(path)]))


def test_lines_that_are_empty_or_no_text_are_counted(tmp_path, caplog):
    path = tmp_path / "s.txt"
    path.write_bytes(b"\xef\xbb\xbfone\r\n\n  \t\ncaf\xe9\ntwo\n" + b"x" * (1 << 20) + b"yz\nthree")
    pool = open_sentences([str(path)])
    assert list(pool) == ["one", "two", "three"]
    assert pool.stats == SentenceStats(3, 2, 2, f"{path}:4 (not UTF-8)")
    assert f"2 of 5 sentences left out; the first is {path}:4 (not UTF-8)" in caplog.text


def test_bad_records_are_counted(tmp_path):
    path = tmp_path / "s.jsonl"
    deep = b"[" * 100_000
    path.write_bytes(
        b'{"text": "one"}\n{broken\n[1]\n\n{"text": null}\n{"text": 5}\n{"other": 1}\n'
        b'{"text": "\\ud800"}\n' + deep + b'\n{"text": "two"}\n'
    )
    pool = open_sentences([str(path)])
    assert list(pool) == ["one", "two"]
    assert pool.stats == SentenceStats(2, 1, 7, f"{path}:2 (no JSON record)")


@pytest.mark.parametrize(
    ("record", "why"),
    [
        (b'{"cap": "x"}', "no 'text'"),
        (b'{"text": null}', "null"),
        (b'{"text": 5}', "int, not text"),
        (b'{"text": "\\ud800"}', "not UTF-8"),
        (b'{"text": "caf\xe9"}', "not UTF-8"),
        (b'{"text": "a\\u0000b"}', "NUL characters"),
        (b'{"text": "' + b"x" * (1 << 20) + b'"}', "longer than 1 MiB"),
        (b"[1]", "no JSON record"),
    ],
)
def test_records_left_out_say_where_and_why(tmp_path, record, why, caplog):
    path = tmp_path / "s.jsonl"
    path.write_bytes(b'{"text": "a b"}\n\n{"text": " "}\n' + record + b'\n{"txt": "z"}\n')
    pool = open_sentences([str(path)])
    assert list(pool) == ["a b"]
    assert pool.stats == SentenceStats(1, 2, 2, f"{path}:4 ({why})")
    assert f"2 of 3 sentences left out; the first is {path}:4 ({why})" in caplog.text


def test_records_that_all_lack_the_key_are_refused(tmp_path):
    path = tmp_path / "s.jsonl"
    path.write_text('{"cap": "x"}\n{"cap": "y"}\n')
    with pytest.raises(DataError, match="no column 'text'; its columns: cap"):
        open_sentences([str(path)])


def test_csv_with_short_rows_line_ends_and_bad_bytes(tmp_path):
    path = tmp_path / "s.csv"
    path.write_bytes(b'\xef\xbb\xbfid,text\n1,"two\nlines"\n2\n\n  \n3,caf\xe9\n4,""\n5,last\n')
    pool = open_sentences([str(path)])
    assert list(pool) == ["two lines", "last"]
    assert pool.stats == SentenceStats(2, 3, 2, f"{path}:4 (no 'text')")


def test_parquet_cell_that_is_not_utf8(tmp_path):
    cells = pa.array([b"one", b"caf\xe9", None, b"two"], pa.binary()).view(pa.string())
    pq.write_table(pa.table({"text": cells}), tmp_path / "s.parquet")
    pool = open_sentences([str(tmp_path / "s.parquet")])
    assert list(pool) == ["one", "two"]
    assert pool.stats == SentenceStats(2, 0, 2, f"{tmp_path / 's.parquet'}:2 (not UTF-8)")


def test_parquet_dictionary_column(tmp_path):
    cells = pa.array(["a", "b", "a"]).dictionary_encode()
    pq.write_table(pa.table({"text": cells}), tmp_path / "s.parquet")
    assert list(open_sentences([str(tmp_path / "s.parquet")])) == ["a", "b", "a"]


@pytest.mark.parametrize("kind", ["jsonl", "csv", "parquet", "parquet.gz"])
def test_wrong_column_lists_the_columns(tmp_path, kind):
    path = write(tmp_path / f"s.{kind}", WANTED)
    with pytest.raises(DataError, match=r"no column 'caption'; its columns: .*text"):
        open_sentences([str(path)], column="caption")


def test_column_that_is_no_text(tmp_path):
    pq.write_table(pa.table({"text": [1, 2], "caption": ["a", "b"]}), tmp_path / "s.parquet")
    with pytest.raises(DataError, match="holds int64, not text") as caught:
        open_sentences([str(tmp_path / "s.parquet")])
    assert "text, caption" in str(caught.value)


def test_sources_follow_one_another_in_natural_order(tmp_path):
    for number in (10, 9):
        write(tmp_path / f"{number}.txt", [f"sentence {number}"])
    write(tmp_path / "z.csv", ["last"])
    (tmp_path / "readme.md").write_text("no sentence")
    wanted = ["sentence 9", "sentence 10", "last"]
    assert list(open_sentences([str(tmp_path)])) == wanted
    assert list(open_sentences([f"{tmp_path}/*.txt", f"{tmp_path}/z.csv"])) == wanted


def test_fingerprint_is_of_the_sentences(tmp_path):
    def fingerprint(name: str, sentences: list[str]) -> str:
        return open_sentences([str(write(tmp_path / name, sentences))]).fingerprint

    first = fingerprint("a.txt", ["one", "two"])
    assert len(first) == 16
    assert fingerprint("b.csv.gz", ["one", "two"]) == first
    assert fingerprint("a.txt", ["one", "twe"]) != first
    assert fingerprint("a.txt", ["two", "one"]) != first


def test_scenes():
    pool = open_sentences(["scenes:30"])
    assert len(pool) == len(list(pool)) == 30
    assert list(pool) == list(open_sentences(["scenes"]))[:30]
    assert pool.fingerprint != open_sentences(["scenes:31"]).fingerprint
    assert len(open_sentences(["scenes"])) == 20_000


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("a.txt", b"", r"holds no sentence \(0 empty and 0 unreadable"),
        ("a.txt", b"\xff\xfeh\x00\xe9\x00\n\x00", r"2 unreadable lines: .*a\.txt:1 \(not UTF-8"),
        ("a.pdf", b"x", r"its name ends in '\.pdf'"),
        ("a.parquet", b"PAR1 no", "truncated or not a Parquet file"),
        ("a.txt.gz", b"no gzip", "cannot be read to its end"),
        ("a.csv", b'"' + b"x" * 200_000, "no CSV header"),
    ],
)
def test_what_cannot_be_used_is_said(tmp_path, name, data, message):
    (tmp_path / name).write_bytes(data)
    with pytest.raises(DataError, match=message):
        open_sentences([str(tmp_path / name)])


def test_truncated_gzip_is_named(tmp_path):
    path = write(tmp_path / "s.txt.gz", [f"{i * 7919} words" for i in range(20_000)])
    path.write_bytes(path.read_bytes()[:-1000])
    pool = open_sentences([str(path)])
    with pytest.raises(DataError, match=r"s\.txt\.gz cannot be read to its end"):
        len(pool)


def test_no_source():
    with pytest.raises(DataError, match="--texts scenes"):
        open_sentences([])


def test_parquet_without_pyarrow(tmp_path, monkeypatch):
    path = write(tmp_path / "s.parquet", WANTED)
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(MissingExtraError, match="pip install"):
        open_sentences([str(path)])


def test_prompts_of_a_test_set(tmp_path):
    """Names of a CLIP-benchmark folder's classes in its templates; more sources may follow."""
    (tmp_path / "classnames.txt").write_text("red fox\nowl\n")
    (tmp_path / "zeroshot_classification_templates.txt").write_text("a {c}.\nmany {c}\n")
    prompts = f"prompts:{tmp_path / 'classnames.txt'}"
    wanted = ["a red fox.", "many red fox", "a owl.", "many owl"]
    more = write(tmp_path / "more.txt", WANTED)
    pool = open_sentences([prompts, str(more)])
    assert list(pool) == list(pool) == [*wanted, *WANTED]
    assert len(pool) == 7
    first = open_sentences([prompts]).fingerprint
    assert first == open_sentences([prompts]).fingerprint
    (tmp_path / "classnames.txt").write_text("red fox\neagle owl\n")
    assert first != open_sentences([prompts]).fingerprint
    assert len(open_sentences(["prompts:scenes"])) > 96
    with pytest.raises(DataError, match="nowhere"):
        open_sentences([f"prompts:{tmp_path / 'nowhere'}"])
