from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dimefm_edge.data.store import (
    DEFAULT_SHARD_ROWS,
    EmbeddingStore,
    StoreManifest,
    StoreWriter,
    read_manifest,
)
from dimefm_edge.errors import StoreError

ROOT = Path(__file__).parents[3]
SHARD_ROWS = 2048
WANTED = StoreManifest(
    kind="images",
    teacher="big-clip",
    weights_hash="aaaa1111",
    preprocess_hash="bbbb2222",
    source="pool-1",
    embed_dim=8,
    logit_scale=100.0,
    num_rows=2 * SHARD_ROWS + 100,
    shard_rows=SHARD_ROWS,
)
SHARD_BYTES = SHARD_ROWS * WANTED.embed_dim * 2
EMBEDS = np.random.default_rng(0).normal(size=(WANTED.num_rows, 8)).astype(np.float16)

WRITER = """
import json, resource, sys
from pathlib import Path
import numpy as np
from dimefm_edge.data.store import StoreManifest, StoreWriter
from dimefm_edge.errors import StoreError

writer = StoreWriter.create_or_resume(Path(sys.argv[1]), StoreManifest(**json.loads(sys.argv[2])))
embeds = np.load(sys.argv[3], "r")
for index in writer.missing_shards():
    if index == int(sys.argv[4]):  # from here on no file may have more than 10000 bytes
        resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, 10_000))
    rows = writer.manifest.rows_of(index)
    try:
        writer.write_shard(index, embeds[rows.start : rows.stop])
    except StoreError as error:
        sys.exit(f"error: {error}")
    print(index, flush=True)
"""


def write_shards(store_dir: Path, wanted: StoreManifest, embeds: np.ndarray) -> list[int]:
    """Write the shards that are missing; returns which."""
    writer = StoreWriter.create_or_resume(store_dir, wanted)
    missing = writer.missing_shards()
    for index in missing:
        rows = wanted.rows_of(index)
        writer.write_shard(index, embeds[rows.start : rows.stop])
    return missing


def start_writer(
    store_dir: Path, wanted: StoreManifest, embeds: np.ndarray, *, fails_at: int = -1
) -> subprocess.Popen[str]:
    """A process that writes the missing shards and says which it has written."""
    source = store_dir.parent / "embeds.npy"
    np.save(source, embeds)
    values = json.dumps(dataclasses.asdict(wanted))
    command = [sys.executable, "-c", WRITER, str(store_dir), values, str(source), str(fails_at)]
    return subprocess.Popen(
        command, cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )


def edit_manifest(store_dir: Path, **changes: Any) -> None:
    path = store_dir / "manifest.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def states(store_dir: Path) -> dict[str, tuple[int, int]]:
    """Inode and time of every shard: both change when one is written again."""
    shards = store_dir.glob("shard-*")
    return {p.name: (p.stat().st_ino, p.stat().st_mtime_ns) for p in shards}


@pytest.fixture
def store_dir(tmp_path):
    folder = tmp_path / "store" / "images"
    assert write_shards(folder, WANTED, EMBEDS) == [0, 1, 2]
    return folder


@pytest.fixture(scope="module")
def shared_store_dir(tmp_path_factory):
    """For tests that leave the shards alone."""
    folder = tmp_path_factory.mktemp("shared") / "images"
    write_shards(folder, WANTED, EMBEDS)
    return folder


# -------------------------------------------------------------------------- round trips


def test_what_is_written_is_read(store_dir):
    store = EmbeddingStore.open(store_dir)
    assert len(store) == WANTED.num_rows
    assert store.embed_dim == 8
    gathered = store.gather(np.arange(len(store)))
    assert gathered.dtype == np.float16
    assert np.array_equal(gathered, EMBEDS)
    store.verify()
    assert [shard.rows for shard in store.manifest.shards] == [2048, 2048, 100]
    names = ["manifest.json", *(f"shard-{i:06d}.f16" for i in range(3))]
    assert sorted(p.name for p in store_dir.iterdir()) == names
    content = b"".join((store_dir / name).read_bytes() for name in names[1:])
    assert content == EMBEDS.astype("<f2").tobytes()
    kept = dataclasses.replace(store.manifest, shards=())
    assert kept == WANTED


