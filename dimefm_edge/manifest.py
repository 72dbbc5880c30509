"""The bundle's manifest: what a deployed model's files are, and how they are told to be ours.

Written by export/bundle.py, read by runtime/bundle.py, which know nothing of each other.
A manifest comes from anywhere: every field is checked before it is used. No torch here.
"""

from __future__ import annotations

import hashlib
import json
import math
import platform
import stat
import struct
import zipfile
import zlib
from pathlib import Path, PurePosixPath
from typing import Any

from dimefm_edge.errors import CheckpointError, DimeFMError
from dimefm_edge.preprocess import PreprocessSpec
from dimefm_edge.tokenizer import MAX_TOKENIZER_BYTES, TokenizerSpec

BUNDLE_FORMAT = "dimefm_edge.bundle"
FORMAT_VERSION = 1
MANIFEST_FILE = "manifest.json"
MODEL_FILE = "model.onnx"
LABELS_FILE = "labels.npz"
KERNELS_DIR = "kernels"
TEXT_FILE = "text.onnx"
TOKENIZER_FILE = "tokenizer.json"
PT2_FILE = "model.pt2"
"""The same model as native code of torch's AOTInductor, where it was asked for."""
PT2_BUILD_FILE = "model.pt2.json"
"""What `model.pt2` was compiled for: `native_build`."""
INPUT_NAME = "image"
OUTPUT_NAME = "image_embeds"
LOGITS_NAME = "logits"
TEXT_INPUT_NAME = "tokens"
TEXT_OUTPUT_NAME = "text_embeds"
IMAGE_INPUTS = ("float", "uint8", "image")
"""What a graph takes: prepared numbers, resized pixels, or pixels of any size."""
MAX_MANIFEST_BYTES = 2**23
EXPORT_AGAIN = "export it again: dimefm-edge export RUN --out BUNDLE"
ARCHIVE_ERRORS = (
    OSError, EOFError, RuntimeError, ValueError, struct.error, zlib.error,
    zipfile.BadZipFile, zipfile.LargeZipFile,
)  # fmt: skip
"""What zipfile raises, all in all, on an archive that is damaged or forged."""

_MAX_IMAGE_SIZE = 8192
_MAX_UNPACKED_BYTES = 2**32
# Weights hardly compress; 64 MiB may be empty space (a model of zeros), more must be earned.
_MAX_RATIO = 100
_FREE_BYTES = 2**26


def parse_manifest(data: bytes, *, where: str) -> dict[str, Any]:
    """Check a manifest and return it as a dictionary whose fields have their types.

    Args:
        data: The file's bytes, UTF-8 JSON.
        where: The bundle, for errors.

    Raises:
        CheckpointError: If it is no manifest of ours, of another version, or has a field
            that is missing or cannot be.
    """
    try:
        values = json.loads(data)
        if not isinstance(values, dict) or values.get("format") != BUNDLE_FORMAT:
            raise ValueError(f"its format is not '{BUNDLE_FORMAT}'")
        _check_version(values.get("format_version"), where)
        _check_fields(values)
    except DimeFMError as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(
            f"{where}: bad {MANIFEST_FILE}: {error}", hint=EXPORT_AGAIN
        ) from error
    except KeyError as error:
        raise CheckpointError(
            f"{where}: bad {MANIFEST_FILE}: it lacks {error}", hint=EXPORT_AGAIN
        ) from error
    except (ValueError, TypeError, RecursionError, OverflowError) as error:
        raise CheckpointError(
            f"{where}: bad {MANIFEST_FILE}: {error}", hint=EXPORT_AGAIN
        ) from error
    return values


def preprocess_of(manifest: dict[str, Any]) -> PreprocessSpec:
    """The preprocessing that a parsed manifest asks for."""
    return PreprocessSpec.from_dict(manifest["preprocess"])


def attention_nodes(manifest: dict[str, Any]) -> list[list[str]] | None:
    """Names of the graph's nodes that make up each attention; None if they were not recorded."""
    graph = manifest.get("graph")
    recorded = graph.get("attentions") if isinstance(graph, dict) else None
    return None if recorded is None else [list(entry["nodes"]) for entry in recorded]


def kernels_of(manifest: dict[str, Any]) -> list[dict[str, Any]]:
    """Compiled kernels of our own that the graph's attention needs, as `KernelRecord` has them."""
    graph = manifest.get("graph")
    return list(graph.get("kernels") or ()) if isinstance(graph, dict) else []


def tokenizer_spec_of(manifest: dict[str, Any]) -> TokenizerSpec | None:
    """What a parsed manifest asks for around its tokenizer; None where there is no text side."""
    text = manifest.get("text")
    if text is None:
        return None
    return TokenizerSpec(text["context_length"], text["clean"], text.get("zeroed_id"))


def is_safe_name(name: str) -> bool:
    """Whether a file name stays inside its bundle on every system: relative, no `..`."""
    if not name or name != name.strip() or any(c in '\\:*?"<>|' or c < " " for c in name):
        return False
    parts = name.split("/")
    return not PurePosixPath(name).is_absolute() and not any(p in ("", ".", "..") for p in parts)


