"""export_student: the whole bundle appears, or nothing does and what was there stays."""

from __future__ import annotations

import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
import zipfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
import torch

from dimefm_edge.data.scenes import scene_image
from dimefm_edge.errors import CheckpointError, ExportError, InputError, UnknownNameError
from dimefm_edge.export import GraphSpec, export_student, record_accuracy
from dimefm_edge.export.bundle import building, write_bundle
from dimefm_edge.labels import LabelBank
from dimefm_edge.preprocess import PreprocessSpec, preprocess_images
from dimefm_edge.runtime import load_bundle, load_engine
from dimefm_edge.students import LoadedStudent, build_student, vit_spec

SIDE, DIM = 32, 24
FIELDS = {
    "name": "x", "spec": {}, "precision": "fp32", "opset": 20, "parity": {}, "logit_scale": 1.0,
    "preprocess": PreprocessSpec(SIDE).to_dict(), "embed_dim": DIM,
}  # fmt: skip


def bank(name: str = "pets", dim: int = DIM) -> LabelBank:
    rows = np.random.default_rng(0).normal(size=(3, dim))
    embeds = (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)
    return LabelBank(name, ("cat", "dog", "eel"), ("a {c}.",), embeds)


@pytest.fixture(scope="module")
def loaded() -> LoadedStudent:
    torch.manual_seed(1)
    spec = vit_spec(image_size=SIDE, embed_dim=DIM, patch_size=16, width=32, depth=1, num_heads=1)
    return LoadedStudent(build_student(spec).eval(), spec, PreprocessSpec(SIDE), {})


@pytest.fixture(scope="module")
def images() -> npt.NDArray[np.float32]:
    return preprocess_images([scene_image(i) for i in range(4)], PreprocessSpec(SIDE))


