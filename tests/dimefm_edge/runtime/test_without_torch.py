"""What a device installs is enough: a real environment with the base dependencies only.

A fresh venv sees our package and the distributions that pyproject.toml names outside its
extras, with what those require, as links: nothing is downloaded, and torch is truly absent.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import venv
from importlib.metadata import distribution
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from packaging.requirements import Requirement

from dimefm_edge.data.scenes import scene_image
from dimefm_edge.runtime import ZeroShotClassifier
from dimefm_edge.teacher import load_teacher

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).parents[3]
LOOK = """
import importlib.util, json, sys
names = sys.argv[1:]
found = [name for name in names if importlib.util.find_spec(name) is not None]
print(json.dumps({"found": found, "path": sys.path, "prefix": sys.prefix}))
"""
CLASSIFY = """
import json, sys
from dimefm_edge.runtime import ZeroShotClassifier
classifier = ZeroShotClassifier(sys.argv[1], threads=1)
(ranked,) = classifier.classify([sys.argv[2]], top_k=2)
print(json.dumps(ranked))
"""
OPEN_VOCABULARY = """
import json, sys
from PIL import Image
from dimefm_edge.runtime import ZeroShotClassifier, load_bundle, load_text_encoder
bundle, image, *labels = sys.argv[1:]
classifier = ZeroShotClassifier(bundle, labels=labels, threads=1)
(ranked,) = classifier.classify([Image.open(image)])
embeds = load_text_encoder(load_bundle(bundle), threads=1).encode_texts(labels)
print(json.dumps({"ranked": ranked, "embeds": embeds.tolist()}))
"""
ABSENT = (
    "torch", "torchvision", "timm", "open_clip", "onnx", "onnxscript", "safetensors", "pyarrow",
    "tensorboard", "matplotlib", "triton", "tensorrt", "gradio", "pytest",
)  # fmt: skip


def base_distributions() -> list[str]:
    """What `pip install dimefm_edge` brings, by name, as the environment of this test has it."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    pending = [(Requirement(text), "") for text in project["dependencies"]]
    seen: set[tuple[str, str]] = set()
    while pending:
        requirement, extra = pending.pop()
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": extra}):
            continue
        for wanted in ("", *requirement.extras):
            if (requirement.name, wanted) not in seen:
                seen.add((requirement.name, wanted))
                needs = distribution(requirement.name).requires or ()
                pending += [(Requirement(text), wanted) for text in needs]
    return sorted({name for name, _ in seen})