@given(num_rows=st.integers(1, 3 * SHARD_ROWS), embed_dim=st.integers(1, 5))
@settings(max_examples=15, deadline=None)
def test_any_number_of_rows_and_dimensions(tmp_path_factory, num_rows, embed_dim):
    folder = tmp_path_factory.mktemp("store")
    wanted = dataclasses.replace(WANTED, num_rows=num_rows, embed_dim=embed_dim)
    embeds = np.random.default_rng(num_rows).normal(size=(num_rows, embed_dim))
    write_shards(folder, wanted, embeds.astype(np.float16))
    store = EmbeddingStore.open(folder)
    assert np.array_equal(store.gather(np.arange(num_rows)), embeds.astype(np.float16))


@given(rows=st.lists(st.integers(0, WANTED.num_rows - 1), max_size=300))
@settings(deadline=None)
def test_gathered_rows_are_the_sources(shared_store_dir, rows):
    index = np.asarray(rows, np.int64)
    gathered = EmbeddingStore.open(shared_store_dir).gather(index)
    assert gathered.shape == (len(rows), 8)
    assert np.array_equal(gathered, EMBEDS[index])


def test_gathered_rows_are_a_copy(store_dir):
    store = EmbeddingStore.open(store_dir)
    rows = np.asarray([5, 2048, 4195])
    gathered = store.gather(rows)
    gathered[:] = 0
    assert np.array_equal(store.gather(rows), EMBEDS[rows])
    del store
    assert not gathered.any()


def test_row_outside(shared_store_dir):
    with pytest.raises(IndexError):
        EmbeddingStore.open(shared_store_dir).gather(np.asarray([WANTED.num_rows]))


def test_shards_in_any_order_and_of_any_layout(tmp_path):
    writer = StoreWriter.create_or_resume(tmp_path / "store", WANTED)
    columns_first = np.asfortranarray(EMBEDS)
    writer.write_shard(2, columns_first[4096:])
    writer.write_shard(0, columns_first[:2048])
    assert writer.missing_shards() == [1]
    writer.write_shard(1, columns_first[2048:4096])
    assert np.array_equal(writer.finish().gather(np.arange(len(EMBEDS))), EMBEDS)


def test_open_store_outlives_its_files(store_dir):
    store = EmbeddingStore.open(store_dir)
    for path in store_dir.iterdir():
        path.unlink()
    assert np.array_equal(store.gather(np.arange(len(store))), EMBEDS)


@pytest.mark.parametrize("num_rows", [100, WANTED.num_rows])
def test_bad_rows_are_not_valid(tmp_path, num_rows):
    wanted = dataclasses.replace(WANTED, num_rows=num_rows)
    writer = StoreWriter.create_or_resume(tmp_path, wanted)
    embeds = EMBEDS[:num_rows]
    for index in writer.missing_shards():
        rows = wanted.rows_of(index)
        bad = [(rows.stop - 1, "no JPEG"), (rows.start, "unlesbar: Größe 0")]
        writer.write_shard(index, embeds[rows.start : rows.stop], bad_rows=bad)
    starts = range(0, num_rows, SHARD_ROWS)
    expected = {(s, "unlesbar: Größe 0") for s in starts}
    expected |= {(min(s + SHARD_ROWS, num_rows) - 1, "no JPEG") for s in starts}
    store = EmbeddingStore.open(tmp_path)
    assert store.manifest.bad_rows == tuple(sorted(expected))
    valid = store.valid_rows()
    assert valid.dtype == np.int64
    assert valid.tolist() == sorted(set(range(num_rows)) - {row for row, _ in expected})


def test_every_row_is_valid_or_none(tmp_path):
    wanted = dataclasses.replace(WANTED, num_rows=3)
    writer = StoreWriter.create_or_resume(tmp_path, wanted)
    writer.write_shard(0, EMBEDS[:3])
    assert writer.finish().valid_rows().tolist() == [0, 1, 2]
    writer.write_shard(0, EMBEDS[:3], bad_rows=[(row, "gone") for row in range(3)])
    assert writer.finish().valid_rows().tolist() == []


def test_shard_written_again_has_its_new_bad_rows_only(store_dir):
    writer = StoreWriter.create_or_resume(store_dir, WANTED)
    writer.write_shard(0, EMBEDS[:2048], bad_rows=[(7, "cut short")])
    writer.write_shard(1, EMBEDS[2048:4096], bad_rows=[(2048, "cut short")])
    writer.write_shard(0, EMBEDS[:2048], bad_rows=[(8, "empty")])
    assert read_manifest(store_dir).bad_rows == ((8, "empty"), (2048, "cut short"))


