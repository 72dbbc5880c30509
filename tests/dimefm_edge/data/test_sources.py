from __future__ import annotations

import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dimefm_edge.data.sources import (
    absolute_source,
    digest_lines,
    expand_source,
    natural_key,
    scenes_count,
    walk_files,
)
from dimefm_edge.errors import DataError, MissingExtraError


def test_natural_order():
    names = ["10.jpg", "2.jpg", "a10/1", "a9/3", "02.jpg", "1"]
    assert sorted(names, key=natural_key) == ["1", "02.jpg", "2.jpg", "10.jpg", "a9/3", "a10/1"]


@given(st.lists(st.text(max_size=8), max_size=20))
def test_natural_order_is_total_and_stable(names):
    assert sorted(names, key=natural_key) == sorted(reversed(names), key=natural_key)


def test_digest_depends_on_order_and_splits():
    assert digest_lines(["a", "b"]) != digest_lines(["b", "a"])
    assert len(digest_lines([])) == 16
    assert digest_lines(["\udcff"]) != digest_lines([""])  # a file name that is not UTF-8


def test_scenes_count():
    assert scenes_count("scenes", 7) == 7
    assert scenes_count("scenes:30", 7) == 30
    assert scenes_count("./scenes", 7) is None


@pytest.mark.parametrize("source", ["scenes:", "scenes:0", "scenes:-1", "scenes:ten", "scenes:²"])
def test_scenes_count_must_be_positive(source):
    with pytest.raises(DataError, match="positive whole number"):
        scenes_count(source, 7)


def test_patterns_expand_in_natural_order(tmp_path):
    for name in ("s10.tar", "s9.tar", "t0.tar"):
        (tmp_path / name).touch()
    assert [p.name for p in expand_source(f"{tmp_path}/s*.tar")] == ["s9.tar", "s10.tar"]
    assert [p.name for p in expand_source(f"{tmp_path}/s{{9..10}}.tar")] == ["s9.tar", "s10.tar"]
    names = [p.name for p in expand_source(f"{tmp_path}/{{t,s}}*.tar")]
    assert names == ["t0.tar", "s9.tar", "s10.tar"]


def test_a_file_whose_name_looks_like_a_pattern_is_itself(tmp_path):
    (tmp_path / "a[1]{b}.jpg").touch()
    assert expand_source(f"{tmp_path}/a[1]{{b}}.jpg") == [tmp_path / "a[1]{b}.jpg"]


def test_missing_shard_of_a_range_is_named(tmp_path):
    (tmp_path / "s0.tar").touch()
    with pytest.raises(DataError, match=r"s1\.tar does not exist; the nearest .* is 's0\.tar'"):
        expand_source(f"{tmp_path}/s{{0..1}}.tar")


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("imagse", "imagse does not exist; the nearest in {root} is 'images'"),
        ("imagse/train/x.tar", "the nearest in {root} is 'images'"),
        ("photographs", "photographs does not exist; {root} has broken, images"),
        ("broken", "broken is a link to nothing"),
        ("images/a.tar", "{root}/images is empty"),
        ("*.tar", "no file matches the pattern {root}/*.tar"),
        ("a{b", "no brace pattern"),
    ],
)
def test_what_is_missing_is_said(tmp_path, source, message):
    (tmp_path / "images").mkdir()
    (tmp_path / "broken").symlink_to(tmp_path / "gone")
    with pytest.raises(DataError) as caught:
        expand_source(f"{tmp_path}/{source}")
    assert message.format(root=tmp_path) in str(caught.value)


@pytest.mark.parametrize(
    ("source", "message"), [("", "empty"), ("s3://b/x.tar", "on this machine")]
)
def test_no_local_path(source, message):
    with pytest.raises(DataError, match=message):
        expand_source(source)


def test_braces_without_braceexpand(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "braceexpand", None)
    with pytest.raises(MissingExtraError, match=r"pip install 'dimefm_edge\[train\]'"):
        expand_source(f"{tmp_path}/{{0..1}}.tar")


def test_walk_leaves_hidden_files_out_and_survives_loops(tmp_path):
    (tmp_path / "a").mkdir()
    for name in ("a/1.jpg", "a/._1.jpg", ".hidden"):
        (tmp_path / name).write_bytes(b"123")
    (tmp_path / "a" / "loop").symlink_to(tmp_path)
    (tmp_path / "gone.jpg").symlink_to(tmp_path / "nowhere")
    assert list(walk_files(tmp_path)) == [("a/1.jpg", 3)]


def test_a_source_by_its_whole_path_names_the_same_files(tmp_path, monkeypatch):
    (tmp_path / "a b").mkdir()
    for name in ("a b/0.tar", "a b/1.tar", "scenes"):
        (tmp_path / name).touch()
    monkeypatch.chdir(tmp_path)
    for source in ("a b", "a b/*.tar", "a b/{0..1}.tar", "*/1.tar", "./a b/0.tar"):
        whole = absolute_source(source)
        assert whole.startswith(str(tmp_path))
        expected = [path.resolve() for path in expand_source(source)]
        monkeypatch.chdir("/")
        assert expand_source(whole) == expected
        monkeypatch.chdir(tmp_path)
    for source in ("", "scenes", "scenes:30", "scenes-train", "none", "none/*.tar", "s3://x/y"):
        assert absolute_source(source) == source
    odd = tmp_path / "set[1]"
    odd.mkdir()
    (odd / "2.tar").touch()
    both = f"{{{tmp_path}/a b,{odd}}}/*.tar"
    assert absolute_source(both) == both
    monkeypatch.chdir(odd)
    assert absolute_source("*.tar") == "*.tar"
    assert expand_source(absolute_source("2.tar")) == [odd / "2.tar"]
    assert absolute_source("~/x") == str(Path.home() / "x")


def test_a_set_that_is_built_in_is_offered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError, match=r"scens does not exist. Did you mean 'scenes'\?"):
        expand_source("scens")
    (tmp_path / "scenes2").mkdir()
    with pytest.raises(DataError, match=r"scens does not exist; the nearest in \S+ is 'scenes2'"):
        expand_source("scens")
