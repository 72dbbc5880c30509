"""The embedding store: a teacher's embeddings of a pool, by row, on disk.

A folder of fixed-size shards of raw little-endian float16 (rows x embed_dim) and a
`manifest.json` that says whose embeddings they are. Shards land by rename and are then
entered in the manifest, so a killed run loses at most the shard it was at. No torch here.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from dimefm_edge.data.mapping import map_files
from dimefm_edge.errors import StoreError

MANIFEST_FILE = "manifest.json"
DEFAULT_SHARD_ROWS = 65_536
"""100 MB at 768 dimensions."""
_SHARD_ROWS_UNIT = 2048
"""Keeps every shard but the last a whole number of pages."""
_FORMAT = "dimefm_edge.store/1"

Rows = npt.NDArray[np.int64]
Embeds = npt.NDArray[np.float16]


@dataclass(frozen=True)
class Shard:
    """One file of the store."""

    file: str
    rows: int
    sha256: str


@dataclass(frozen=True)
class StoreManifest:
    """Whose embeddings a store holds, and of what."""

    kind: str
    """images or texts."""
    teacher: str
    """The teacher as the user named it."""
    weights_hash: str
    preprocess_hash: str
    """Of the teacher's image preprocessing; empty for texts."""
    source: str
    """Fingerprint of the pool."""
    embed_dim: int
    logit_scale: float
    num_rows: int
    shard_rows: int = DEFAULT_SHARD_ROWS
    shards: tuple[Shard | None, ...] = ()
    """In order of rows; None where one is missing."""
    bad_rows: tuple[tuple[int, str], ...] = ()
    """Rows that could not be read, with the reason; they hold zeros."""

    @property
    def num_shards(self) -> int:
        return -(-self.num_rows // self.shard_rows)

    @property
    def missing(self) -> list[int]:
        """Indices of shards that are not there yet."""
        return [i for i, shard in enumerate(self.shards) if shard is None]

    def rows_of(self, shard: int) -> range:
        """Rows of one shard."""
        start = shard * self.shard_rows
        return range(start, min(start + self.shard_rows, self.num_rows))


def read_manifest(store_dir: Path) -> StoreManifest:
    """Read and check a manifest.

    Raises:
        StoreError: If there is none, or it is damaged.
    """
    path = store_dir / MANIFEST_FILE
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        if values.pop("format", None) != _FORMAT:
            raise ValueError("another format")
        values["shards"] = tuple(None if s is None else Shard(**s) for s in values["shards"])
        values["bad_rows"] = tuple((row, why) for row, why in values["bad_rows"])
        manifest = StoreManifest(**values)
        _check_values(manifest)
        _check_shards(manifest)
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError) as error:
        raise StoreError(
            f"no embedding store at {store_dir}", hint="dimefm-edge embed --help"
        ) from error
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise StoreError(
            f"{path} is damaged or not a store's manifest: {' '.join(str(error).split())[:120]}",
            hint=f"delete {store_dir} and embed again",
        ) from error
    return manifest


class EmbeddingStore:
    """A complete store, opened as one array: memory maps side by side, nothing is read."""

    def __init__(self, store_dir: Path, manifest: StoreManifest) -> None:
        self.store_dir = store_dir
        self.manifest = manifest
        paths = [store_dir / shard.file for shard in manifest.shards if shard is not None]
        width = manifest.embed_dim * 2
        self._array: Embeds = (
            map_files(paths, stride_bytes=manifest.shard_rows * width)[: manifest.num_rows * width]
            .view(np.float16)
            .reshape(manifest.num_rows, manifest.embed_dim)
        )

    @classmethod
    def open(cls, store_dir: Path) -> EmbeddingStore:
        """Open a store; takes milliseconds at any size.

        Raises:
            StoreError: If it is missing, incomplete or damaged.
        """
        manifest = read_manifest(store_dir)
        if manifest.missing:
            raise StoreError(
                f"the store {store_dir} is incomplete: {len(manifest.missing)} of "
                f"{manifest.num_shards} shards are missing",
                hint="run the same command again: it does what is missing",
            )
        for index, shard in enumerate(manifest.shards):
            _check_size(store_dir, manifest, index, shard)
        return cls(store_dir, manifest)

    @property
    def embed_dim(self) -> int:
        return self.manifest.embed_dim

    def __len__(self) -> int:
        return self.manifest.num_rows

    def gather(self, rows: Rows) -> Embeds:
        """Copy rows out of the store: (B,) int64 in [0, len) -> (B, E) float16."""
        return self._array.take(rows, axis=0)  # faster than self._array[rows]

    def valid_rows(self) -> Rows:
        """Every row that could be read, ascending, int64."""
        is_valid = np.ones(len(self), np.bool_)
        is_valid[[row for row, _ in self.manifest.bad_rows]] = False
        return np.flatnonzero(is_valid)

    def usable_rows(self, wanted: Rows | None) -> Rows:
        """Those of the wanted rows that could be read, ascending; None: all that could."""
        rows = self.valid_rows()
        return rows if wanted is None else np.intersect1d(rows, wanted)

    def verify(self) -> None:
        """Compare every shard with its checksum.

        Raises:
            StoreError: Naming the shard that differs, and the mend.
        """
        for shard in self.manifest.shards:
            assert shard is not None
            path = self.store_dir / shard.file
            if hashlib.sha256(np.memmap(path, np.uint8, "r").data).hexdigest() != shard.sha256:
                raise StoreError(
                    f"{path} does not match its checksum",
                    hint=f"delete {path} and run the same command again",
                )


