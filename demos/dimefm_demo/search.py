"""Search pictures by words or by a picture: an embedding store on disk, faiss in memory."""

from __future__ import annotations

import hashlib
import shutil
import tempfile
import threading
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from dimefm_demo.models import Model, cache_dir
from dimefm_edge.data.images import ImagePool, open_images
from dimefm_edge.data.store import EmbeddingStore
from dimefm_edge.embed import embed_images
from dimefm_edge.errors import DataError
from dimefm_edge.manifest import MODEL_FILE
from dimefm_edge.preprocess import PreprocessSpec

DEFAULT_SOURCES = ("scenes:240",)
"""What is searched where nothing was uploaded and the server was given nothing."""
_THUMBNAIL_SIDE = 224
_MAX_SAID = 3

Advance = Callable[[int], None]


@dataclass(frozen=True)
class Hit:
    """A picture that was found."""

    name: str
    cosine: float
    thumbnail: Image.Image


class ImageIndex:
    """Pictures that one model embedded, ready to be searched."""

    def __init__(self, model: Model, pool: ImagePool, store: EmbeddingStore) -> None:
        """
        Args:
            model: Whose embeddings the store holds.
            pool: The pictures; asked again for those that are shown.
            store: All of them, by row.

        Raises:
            DataError: If none of the pictures could be read.
        """
        import faiss

        self.model = model
        self._pool = pool
        self._rows = store.valid_rows()
        self.bad = [(pool.name(row), why) for row, why in store.manifest.bad_rows]
        if not len(self._rows):
            raise DataError(f"none of the pictures can be read: {self.describe_bad()}")
        self._faiss = faiss.IndexFlatIP(store.embed_dim)
        self._faiss.add(store.gather(self._rows).astype(np.float32))

    def __len__(self) -> int:
        return len(self._rows)

    def describe_bad(self) -> str:
        """Which pictures could not be read, and why."""
        said = "; ".join(f"{_short(name)} ({why})" for name, why in self.bad[:_MAX_SAID])
        more = len(self.bad) - _MAX_SAID
        return said + (f"; and {more} more" if more > 0 else "")

    def search(self, query_embeds: npt.NDArray[np.float32], *, count: int) -> list[Hit]:
        """The nearest pictures, nearest first.

        Args:
            query_embeds: (E,), L2-normalised, of a sentence or a picture.
            count: Fewer come where the index holds fewer.
        """
        cosines, places = self._faiss.search(query_embeds[None], min(count, len(self)))
        hits = []
        for cosine, place in zip(cosines[0], places[0], strict=True):
            row = int(self._rows[place])
            image = self._pool.load(row)
            image.thumbnail((_THUMBNAIL_SIDE, _THUMBNAIL_SIDE))
            hits.append(Hit(_short(self._pool.name(row)), float(cosine), image))
        return hits


def index_uploads(model: Model, pool: ImagePool, folder: Path, advance: Advance) -> ImageIndex:
    """Index what a visitor sent; it lives on a disk as long as the index does.

    Args:
        model: Embeds the pictures.
        pool: What was sent, which the server deletes before long: thumbnails are kept.
        folder: Where the index's own folder is made.
        advance: Told how many pictures more are done.

    Raises:
        DataError: If none of the pictures can be read.
    """
    own = Path(tempfile.mkdtemp(prefix="index-", dir=folder))
    try:
        kept = _KeptPool(pool, own)
        encoder = _Encoder(model, advance)
        store = embed_images(encoder, kept, own / "store", max_bad=max(1, len(pool)))
        index = ImageIndex(model, kept, store)
    except BaseException:
        shutil.rmtree(own, ignore_errors=True)
        raise
    weakref.finalize(index, shutil.rmtree, own, ignore_errors=True)
    return index


class ServerIndexes:
    """What the server was told to offer: indexed when it is first asked for, then kept on disk."""

    def __init__(self, sources: Sequence[str]) -> None:
        self.sources = tuple(sources) or DEFAULT_SOURCES
        self._indexes: dict[str, ImageIndex] = {}
        self._lock = threading.Lock()

    def check(self) -> None:
        """Open the sources as the first search will.

        Raises:
            DataError: If one is missing, damaged or holds no picture.
            MissingExtraError: If one needs a package that is not installed.
        """
        open_images(self.sources)

    def index_of(self, model: Model, advance: Advance) -> ImageIndex:
        """The index of one model.

        Raises:
            DataError: If the sources hold no picture that can be read.
            StoreError: If the index on disk is damaged.
        """
        with self._lock:  # a second visitor waits for the first one's index
            if model.name not in self._indexes:
                pool = open_images(self.sources)
                encoder = _Encoder(model, advance)
                folder = cache_dir() / f"index-{pool.fingerprint}-{encoder.weights_hash}"
                store = embed_images(encoder, pool, folder, max_bad=max(1, len(pool)))
                self._indexes[model.name] = ImageIndex(model, pool, store)
            return self._indexes[model.name]


class _Encoder:
    """A model as `embed_images` wants a teacher."""

    def __init__(self, model: Model, advance: Advance) -> None:
        self.name = model.name
        self.weights_hash = _weights_hash(model)
        self.preprocess: PreprocessSpec = model.subject.preprocess
        self.embed_dim = model.subject.embed_dim
        self.logit_scale = model.subject.logit_scale
        self._model, self._advance = model, advance

    def encode_images(self, pixels: npt.NDArray[np.uint8]) -> npt.NDArray[np.float32]:
        embeds = self._model.subject.encode_pixels(pixels)
        self._advance(len(pixels))
        return embeds

    def encode_texts(self, sentences: Sequence[str]) -> npt.NDArray[np.float32]:
        raise NotImplementedError("an index holds pictures only")


class _KeptPool:
    """A pool that keeps a thumbnail of each picture that is loaded, and then shows that."""

    def __init__(self, pool: ImagePool, folder: Path) -> None:
        self._pool, self._folder = pool, folder
        self.fingerprint = pool.fingerprint

    def __len__(self) -> int:
        return len(self._pool)

    def name(self, row: int) -> str:
        return self._pool.name(row)

    def load(self, row: int) -> Image.Image:
        path = self._folder / f"{row}.jpg"
        if path.is_file():
            with Image.open(path) as kept:
                return kept.convert("RGB")
        image = self._pool.load(row)
        thumbnail = image.copy()
        thumbnail.thumbnail((_THUMBNAIL_SIDE, _THUMBNAIL_SIDE))
        thumbnail.save(path, quality=85)
        return image


def _weights_hash(model: Model) -> str:
    listed: dict[str, Any] = model.manifest.get("files", {})
    known = listed.get(MODEL_FILE, {}).get("sha256") or f"{model.spec.source} {model.name}"
    return hashlib.sha256(f"{known} {model.subject.preprocess.digest()}".encode()).hexdigest()[:16]


def _short(name: str) -> str:
    """Without the server's folders."""
    return name.rsplit("/", 1)[-1] if name.startswith("/") else name
