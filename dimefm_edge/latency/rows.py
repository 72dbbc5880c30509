"""Estimates for a table: `dimefm-edge estimate --rows in.csv --out out.csv`.

Rows name a device, runtime, precision, batch, timm model and resolution, as published tables do;
a row that cannot be estimated says why in its `basis` and harms no other. Models are built with
random weights, traced once, and their costs kept in a cache on disk.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from dimefm_edge.errors import DimeFMError, InputError
from dimefm_edge.files import atomic_file, user_cache_dir
from dimefm_edge.latency.operators import COST_NAMES, COUNTING, Vector, cost_vector

ADDED = ("predicted_ms", "low_ms", "high_ms", "basis")
"""Columns that are added to each row."""
_NAME_COLUMNS = ("timm_name_if_any", "timm_name", "timm")
_NEEDED = ("device", "runtime", "precision")
_SAVE_EVERY = 20


class TraceCache:
    """Costs of timm models by name, image size and batch, kept between runs."""

    def __init__(self, folder: Path | None = None) -> None:
        """Open it; `folder` defaults to the user's cache folder."""
        folder = folder or user_cache_dir()
        counts = hashlib.sha256(f"{COUNTING} {COST_NAMES}".encode()).hexdigest()[:8]
        self.path = folder / f"costs-timm-{version('timm')}-{counts}.json"
        self._costs: dict[str, list[float]] = {}
        self._unsaved = 0
        try:
            self._costs = json.loads(self.path.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            self._costs = {}  # none yet, or cut off: it is only a cache

    def costs(
        self, model: str, batch: int = 1, *, trace: Callable[..., Any] | None = None
    ) -> Vector:
        """`cost_vector` of `name@image size` (no size: the model's own).

        Args:
            model: timm's name, an @, pixels.
            batch: Images.
            trace: (name, image size, batch) -> operators; default `trace_classifier`.

        Raises:
            UnknownNameError: If timm has no such model.
            InputError: If it cannot be traced.
        """
        key = f"{model} x{batch}"
        known = self._costs.get(key)
        if known is not None and len(known) == len(COST_NAMES):
            return np.array(known)
        name, _, size = model.partition("@")
        vector = cost_vector((trace or _trace)(name, int(size) if size else None, batch))
        self._costs[key] = [float(f"{value:.6g}") for value in vector]
        self._unsaved += 1
        if self._unsaved >= _SAVE_EVERY:
            self.save()
        return vector

    def save(self) -> None:
        """Write it; a folder that cannot be written only costs time."""
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with atomic_file(self.path) as stream:
                stream.write(json.dumps(self._costs).encode())
        except OSError:
            pass
        self._unsaved = 0


def _trace(name: str, image_size: int | None, batch: int) -> Any:
    from dimefm_edge.latency.trace import trace_classifier

    return trace_classifier(name, image_size, batch)


@dataclass(frozen=True)
class RowsReport:
    """What became of a table."""

    rows: int
    estimated: int
    errors: tuple[tuple[int, str], ...]
    """Line of the file where the row ends (the header is 1), and why it has no estimate."""


def estimate_rows(
    source: Path,
    destination: Path,
    *,
    cache: TraceCache | None = None,
    advance: Callable[[int], None] = lambda count: None,
) -> RowsReport:
    """Add `ADDED` to each row of a CSV file.

    Args:
        source: Columns device, runtime, precision and timm_name_if_any (or timm_name); batch
            (default 1) and resolution (default the model's own), in any order, beside any others.
        destination: CSV file to write; by rename, so that a cut-off run leaves nothing half.
        cache: Of traces.
        advance: Told of each row that is done.

    Raises:
        InputError: If the file is missing, is not a CSV file, or lacks a column.
    """
    header, rows = _read(source)
    cache = cache or TraceCache()
    errors = []
    for line, row in rows.items():
        try:
            row.update(_estimate(row, cache))
        except DimeFMError as error:
            row.update(dict.fromkeys(ADDED, "") | {"basis": f"error: {error}"})
            errors.append((line, str(error)))
        advance(1)
    cache.save()
    _write(destination, [*header, *(c for c in ADDED if c not in header)], list(rows.values()))
    return RowsReport(len(rows), len(rows) - len(errors), tuple(errors))


def count_rows(source: Path) -> int:
    """How many rows a table has; raises as `estimate_rows` does."""
    return len(_read(source)[1])


def _read(source: Path) -> tuple[list[str], dict[int, dict[str, Any]]]:
    """The columns, and the rows by the line where each ends."""
    try:
        with source.open(newline="", encoding="utf-8-sig") as stream:
            reader = csv.DictReader(stream)
            header = list(reader.fieldnames or ())
            rows = {}
            for row in reader:
                line = reader.reader.line_num  # the outer one has not counted blank lines
                rows[line] = {k: v or "" for k, v in row.items() if k is not None}
    except FileNotFoundError as error:
        raise InputError(f"no file at {source}") from error
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise InputError(f"{source} cannot be read as CSV: {error}") from error
    missing = [name for name in _NEEDED if name not in header]
    if not any(name in header for name in _NAME_COLUMNS):
        missing.append(_NAME_COLUMNS[0])
    if missing:
        names = ", ".join((*_NEEDED, _NAME_COLUMNS[0]))
        if len(header) == 1 and ";" in header[0]:
            raise InputError(
                f"{source} looks separated by ';', and a table is read as separated by ','",
                hint=f"save it with commas; its first line must name {names}",
            )
        raise InputError(
            f"{source} lacks the column {', '.join(missing)}",
            hint=f"its first line must name {names}",
        )
    return header, rows


def _estimate(row: Mapping[str, str], cache: TraceCache) -> dict[str, str]:
    from dimefm_edge.latency.estimate import place_of

    name = next((row[c].strip() for c in _NAME_COLUMNS if row.get(c, "").strip()), "")
    if not name:
        raise InputError("the row names no timm model")
    for column in _NEEDED:
        if not row[column].strip():
            raise InputError(f"the row has no {column}")
    batch = _whole(row.get("batch", ""), "batch") or 1
    size = _whole(row.get("resolution", ""), "resolution")
    place = place_of(row["device"], row["runtime"], row["precision"])
    model = timm_key(name, size)
    figures = place.estimate(cache.costs(model, batch), model=model)
    return dict(zip(ADDED, (*(f"{f:.5g}" for f in figures), place.basis), strict=True))


def timm_key(name: str, image_size: int | None) -> str:
    """`name@image size`; without one, the size that timm has for the model, if it has."""
    if image_size is None:
        import timm

        config = timm.get_pretrained_cfg(name, allow_unregistered=True)
        image_size = config.input_size[-1] if config is not None else None
    return f"{name}@{image_size or ''}"


def _whole(text: str, column: str) -> int | None:
    text = text.strip()
    if not text or text.lower() in ("nan", "none", "not stated"):
        return None
    try:
        number = float(text)
    except ValueError:
        number = float("nan")
    if not (1 <= number <= 1e5 and number == int(number)):
        raise InputError(f"{column} must be a whole number from 1, got {text!r}")
    return int(number)


def _write(destination: Path, header: list[str], rows: list[dict[str, Any]]) -> None:
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, header)
    writer.writeheader()
    writer.writerows(rows)
    try:
        destination.parent.mkdir(parents=True, exist_ok=True)
        with atomic_file(destination) as stream:
            stream.write(text.getvalue().encode())
    except OSError as error:
        raise InputError(f"{destination} cannot be written: {error.strerror}") from error