class StoreWriter:
    """Fills a store shard by shard; what is there already is kept."""

    def __init__(self, store_dir: Path, manifest: StoreManifest) -> None:
        self.store_dir = store_dir
        self.manifest = manifest

    @classmethod
    def create_or_resume(cls, store_dir: Path, wanted: StoreManifest) -> StoreWriter:
        """Start a store, or go on with one of the same teacher and data.

        Raises:
            StoreError: If the folder holds another teacher's store, other data's, or no store.
            ValueError: If a value of the manifest wanted is out of range.
        """
        _check_values(wanted)
        if not (store_dir / MANIFEST_FILE).is_file():
            if store_dir.exists() and not _is_empty(store_dir):
                raise StoreError(
                    f"{store_dir} is not an empty folder and not a store", hint="another --store"
                )
            store_dir.mkdir(parents=True, exist_ok=True)
            empty = dataclasses.replace(wanted, shards=(None,) * wanted.num_shards)
            writer = cls(store_dir, empty)
            writer._write_manifest()
            return writer
        found = read_manifest(store_dir)
        _check_same(store_dir, found, wanted)
        kept = tuple(
            shard if _is_whole(store_dir, found, index, shard) else None
            for index, shard in enumerate(found.shards)
        )
        return cls(store_dir, dataclasses.replace(found, shards=kept))

    def missing_shards(self) -> list[int]:
        """Indices of shards to write, ascending."""
        return self.manifest.missing

    def write_shard(
        self, index: int, embeds: Embeds, *, bad_rows: Sequence[tuple[int, str]] = ()
    ) -> None:
        """Put one shard in place.

        Args:
            index: Which shard.
            embeds: (rows of the shard, E) float16.
            bad_rows: Rows of this shard that could not be read, with the reason.

        Raises:
            StoreError: If the disk is full; finished shards are kept.
            ValueError: If there is no such shard, or it has another shape or type.
        """
        if not 0 <= index < self.manifest.num_shards:
            raise ValueError(f"there is no shard {index} of {self.manifest.num_shards}")
        rows = self.manifest.rows_of(index)
        expected = (len(rows), self.manifest.embed_dim)
        if embeds.shape != expected or embeds.dtype != np.float16:
            raise ValueError(
                f"shard {index} must be {expected} float16, got {embeds.shape} {embeds.dtype}"
            )
        content = np.ascontiguousarray(embeds, "<f2").data.cast("B")
        name = _shard_file(index)
        self._replace(name, content)
        shard = Shard(name, len(rows), hashlib.sha256(content).hexdigest())
        shards = list(self.manifest.shards)
        shards[index] = shard
        others = [bad for bad in self.manifest.bad_rows if bad[0] not in rows]
        self.manifest = dataclasses.replace(
            self.manifest, shards=tuple(shards), bad_rows=tuple(sorted([*others, *bad_rows]))
        )
        self._write_manifest()

    def finish(self) -> EmbeddingStore:
        """Open the completed store.

        Raises:
            StoreError: If shards are missing.
        """
        return EmbeddingStore.open(self.store_dir)

    def _write_manifest(self) -> None:
        values = {"format": _FORMAT, **dataclasses.asdict(self.manifest)}
        self._replace(MANIFEST_FILE, (json.dumps(values, indent=1) + "\n").encode())

    def _replace(self, name: str, content: bytes | memoryview) -> None:
        temporary = _temporary(self.store_dir, name)
        try:
            with temporary.open("wb") as stream:
                stream.write(content)
                stream.flush()
                os.fsync(stream.fileno())
            os.replace(temporary, self.store_dir / name)
        except OSError as error:
            with contextlib.suppress(OSError):
                temporary.unlink()
            done = self.manifest.num_shards - len(self.manifest.missing)
            raise StoreError(
                f"cannot write {self.store_dir / name}: {error.strerror}; "
                f"{done} of {self.manifest.num_shards} shards are kept",
                hint="make room and run the same command again (distill: with --resume): "
                "it does what is missing",
            ) from error


