"""What a run trains on, as its settings ask for it."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest

from dimefm_edge.batches import CachedPixels, DecodedPixels
from dimefm_edge.config import DataConfig, LossConfig, RunConfig, TrainConfig
from dimefm_edge.corpus import build_corpus
from dimefm_edge.data.images import open_labelled
from dimefm_edge.data.sentences import open_sentences
from dimefm_edge.errors import StoreError
from dimefm_edge.prepare import embed_pools, from_anywhere, open_data
from dimefm_edge.teacher import load_teacher


@pytest.fixture
def opened(tiny_teacher_dir, labelled_dir, tmp_path):
    """A function: settings -> the data of that run."""
    teacher = load_teacher(str(tiny_teacher_dir))
    labelled = open_labelled(str(labelled_dir))
    sentences = open_sentences(["scenes:60"])

    def open_run(config: RunConfig, *, image_size: int | None = None):
        preprocess = dataclasses.replace(
            teacher.preprocess, image_size=image_size or teacher.preprocess.image_size
        )
        store_dir = tmp_path / "store"
        embed_pools(config, teacher, labelled.pool, sentences, preprocess, store_dir)
        return open_data(config, teacher, labelled.pool, labelled, preprocess, store_dir)

    open_run.pool = labelled.pool
    open_run.sentences = sentences
    open_run.store_dir = tmp_path / "store"
    return open_run


def test_a_plain_run_has_no_extras(opened):
    data = opened(RunConfig())
    assert data.extras() == {}
    assert (len(data.images), len(data.texts)) == (12, 60)
    assert isinstance(data.pixels, CachedPixels)
    smaller = opened(RunConfig(), image_size=24)
    assert isinstance(smaller.pixels, CachedPixels)
    decoded = DecodedPixels(opened.pool, smaller.preprocess, 1)
    (kept,), (anew,) = (list(pixels([np.arange(12)])) for pixels in (smaller.pixels, decoded))
    assert kept.shape == (12, 24, 24, 3)
    assert np.array_equal(kept, anew)


def test_pairs_and_hard_negatives(opened, labelled_dir):
    config = RunConfig(
        data=DataConfig(labelled=str(labelled_dir)),
        loss=LossConfig(contrastive_weight=1.0),
        train=TrainConfig(hard_negatives=0.5),
    )
    data = opened(config)
    assert set(data.extras()) == {"pairs", "neighbours"}
    assert data.pairs.labels.tolist() == [0] * 4 + [1] * 4 + [2] * 4
    queries = data.images.gather(np.arange(12)).astype(np.float32)
    texts = data.texts.gather(np.arange(60)).astype(np.float32)
    assert data.neighbours.rows[:, 0].tolist() == (queries @ texts.T).argmax(1).tolist()
    assert len(list((opened.store_dir / "neighbours").iterdir())) == 1


def test_rows_of_a_corpus(opened, tmp_path):
    data = opened(RunConfig())
    build_corpus(opened.sentences, data.images, data.texts, tmp_path / "corpus", keep=0.25)
    rows = str(tmp_path / "corpus/kept_rows.npz")
    some = opened(RunConfig(data=DataConfig(text_rows=rows), train=TrainConfig(hard_negatives=0.2)))
    assert 0 < len(some.text_rows) <= 15
    assert np.isin(some.neighbours.rows, some.text_rows).all()
    report = json.loads((tmp_path / "corpus/report.json").read_text())
    assert len(some.text_rows) == report["num_kept"]
    with pytest.raises(StoreError, match=r"is no kept_rows\.npz"):
        opened(RunConfig(data=DataConfig(text_rows=str(tmp_path / "gone.npz"))))


def test_views_are_embedded_once_and_given_to_the_student(opened):
    config = RunConfig(train=TrainConfig(views=2, min_crop=0.4, flip=False))
    data = opened(config)
    folders = sorted((opened.store_dir / "views").iterdir())
    assert len(folders) == len(data.views.specs) == 2
    assert set(data.extras()) == {"views"}
    embeds, crops = data.views.gather(np.arange(12), np.random.default_rng(0))
    whole = data.images.gather(np.arange(12))
    assert not np.array_equal(embeds, whole)
    assert (crops[:, 0, 0] > 0).all()
    begun = [path.stat().st_mtime_ns for path in folders]
    opened(config)
    assert begun == [path.stat().st_mtime_ns for path in folders]


def test_a_run_knows_its_files_from_any_working_directory(tmp_path, monkeypatch):
    for folder in ("pictures", "teacher", "sample"):
        (tmp_path / folder).mkdir()
    for file in ("kept.npz", "clip.pt"):
        (tmp_path / file).touch()
    data = DataConfig(
        images=("pictures", "scenes:5"), texts=("prompts:pictures", "none.txt"),
        eval_sets=("scenes-relations",), text_rows="kept.npz",
    )  # fmt: skip
    monkeypatch.chdir(tmp_path)
    config = from_anywhere(RunConfig(data=data, store="own", teacher="teacher"))
    known = config.data
    assert known.images == (str(tmp_path / "pictures"), "scenes:5")
    assert known.texts == (f"prompts:{tmp_path / 'pictures'}", "none.txt")
    assert known.eval_sets == ("scenes-relations",)
    assert (known.labelled, known.text_rows) == (None, str(tmp_path / "kept.npz"))
    assert (config.teacher, config.store) == (str(tmp_path / "teacher"), str(tmp_path / "own"))
    for teacher, whole in (
        ("sample", "sample"),
        ("hf-hub:teacher", "hf-hub:teacher"),
        ("ViT-B-32:laion2b", "ViT-B-32:laion2b"),
        ("ViT-B-32:clip.pt", f"ViT-B-32:{tmp_path / 'clip.pt'}"),
        ("teacher+ViT-B-32:clip.pt", f"{tmp_path / 'teacher'}+ViT-B-32:{tmp_path / 'clip.pt'}"),
    ):
        assert from_anywhere(RunConfig(teacher=teacher)).teacher == whole
    monkeypatch.chdir("/")
    assert from_anywhere(config) == config


def test_a_folder_with_a_plus_in_its_name_joins_no_teachers(tmp_path, monkeypatch):
    (tmp_path / "a+b" / "teacher").mkdir(parents=True)
    (tmp_path / "a+b" / "clip.pt").touch()
    monkeypatch.chdir(tmp_path / "a+b")
    for teacher, whole in (
        ("teacher", str(tmp_path / "a+b" / "teacher")),
        ("teacher+sample", "teacher+sample"),
        ("ViT-B-32:clip.pt", "ViT-B-32:clip.pt"),
    ):
        assert from_anywhere(RunConfig(teacher=teacher)).teacher == whole
