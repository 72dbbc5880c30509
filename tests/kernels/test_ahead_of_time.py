"""Kernels compiled for GPUs that are not here, and what ptxas says that they take."""

from __future__ import annotations

import json
import re
import sys

import pytest

pytest.importorskip("torch")
pytest.importorskip("triton")

from dimefm_kernels import ahead_of_time
from dimefm_kernels.ahead_of_time import (
    KernelSpec,
    compile_kernels,
    drop_scratch,
    vit_specs,
)

VIT_TINY = KernelSpec(197, 64, 3, "fp16")
VIT_BASE_32 = KernelSpec(50, 64, 12, "int8")


@pytest.fixture(scope="module")
def orin(tmp_path_factory):
    """(folder, records) of two kernels for Orin."""
    folder = tmp_path_factory.mktemp("orin")
    return folder, compile_kernels(87, folder, specs=[VIT_TINY, VIT_BASE_32])


def test_no_spills_on_orin(orin):
    folder, records = orin
    assert [record.name for record in records] == [
        "attention_fp16_n197_d64_h3", "attention_int8_n50_d64_h12",
    ]  # fmt: skip
    for record in records:
        assert record.spill_bytes == 0
        assert 0 < record.num_registers <= 255
        assert 0 < record.shared_bytes <= 163 * 1024
        assert (folder / record.cubin).read_bytes().startswith(b"\x7fELF")
    assert [record.grid_x for record in records] == [4, 1]


def test_ptx_is_what_jetpack_6_reads_and_takes_three_arguments(orin):
    folder, records = orin
    for record in records:
        ptx = (folder / record.ptx).read_text()
        assert re.search(r"^\.version 8\.5$", ptx, flags=re.MULTILINE)
        assert re.search(r"^\.target sm_87$", ptx, flags=re.MULTILINE)
        head = re.search(rf"\.entry {record.entry}\((.*?)\)", ptx, flags=re.DOTALL)[1]
        kinds = re.findall(r"\.param \.(\w+)", head)
        assert kinds == ["u64", "u32", "u64"]  # qkv, B * H, out


def test_loads_go_to_shared_memory_by_themselves(orin):
    """Triton pipelines a plain loop only: cp.async shows that it did."""
    folder, records = orin
    for record in records:
        assert "cp.async.c" in (folder / record.ptx).read_text()


@pytest.mark.slow
@pytest.mark.parametrize("capability", [90, 110])
def test_other_devices(capability, tmp_path):
    (record,) = compile_kernels(capability, tmp_path, specs=[VIT_TINY])
    assert record.spill_bytes == 0
    assert record.cubin.endswith(f".sm{capability}.cubin")


@pytest.mark.slow
@pytest.mark.parametrize("spec", vit_specs(), ids=lambda spec: spec.name)
def test_nothing_that_ships_spills_on_orin(spec, tmp_path):
    (record,) = compile_kernels(87, tmp_path, specs=[spec])
    assert record.spill_bytes == 0


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp16", "bf16"])
@pytest.mark.parametrize("head_dim", [32, 64, 96, 128])
@pytest.mark.parametrize("num_tokens", [50, 197, 577])
def test_backward_does_not_spill_on_orin(num_tokens, head_dim, precision, tmp_path):
    spec = KernelSpec(num_tokens, head_dim, 6, precision, is_backward=True)
    records = compile_kernels(87, tmp_path, specs=[spec])
    assert [record.name[-2:] for record in records] == ["_q", "kv"]
    assert [record.spill_bytes for record in records] == [0, 0]


def test_what_ships_is_what_the_issue_asks_for():
    specs = vit_specs()
    assert {spec.num_tokens for spec in specs} == {17, 50, 65, 197, 257, 577}
    assert {spec.head_dim for spec in specs} == {32, 64, 96, 128}
    assert len({spec.name for spec in specs}) == len(specs)


def test_scratch_is_dropped_only_where_it_is_not_read():
    head = ".visible .entry k(\n\t.param .u64 k_param_0,\n\t.param .u64 k_param_1\n)\n"
    unread = head + "{ ld.param.b64 %rd1, [k_param_0]; ret; }"
    assert "k_param_1" not in drop_scratch(unread)
    read = head + "{ ld.param.b64 %rd1, [k_param_1]; ret; }"
    assert drop_scratch(read).split() == read.split()


def test_json_is_one_object(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(ahead_of_time, "vit_specs", lambda: [VIT_BASE_32])
    monkeypatch.setattr(sys, "argv", ["x", "--sm", "87", "--out", str(tmp_path), "--json"])
    ahead_of_time.main()
    (kernel,) = json.loads(capsys.readouterr().out)["kernels"]
    assert kernel["spill_bytes"] == 0
    assert (tmp_path / kernel["cubin"]).is_file()


@pytest.mark.parametrize(
    ("capability", "precision", "message"),
    [(75, "fp16", "sm_75 is too old"), (87, "fp8", "unknown precision 'fp8': fp32, fp16")],
)
def test_what_cannot_be_compiled_is_refused(capability, precision, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        compile_kernels(capability, tmp_path, specs=[KernelSpec(50, 64, 3, precision)])
