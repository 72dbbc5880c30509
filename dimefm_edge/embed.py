"""Fill an embedding store: every image or sentence of a pool through the teacher, once."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal, Protocol

import numpy as np
import numpy.typing as npt

from dimefm_edge.data.images import ImagePool, PixelCache, decode_batches, row_batches
from dimefm_edge.data.sentences import SentencePool
from dimefm_edge.data.store import (
    DEFAULT_SHARD_ROWS,
    MANIFEST_FILE,
    EmbeddingStore,
    StoreManifest,
    StoreWriter,
)
from dimefm_edge.errors import DataError
from dimefm_edge.preprocess import PreprocessSpec
from dimefm_edge.progress import counting

if TYPE_CHECKING:  # the demo embeds without torch
    from dimefm_edge.data.views import ViewSpec

logger = logging.getLogger(__name__)

_SHOWN_BAD = 5


class Encoder(Protocol):
    """The part of a teacher that embedding needs."""

    name: str
    weights_hash: str
    preprocess: PreprocessSpec
    embed_dim: int
    logit_scale: float

    def encode_images(self, pixels: npt.NDArray[np.uint8]) -> npt.NDArray[np.float32]:
        """(B, S, S, 3) uint8 -> (B, E) float32, L2-normalised."""

    def encode_texts(self, sentences: Sequence[str]) -> npt.NDArray[np.float32]:
        """B sentences -> (B, E) float32, L2-normalised."""


def embed_images(
    teacher: Encoder,
    pool: ImagePool,
    store_dir: Path,
    *,
    max_bad: float = 0.1,
    batch_size: int = 256,
    workers: int = 0,
    cache: PixelCache | None = None,
    shard_rows: int = DEFAULT_SHARD_ROWS,
    view: ViewSpec | None = None,
) -> EmbeddingStore:
    """Embed a pool of images; shards that are there already are kept.

    Args:
        teacher: Encodes with its own preprocessing.
        pool: Images by row; those that cannot be read become bad rows.
        store_dir: The store's folder.
        max_bad: Stop when more images than this are bad: a share below 1, else a count.
        batch_size: Images per call of the teacher.
        workers: Decoding threads or processes; 0 chooses.
        cache: Keeps the decoded pixels, in the same pass.
        shard_rows: Rows per shard.
        view: Embed this augmentation of every image; the cache keeps the whole images.

    Raises:
        DataError: If too many images are bad, the pool is empty, or an image that was embedded
            cannot be read again for the cache.
        StoreError: If the store is another teacher's or other images'.
    """
    if not len(pool):
        raise DataError("there is no image to embed", hint="check --images")
    source = pool.fingerprint if view is None else f"{pool.fingerprint} view {view.digest()}"
    writer = _open_writer(teacher, "images", pool, store_dir, shard_rows, source)
    manifest = writer.manifest  # a store that is there keeps its own shard_rows
    missing = writer.missing_shards()
    kept = {shard: manifest.rows_of(shard) for shard in range(manifest.num_shards)}
    for shard in missing:
        del kept[shard]
    known_bad = [bad for bad in manifest.bad_rows if bad[0] // manifest.shard_rows in kept]
    guard = _BadImages(pool, max_bad, known_bad)
    rows_todo = sum(len(manifest.rows_of(shard)) for shard in missing)
    with counting("embed images", rows_todo) as advance:
        batches = row_batches([manifest.rows_of(shard) for shard in missing], batch_size)
        decoded = decode_batches(pool, batches, teacher.preprocess, workers=workers)
        for shard in missing:
            rows = manifest.rows_of(shard)
            embeds = np.zeros((len(rows), teacher.embed_dim), np.float16)
            bad: list[tuple[int, str]] = []
            for _ in range(-(-len(rows) // batch_size)):
                batch = next(decoded)
                if len(batch.rows):
                    seen = batch.pixels if view is None else view.apply(batch.rows, batch.pixels)
                    embeds[batch.rows - rows.start] = teacher.encode_images(seen)
                    if cache is not None:
                        cache.write(batch.rows, batch.pixels)
                bad.extend(batch.bad_rows)
                guard.add(batch.bad_rows)
                advance(len(batch.rows) + len(batch.bad_rows))
            writer.write_shard(shard, embeds, bad_rows=bad)
    if cache is not None and not cache.is_complete:
        # Shards of an earlier run were embedded without this cache.
        fill_cache(
            cache, pool, teacher.preprocess, kept.values(), known_bad, batch_size=batch_size,
            workers=workers,
        )  # fmt: skip
    guard.report()
    return writer.finish()


def fill_cache(
    cache: PixelCache,
    pool: ImagePool,
    preprocess: PreprocessSpec,
    spans: Iterable[range],
    known_bad: Sequence[tuple[int, str]],
    *,
    batch_size: int = 256,
    workers: int = 0,
) -> None:
    """Decode images that were embedded into a cache, and say that it is complete.

    Args:
        cache: Of these pixels.
        pool: The images.
        preprocess: What they are decoded for.
        spans: Rows.
        known_bad: Rows that could not be read when they were embedded, and why.
        batch_size: Images decoded together.
        workers: Threads; 0 chooses.

    Raises:
        DataError: If an image that was embedded cannot be read again.
    """
    spans = list(spans)
    with counting("decode images", sum(map(len, spans))) as advance:
        batches = row_batches(spans, batch_size)
        for batch in decode_batches(pool, batches, preprocess, workers=workers):
            _check_still_bad(pool, batch.bad_rows, known_bad)
            if len(batch.rows):
                cache.write(batch.rows, batch.pixels)
            advance(len(batch.rows) + len(batch.bad_rows))
    cache.mark_complete()


def embed_texts(
    teacher: Encoder,
    sentences: SentencePool,
    store_dir: Path,
    *,
    max_bad: float = 0.1,
    batch_size: int = 512,
    shard_rows: int = DEFAULT_SHARD_ROWS,
) -> EmbeddingStore:
    """Embed a pool of sentences; shards that are there already are kept.

    Args:
        teacher: Encodes with its own tokenizer.
        sentences: Read in order.
        store_dir: The store's folder.
        max_bad: Begin no store when the pool leaves out more sentences than this: a share
            below 1, else a count.
        batch_size: Sentences per call of the teacher.
        shard_rows: Rows per shard.

    Raises:
        DataError: If too many sentences are left out, the pool is empty, or it became shorter
            while it was read.
        StoreError: If the store is another teacher's or other sentences'.
    """
    check_sentences(sentences, store_dir, max_bad=max_bad)
    source = sentences.fingerprint
    writer = _open_writer(teacher, "texts", sentences, store_dir, shard_rows, source)
    manifest = writer.manifest  # a store that is there keeps its own shard_rows
    missing = set(writer.missing_shards())
    todo = sum(len(manifest.rows_of(shard)) for shard in missing)
    stream = iter(sentences)
    with counting("embed sentences", todo) as advance:
        for shard in range(max(missing, default=-1) + 1):
            rows = manifest.rows_of(shard)
            if shard not in missing:
                _take(stream, len(rows))
                continue
            embeds = np.empty((len(rows), teacher.embed_dim), np.float16)
            for start in range(0, len(rows), batch_size):
                batch = _take(stream, min(batch_size, len(rows) - start))
                embeds[start : start + len(batch)] = teacher.encode_texts(batch)
                advance(len(batch))
            writer.write_shard(shard, embeds)
    return writer.finish()


def _open_writer(
    teacher: Encoder,
    kind: Literal["images", "texts"],
    pool: ImagePool | SentencePool,
    store_dir: Path,
    shard_rows: int,
    source: str,
) -> StoreWriter:
    wanted = StoreManifest(
        kind=kind,
        teacher=teacher.name,
        weights_hash=teacher.weights_hash,
        preprocess_hash=teacher.preprocess.digest() if kind == "images" else "",
        source=source,
        embed_dim=teacher.embed_dim,
        logit_scale=teacher.logit_scale,
        num_rows=len(pool),
        shard_rows=shard_rows,
    )
    return StoreWriter.create_or_resume(store_dir, wanted)


def _limit(max_bad: float, total: int) -> float:
    return max_bad if max_bad >= 1 else max_bad * total


def check_sentences(sentences: SentencePool, store_dir: Path, *, max_bad: float) -> None:
    """What `embed_texts` refuses, for who embeds something else first; a store that is begun is
    gone on with.

    Raises:
        DataError: If the pool is empty, or leaves out more sentences than `max_bad`.
    """
    if not len(sentences):
        raise DataError("there is no sentence to embed", hint="check --texts")
    stats = sentences.stats
    left_out, total = stats.num_left_out, stats.num_sentences + stats.num_left_out
    limit = int(_limit(max_bad, total))
    if left_out > limit and not (store_dir / MANIFEST_FILE).is_file():
        raise DataError(
            f"{left_out} of {total} sentences cannot be used, more than --max-bad allows "
            f"({limit}); the first is {stats.first_left_out}",
            hint=f"mend them, or go on without them: --max-bad {left_out}",
        )


class _BadImages:
    """Counts unreadable images and stops when there are too many."""

    def __init__(self, pool: ImagePool, max_bad: float, known: list[tuple[int, str]]) -> None:
        self._pool = pool
        self._limit = _limit(max_bad, len(pool))
        self._bad = list(known)

    def add(self, bad_rows: Sequence[tuple[int, str]]) -> None:
        self._bad.extend(bad_rows)
        if bad_rows and len(self._bad) > self._limit:
            raise DataError(
                f"{len(self._bad)} images cannot be read, more than --max-bad allows "
                f"({self._limit:g} of {len(self._pool)}): {self._examples()}",
                hint="mend or remove them, or raise --max-bad; finished shards are kept",
            )

    def report(self) -> None:
        if self._bad:
            logger.warning("%d images skipped as unreadable: %s", len(self._bad), self._examples())

    def _examples(self) -> str:
        shown = [f"{self._pool.name(row)} ({why})" for row, why in self._bad[:_SHOWN_BAD]]
        more = len(self._bad) - len(shown)
        text = "; ".join(shown) + (f"; and {more} more" if more > 0 else "")
        return " ".join(text.split())  # a name or a reason may hold line ends


def _check_still_bad(
    pool: ImagePool, bad_rows: Sequence[tuple[int, str]], known: Sequence[tuple[int, str]]
) -> None:
    """Refuse to leave a hole in the cache where the store has an embedding."""
    if not bad_rows:
        return
    rows = {row for row, _ in known}
    for row, reason in bad_rows:
        if row not in rows:
            raise DataError(
                f"image {pool.name(row)} could be read when it was embedded and cannot now: "
                f"{reason}",
                hint="bring the file back and run the same command again",
            )


def _take(stream: Iterator[str], count: int) -> list[str]:
    taken = list(itertools.islice(stream, count))
    if len(taken) < count:
        raise DataError(
            "the sentences became fewer while they were embedded",
            hint="leave their files alone and run again, with another --store",
        )
    return taken
