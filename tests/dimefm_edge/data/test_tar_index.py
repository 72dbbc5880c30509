from __future__ import annotations

import io
import tarfile
import tempfile
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dimefm_edge.data.tar_index import scan_tar
from dimefm_edge.errors import DataError

MEMBERS = {
    "a/0.jpg": b"zero" * 200,
    "a/0.txt": b"text",
    "a/1.JPG": b"",
    "a/._1.jpg": b"hidden",
    "a/" + "long" * 60 + ".jpg": b"long name",
}


def tar_bytes(members=None, *, fmt=tarfile.PAX_FORMAT) -> bytes:
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w", format=fmt) as archive:
        folder = tarfile.TarInfo("a")
        folder.type = tarfile.DIRTYPE
        archive.addfile(folder)
        for name, data in (members or MEMBERS).items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return stream.getvalue()


@pytest.mark.parametrize("fmt", [tarfile.PAX_FORMAT, tarfile.GNU_FORMAT])
def test_members_are_read_by_offset(tmp_path, fmt):
    path = tmp_path / "s.tar"
    path.write_bytes(tar_bytes(fmt=fmt))
    index = scan_tar(path, (".jpg",))
    wanted = ["a/0.jpg", "a/1.JPG", "a/" + "long" * 60 + ".jpg"]
    assert list(index.names) == wanted
    assert [index.read(i) for i in (2, 0, 1)] == [MEMBERS[wanted[i]] for i in (2, 0, 1)]


def test_shrunk_since_the_scan(tmp_path):
    path = tmp_path / "s.tar"
    path.write_bytes(tar_bytes())
    index = scan_tar(path, (".jpg",))
    path.write_bytes(b"")
    with pytest.raises(OSError, match="has shrunk"):
        index.read(0)


def test_every_truncation_is_noticed(tmp_path):
    # Down to the last member; tarfile alone takes a cut between two members for the end.
    data = tar_bytes()
    path = tmp_path / "s.tar"
    end = len(data.rstrip(b"\0")) // 512 * 512 + 512
    for size in [*range(0, end, 512), *range(1, end, 97)]:
        path.write_bytes(data[:size])
        with pytest.raises(DataError, match="truncated or not a plain tar") as caught:
            scan_tar(path, (".jpg",))
        assert str(path) in str(caught.value)


def test_damage_in_the_middle_is_noticed(tmp_path):
    data = bytearray(tar_bytes())
    second = data.index(b"a/0.txt")
    data[second + 100] ^= 0xFF  # its mode: the checksum is wrong now
    path = tmp_path / "s.tar"
    path.write_bytes(data)
    with pytest.raises(DataError, match="no valid header"):
        scan_tar(path, (".jpg",))


def test_compressed_tar_says_how_to_mend(tmp_path):
    path = tmp_path / "s.tar"
    with tarfile.open(path, "w:gz") as archive:
        archive.addfile(tarfile.TarInfo("a.jpg"))
    with pytest.raises(DataError, match="gunzip"):
        scan_tar(path, (".jpg",))


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.data())
def test_damaged_bytes_raise_data_errors_only(data):
    whole = tar_bytes()
    damaged = bytearray(whole[: data.draw(st.integers(0, len(whole)), label="kept bytes")])
    for place in data.draw(st.lists(st.integers(0, len(whole) - 1), max_size=6), label="places"):
        if place < len(damaged):
            damaged[place] = data.draw(st.integers(0, 255), label="byte")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "s.tar")
        path.write_bytes(damaged)
        try:
            index = scan_tar(path, (".jpg",))
        except DataError:
            return
        for place in range(len(index.names)):
            assert len(index.read(place)) == index.sizes[place]


@settings(max_examples=100, deadline=None)
@given(st.binary(max_size=3000))
def test_any_bytes_raise_data_errors_only(junk):
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "s.tar")
        path.write_bytes(junk)
        if len(junk) < 512 or any(junk[:512]):
            with pytest.raises(DataError):
                scan_tar(path, (".jpg",))
