"""What is here, and what is said when TensorRT is not. Nothing of TensorRT runs here."""

from __future__ import annotations

import ctypes
import logging
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from dimefm_edge.errors import InputError, MissingExtraError
from dimefm_edge.runtime.cuda import Cuda
from dimefm_edge.runtime.tensorrt_machine import (
    Log,
    import_tensorrt,
    load_machine,
    load_plugin_libraries,
    parse_version,
    require_builder,
)


def test_the_machine_is_a_gpu_and_a_version(fake_tensorrt: Callable[[str], Any]) -> None:
    fake_tensorrt("10.16")
    machine = load_machine(Cuda())
    assert (machine.gpu.sm, machine.tensorrt, machine.version) == (
        "sm_87", "10.16.1.11", (10, 16),
    )  # fmt: skip
    assert parse_version("10.3.0") == (10, 3)


def test_without_tensorrt_the_hint_installs_it(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    with pytest.raises(MissingExtraError, match="TensorRT's Python package cannot be") as caught:
        import_tensorrt()
    assert "pip install 'dimefm_edge[tensorrt]'" in str(caught.value.hint)
    release = tmp_path / "nv_tegra_release"
    release.touch()
    monkeypatch.setattr("dimefm_edge.runtime.tensorrt_machine._TEGRA", release)
    with pytest.raises(MissingExtraError) as caught:
        import_tensorrt()
    assert "JetPack ships TensorRT" in str(caught.value.hint)
    assert "--system-site-packages" in str(caught.value.hint)


def test_an_export_that_cannot_end_in_an_engine_says_so_first(
    fake_tensorrt: Callable[[str], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    double = fake_tensorrt("10.3")
    command = {"export_command": "dimefm-edge export runs/a", "bundle": Path("runs/a/bundle")}
    require_builder(**command)  # type: ignore[arg-type]
    ctypes.c_int.in_dll(double.driver, "fake_count").value = 0
    with pytest.raises(MissingExtraError, match="no engine can be built here"):
        require_builder(**command)  # type: ignore[arg-type]
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    with pytest.raises(MissingExtraError, match="no engine can be built here: TensorRT's") as e:
        require_builder(**command)  # type: ignore[arg-type]
    assert e.value.hint == (
        "dimefm-edge export runs/a  here; then, where the bundle is on the device: "
        "dimefm-edge build runs/a/bundle"
    )


def test_an_old_tensorrt_is_refused(fake_tensorrt: Callable[[str], Any]) -> None:
    fake_tensorrt("10.3").trt.__version__ = "8.5.2"
    with pytest.raises(MissingExtraError, match=r"TensorRT 8\.5\.2 is too old: engines need 10\.0"):
        import_tensorrt()


def test_its_log_goes_to_ours_and_errors_are_kept(
    fake_tensorrt: Callable[[str], Any], caplog: pytest.LogCaptureFixture
) -> None:
    trt = fake_tensorrt("10.3").trt
    log = Log(trt)
    assert "gives no reason" in log.reason()
    with caplog.at_level(logging.DEBUG, "dimefm_edge.runtime.tensorrt_machine"):
        log.trt_logger.log(trt.ILogger.Severity.WARNING, "slow")
        log.trt_logger.log(trt.ILogger.Severity.ERROR, "Error Code 4:\n  bad shape")
        log.trt_logger.log(trt.ILogger.Severity.VERBOSE, "tactic 7")
    levels = [(r.levelname, r.getMessage()) for r in caplog.records]
    assert levels[0] == ("INFO", "TensorRT: slow")
    assert levels[2] == ("DEBUG", "TensorRT: tactic 7")
    assert log.reason() == "Error Code 4: bad shape"
    trt.Builder(log.trt_logger)  # which TensorRT's own classes take


def test_plugin_libraries(fake_tensorrt: Callable[[str], Any], tmp_path: Path) -> None:
    double = fake_tensorrt("10.3")
    registry = double.trt.get_plugin_registry()
    with pytest.raises(InputError, match="no plugin library at"):
        load_plugin_libraries(registry, (tmp_path / "none.so",))
    path = tmp_path / "libmine.so"
    path.touch()
    with pytest.raises(InputError, match=r"cannot load the plugin library .*libmine\.so"):
        load_plugin_libraries(registry, (path,))  # the double answers None, as TensorRT does
    double.ipluginregistry_load_library = lambda this, plugin_path: object()
    load_plugin_libraries(registry, (path,))
    assert double.calls[-1].startswith("IPluginRegistry.load_library(plugin_path=")
