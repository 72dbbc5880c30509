"""Bundles on disk: everything is built beside the destination and moved there when whole.

A destination that is not a bundle of ours is never replaced, nor one that holds other files.
Where the system can (Linux), the old bundle and the new one change places in a single step;
what a killed export left beside the destination is cleared away by the next.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import glob
import json
import os
import shutil
import tempfile
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from dimefm_edge.errors import CheckpointError, ExportError, InputError
from dimefm_edge.files import lock_folder
from dimefm_edge.labels import LabelBank, save_label_banks
from dimefm_edge.manifest import (
    ARCHIVE_ERRORS,
    BUNDLE_FORMAT,
    FORMAT_VERSION,
    LABELS_FILE,
    MANIFEST_FILE,
    MAX_MANIFEST_BYTES,
    checked_members,
    parse_manifest,
    sha256_of,
)

_PACKAGES = (
    "dimefm_edge", "torch", "timm", "open_clip_torch", "onnx", "onnxscript", "onnxruntime",
    "numpy", "pillow",
)  # fmt: skip
_COPY_BYTES = 2**20
_ZIP_DATE = (1980, 1, 1, 0, 0, 0)  # equal bundles make equal archives


def check_destination(out: Path) -> None:
    """Refuse a destination that would lose something.

    Raises:
        InputError: If `out` exists and is neither an empty folder nor a bundle of ours.
    """
    hint = "choose another --out, or move it away"
    if not out.exists() and not out.is_symlink():
        return
    if out.is_symlink():
        raise InputError(f"{out} is a link and is not replaced", hint=hint)
    if out.is_dir() and is_zip_path(out):
        raise InputError(f"{out} is a folder but names a .zip", hint=hint)
    if out.resolve() == Path.cwd():
        raise InputError(
            "the current folder would be replaced under your feet", hint="--out bundle"
        )
    if out.is_file() and not is_zip_path(out):
        raise InputError(f"{out} is a file; a bundle there would be a folder", hint=hint)
    try:
        found = _list_folder(out) if out.is_dir() else _list_zip(out)
        if not found and out.is_dir():
            return
        manifest = parse_manifest(found.pop(MANIFEST_FILE, b""), where=str(out))
    except (CheckpointError, *ARCHIVE_ERRORS) as error:
        raise InputError(f"{out} exists and is not a bundle of ours", hint=hint) from error
    others = sorted(set(found) - set(manifest["files"]))
    if others:
        raise InputError(
            f"{out} is a bundle that also holds {', '.join(others[:3])}"
            + (f" and {len(others) - 3} more" if len(others) > 3 else ""),
            hint=hint,
        )


def is_zip_path(out: Path) -> bool:
    """Whether a destination asks for an archive rather than a folder."""
    return out.suffix.lower() == ".zip"


@contextlib.contextmanager
def building(out: Path) -> Iterator[Path]:
    """Give a folder to build a bundle in; it becomes `out` when the block ends well.

    Whatever goes wrong, `out` is as it was and nothing is left beside it.

    Raises:
        ExportError: If the disk is full or the place cannot be written.
        InputError: If `out` exists and is not a bundle of ours.
    """
    check_destination(out)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        _clear_leftovers(out)
        work = Path(tempfile.mkdtemp(prefix=f".{out.name}.", suffix=".part", dir=out.parent))
    except OSError as error:
        raise _cannot_write(out, error) from error
    lock = _lock(work)
    try:
        folder = work / "bundle"
        folder.mkdir()
        yield folder
        check_destination(out)
        if is_zip_path(out):
            _pack(folder, work / "bundle.zip")
            _flush(work / "bundle.zip")
            (work / "bundle.zip").replace(out)
        else:
            _flush(*(folder / name for name in _list_folder(folder)))
            _swap(folder, out, work / "old")
    except OSError as error:
        raise _cannot_write(out, error) from error
    finally:
        shutil.rmtree(work, ignore_errors=True)
        if lock is not None:
            os.close(lock)


def write_bundle(
    folder: Path, fields: Mapping[str, Any], *, label_banks: Sequence[LabelBank]
) -> dict[str, Any]:
    """Add the label sets and the manifest to a folder that holds the graph.

    Args:
        folder: Being built; every file in it is listed with its hash.
        fields: The manifest's own: name, spec, target, precision, opset, preprocess,
            embed_dim, logit_scale, parity, accuracy, ...
        label_banks: Baked label sets; none writes no `labels.npz`.

    Returns:
        The manifest, as the runtime will read it.
    """
    if label_banks:
        save_label_banks(folder / LABELS_FILE, label_banks)
    manifest = {
        "format": BUNDLE_FORMAT,
        "format_version": FORMAT_VERSION,
        "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        **fields,
        "label_sets": [
            {"name": bank.name, "num_classes": len(bank.classnames)} for bank in label_banks
        ],
        "versions": _versions(),
        "files": {
            name: {"sha256": sha256_of(folder / name), "size_bytes": (folder / name).stat().st_size}
            for name in sorted(_list_folder(folder))
        },
    }
    return _write_manifest(folder, manifest)


def record_accuracy(bundle: Path, accuracy: Mapping[str, Any]) -> None:
    """Put measured accuracy into a bundle's manifest, which is replaced in one step.

    Args:
        bundle: Folder or `.zip` of ours.
        accuracy: JSON values, such as `{"scenes": {"top1_pct": 91.2}}`; replaces what is there.

    Raises:
        CheckpointError: If there is no bundle.
    """
    if not bundle.exists():
        raise CheckpointError(f"no bundle at {bundle}", hint="dimefm-edge export RUN")
    with building(bundle) as folder:
        if is_zip_path(bundle):
            with zipfile.ZipFile(bundle) as archive:
                checked_members(archive, where=str(bundle))
                archive.extractall(folder)
        else:
            shutil.copytree(bundle, folder, dirs_exist_ok=True)
        data = (folder / MANIFEST_FILE).read_bytes()
        manifest = parse_manifest(data, where=str(bundle))
        _write_manifest(folder, {**manifest, "accuracy": dict(accuracy)})


def _write_manifest(folder: Path, manifest: Mapping[str, Any]) -> dict[str, Any]:
    try:
        text = json.dumps(manifest, indent=2, allow_nan=False) + "\n"
    except (TypeError, ValueError) as error:
        raise ExportError(f"the manifest cannot be written as JSON: {error}") from error
    # What the runtime would refuse is not written.
    checked = parse_manifest(text.encode(), where=str(folder))
    (folder / MANIFEST_FILE).write_text(text, encoding="utf-8")
    return checked


def _list_folder(folder: Path) -> dict[str, bytes]:
    """Every file in a folder by its relative name; only the manifest is read."""
    names = {p.relative_to(folder).as_posix(): p for p in folder.rglob("*") if not p.is_dir()}
    return {
        name: path.read_bytes()
        if name == MANIFEST_FILE and path.stat().st_size <= MAX_MANIFEST_BYTES
        else b""
        for name, path in names.items()
    }


def _list_zip(path: Path) -> dict[str, bytes]:
    with zipfile.ZipFile(path) as archive:
        return {
            member.filename: archive.read(member)
            if member.filename == MANIFEST_FILE and member.file_size <= MAX_MANIFEST_BYTES
            else b""
            for member in archive.infolist()
        }


def _pack(folder: Path, path: Path) -> None:
    """Zip a folder without compressing: weights hardly shrink."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        for name in sorted(_list_folder(folder)):
            member = zipfile.ZipInfo(name, _ZIP_DATE)
            member.external_attr = 0o644 << 16
            with (folder / name).open("rb") as source, archive.open(member, "w") as sink:
                shutil.copyfileobj(source, sink, _COPY_BYTES)


