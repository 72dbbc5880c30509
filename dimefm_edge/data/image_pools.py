"""Pools of images by row: folders, tars, Parquet, Hugging Face folders and scenes."""

from __future__ import annotations

import bisect
import functools
import itertools
import threading
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from dimefm_edge.data.decode import ImagePool, decode_image
from dimefm_edge.data.scenes import DEFAULT_NUM_IMAGES, scene_image
from dimefm_edge.data.sources import (
    digest_lines,
    expand_source,
    scenes_count,
    walk_files,
)
from dimefm_edge.data.tar_index import TarIndex, scan_tar
from dimefm_edge.errors import DataError, MissingExtraError
from dimefm_edge.image_files import BadImageError

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm")

_KEPT_ROW_GROUPS = 2
_HF_FILES = ("dataset_info.json", "dataset_dict.json")


def open_images(sources: Sequence[str], *, column: str = "image") -> ImagePool:
    """Open sources of images as one pool, one after the other.

    Args:
        sources: Folders, images, `.tar` shards (globs and braces too), Parquet files, folders
            of `datasets.save_to_disk`, or `scenes[:COUNT]`. Of a folder: its images and tars at
            any depth; its Parquet files if it has neither.
        column: The images' column in Parquet files and Hugging Face datasets.

    Raises:
        DataError: If a source is missing, damaged, of an unknown kind or holds no image.
        MissingExtraError: If a source needs a package that is not installed.
    """
    pools: list[ImagePool] = []
    for source in sources:
        count = scenes_count(source, DEFAULT_NUM_IMAGES)
        if count is not None:
            pools.append(ScenePool(count))
            continue
        found = [pool for path in expand_source(source) for pool in _open_path(path, column)]
        if not any(len(pool) for pool in found):
            raise DataError(
                f"{source} holds no image",
                hint=f"images end in {' '.join(IMAGE_SUFFIXES)}; shards in .tar or .parquet",
            )
        pools.extend(found)
    if not pools:
        raise DataError("no source of images was given", hint="--images scenes")
    return pools[0] if len(pools) == 1 else JoinedPool(pools)


class ScenePool:
    """Images 0 .. count - 1 of `scenes`, drawn when they are asked for."""

    def __init__(self, count: int) -> None:
        self._count = count

    @functools.cached_property
    def fingerprint(self) -> str:
        # A few pixels stand for the drawing code and numpy's random numbers.
        pixels = [scene_image(row).tobytes().hex() for row in range(4)]
        return digest_lines(["scenes", str(self._count), *pixels])

    def __len__(self) -> int:
        return self._count

    def name(self, row: int) -> str:
        return f"scenes/{row}"

    def load(self, row: int) -> Image.Image:
        if not 0 <= row < self._count:
            raise IndexError(row)
        return scene_image(row)


class FolderPool:
    """Image files below a folder."""

    def __init__(self, root: Path, files: Sequence[tuple[str, int]]) -> None:
        """
        Args:
            root: The folder.
            files: (path relative to root, bytes), in order.
        """
        self._root = root
        self.files = files

    @functools.cached_property
    def fingerprint(self) -> str:
        return digest_lines(f"{name}\t{size}" for name, size in self.files)

    def __len__(self) -> int:
        return len(self.files)

    def name(self, row: int) -> str:
        return str(self._root / self.files[row][0])

    def load(self, row: int) -> Image.Image:
        return _load_file(Path(self.name(row)))


class TarPool:
    """Images in one plain tar, as WebDataset and img2dataset write it."""

    def __init__(self, index: TarIndex) -> None:
        self.index = index

    @functools.cached_property
    def fingerprint(self) -> str:
        pairs = zip(self.index.names, self.index.sizes.tolist(), strict=True)
        return digest_lines([self.index.path.name, *(f"{name}\t{size}" for name, size in pairs)])

    def __len__(self) -> int:
        return len(self.index.names)

    def name(self, row: int) -> str:
        return f"{self.index.path}/{self.index.names[row]}"

    def load(self, row: int) -> Image.Image:
        try:
            data = self.index.read(row)
        except OSError as error:
            raise BadImageError(self.name(row), error.strerror or str(error)) from error
        return decode_image(data, self.name(row))


