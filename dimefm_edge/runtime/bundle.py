"""Bundles: load a deployed model's folder or `.zip`, trusting nothing that it says.

Every file is checked against the manifest's size and hash before it is used; names that
leave the bundle, links and archives that unpack to too much are refused.
"""

from __future__ import annotations

import hashlib
import shutil
import tempfile
import weakref
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dimefm_edge.errors import CheckpointError
from dimefm_edge.labels import LabelBank, load_label_banks
from dimefm_edge.manifest import (
    ARCHIVE_ERRORS,
    EXPORT_AGAIN,
    LABELS_FILE,
    MANIFEST_FILE,
    MAX_MANIFEST_BYTES,
    MODEL_FILE,
    TEXT_FILE,
    TOKENIZER_FILE,
    checked_members,
    parse_manifest,
    preprocess_of,
    sha256_of,
    tokenizer_spec_of,
)
from dimefm_edge.preprocess import PreprocessSpec
from dimefm_edge.tokenizer import TokenizerSpec

_CHUNK_BYTES = 2**20
_COPY_AGAIN = "copy or download the bundle again, or " + EXPORT_AGAIN


@dataclass(frozen=True)
class TextFiles:
    """A bundle's text side: the text tower's graph, and the tokenizer with what goes around it."""

    model_path: Path
    tokenizer_path: Path
    spec: TokenizerSpec


@dataclass(frozen=True, eq=False)
class Bundle:
    """A deployed model whose files were checked.

    `label_banks` maps a label set's name to its bank, in the manifest's order; `model_path`
    is on disk as long as this object lives (a `.zip` is unpacked to a temporary folder), as is
    `text`, which is None where there is no text side.
    """

    path: Path
    manifest: dict[str, Any]
    preprocess: PreprocessSpec
    label_banks: dict[str, LabelBank]
    model_path: Path
    logit_scale: float
    text: TextFiles | None = None

    @property
    def name(self) -> str:
        return str(self.manifest["name"])

    @property
    def precision(self) -> str:
        return str(self.manifest["precision"])

    @property
    def image_input(self) -> str:
        """What the graph takes: a name in `manifest.IMAGE_INPUTS`."""
        return str(self.manifest.get("graph", {}).get("image_input", "float"))

    @property
    def embed_dim(self) -> int:
        return int(self.manifest["embed_dim"])

    @property
    def size_mib(self) -> float:
        """Of the graph with its weights, on disk."""
        return self.model_path.stat().st_size / 2**20


def load_bundle(path: Path | str) -> Bundle:
    """Open a bundle, checking every file it lists.

    Args:
        path: A bundle's folder, or a `.zip` of one.

    Raises:
        CheckpointError: If it is missing, no bundle, damaged, tampered with or unsafe.
    """
    path = Path(path)
    try:
        if path.is_dir():
            return _load_folder(path)
        if path.is_file():
            return _load_zip(path)
    except ARCHIVE_ERRORS as error:
        raise CheckpointError(
            f"cannot read the bundle {path}: {error}", hint=_COPY_AGAIN
        ) from error
    raise CheckpointError(f"no bundle at {path}", hint=EXPORT_AGAIN)


def _load_folder(folder: Path) -> Bundle:
    manifest_path = folder / MANIFEST_FILE
    if not manifest_path.is_file():
        nested = folder / "bundle"
        hint = str(nested) if (nested / MANIFEST_FILE).is_file() else EXPORT_AGAIN
        raise CheckpointError(f"{folder} is no bundle: it has no {MANIFEST_FILE}", hint=hint)
    if manifest_path.stat().st_size > MAX_MANIFEST_BYTES:
        raise _manifest_too_large(folder)
    manifest = parse_manifest(manifest_path.read_bytes(), where=str(folder))
    for name, entry in manifest["files"].items():
        file = folder / name
        # A link may point anywhere, and at something else by the time it is read.
        if file.is_symlink() or not file.resolve().is_relative_to(folder.resolve()):
            raise CheckpointError(
                f"{folder}: {name} is a link; a bundle holds files only",
                hint="copy the bundle with its links followed: cp -rL",
            )
        if not file.is_file():
            raise CheckpointError(f"{folder} lacks {name}", hint=_COPY_AGAIN)
        _check_size(file.stat().st_size, entry["size_bytes"], name, folder)
        _check_hash(sha256_of(file), entry["sha256"], name, folder)
    return _bundle_of(folder, folder, manifest)