def checked_members(archive: zipfile.ZipFile, *, where: str) -> dict[str, zipfile.ZipInfo]:
    """An archive's files by name, once none of them can do harm when unpacked.

    Raises:
        CheckpointError: If a name leaves the bundle or comes twice, a member is a link,
            encrypted or packed in an unusual way, or all of them unpack to too much.
    """
    members: dict[str, zipfile.ZipInfo] = {}
    hint = "get the bundle from somewhere you trust, or " + EXPORT_AGAIN
    for member in archive.infolist():
        # zipfile itself mends some names; the raw one tells the intent.
        name = member.orig_filename
        if not is_safe_name(name.rstrip("/")) or name.startswith("/"):
            raise CheckpointError(f"{where}: the file name {name!r} leaves the bundle", hint=hint)
        kind = stat.S_IFMT(member.external_attr >> 16)
        if kind not in (0, stat.S_IFREG, stat.S_IFDIR):
            raise CheckpointError(
                f"{where}: {name} is a link; a bundle holds files only", hint=hint
            )
        if name in members:
            raise CheckpointError(f"{where} holds {name} twice", hint=hint)
        if member.flag_bits & 1:
            raise CheckpointError(f"{where}: {name} is encrypted", hint=hint)
        if member.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
            raise CheckpointError(f"{where}: {name} is compressed in an unusual way", hint=hint)
        members[name] = member
    total = sum(member.file_size for member in members.values())
    packed = sum(member.compress_size for member in members.values())
    if total > _MAX_UNPACKED_BYTES or total > _FREE_BYTES + _MAX_RATIO * packed:
        raise CheckpointError(
            f"{where} would unpack from {packed / 2**20:.1f} MiB to {total / 2**20:.0f} MiB: "
            "no bundle does",
            hint=hint,
        )
    return members


def sha256_of(path: Path) -> str:
    """Hash a file in pieces; 64 hex digits."""
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while chunk := stream.read(2**20):
            digest.update(chunk)
    return digest.hexdigest()


def native_build(torch: Any, device: str) -> dict[str, str]:
    """What code that this torch compiles for a device runs on: all of it must be equal there.

    Args:
        torch: The module, handed in: this file does without.
        device: cpu or cuda.
    """
    chip = torch.backends.cpu.get_cpu_capability()
    if device == "cuda":
        chip = "sm_{}{}".format(*torch.cuda.get_device_capability())
    return {
        "torch": str(torch.__version__),
        "system": f"{platform.system()} {platform.machine()}",
        "device": device,
        "chip": str(chip),
    }


def _check_version(version: Any, where: str) -> None:
    if _is_int(version) and version > FORMAT_VERSION:
        raise CheckpointError(
            f"{where} has bundle format version {version}; this package reads {FORMAT_VERSION}",
            hint="pip install --upgrade dimefm_edge",
        )
    if not _is_int(version) or version != FORMAT_VERSION:
        raise ValueError(f"format version {version!r} is not {FORMAT_VERSION}")


def _check_fields(values: dict[str, Any]) -> None:
    for key in ("spec", "versions", "parity"):
        if not isinstance(values[key], dict):
            raise ValueError(f"{key} must be an object")
    for key in ("precision", "created", "name"):
        if not isinstance(values[key], str):
            raise ValueError(f"{key} must be text")
    for key in ("opset", "embed_dim"):
        if not _is_int(values[key]) or values[key] <= 0:
            raise ValueError(f"{key} must be a positive whole number, got {values[key]!r}")
    if not _is_number(values["logit_scale"]) or values["logit_scale"] <= 0:
        raise ValueError(f"logit_scale must be positive, got {values['logit_scale']!r}")
    _check_preprocess(values["preprocess"])
    _check_quantization(values.get("quantization"))
    _check_files(values["files"])
    _check_label_sets(values["label_sets"], LABELS_FILE in values["files"])
    _check_graph(values.get("graph", {}), [entry["name"] for entry in values["label_sets"]])
    _check_kernels(kernels_of(values), values["files"])
    _check_text(values.get("text"), values["files"])


def _check_preprocess(values: Any) -> None:
    if not isinstance(values, dict):
        raise ValueError("preprocess must be an object")
    size = values["image_size"]
    if not _is_int(size) or not 0 < size <= _MAX_IMAGE_SIZE:
        raise ValueError(f"preprocess.image_size must be 1 to {_MAX_IMAGE_SIZE}, got {size!r}")
    for key in ("mean", "std"):
        three = values[key]
        if not isinstance(three, list) or len(three) != 3 or not all(map(_is_number, three)):
            raise ValueError(f"preprocess.{key} must be three numbers")
    if min(values["std"]) <= 0:
        raise ValueError("preprocess.std must be positive")
    for key in ("interpolation", "resize_mode"):
        if not isinstance(values[key], str):
            raise ValueError(f"preprocess.{key} must be text")
    fill = values.get("fill_color", 0)
    if not _is_int(fill) or not 0 <= fill <= 255:
        raise ValueError(f"preprocess.fill_color must be 0 to 255, got {fill!r}")
    PreprocessSpec.from_dict(values)