@pytest.mark.parametrize(
    ("index", "embeds"),
    [
        (0, EMBEDS[:2047]),
        (0, EMBEDS[:2049]),
        (2, EMBEDS[:2048]),
        (0, EMBEDS[:2048, :7]),
        (0, EMBEDS[:2048].ravel()),
        (0, EMBEDS[:2048].astype(np.float32)),
        (0, EMBEDS[:2048].astype(">f2")),
        (3, EMBEDS[:2048]),
        (-1, EMBEDS[:2048]),
    ],
)
def test_wrong_shard_is_a_value_error(store_dir, index, embeds):
    writer = StoreWriter.create_or_resume(store_dir, WANTED)
    before = states(store_dir)
    with pytest.raises(ValueError, match=rf"shard {index} "):
        writer.write_shard(index, embeds)
    assert states(store_dir) == before


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("shard_rows", 1000),
        ("shard_rows", 0),
        ("num_rows", 0),
        ("num_rows", 2**50),
        ("embed_dim", -1),
        ("logit_scale", float("nan")),
        ("teacher", None),
    ],
)
def test_impossible_store_is_a_value_error(tmp_path, field, value):
    with pytest.raises(ValueError, match=f"{field} must be"):
        StoreWriter.create_or_resume(
            tmp_path / "store", dataclasses.replace(WANTED, **{field: value})
        )
    assert not (tmp_path / "store").exists()


# ----------------------------------------------------------------------------- resuming


def test_complete_store_is_left_alone(store_dir):
    before = states(store_dir)
    assert write_shards(store_dir, WANTED, EMBEDS) == []
    assert states(store_dir) == before


def test_unfinished_store_says_so(tmp_path):
    writer = StoreWriter.create_or_resume(tmp_path, WANTED)
    writer.write_shard(1, EMBEDS[2048:4096])
    for open_store in (writer.finish, lambda: EmbeddingStore.open(tmp_path)):
        with pytest.raises(StoreError, match="incomplete: 2 of 3 shards are missing") as caught:
            open_store()
        assert "run the same command again" in caught.value.hint


def test_killed_again_and_again(tmp_path):
    num_shards, kills = 60, 4
    wanted = dataclasses.replace(WANTED, num_rows=num_shards * SHARD_ROWS - 5)
    embeds = np.random.default_rng(1).normal(size=(wanted.num_rows, 8)).astype(np.float16)
    folder = tmp_path / "store"
    announced: list[int] = []
    for kill in range(kills):
        kept = {f"shard-{index:06d}.f16" for index in announced}
        before = {name: state for name, state in states(folder).items() if name in kept}
        writer = start_writer(folder, wanted, embeds)
        lines = [writer.stdout.readline() for _ in range(3)]
        writer.kill()
        out, err = writer.communicate()
        assert err == ""
        assert writer.returncode == -signal.SIGKILL or kill > 0
        announced += map(int, ("".join(lines) + out).split())
        assert before.items() <= states(folder).items()
    missing = write_shards(folder, wanted, embeds)
    # Each was announced once: what is finished is kept. What landed as the process died was
    # entered but not announced, or is written again.
    assert len(set(announced)) == len(announced)
    assert not set(announced) & set(missing)
    assert num_shards - kills <= len(announced) + len(missing) <= num_shards
    store = EmbeddingStore.open(folder)
    store.verify()
    assert np.array_equal(store.gather(np.arange(len(store))), embeds)
    assert not list(folder.glob(".*"))


def test_killed_before_the_first_manifest(tmp_path):
    (tmp_path / ".manifest.json.tmp").write_text('{"form')
    assert write_shards(tmp_path, WANTED, EMBEDS) == [0, 1, 2]
    assert EmbeddingStore.open(tmp_path).valid_rows().size == WANTED.num_rows


@pytest.mark.parametrize("damage", ["truncated", "longer", "deleted", "a folder"])
def test_damaged_shard_is_made_again(store_dir, damage):
    path = store_dir / "shard-000001.f16"
    content = path.read_bytes()
    if damage == "truncated":
        os.truncate(path, SHARD_BYTES - 1)
    elif damage == "longer":
        path.write_bytes(content + b"\0")
    else:
        path.unlink()
    before = {k: v for k, v in states(store_dir).items() if k != path.name}
    if damage == "a folder":
        path.mkdir()
    message = re.escape(f"{path} is missing or truncated")
    with pytest.raises(StoreError, match=message) as caught:
        EmbeddingStore.open(store_dir)
    assert caught.value.hint == "run the same command again: it does what is missing"
    if damage == "a folder":
        path.rmdir()
    assert write_shards(store_dir, WANTED, EMBEDS) == [1]
    assert before.items() <= states(store_dir).items()
    assert path.read_bytes() == content
    EmbeddingStore.open(store_dir).verify()


