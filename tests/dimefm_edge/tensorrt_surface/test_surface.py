"""The recorded surface refuses what the real bindings would: else the other tests prove little."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

VERSIONS = ("10.3", "10.16", "11.4")


@pytest.mark.parametrize("version", VERSIONS)
def test_wrong_calls_fail(version: str, fake_tensorrt: Callable[[str], Any]) -> None:
    trt = fake_tensorrt(version).trt
    logger = trt.Logger(trt.Logger.WARNING)
    builder = trt.Builder(logger)
    config = builder.create_builder_config()
    with pytest.raises(TypeError, match=r"Builder\.__init__\(\): incompatible"):
        trt.Builder()
    with pytest.raises(TypeError, match="incompatible function arguments"):
        trt.Builder("a logger")
    with pytest.raises(AttributeError, match="create_netwerk"):
        builder.create_netwerk()
    with pytest.raises(TypeError, match="incompatible function arguments"):
        builder.create_network(flag=0)
    with pytest.raises(TypeError, match="incompatible function arguments"):
        builder.create_network(0, 1)
    with pytest.raises(AttributeError, match="has no attribute max_workspace_size"):
        config.max_workspace_size = 1  # TensorRT 8
    with pytest.raises(AttributeError, match="num_optimization_profiles cannot be set"):
        config.num_optimization_profiles = 2
    with pytest.raises(TypeError, match="builder_optimization_level takes int"):
        config.builder_optimization_level = "5"
    with pytest.raises(TypeError, match="incompatible function arguments"):
        config.set_flag(int(trt.BuilderFlag.REFIT))
    with pytest.raises(TypeError, match="No constructor defined"):
        trt.IBuilderConfig()
    with pytest.raises(AttributeError):
        trt.BuilderFlag.STRICT_TYPES  # noqa: B018  (TensorRT 8)


def test_a_subclass_that_forgets_its_base_is_refused(
    fake_tensorrt: Callable[[str], Any],
) -> None:
    trt = fake_tensorrt("10.3").trt

    class Forgetful(trt.ILogger):
        def __init__(self) -> None:
            pass

        def log(self, severity: Any, msg: str) -> None:
            pass

    with pytest.raises(TypeError, match="incompatible function arguments"):
        trt.Builder(Forgetful())


def test_versions_differ_where_the_real_ones_do(fake_tensorrt: Callable[[str], Any]) -> None:
    old, new, newest = (fake_tensorrt(version).trt for version in VERSIONS)
    assert hasattr(old.BuilderFlag, "FP16")
    assert not hasattr(newest.BuilderFlag, "FP16")
    assert not hasattr(old.HardwareCompatibilityLevel, "SAME_COMPUTE_CAPABILITY")
    assert hasattr(new.HardwareCompatibilityLevel, "SAME_COMPUTE_CAPABILITY")
    assert hasattr(old.ILayer, "precision")
    assert not hasattr(newest.ILayer, "precision")
    assert not hasattr(newest.NetworkDefinitionCreationFlag, "EXPLICIT_BATCH")


@pytest.mark.tensorrt
@pytest.mark.parametrize("version", VERSIONS)
def test_the_record_is_what_the_bindings_say(version: str, tmp_path: Path) -> None:
    """Record a wheel again; `pip download --no-deps tensorrt-cu13-bindings==VERSION` gets one."""
    folder = Path(os.environ.get("DIMEFM_TENSORRT_WHEELS", "/nowhere"))
    wheels = sorted(folder.glob(f"tensorrt_cu1*_bindings-{version}*.whl"))
    if not wheels:
        pytest.skip(f"no wheel of TensorRT's bindings {version} in DIMEFM_TENSORRT_WHEELS")
    here = Path(__file__).parent
    script = tmp_path / "record.py"
    script.write_text((here / "record.py").read_text())
    subprocess.run([sys.executable, str(script), str(wheels[0])], check=True)
    recorded, again = (
        json.loads((place / f"{version}.json").read_text()) for place in (here, tmp_path)
    )
    assert again == recorded