def _check_quantization(values: Any) -> None:
    """What int8 was made for, such as `{"rules": "onnxruntime-arm"}`; other precisions lack it."""
    if values is None:
        return
    if not isinstance(values, dict) or not isinstance(values["rules"], str):
        raise ValueError("quantization must be an object that names its rules")


def _check_files(values: Any) -> None:
    if not isinstance(values, dict) or MODEL_FILE not in values:
        raise ValueError(f"files must be an object that holds {MODEL_FILE}")
    for name, entry in values.items():
        if not is_safe_name(name):
            raise ValueError(f"the file name {name!r} leaves the bundle")
        if name == MANIFEST_FILE:
            raise ValueError(f"{MANIFEST_FILE} cannot list itself")
        if not isinstance(entry, dict):
            raise ValueError(f"files: {name} must be an object")
        digest, size = entry["sha256"], entry["size_bytes"]
        if (
            not isinstance(digest, str)
            or len(digest) != 64
            or set(digest) - set("0123456789abcdef")
        ):
            raise ValueError(f"files: the sha256 of {name} is not 64 hex digits")
        if not _is_int(size) or size < 0:
            raise ValueError(f"files: the size of {name} is {size!r}")


def _check_label_sets(values: Any, has_file: bool) -> None:
    if not isinstance(values, list):
        raise ValueError("label_sets must be a list")
    if values and not has_file:
        raise ValueError(f"it names label sets but no {LABELS_FILE}")
    for entry in values:
        if not isinstance(entry, dict) or not isinstance(entry["name"], str):
            raise ValueError("label_sets: each needs a name")
        if not _is_int(entry["num_classes"]) or entry["num_classes"] <= 0:
            raise ValueError(f"label_sets: {entry['name']} has no classes")


def _check_graph(values: Any, label_sets: list[str]) -> None:
    if not isinstance(values, dict):
        raise ValueError("graph must be an object")
    batch_size, head = values.get("batch_size"), values.get("head")
    if batch_size is not None and (not _is_int(batch_size) or batch_size <= 0):
        raise ValueError(f"graph.batch_size must be a positive whole number, got {batch_size!r}")
    if values.get("image_input", "float") not in IMAGE_INPUTS:
        raise ValueError(f"graph.image_input must be one of {', '.join(IMAGE_INPUTS)}")
    providers = values.get("providers", [])
    if not isinstance(providers, list) or not all(isinstance(name, str) for name in providers):
        raise ValueError("graph.providers must be a list of names")
    if head is not None and head not in label_sets:
        raise ValueError(f"graph.head names the label set {head!r}, which is not there")
    _check_attentions(values.get("attentions", []))


def _check_attentions(recorded: Any) -> None:
    if not isinstance(recorded, list):
        raise ValueError("graph.attentions must be a list")
    for entry in recorded:
        names = entry.get("nodes") if isinstance(entry, dict) else None
        if not isinstance(names, list) or not names or not all(isinstance(n, str) for n in names):
            raise ValueError("graph.attentions: each needs the names of its nodes")


def _check_kernels(recorded: list[Any], files: dict[str, Any]) -> None:
    for entry in recorded:
        if not isinstance(entry, dict) or not isinstance(entry["spec"], dict):
            raise ValueError("graph.kernels: each must be an object with a spec")
        for key in ("capability", "grid_x", "num_threads", "shared_bytes"):
            if not _is_int(entry[key]) or entry[key] < 0:
                raise ValueError(f"graph.kernels: {key} cannot be {entry[key]!r}")
        if not isinstance(entry["entry"], str) or f"{KERNELS_DIR}/{entry['ptx']}" not in files:
            raise ValueError(f"graph.kernels names {entry['ptx']!r}, which is not there")


def _check_text(values: Any, files: dict[str, Any]) -> None:
    lacking = [name for name in (TEXT_FILE, TOKENIZER_FILE) if name not in files]
    if values is None:
        if len(lacking) < 2:
            raise ValueError("it lists files of a text side but has no text")
        return
    if not isinstance(values, dict):
        raise ValueError("text must be an object")
    if lacking:
        raise ValueError(f"it has a text side but no {lacking[0]}")
    if files[TOKENIZER_FILE]["size_bytes"] > MAX_TOKENIZER_BYTES:
        raise ValueError(f"{TOKENIZER_FILE} is too large to be a tokenizer")
    if not _is_int(values["context_length"]):
        found = values["context_length"]
        raise ValueError(f"text.context_length must be a whole number, got {found!r}")
    if not isinstance(values["clean"], str):
        raise ValueError("text.clean must be text")
    zeroed = values.get("zeroed_id")
    if zeroed is not None and (not _is_int(zeroed) or not 0 <= zeroed < 2**31):
        raise ValueError(f"text.zeroed_id must be a token, got {zeroed!r}")
    tokenizer_spec_of({"text": values})


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: Any) -> bool:
    return (_is_int(value) or isinstance(value, float)) and math.isfinite(value)
