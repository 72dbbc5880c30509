"""The AOTInductor engine: what it refuses. What it runs is in export/test_aot_inductor.py."""

from __future__ import annotations

import json
import sys

import pytest

torch = pytest.importorskip("torch")

from dimefm_edge.errors import CheckpointError, MissingExtraError  # noqa: E402
from dimefm_edge.manifest import (  # noqa: E402
    MANIFEST_FILE,
    PT2_BUILD_FILE,
    PT2_FILE,
    native_build,
    sha256_of,
)
from dimefm_edge.runtime import load_bundle, load_engine  # noqa: E402


def _with_package(folder, build, *, is_listed=True):
    """A bundle that says so, whose package is no package."""
    (folder / PT2_FILE).write_bytes(b"not native code")
    text = build if isinstance(build, str) else json.dumps(build)
    (folder / PT2_BUILD_FILE).write_text(text)
    manifest = json.loads((folder / MANIFEST_FILE).read_text())
    for name in (PT2_FILE, PT2_BUILD_FILE) if is_listed else ():
        size = (folder / name).stat().st_size
        manifest["files"][name] = {"sha256": sha256_of(folder / name), "size_bytes": size}
    (folder / MANIFEST_FILE).write_text(json.dumps(manifest))
    return load_bundle(folder)


@pytest.mark.parametrize("is_there", [False, True], ids=["absent", "not in the manifest"])
def test_a_bundle_without_a_checked_package(bundle_dir, is_there):
    here = native_build(torch, "cpu")
    bundle = _with_package(bundle_dir, here, is_listed=False) if is_there else None
    with pytest.raises(CheckpointError, match=r"has no model\.pt2\n  try: on this device: ") as e:
        load_engine(bundle or load_bundle(bundle_dir), engine="aot-inductor")
    assert "dimefm-edge export RUN --format pt2" in str(e.value)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("torch", "2.0.0", r"was compiled for torch 2\.0\.0 \(here "),
        ("system", "Linux aarch64", r"was compiled for system Linux aarch64 \(here "),
        ("chip", "sm_87", r"was compiled for chip sm_87 \(here "),
    ],
)
def test_another_torch_or_device_is_refused(bundle_dir, key, value, message):
    bundle = _with_package(bundle_dir, {**native_build(torch, "cpu"), key: value})
    with pytest.raises(CheckpointError, match=message):
        load_engine(bundle, engine="aot-inductor")


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is here")
def test_a_gpu_that_is_not_here(bundle_dir):
    build = {**native_build(torch, "cpu"), "device": "cuda", "chip": "sm_87"}
    with pytest.raises(CheckpointError, match=r"is for a GPU \(sm_87\), and torch finds none here"):
        load_engine(_with_package(bundle_dir, build), engine="aot-inductor")


@pytest.mark.parametrize("build", ["", "[]", "{}", '{"device": "tpu"}'])
def test_a_build_file_that_says_nothing(bundle_dir, build):
    with pytest.raises(CheckpointError, match="does not say what"):
        load_engine(_with_package(bundle_dir, build), engine="aot-inductor")


def test_a_damaged_package(bundle_dir):
    bundle = _with_package(bundle_dir, native_build(torch, "cpu"))
    with pytest.raises(CheckpointError, match=r"cannot load .*model\.pt2"):
        load_engine(bundle, engine="aot-inductor")


def test_without_torch(bundle_dir, monkeypatch):
    bundle = _with_package(bundle_dir, native_build(torch, "cpu"))
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(MissingExtraError, match=r"needs torch.*\n  try: pip install torch"):
        load_engine(bundle, engine="aot-inductor")