@pytest.fixture
def exported(
    loaded: LoadedStudent,
    images: npt.NDArray[np.float32],
    tmp_path: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> Path:
    """A bundle at tmp_path/bundle with logit_scale 10."""
    kept = tmp_path_factory.getbasetemp() / "exported-once"
    if not kept.exists():
        export_student(loaded, kept, parity_images=images, logit_scale=10.0)
    return Path(shutil.copytree(kept, tmp_path / "bundle"))


def contents(folder: Path) -> dict[str, bytes]:
    return {
        p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()
    }


@pytest.mark.parametrize(
    ("name", "precision"), [("bundle", "fp32"), ("deep/down/bundle.zip", "fp16")]
)
def test_a_bundle_tells_everything_and_answers(
    name: str,
    precision: str,
    loaded: LoadedStudent,
    images: npt.NDArray[np.float32],
    tmp_path: Path,
) -> None:
    out = tmp_path / name
    returned = export_student(
        loaded, out, graph=GraphSpec(precision=precision), label_banks=[bank(), bank("zoo")],
        parity_images=images, logit_scale=42.5,
        extra={"target": "jetson-orin", "accuracy": {"pets": {"top1_pct": 90.0}}, "budget_ms": 3},
    )  # fmt: skip
    assert returned == out
    assert [p.name for p in out.parent.iterdir()] == [out.name]
    bundle = load_bundle(out)
    manifest = bundle.manifest
    assert manifest["spec"] == loaded.spec.to_dict()
    assert (manifest["target"], manifest["precision"], manifest["opset"]) == (
        "jetson-orin", precision, 20,
    )  # fmt: skip
    assert bundle.preprocess == loaded.preprocess
    assert bundle.logit_scale == 42.5
    assert list(bundle.label_banks) == ["pets", "zoo"]
    np.testing.assert_array_equal(bundle.label_banks["pets"].embeds, bank().embeds)
    assert manifest["accuracy"] == {"pets": {"top1_pct": 90.0}}
    assert manifest["extra"] == {"budget_ms": 3}
    assert manifest["parity"]["num_images"] == 4
    assert manifest["parity"]["max_abs_diff"] <= (1e-4 if precision == "fp32" else 0.05)
    assert sorted(manifest["files"]) == ["labels.npz", "model.onnx"]
    assert manifest["versions"]["torch"] == torch.__version__.split("+")[0]
    assert manifest["graph"]["op_counts"]["LayerNormalization"] == 4
    (attention,) = manifest["graph"]["attentions"]
    assert attention["form"] == "decomposed"
    with torch.no_grad():
        expected = loaded.student(torch.from_numpy(images)).numpy()
    embeds = load_engine(bundle, threads=1).encode_image(images)
    assert (embeds * expected).sum(axis=1).min() > 0.999


def test_a_bundle_is_replaced_and_its_accuracy_recorded(
    loaded: LoadedStudent, images: npt.NDArray[np.float32], exported: Path, tmp_path: Path
) -> None:
    archive = tmp_path / "bundle.zip"
    with building(archive) as folder:
        shutil.copytree(exported, folder, dirs_exist_ok=True)
    for out in (exported, archive):
        assert load_bundle(out).logit_scale == 10.0
        export_student(loaded, out, parity_images=images, logit_scale=20.0)
        assert load_bundle(out).logit_scale == 20.0
        assert load_bundle(out).label_banks == {}
        record_accuracy(out, {"scenes": {"top1_pct": 91.25}})
        bundle = load_bundle(out)
        assert bundle.manifest["accuracy"] == {"scenes": {"top1_pct": 91.25}}
        assert bundle.logit_scale == 20.0
    assert sorted(p.name for p in tmp_path.iterdir()) == ["bundle", "bundle.zip"]
    with pytest.raises(CheckpointError, match=r"no bundle at .*nowhere"):
        record_accuracy(tmp_path / "nowhere", {})
    with pytest.raises(ExportError, match="cannot be written as JSON"):
        record_accuracy(tmp_path / "bundle", {"top1_pct": float("nan")})
    assert load_bundle(tmp_path / "bundle").manifest["accuracy"]["scenes"]["top1_pct"] == 91.25


def foreign_places(root: Path) -> dict[str, Path]:
    (root / "photos").mkdir()
    (root / "photos" / "cat.jpg").write_bytes(b"jpeg")
    (root / "notes.txt").write_text("mine")
    (root / "other.zip").write_bytes(b"not even a zip")
    with zipfile.ZipFile(root / "photos.zip", "w") as archive:
        archive.writestr("cat.jpg", b"jpeg")
    (root / "json").mkdir()
    (root / "json" / "manifest.json").write_text('{"format": "npm"}')
    (root / "target").mkdir()
    (root / "link").symlink_to(root / "target")
    (root / "folder.zip").mkdir()
    return {
        "photos": root / "photos", "notes": root / "notes.txt", "bad zip": root / "other.zip",
        "zip": root / "photos.zip", "json": root / "json", "link": root / "link",
        "folder.zip": root / "folder.zip",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("photos", "photos exists and is not a bundle of ours"),
        ("notes", "notes.txt is a file; a bundle there would be a folder"),
        ("bad zip", "other.zip exists and is not a bundle of ours"),
        ("zip", "photos.zip exists and is not a bundle of ours"),
        ("json", "json exists and is not a bundle of ours"),
        ("link", "link is a link and is not replaced"),
        ("folder.zip", "folder.zip is a folder but names a .zip"),
    ],
)
def test_what_is_not_ours_is_not_replaced(
    kind: str,
    message: str,
    loaded: LoadedStudent,
    images: npt.NDArray[np.float32],
    tmp_path: Path,
) -> None:
    out = foreign_places(tmp_path)[kind]
    before = contents(tmp_path)
    with pytest.raises(InputError, match=message + r"\n  try: choose another --out"):
        export_student(loaded, out, parity_images=images, logit_scale=1.0)
    assert contents(tmp_path) == before


def test_an_empty_folder_is_filled(
    loaded: LoadedStudent, images: npt.NDArray[np.float32], tmp_path: Path
) -> None:
    export_student(loaded, tmp_path, parity_images=images, logit_scale=1.0)
    assert load_bundle(tmp_path).logit_scale == 1.0


