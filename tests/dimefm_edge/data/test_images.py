"""Pools of images: every kind of source, and what is said about those that cannot be used."""

from __future__ import annotations

import contextlib
import io
import struct
import subprocess
import sys
import tempfile
import warnings
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from PIL import Image

from dimefm_edge.data.images import BadImageError, ImagePool, decode_image, open_images
from dimefm_edge.errors import DataError, MissingExtraError


def seeds(pool: ImagePool, encoded) -> list[int]:
    """Which seeds the images of a pool were made of, by their pixels."""
    known = {decode_image(encoded(s), "").tobytes(): s for s in range(12)}
    return [known[pool.load(row).tobytes()] for row in range(len(pool))]


def table(path: Path, cells: list, kind: pa.DataType, *, row_group_size: int = 2) -> Path:
    """A Parquet file with a column `image`."""
    columns = {"image": pa.array(cells, kind), "id": list(range(len(cells)))}
    pq.write_table(pa.table(columns), path, row_group_size=row_group_size)
    return path


def test_folder_tree_in_natural_order(tmp_path, encoded, write_files):
    write_files(
        tmp_path,
        {
            "b/10.jpg": encoded(3), "b/2.JPEG": encoded(2), "a.jpg": encoded(1),
            "b/2.txt": b"a caption", "b/._2.jpg": b"junk", "0000.parquet": b"metadata",
        },
    )  # fmt: skip
    pool = open_images([str(tmp_path)])
    assert seeds(pool, encoded) == [1, 2, 3]
    assert pool.name(1) == f"{tmp_path}/b/2.JPEG"


def test_tars_as_img2dataset_writes_them(tmp_path, encoded, write_tar):
    for shard in range(2):
        members = {}
        for i in range(3):
            key = f"{shard:05d}{i:04d}"
            members |= {f"{key}.jpg": encoded(3 * shard + i), f"{key}.json": b"{}"}
            members[f"{key}.txt"] = b"a caption"
        write_tar(tmp_path / f"{shard:05d}.tar", members)
        (tmp_path / f"{shard:05d}.parquet").write_bytes(b"metadata")
        (tmp_path / f"{shard:05d}_stats.json").write_text("{}")
    folder = open_images([str(tmp_path)])
    assert seeds(folder, encoded) == [0, 1, 2, 3, 4, 5]
    for source in (f"{tmp_path}/{{00000..00001}}.tar", f"{tmp_path}/*.tar"):
        assert seeds(open_images([source]), encoded) == [0, 1, 2, 3, 4, 5]
    assert folder.name(5) == f"{tmp_path}/00001.tar/000010002.jpg"


@pytest.mark.parametrize("form", ["bytes", "struct"])
def test_parquet_by_row_group(tmp_path, encoded, form):
    cells: list = [encoded(i) for i in range(7)]
    kind = pa.binary()
    if form == "struct":
        kind = pa.struct({"bytes": pa.binary(), "path": pa.string()})
        cells = [{"bytes": cell, "path": None} for cell in cells]
    pool = open_images([str(table(tmp_path / "t.parquet", cells, kind))])
    assert seeds(pool, encoded) == list(range(7))
    backwards = [decode_image(encoded(row), "").tobytes() for row in range(6, -1, -1)]
    assert [pool.load(row).tobytes() for row in range(6, -1, -1)] == backwards


def test_parquet_cell_without_bytes(tmp_path, encoded):
    path = table(tmp_path / "t.parquet", [encoded(0), None], pa.binary())
    pool = open_images([str(path)])
    with pytest.raises(BadImageError, match=r"t\.parquet\[1\] cannot be read: the cell holds no"):
        pool.load(1)
    with pytest.raises(IndexError):
        pool.load(2)


def test_hugging_face_folder(tmp_path, encoded, write_files):
    datasets = pytest.importorskip("datasets")
    files = write_files(tmp_path / "files", {f"{i}.jpg": encoded(i) for i in range(3)})
    images = datasets.Dataset.from_dict({"photo": [str(files / f"{i}.jpg") for i in range(3)]})
    images = images.cast_column("photo", datasets.Image())
    images.save_to_disk(str(tmp_path / "set"))
    pool = open_images([str(tmp_path / "set")], column="photo")
    assert seeds(pool, encoded) == [0, 1, 2]
    with pytest.raises(DataError, match="no column 'image'; its columns: photo"):
        open_images([str(tmp_path / "set")])
    datasets.DatasetDict({"train": images}).save_to_disk(str(tmp_path / "splits"))
    with pytest.raises(DataError, match="several splits") as caught:
        open_images([str(tmp_path / "splits")], column="photo")
    assert f"{tmp_path}/splits/train" in str(caught.value)


