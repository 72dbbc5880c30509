"""The Triton kernels, forward, packed, int8 and backward, under Triton's interpreter.

Against float64, at awkward shapes; also _attention_backward_triton.py. Not bfloat16: the
interpreter multiplies its bits as whole numbers.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("torch")
pytest.importorskip("triton")

ROOT = Path(__file__).parents[2]
# Rounding of the output and, inside, of the probabilities to the dtype; gradients relative.
TOLERANCES = {
    "float32": {"out": 1e-6, "packed": 0.0, "lse": 3e-6, "grad": 2e-6},
    "float16": {"out": 1e-3, "packed": 0.0, "lse": 3e-6, "grad": 2e-3},
    "int8": {"half": 1.0, "int8": 1.0},
}


def _errors(*cases, **settings):
    """Of each case; in a process of its own, since triton asks for the interpreter at import."""
    env = {**os.environ, **settings, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    env["PYTHONPATH"] = f"{ROOT}{os.pathsep}{ROOT / 'kernels'}"
    script = Path(__file__).with_name("interpreted.py")
    done = subprocess.run(
        [sys.executable, str(script), *cases], env=env, capture_output=True, text=True, timeout=280
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout)


def _check(*cases, **settings):
    found = _errors(*cases, **settings)
    assert list(found) == list(cases)
    for case, errors in found.items():
        allowed = TOLERANCES[case.split(",")[-1]]
        assert errors.keys() == allowed.keys()
        for name, value in errors.items():
            assert value <= allowed[name], f"{case}: {name} {value} > {allowed[name]}"


def test_kernels_match_float64():
    """Small N with one tile, head_dim of two parts, of padding, odd batches, every dtype."""
    _check(
        "3,2,17,32,float32", "1,1,50,96,float32", "1,1,65,64,float16",
        "3,1,17,32,int8", "1,1,50,96,int8",
    )  # fmt: skip


@pytest.mark.parametrize("busy", ["1", "1000"])
def test_tiles_of_hopper(busy):
    """One block of 128 queries, or two of 64, and a tail of each kind of key tile."""
    _check("1,1,113,64,float16", "2,1,65,32,float16", CAPABILITY="90", HOPPER_BUSY=busy)


def test_int8_of_hopper_has_all_keys_at_once():
    """One, two and three tiles of keys; several heads a program; a head_dim with padding."""
    _check("3,1,17,32,int8", "1,3,65,64,int8", "1,1,225,48,int8", CAPABILITY="90")


@pytest.mark.slow
@pytest.mark.parametrize("head_dim", [32, 64])
def test_int8_of_hopper_at_every_shape(head_dim):
    shapes = (f"2,2,{tokens},{head_dim},int8" for tokens in (49, 50, 128, 197, 256, 257))
    _check(*shapes, CAPABILITY="90")


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "float16", "int8"])
@pytest.mark.parametrize("head_dim", [32, 64, 96, 128])
@pytest.mark.parametrize("num_tokens", [17, 49, 50, 197, 257])
def test_kernels_match_float64_at_every_shape(num_tokens, head_dim, dtype):
    batch = 3 if num_tokens < 100 else 1
    if (dtype, head_dim) != ("float32", 128):  # not a shape of the kernels: tiles.is_supported
        _check(f"{batch},1,{num_tokens},{head_dim},{dtype}")


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float16", "int8"])
def test_kernels_match_float64_at_577_tokens(dtype):
    _check(f"1,1,577,64,{dtype}")
