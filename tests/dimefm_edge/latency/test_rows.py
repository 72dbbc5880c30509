"""Tables of estimates: every row gets an answer or a reason."""

from __future__ import annotations

import csv
import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dimefm_edge.errors import InputError
from dimefm_edge.latency.operators import Operator
from dimefm_edge.latency.rows import ADDED, TraceCache, count_rows, estimate_rows

HEADER = ["device", "runtime", "precision", "batch", "timm_name_if_any", "resolution", "note"]
NANO = ["Jetson Nano 4GB", "TensorRT", "fp16"]


def write(path, rows, header=HEADER):
    with path.open("w", newline="") as stream:
        csv.writer(stream).writerows([header, *rows])
    return path


def read(path):
    with path.open(newline="") as stream:
        return list(csv.DictReader(stream))


def test_rows_are_estimated_and_bad_ones_harm_no_other(tmp_path):
    source = write(tmp_path / "in.csv", [
        [*NANO, "1", "resnet18", "224", "as published"],
        [*NANO, "", "resnet18", "", "holes: batch 1, the model's own size"],
        ["Toaster", "TensorRT", "fp16", "1", "resnet18", "224", ""],
        [*NANO, "1", "resnet19", "224", ""],
        [*NANO, "1", "", "224", ""],
        [*NANO, "two", "resnet18", "224", ""],
        [*NANO, "1", "vit_tiny_patch16_224", "9", ""],
        ["Jetson Nano 4GB", "", "fp16", "1", "resnet18", "224", ""],
        [*NANO, "8", "resnet18", "224.0", "a batch"],
    ])  # fmt: skip
    seen = []
    report = estimate_rows(
        source, tmp_path / "new" / "out.csv", cache=TraceCache(tmp_path), advance=seen.append
    )
    rows = read(tmp_path / "new" / "out.csv")
    assert list(rows[0]) == HEADER + list(ADDED)
    assert (report.rows, report.estimated, len(seen), count_rows(source)) == (9, 3, 9, 9)
    assert rows[0]["note"] == "as published"
    for row in (rows[0], rows[1], rows[8]):
        low, value, high = (float(row[c]) for c in ("low_ms", "predicted_ms", "high_ms"))
        assert 0 < low < value < high
        assert row["basis"] == "published"
    assert rows[0]["predicted_ms"] == rows[1]["predicted_ms"]
    assert 2 < float(rows[8]["predicted_ms"]) / float(rows[0]["predicted_ms"]) < 8
    reasons = [row["basis"] for row in rows[2:8]]
    for reason, part in zip(
        reasons,
        ("unknown device", "unknown timm model 'resnet19'", "names no timm model",
         "batch must be a whole number", "cannot be traced at 9 px", "no runtime"),
        strict=True,
    ):  # fmt: skip
        assert reason.startswith("error: ")
        assert part in reason
    assert [line for line, _ in report.errors] == [4, 5, 6, 7, 8, 9]


def test_errors_name_the_line_of_the_file(tmp_path):
    """Blank lines and line breaks in quotes count, as they do in an editor."""
    lines = [
        "device,runtime,precision,timm_name,note",
        "",
        "Toaster,TensorRT,fp16,resnet18,",
        "",
        "",
        'Toaster,TensorRT,fp16,resnet18,"two\nlines"',
        "Toaster,TensorRT,fp16,resnet18,",
    ]
    (tmp_path / "in.csv").write_text("\n".join(lines))
    report = estimate_rows(tmp_path / "in.csv", tmp_path / "out.csv", cache=TraceCache(tmp_path))
    assert [line for line, _ in report.errors] == [3, 7, 8]
    assert len(read(tmp_path / "out.csv")) == count_rows(tmp_path / "in.csv") == 3


def test_a_published_latency_is_near(tmp_path):
    """torch2trt's ResNet-18 on the Jetson Nano: 11.0 ms (docs/benchmarks/jetson_nano.md)."""
    row = ["Jetson Nano 4GB", "TensorRT (torch2trt)", "fp16", "1", "resnet18", "224", ""]
    source = write(tmp_path / "in.csv", [row])
    estimate_rows(source, tmp_path / "out.csv", cache=TraceCache(tmp_path))
    (row,) = read(tmp_path / "out.csv")
    assert float(row["predicted_ms"]) == pytest.approx(11.0, rel=0.5)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a,b\n1,2\n", "lacks the column device, runtime, precision, timm_name_if_any"),
        ("device,runtime,precision\nx,y,z\n", "lacks the column timm_name_if_any"),
        ("", "lacks the column device"),
        ("device;runtime;precision;timm_name\nx;y;z;t\n", "looks separated by ';'"),
    ],
)
def test_tables_without_their_columns_are_refused(tmp_path, text, message):
    (tmp_path / "in.csv").write_text(text)
    with pytest.raises(InputError, match=message):
        estimate_rows(tmp_path / "in.csv", tmp_path / "out.csv")
    assert not (tmp_path / "out.csv").exists()


def test_missing_and_unwritable_files_are_told(tmp_path):
    with pytest.raises(InputError, match="no file at"):
        estimate_rows(tmp_path / "none.csv", tmp_path / "out.csv")
    source = write(tmp_path / "in.csv", [])
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot be written"):
        estimate_rows(source, tmp_path / "file" / "out.csv", cache=TraceCache(tmp_path))


@settings(max_examples=60, deadline=None)
@given(junk=st.binary(max_size=300))
def test_junk_is_refused_or_answered_row_by_row(junk, tmp_path_factory):
    folder = tmp_path_factory.mktemp("junk")
    header = b"device,runtime,precision,timm_name\n"
    (folder / "in.csv").write_bytes(header + junk)
    try:
        report = estimate_rows(folder / "in.csv", folder / "out.csv", cache=TraceCache(folder))
    except InputError:
        return
    assert report.estimated + len(report.errors) == report.rows == len(read(folder / "out.csv"))


def test_traces_are_kept_and_a_cut_cache_is_only_made_anew(tmp_path):
    calls = []

    def trace(name, size, batch):
        calls.append((name, size, batch))
        return [Operator("x", "linear", macs=1e6 * batch)]

    cache = TraceCache(tmp_path)
    first = cache.costs("net@32", 2, trace=trace)
    cache.save()
    again = TraceCache(tmp_path)
    assert (again.costs("net@32", 2, trace=trace) == first).all()
    assert calls == [("net", 32, 2)]
    assert json.loads(cache.path.read_text())
    cache.path.write_text(cache.path.read_text()[:-5])
    TraceCache(tmp_path).costs("net@32", 2, trace=trace)
    assert len(calls) == 2