class ParquetPool:
    """A column of encoded images in one Parquet file; row groups are read whole.

    Cells are bytes, or structs with a field `bytes` (as Hugging Face writes images).
    """

    def __init__(self, path: Path, *, column: str) -> None:
        """
        Raises:
            DataError: If the file is damaged or has no such column of images.
            MissingExtraError: If pyarrow is not installed.
        """
        pa, parquet = import_pyarrow(path)
        self._path, self._column = path, column
        try:
            with parquet.ParquetFile(path) as file:
                schema, metadata = file.schema_arrow, file.metadata
        except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
            raise DataError(f"{path} is truncated or not a Parquet file: {error}") from error
        if column not in schema.names:
            raise no_column(path, column, list(schema.names), flag="--image-column")
        kind = schema.field(column).type
        self._is_struct = pa.types.is_struct(kind)
        has_bytes = self._is_struct and kind.get_field_index("bytes") >= 0
        if not (has_bytes or pa.types.is_binary(kind) or pa.types.is_large_binary(kind)):
            raise DataError(
                f"column '{column}' of {path} holds {kind}, not encoded images",
                hint=f"--image-column with another of: {', '.join(schema.names)}",
            )
        groups = [metadata.row_group(i).num_rows for i in range(metadata.num_row_groups)]
        if min(groups, default=0) < 0:
            raise DataError(f"{path} is damaged: it says that it has {min(groups)} rows")
        self._starts: list[int] = [0, *itertools.accumulate(groups)]
        self._groups: OrderedDict[int, Any] = OrderedDict()
        self._lock = threading.Lock()

    @functools.cached_property
    def fingerprint(self) -> str:
        size = self._path.stat().st_size
        return digest_lines([self._path.name, self._column, str(size), str(len(self))])

    def __len__(self) -> int:
        return self._starts[-1]

    def name(self, row: int) -> str:
        return f"{self._path}[{row}]"

    def load(self, row: int) -> Image.Image:
        if not 0 <= row < len(self):
            raise IndexError(row)
        group = bisect.bisect_right(self._starts, row) - 1
        try:
            cell = self._read_group(group)[row - self._starts[group]].as_py()
        except (OSError, ValueError, LookupError) as error:  # fewer rows than the footer says
            raise BadImageError(self.name(row), f"damaged row group: {error}") from error
        data = cell.get("bytes") if self._is_struct and cell is not None else cell
        if data is None:
            raise BadImageError(self.name(row), "the cell holds no bytes")
        return decode_image(data, self.name(row))

    def _read_group(self, group: int) -> Any:
        with self._lock:
            if group not in self._groups:
                _, parquet = import_pyarrow(self._path)
                with parquet.ParquetFile(self._path) as file:
                    table = file.read_row_group(group, columns=[self._column])
                self._groups[group] = table.column(self._column)
                if len(self._groups) > _KEPT_ROW_GROUPS:
                    self._groups.popitem(last=False)
            self._groups.move_to_end(group)
            return self._groups[group]


class HuggingFacePool:
    """A column of images in a folder that `datasets.Dataset.save_to_disk` wrote."""

    def __init__(self, path: Path, *, column: str) -> None:
        """
        Raises:
            DataError: If the folder is damaged, has several splits or no such column of images.
            MissingExtraError: If `datasets` is not installed.
        """
        try:
            import datasets  # type: ignore[import-untyped]
        except ImportError as error:
            raise MissingExtraError(
                f"{path} is a Hugging Face dataset, and the package 'datasets' is not installed",
                hint="pip install datasets",
            ) from error
        try:
            dataset = datasets.load_from_disk(str(path))
        except Exception as error:  # its own errors, pyarrow's, json's: all say "damaged"
            raise DataError(f"{path} is no whole Hugging Face dataset: {error}") from error
        if isinstance(dataset, datasets.DatasetDict):
            splits = [str(path / split) for split in dataset]
            raise DataError(f"{path} has several splits", hint=f"name one: {' or '.join(splits)}")
        if column not in dataset.column_names:
            raise no_column(path, column, list(dataset.column_names), flag="--image-column")
        feature = dataset.features[column]
        if isinstance(feature, datasets.Image):
            dataset = dataset.cast_column(column, datasets.Image(decode=False))
        elif getattr(feature, "dtype", None) not in ("binary", "large_binary"):
            raise DataError(
                f"column '{column}' of {path} holds {feature}, not images",
                hint=f"--image-column with another of: {', '.join(dataset.column_names)}",
            )
        self._path, self._column = path, column
        self._cells = dataset.select_columns([column])

    @functools.cached_property
    def fingerprint(self) -> str:
        files = walk_files(self._path)
        sizes = [f"{name}\t{size}" for name, size in files if name.endswith(".arrow")]
        return digest_lines([self._column, str(len(self)), *sizes])

    def __len__(self) -> int:
        return len(self._cells)

    def name(self, row: int) -> str:
        return f"{self._path}[{row}]"

    def load(self, row: int) -> Image.Image:
        if not 0 <= row < len(self):
            raise IndexError(row)
        cell = self._cells[row][self._column]
        if isinstance(cell, dict):
            if cell.get("bytes") is None and cell.get("path"):
                return _load_file(Path(cell["path"]))
            cell = cell.get("bytes")
        if cell is None:
            raise BadImageError(self.name(row), "the cell holds no bytes")
        return decode_image(cell, self.name(row))