def test_a_bundle_with_files_of_the_user_is_kept(
    loaded: LoadedStudent, images: npt.NDArray[np.float32], exported: Path
) -> None:
    out = exported
    (out / "notes.txt").write_text("mine")
    with pytest.raises(InputError, match=r"is a bundle that also holds notes\.txt"):
        export_student(loaded, out, parity_images=images, logit_scale=1.0)
    assert (out / "notes.txt").read_text() == "mine"


def test_a_failed_export_leaves_the_old_bundle_and_nothing_else(
    loaded: LoadedStudent, images: npt.NDArray[np.float32], exported: Path, tmp_path: Path
) -> None:
    out = exported
    before = contents(tmp_path)
    with pytest.raises(ExportError, match="label set 'pets' has 7 dimensions, the student 24"):
        export_student(
            loaded, out, parity_images=images, logit_scale=1.0, label_banks=[bank(dim=7)]
        )
    with pytest.raises(UnknownNameError, match="unknown export format 'tensort'"):
        export_student(loaded, out, fmt="tensort", parity_images=images, logit_scale=1.0)
    with pytest.raises(CheckpointError, match="logit_scale must be positive, got -1"):
        export_student(loaded, out, parity_images=images, logit_scale=-1.0)
    with pytest.raises(ExportError, match="without NaN"):
        export_student(loaded, out, parity_images=images * np.float32("inf"), logit_scale=1.0)
    wrong = LoadedStudent(loaded.student, loaded.spec, PreprocessSpec(64), {})
    with pytest.raises(ExportError, match="takes 32 px but its preprocessing gives 64 px"):
        export_student(wrong, out, parity_images=images, logit_scale=1.0)
    assert contents(tmp_path) == before
    assert [p.name for p in tmp_path.iterdir()] == ["bundle"]


def test_a_full_disk_is_an_export_error_and_leaves_nothing(tmp_path: Path) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**20, hard))  # a write past 1 MiB fails
    try:
        with (
            pytest.raises(ExportError, match=r"cannot write .*bundle: File too large\n  try: free"),
            building(tmp_path / "bundle") as folder,
        ):
            (folder / "model.onnx").write_bytes(bytes(2**21))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert not list(tmp_path.iterdir())


def test_an_impossible_place_is_an_export_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with (
        pytest.raises(ExportError, match=r"cannot write .*bundle: .*file is a file, not a folder"),
        building(tmp_path / "file" / "bundle"),
    ):
        pass


def test_an_interrupted_build_leaves_nothing(tmp_path: Path) -> None:
    with (  # noqa: PT012
        pytest.raises(KeyboardInterrupt),
        building(tmp_path / "bundle") as folder,
    ):
        (folder / "model.onnx").write_bytes(b"half")
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(5)
    assert not list(tmp_path.iterdir())


REPLACE_FOREVER = """
import os, shutil, sys
from pathlib import Path
from dimefm_edge.export.bundle import building

def replace_forever(out, source):
    while True:
        with building(Path(out)) as folder:
            shutil.copytree(source, folder, dirs_exist_ok=True)

for line in sys.stdin:
    child = os.fork()
    if not child:
        replace_forever(*line.split())
    print(child, flush=True)
    os.waitpid(child, 0)
    print("gone", flush=True)
"""


@pytest.fixture(scope="module")
def replacer() -> Iterator[subprocess.Popen[str]]:
    """Imports once; for each line `OUT SOURCE`, a process that replaces the bundle for ever."""
    with subprocess.Popen(
        [sys.executable, "-c", REPLACE_FOREVER], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        text=True, cwd=Path(__file__).parents[3],
    ) as process:  # fmt: skip
        yield process


