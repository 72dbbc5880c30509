"""JSON there and back, CSV with every field, damaged files."""

from __future__ import annotations

import contextlib
import csv
import io
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dimefm_edge.bench.results import BenchResult, SubjectResult, load_json, to_csv, write_json
from dimefm_edge.errors import InputError


def result() -> BenchResult:
    subject = SubjectResult(
        "a, b", "ONNX Runtime", "measured", rounds_ms=[1.0, 2.0], p50_ms=1.5, top1_pct={"s": 50.0},
        stages_ms={"read": 0.1}, end_to_end={"ratio": 1.0},
        scenarios=[{"scenario": "offline", "samples_per_s": 7.0, "is_valid": True}],
    )  # fmt: skip
    machine = {"cpu": "EPYC", "commit": "abc", "versions": {"onnxruntime": "1.32"}}
    return BenchResult([subject], machine, {"seconds": 2.0, "seed": 0}, starts=[1])


def test_there_and_back(tmp_path):
    write_json(result(), tmp_path / "b.json")
    assert load_json(tmp_path / "b.json") == result()


def test_what_a_later_version_adds_is_left_out(tmp_path):
    values = result().to_dict()
    values["subjects"][0]["colour"] = "red"
    (tmp_path / "b.json").write_text(json.dumps(values | {"mood": "good"}))
    assert load_json(tmp_path / "b.json") == result()


def test_csv_has_the_figures_and_where_they_are_from():
    (row,) = csv.DictReader(io.StringIO(to_csv(result())))
    assert row["label"] == "a, b"
    assert (row["p50_ms"], row["top1_pct.s"], row["stages_ms.read"]) == ("1.5", "50.0", "0.1")
    assert (row["offline.samples_per_s"], row["offline.is_valid"]) == ("7.0", "True")
    assert (row["device"], row["commit"], row["onnxruntime"]) == ("EPYC", "abc", "1.32")
    assert "rounds_ms" not in row


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "is not JSON"),
        ("[]", "is not the result of a bench of this version"),
        ('{"format": 1}', "is not the result of a bench: 'subjects'"),
        ('{"format": 1, "subjects": [{}], "machine": {}, "config": {}}', "label"),
        ('{"format": 99, "subjects": []}', "of this version"),
    ],
)
def test_damaged_files(text, message, tmp_path):
    (tmp_path / "b.json").write_text(text)
    with pytest.raises(InputError, match=message):
        load_json(tmp_path / "b.json")


def test_no_file(tmp_path):
    with pytest.raises(InputError, match="No such file"):
        load_json(tmp_path / "gone.json")


@given(st.recursive(st.none() | st.booleans() | st.integers() | st.text(), lambda inner: (
    st.lists(inner) | st.dictionaries(st.sampled_from(["format", "subjects", "machine", "config"]),
                                      inner))))  # fmt: skip
def test_any_json_is_a_result_or_an_error_of_ours(tmp_path_factory, value):
    path = tmp_path_factory.mktemp("fuzz") / "b.json"
    path.write_text(json.dumps(value))
    with contextlib.suppress(InputError):
        load_json(path)
