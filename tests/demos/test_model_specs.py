"""What the user names, and what the page then shows."""

from __future__ import annotations

import shutil

import pytest

from dimefm_demo.model_specs import SAMPLE, find_models
from dimefm_edge.config import RunConfig, save
from dimefm_edge.errors import InputError, MissingExtraError

ORT = ["onnxruntime"]


def shown(names, engines=ORT):
    return [(s.name, s.kind, s.engine, s.teaches) for s in find_models(names, engines=engines)]


@pytest.fixture
def run_dir(tmp_path, sample_dir, baked_dir):
    """A run's folder as `distill` and `export --precision int8` leave it, but for the weights."""
    folder = tmp_path / "runs" / "first"
    folder.mkdir(parents=True)
    (folder / "checkpoint.safetensors").write_bytes(b"")
    save(RunConfig(teacher=SAMPLE, out=str(folder)), folder / "config.toml")
    shutil.copytree(baked_dir, folder / "bundle")
    shutil.copytree(sample_dir, folder / "bundle-int8")
    path = folder / "bundle-int8" / "manifest.json"
    path.write_text(path.read_text().replace('"precision": "fp32"', '"precision": "int8"'))
    return folder


def test_a_run_brings_its_teacher_and_all_of_its_bundles(run_dir):
    wanted = [
        ("teacher sample", "sample", "onnxruntime", "sample"),
        ("student fp32", "bundle", "onnxruntime", ""),
        ("student int8", "bundle", "onnxruntime", ""),
    ]
    assert shown([str(run_dir)]) == wanted
    assert shown([str(run_dir / "checkpoint.safetensors")]) == wanted


def test_each_engine_shows_each_bundle(baked_dir):
    engines = ["onnxruntime", "tensorrt", "a/b.engine"]
    names = [name for name, *_ in shown([str(baked_dir)], engines)]
    assert names == ["baked", "baked tensorrt", "baked b"]


def test_without_a_name_the_first_run_else_the_sample(run_dir, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert shown([])[1] == ("student fp32", "bundle", "onnxruntime", "")
    shutil.rmtree(tmp_path / "runs")
    assert shown([]) == [
        ("sample fp32", "sample", "onnxruntime", "sample"),
        ("sample int8", "sample", "onnxruntime", ""),
    ]


def test_equal_names_are_told_apart(baked_dir):
    assert [name for name, *_ in shown([str(baked_dir)] * 3)] == ["baked", "baked (2)", "baked (3)"]


def test_teachers_need_torch(monkeypatch):
    assert shown(["ViT-B-32:random"]) == [
        ("ViT-B-32:random", "subject", "onnxruntime", "ViT-B-32:random")
    ]
    monkeypatch.setattr("dimefm_demo.model_specs.find_spec", lambda name: None)
    with pytest.raises(MissingExtraError, match="teacher ViT-B-32:random needs torch"):
        find_models(["ViT-B-32:random"], engines=ORT)


def test_wrong_names_say_what_to_name(tmp_path):
    with pytest.raises(InputError, match=r"there is nothing at ./nowhere\n  try: name a run"):
        find_models(["./nowhere"], engines=ORT)
    with pytest.raises(InputError, match=r"is a graph alone.*\n  try: name the bundle"):
        find_models(["model.onnx"], engines=ORT)
