"""benchmarks/bench_attention.py and gpu_attention.py, as far as a CPU goes: shapes, floors, and
the checks, which run on torch's own attention here and must also be able to fail.
"""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def scripts(monkeypatch):
    """(bench_attention, gpu_attention) as their own folder imports them."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    names = ("bench_attention", "gpu_attention")
    yield [importlib.import_module(name) for name in names]
    for name in names:
        sys.modules.pop(name)


def test_shapes_are_the_vits(scripts):
    shapes = scripts[0].vit_shapes((1, 64))
    assert len(shapes) == 3 * 3 * 2
    assert {(s.model, s.num_tokens, s.num_heads) for s in shapes} >= {
        ("ViT-Ti/32", 50, 3), ("ViT-S/16", 197, 6), ("ViT-B/14", 257, 12),
    }  # fmt: skip
    checked = scripts[1].checked_shapes()
    assert {s.num_tokens for s in checked} == {17, 49, 50, 65, 197, 257, 577}
    assert {s.head_dim for s in checked} == {32, 64, 96, 128}


def test_floor(scripts):
    (shape,) = [s for s in scripts[0].vit_shapes((8,)) if s.model == "ViT-B/16"]
    assert shape.flop == 4 * 8 * 12 * 197 * 197 * 64
    assert shape.bytes_moved(2) == 4 * 2 * 8 * 197 * 768
    memory_bound = {"tflops": 1000.0, "gbs": 1.0}
    assert scripts[0].floor_ms(shape, memory_bound, 2) == pytest.approx(9.68, abs=0.01)
    compute_bound = {"tflops": 1.0, "gbs": 1e6}
    assert scripts[0].floor_ms(shape, compute_bound, 2) == pytest.approx(0.954, abs=0.001)


def test_bench_on_a_cpu(scripts):
    pytest.importorskip("onnxruntime")
    shapes = [scripts[0].Shape("small", 2, 17, 2, 16)]
    values = scripts[0].bench(shapes, "cpu", torch.float32, rounds=3, compiled=False)
    row = values["small_b2"]
    assert {"fused", "sdpa_math", "onnxruntime"} <= row["ms"].keys()
    assert min(row["ms"].values()) > 0
    assert row["floor_ms"] > 0


def test_every_subject_gives_the_same_answer(scripts):
    pytest.importorskip("onnxruntime")
    qkv = torch.randn(2, 17, 3 * 2 * 16)
    answers = {
        name: torch.as_tensor(call())
        for name, call in scripts[0].subjects(qkv, 2, compiled=False).items()
    }
    for name, answer in answers.items():
        torch.testing.assert_close(answer, answers["fused"], atol=1e-5, rtol=0, msg=name)


def test_checks_pass_on_what_is_right_and_fail_on_what_is_not(scripts, monkeypatch):
    gpu = scripts[1]
    shapes = [gpu.Shape("n17", 3, 17, 2, 32)]
    kept = []
    found = gpu.check(shapes, "cpu", keep=kept.append)
    assert kept == [found]
    assert found.keys() == {"n17_b3_float32", "n17_b3_float16", "n17_b3_bfloat16", "n17_b3_int8"}
    assert all(max(errors.values()) <= 1 for errors in found.values())
    right, right_int8 = gpu.fused_attention_qkv, gpu.fused_attention_qkv_int8
    monkeypatch.setattr(gpu, "fused_attention_qkv", lambda x, h: right(x, h) * torch.nan)
    monkeypatch.setattr(
        gpu, "fused_attention_qkv_int8", lambda *args, **kwargs: right_int8(*args, **kwargs) * 2
    )
    wrong = gpu.check(shapes, "cpu")
    assert all(max(errors.values()) > 1 for errors in wrong.values())
    nothing = {"forward": {}, "int8": {}, "backward": {}, "encoders": {}}
    assert "all 4 are right" in gpu.table({**nothing, "checks": found})
    assert "WRONG: n17_b3_float32, " in gpu.table({**nothing, "checks": wrong})


def test_arguments(scripts, monkeypatch, tmp_path):
    monkeypatch.setenv("OUT", str(tmp_path))
    args = scripts[1].parse(["--quick"])
    assert args.out == tmp_path / "gpu_attention.json"
    assert args.quick
    assert not args.check_only


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is here")
def test_without_a_gpu_it_says_so(scripts, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["gpu_attention.py"])
    with pytest.raises(SystemExit, match="needs a CUDA device"):
        scripts[1].main()
