"""The TensorRT plugins, as far as they go without TensorRT."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

pytest.importorskip("torch")
triton = pytest.importorskip("triton")

from dimefm_kernels import tensorrt_plugin  # noqa: E402
from dimefm_kernels.tensorrt_plugin import PLUGIN_ID, register_plugin  # noqa: E402

GLUE = Path(tensorrt_plugin.__file__).with_name("tensorrt_glue.cpp")
CUDA = Path(triton.__file__).parent / "backends" / "nvidia" / "include"
HEADERS = os.environ.get("DIMEFM_TENSORRT_INCLUDE", "")


@pytest.mark.skipif(not HEADERS, reason="DIMEFM_TENSORRT_INCLUDE names no folder of NvInfer.h")
@pytest.mark.skipif(shutil.which("g++") is None, reason="no g++")
def test_glue_compiles_without_a_warning(tmp_path):
    library = tmp_path / "libdimefm_attention.so"
    words = ["g++", "-std=c++17", "-O1", "-fPIC", "-shared", "-Wall", "-Wextra", "-Werror"]
    words += ["-isystem", HEADERS, "-isystem", str(CUDA), str(GLUE), "-o", str(library)]
    done = subprocess.run(words, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert library.read_bytes().startswith(b"\x7fELF")


def test_glue_and_records_agree():
    """What a KernelRecord says is what the C++ plugin asks for."""
    from dimefm_kernels.ahead_of_time import KernelRecord

    text = GLUE.read_text()
    for field in ("cubin", "entry", "grid_x", "num_threads", "shared_bytes"):
        assert field in KernelRecord.__annotations__
        assert f'{{"{field}", ' in text


def test_no_tensorrt_is_an_import_error(monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    with pytest.raises(ImportError):
        register_plugin()


def test_a_tensorrt_without_python_plugins_is_named(monkeypatch):
    """As JetPack 6's 10.3, whose package has no `plugin`."""
    old = ModuleType("tensorrt")
    old.__version__ = "10.3.0"
    monkeypatch.setitem(sys.modules, "tensorrt", old)
    monkeypatch.delitem(sys.modules, "tensorrt.plugin", raising=False)
    with pytest.raises(RuntimeError, match=r"TensorRT 10\.3\.0 has no .*tensorrt_glue\.cpp"):
        register_plugin()


@pytest.mark.tensorrt
def test_registers_with_tensorrt():
    trtp = pytest.importorskip("tensorrt.plugin", reason="no TensorRT with Python plugins")
    register_plugin()
    register_plugin()
    assert PLUGIN_ID in trtp._lib.QDP_REGISTRY
