"""The data of every study in studies.py: one teacher, its stores, pixels, pairs, test sets.

Everything is made once and kept in `out/DATA`; processes of one command wait for each other.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import fcntl
import functools
import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from dimefm_edge.batches import CachedPixels, DistillData
from dimefm_edge.config import TrainConfig
from dimefm_edge.corpus import ROWS_FILE, build_corpus, load_kept_rows
from dimefm_edge.data import scenes
from dimefm_edge.data.images import (
    ImagePool,
    LabelledSet,
    PixelCache,
    open_images,
    open_labelled,
)
from dimefm_edge.data.neighbours import open_neighbours
from dimefm_edge.data.pairs import Pairs, class_pairs
from dimefm_edge.data.pixel_cache import DecodedPool
from dimefm_edge.data.sentences import class_prompts, open_sentences
from dimefm_edge.data.store import EmbeddingStore
from dimefm_edge.data.views import Views
from dimefm_edge.embed import Encoder, embed_images, embed_texts, fill_cache
from dimefm_edge.judge import Scorer
from dimefm_edge.labels import build_label_bank
from dimefm_edge.prepare import view_specs
from dimefm_edge.preprocess import PreprocessSpec
from dimefm_edge.teacher import Teacher, load_teacher

if __package__:
    from benchmarks import real_teacher
    from benchmarks.study_arms import Arm
else:
    import real_teacher
    from study_arms import Arm


@dataclass(frozen=True)
class Setup:
    """What differs between scenes and real images."""

    student: str
    image_size: int
    train: TrainConfig
    eval_sets: tuple[str, ...]
    images: str
    texts: str


def setup_of(args: argparse.Namespace) -> Setup:
    root = args.data_dir
    common = TrainConfig(
        batch_size=128, text_batch_size=512, lr=2e-3, ema_decay=0.995, threads=args.threads
    )
    if args.data == "scenes":
        train = dataclasses.replace(common, min_crop=0.9, flip=False, steps=args.steps or 800)
        count = "" if args.limit is None else f":{args.limit}"
        return Setup(
            "vit-nano", 64, train, ("scenes",), f"scenes{count}", f"scenes{count}"
        )  # fmt: skip
    train = dataclasses.replace(common, min_crop=0.35, flip=True, steps=args.steps or 1500)
    sets = tuple(str(root / "zeroshot" / name) for name in real_teacher.SETS)
    return Setup(
        "timm:resnet10t", 32, train, sets, str(root / "images/*.tar"), str(root / "text/*.gz")
    )


@contextlib.contextmanager
def locked(path: Path, *, wait: bool = True) -> Iterator[bool]:
    """Hold a file's lock; False where another process has it and we do not wait."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            yield False
            return
        yield True


def run_key(settings: dict[str, Any]) -> str:
    """The name of a run's folder: what it was trained with, as JSON values."""
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:12]


class Remembers:
    """A teacher that looks up the sentences that it was asked before."""

    def __init__(self, teacher: Teacher, sentences: Iterable[str], store: EmbeddingStore) -> None:
        self.teacher, self.sentences, self.store = teacher, sentences, store

    @functools.cached_property
    def row(self) -> dict[str, int]:
        """Read when first asked for: what is embedded already needs none."""
        return {sentence: row for row, sentence in enumerate(self.sentences)}

    def __getattr__(self, name: str) -> Any:
        return getattr(self.teacher, name)

    def encode_texts(self, sentences: Sequence[str]) -> npt.NDArray[np.float32]:
        """As the teacher does; of what it knows as the store has it, in fp16."""
        embeds = np.empty((len(sentences), self.store.embed_dim), np.float32)
        new = [i for i, sentence in enumerate(sentences) if sentence not in self.row]
        known = [i for i, sentence in enumerate(sentences) if sentence in self.row]
        if new:
            embeds[new] = self.teacher.encode_texts([sentences[i] for i in new])
        embeds[known] = self.store.gather(np.array([self.row[sentences[i]] for i in known], int))
        return embeds


