"""Builds against the recorded API of each TensorRT version. No engine is built here: see double.py.

What is proven: every call, argument, flag and property that a build uses exists in that version;
what is asked reaches the builder; and failures leave a clear error and no file.
"""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dimefm_edge.errors import (
    CheckpointError,
    ConfigError,
    ExportError,
    MissingExtraError,
    UnknownNameError,
)
from dimefm_edge.runtime import load_bundle, load_engine
from dimefm_edge.runtime.bundle import Bundle
from dimefm_edge.runtime.tensorrt_build import EngineOptions, build_engine
from dimefm_edge.runtime.tensorrt_cache import cache_dir

VERSIONS = ("10.3", "10.16", "11.4")
Fake = Callable[[str], Any]


@pytest.fixture
def fp32(exported_bundles: dict[str, Path]) -> Bundle:
    return load_bundle(exported_bundles["fp32"])


@pytest.fixture
def fp16(exported_bundles: dict[str, Path]) -> Bundle:
    return load_bundle(exported_bundles["fp16"])


def called(double: Any, start: str) -> list[str]:
    return [call for call in double.calls if call.startswith(start)]


def flags_of(double: Any) -> list[str]:
    """Names of the builder flags that were set, in order."""
    calls = called(double, "IBuilderConfig.set_flag")
    return [call.split("BuilderFlag.")[1].split(":")[0] for call in calls]


def is_strongly_typed(double: Any) -> bool:
    (call,) = called(double, "Builder.create_network")
    flag = double.trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED
    strong = f"Builder.create_network(flags={1 << int(flag)})"
    assert call in ("Builder.create_network(flags=0)", strong)
    return call == strong


def files() -> list[str]:
    return sorted(p.name for p in cache_dir().rglob("*") if p.is_file())


@pytest.mark.parametrize("version", VERSIONS)
def test_a_graph_that_says_its_types_is_built_strongly_typed(
    version: str, fp16: Bundle, fake_tensorrt: Fake
) -> None:
    double = fake_tensorrt(version)
    built = build_engine(fp16, EngineOptions(batch=(1, 2, 4)))
    assert not built.was_cached
    assert is_strongly_typed(double)
    assert flags_of(double) == []
    assert called(double, "IOptimizationProfile.set_shape") == [
        "IOptimizationProfile.set_shape(input='image', min=(1, 3, 32, 32), opt=(2, 3, 32, 32), "
        "max=(4, 3, 32, 32))"
    ]
    assert "IBuilderConfig.profiling_verbosity=<ProfilingVerbosity.DETAILED: 2>" in double.calls
    facts = built.artifact.facts
    assert facts["typing"] == "strong"
    assert facts["attention"] == {"expected": 1, "fused": 1, "unfused": []}
    assert facts["options"]["batch"] == [1, 2, 4]
    assert facts["build_s"] > 0
    assert any(layer["kernel"].startswith("_gemm_mha_v2") for layer in facts["layers"])


@pytest.mark.parametrize("version", VERSIONS)
def test_every_option_reaches_the_builder(version: str, fp16: Bundle, fake_tensorrt: Fake) -> None:
    double = fake_tensorrt(version)
    double.num_dla_cores = 2
    asked = EngineOptions(
        workspace_mib=64, dla_core=1, opt_level=5, version_compatible=True,
        hardware_compatible=True, refit=True,
    )  # fmt: skip
    build_engine(fp16, asked)
    calls = double.calls
    pool = f"pool={double.trt.MemoryPoolType.WORKSPACE!r}"
    assert f"IBuilderConfig.set_memory_pool_limit({pool}, pool_size={64 * 2**20})" in calls
    assert "IBuilderConfig.builder_optimization_level=5" in calls
    level = double.trt.HardwareCompatibilityLevel.AMPERE_PLUS
    assert f"IBuilderConfig.hardware_compatibility_level={level!r}" in calls
    assert f"IBuilderConfig.default_device_type={double.trt.DeviceType.DLA!r}" in calls
    assert "IBuilderConfig.DLA_core=1" in calls
    assert "Runtime.DLA_core=1" in calls
    assert "Runtime.engine_host_code_allowed=True" in calls
    weak = [] if version == "11.4" else ["FP16", "OBEY_PRECISION_CONSTRAINTS"]
    assert flags_of(double) == [*weak, "VERSION_COMPATIBLE", "REFIT", "GPU_FALLBACK"]


