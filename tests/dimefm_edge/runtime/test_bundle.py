"""load_bundle trusts nothing: damage, tampering and hostile archives are CheckpointErrors."""

from __future__ import annotations

import gc
import hashlib
import json
import shutil
import stat
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dimefm_edge.errors import CheckpointError
from dimefm_edge.runtime import load_bundle, load_engine


@pytest.fixture(autouse=True)
def temporary_dir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """So that what is left behind is seen, and parallel tests are not."""
    (tmp_path / "tmp").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "tmp"))


def zip_folder(folder: Path, *, prefix: str = "", method: int = zipfile.ZIP_DEFLATED) -> Path:
    path = folder.parent / "bundle.zip"
    with zipfile.ZipFile(path, "w", method) as archive:
        for file in sorted(folder.rglob("*")):
            archive.write(file, prefix + file.relative_to(folder).as_posix())
    return path


def edit_manifest(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    path = folder / "manifest.json"
    manifest = json.loads(path.read_text())
    change(manifest)
    path.write_text(json.dumps(manifest))


def relist(folder: Path, name: str) -> None:
    """Make the manifest agree with a file, as a forger would."""
    data = (folder / name).read_bytes()
    entry = {"sha256": hashlib.sha256(data).hexdigest(), "size_bytes": len(data)}
    edit_manifest(folder, lambda m: m["files"].update({name: entry}))


def refused(path: Path, message: str) -> None:
    with pytest.raises(CheckpointError) as caught:
        load_bundle(path)
    text = str(caught.value)
    assert message in text
    assert "\n  try: " in text
    assert text.count("\n") == 1
    assert caught.value.exit_code == 2
    assert not list(Path(tempfile.gettempdir()).iterdir())


@pytest.mark.parametrize("prefix", ["", "my bundle/"])
def test_folder_and_archive_give_the_same(bundle_dir: Path, prefix: str) -> None:
    folder, archive = (
        load_bundle(str(bundle_dir)),
        load_bundle(zip_folder(bundle_dir, prefix=prefix)),
    )
    assert folder.manifest == archive.manifest
    assert list(folder.label_banks) == list(archive.label_banks) == ["images", "pair"]
    assert folder.preprocess == archive.preprocess
    assert folder.name == "vit-p16-w32-d1"
    assert (folder.precision, folder.embed_dim, folder.logit_scale) == ("fp32", 24, 100.0)
    assert archive.model_path.read_bytes() == folder.model_path.read_bytes()
    assert folder.size_mib == (bundle_dir / "model.onnx").stat().st_size / 2**20
    unpacked = archive.model_path.parent
    del archive
    gc.collect()
    assert not unpacked.exists()


def test_a_link_to_the_whole_bundle_is_fine(bundle_dir: Path, tmp_path: Path) -> None:
    (tmp_path / "latest").symlink_to(bundle_dir)
    assert load_bundle(tmp_path / "latest").embed_dim == 24


def test_missing_and_foreign_places(bundle_dir: Path, tmp_path: Path) -> None:
    refused(tmp_path / "nowhere", "no bundle at")
    (tmp_path / "run").mkdir()
    refused(tmp_path / "run", "run is no bundle: it has no manifest.json")
    shutil.copytree(bundle_dir, tmp_path / "run" / "bundle")
    refused(tmp_path / "run", f"try: {tmp_path / 'run' / 'bundle'}")
    refused(bundle_dir / "model.onnx", "is no bundle: neither a folder nor a whole .zip archive")
    with zipfile.ZipFile(tmp_path / "photos.zip", "w") as archive:
        archive.writestr("cat.jpg", b"jpeg")
    refused(tmp_path / "photos.zip", "photos.zip is no bundle: it has no manifest.json")


def test_an_archive_that_was_cut_off_behind_its_labels(bundle_dir: Path, tmp_path: Path) -> None:
    """labels.npz is an archive itself: its end is taken for the bundle's."""
    with zipfile.ZipFile(tmp_path / "whole.zip", "w") as archive:
        for name in ("labels.npz", "manifest.json", "model.onnx"):
            archive.write(bundle_dir / name, name)
    size = (bundle_dir / "labels.npz").stat().st_size + 200
    (tmp_path / "cut.zip").write_bytes((tmp_path / "whole.zip").read_bytes()[:size])
    assert zipfile.is_zipfile(tmp_path / "cut.zip")
    refused(tmp_path / "cut.zip", "cut.zip is no bundle: it has no manifest.json, or was cut off")


@pytest.mark.parametrize("is_zip", [False, True])
@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda d: (d / "model.onnx").unlink(), "lacks model.onnx"),
        (lambda d: (d / "labels.npz").unlink(), "lacks labels.npz"),
        (lambda d: (d / "manifest.json").unlink(), "is no bundle: it has no manifest.json"),
        (
            lambda d: (d / "model.onnx").write_bytes((d / "model.onnx").read_bytes()[:-100]),
            "model.onnx is truncated (",
        ),
        (
            lambda d: (d / "model.onnx").write_bytes((d / "model.onnx").read_bytes() + b"x"),
            "model.onnx is not the file that was exported (",
        ),
        (
            lambda d: (d / "model.onnx").write_bytes(b"\0" + (d / "model.onnx").read_bytes()[1:]),
            "model.onnx was changed after the export (sha256 ",
        ),
        (
            lambda d: edit_manifest(d, lambda m: m["files"]["labels.npz"].update(sha256="0" * 64)),
            "labels.npz was changed after the export (sha256 ",
        ),
        (
            lambda d: edit_manifest(d, lambda m: m.update(format_version=9)),
            "has bundle format version 9; this package reads 1",
        ),
        (
            lambda d: edit_manifest(d, lambda m: m["files"].update({"../x": {}})),
            "the file name '../x' leaves the bundle",
        ),
        (lambda d: (d / "manifest.json").write_text("{"), "bad manifest.json: Expecting"),
        (
            lambda d: (d / "manifest.json").write_bytes(b" " * (2**23 + 1)),
            "manifest.json is too large",
        ),
        (
            lambda d: edit_manifest(d, lambda m: m["label_sets"].pop()),
            "labels.npz and manifest.json disagree about the label sets",
        ),
        (
            lambda d: edit_manifest(d, lambda m: m.update(embed_dim=25)),
            "label set 'images' has 24 dimensions, the model 25",
        ),
        (
            lambda d: ((d / "labels.npz").write_bytes(b"PK not"), relist(d, "labels.npz")),
            "holds no label sets of ours",
        ),
    ],
)
def test_damage_is_named(
    damage: Callable[[Path], object], message: str, is_zip: bool, bundle_dir: Path
) -> None:
    damage(bundle_dir)
    refused(zip_folder(bundle_dir) if is_zip else bundle_dir, message)


