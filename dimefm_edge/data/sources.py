"""What a user writes as a source: a path, a glob, a brace pattern or `scenes[:COUNT]`."""

from __future__ import annotations

import difflib
import glob
import hashlib
import itertools
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from dimefm_edge.errors import DataError, MissingExtraError

SCENES = "scenes"
PROMPTS = "prompts"
"""`prompts:TEST_SET`: its class names in its templates, as sentences."""
SCENE_SETS = (SCENES, "scenes-relations", "scenes-train")
"""Test sets that are drawn, not read."""
_SHOWN_NAMES = 5


def natural_key(name: str) -> tuple[tuple[int, int | str], ...]:
    """Sort key that puts `2.jpg` before `10.jpg`; equal keys only for equal names."""
    parts = re.split(r"([0-9]+)", name)
    pairs: list[tuple[int, int | str]] = [
        (0, int(p)) if i % 2 else (1, p) for i, p in enumerate(parts)
    ]
    return (*pairs, (2, name))


def digest_lines(lines: Iterable[str]) -> str:
    """16 hex digits over a sequence of strings."""
    state = hashlib.sha256()
    for line in lines:
        state.update(line.encode("utf-8", "surrogateescape") + b"\n")
    return state.hexdigest()[:16]


def scenes_count(source: str, default: int) -> int | None:
    """COUNT of `scenes:COUNT`, `default` for `scenes`, None for anything else.

    Raises:
        DataError: If COUNT is not a positive whole number.
    """
    name, colon, count = source.partition(":")
    if name != SCENES:
        return None
    if not colon:
        return default
    if not (count.isascii() and count.isdigit() and int(count)):
        raise DataError(
            f"'{source}' does not say how many scenes: COUNT must be a positive whole number",
            hint=f"{SCENES}:{default}",
        )
    return int(count)


def expand_source(source: str) -> list[Path]:
    """The files or folders that a source names, in natural order; each of them exists.

    Args:
        source: A path, a glob (`shards/*.tar`) or a brace pattern (`{00000..00009}.tar`).

    Raises:
        DataError: If a path is missing or a pattern matches nothing.
        MissingExtraError: If a brace pattern is given and braceexpand is not installed.
    """
    if "://" in source:
        raise DataError(
            f"{source} is not on this machine, and sources are read from disk only",
            hint="download it first, then name the file or folder",
        )
    if not source:
        raise DataError("a source is empty: it must name a file or a folder")
    path = Path(source).expanduser()
    if os.path.lexists(path) and path.exists():
        return [path]
    found: list[Path] = []
    for pattern in _expand_braces(str(path)):
        if not glob.has_magic(pattern):
            if not Path(pattern).exists():
                raise missing_path(Path(pattern), names=SCENE_SETS)
            found.append(Path(pattern))
            continue
        matches = sorted(glob.glob(pattern, recursive=True), key=natural_key)
        if not matches:
            raise DataError(
                f"no file matches the pattern {pattern}", hint=f"ls {_existing_parent(pattern)}"
            )
        found.extend(Path(match) for match in matches)
    return found


def absolute_source(source: str) -> str:
    """A source by its whole path, for a config that is read from elsewhere later on.

    What is no path, or names nothing that is there, stays as it is.
    """
    kind, colon, rest = source.partition(":")
    if kind == PROMPTS and colon:
        return f"{kind}:{absolute_source(rest)}"
    if not source or kind in SCENE_SETS:
        return source
    path = Path(source).expanduser()
    if path.is_absolute():
        return str(path)
    plain = list(itertools.takewhile(lambda part: not set(part) & set("*?[{"), path.parts))
    is_pattern = len(plain) < len(path.parts) and not path.exists()
    if is_pattern and (source.startswith("{") or set(str(Path.cwd())) & set("*?[{")):
        return source  # alternatives may be whole paths; a folder's own name would be a pattern
    is_there = path.exists() or (is_pattern and Path(*plain).exists())
    return str(Path.cwd() / path) if is_there else source


def missing_path(path: Path, *, names: Sequence[str] = ()) -> DataError:
    """An error for a path that is not there, with the nearest one that is, or some that are.

    Args:
        path: It.
        names: What could have been meant instead, where it is a single word.
    """
    if path.is_symlink():
        return DataError(f"{path} is a link to nothing", hint=f"ls -l {path}")
    parent = _existing_parent(path)
    missing = path.relative_to(parent).parts[0] if path != parent else path.name
    try:
        there = sorted(e.name for e in os.scandir(parent) if not e.name.startswith("."))
    except OSError:
        there = []
    near = difflib.get_close_matches(missing, there, n=1)
    meant = difflib.get_close_matches(str(path), names, n=1, cutoff=0.8)
    if meant and not near:
        return DataError(f"{path} does not exist. Did you mean '{meant[0]}'?", hint=f"ls {parent}")
    known = f"has {', '.join(there[:_SHOWN_NAMES])}" if there else "is empty"
    told = f"the nearest in {parent} is '{near[0]}'" if near else f"{parent} {known}"
    return DataError(f"{path} does not exist; {told}", hint=f"ls {parent}")


def walk_files(root: Path) -> list[tuple[str, int]]:
    """(path relative to root, bytes) of every file below a folder, in natural order.

    Hidden ones are left out. Links to folders are followed, each folder once.
    """
    return sorted(_walk(root), key=lambda item: natural_key(item[0]))


def _walk(root: Path) -> Iterator[tuple[str, int]]:
    seen: set[tuple[int, int]] = set()
    pending = [""]
    while pending:
        folder = pending.pop()
        try:
            info = os.stat(root / folder)
            if (info.st_dev, info.st_ino) in seen:
                continue
            seen.add((info.st_dev, info.st_ino))
            entries = list(os.scandir(root / folder))
        except OSError as error:
            raise DataError(f"{root / folder} cannot be listed: {error.strerror}") from error
        for entry in entries:
            name = f"{folder}/{entry.name}" if folder else entry.name
            if entry.name.startswith("."):
                continue
            try:
                if entry.is_dir():
                    pending.append(name)
                elif entry.is_file():
                    yield name, entry.stat().st_size
            except OSError:  # a file that went away, or a link that loops
                continue


def _existing_parent(path: Path | str) -> Path:
    parent = Path(path).parent
    while not parent.is_dir():
        parent = parent.parent
    return parent


def _expand_braces(pattern: str) -> list[str]:
    if "{" not in pattern:
        return [pattern]
    try:
        from braceexpand import braceexpand
    except ImportError as error:
        raise MissingExtraError(
            f"{pattern} is a brace pattern, and braceexpand is not installed",
            hint="pip install 'dimefm_edge[train]'",
        ) from error
    try:
        return list(braceexpand(pattern))
    except ValueError as error:  # unbalanced braces
        raise DataError(f"{pattern} does not exist, and is no brace pattern: {error}") from error
