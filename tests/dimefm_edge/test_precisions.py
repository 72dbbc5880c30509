"""fp32, int8 by calibration and int8 trained: the stage's settings, and the walk with all three."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from dimefm_edge import cli
from dimefm_edge.config import QuantConfig, TrainConfig
from dimefm_edge.data.scenes import scene_image, scene_sentence
from dimefm_edge.errors import ConfigError, MissingExtraError
from dimefm_edge.manifest import MANIFEST_FILE
from dimefm_edge.precisions import (
    int8_stage,
    keep_float_products,
    load_trained_int8,
    require_int8,
)
from dimefm_edge.preprocess import PreprocessSpec
from dimefm_edge.students import CHECKPOINT_FILE, build_student, save_student, vit_spec
from dimefm_edge.targets import load_target

SPEC = vit_spec(image_size=32, embed_dim=16, patch_size=8, width=32, depth=2, num_heads=2)


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    save_student(tmp_path / CHECKPOINT_FILE, build_student(SPEC), SPEC, PreprocessSpec(32), {})
    return tmp_path


def keep(run_dir: Path, max_drop: float | None, evaluate) -> tuple[str, ...]:
    return keep_float_products(
        run_dir,
        target=load_target("x86-cpu"),
        images=np.random.default_rng(0).normal(size=(16, 3, 32, 32)).astype(np.float32),
        quant=QuantConfig(ptq="int8", max_drop=max_drop),
        evaluate=evaluate,
    )


def test_the_int8_stage_is_shorter_and_gentler():
    stage = int8_stage(TrainConfig(lr=1e-3, seed=3), 400, QuantConfig(qat="int8"))
    assert stage.steps == 120
    assert stage.lr == pytest.approx(1e-4)
    assert stage.ema_decay == 0.99
    assert stage.seed == 3


def test_nothing_is_kept_float_unless_it_is_asked_for(run_dir):
    assert keep(run_dir, None, None) == ()


def test_a_limit_needs_a_test_set_and_says_so_before_training():
    with pytest.raises(ConfigError, match="there is no test set") as said:
        require_int8(QuantConfig(ptq="int8", max_drop=0.5), (), load_target("x86-cpu"))
    assert "--eval-sets" in said.value.hint


def test_a_device_without_int8_is_refused_before_training(capsys):
    for stage in ("--qat", "--ptq"):
        words = ["distill", "--target", "jetson-nano", stage, "int8", "--dry-run"]
        assert cli.main(words) == 2
        said = capsys.readouterr().err
        assert "jetson-nano has no int8: NVIDIA Jetson Nano 4 GB runs fp16, fp32" in said
        assert "try: drop --qat and --ptq, or another --target" in said


def test_torchao_is_missed_before_training(monkeypatch):
    monkeypatch.setattr("dimefm_edge.precisions.find_spec", lambda name: None)
    with pytest.raises(MissingExtraError, match="int8 students need torchao") as said:
        require_int8(QuantConfig(qat="int8"), (), load_target("x86-cpu"))
    assert "dimefm_edge[train]" in said.value.hint


def test_products_are_kept_float_until_the_limit_holds_and_only_once_searched(run_dir):
    asked = []

    def evaluate(module: nn.Module) -> dict[str, float]:
        """As if int8 cost a point until half of the products are float."""
        points = [part for part in module.modules() if getattr(part, "is_rounding", None)]
        asked.append(len(points))
        return {"a": 80.0 if len(points) <= 13 else 78.0, "b": 60.0}

    kept = keep(run_dir, 0.5, evaluate)
    assert 1 < len(kept) < 13
    before = len(asked)
    assert keep(run_dir, 0.5, evaluate) == kept
    assert len(asked) == before


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--qat", "int8", "--precision", "fp16"], "cannot be both int8 and fp16"),
        (["--max-drop", "1"], "max_drop needs int8"),
        (["--calibration", "mse"], "calibration needs int8"),
        (["--precision", "int8"], "invalid choice 'int8'"),
        (["--qat", "int8", "--max-drop", "-1"], "max_drop must not be negative"),
        (["--qat", "int8", "--qat-steps-ratio", "0"], "qat_steps_ratio must be positive"),
        (["--qat", "int4"], "int4"),
    ],
)
def test_contradictions_are_bad_usage(flags, message, capsys):
    assert cli.main(["distill", *flags, "--dry-run", "--json"]) == 2
    assert message in json.loads(capsys.readouterr().out)["error"]


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_walk_ends_in_an_int8_bundle_with_its_table(
    tiny_teacher_dir, labelled_dir, tmp_path, capsys, caplog
):
    folder = tmp_path / "images"
    folder.mkdir()
    for index in range(48):
        scene_image(index).save(folder / f"{index:03d}.png")
    texts = tmp_path / "texts.txt"
    texts.write_text("".join(f"{scene_sentence(index)}\n" for index in range(30)))
    run_dir = tmp_path / "run"
    words = [
        "distill", "--teacher", str(tiny_teacher_dir), "--images", str(folder),
        "--texts", str(texts), "--eval-sets", str(labelled_dir), "--steps", "8",
        "--batch-size", "8", "--text-batch-size", "8", "--out", str(run_dir),
        "--student", "vit-p16-w32-d2", "--latency-ms", "9", "--target", "x86-cpu", "--qat", "int8",
        "--qat-steps-ratio", "0.5", "--max-drop", "100",
    ]  # fmt: skip
    assert cli.main([*words, "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    rows = {row["name"]: row for row in report["precisions"]}
    assert list(rows) == ["fp32", "int8 PTQ", "int8 QAT"]
    assert rows["int8 QAT"]["integer_products"] == rows["int8 PTQ"]["integer_products"] == 13
    assert rows["fp32"]["integer_products"] == 0
    assert rows["int8 PTQ"]["mean_cosine"] > 0.99
    assert report["precision"] == "int8"
    assert report["int8_training"]["steps"] == 4
    assert report["parity"]["min_cosine"] >= 0.999
    for name, precision in (("bundle", "int8"), ("bundle-ptq", "int8"), ("bundle-fp32", "fp32")):
        manifest = json.loads((run_dir / name / MANIFEST_FILE).read_text())
        assert manifest["precision"] == precision
        rules = (manifest["quantization"] or {}).get("rules")
        assert rules == ("onnxruntime-x86-avx2" if precision == "int8" else None)
    assert "| int8 QAT |" in (run_dir / "report.md").read_text()
    made = load_trained_int8(run_dir, "onnxruntime-x86-avx2")
    assert made is not None
    assert load_trained_int8(run_dir, "tensorrt") is None
    assert "was trained in int8 for onnxruntime-x86-avx2; for tensorrt its float" in caplog.text
    assert load_trained_int8(tmp_path, "tensorrt") is None
    out = tmp_path / "again"
    words = ["export", str(run_dir), "--precision", "int8", "--target", "x86-cpu", "--image-only"]
    assert cli.main([*words, "--out", str(out), "--json"]) == 0
    weights = [(path / "model.onnx").read_bytes() for path in (out, run_dir / "bundle")]
    assert weights[0] == weights[1]