def _load_zip(path: Path) -> Bundle:
    if not zipfile.is_zipfile(path):
        raise CheckpointError(
            f"{path} is no bundle: neither a folder nor a whole .zip archive", hint=_COPY_AGAIN
        )
    with zipfile.ZipFile(path) as archive:
        members = checked_members(archive, where=str(path))
        prefix = _prefix(members, path)
        head = members[prefix + MANIFEST_FILE]
        if head.file_size > MAX_MANIFEST_BYTES:
            raise _manifest_too_large(path)
        manifest = parse_manifest(_read_member(archive, head, path), where=str(path))
        folder = Path(tempfile.mkdtemp(prefix="dimefm_edge_bundle_"))
        try:
            for name, entry in manifest["files"].items():
                member = members.get(prefix + name)
                if member is None:
                    raise CheckpointError(f"{path} lacks {name}", hint=_COPY_AGAIN)
                _check_size(member.file_size, entry["size_bytes"], name, path)
                digest = _unpack(archive, member, folder / name)
                _check_hash(digest, entry["sha256"], name, path)
            bundle = _bundle_of(path, folder, manifest)
        except BaseException:
            shutil.rmtree(folder, ignore_errors=True)
            raise
    weakref.finalize(bundle, shutil.rmtree, folder, ignore_errors=True)
    return bundle


def _prefix(members: dict[str, zipfile.ZipInfo], path: Path) -> str:
    """Where the bundle starts: the root, or the one folder that was zipped."""
    if MANIFEST_FILE in members:
        return ""
    nested = [n for n in members if n.count("/") == 1 and n.endswith("/" + MANIFEST_FILE)]
    if len(nested) != 1:
        # An archive that was cut off behind labels.npz, an archive too, ends like a whole one.
        raise CheckpointError(
            f"{path} is no bundle: it has no {MANIFEST_FILE}, or was cut off", hint=_COPY_AGAIN
        )
    return nested[0].removesuffix(MANIFEST_FILE)


def _read_member(archive: zipfile.ZipFile, member: zipfile.ZipInfo, path: Path) -> bytes:
    with archive.open(member) as stream:
        data = stream.read(MAX_MANIFEST_BYTES + 1)
    if len(data) != member.file_size:
        raise CheckpointError(f"{path}: {member.filename} is truncated", hint=_COPY_AGAIN)
    return data


def _unpack(archive: zipfile.ZipFile, member: zipfile.ZipInfo, target: Path) -> str:
    """Write one member, never more than it declared, and hash it on the way."""
    target.parent.mkdir(parents=True, exist_ok=True)
    digest = hashlib.sha256()
    with archive.open(member) as source, target.open("wb") as sink:
        while chunk := source.read(_CHUNK_BYTES):
            digest.update(chunk)
            sink.write(chunk)
    return digest.hexdigest()


def _check_size(found: int, listed: int, name: str, path: Path) -> None:
    if found != listed:
        word = "truncated" if found < listed else "not the file that was exported"
        raise CheckpointError(
            f"{path}: {name} is {word} ({found} bytes, the manifest says {listed})",
            hint=_COPY_AGAIN,
        )


def _check_hash(found: str, listed: str, name: str, path: Path) -> None:
    if found != listed:
        raise CheckpointError(
            f"{path}: {name} was changed after the export (sha256 {found[:12]}.., the manifest "
            f"says {listed[:12]}..)",
            hint=_COPY_AGAIN,
        )


def _manifest_too_large(path: Path) -> CheckpointError:
    return CheckpointError(
        f"{path}: {MANIFEST_FILE} is too large to be one of ours", hint=EXPORT_AGAIN
    )


def _bundle_of(path: Path, folder: Path, manifest: dict[str, Any]) -> Bundle:
    banks = load_label_banks(folder / LABELS_FILE) if LABELS_FILE in manifest["files"] else {}
    listed = {entry["name"]: entry["num_classes"] for entry in manifest["label_sets"]}
    if listed != {name: len(bank.classnames) for name, bank in banks.items()}:
        raise CheckpointError(
            f"{path}: {LABELS_FILE} and {MANIFEST_FILE} disagree about the label sets",
            hint=EXPORT_AGAIN,
        )
    for bank in banks.values():
        if bank.embeds.shape[1] != manifest["embed_dim"]:
            raise CheckpointError(
                f"{path}: label set '{bank.name}' has {bank.embeds.shape[1]} dimensions, the "
                f"model {manifest['embed_dim']}",
                hint=EXPORT_AGAIN,
            )
    spec = tokenizer_spec_of(manifest)
    text = TextFiles(folder / TEXT_FILE, folder / TOKENIZER_FILE, spec) if spec else None
    return Bundle(
        path=path,
        manifest=manifest,
        preprocess=preprocess_of(manifest),
        label_banks=banks,
        model_path=folder / MODEL_FILE,
        logit_scale=float(manifest["logit_scale"]),
        text=text,
    )
