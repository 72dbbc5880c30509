"""`build`, then `eval` and what `bench` times of it; TensorRT is its recorded API: double.py."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dimefm_edge.bench.prepare import prepare
from dimefm_edge.bench.runnable import Load, load_runnable, make_feed
from dimefm_edge.bench.specs import parse_subjects
from dimefm_edge.cli import main
from dimefm_edge.commands.building import parse_batch, try_build
from dimefm_edge.errors import ConfigError
from dimefm_edge.runtime import load_bundle

Fake = Callable[[str], Any]


def run(capsys: pytest.CaptureFixture[str], *words: object) -> tuple[int, Any]:
    """Exit code and the JSON on stdout."""
    code = main([*map(str, words), "--json"])
    return code, json.loads(capsys.readouterr().out)


@pytest.mark.parametrize("version", ["10.3", "10.16", "11.4"])
def test_build_then_eval_then_bench(
    version: str,
    tiny_bundle_dir: Path,
    labelled_dir: Path,
    fake_tensorrt: Fake,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    fake_tensorrt(version)
    code, built = run(capsys, "build", tiny_bundle_dir, "--batch", "1,2,4", "--profile",
                      "--data", labelled_dir)  # fmt: skip
    assert code == 0
    assert built["gpu"] == {"name": "Orin", "sm": "sm_87", "cuda": "12.6"}
    assert (built["was_cached"], built["precision"], built["typing"]) == (False, "fp32", "strong")
    assert built["attention"] == {"expected": 1, "fused": 1, "unfused": []}
    assert built["min_cosine"] > 0.9999
    assert Path(built["engine"]).is_file()
    assert all(layer["time_ms"] == pytest.approx(0.25) for layer in built["layers"])
    (on_engine,) = built["accuracy"]
    assert (on_engine["num_images"], on_engine["num_classes"]) == (12, 3)

    _, again = run(capsys, "build", tiny_bundle_dir, "--batch", "1,2,4")
    assert again["was_cached"]
    assert again["engine"] == built["engine"]

    for engine in ("tensorrt", built["engine"], "onnxruntime"):
        code, judged = run(
            capsys, "eval", tiny_bundle_dir, "--data", labelled_dir, "--engine", engine
        )
        assert code == 0
        assert judged["results"][0]["top1_pct"] == on_engine["top1_pct"]

    (spec,) = parse_subjects([f"{tiny_bundle_dir}@tensorrt"])
    runnable = load_runnable(prepare(spec, tmp_path), load := Load())
    assert runnable.run(make_feed(runnable, load)).shape == (1, 16)


def test_build_says_it_in_words(
    tiny_bundle_dir: Path, labelled_dir: Path, fake_tensorrt: Fake,
    capsys: pytest.CaptureFixture[str], tmp_path: Path,
) -> None:  # fmt: skip
    double = fake_tensorrt("10.3")
    out = tmp_path / "my.engine"
    words = ["build", str(tiny_bundle_dir), "--precision", "fp16", "--out", str(out),
             "--batch", "4", "--data", str(labelled_dir), "--profile"]  # fmt: skip
    assert main(words) == 0
    text = capsys.readouterr().out
    assert f"{out}: fp16, weakly typed, " in text
    assert "built in 0 s" in text
    assert "Orin (sm_87), TensorRT 10.3.0; batch 4 to 4, best at 4" in text
    assert "attention: 1 of 1 fused" in text
    assert "zero-shot, on the engine" in text
    assert "slowest layers" in text
    assert out.is_file()
    assert main(words) == 0
    assert "found in the cache" in capsys.readouterr().out
    double.fuses_attention = False
    assert main([*words, "--rebuild"]) == 0
    text = capsys.readouterr().out
    assert "attention: 0 of 1 fused; not fused: " in text
    assert "try: with TensorRT 10" not in text  # it is weakly typed already
    assert main(["build", str(tiny_bundle_dir)]) == 0
    assert "try: with TensorRT 10, build the fp32 bundle with" in capsys.readouterr().out


def test_an_engine_that_answers_otherwise_is_a_parity_error(
    tiny_bundle_dir: Path, fake_tensorrt: Fake, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    from dimefm_edge.runtime.tensorrt import TensorRtEngine

    fake_tensorrt("10.3")
    right = TensorRtEngine._encode
    monkeypatch.setattr(TensorRtEngine, "_encode", lambda self, x: -right(self, x))
    code, said = run(capsys, "build", tiny_bundle_dir)
    assert code == 3
    assert "the engine does not answer as ONNX Runtime does: least cosine" in said["error"]
    assert "--precision fp32 --rebuild" in said["hint"]
    monkeypatch.setattr(TensorRtEngine, "encode_image", lambda self, x: right(self, x) * np.nan)
    assert run(capsys, "build", tiny_bundle_dir)[0] == 3


@pytest.mark.parametrize(
    ("words", "code", "error"),
    [
        ([], 2, "build needs a bundle"),
        (["BUNDLE", "--batch", "4,2,1"], 2, "batch sizes must rise"),
        (["BUNDLE", "--batch", "1,2"], 2, "--batch is min,opt,max or one number, got '1,2'"),
        (["BUNDLE", "--out", "engine.plan"], 2, "--out must end in .engine"),
        (["BUNDLE", "--precision", "fp61"], 2, "unknown engine precision 'fp61'"),
        (["BUNDLE", "--precision", "fp8"], 2, "Orin (sm_87) has no fp8"),
        (["BUNDLE", "--dla-core", "0", "--precision", "fp16"], 2, "there is no DLA 0 on Orin"),
        (["BUNDLE", "--plugin-library", "none.so"], 2, "no plugin library at "),
        (["nowhere"], 2, "no bundle at nowhere"),
    ],
)
def test_what_cannot_be_built(
    words: list[str], code: int, error: str, tiny_bundle_dir: Path, fake_tensorrt: Fake,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    fake_tensorrt("10.3")
    words = [str(tiny_bundle_dir) if word == "BUNDLE" else word for word in words]
    found, said = run(capsys, "build", *words)
    assert found == code == said["exit_code"]
    assert error in said["error"]


def test_without_tensorrt_or_a_gpu_it_says_what_is_missing(
    tiny_bundle_dir: Path, fake_tensorrt: Fake, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    fake_tensorrt("10.3")
    monkeypatch.setattr("dimefm_edge.runtime.cuda._LIBRARIES", ("libno-such-driver.so.1",))
    code, said = run(capsys, "build", tiny_bundle_dir)
    assert (code, said["error"]) == (
        1, "there is no NVIDIA driver here (libno-such-driver.so.1 cannot be loaded)",
    )  # fmt: skip
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    code, said = run(capsys, "build", tiny_bundle_dir)
    assert code == 1
    assert "TensorRT's Python package cannot be imported" in said["error"]
    assert "pip install 'dimefm_edge[tensorrt]'" in said["hint"]


def test_a_dry_run_needs_no_gpu(
    tiny_bundle_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    pytest.importorskip("tensorrt_rtx_bindings", reason="pip install '.[rtx]'")
    before = sorted(path.name for path in tiny_bundle_dir.rglob("*"))
    code, said = run(capsys, "build", tiny_bundle_dir, "--dry-run", "--batch", "1,2,4")
    assert code == 0
    assert said["compiler"].startswith("TensorRT for RTX 1.")
    assert (said["compiled_for"], said["stands_for"]) == ("sm_86", "sm_87")
    assert said["num_kernels"] == sum(said["kernels_by_kind"].values()) > 5
    assert said["attention"]["expected"] == 1
    assert main(["build", str(tiny_bundle_dir), "--dry-run"]) == 0
    text = capsys.readouterr().out
    assert "compiles it in fp32 for sm_86" in text  # the bundle has no target that says more
    assert f"{said['num_kernels']} kernels; attention: " in text
    assert "nothing was run or kept" in text
    assert sorted(path.name for path in tiny_bundle_dir.rglob("*")) == before
    code, lowered = run(capsys, "build", tiny_bundle_dir, "--dry-run", "--precision", "fp16")
    assert (code, lowered["precision"], lowered["attention"]["fused"]) == (0, "fp16", 1)
    code, refused = run(capsys, "build", tiny_bundle_dir, "--dry-run", "--rebuild")
    assert (code, refused["hint"]) == (2, "drop --rebuild")
    monkeypatch.setitem(sys.modules, "tensorrt_rtx_bindings", None)
    code, said = run(capsys, "build", tiny_bundle_dir, "--dry-run")
    assert (code, said["hint"].split("  ")[0]) == (1, "pip install 'dimefm_edge[rtx]'")


@pytest.mark.parametrize(
    ("target", "precision"),
    [("jetson-agx-orin", "fp16"), ("local", "fp32"), ("no-such-board", "fp32"), (None, "fp32")],
)
def test_a_dry_run_is_in_the_precision_of_the_budget(
    target: str | None, precision: str, tiny_bundle_dir: Path
) -> None:
    pytest.importorskip("tensorrt_rtx_bindings", reason="pip install '.[rtx]'")
    bundle = load_bundle(tiny_bundle_dir)
    built = try_build(replace(bundle, manifest=bundle.manifest | {"target": target}))
    assert built.precision == precision


def test_eval_before_build_names_the_command(
    tiny_bundle_dir: Path, labelled_dir: Path, fake_tensorrt: Fake,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    fake_tensorrt("10.3")
    words = ("eval", tiny_bundle_dir, "--data", labelled_dir, "--engine", "tensorrt")
    code, said = run(capsys, *words)
    assert code == 2
    assert said["hint"] == f"dimefm-edge build {tiny_bundle_dir}"
    code, said = run(capsys, "eval", "sample", "--data", labelled_dir, "--engine", "tensorrt")
    assert code == 2
    assert "sample is a teacher; --engine tensorrt runs bundles only" in said["error"]


def test_batch_is_three_numbers_or_one() -> None:
    assert parse_batch("1,2,4") == (1, 2, 4)
    assert parse_batch("8") == (8, 8, 8)
    with pytest.raises(ConfigError, match="or one number, got 'few'"):
        parse_batch("few")


def test_help_tells_the_flags(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["build", "--help"]) == 0
    text = capsys.readouterr().out
    for flag in ("--precision", "--batch", "--workspace-mib", "--dla-core", "--timing-cache",
                 "--version-compatible", "--hardware-compatible", "--refit", "--opt-level",
                 "--data", "--out", "--plugin-library", "--profile", "--rebuild",
                 "--dry-run"):  # fmt: skip
        assert flag in text