def test_store_keeps_its_own_shard_rows(store_dir):
    other = dataclasses.replace(WANTED, shard_rows=2 * SHARD_ROWS)
    (store_dir / "shard-000001.f16").unlink()
    writer = StoreWriter.create_or_resume(store_dir, other)
    assert writer.manifest.shard_rows == SHARD_ROWS
    assert writer.missing_shards() == [1]


def test_verify_finds_a_flipped_bit(store_dir):
    path = store_dir / "shard-000001.f16"
    content = bytearray(path.read_bytes())
    content[12_345] ^= 1
    path.write_bytes(content)
    store = EmbeddingStore.open(store_dir)
    with pytest.raises(
        StoreError, match=r"shard-000001\.f16 does not match its checksum"
    ) as caught:
        store.verify()
    assert caught.value.hint == f"delete {path} and run the same command again"
    path.unlink()
    assert write_shards(store_dir, WANTED, EMBEDS) == [1]
    EmbeddingStore.open(store_dir).verify()


def test_verify_finds_swapped_shards(store_dir):
    first, second = store_dir / "shard-000000.f16", store_dir / "shard-000001.f16"
    first.rename(store_dir / "x")
    second.rename(first)
    (store_dir / "x").rename(second)
    with pytest.raises(StoreError, match=re.escape(first.name)):
        EmbeddingStore.open(store_dir).verify()


# ------------------------------------------------------------- stores of someone else's


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"teacher": "small-clip", "weights_hash": "cccc3333"},
            r"holds images embedded by teacher 'big-clip' \(aaaa1111\), "
            r"not images by 'small-clip' \(cccc3333\)",
        ),
        (
            {"weights_hash": "cccc3333"},
            r"'big-clip' \(aaaa1111\), not images by 'big-clip' \(cccc3333\)",
        ),
        ({"kind": "texts"}, "holds images embedded by .*, not texts"),
        ({"preprocess_hash": "dddd4444"}, "made with other image preprocessing"),
        ({"source": "pool-2"}, r"holds other images: 4196 rows \(pool-1\), not .* \(pool-2\)"),
        ({"num_rows": 4195}, r"holds other images: 4196 rows .* not these 4195"),
    ],
    ids=["teacher", "weights", "kind", "preprocessing", "data", "rows"],
)
def test_another_store_is_refused(store_dir, changes, message):
    manifest = (store_dir / "manifest.json").read_bytes()
    before = states(store_dir)
    with pytest.raises(StoreError, match=message) as caught:
        StoreWriter.create_or_resume(store_dir, dataclasses.replace(WANTED, **changes))
    assert str(store_dir) in str(caught.value)
    assert "another --store" in caught.value.hint
    assert states(store_dir) == before
    assert (store_dir / "manifest.json").read_bytes() == manifest


def test_teacher_of_another_name_and_the_same_weights(store_dir):
    assert write_shards(store_dir, dataclasses.replace(WANTED, teacher="alias"), EMBEDS) == []


def test_folder_of_something_else_is_refused(tmp_path):
    (tmp_path / "thesis.tex").write_text("\\documentclass{book}")
    with pytest.raises(StoreError, match="is not an empty folder and not a store"):
        StoreWriter.create_or_resume(tmp_path, WANTED)
    with pytest.raises(StoreError, match="is not an empty folder and not a store"):
        StoreWriter.create_or_resume(tmp_path / "thesis.tex", WANTED)
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.tex"]


def test_no_store(tmp_path):
    (tmp_path / "file").touch()
    (tmp_path / "folder" / "manifest.json").mkdir(parents=True)
    for name in ("none", "file", "folder"):
        with pytest.raises(StoreError, match=f"no embedding store at {tmp_path / name}"):
            EmbeddingStore.open(tmp_path / name)


# --------------------------------------------------------------------- damaged manifests

scalars = st.none() | st.booleans() | st.integers() | st.floats() | st.text()
any_json = st.recursive(
    scalars, lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner), max_leaves=8
)