@pytest.mark.parametrize("name", ["bundle", "bundle.zip"])
def test_a_killed_export_destroys_nothing(
    name: str, exported: Path, tmp_path: Path, replacer: subprocess.Popen[str]
) -> None:
    out = tmp_path / "out" / name
    source = exported.rename(tmp_path / "source")
    with building(out) as folder:
        shutil.copytree(source, folder, dirs_exist_ok=True)
    for pause_ms in (1, 7, 20):
        assert replacer.stdin is not None
        assert replacer.stdout is not None
        replacer.stdin.write(f"{out} {source}\n")
        replacer.stdin.flush()
        child = int(replacer.stdout.readline())
        time.sleep(pause_ms / 1000)
        os.kill(child, signal.SIGKILL)
        assert replacer.stdout.readline() == "gone\n"
        assert load_bundle(out).logit_scale == 10.0
    record_accuracy(out, {})  # the next one clears away what the killed ones left
    assert [p.name for p in out.parent.iterdir()] == [name]


def test_what_another_export_is_building_is_left_alone(tmp_path: Path) -> None:
    with building(tmp_path / "bundle") as first:
        with building(tmp_path / "bundle") as second:
            (second / "model.onnx").write_bytes(b"weights")
            write_bundle(second, FIELDS, label_banks=())
        assert first.is_dir()
        (first / "model.onnx").write_bytes(b"others")
        write_bundle(first, FIELDS, label_banks=())
    assert (tmp_path / "bundle" / "model.onnx").read_bytes() == b"others"
    assert [p.name for p in tmp_path.iterdir()] == ["bundle"]


def test_where_two_folders_cannot_change_places(
    exported: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cannot = ("dimefm_edge.export.bundle._exchange", lambda *_: False)
    monkeypatch.setattr(*cannot)
    record_accuracy(exported, {"a": 1})
    assert load_bundle(exported).manifest["accuracy"] == {"a": 1}
    rename, moved = Path.rename, []

    def fail_at_the_second(self: Path, target: Path) -> Path:
        moved.append(target)
        if len(moved) == 2:
            raise OSError(5, "no")
        return rename(self, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", fail_at_the_second)
        with pytest.raises(ExportError, match=r"cannot write .*bundle: Input/output error"):
            record_accuracy(exported, {"a": 2})
    assert len(moved) == 3
    assert load_bundle(exported).manifest["accuracy"] == {"a": 1}
    # Killed between the two renames: the old bundle is in what was left.
    work = tmp_path / ".bundle.abcdefgh.part"
    work.mkdir()
    exported.rename(work / "old")
    with pytest.raises(RuntimeError, match="fails"), building(exported):
        raise RuntimeError("this one fails as well")
    assert load_bundle(exported).manifest["accuracy"] == {"a": 1}
    assert [p.name for p in tmp_path.iterdir()] == ["bundle"]


def test_the_current_folder_is_not_replaced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for out in (Path(), tmp_path):
        with pytest.raises(InputError, match=r"current folder .*\n  try: --out"), building(out):
            pass


def test_a_bomb_is_not_unpacked_to_note_its_accuracy(exported: Path, tmp_path: Path) -> None:
    with (exported / "model.onnx").open("wb") as stream:
        stream.truncate(200 * 2**20)  # zeros: 200 MiB that deflate to 200 KiB
    with zipfile.ZipFile(tmp_path / "bomb.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        for file in exported.iterdir():
            archive.write(file, file.name)
    with pytest.raises(CheckpointError, match="MiB to 200 MiB: no bundle does"):
        record_accuracy(tmp_path / "bomb.zip", {})
    assert sorted(p.name for p in tmp_path.iterdir()) == ["bomb.zip", "bundle"]


def test_equal_bundles_make_equal_archives(tmp_path: Path) -> None:
    manifest = json.dumps({"anything": 1}).encode()
    for name in ("a.zip", "b.zip"):
        with building(tmp_path / name) as folder:
            (folder / "manifest.json").write_bytes(manifest)
            (folder / "model.onnx").write_bytes(b"weights")
    assert (tmp_path / "a.zip").read_bytes() == (tmp_path / "b.zip").read_bytes()
