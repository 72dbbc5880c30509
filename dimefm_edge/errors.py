"""Errors that say what, why and the next command; the CLI prints them without a traceback."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from typing import ClassVar, TypeVar

T = TypeVar("T")

_MAX_LISTED = 40


class DimeFMError(Exception):
    """Anything a user can mend. `hint` is the next thing to try, often a command."""

    exit_code: ClassVar[int] = 1

    def __init__(self, message: str, *, hint: str | None = None) -> None:
        super().__init__(message)
        self.hint = hint

    def __str__(self) -> str:
        message = super().__str__()
        return f"{message}\n  try: {self.hint}" if self.hint else message


class InputError(DimeFMError):
    """Bad usage or input: a flag, a path, a name or a file the user gave."""

    exit_code = 2


class ConfigError(InputError):
    """A setting has a value it cannot have."""


class UnknownNameError(InputError):
    """A name is not in its table."""


class DataError(InputError):
    """Images, sentences or a test set cannot be used as they are."""


class StoreError(InputError):
    """An embedding store is damaged, or belongs to another teacher or other data."""


class CheckpointError(InputError):
    """A checkpoint, run folder or bundle is missing, truncated or of another kind."""


class TrainingError(DimeFMError):
    """Training had to stop: a NaN loss, say."""


class ExportError(DimeFMError):
    """A model could not be written in the format asked for."""


class UnsupportedExportError(InputError, ExportError):
    """A format, precision or shape was asked for that the target or the format does not have."""


class MissingExtraError(DimeFMError):
    """An optional dependency is not installed; the hint holds the command that installs it."""


class BudgetError(DimeFMError):
    """No student meets the latency budget."""

    exit_code = 3


class ParityError(DimeFMError):
    """An exported model does not answer as the original does."""

    exit_code = 3


def nearest_names(name: str, known: list[str]) -> list[str]:
    """Up to three known names spelt like `name`, closest first."""
    by_folded = {k.casefold(): k for k in known}
    near = difflib.get_close_matches(name.casefold(), list(by_folded), n=3, cutoff=0.5)
    return [by_folded[k] for k in near]


def missing_package(error: ModuleNotFoundError) -> MissingExtraError:
    """What to install when an import of a training package failed."""
    package = (error.name or "a package").partition(".")[0]
    return MissingExtraError(
        f"this needs {package}, which is not installed", hint="pip install 'dimefm_edge[train]'"
    )


def lookup(table: Mapping[str, T], name: str, *, kind: str) -> T:
    """Return `table[name]`, or raise an error that offers the nearest known name.

    Raises:
        UnknownNameError: If `name` is not in `table`.
    """
    if name in table:
        return table[name]
    known = sorted(table)
    near = nearest_names(name, known)
    guess = f" Did you mean '{near[0]}'?" if near else ""
    shown = known if len(known) <= _MAX_LISTED else [*(near or known)[:3], f"... ({len(known)})"]
    raise UnknownNameError(f"unknown {kind} '{name}'.{guess} Known: {', '.join(shown)}.")
