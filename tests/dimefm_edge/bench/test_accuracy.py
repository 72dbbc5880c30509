"""Accuracy beside the times is what `eval` says."""

from __future__ import annotations

import json

import pytest

from dimefm_edge import cli
from dimefm_edge.bench.accuracy import zero_shot_top1
from dimefm_edge.bench.specs import parse_subjects
from dimefm_edge.errors import DimeFMError


def top1(word, *data, limit_s=100.0):
    (spec,) = parse_subjects([str(word)])
    return zero_shot_top1(spec, [str(d) for d in data], limit_s=limit_s)


def test_a_bundle(tiny_bundle_dir, labelled_dir, capsys):
    assert cli.main(["eval", str(tiny_bundle_dir), "--data", str(labelled_dir), "--json"]) == 0
    (row,) = json.loads(capsys.readouterr().out)["results"]
    assert top1(tiny_bundle_dir, labelled_dir) == {row["name"]: row["top1_pct"]}


def test_what_eval_cannot_tell(tiny_bundle_dir, labelled_dir, tmp_path):
    with pytest.raises(DimeFMError, match=r"accuracy: .*gone"):
        top1(tiny_bundle_dir, tmp_path / "gone")
    with pytest.raises(DimeFMError, match="eval does not run dynamic-int8"):
        top1(f"{tiny_bundle_dir}@dynamic-int8", labelled_dir)
    with pytest.raises(DimeFMError, match="took longer than 0 s"):
        top1(tiny_bundle_dir, labelled_dir, limit_s=0.01)