def _flush(*paths: Path) -> None:
    """See that files are on the disk before a rename makes them count."""
    for path in paths:
        with path.open("rb" if os.name == "posix" else "rb+") as stream:
            os.fsync(stream.fileno())


def _swap(folder: Path, out: Path, old: Path) -> None:
    """Move a whole folder to `out`; what was there comes back if that fails."""
    if not out.exists():
        folder.rename(out)
        return
    if _exchange(folder, out):
        return
    try:
        out.rename(old)
        folder.rename(out)
    except BaseException:
        if old.exists() and not out.exists():
            old.rename(out)
        raise


def _exchange(one: Path, other: Path) -> bool:
    """Let two paths change places in one step; False where the system cannot."""
    at_cwd, exchange = -100, 2  # AT_FDCWD, RENAME_EXCHANGE
    try:
        rename = ctypes.CDLL(None).renameat2
    except (AttributeError, OSError, TypeError):  # not Linux with glibc
        return False
    return bool(rename(at_cwd, os.fsencode(one), at_cwd, os.fsencode(other), exchange) == 0)


def _lock(folder: Path) -> int | None:
    """Hold a folder as long as this process lives; None if it is held, or cannot be."""
    with contextlib.suppress(BlockingIOError):
        return lock_folder(folder)
    return None


def _clear_leftovers(out: Path) -> None:
    """Remove what killed exports to `out` left behind; those that still run hold theirs."""
    for work in out.parent.glob(f".{glob.escape(out.name)}.{'?' * 8}.part"):
        lock = _lock(work)
        if lock is None:
            continue
        if (work / "old").exists() and not out.exists():  # killed between two renames
            (work / "old").rename(out)
        shutil.rmtree(work, ignore_errors=True)
        os.close(lock)


def _cannot_write(out: Path, error: OSError) -> ExportError:
    reason = os.strerror(error.errno) if error.errno else str(error)
    file = next((str(parent) for parent in out.parents if parent.is_file()), None)
    if file is not None:
        reason = f"{file} is a file, not a folder"
    is_full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
    hint = "free some space or choose another --out" if is_full else "choose another --out"
    return ExportError(f"cannot write {out}: {reason}", hint=hint)


def _versions() -> dict[str, str]:
    found = {}
    for package in _PACKAGES:
        with contextlib.suppress(PackageNotFoundError):
            found[package] = version(package)
    return found