@pytest.mark.parametrize("version", ["10.3", "10.16"])
@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_version_10_lowers_an_fp32_graph_and_keeps_its_end(
    version: str, precision: str, fp32: Bundle, fake_tensorrt: Fake
) -> None:
    double = fake_tensorrt(version)
    built = build_engine(fp32, EngineOptions(precision=precision))
    assert not is_strongly_typed(double)
    assert flags_of(double) == [precision.upper(), "OBEY_PRECISION_CONSTRAINTS"]
    assert built.artifact.facts["typing"] == f"weak: {precision.upper()}"
    # The graph ends in the projection, ReduceL2, Clip, Expand and Div.
    kept = called(double, "ILayer.precision=<DataType.FLOAT: 0>")
    assert 2 <= len(kept) <= 8
    assert len(called(double, "ILayer.set_output_type")) == len(kept)


def test_an_fp32_graph_becomes_what_its_targets_budget_is_of(
    fp32: Bundle, fake_tensorrt: Fake, caplog: pytest.LogCaptureFixture
) -> None:
    def typing(target: str | None, version: str) -> str:
        fake_tensorrt(version)
        made = replace(fp32, manifest=fp32.manifest | {"target": target})
        facts = build_engine(made, rebuild=True).artifact.facts
        return f"{facts['options']['precision']} {facts['typing']}"

    assert typing("jetson-agx-orin", "10.3") == "fp16 weak: FP16"
    for target in (None, "local", "x86-cpu", "no-such-board"):
        assert typing(target, "10.3") == "fp32 strong"
    assert not caplog.records
    assert typing("jetson-agx-orin", "11.4") == "fp32 strong"
    assert "dimefm-edge export RUN --precision fp16" in caplog.text


def test_version_11_runs_the_types_that_the_graph_says(fp32: Bundle, fake_tensorrt: Fake) -> None:
    double = fake_tensorrt("11.4")
    with pytest.raises(ConfigError, match="is an fp32 graph and cannot become an fp16") as caught:
        build_engine(fp32, EngineOptions(precision="fp16"))
    assert "TensorRT 11.4.0.106 runs the types that the graph says" in str(caught.value)
    assert caught.value.hint == "dimefm-edge export RUN --precision fp16, then build that"
    assert build_engine(fp32).artifact.facts["typing"] == "strong"
    assert is_strongly_typed(double)


@pytest.mark.parametrize("precision", ["int8", "fp8"])
@pytest.mark.parametrize("version", ["10.3", "10.16", "11.4"])
def test_8_bits_let_the_rest_run_in_fp16_where_they_can(
    version: str, precision: str, bundle_dir: Path, fake_tensorrt: Fake
) -> None:
    manifest = bundle_dir / "manifest.json"
    said = f'"precision": "{precision}"'
    manifest.write_text(manifest.read_text().replace('"precision": "fp32"', said))
    double = fake_tensorrt(version)
    for name, value in (("fake_major", 11), ("fake_minor", 0)):
        ctypes.c_int.in_dll(double.driver, name).value = value
    is_weak = not version.startswith("11")
    typing = f"weak: {precision.upper()} FP16" if is_weak else "strong"
    built = build_engine(load_bundle(bundle_dir))
    assert built.artifact.facts["typing"] == typing
    expected = [precision.upper(), "FP16", "OBEY_PRECISION_CONSTRAINTS"] if is_weak else []
    assert flags_of(double) == expected


# ------------------------------------------------------------------------------ cache


def test_an_engine_is_built_once(fp16: Bundle, fake_tensorrt: Fake) -> None:
    double = fake_tensorrt("10.3")
    first = build_engine(fp16)
    second = build_engine(fp16)
    assert (first.was_cached, second.was_cached) == (False, True)
    assert first.artifact.path == second.artifact.path
    assert len(called(double, "Builder.build_serialized_network")) == 1
    assert not build_engine(fp16, EngineOptions(refit=True)).was_cached
    assert not build_engine(fp16, rebuild=True).was_cached
    first.artifact.path.write_bytes(b"damaged")
    assert not build_engine(fp16).was_cached
    fake_tensorrt("10.16")
    assert not build_engine(fp16).was_cached
    assert len(files()) == 2 * 3 + 2  # engines with their facts, and a timing cache per version