class StudyData:
    """The data that all arms share, made once and kept in `out/DATA`."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args, self.setup = args, setup_of(args)
        self.out: Path = args.out / args.data
        if args.threads:
            torch.set_num_threads(args.threads)
        self.teacher = self._teacher()
        sets = [open_labelled(source) for source in self.setup.eval_sets]
        banks = [
            build_label_bank(s.name, s.classnames, s.templates, self.teacher.encode_texts)
            for s in sets
        ]
        self.evaluate = Scorer(sets, banks, self.teacher.preprocess)

    def image_size(self, arm: Arm) -> int:
        return arm.image_size or self.setup.image_size

    def preprocess(self, arm: Arm) -> PreprocessSpec:
        return dataclasses.replace(self.teacher.preprocess, image_size=self.image_size(arm))

    def _teacher(self) -> Teacher:
        if self.args.data == "scenes":
            return load_teacher(self.args.teacher or "sample")
        folders = str(self.args.teacher or self.args.out / "teacher")
        for folder in map(Path, folders.split("+")):
            with locked(folder.parent / f".{folder.name}.lock"):
                real_teacher.studies_teacher(folder, self.args.data_dir)
        return load_teacher(folders)

    @functools.cache  # noqa: B019
    def data(self, images: str, preprocess: PreprocessSpec) -> DistillData:
        """Stores and pixels of one pool of images, and pairs where it has any."""
        teacher, store_dir = self.teacher, self.store_dir
        pool, pairs = self._pool(images)
        with locked(self.out / ".texts.lock"):
            texts = embed_texts(teacher, open_sentences([self.setup.texts]), store_dir / "texts")
        with locked(self.out / f".{images}.lock"):
            store = embed_images(teacher, pool, store_dir / images)
            cache = self._pixels(images, pool, preprocess, store)
        return DistillData(
            store, texts, CachedPixels(cache), preprocess, teacher.logit_scale, pairs
        )

    def _pixels(
        self, images: str, pool: ImagePool, preprocess: PreprocessSpec, store: EmbeddingStore
    ) -> PixelCache:
        path = self.store_dir / f"{images}-{preprocess.digest()}.u8"
        cache = PixelCache.create(path, len(pool), preprocess, pool.fingerprint)
        if not cache.is_complete:
            fill_cache(cache, pool, preprocess, [range(len(pool))], store.manifest.bad_rows)
        return cache

    @property
    def store_dir(self) -> Path:
        return self.out / "store" / self.teacher.weights_hash

    def _pool(self, images: str) -> tuple[ImagePool, Pairs | None]:
        if images == "unlabelled":
            return open_images([self.setup.images]), None
        if images == "both":
            labelled = str(self.args.data_dir / "teacher/*-labeled-*.tar")
            return open_images([self.setup.images, labelled]), None
        if self.args.data == "scenes":
            pool = open_images([self.setup.images])
            rng = np.random.default_rng(0)
            drawn = [scenes.scene_pair(row)[1] for row in range(len(pool))]
            sentences = [scenes.describe(scene, rng) for scene in drawn for _ in range(2)]
            embeds = self.teacher.encode_texts(sentences).reshape(len(pool), 2, -1)
            return pool, Pairs(np.arange(len(pool)), embeds)
        labelled = open_labelled(str(self.args.data_dir / "teacher/*-labeled-*.tar"))
        own_name = own_names(self.args.data_dir)
        labelled = dataclasses.replace(
            labelled,
            classnames=tuple(own_name[folder] for folder in labelled.classnames),
            templates=tuple(frame.replace("{}", "{c}") for frame in real_teacher.FRAMES),
        )
        return labelled.pool, class_pairs(labelled, self.teacher.encode_texts)

    def arm_data(self, arm: Arm, train: TrainConfig) -> DistillData:
        """An arm's share of the data; a smaller share is part of a larger one."""
        data, folder = self.data(arm.images, self.preprocess(arm)), self.store_dir
        with locked(self.out / f".{arm.images}.lock"):
            if arm.texts in ("prompts", "beside"):
                data = dataclasses.replace(data, texts=self._prompted(arm.texts))
            rows = {}
            if arm.image_share < 1:
                rows["image_rows"] = any_share(len(data.images), arm.image_share)
            if arm.texts == "grounded":
                rows["text_rows"] = self._grounded(data, arm.text_share)
            elif arm.text_share < 1:
                rows["text_rows"] = any_share(len(data.texts), arm.text_share)
            data = dataclasses.replace(data, **rows)
            if train.hard_negatives:
                table = open_neighbours(
                    data.images, data.texts, folder / "neighbours", text_rows=data.text_rows
                )
                data = dataclasses.replace(data, neighbours=table)
            specs = view_specs(train)
            if specs:
                pool, _ = self._pool(arm.images)
                cache = self._pixels(arm.images, pool, self.teacher.preprocess, data.images)
                decoded = DecodedPool(pool, cache, dict(data.images.manifest.bad_rows))
                stores = tuple(
                    embed_images(
                        self.teacher, decoded, folder / f"{arm.images}-view-{s.digest()}", view=s
                    )
                    for s in specs
                )
                data = dataclasses.replace(data, views=Views(specs, stores))
        return data

    def _grounded(self, data: DistillData, share: float) -> np.ndarray:
        folder = self.store_dir / "corpus" / f"{share:g}"
        if not (folder / ROWS_FILE).is_file():
            sentences = open_sentences([self.setup.texts])
            build_corpus(sentences, data.images, data.texts, folder, keep=share)
        return load_kept_rows(folder / ROWS_FILE, data.texts)

    def _prompted(self, which: str) -> EmbeddingStore:
        """Sentences about the test sets' classes, alone or beside all others."""
        path = self.store_dir / "prompts.txt"
        path.parent.mkdir(parents=True, exist_ok=True)
        sets = self.evaluate.eval_sets
        lines = [line for s in sets for line in class_prompts(s.classnames, s.templates)]
        sources = [str(path), *([self.setup.texts] if which == "beside" else [])]
        teacher: Encoder = self.teacher
        if which == "beside":
            texts = EmbeddingStore.open(self.store_dir / "texts")
            teacher = Remembers(self.teacher, open_sentences([self.setup.texts]), texts)
        with locked(self.out / ".texts.lock"):
            path.write_text("\n".join(lines) + "\n", encoding="utf-8")
            return embed_texts(teacher, open_sentences(sources), self.store_dir / which)

    @functools.cache  # noqa: B019
    def probe_sets(self) -> list[LabelledSet]:
        """The labelled images of each test set's classes, numbered as there."""
        if self.args.data == "scenes":
            return [open_labelled("scenes-train")]
        own_name = own_names(self.args.data_dir)
        found = []
        for test in self.evaluate.eval_sets:
            source = self.args.data_dir / f"teacher/{test.name}-labeled-*.tar"
            train = open_labelled(str(source))
            number = [test.classnames.index(own_name[folder]) for folder in train.classnames]
            labels = np.asarray(number)[train.labels]
            found.append(dataclasses.replace(train, classnames=test.classnames, labels=labels))
        return found


def own_names(data_dir: Path) -> dict[str, str]:
    """The first name of every class, by its folder."""
    classes = real_teacher.Classes.read(data_dir)
    return {folder: names[0] for folder, names in zip(classes.folders, classes.names, strict=True)}


def any_share(count: int, share: float) -> np.ndarray:
    """Rows by chance, ascending; a smaller share is part of a larger one."""
    return np.sort(np.random.default_rng(0).permutation(count)[: round(share * count)])