def _shard_file(index: int) -> str:
    return f"shard-{index:06d}.f16"


def _temporary(store_dir: Path, name: str) -> Path:
    return store_dir / f".{name}.tmp"


def _is_empty(store_dir: Path) -> bool:
    """Whether nothing is there but what a run leaves that is killed as it begins."""
    begun = _temporary(store_dir, MANIFEST_FILE)
    return store_dir.is_dir() and all(path == begun for path in store_dir.iterdir())


def _check_values(manifest: StoreManifest) -> None:
    names = ("kind", "teacher", "weights_hash", "preprocess_hash", "source")
    for name in names:
        if not isinstance(getattr(manifest, name), str):
            raise ValueError(f"{name} must be text")
    for name in ("embed_dim", "num_rows", "shard_rows"):
        count = getattr(manifest, name)
        if type(count) is not int or not 0 < count < 2**40:
            raise ValueError(f"{name} must be a positive number, got {count!r}")
    if manifest.shard_rows % _SHARD_ROWS_UNIT:
        raise ValueError(
            f"shard_rows must be a multiple of {_SHARD_ROWS_UNIT}, got {manifest.shard_rows}"
        )
    scale = manifest.logit_scale
    if not isinstance(scale, int | float) or not 0 < scale < 1e9:
        raise ValueError(f"logit_scale must be a positive number, got {scale!r}")


def _check_shards(manifest: StoreManifest) -> None:
    if len(manifest.shards) != manifest.num_shards:
        raise ValueError(f"{len(manifest.shards)} shards listed, {manifest.num_shards} expected")
    for index, shard in enumerate(manifest.shards):
        if shard is None:
            continue
        if shard.file != _shard_file(index):  # a path could lead out of the folder
            raise ValueError(f"shard {index} must be {_shard_file(index)}, not {shard.file!r}")
        if shard.rows != len(manifest.rows_of(index)) or not isinstance(shard.sha256, str):
            raise ValueError(f"wrong rows or checksum of {shard.file}")
    for row, why in manifest.bad_rows:
        if type(row) is not int or not 0 <= row < manifest.num_rows or not isinstance(why, str):
            raise ValueError(f"bad row {row!r}")


def _is_whole(store_dir: Path, manifest: StoreManifest, index: int, shard: Shard | None) -> bool:
    if shard is None:
        return False
    path = store_dir / shard.file
    expected = len(manifest.rows_of(index)) * manifest.embed_dim * 2
    return path.is_file() and path.stat().st_size == expected


def _check_size(store_dir: Path, manifest: StoreManifest, index: int, shard: Shard | None) -> None:
    if not _is_whole(store_dir, manifest, index, shard):
        name = shard.file if shard else f"shard {index}"
        raise StoreError(
            f"{store_dir / name} is missing or truncated",
            hint="run the same command again: it does what is missing",
        )


def _check_same(store_dir: Path, found: StoreManifest, wanted: StoreManifest) -> None:
    if found.weights_hash != wanted.weights_hash or found.kind != wanted.kind:
        raise StoreError(
            f"the store {store_dir} holds {found.kind} embedded by teacher '{found.teacher}' "
            f"({found.weights_hash}), not {wanted.kind} by '{wanted.teacher}' "
            f"({wanted.weights_hash})",
            hint="another --store, or that teacher",
        )
    if found.preprocess_hash != wanted.preprocess_hash:
        raise StoreError(
            f"the store {store_dir} was made with other image preprocessing", hint="another --store"
        )
    if (found.source, found.num_rows) != (wanted.source, wanted.num_rows):
        raise StoreError(
            f"the store {store_dir} holds other {found.kind}: {found.num_rows} rows "
            f"({found.source}), not these {wanted.num_rows} ({wanted.source})",
            hint=f"another --store, or the {found.kind} that it was made from",
        )