def test_hugging_face_folder_that_is_damaged(tmp_path):
    (tmp_path / "dataset_info.json").write_text("{")
    with pytest.raises(DataError, match="no whole Hugging Face dataset"):
        open_images([str(tmp_path)])


def test_scenes():
    pool = open_images(["scenes:5"])
    assert len(pool) == 5
    assert pool.load(4).size == (64, 64)
    assert len(open_images(["scenes"])) == 12_000
    assert pool.fingerprint == open_images(["scenes:5"]).fingerprint
    assert pool.fingerprint != open_images(["scenes:6"]).fingerprint
    with pytest.raises(IndexError):
        pool.load(5)


def test_sources_follow_one_another(tmp_path, encoded, write_tar, write_files):
    tar = write_tar(tmp_path / "s.tar", {"0.jpg": encoded(4), "1.jpg": encoded(5)})
    folder = write_files(tmp_path / "files", {"x.jpg": encoded(6)})
    pool = open_images([str(tar), str(folder), f"{folder}/x.jpg"])
    assert seeds(pool, encoded) == [4, 5, 6, 6]
    assert pool.name(2) == f"{folder}/x.jpg"
    with pytest.raises(IndexError):
        pool.load(4)
    with pytest.raises(IndexError):
        pool.name(-1)


def test_fingerprint_is_of_names_and_sizes(tmp_path, encoded, write_files, write_tar):
    files = {"a/1.jpg": encoded(1), "2.jpg": encoded(2)}
    first = open_images([str(write_files(tmp_path / "one", files))]).fingerprint
    assert len(first) == 16
    assert open_images([str(write_files(tmp_path / "moved", files))]).fingerprint == first
    other = {**files, "2.jpg": encoded(2) + b"0"}
    assert open_images([str(write_files(tmp_path / "two", other))]).fingerprint != first
    tars = [write_tar(tmp_path / f"{i}/s.tar", {"a.jpg": encoded(1) + b"0" * i}) for i in (0, 1)]
    assert len({open_images([str(tar)]).fingerprint for tar in tars}) == 2


@pytest.mark.parametrize("fmt", ["JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF"])
def test_formats_and_modes_become_rgb(encoded, fmt):
    assert decode_image(encoded(1, fmt=fmt), "x").mode == "RGB"
    for mode in ("L", "P", "1"):
        stream = io.BytesIO()
        Image.new(mode, (8, 8)).save(stream, "PNG")
        assert decode_image(stream.getvalue(), "x").mode == "RGB"


def bomb() -> bytes:
    """A PNG that says it is 60,000 x 60,000."""
    stream = io.BytesIO()
    Image.new("1", (8, 8)).save(stream, "PNG")
    data = bytearray(stream.getvalue())
    data[16:24] = struct.pack(">II", 60_000, 60_000)
    data[29:33] = struct.pack(">I", zlib.crc32(data[12:29]))
    return bytes(data)


