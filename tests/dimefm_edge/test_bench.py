"""Models timed side by side: any kind, one runtime, memory of their own."""

from __future__ import annotations

import pytest

from dimefm_edge import cli
from dimefm_edge.bench import bench_models, onnx_call
from dimefm_edge.errors import CheckpointError, InputError

FIELDS = ("p50_ms", "p90_ms", "p99_ms", "images_per_s", "size_mib", "ratio")


def test_teacher_run_bundle_and_foreign_graph(
    tiny_teacher_dir, tiny_run_dir, tiny_bundle_dir, tmp_path
):
    from onnx import TensorProto, helper, save

    shape = ["n", 3, "h", "w"]
    graph = helper.make_graph(
        [helper.make_node("Relu", ["x"], ["y"])],
        "foreign",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, shape)],
    )
    opset = [helper.make_opsetid("", 17)]
    foreign = tmp_path / "foreign.onnx"
    save(helper.make_model(graph, opset_imports=opset, ir_version=9), foreign)
    names = [str(p) for p in (tiny_teacher_dir, tiny_run_dir, tiny_bundle_dir, foreign)]
    rows = bench_models(names, tmp_path / "work", batch_size=2, threads=1, seconds=0.2)
    assert [row.latency.name for row in rows] == names
    assert rows[0].ratio == 1.0
    for row in rows:
        values = row.to_dict()
        assert values["runtime"] == "ONNX Runtime"
        assert values["batch_size"] == 2
        assert all(values[name] > 0 for name in FIELDS)
        assert values["memory_mib"] > 0
        assert row.ratio == pytest.approx(row.latency.p50_ms / rows[0].latency.p50_ms)
        assert values["p50_ms"] <= values["p90_ms"] <= values["p99_ms"]


def test_a_bundle_of_pixels_and_a_fixed_batch(tiny_run_dir, tmp_path, capsys):
    bundle = str(tmp_path / "b")
    words = ["--input", "uint8", "--batch-size", "2", "--target", "local", "--out", bundle]
    assert cli.main(["export", str(tiny_run_dir), *words]) == 0
    for engine in ("onnxruntime", "onnxruntime:cpu"):
        work = tmp_path / engine
        (row,) = bench_models([bundle], work, batch_size=2, threads=1, seconds=0.1, engine=engine)
        assert row.to_dict()["images_per_s"] > 0
    with pytest.raises(InputError, match=r"takes batches of 2 only, not 1\n  try: --batch-size 2"):
        bench_models([bundle], tmp_path, threads=1, seconds=0.1)


@pytest.mark.parametrize(
    ("names", "options", "message"),
    [
        ([], {}, "no model was named"),
        (["a", "a"], {}, "a model is named twice"),
        (["a"], {"batch_size": 0}, "must be positive"),
        (["a"], {"seconds": 0}, "must be positive"),
    ],
)
def test_bad_requests(names, options, message, tmp_path):
    with pytest.raises(InputError, match=message):
        bench_models(names, tmp_path, **options)


def test_a_graph_that_cannot_run_is_named(tmp_path):
    path = tmp_path / "bad.onnx"
    with pytest.raises(CheckpointError, match="no ONNX file at"):
        onnx_call(path, batch_size=1, image_size=32, threads=1)
    path.write_bytes(b"not a graph")
    with pytest.raises(CheckpointError, match=r"ONNX Runtime cannot run .*bad\.onnx"):
        onnx_call(path, batch_size=1, image_size=32, threads=1)
