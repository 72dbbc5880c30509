"""Engine files: where TensorRT engines are kept, what is written beside each, and who may run one.

An engine belongs to one GPU, one TensorRT version and one bundle. All three stand in the JSON
file beside it, with the engine's size and hash, and are compared before TensorRT reads a byte:
what TensorRT does with an engine that is not its own is to crash, or worse.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from dimefm_edge.errors import CheckpointError, ExportError
from dimefm_edge.files import user_cache_dir
from dimefm_edge.manifest import KERNELS_DIR, MODEL_FILE, sha256_of
from dimefm_edge.runtime.bundle import Bundle
from dimefm_edge.runtime.tensorrt_machine import Machine, parse_version

ENGINE_SUFFIX = ".engine"
_FORMAT = "dimefm_edge.engine"
_FORMAT_VERSION = 1
_MAX_FACTS_BYTES = 2**24
_AMPERE = 80
_HASH_CHARS = 16
_FIELDS: dict[str, type | tuple[type, ...]] = {
    "bundle": dict, "gpu": dict, "tensorrt": str, "options": dict, "typing": str,
    "build_s": (int, float), "size_bytes": int, "sha256": str, "layers": list,
}  # fmt: skip


@dataclass(frozen=True)
class EngineArtifact:
    """An engine file that may run here, and the facts beside it."""

    path: Path
    facts: dict[str, Any]

    @property
    def size_mib(self) -> float:
        return float(self.facts["size_bytes"]) / 2**20

    @property
    def plugin_libraries(self) -> tuple[Path, ...]:
        return tuple(Path(name) for name in self.facts["options"].get("plugin_libraries", ()))


def cache_dir() -> Path:
    """Where engines are kept: below XDG_CACHE_HOME, else ~/.cache."""
    return user_cache_dir("engines")


def machine_dir(machine: Machine, root: Path | None = None) -> Path:
    """Folder of one GPU and TensorRT version; `root` stands for `cache_dir()`."""
    name = re.sub(r"\W+", "-", machine.gpu.name).strip("-").lower()
    return (root or cache_dir()) / f"{name}-{machine.gpu.sm}" / f"tensorrt-{machine.tensorrt}"


def bundle_hash(bundle: Bundle) -> str:
    """What of a bundle goes into an engine, hashed: its graph and kernels, not its labels."""
    files = bundle.manifest["files"]
    used = sorted(n for n in files if n == MODEL_FILE or n.startswith(f"{KERNELS_DIR}/"))
    text = "\n".join(f"{name} {files[name]['sha256']}" for name in used)
    return hashlib.sha256(text.encode()).hexdigest()


def engine_path(
    bundle: Bundle, machine: Machine, options: Mapping[str, Any], root: Path | None = None
) -> Path:
    """Where the engine of a bundle with these build options is kept."""
    asked = hashlib.sha256(json.dumps(dict(options), sort_keys=True).encode()).hexdigest()
    name = f"{bundle_hash(bundle)[:_HASH_CHARS]}-{asked[:8]}{ENGINE_SUFFIX}"
    return machine_dir(machine, root) / name


def facts_path(engine: Path) -> Path:
    """The JSON file beside an engine."""
    return engine.with_name(engine.name + ".json")


def save_engine(
    path: Path, engine: bytes, *, bundle: Bundle, machine: Machine, **facts: Any
) -> EngineArtifact:
    """Write an engine and its facts; each appears whole or not at all.

    Args:
        path: Ends in `.engine`; its folder is made.
        engine: As TensorRT serialised it.
        bundle: What it was built of.
        machine: Where it was built.
        **facts: `options`, `typing`, `build_s`, `layers` and whatever else is worth keeping.

    Raises:
        ExportError: If the disk is full or the place cannot be written; what was there stays.
    """
    whole = {
        "format": _FORMAT,
        "format_version": _FORMAT_VERSION,
        "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "bundle": {"name": bundle.name, "hash": bundle_hash(bundle)},
        "gpu": {"name": machine.gpu.name, "sm": machine.gpu.sm, "cuda": machine.gpu.cuda},
        "tensorrt": machine.tensorrt,
        "size_bytes": len(engine),
        "sha256": hashlib.sha256(engine).hexdigest(),
        **facts,
    }
    # A new engine beside old facts does not match them, and so is refused.
    save_file(path, engine)
    text = json.dumps(whole, indent=1)
    save_file(facts_path(path), text.encode())
    return EngineArtifact(path, json.loads(text))


def save_file(path: Path, data: bytes) -> None:
    """Write a file that appears whole or not at all.

    Raises:
        ExportError: If the disk is full or the place cannot be written.
    """
    part: str | None = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor, part = tempfile.mkstemp(f"{path.name}.part", ".", path.parent)
        with os.fdopen(descriptor, "wb") as stream:
            stream.write(data)
            stream.flush()
            os.fsync(stream.fileno())
        Path(part).replace(path)
    except OSError as error:
        raise ExportError(
            f"cannot write {path}: {os.strerror(error.errno or 0)}",
            hint="free some space or check the permissions; --out or XDG_CACHE_HOME name another "
            "folder",
        ) from error
    finally:
        if part is not None:
            with contextlib.suppress(OSError):
                os.unlink(part)


def load_artifact(path: Path, *, bundle: Bundle, machine: Machine) -> EngineArtifact:
    """Check that an engine is whole and belongs here, without letting TensorRT see it.

    Args:
        path: The `.engine` file.
        bundle: What it must have been built of.
        machine: Where it shall run.

    Raises:
        CheckpointError: If it is missing, truncated or changed, or was built for another
            bundle, GPU or TensorRT; the hint is the command that builds it anew.
    """
    facts = _read_facts(path, bundle)
    reason = why_foreign(facts, bundle=bundle, machine=machine)
    if reason is not None:
        raise _refused(path, reason, bundle)
    size = path.stat().st_size
    if size != facts["size_bytes"]:
        word = "truncated" if size < facts["size_bytes"] else "not the file that was built"
        raise _refused(path, f"it is {word} ({size} of {facts['size_bytes']} bytes)", bundle)
    if sha256_of(path) != facts["sha256"]:
        raise _refused(path, "it was changed after it was built", bundle)
    return EngineArtifact(path, facts)


def find_engine(bundle: Bundle, machine: Machine, root: Path | None = None) -> EngineArtifact:
    """The newest engine in the cache of a bundle, for this GPU and TensorRT.

    Raises:
        CheckpointError: If there is none, or it is damaged.
    """
    pattern = f"{bundle_hash(bundle)[:_HASH_CHARS]}-*{ENGINE_SUFFIX}"
    own = sorted(machine_dir(machine, root).glob(pattern), key=lambda p: p.stat().st_mtime)
    if own:
        return load_artifact(own[-1], bundle=bundle, machine=machine)
    for path in sorted((root or cache_dir()).glob(f"*/*/{pattern}")):
        load_artifact(path, bundle=bundle, machine=machine)  # says whose it is
    raise CheckpointError(
        f"no TensorRT engine of {bundle.path} was built here yet ({machine.gpu.name}, TensorRT "
        f"{machine.tensorrt})",
        hint=_build_command(bundle),
    )


def why_foreign(facts: Mapping[str, Any], *, bundle: Bundle, machine: Machine) -> str | None:
    """Why an engine with these facts may not run here; None when it may."""
    options, built_on = facts["options"], facts["gpu"]
    if facts["bundle"].get("hash") != bundle_hash(bundle):
        return f"it was built of another bundle ({facts['bundle'].get('name')})"
    here = f"{machine.gpu.name} ({machine.gpu.sm})"
    there = f"{built_on.get('name')} ({built_on.get('sm')})"
    if here != there and not (
        options.get("hardware_compatible")
        and min(_sm_number(machine.gpu.sm), _sm_number(str(built_on.get("sm")))) >= _AMPERE
    ):
        return f"it was built for {there}, and this is {here}"
    built_by = str(facts["tensorrt"])
    if built_by != machine.tensorrt and not (
        options.get("version_compatible")
        and parse_version(built_by)[0] == machine.version[0]
        and parse_version(built_by) <= machine.version
    ):
        return f"it was built by TensorRT {built_by}, and this is {machine.tensorrt}"
    return None


def _read_facts(path: Path, bundle: Bundle) -> dict[str, Any]:
    if not path.is_file():
        raise CheckpointError(f"no engine at {path}", hint=_build_command(bundle))
    beside = facts_path(path)
    try:
        if beside.stat().st_size > _MAX_FACTS_BYTES:
            raise ValueError("too large")
        facts = json.loads(beside.read_bytes())
        if facts["format"] != _FORMAT or facts["format_version"] != _FORMAT_VERSION:
            raise ValueError("of another format")
        for name, kind in _FIELDS.items():
            if not isinstance(facts[name], kind) or isinstance(facts[name], bool):
                raise ValueError(f"{name} cannot be {facts[name]!r}")
        parse_version(facts["tensorrt"])
    except FileNotFoundError as error:
        raise _refused(path, f"{beside.name}, which says what it is, is missing", bundle) from error
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise _refused(path, f"{beside.name} cannot be read: {error}", bundle) from error
    found: dict[str, Any] = facts
    return found


def _sm_number(sm: str) -> int:
    digits = sm.removeprefix("sm_")
    return int(digits) if digits.isdigit() else 0


def _refused(path: Path, reason: str, bundle: Bundle) -> CheckpointError:
    return CheckpointError(
        f"the engine {path} is not loaded: {reason}", hint=_build_command(bundle)
    )


def _build_command(bundle: Bundle) -> str:
    return f"dimefm-edge build {bundle.path}"
