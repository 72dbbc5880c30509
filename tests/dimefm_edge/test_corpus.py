"""The corpus: scores against numpy, what goes and why, and a killed run that goes on."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dimefm_edge import cli, corpus
from dimefm_edge.corpus import build_corpus, first_of_duplicates, load_kept_rows
from dimefm_edge.data.nearest import NearestRows
from dimefm_edge.data.sentences import class_prompts, open_sentences
from dimefm_edge.data.store import EmbeddingStore, StoreManifest, StoreWriter
from dimefm_edge.errors import DataError, StoreError

E = 8


def write_store(folder: Path, kind: str, rows: np.ndarray, source: str) -> EmbeddingStore:
    rows = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    manifest = StoreManifest(
        kind, "random", "0" * 16, "", source, E, 20.0, len(rows), shard_rows=2048
    )
    writer = StoreWriter.create_or_resume(folder, manifest)
    writer.write_shard(0, rows.astype(np.float16))
    return writer.finish()


class Case:
    """200 sentences: 40 repeat an earlier one in other clothes, 10 nearly equal another's
    embedding, the rest is random."""

    def __init__(self, folder: Path) -> None:
        rng = np.random.default_rng(0)
        self.lines = [f"sentence number {i}" for i in range(200)]
        embeds = rng.normal(size=(200, E))
        for i in range(160, 200):
            self.lines[i] = f"  Sentence,  NUMBER {i - 160}!"
            embeds[i] = embeds[i - 160]
        for i in range(150, 160):
            embeds[i] = embeds[i - 100] + 0.01 * rng.normal(size=E)
        path = folder / "lines.txt"
        path.write_text("\n".join(self.lines) + "\n")
        self.sentences = open_sentences([str(path)])
        self.texts = write_store(folder / "texts", "texts", embeds, self.sentences.fingerprint)
        self.images = write_store(folder / "images", "images", rng.normal(size=(90, E)), "i")
        cosines = self._all(self.texts) @ self._all(self.images).T
        self.scores = np.sort(cosines, axis=1)[:, -3:].mean(1)

    @staticmethod
    def _all(store: EmbeddingStore) -> np.ndarray:
        return store.gather(np.arange(len(store))).astype(np.float32)

    def build(self, out: Path, **settings):
        return build_corpus(
            self.sentences, self.images, self.texts, out, **{"top_k": 3, **settings}
        )


@pytest.fixture
def case(tmp_path) -> Case:
    return Case(tmp_path)


def kept_lines(out: Path) -> list[str]:
    with gzip.open(out / corpus.SENTENCES_FILE, "rt") as stream:
        return stream.read().splitlines()


def test_the_share_that_is_nearest_to_images_is_kept(case, tmp_path):
    out = tmp_path / "out"
    report = case.build(out, keep=0.25)
    best = np.sort(np.argsort(-case.scores[:160], kind="stable")[:40])
    assert kept_lines(out) == [case.lines[i] for i in best]
    assert load_kept_rows(out / corpus.ROWS_FILE, case.texts).tolist() == best.tolist()
    assert (report.num_sentences, report.num_kept, report.num_duplicates) == (200, 40, 40)
    assert report.num_ungrounded == 120
    assert report.threshold == pytest.approx(np.sort(case.scores[:160])[-40], abs=0.01)
    assert sum(report.histogram["counts"]) == 200
    assert report.examples["best"][0] in {case.lines[i] for i in np.argsort(-case.scores)[:6]}
    assert report.examples["duplicates"][0] == "Sentence, NUMBER 0!"
    assert json.loads((out / corpus.REPORT_FILE).read_text())["num_kept"] == 40


def test_a_threshold_and_near_duplicates(case, tmp_path):
    everything = case.build(tmp_path / "all", threshold=-1.0)
    assert everything.num_kept == 160
    report = case.build(tmp_path / "far", threshold=-1.0, near_duplicates=0.995)
    assert report.num_near_duplicates == 10
    gone = set(range(160)) - set(load_kept_rows(tmp_path / "far/kept_rows.npz", case.texts))
    assert gone == set(range(150, 160))
    with pytest.raises(DataError, match=r"no sentence scores 2\.000; the best scores"):
        case.build(tmp_path / "none", threshold=2.0)


def test_of_three_alike_in_a_row_the_third_is_told_by_the_first(case, tmp_path):
    """b is near to a and goes; c is near to b alone, so it stays."""
    angles = np.radians([0, 10, 20])
    rows = np.zeros((3, E))
    rows[:, 0], rows[:, 1] = np.cos(angles), np.sin(angles)
    path = tmp_path / "three.txt"
    path.write_text("a\nb\nc\n")
    pool = open_sentences([str(path)])
    texts = write_store(tmp_path / "three", "texts", rows, pool.fingerprint)
    build_corpus(pool, case.images, texts, tmp_path / "o", threshold=-1.0, near_duplicates=0.98)
    assert kept_lines(tmp_path / "o") == ["a", "c"]


def test_prompts_come_first_and_stay(case, tmp_path):
    prompts = class_prompts(["cat", "{x}"], ["a {c}.", "{c}"])
    assert prompts == ["a cat.", "cat", "a {x}.", "{x}"]
    report = case.build(tmp_path / "out", keep=0.25, prompts=prompts)
    assert (report.num_prompts, report.num_kept) == (4, 40)
    assert kept_lines(tmp_path / "out")[:4] == prompts


def test_a_stopped_run_goes_on_from_its_last_block(case, tmp_path, monkeypatch):
    monkeypatch.setattr(corpus, "_BLOCK_ROWS", 64)
    whole = case.build(tmp_path / "whole")
    real, asked = NearestRows.search, []

    def stop_at_third(self, queries, count):
        asked.append(len(queries))
        if len(asked) == 3:
            raise KeyboardInterrupt
        return real(self, queries, count)

    monkeypatch.setattr(NearestRows, "search", stop_at_third)
    with pytest.raises(KeyboardInterrupt):
        case.build(tmp_path / "out")
    assert case.build(tmp_path / "out") == whole
    assert asked == [64, 64, 64, 64, 8]
    assert case.build(tmp_path / "out", keep=0.1).num_kept == 16  # scores are there
    assert len(asked) == 5
    assert (tmp_path / "out/sentences.txt.gz").is_file()


def test_an_index_gives_nearly_the_same_corpus(tmp_path):
    rng = np.random.default_rng(1)
    path = tmp_path / "lines.txt"
    path.write_text("".join(f"{i}\n" for i in range(300)))
    pool = open_sentences([str(path)])
    texts = write_store(tmp_path / "t", "texts", rng.normal(size=(300, E)), pool.fingerprint)
    images = write_store(tmp_path / "i", "images", rng.normal(size=(2000, E)), "i")
    kept = []
    for name, most in (("exact", 10_000), ("indexed", 500)):
        build_corpus(pool, images, texts, tmp_path / name, max_exact=most)
        kept.append(set(load_kept_rows(tmp_path / name / "kept_rows.npz", texts).tolist()))
    assert len(kept[0] & kept[1]) > 0.9 * 150


@given(st.lists(st.text(max_size=12), max_size=30))
def test_the_first_of_equals_stays(lines):
    is_first = first_of_duplicates(lines)
    assert len(is_first) == len(lines)
    for i, line in enumerate(lines):
        if line in lines[:i]:
            assert not is_first[i]
    assert len({corpus._key(line) for line in lines}) == is_first.sum()


def test_case_space_and_punctuation_do_not_tell_apart():
    lines = ["A dog.", "a  dog", "«A-DOG»!", "a dot", "...", "!", "Straße", "STRASSE"]
    expected = [True, False, False, True, True, True, True, False]
    assert first_of_duplicates(lines).tolist() == expected


def test_rows_of_other_sentences_and_damaged_ones_are_refused(case, tmp_path):
    case.build(tmp_path / "out")
    path = tmp_path / "out/kept_rows.npz"
    other = write_store(tmp_path / "other", "texts", np.eye(E), "other")
    with pytest.raises(StoreError, match="are of other sentences"):
        load_kept_rows(path, other)
    source = np.array(case.texts.manifest.source)
    for rows in ([5, 5], [3, 1], [-1, 4], [4, 400], [], [0.5]):
        np.savez(path, rows=np.asarray(rows), source=source)
        with pytest.raises(StoreError, match="damaged"):
            load_kept_rows(path, case.texts)
    for content in (b"", b"PK\x03\x04", b"rows"):
        path.write_bytes(content)
        with pytest.raises(StoreError, match=r"is no kept_rows\.npz"):
            load_kept_rows(path, case.texts)
    with pytest.raises(StoreError, match="other sentences"):
        build_corpus(case.sentences, case.images, other, tmp_path / "x")


class TestCommand:
    def test_sentences_for_distill(self, tiny_teacher_dir, tmp_path, capsys):
        (tmp_path / "classnames.txt").write_text("cat\ndog\n")
        (tmp_path / "frames.txt").write_text("one {c}\n")
        words = [
            "corpus", "--teacher", str(tiny_teacher_dir), "--images", "scenes:30", "--texts",
            "scenes:80", "--out", str(tmp_path / "out"), "--keep", "0.5", "--classnames",
            str(tmp_path / "classnames.txt"), "--templates", str(tmp_path / "frames.txt"),
        ]  # fmt: skip
        assert cli.main([*words, "--json"]) == 0
        said = json.loads(capsys.readouterr().out)
        lines = kept_lines(tmp_path / "out")
        assert lines[:2] == ["one cat", "one dog"]
        assert len(lines) == said["num_kept"] + 2
        texts = EmbeddingStore.open(tmp_path / "out/store/texts")
        assert len(load_kept_rows(tmp_path / "out/kept_rows.npz", texts)) == said["num_kept"]
        assert cli.main(words) == 0
        assert "below the threshold" in capsys.readouterr().out

    @pytest.mark.parametrize(
        ("flags", "expected"),
        [
            ([], "corpus needs a folder"),
            (["--out", "x"], "corpus needs both sides"),
            (["--out", "x", "--images", "scenes", "--texts", "scenes", "--keep", "0"], "--keep"),
            (
                ["--out", "x", "--images", "scenes", "--texts", "scenes", "--templates", "t"],
                "--templates needs the names",
            ),
        ],
    )
    def test_bad_usage(self, flags, expected, capsys):
        assert cli.main(["corpus", *flags]) == 2
        assert expected in capsys.readouterr().err
