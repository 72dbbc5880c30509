"""A tiny teacher, a run of it and the run's bundle: real files, made once a session."""

from __future__ import annotations

import ctypes
import dataclasses
import importlib.util
import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

SURFACE_DIR = Path(__file__).with_name("tensorrt_surface")

TINY_CLIP: dict[str, Any] = {
    "embed_dim": 16,
    "vision_cfg": {"image_size": 32, "patch_size": 16, "width": 32, "layers": 2, "head_width": 16},
    "text_cfg": {"context_length": 12, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1},
}


@pytest.fixture(autouse=True)
def _subnormal_floats() -> None:
    """Loading a teacher or an engine turns them off for the thread; hypothesis needs them."""
    if "torch" in sys.modules:
        sys.modules["torch"].set_flush_denormal(False)


@pytest.fixture(scope="module")
def short_timing() -> Iterator[None]:
    """Models are timed in a twentieth of the time, for tests that compare no times."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("dimefm_edge.latency.measure._BLOCK_S", 0.005)
        patch.setattr("dimefm_edge.latency.settle._BLOCK_S", 0.002)
        patch.setattr("dimefm_edge.latency.settle._PAUSE_S", 0.0)
        yield


@pytest.fixture(scope="session")
def tiny_teacher_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An open_clip folder with random weights."""
    import open_clip
    import torch
    from safetensors.torch import save_file

    folder = tmp_path_factory.mktemp("tiny_teacher")
    torch.manual_seed(0)
    settings = {"model_cfg": TINY_CLIP, "preprocess_cfg": {}}
    (folder / "open_clip_config.json").write_text(json.dumps(settings))
    save_file(open_clip.CLIP(**TINY_CLIP).state_dict(), folder / "open_clip_model.safetensors")
    return folder


@pytest.fixture(scope="session")
def labelled_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A class-folder tree: three classes of four images."""
    from dimefm_edge.data.scenes import scene_image

    folder = tmp_path_factory.mktemp("labelled")
    for label, name in enumerate(("cat", "dog", "eel")):
        (folder / name).mkdir()
        for i in range(4):
            scene_image(4 * label + i).save(folder / name / f"{i}.png")
    return folder


@pytest.fixture(scope="session")
def tiny_run_dir(
    tmp_path_factory: pytest.TempPathFactory, tiny_teacher_dir: Path, labelled_dir: Path
) -> Path:
    """What `distill` leaves, but for the training: checkpoint and config.toml."""
    import torch

    from dimefm_edge.config import DataConfig, RunConfig, save
    from dimefm_edge.students import build_student, save_student, vit_spec
    from dimefm_edge.teacher import TEXT_TEACHER_KEY, load_teacher

    folder = tmp_path_factory.mktemp("tiny_run")
    teacher = load_teacher(str(tiny_teacher_dir))
    torch.manual_seed(1)
    spec = vit_spec(image_size=32, embed_dim=16, patch_size=16, width=32, depth=1, num_heads=1)
    preprocess = dataclasses.replace(teacher.preprocess, image_size=32)
    metadata = {
        TEXT_TEACHER_KEY: str(tiny_teacher_dir),
        "logit_scale": repr(teacher.logit_scale),
        "target": "jetson-orin",
    }
    save_student(folder / "checkpoint.safetensors", build_student(spec), spec, preprocess, metadata)
    data = DataConfig(images=(str(labelled_dir),), eval_sets=(str(labelled_dir),))
    save(RunConfig(teacher=str(tiny_teacher_dir), out=str(folder), data=data),
         folder / "config.toml")  # fmt: skip
    return folder


@pytest.fixture(scope="session")
def tiny_bundle_dir(tmp_path_factory: pytest.TempPathFactory, tiny_run_dir: Path) -> Path:
    """The run's bundle, with the label bank of `labelled_dir`'s classes."""
    from dimefm_edge.data.scenes import scene_image
    from dimefm_edge.export import export_student
    from dimefm_edge.labels import build_label_bank
    from dimefm_edge.preprocess import preprocess_images
    from dimefm_edge.students import load_student
    from dimefm_edge.subjects import load_subject

    loaded = load_student(tiny_run_dir)
    subject = load_subject(tiny_run_dir)
    assert subject.encode_texts is not None
    bank = build_label_bank(
        "pets", ("cat", "dog", "eel"), ("a photo of a {c}.",), subject.encode_texts
    )
    images = preprocess_images([scene_image(i) for i in range(4)], loaded.preprocess)
    return export_student(
        loaded,
        tmp_path_factory.mktemp("tiny_bundle") / "bundle",
        label_banks=[bank],
        parity_images=images,
        logit_scale=subject.logit_scale,
    )


@pytest.fixture(scope="session")
def tiny_open_bundle_dir(tmp_path_factory: pytest.TempPathFactory, tiny_teacher_dir: Path) -> Path:
    """The tiny teacher's own bundle, with its text side and no label sets. Do not change it."""
    from dimefm_edge.data.scenes import scene_image
    from dimefm_edge.export import export_student, image_tower
    from dimefm_edge.preprocess import preprocess_images
    from dimefm_edge.teacher import load_teacher

    teacher = load_teacher(str(tiny_teacher_dir))
    images = preprocess_images([scene_image(i) for i in range(4)], teacher.preprocess)
    return export_student(
        image_tower(teacher),
        tmp_path_factory.mktemp("tiny_open_bundle") / "bundle",
        parity_images=images,
        logit_scale=teacher.logit_scale,
        text_teacher=teacher,
        parity_sentences=["a cat on a mat", "two dogs", "an eel in the sea"],
    )


# ------------------------------------------------- TensorRT by its recorded surface


def _load_by_path(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def fake_driver_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The stand-in for NVIDIA's driver library, compiled."""
    compiler = shutil.which("gcc") or shutil.which("cc")
    if compiler is None:
        pytest.skip("no C compiler for the stand-in of NVIDIA's driver")
    path = tmp_path_factory.mktemp("driver") / "libfakecuda.so"
    source = str(SURFACE_DIR / "cuda.c")
    subprocess.run([compiler, "-shared", "-fPIC", "-Wall", "-Werror", "-o", str(path), source],
                   check=True)  # fmt: skip
    return path


@pytest.fixture
def fake_driver(fake_driver_path: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """A driver of its own for each test, which `Cuda` finds; there is no GPU."""
    own = Path(shutil.copy(fake_driver_path, tmp_path / "libfakecuda.so"))
    monkeypatch.setattr("dimefm_edge.runtime.cuda._LIBRARIES", (str(own),))
    return ctypes.CDLL(str(own))


@pytest.fixture
def fake_tensorrt(
    fake_driver: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> Callable[[str], Any]:
    """Put the recorded surface of a TensorRT version in place of `tensorrt`; gives its double."""
    surface = _load_by_path(SURFACE_DIR / "surface.py")
    double_module = _load_by_path(SURFACE_DIR / "double.py")
    plugin_module = _load_by_path(SURFACE_DIR / "plugin.py")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))

    def choose(version: str) -> Any:
        double = double_module.Double(fake_driver)
        double.trt = surface.make_module(version, double)
        monkeypatch.setitem(sys.modules, "tensorrt", double.trt)
        double.plugin = plugin_module.make_plugin_module(surface.load_record(version)["plugin"])
        double.trt.__path__ = []  # it is a package
        # None: as if it could not be imported.
        monkeypatch.setitem(sys.modules, "tensorrt.plugin", double.plugin)
        if double.plugin is not None:
            double.trt.plugin = double.plugin
        return double

    return choose
