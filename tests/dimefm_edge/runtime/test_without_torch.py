"""The runtime where torch is not: an import hook in every run, a real environment when slow."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import venv
from pathlib import Path

import pytest

from dimefm_edge.data.scenes import scene_image
from dimefm_edge.runtime import ZeroShotClassifier

ROOT = Path(__file__).parents[3]
CLASSIFY = """
import json, sys
from PIL import Image
from dimefm_edge.runtime import ZeroShotClassifier
classifier = ZeroShotClassifier(sys.argv[1], threads=1)
ranked = classifier.classify([Image.open(sys.argv[2])], top_k=2)
import dimefm_edge.labels, dimefm_edge.latency.measure, dimefm_edge.manifest
heavy = {"torch", "torchvision", "timm", "open_clip", "onnx", "matplotlib", "gradio", "triton"}
print(json.dumps({"ranked": ranked[0], "heavy": sorted(heavy & set(sys.modules))}))
"""
FORBID = """
import sys
class Forbid:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in %r:
            raise ModuleNotFoundError(f"No module named {name!r} (forbidden by the test)")
sys.meta_path.insert(0, Forbid())
"""
TRAINING_PACKAGES = (
    "torch", "torchvision", "timm", "open_clip", "onnx", "onnxscript", "safetensors",
    "pyarrow", "webdataset", "tensorboard", "psutil", "rich", "tyro", "tokenizers",
)  # fmt: skip


def classify(python: str | Path, code: str, bundle: Path, image: Path) -> dict[str, object]:
    done = subprocess.run(
        [str(python), "-c", code, str(bundle), str(image)],
        capture_output=True, text=True, timeout=120, cwd=ROOT,
        env={k: v for k, v in os.environ.items() if k != "PYTHONPATH"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    answer: dict[str, object] = json.loads(done.stdout)
    return answer


@pytest.fixture
def image_path(tmp_path: Path) -> Path:
    path = tmp_path / "photo.png"
    scene_image(2).save(path)
    return path


def expected_answer(bundle: Path) -> list[tuple[str, object]]:
    (ranked,) = ZeroShotClassifier(bundle, threads=1).classify([scene_image(2)], top_k=2)
    assert ranked[0][0] == "image 2"
    return [(name, pytest.approx(share, abs=1e-4)) for name, share in ranked]


def test_runs_where_importing_torch_fails(exported_bundle: Path, image_path: Path) -> None:
    forbid = FORBID % (TRAINING_PACKAGES,)
    code = forbid + CLASSIFY
    answer = classify(sys.executable, code, exported_bundle, image_path)
    assert answer["heavy"] == []
    assert answer["ranked"] == [list(pair) for pair in expected_answer(exported_bundle)]
    with pytest.raises(AssertionError, match="No module named 'torch' \\(forbidden by the test"):
        classify(sys.executable, forbid + "import torch", exported_bundle, image_path)


@pytest.mark.slow
def test_runs_in_an_environment_that_has_only_three_packages(
    exported_bundle: Path, image_path: Path, tmp_path: Path
) -> None:
    venv.create(tmp_path / "venv", with_pip=True)
    python = tmp_path / "venv" / "bin" / "python"
    installed = subprocess.run(
        [str(python), "-m", "pip", "install", "--quiet", "numpy", "pillow", "onnxruntime"],
        capture_output=True, text=True, timeout=600,
    )  # fmt: skip
    if installed.returncode:
        pytest.skip(f"pip cannot reach a package index: {installed.stderr[-200:]}")
    absent = subprocess.run([str(python), "-c", "import torch"], capture_output=True, text=True)
    assert "No module named 'torch'" in absent.stderr
    answer = classify(python, CLASSIFY, exported_bundle, image_path)
    assert answer["ranked"] == [list(pair) for pair in expected_answer(exported_bundle)]