any_shard = st.fixed_dictionaries(
    {
        "file": st.sampled_from([f"shard-{i:06d}.f16" for i in range(3)]) | scalars,
        "rows": st.sampled_from([100, SHARD_ROWS]) | scalars,
        "sha256": scalars,
    }
)
likely = {
    "shards": st.lists(st.none() | any_shard, min_size=2, max_size=3),
    "bad_rows": st.lists(st.tuples(st.integers(0, WANTED.num_rows) | scalars, scalars)),
}
names = [field.name for field in dataclasses.fields(StoreManifest)]
any_change = st.sampled_from([*names, "format", "new", *likely]).flatmap(
    lambda name: st.tuples(st.just(name), likely.get(name, st.integers(1, 10**5)) | any_json)
)


def refused(folder: Path) -> None:
    for use in (EmbeddingStore.open, lambda path: StoreWriter.create_or_resume(path, WANTED)):
        with pytest.raises(StoreError, match="is damaged or not a store's manifest") as caught:
            use(folder)
        assert "\n" not in caught.value.args[0]
        assert caught.value.hint == f"delete {folder} and embed again"


@given(content=any_json.map(json.dumps) | st.text())
@settings(deadline=None)
def test_any_json_or_text_as_manifest(tmp_path_factory, content):
    folder = tmp_path_factory.mktemp("store")
    (folder / "manifest.json").write_text(content, encoding="utf-8")
    refused(folder)


@pytest.mark.parametrize(
    "content",
    [b"", b"\xff\xfe", b"[" * 100_000, b'{"format": "dimefm_edge.store/2"}', b"1" * 10_000],
    ids=["empty", "no UTF-8", "deep", "another format", "long number"],
)
def test_odd_bytes_as_manifest(tmp_path, content):
    (tmp_path / "manifest.json").write_bytes(content)
    refused(tmp_path)


@given(changes=st.lists(any_change, min_size=1, max_size=2).map(dict))
@settings(max_examples=200, deadline=None)
def test_manifest_with_other_values(shared_store_dir, changes):
    """Whatever its values are, a store opens, or is refused as one."""
    path = shared_store_dir / "manifest.json"
    original = path.read_bytes()
    try:
        edit_manifest(shared_store_dir, **changes)
        with contextlib.suppress(StoreError):
            store = EmbeddingStore.open(shared_store_dir)
            assert len(store.gather(store.valid_rows())) <= len(store)
        with contextlib.suppress(StoreError):
            StoreWriter.create_or_resume(shared_store_dir, WANTED).missing_shards()
    finally:
        path.write_bytes(original)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("embed_dim", 0, "embed_dim must be a positive number, got 0"),
        ("embed_dim", True, "embed_dim must be a positive number, got True"),
        ("num_rows", 10**30, "num_rows must be a positive number"),
        ("num_rows", 100, "3 shards listed, 1 expected"),
        ("shard_rows", 100, "shard_rows must be a multiple of 2048, got 100"),
        ("logit_scale", float("inf"), "logit_scale must be a positive number, got inf"),
        ("teacher", 5, "teacher must be text"),
        ("new", 5, "unexpected keyword argument 'new'"),
        ("bad_rows", [[4196, "empty"]], "bad row 4196"),
        ("bad_rows", [[-1, "empty"]], "bad row -1"),
        ("bad_rows", [[float("inf"), "empty"]], "bad row inf"),
        ("shards", [None], "1 shards listed, 3 expected"),
    ],
)
def test_damage_is_named(store_dir, field, value, message):
    edit_manifest(store_dir, **{field: value})
    refused(store_dir)
    with pytest.raises(StoreError, match=re.escape(message)):
        read_manifest(store_dir)


@pytest.mark.parametrize(
    "name", ["../secret.f16", "{parent}/secret.f16", "..", "", "a/../../secret.f16", "secret.f16"]
)
def test_shard_cannot_leave_the_folder(store_dir, name):
    secret = store_dir.parent / "secret.f16"
    secret.write_bytes(bytes(SHARD_BYTES))
    shards = json.loads((store_dir / "manifest.json").read_text())["shards"]
    shards[0]["file"] = name.format(parent=store_dir.parent)
    edit_manifest(store_dir, shards=shards)
    refused(store_dir)
    with pytest.raises(StoreError, match=r"shard 0 must be shard-000000\.f16, not"):
        EmbeddingStore.open(store_dir)
    assert secret.read_bytes() == bytes(SHARD_BYTES)


