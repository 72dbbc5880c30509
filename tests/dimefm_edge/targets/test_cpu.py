"""Which int8 rules suit a CPU, told from what Linux says of it."""

from __future__ import annotations

from pathlib import Path

import pytest

from dimefm_edge.targets.cpu import (
    cpu_features,
    cpu_quant_rules,
    int8_products_saturate,
    unwanted_rewrites,
)

X86 = """processor\t: 0
vendor_id\t: GenuineIntel
flags\t\t: fpu sse4_2 avx2 avx512f avx512_vnni
bugs\t\t: spectre_v1
"""
ARM = """processor\t: 0
BogoMIPS\t: 108.00
Features\t: fp asimd evtstrm crc32 atomics fphp asimdhp cpuid asimdrdm lrcpc dcpop asimddp
CPU implementer\t: 0x41
"""


def test_features_are_read(tmp_path: Path) -> None:
    (tmp_path / "x86").write_text(X86)
    (tmp_path / "arm").write_text(ARM)
    (tmp_path / "other").write_bytes(b"\xff\x00 no such line")
    assert cpu_features(tmp_path / "x86") == {"fpu", "sse4_2", "avx2", "avx512f", "avx512_vnni"}
    assert "asimddp" in cpu_features(tmp_path / "arm")
    assert cpu_features(tmp_path / "other") == frozenset()
    assert cpu_features(tmp_path / "missing") == frozenset()


@pytest.mark.parametrize(
    ("machine", "features", "name"),
    [
        ("x86_64", {"avx2"}, "onnxruntime-x86-avx2"),
        ("x86_64", {"avx2", "avx512f", "avx512bw"}, "onnxruntime-x86-avx2"),
        ("AMD64", set(), "onnxruntime-x86-avx2"),
        ("x86_64", {"avx2", "avx512_vnni"}, "onnxruntime-x86"),
        ("x86_64", {"avx2", "avx_vnni"}, "onnxruntime-x86"),
        ("x86_64", {"amx_int8"}, "onnxruntime-x86"),
        ("aarch64", {"asimddp"}, "onnxruntime-arm"),
        ("ARM64", set(), "onnxruntime-arm"),
    ],
)
def test_rules_of_a_cpu(machine: str, features: set[str], name: str) -> None:
    assert cpu_quant_rules(machine, features) == name


def test_this_cpu_has_rules() -> None:
    assert cpu_quant_rules().startswith("onnxruntime-")
    assert int8_products_saturate() == (cpu_quant_rules() == "onnxruntime-x86-avx2")


def test_graphs_of_8_bits_are_run_as_they_are_written() -> None:
    assert set(unwanted_rewrites("int8")) < set(unwanted_rewrites("fp8"))
    assert unwanted_rewrites("fp32") == unwanted_rewrites("fp16") == []
