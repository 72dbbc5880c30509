"""Loaded models: the same images give the same embeddings in every runtime."""

from __future__ import annotations

import importlib.util

import numpy as np
import pytest

from dimefm_edge.bench.prepare import Prepared, prepare
from dimefm_edge.bench.runnable import LOADERS, Load, load_runnable, make_feed, stack
from dimefm_edge.bench.specs import parse_subjects
from dimefm_edge.errors import CheckpointError, InputError, MissingExtraError

RUNTIMES = ["onnxruntime", "plain", "eager"]
if importlib.util.find_spec("openvino"):
    RUNTIMES.append("openvino")


def loaded(word, folder, load=Load()):  # noqa: B008
    folder.mkdir(exist_ok=True)
    (spec,) = parse_subjects([word])
    return load_runnable(prepare(spec, folder), load)


def test_runtimes_agree(prepared_run, tiny_bundle_dir, tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, size=(2, 32, 32, 3)).astype(np.uint8)
    load = Load(batch_size=2)
    runnables = [loaded(str(tiny_bundle_dir), tmp_path / "b", load)]
    runnables += [load_runnable(prepared_run(runtime), load) for runtime in RUNTIMES]
    answers = []
    for runnable in runnables:
        assert runnable.of_pixels is not None
        answers.append(np.asarray(runnable.run(runnable.of_pixels(pixels))))
    for answer in answers[1:]:
        assert np.abs(answer - answers[0]).max() < 1e-4


def test_random_inputs_are_of_the_graph(foreign_graph, tmp_path):
    load = Load(batch_size=3, image_size=48)
    runnable = loaded(str(foreign_graph), tmp_path / "f", load)
    feed = make_feed(runnable, load)
    assert feed["x"].shape == (3, 3, 48, 32)
    assert (make_feed(runnable, load)["x"] == feed["x"]).all()
    assert runnable.of_pixels is None
    assert stack([feed, feed])["x"].shape[0] == 6


def test_a_fixed_batch(tiny_run_dir, tmp_path):
    from dimefm_edge import cli

    bundle = tmp_path / "b"
    words = ["--batch-size", "2", "--input", "uint8", "--target", "local", "--out", str(bundle)]
    assert cli.main(["export", str(tiny_run_dir), *words]) == 0
    for word in (str(bundle), str(bundle / "model.onnx"), f"{bundle}@onnxruntime:cpu"):
        runnable = loaded(word, tmp_path / "x", Load(batch_size=2))
        assert runnable.fixed_batch == 2
        with pytest.raises(InputError, match=r"of 2 only, not 1\n  try: --batch-size"):
            loaded(word, tmp_path / "x")


def test_damaged_and_missing_graphs(tmp_path):
    path = tmp_path / "bad.onnx"
    for loader in ("onnx", "openvino"):
        prepared = Prepared(loader, "", str(path), "onnx", "cpu")
        if loader == "onnx":
            with pytest.raises(CheckpointError, match="no ONNX file at"):
                load_runnable(prepared, Load())
        path.write_bytes(b"not a graph")
        with pytest.raises((CheckpointError, MissingExtraError), match=r"cannot load|not inst"):
            load_runnable(prepared, Load())
        path.unlink()


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("x = 1", "has no function make"),
        ("def make(batch_size): return 3", "gave no call to time"),
    ],
)
def test_a_users_own_function(body, message, tmp_path):
    path = tmp_path / "mine.py"
    path.write_text(body)
    with pytest.raises(InputError, match=message):
        load_runnable(Prepared("python", "", f"{path}:make", "python"), Load())
    path.write_text("def make(batch_size): return lambda: batch_size")
    runnable = load_runnable(Prepared("python", "", f"{path}:make", "python"), Load(batch_size=5))
    assert runnable.run(make_feed(runnable, Load())) == 5


def test_every_loader_is_named_by_what_prepares():
    assert set(LOADERS) == {"bundle", "onnx", "openvino", "torch", "python"}