@pytest.mark.parametrize("change", [{"rows": 2047}, {"sha256": None}])
def test_shard_entry_is_checked(store_dir, change):
    shards = json.loads((store_dir / "manifest.json").read_text())["shards"]
    shards[0].update(change)
    edit_manifest(store_dir, shards=shards)
    refused(store_dir)


# ------------------------------------------------------------------------ disks that fail


def assert_full(message: str, reason: str, folder: Path) -> None:
    first, _, hint = message.partition("\n")
    shard = folder / "shard-000001.f16"
    assert first == f"cannot write {shard}: {reason}; 1 of 3 shards are kept"
    assert hint == (
        "  try: make room and run the same command again (distill: with --resume): "
        "it does what is missing"
    )


def test_file_too_large_for_the_disk(tmp_path):
    folder = tmp_path / "store"
    writer = start_writer(folder, WANTED, EMBEDS, fails_at=1)
    out, err = writer.communicate()
    assert (writer.returncode, out) == (1, "0\n")
    assert_full(err.strip().removeprefix("error: "), "File too large", folder)
    assert list(states(folder)) == ["shard-000000.f16"]
    assert not list(folder.glob(".*"))
    before = states(folder)
    assert write_shards(folder, WANTED, EMBEDS) == [1, 2]
    assert before.items() <= states(folder).items()
    EmbeddingStore.open(folder).verify()


@pytest.fixture
def small_disk(tmp_path) -> Iterator[Path]:
    """A disk with room for one shard and the manifest."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(disk)]
    try:
        subprocess.run(mount, check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("mounting a disk takes root")
    yield disk
    subprocess.run(["umount", str(disk)], check=True)


def remount(disk: Path, option: str) -> None:
    subprocess.run(["mount", "-o", f"remount,{option}", str(disk)], check=True)


def test_full_disk(small_disk):
    folder = small_disk / "store"
    with pytest.raises(StoreError) as caught:
        write_shards(folder, WANTED, EMBEDS)
    assert_full(str(caught.value), "No space left on device", folder)
    before = states(folder)
    assert list(before) == ["shard-000000.f16"]
    assert not list(folder.glob(".*"))
    remount(small_disk, "size=1m")
    assert write_shards(folder, WANTED, EMBEDS) == [1, 2]
    assert before.items() <= states(folder).items()
    EmbeddingStore.open(folder).verify()


def test_disk_that_becomes_read_only(small_disk):
    writer = StoreWriter.create_or_resume(small_disk / "store", WANTED)
    writer.write_shard(0, EMBEDS[:2048])
    remount(small_disk, "ro")
    with pytest.raises(StoreError) as caught:
        writer.write_shard(1, EMBEDS[2048:4096])
    assert_full(str(caught.value), "Read-only file system", small_disk / "store")


# --------------------------------------------------------------------------------- scale

OPENER = """
import sys, time
from pathlib import Path
import numpy as np
import psutil
from dimefm_edge.data.store import EmbeddingStore

EmbeddingStore.open(Path(sys.argv[1])).gather(np.arange(10))  # loads what is loaded once
before = psutil.Process().memory_info().rss
begun = time.perf_counter()
store = EmbeddingStore.open(Path(sys.argv[2]))
seconds = time.perf_counter() - begun
rows = np.random.default_rng(0).integers(0, len(store), 256)
assert not store.gather(rows).any()
growth = psutil.Process().memory_info().rss - before
print(len(store), store.embed_dim, growth / 2**20, seconds)
"""


def test_forty_million_rows(tmp_path, shared_store_dir):
    """Sparse files: 61 GB to the reader, nothing on the disk."""
    wanted = dataclasses.replace(
        WANTED, num_rows=40_000_000, embed_dim=768, shard_rows=DEFAULT_SHARD_ROWS
    )
    writer = StoreWriter.create_or_resume(tmp_path, wanted)
    shards = []
    for index in writer.missing_shards():
        num_rows = len(wanted.rows_of(index))
        name = f"shard-{index:06d}.f16"
        with (tmp_path / name).open("wb") as stream:
            stream.truncate(num_rows * 768 * 2)
        shards.append({"file": name, "rows": num_rows, "sha256": "0" * 64})
    edit_manifest(tmp_path, shards=shards)
    command = [sys.executable, "-c", OPENER, str(shared_store_dir), str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    num_rows, embed_dim, growth_mb, seconds = map(float, done.stdout.split())
    assert (num_rows, embed_dim) == (40_000_000, 768)
    assert growth_mb < 50
    assert seconds < 1