def test_links_inside_a_folder_are_refused(bundle_dir: Path, tmp_path: Path) -> None:
    (bundle_dir / "model.onnx").rename(tmp_path / "elsewhere.onnx")
    (bundle_dir / "model.onnx").symlink_to(tmp_path / "elsewhere.onnx")
    refused(bundle_dir, "model.onnx is a link; a bundle holds files only")


def test_linked_subfolders_are_refused(bundle_dir: Path, tmp_path: Path) -> None:
    (tmp_path / "kernels").mkdir()
    (tmp_path / "kernels" / "a.cubin").write_bytes(b"code")
    (bundle_dir / "kernels").symlink_to(tmp_path / "kernels")
    relist(bundle_dir, "kernels/a.cubin")
    refused(bundle_dir, "kernels/a.cubin is a link; a bundle holds files only")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("../evil.txt", "the file name '../evil.txt' leaves the bundle"),
        ("/tmp/evil.txt", "the file name '/tmp/evil.txt' leaves the bundle"),
        ("a/../../evil.txt", "the file name 'a/../../evil.txt' leaves the bundle"),
        ("C:\\evil.txt", "leaves the bundle"),
        ("..\\evil.txt", "leaves the bundle"),
        ("model.onnx", "holds model.onnx twice"),
    ],
)
def test_hostile_names_in_an_archive(name: str, message: str, bundle_dir: Path) -> None:
    path = zip_folder(bundle_dir)
    with zipfile.ZipFile(path, "a") as archive:
        if name in archive.namelist():
            with pytest.warns(UserWarning, match="Duplicate name"):
                archive.writestr(name, b"evil")
        else:
            archive.writestr(name, b"evil")
    refused(path, message)
    assert not (path.parent.parent / "evil.txt").exists()