def test_bad_images_say_why(encoded):
    whole = encoded(1, size=(200, 200))
    for data, reason in (
        (b"", "the file is empty"),
        (b"<html>404</html>", "not an image file that Pillow knows"),
        (whole[: len(whole) // 2], "truncated"),
        (encoded(1, fmt="PNG")[:-30], "truncated"),
        (bomb(), "decompression bomb"),
    ):
        with pytest.raises(BadImageError) as caught:
            decode_image(data, "tar/1.jpg")
        assert reason in caught.value.reason
        assert "image tar/1.jpg cannot be read" in str(caught.value)
        assert "tar/1.jpg" not in caught.value.reason


def test_image_over_pillows_limit(encoded, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 200)
    with pytest.warns(Image.DecompressionBombWarning), pytest.raises(BadImageError) as caught:
        decode_image(encoded(1), "x")
    assert caught.value.reason == "20 x 14 pixels exceed the limit of 200"


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_damaged_images_raise_bad_image_errors_only(data):
    fmt = data.draw(st.sampled_from(["JPEG", "PNG", "GIF", "TIFF", "WEBP", "BMP"]))
    stream = io.BytesIO()
    Image.new("RGB", (9, 7), (200, 30, 60)).save(stream, fmt)
    damaged = bytearray(stream.getvalue())
    for place in data.draw(st.lists(st.integers(0, len(damaged) - 1), min_size=1, max_size=5)):
        damaged[place] = data.draw(st.integers(0, 255))
    with warnings.catch_warnings(), contextlib.suppress(BadImageError):
        warnings.simplefilter("ignore")  # Pillow's, about TIFF tags
        assert decode_image(bytes(damaged), "x").mode == "RGB"


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10_000), st.integers(0, 255))
@example(2640, 37)  # fewer rows than none
def test_damaged_parquet_raises_data_errors_only(place, value):
    cells = [bytes([i]) * 20 for i in range(20)]
    with tempfile.TemporaryDirectory() as folder:
        path = table(Path(folder, "t.parquet"), cells, pa.binary())
        data = bytearray(path.read_bytes())
        data[place % len(data)] = value
        path.write_bytes(data)
        try:
            pool = open_images([str(path)])
        except DataError:
            return
        for row in range(len(pool)):
            with pytest.raises(BadImageError):  # none of the cells is an image
                pool.load(row)


def test_image_that_went_away(tmp_path, encoded, write_files, write_tar):
    write_files(tmp_path / "files", {"x.jpg": encoded(1)})
    tar = write_tar(tmp_path / "s.tar", {"x.jpg": encoded(1)})
    pool = open_images([str(tmp_path / "files"), str(tar)])
    (tmp_path / "files" / "x.jpg").unlink()
    tar.unlink()
    for row in range(2):
        with pytest.raises(BadImageError) as caught:
            pool.load(row)
        assert caught.value.reason == "No such file or directory"


def test_what_cannot_be_used_is_said(tmp_path, encoded, write_files, write_tar):
    write_files(tmp_path, {"empty/readme.txt": b"", "a.csv": b"x", "bad.parquet": b"PAR1"})
    write_tar(tmp_path / "text.tar", {"0.txt": b"no image"})
    table(tmp_path / "text.parquet", ["a", "b"], pa.string())
    (tmp_path / "cut.tar").write_bytes((tmp_path / "text.tar").read_bytes()[:700])
    for source, message in (
        ("empty", "empty holds no image"),
        ("text.tar", "text.tar holds no image"),
        ("a.csv", "its name ends in '.csv'"),
        ("bad.parquet", "truncated or not a Parquet file"),
        ("text.parquet", "column 'image' of .* holds string, not encoded images"),
        ("cut.tar", "cut.tar is truncated"),
        ("none", "none does not exist"),
    ):
        with pytest.raises(DataError, match=message):
            open_images([f"{tmp_path}/{source}"])
    with pytest.raises(DataError, match="no column 'photo'; its columns: image, id"):
        open_images([f"{tmp_path}/text.parquet"], column="photo")
    with pytest.raises(DataError, match="--images scenes"):
        open_images([])


@pytest.mark.parametrize(("name", "package"), [("t.parquet", "pyarrow"), ("set", "datasets")])
def test_missing_packages_are_named(tmp_path, monkeypatch, encoded, name, package):
    table(tmp_path / "t.parquet", [encoded(0)], pa.binary())
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "dataset_info.json").write_text("{}")
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(MissingExtraError, match=f"{package}.* not installed\n  try: pip install"):
        open_images([f"{tmp_path}/{name}"])


def test_images_import_no_torch():
    code = "import sys, dimefm_edge.data.images, dimefm_edge.data.sentences\n"
    code += "assert not {'torch', 'pyarrow', 'datasets', 'braceexpand'} & set(sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_tar_pool_reads_from_many_threads(tmp_path, encoded, write_tar):
    write_tar(tmp_path / "s.tar", {f"{i}.jpg": encoded(i) for i in range(12)})
    pool = open_images([str(tmp_path / "s.tar")])
    rows = np.random.default_rng(0).integers(0, 12, 200).tolist()
    with ThreadPoolExecutor(8) as executor:
        found = list(executor.map(lambda row: pool.load(row).tobytes(), rows))
    assert found == [decode_image(encoded(row), "").tobytes() for row in rows]
