"""The doctor: what is broken is found, and each finding names its mend."""

from __future__ import annotations

import sys
import types
from pathlib import Path

import pytest

from dimefm_edge import doctor
from dimefm_edge.doctor import cpu_flags, examine


def _by_name(folder: Path = Path()) -> dict[str, doctor.Check]:
    return {check.name: check for check in examine(folder)}


def test_this_machine_can_run_what_the_tests_need(tmp_path):
    checks = _by_name(tmp_path)
    for name in ("Python", "ONNX Runtime", "tokenizers", "torch", "timm", "CPU", "disk"):
        assert checks[name].status in ("ok", "note"), checks[name]
    assert "CPU" in checks["ONNX Runtime"].detail
    assert all(c.mend for c in checks.values() if c.status == "missing")


def test_what_is_not_installed_says_how_to_install_it(monkeypatch):
    monkeypatch.setattr(doctor, "_version", lambda name: None)
    checks = _by_name()
    assert checks["torch"].status == "missing"
    assert checks["torch"].mend == "pip install 'dimefm_edge[train]'"
    assert "bundles run" in checks["torch"].detail
    assert not checks["torch"].is_required
    for name in ("tokenizers", "ftfy"):
        assert (checks[name].is_required, checks[name].mend) == (True, f"pip install {name}")
    assert "CUDA" not in checks


def test_what_the_commands_need_beside_is_looked_at(monkeypatch):
    versions = {"faiss-gpu": "1.9"}
    monkeypatch.setattr(doctor, "_version", versions.get)
    checks = _by_name()
    assert (checks["tensorboard"].status, checks["gradio"].status) == ("missing", "missing")
    assert checks["tensorboard"].mend == "pip install 'dimefm_edge[train]'"
    assert checks["gradio"].mend == "pip install 'dimefm_edge[demo]'"
    assert (checks["faiss-gpu"].status, "faiss-cpu" in checks) == ("ok", False)
    assert checks["openvino"].status == checks["mlcommons-loadgen"].status == "note"
    assert checks["openvino"].mend == "pip install openvino"
    versions.clear()
    faiss = _by_name()["faiss-cpu"]
    assert (faiss.status, faiss.mend) == ("missing", "pip install 'dimefm_edge[train]'")
    assert not any(checks[name].is_required for name in ("gradio", "tensorboard", "openvino"))


def test_a_broken_runtime_is_found(monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    check = _by_name()["ONNX Runtime"]
    assert (check.status, check.is_required) == ("missing", True)
    assert check.mend == "pip install --upgrade onnxruntime"


@pytest.mark.parametrize(
    ("driver", "built_for", "status", "words"),
    [
        (None, "13.2", "note", "no NVIDIA driver"),
        ("580.1", None, "missing", "torch is built for the CPU"),
        ("580.1", "13.2", "missing", "sees no GPU"),
    ],
)
def test_cuda_without_a_gpu(driver, built_for, status, words, monkeypatch):
    monkeypatch.setattr(doctor, "_nvidia_driver", lambda: driver)
    torch = types.SimpleNamespace(
        cuda=types.SimpleNamespace(is_available=lambda: False),
        version=types.SimpleNamespace(cuda=built_for),
    )
    check = doctor._cuda(torch)
    assert check.status == status
    assert words in check.detail
    assert (check.mend is None) == (status == "note")


def test_cpu_flags_on_x86_and_arm(tmp_path):
    path = tmp_path / "cpuinfo"
    path.write_text("processor\t: 0\nflags\t\t: fpu avx2 avx512_vnni\n")
    assert cpu_flags(path) == {"fpu", "avx2", "avx512_vnni"}
    path.write_text("processor\t: 0\nFeatures\t: fp asimd asimddp\n")
    assert cpu_flags(path) == {"fp", "asimd", "asimddp"}
    assert cpu_flags(tmp_path / "none") == set()


def test_a_folder_that_is_not_there_yet_is_judged_by_its_parent(tmp_path):
    check = _by_name(tmp_path / "runs" / "new")["disk"]
    assert str(tmp_path) in check.detail


def test_a_full_disk(tmp_path, monkeypatch):
    usage = types.SimpleNamespace(total=1, used=1, free=2**30)
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda path: usage)
    check = _by_name(tmp_path)["disk"]
    assert check.status == "note"
    assert check.mend == "free some space, or --out on another disk"


def test_tensorrt_and_its_gpu_are_looked_at(fake_tensorrt, monkeypatch):
    fake_tensorrt("10.3")
    found = {check.name: check for check in examine()}
    assert (found["TensorRT"].status, found["TensorRT"].detail) == ("ok", "10.3.0")
    assert found["GPU for TensorRT"].detail == "Orin, sm_87, CUDA 12.6"
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    monkeypatch.setattr("dimefm_edge.runtime.cuda._LIBRARIES", ("libno-such-driver.so.1",))
    found = {check.name: check for check in examine()}
    assert found["TensorRT"].status == found["GPU for TensorRT"].status == "note"
    assert "pip install 'dimefm_edge[tensorrt]'" in found["TensorRT"].mend
    assert "no NVIDIA driver here" in found["GPU for TensorRT"].detail
    assert "tensorrt_rtx_cu13_libs" in found