def test_a_link_in_an_archive_is_refused(bundle_dir: Path) -> None:
    path = zip_folder(bundle_dir)
    link = zipfile.ZipInfo("kernels")
    link.external_attr = (stat.S_IFLNK | 0o777) << 16
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr(link, "/etc")
    refused(path, "kernels is a link; a bundle holds files only")


def test_zip_bombs_are_refused_unread(bundle_dir: Path) -> None:
    with (bundle_dir / "model.onnx").open("wb") as stream:
        stream.truncate(200 * 2**20)  # zeros: 200 MiB that deflate to 200 KiB
    edit_manifest(bundle_dir, lambda m: m["files"]["model.onnx"].update(size_bytes=200 * 2**20))
    refused(zip_folder(bundle_dir), "MiB to 200 MiB: no bundle does")


def test_a_member_that_is_longer_than_it_says(bundle_dir: Path) -> None:
    """The directory's size is forged; the stream holds more."""
    size = (bundle_dir / "model.onnx").stat().st_size
    path = zip_folder(bundle_dir)
    data = bytearray(path.read_bytes())
    place = data.rindex(b"PK\x01\x02", 0, data.rindex(b"model.onnx"))
    assert int.from_bytes(data[place + 24 : place + 28], "little") == size
    data[place + 24 : place + 28] = (size - 64).to_bytes(4, "little")
    path.write_bytes(data)
    refused(path, "model.onnx is truncated (")
    edit_manifest(bundle_dir, lambda m: m["files"]["model.onnx"].update(size_bytes=size - 64))
    data = bytearray(zip_folder(bundle_dir).read_bytes())
    place = data.rindex(b"PK\x01\x02", 0, data.rindex(b"model.onnx"))
    data[place + 24 : place + 28] = (size - 64).to_bytes(4, "little")
    path.write_bytes(data)
    refused(path, "cannot read the bundle")


def test_names_that_are_no_text_in_an_archive(bundle_dir: Path) -> None:
    path = zip_folder(bundle_dir)
    data = bytearray(path.read_bytes())
    place = data.rindex(b"PK\x01\x02")
    data[place + 9] |= 8  # the name is said to be UTF-8
    data[place + 46] = 0xFF
    path.write_bytes(data)
    refused(path, "cannot read the bundle")


def test_an_encrypted_archive_is_refused(bundle_dir: Path) -> None:
    path = zip_folder(bundle_dir)
    data = bytearray(path.read_bytes())
    data[data.rindex(b"PK\x01\x02") + 8] |= 1
    path.write_bytes(data)
    refused(path, "is encrypted")


def test_a_forged_graph_is_refused_by_the_engine(bundle_dir: Path) -> None:
    model = bundle_dir / "model.onnx"
    model.write_bytes(model.read_bytes()[:1000])
    relist(bundle_dir, "model.onnx")
    bundle = load_bundle(bundle_dir)
    with pytest.raises(
        CheckpointError, match=r"ONNX Runtime 1\.\d+\.\d+ cannot load .*model.onnx: .*\n  try: pip"
    ):
        load_engine(bundle)


@settings(
    max_examples=120, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    cut=st.floats(0, 1),
    flips=st.lists(st.tuples(st.floats(0, 1), st.integers(0, 255)), max_size=4),
)
def test_a_damaged_archive_is_refused_or_still_whole(
    exported_bundle: Path, tmp_path: Path, cut: float, flips: list[tuple[float, int]]
) -> None:
    source = tmp_path / "source.zip"
    if not source.exists():
        copy = shutil.copytree(exported_bundle, tmp_path / "copy")
        zip_folder(Path(copy)).rename(source)
    data = bytearray(source.read_bytes())
    for place, value in flips:
        # Half of the flips near the end, where the archive's directory is.
        index = (
            int(place * 2 * (len(data) - 1)) if place < 0.5 else len(data) - 1 - int(place * 700)
        )
        data[index] = value
    damaged = tmp_path / "damaged.zip"
    damaged.write_bytes(data if cut > 0.5 else data[: int(len(data) * 2 * cut)])
    try:
        bundle = load_bundle(damaged)
    except CheckpointError:
        return
    whole = load_bundle(exported_bundle)
    assert bundle.manifest["files"] == whole.manifest["files"]
    assert bundle.model_path.read_bytes() == whole.model_path.read_bytes()