def test_the_timing_cache_is_used_again(
    fp16: Bundle, fake_tensorrt: Fake, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    double = fake_tensorrt("10.3")
    timings = tmp_path / "timings"
    build_engine(fp16, timing_cache=timings)
    kept = timings.read_bytes()
    build_engine(fp16, timing_cache=timings, rebuild=True)
    created = called(double, "IBuilderConfig.create_timing_cache")
    assert created == [
        "IBuilderConfig.create_timing_cache(serialized_timing_cache=b'')",
        f"IBuilderConfig.create_timing_cache(serialized_timing_cache={kept!r})",
    ]
    timings.write_bytes(b"of another GPU")
    build_engine(fp16, timing_cache=timings, rebuild=True)
    assert "is not of this GPU and TensorRT: begun anew" in caplog.text
    assert timings.read_bytes() == kept


def test_out_names_another_place(fp16: Bundle, fake_tensorrt: Fake, tmp_path: Path) -> None:
    fake_tensorrt("10.3")
    out = tmp_path / "out" / "my.engine"
    built = build_engine(fp16, out=out)
    assert built.artifact.path == out
    assert sorted(p.name for p in out.parent.iterdir()) == ["my.engine", "my.engine.json"]
    assert files() == ["timing.cache"]


# --------------------------------------------------------------------------- failures


@pytest.mark.parametrize("version", VERSIONS)
def test_what_the_parser_refuses_is_listed(version: str, fp16: Bundle, fake_tensorrt: Fake) -> None:
    double = fake_tensorrt(version)
    double.parser_errors = [(f"Op{i}", f"node_{i}", "no importer registered") for i in range(7)]
    with pytest.raises(ExportError, match="cannot read the graph of") as caught:
        build_engine(fp16)
    text = str(caught.value)
    assert "Op0 node_0: no importer registered; Op1 node_1" in text
    assert "and 2 more" in text
    assert "dimefm-edge export RUN --target DEVICE" in text
    assert files() == []


def test_a_build_that_fails_says_what_tensorrt_said(fp16: Bundle, fake_tensorrt: Fake) -> None:
    fake_tensorrt("10.3").build_error = "Error Code 10: no implementation for node x"
    with pytest.raises(ExportError, match="for Orin: Error Code 10: no implementation") as caught:
        build_engine(fp16)
    assert "--verbose" in str(caught.value.hint)
    assert files() == []


def test_a_batch_profile_must_rise() -> None:
    for batch in ((0, 1, 1), (2, 1, 4), (1, 4, 2)):
        with pytest.raises(ConfigError, match="batch sizes must rise from at least 1"):
            EngineOptions(batch=batch)
    with pytest.raises(ConfigError, match="the optimisation level must be 0 to 5, got 6"):
        EngineOptions(opt_level=6)
    with pytest.raises(ConfigError, match="the workspace must be at least 1 MiB, got 0"):
        EngineOptions(workspace_mib=0)
    with pytest.raises(UnknownNameError, match=r"unknown engine precision 'fp61'"):
        EngineOptions(precision="fp61")


@pytest.mark.parametrize(
    ("sm", "precision", "message"),
    [
        ((8, 7), "fp8", r"Orin \(sm_87\) has no fp8: it begins with sm_89"),
        ((7, 2), "bf16", r"Orin \(sm_72\) has no bf16: it begins with sm_80"),
        ((11, 0), "fp8", "int8 and fp8 need Q/DQ nodes"),
        ((8, 7), "int8", "only an fp32 graph can be lowered, and int8 and fp8 need Q/DQ"),
    ],
)
def test_a_precision_that_cannot_be(
    sm: tuple[int, int], precision: str, message: str, fp32: Bundle, fake_tensorrt: Fake
) -> None:
    driver = fake_tensorrt("10.3").driver
    for name, value in zip(("fake_major", "fake_minor"), sm, strict=True):
        ctypes.c_int.in_dll(driver, name).value = value
    with pytest.raises(ConfigError, match=message):
        build_engine(fp32, EngineOptions(precision=precision))


def test_an_fp16_graph_cannot_be_raised(fp16: Bundle, fake_tensorrt: Fake) -> None:
    fake_tensorrt("10.3")
    with pytest.raises(ConfigError, match="an fp16 graph and cannot become an fp32 engine"):
        build_engine(fp16, EngineOptions(precision="fp32"))


@pytest.mark.parametrize(("cores", "found"), [(0, "none"), (1, "1")])
def test_a_dla_that_is_not_there(cores: int, found: str, fp16: Bundle, fake_tensorrt: Fake) -> None:
    fake_tensorrt("10.3").num_dla_cores = cores
    with pytest.raises(ConfigError, match=f"no DLA 1 on Orin: TensorRT finds {found}") as caught:
        build_engine(fp16, EngineOptions(dla_core=1))
    assert caught.value.hint == "leave out --dla-core"


def test_a_dla_does_no_fp32(fp32: Bundle, fake_tensorrt: Fake) -> None:
    fake_tensorrt("10.3").num_dla_cores = 2
    with pytest.raises(ConfigError, match="a DLA runs fp16 and int8, not fp32"):
        build_engine(fp32, EngineOptions(dla_core=1))


def test_attention_that_did_not_fuse_is_told(fp16: Bundle, fake_tensorrt: Fake) -> None:
    double = fake_tensorrt("10.3")
    double.fuses_attention = False
    attention = build_engine(fp16).artifact.facts["attention"]
    assert (attention["expected"], attention["fused"]) == (1, 0)
    double.is_opaque = True
    assert build_engine(fp16, rebuild=True).artifact.facts["attention"]["fused"] is None


# ------------------------------------------------------------- kernels of our own


@pytest.fixture(scope="module")
def plugin_bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """A ViT for Thor whose two attentions of all tokens are `dimefm::fused_attention_qkv`."""
    import torch

    from dimefm_edge.data.scenes import scene_image
    from dimefm_edge.export import export_student, graph_spec
    from dimefm_edge.preprocess import PreprocessSpec, preprocess_images
    from dimefm_edge.students import LoadedStudent, build_student, vit_spec
    from dimefm_edge.targets import load_target

    pytest.importorskip("triton")
    torch.manual_seed(1)
    spec = vit_spec(image_size=32, embed_dim=24, patch_size=16, width=64, depth=3, num_heads=2)
    preprocess = PreprocessSpec(32)
    out = export_student(
        LoadedStudent(build_student(spec).eval(), spec, preprocess, {}),
        tmp_path_factory.mktemp("plugin") / "bundle.zip",
        graph=graph_spec(load_target("jetson-agx-thor"), precision="fp16", attention="plugin"),
        parity_images=preprocess_images([scene_image(i) for i in range(4)], preprocess),
        logit_scale=100.0,
    )
    return load_bundle(out)


def on_thor(double: Any) -> Any:
    for name, value in (("fake_major", 11), ("fake_minor", 0)):
        ctypes.c_int.in_dll(double.driver, name).value = value
    return double


@pytest.mark.parametrize("version", ["10.16", "11.4"])
def test_a_bundles_own_kernels_become_the_engines(
    version: str, plugin_bundle: Bundle, fake_tensorrt: Fake, monkeypatch: pytest.MonkeyPatch
) -> None:
    double = on_thor(fake_tensorrt(version))
    monkeypatch.setitem(sys.modules, "triton", None)  # as on a device
    monkeypatch.setattr("dimefm_kernels.tensorrt_plugin._COMPILED", {})
    built = build_engine(plugin_bundle, EngineOptions(batch=(1, 2, 4)))
    (kernel,) = plugin_bundle.manifest["graph"]["kernels"]
    assert len(double.launches) == 2
    for entry, ptx, launch, sizes in double.launches:
        assert entry == kernel["entry"]
        assert f".entry {entry}(" in ptx
        assert ".target sm_110" in ptx
        assert (launch.grid_x, str(launch.grid_y)) == (kernel["grid_x"], "min(B * 2, 65535)")
        assert (launch.block_x, launch.shared_mem) == (
            kernel["num_threads"], kernel["shared_bytes"],
        )  # fmt: skip
        assert [str(size) for size in sizes] == ["B * 2"]
    assert built.artifact.facts["attention"] == {"expected": 3, "fused": 3, "unfused": []}
    # A process of its own, as far as TensorRT's registry goes, loads it.
    double.plugin._lib.QDP_REGISTRY.clear()
    engine = load_engine(plugin_bundle, engine="tensorrt")
    assert list(double.plugin._lib.QDP_REGISTRY) == ["dimefm::fused_attention_qkv"]
    images = np.random.default_rng(0).normal(size=(3, 3, 32, 32)).astype(np.float32)
    expected = load_engine(plugin_bundle, threads=1).encode_image(images)
    np.testing.assert_allclose(engine.encode_image(images), expected, atol=2e-3)


def test_kernels_of_another_gpu_or_for_a_tensorrt_that_takes_none(
    plugin_bundle: Bundle, fake_tensorrt: Fake
) -> None:
    double = fake_tensorrt("10.16")
    with pytest.raises(CheckpointError, match=r"brings kernels for sm_110, and .* is sm_87\n  try"):
        build_engine(plugin_bundle)
    assert not any("parse_from_file" in call for call in double.calls)
    double = on_thor(fake_tensorrt("10.3"))
    with pytest.raises(
        MissingExtraError, match=r"(?s)TensorRT 10\.3\.0 cannot take the kernels of .*JetPack 7\.2"
    ):
        build_engine(plugin_bundle)
    assert not any("parse_from_file" in call for call in double.calls)


def test_kernels_run_in_the_precision_that_they_were_compiled_for(
    plugin_bundle: Bundle, fake_tensorrt: Fake
) -> None:
    on_thor(fake_tensorrt("10.16"))
    with pytest.raises(ConfigError, match="brings kernels for fp16 and cannot become an fp32"):
        build_engine(plugin_bundle, EngineOptions(precision="fp32"))


def test_a_bundle_without_kernels_registers_nothing(
    exported_bundles: dict[str, Path], fake_tensorrt: Fake
) -> None:
    double = fake_tensorrt("10.16")
    build_engine(load_bundle(exported_bundles["fp16"]))
    assert double.plugin._lib.QDP_REGISTRY == {}
