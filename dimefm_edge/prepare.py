"""What a run trains on: the teacher's stores, the images' pixels, and what its settings ask for.

`embed_pools` is done by one process, `open_data` by every rank; both find what is there.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

from dimefm_edge.batches import CachedPixels, DecodedPixels, DistillData, PixelSource
from dimefm_edge.config import DEFAULT_MIN_CROP, RunConfig, TrainConfig
from dimefm_edge.corpus import load_kept_rows
from dimefm_edge.data.images import ImagePool, LabelledSet, PixelCache
from dimefm_edge.data.neighbours import NeighbourTable, open_neighbours
from dimefm_edge.data.pairs import class_pairs
from dimefm_edge.data.pixel_cache import DecodedPool
from dimefm_edge.data.sentences import SentencePool
from dimefm_edge.data.sources import absolute_source
from dimefm_edge.data.store import EmbeddingStore
from dimefm_edge.data.views import Views, ViewSpec
from dimefm_edge.embed import check_sentences, embed_images, embed_texts, fill_cache
from dimefm_edge.errors import DataError
from dimefm_edge.preprocess import PreprocessSpec
from dimefm_edge.teacher import Teacher, absolute_teacher

_PIXEL_CACHE_BYTES = 4 * 2**30


def embed_pools(
    config: RunConfig,
    teacher: Teacher,
    pool: ImagePool,
    sentences: SentencePool,
    preprocess: PreprocessSpec,
    store_dir: Path,
) -> None:
    """Fill the stores; small pools also keep their decoded pixels, in the same pass.

    Raises:
        DataError: If too many images are bad, or a pool is empty.
        StoreError: If the stores are another teacher's or of other data.
    """
    check_sentences(sentences, store_dir / "texts", max_bad=config.data.max_bad)
    cache = own = None
    if _cache_bytes(pool, preprocess) <= _PIXEL_CACHE_BYTES:
        own = PixelCache.create(
            _cache_path(store_dir, preprocess), len(pool), preprocess, pool.fingerprint
        )
        cache = own if preprocess == teacher.preprocess else None
    images = embed_images(
        teacher,
        pool,
        store_dir / "images",
        max_bad=config.data.max_bad,
        workers=config.data.workers,
        cache=cache,
    )
    if own is not None and not own.is_complete:  # the student's images are of another size
        fill_cache(
            own, pool, preprocess, [range(len(pool))], images.manifest.bad_rows,
            workers=config.data.workers,
        )  # fmt: skip
    texts = embed_texts(teacher, sentences, store_dir / "texts", max_bad=config.data.max_bad)
    _neighbours(config, images, texts, store_dir)
    if cache is not None:
        pool = DecodedPool(pool, cache, dict(images.manifest.bad_rows))
    for spec in view_specs(config.train):
        embed_images(
            teacher,
            pool,
            _view_dir(store_dir, spec),
            max_bad=config.data.max_bad,
            workers=config.data.workers,
            view=spec,
        )


def view_specs(train: TrainConfig) -> tuple[ViewSpec, ...]:
    """The views that a run asks for, each with the run's crops and mirroring."""
    min_crop = DEFAULT_MIN_CROP if train.min_crop is None else train.min_crop
    return tuple(ViewSpec(view, min_crop, train.flip is not False) for view in range(train.views))


def open_data(
    config: RunConfig,
    teacher: Teacher,
    pool: ImagePool,
    labelled: LabelledSet | None,
    preprocess: PreprocessSpec,
    store_dir: Path,
) -> DistillData:
    """Open what `embed_pools` made.

    Raises:
        DataError: If no image of the pool could be read.
        StoreError: If a store is incomplete, or `text_rows` are of other sentences.
    """
    images = EmbeddingStore.open(store_dir / "images")
    texts = EmbeddingStore.open(store_dir / "texts")
    if not len(images.valid_rows()):
        raise DataError("no image of the pool could be read", hint="check --images")
    cache_path = _cache_path(store_dir, preprocess)
    pixels: PixelSource
    if cache_path.is_file():
        cache = PixelCache.open(cache_path, len(pool), preprocess, pool.fingerprint)
        pixels = CachedPixels(cache)
    else:
        pixels = DecodedPixels(pool, preprocess, config.data.workers)
    specs = view_specs(config.train)
    stores = tuple(EmbeddingStore.open(_view_dir(store_dir, spec)) for spec in specs)
    is_paired = labelled is not None and config.loss.contrastive_weight > 0
    return DistillData(
        images,
        texts,
        pixels,
        preprocess,
        teacher.logit_scale,
        pairs=class_pairs(labelled, teacher.encode_texts) if labelled and is_paired else None,
        text_rows=load_kept_rows(Path(config.data.text_rows), texts)
        if config.data.text_rows
        else None,
        neighbours=_neighbours(config, images, texts, store_dir),
        views=Views(specs, stores) if specs else None,
    )


def _neighbours(
    config: RunConfig, images: EmbeddingStore, texts: EmbeddingStore, store_dir: Path
) -> NeighbourTable | None:
    if not config.train.hard_negatives:
        return None
    rows = config.data.text_rows
    kept = load_kept_rows(Path(rows), texts) if rows else None
    return open_neighbours(images, texts, store_dir / "neighbours", text_rows=kept)


def _view_dir(store_dir: Path, spec: ViewSpec) -> Path:
    return store_dir / "views" / spec.digest()


def _cache_path(store_dir: Path, preprocess: PreprocessSpec) -> Path:
    return store_dir / f"pixels-{preprocess.digest()}.u8"


def _cache_bytes(pool: ImagePool, preprocess: PreprocessSpec) -> int:
    return len(pool) * preprocess.image_size**2 * 3


def from_anywhere(config: RunConfig) -> RunConfig:
    """With whole paths: a run may be opened from another working directory."""
    data = config.data
    return dataclasses.replace(
        config,
        teacher=absolute_teacher(config.teacher),
        store=config.store and str(Path(config.store).expanduser().absolute()),
        data=dataclasses.replace(
            data,
            images=tuple(map(absolute_source, data.images)),
            texts=tuple(map(absolute_source, data.texts)),
            eval_sets=tuple(map(absolute_source, data.eval_sets)),
            labelled=data.labelled and absolute_source(data.labelled),
            text_rows=data.text_rows and absolute_source(data.text_rows),
        ),
    )
