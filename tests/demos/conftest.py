"""The sample teacher as bundles, and the page that shows them: real files, a real server."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from dimefm_demo.model_specs import find_models
from dimefm_demo.models import Models

ROOT = Path(__file__).parents[2]
_START_S = 120


@pytest.fixture(scope="session")
def sample_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The sample teacher's bundle with its text side and `scenes`; one for all workers."""
    from dimefm_edge.commands.exporting import run_export
    from dimefm_edge.options import ExportOptions

    base = tmp_path_factory.getbasetemp()
    shared = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base
    out = shared / "sample"
    try:
        (shared / "sample.begun").mkdir()
    except FileExistsError:  # another worker makes it
        deadline = time.monotonic() + _START_S
        while not (out / "manifest.json").is_file():
            assert time.monotonic() < deadline, "the worker that exports the sample has failed"
            time.sleep(0.2)
        return out
    sentences = ("scenes:8",)
    run_export(ExportOptions(teacher="sample", labels=("scenes",), out=out, sentences=sentences))
    return out


@pytest.fixture(scope="session")
def baked_dir(sample_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same without its text side: it knows `scenes` only."""
    out = Path(shutil.copytree(sample_dir, tmp_path_factory.mktemp("baked") / "baked"))
    manifest = json.loads((out / "manifest.json").read_text())
    del manifest["text"]
    for name in ("text.onnx", "tokenizer.json"):
        del manifest["files"][name]
        (out / name).unlink()
    (out / "manifest.json").write_text(json.dumps(manifest))
    return out


@pytest.fixture(scope="session")
def demo_url(
    sample_dir: Path, baked_dir: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[str]:
    """`dimefm-edge demo` with both bundles, started as a user does."""
    folder = tmp_path_factory.mktemp("demo")
    with started_demo([str(sample_dir), str(baked_dir)], folder) as url:
        yield url


class started_demo:  # noqa: N801 (read as a context manager)
    """The command in a process of its own; on leaving, SIGTERM, as systemd and docker do."""

    def __init__(self, words: list[str], folder: Path) -> None:
        self._words, self._folder = words, folder
        self.temporary = folder / "tmp"

    def __enter__(self) -> str:
        self.temporary.mkdir()
        self._log = self._folder / "stderr.txt"
        environment = {
            **os.environ, "TMPDIR": str(self.temporary), "OMP_NUM_THREADS": "1",
            "XDG_CACHE_HOME": str(self._folder / "cache"), "HF_HUB_OFFLINE": "1",
            "PYTHONPATH": os.pathsep.join(str(ROOT / p) for p in (".", "kernels", "demos")),
        }  # fmt: skip
        self.process = subprocess.Popen(
            [sys.executable, "-m", "dimefm_edge", "demo", *self._words], env=environment,
            cwd=self._folder, stderr=self._log.open("w"), stdout=subprocess.DEVNULL,
        )  # fmt: skip
        deadline = time.monotonic() + _START_S
        while "http://" not in (said := self._log.read_text()):
            assert self.process.poll() is None, said
            assert time.monotonic() < deadline, said
            time.sleep(0.1)
        url = "http://" + said.split("http://", 1)[1].split()[0]
        urllib.request.urlopen(url, timeout=10).close()
        return url

    def __exit__(self, *exc: object) -> None:
        self.process.send_signal(signal.SIGTERM)
        self.process.wait(timeout=30)


@pytest.fixture(scope="session")
def models(sample_dir: Path, baked_dir: Path) -> Models:
    """Both bundles, loaded in this process."""
    loaded = Models(find_models([str(sample_dir), str(baked_dir)], engines=["onnxruntime"]))
    loaded.load_behind()
    for name in loaded.names:
        loaded.wait_for(name)
    return loaded
