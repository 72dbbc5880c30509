"""Files that land whole or not at all, and the user's folders for what can be made again."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

from dimefm_edge.errors import InputError

try:
    import fcntl
except ImportError:  # Windows: nobody is kept out
    fcntl = None  # type: ignore[assignment]


@contextmanager
def atomic_file(path: Path) -> Iterator[IO[bytes]]:
    """Open a file to replace `path` with: whole on leaving, or not at all on an error."""
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with temporary.open("wb") as stream:
            yield stream
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(temporary, path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise OSError(error.errno, error.strerror, str(path)) from error
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def run_folder(run: str | Path) -> Path:
    """The folder of a run that is named by it, or by its checkpoint."""
    path = Path(run).expanduser()
    return path.parent if path.is_file() else path


def make_out_folder(out: Path) -> None:
    """Make the folder of a command's files, before the work that fills it.

    Raises:
        InputError: If it cannot be made or written to.
    """
    try:
        out.mkdir(parents=True, exist_ok=True)
        why = None if os.access(out, os.W_OK | os.X_OK) else "it cannot be written to"
    except OSError as error:
        why = "it is a file" if out.exists() else error.strerror
    if why is not None:
        raise InputError(f"{out} cannot be the output folder: {why}", hint="another --out")


@contextmanager
def held_folder(path: Path) -> Iterator[None]:
    """A folder, made if need be, that one process at a time works in; if it stays empty, it goes.

    Raises:
        InputError: If it is a file, or another process holds it.
    """
    if path.exists() and not path.is_dir():
        raise InputError(f"{path} is a file", hint="another --out")
    path.mkdir(parents=True, exist_ok=True)
    try:
        descriptor = lock_folder(path)
    except BlockingIOError:
        raise InputError(
            f"another process is at work in {path}", hint="wait for it, or another --out"
        ) from None
    try:
        yield
    finally:
        with suppress(OSError):  # there is something in it
            path.rmdir()
        if descriptor is not None:
            os.close(descriptor)


def lock_folder(folder: Path) -> int | None:
    """Hold a folder until the descriptor is closed or this process ends; None where that cannot be.

    Raises:
        BlockingIOError: If another holds it.
    """
    if fcntl is None:
        return None
    descriptor = None
    try:
        descriptor = os.open(folder, os.O_RDONLY)
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if descriptor is not None:
            os.close(descriptor)
        if isinstance(error, BlockingIOError):
            raise
        return None  # a file system without locks
    return descriptor


def user_cache_dir(*names: str) -> Path:
    """A folder of ours below XDG_CACHE_HOME, else ~/.cache."""
    return _user_dir("XDG_CACHE_HOME", ".cache").joinpath(*names)


def user_config_dir(*names: str) -> Path:
    """A folder of ours below XDG_CONFIG_HOME, else ~/.config."""
    return _user_dir("XDG_CONFIG_HOME", ".config").joinpath(*names)


def _user_dir(variable: str, default: str) -> Path:
    root = os.environ.get(variable)
    return (Path(root) if root else Path.home() / default) / "dimefm_edge"
