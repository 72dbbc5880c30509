"""Models made ready: exported by us, by torch alone, quantised by ONNX Runtime."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from dataclasses import asdict

import numpy as np
import onnx
import pytest

from dimefm_edge.bench.prepare import Prepared, image_module, prepare
from dimefm_edge.bench.specs import parse_subjects
from dimefm_edge.errors import ExportError, UnknownNameError


def prepared(word, folder, **settings) -> Prepared:
    folder.mkdir(exist_ok=True)
    (spec,) = parse_subjects([word])
    return prepare(spec, folder, **settings)


def test_our_graph_the_plain_one_and_dynamic_int8(prepared_run):
    from onnxruntime import InferenceSession

    answers = {}
    image = np.random.default_rng(0).normal(size=(2, 3, 32, 32)).astype(np.float32)
    for runtime in ("onnxruntime", "plain", "dynamic-int8"):
        made = prepared_run(runtime)
        assert (made.loader, made.runtime, made.image_size) == ("onnx", "ONNX Runtime", 32)
        assert made.size_mib > 0
        assert made.params_m > 0
        session = InferenceSession(made.path)
        answers[runtime] = session.run(None, {"image": image})[0]
    assert np.abs(answers["plain"] - answers["onnxruntime"]).max() < 1e-5
    difference = np.abs(answers["dynamic-int8"] - answers["onnxruntime"]).max()
    assert 1e-5 < difference < 0.2


def test_torch_and_timm(tmp_path):
    made = prepared("timm:vit_tiny_patch16_224@eager", tmp_path / "t")
    assert (made.loader, made.option, made.runtime) == ("torch", "eager", "PyTorch")
    assert made.image_size == 224
    assert made.params_m == pytest.approx(5.5, abs=0.1)
    compiled = prepared("sample@compile", tmp_path / "c")
    assert (compiled.option, compiled.runtime) == ("compile", "torch.compile")
    with pytest.raises(UnknownNameError, match="unknown timm model 'vit_tinny"):
        prepared("timm:vit_tinny_patch16_224", tmp_path / "u")


def test_random_weights_are_the_same_for_the_same_seed():
    weights = [
        next(image_module("timm:vit_tiny_patch16_224", "timm", seed=seed)[0].parameters())
        for seed in (3, 3, 4)
    ]
    assert (weights[0] == weights[1]).all()
    assert (weights[0] != weights[2]).any()


def test_a_bundle(tiny_bundle_dir, tmp_path):
    made = prepared(str(tiny_bundle_dir), tmp_path / "b")
    assert (made.loader, made.option) == ("bundle", "onnxruntime")
    assert made.preprocess["image_size"] == 32
    for runtime in ("openvino", "dynamic-int8"):
        other = prepared(f"{tiny_bundle_dir}@{runtime}", tmp_path / runtime)
        assert other.preprocess == made.preprocess


def test_a_bundle_in_8_bits_for_another_cpu_is_told(tiny_bundle_dir, tmp_path, monkeypatch, caplog):
    from dimefm_edge.runtime import engines

    engines._tell_once.cache_clear()
    bundle = tmp_path / "bundle"
    shutil.copytree(tiny_bundle_dir, bundle)
    manifest = json.loads((bundle / "manifest.json").read_text())
    manifest["quantization"] = {"rules": "tensorrt"}
    (bundle / "manifest.json").write_text(json.dumps(manifest))
    prepared(str(bundle), tmp_path / "b")
    assert "is made for tensorrt and this CPU wants " in caplog.text


def test_a_graph_that_cannot_be_quantised(tmp_path):
    path = tmp_path / "bad.onnx"
    path.write_bytes(b"not a graph")
    with pytest.raises(ExportError, match=r"ONNX Runtime cannot quantise bad\.onnx"):
        prepared(f"{path}@dynamic-int8", tmp_path / "q")


def test_as_a_process(tiny_bundle_dir, tmp_path):
    (spec,) = parse_subjects([str(tiny_bundle_dir)])
    request = {"spec": asdict(spec), "folder": str(tmp_path), "seed": 0}

    def ask(**changed):
        words = json.dumps(request | changed)
        command = [sys.executable, "-m", "dimefm_edge.bench.prepare", words]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        return done.returncode, json.loads(done.stdout)

    code, answer = ask()
    assert code == 0
    assert Prepared(**answer).kind == "bundle"
    code, answer = ask(spec=asdict(spec) | {"name": str(tmp_path / "gone")})
    assert code == 2
    assert answer["kind"] == "CheckpointError"


def test_a_file_of_ours_tells_its_precision(foreign_graph, tmp_path):
    model = onnx.load(str(foreign_graph))
    onnx.helper.set_model_props(model, {"producer": "dimefm_edge", "precision": "int8"})
    ours = tmp_path / "ours.onnx"
    onnx.save(model, str(ours))
    for path, precision in ((foreign_graph, "fp32"), (ours, "int8")):
        (spec,) = parse_subjects([str(path)])
        assert prepare(spec, tmp_path).precision == precision