@pytest.fixture(scope="module")
def python(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The interpreter of an environment without torch."""
    folder = tmp_path_factory.mktemp("base")
    venv.create(folder / "venv", symlinks=True)
    shelf = folder / "shelf"
    shelf.mkdir()
    for package in (ROOT / "dimefm_edge", ROOT / "kernels" / "dimefm_kernels"):
        (shelf / package.name).symlink_to(package)
    for name in base_distributions():
        found = distribution(name)
        tops = {file.parts[0] for file in found.files or ()} - {"..", "__pycache__", "bin"}
        for top in tops:
            link = shelf / top
            if not link.exists():
                link.symlink_to(Path(str(found.locate_file(top))))
    (site,) = (folder / "venv").glob("lib/python3*/site-packages")
    (site / "base.pth").write_text(f"{shelf}\n")
    return folder / "venv" / "bin" / "python"


def run(python: Path, *words: object, cwd: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [str(python), *map(str, words)], capture_output=True, text=True, timeout=120, cwd=cwd,
        env={k: v for k, v in os.environ.items() if not k.startswith("PYTHON")},
    )  # fmt: skip


def command(python: Path, *words: object, cwd: Path, code: int = 0) -> dict[str, Any]:
    done = run(python, "-m", "dimefm_edge", *words, "--json", cwd=cwd)
    assert done.returncode == code, done.stderr
    assert "Traceback" not in done.stderr
    answer: dict[str, Any] = json.loads(done.stdout)
    return answer


def test_the_environment_truly_lacks_torch(python: Path, tmp_path: Path) -> None:
    done = run(python, "-c", LOOK, *ABSENT, "dimefm_edge", "onnxruntime", cwd=tmp_path)
    answer = json.loads(done.stdout)
    assert answer["found"] == ["dimefm_edge", "onnxruntime"]
    assert Path(answer["prefix"]) == python.parents[1]
    packages = [place for place in answer["path"] if Path(place).name == "site-packages"]
    assert all(Path(place).is_relative_to(python.parents[1]) for place in packages)
    assert "No module named 'torch'" in run(python, "-c", "import torch", cwd=tmp_path).stderr


def test_the_plugin_of_the_kernels_needs_neither_torch_nor_triton(
    python: Path, tmp_path: Path
) -> None:
    look = "from dimefm_kernels.tensorrt_plugin import register_plugin; register_plugin()"
    said = run(python, "-c", look, cwd=tmp_path).stderr
    assert said.splitlines()[-1] == "ModuleNotFoundError: No module named 'tensorrt'"


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_a_bundle_classifies_there_as_it_does_here(
    python: Path, precision: str, exported_bundles: dict[str, Path], tmp_path: Path
) -> None:
    scene_image(2).save(tmp_path / "photo.png")
    bundle = exported_bundles[precision]
    done = run(python, "-c", CLASSIFY, bundle, tmp_path / "photo.png", cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    (here,) = ZeroShotClassifier(bundle, threads=1).classify([scene_image(2)], top_k=2)
    assert here[0][0] == "image 2"
    assert json.loads(done.stdout) == [[name, pytest.approx(p, abs=1e-4)] for name, p in here]


def test_any_labels_there_as_here(
    python: Path, tiny_open_bundle_dir: Path, tiny_teacher_dir: Path, tmp_path: Path
) -> None:
    scene_image(2).save(tmp_path / "photo.png")
    labels = ["a red circle", "Two “dogs” &amp; a café", "日本語"]
    words = (tiny_open_bundle_dir, tmp_path / "photo.png", *labels)
    done = run(python, "-c", OPEN_VOCABULARY, *words, cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    answer = json.loads(done.stdout)
    wanted = load_teacher(str(tiny_teacher_dir)).encode_texts(labels)
    np.testing.assert_allclose(answer["embeds"], wanted, atol=1e-5)
    classifier = ZeroShotClassifier(tiny_open_bundle_dir, labels=labels, threads=1)
    (here,) = classifier.classify([scene_image(2)])
    assert answer["ranked"] == [[name, pytest.approx(p, abs=1e-4)] for name, p in here]


def test_eval_of_a_new_set_by_the_text_side(
    python: Path, tiny_open_bundle_dir: Path, labelled_dir: Path, tmp_path: Path
) -> None:
    words = ("eval", tiny_open_bundle_dir, "--data", labelled_dir)
    (result,) = command(python, *words, cwd=tmp_path)["results"]
    assert (result["num_images"], result["num_classes"], result["num_bad"]) == (12, 3, 0)


def test_eval_and_bench_of_a_bundle(
    python: Path, tiny_bundle_dir: Path, labelled_dir: Path, tmp_path: Path
) -> None:
    values = command(python, "eval", tiny_bundle_dir, "--data", labelled_dir, cwd=tmp_path)
    assert values["kind"] == "bundle"
    (result,) = values["results"]
    assert (result["num_images"], result["num_classes"], result["num_bad"]) == (12, 3, 0)
    words = ("bench", tiny_bundle_dir, tiny_bundle_dir / "model.onnx", "--seconds", "0.05")
    models = command(python, *words, cwd=tmp_path)["subjects"]
    assert [model["runtime"] for model in models] == ["ONNX Runtime"] * 2
    assert all(model["p50_ms"] > 0 and model["memory_mib"] > 0 for model in models)


def test_doctor_says_what_is_missing_for_training(python: Path, tmp_path: Path) -> None:
    values = command(python, "doctor", cwd=tmp_path)
    checks = {check["name"]: check for check in values["checks"]}
    assert values["ok"]
    assert checks["ONNX Runtime"]["status"] == "ok"
    assert checks["torch"]["status"] == "missing"
    assert checks["torch"]["mend"] == "pip install 'dimefm_edge[train]'"


@pytest.mark.parametrize(
    "words",
    [
        ("distill", "--out", "run"),
        ("embed", "--store", "store", "--images", "scenes:8"),
        ("eval", "sample", "--data", "scenes"),
        ("bench", "sample"),
    ],
    ids=lambda words: words[0],
)
def test_what_needs_torch_says_in_one_line_what_to_install(
    words: tuple[str, ...], python: Path, tmp_path: Path
) -> None:
    done = run(python, "-m", "dimefm_edge", *words, cwd=tmp_path)
    assert done.returncode == 1
    assert done.stdout == ""
    error, hint = done.stderr.splitlines()
    assert error == "error: this needs torch, which is not installed"
    assert hint == "  try: pip install 'dimefm_edge[train]'"
    assert not list(tmp_path.iterdir())