class JoinedPool:
    """Several pools, one after the other."""

    def __init__(self, pools: Sequence[ImagePool]) -> None:
        self._pools = pools
        self._starts = [0, *itertools.accumulate(len(pool) for pool in pools)]

    @functools.cached_property
    def fingerprint(self) -> str:
        return digest_lines(pool.fingerprint for pool in self._pools)

    def __len__(self) -> int:
        return self._starts[-1]

    def name(self, row: int) -> str:
        pool, inner = self._locate(row)
        return pool.name(inner)

    def load(self, row: int) -> Image.Image:
        pool, inner = self._locate(row)
        return pool.load(inner)

    def _locate(self, row: int) -> tuple[ImagePool, int]:
        if not 0 <= row < len(self):
            raise IndexError(row)
        place = bisect.bisect_right(self._starts, row) - 1
        return self._pools[place], row - self._starts[place]


def no_column(path: Path, column: str, known: list[str], *, flag: str) -> DataError:
    """An error for a column that a table does not have; `flag` names another."""
    return DataError(
        f"{path} has no column '{column}'; its columns: {', '.join(known)}",
        hint=f"{flag} with one of these",
    )


def import_pyarrow(path: Path) -> tuple[Any, Any]:
    """The modules pyarrow and pyarrow.parquet, to read `path` with.

    Raises:
        MissingExtraError: If pyarrow is not installed.
    """
    try:
        import pyarrow  # type: ignore[import-untyped]
        import pyarrow.parquet  # type: ignore[import-untyped]
    except ImportError as error:
        raise MissingExtraError(
            f"{path} is a Parquet file, and pyarrow is not installed",
            hint="pip install 'dimefm_edge[train]'",
        ) from error
    return pyarrow, pyarrow.parquet


def _load_file(path: Path) -> Image.Image:
    try:
        data = path.read_bytes()
    except OSError as error:
        raise BadImageError(str(path), error.strerror or str(error)) from error
    return decode_image(data, str(path))


def _open_path(path: Path, column: str) -> list[ImagePool]:
    if path.is_dir():
        return _open_folder(path, column)
    suffix = path.suffix.lower()
    if suffix == ".tar":
        return [TarPool(scan_tar(path, IMAGE_SUFFIXES))]
    if suffix == ".parquet":
        return [ParquetPool(path, column=column)]
    if suffix in IMAGE_SUFFIXES:
        return [FolderPool(path.parent, [(path.name, path.stat().st_size)])]
    raise DataError(
        f"{path} is not a source of images: its name ends in '{suffix}'",
        hint=f"a folder, .tar, .parquet or an image ({' '.join(IMAGE_SUFFIXES)})",
    )


def _open_folder(path: Path, column: str) -> list[ImagePool]:
    if any((path / name).is_file() for name in _HF_FILES):
        return [HuggingFacePool(path, column=column)]
    files = walk_files(path)
    images = [item for item in files if item[0].lower().endswith(IMAGE_SUFFIXES)]
    tars = [path / name for name, _ in files if name.lower().endswith(".tar")]
    pools: list[ImagePool] = [FolderPool(path, images)] if images else []
    pools.extend(TarPool(scan_tar(tar, IMAGE_SUFFIXES)) for tar in tars)
    if pools:
        return pools  # the .parquet files that img2dataset writes beside are its metadata
    tables = [path / name for name, _ in files if name.lower().endswith(".parquet")]
    return [ParquetPool(table, column=column) for table in tables]
