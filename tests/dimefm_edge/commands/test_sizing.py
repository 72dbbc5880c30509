"""How big and quick models are: from files, from reports of runs, and measured."""

from __future__ import annotations

import json
import shutil

import pytest

from dimefm_edge.commands.sizing import count_params, find_latencies, reported_latencies
from dimefm_edge.errors import InputError
from dimefm_edge.subjects import load_subject


def write_report(folder, teacher: str, bundle: str, *, cpu: str = "Some CPU"):
    values = {
        "teacher": {"name": teacher, "here_p50_ms": 12.5, "target_ms": 1.5},
        "student": {"name": "vit", "here_p50_ms": 3.25, "target_ms": 0.75},
        "machine": {"cpu": cpu},
        "target": "jetson-agx-orin@30w",
        "bundle": bundle,
    }
    (folder / "report.json").write_text(json.dumps(values))


@pytest.fixture
def run_dir(tmp_path, tiny_run_dir, tiny_bundle_dir):
    folder = tmp_path / "run"
    shutil.copytree(tiny_run_dir, folder)
    shutil.copytree(tiny_bundle_dir, folder / "bundle")
    shutil.copytree(tiny_bundle_dir, folder / "bundle-int8")
    write_report(folder, "sample", "somewhere/bundle")
    return folder


def test_parameters_of_every_kind(tiny_teacher_dir, tiny_run_dir, tiny_bundle_dir):
    """The bundle's graph has the weights of the run's student, some folded together."""
    from dimefm_edge.students import load_student

    student = load_student(tiny_run_dir).student
    wanted = sum(p.numel() for p in student.parameters()) / 1e6
    run = count_params(load_subject(tiny_run_dir, device="cpu"))
    assert run == pytest.approx(wanted)
    assert count_params(load_subject(tiny_bundle_dir)) == pytest.approx(wanted, rel=0.1)
    graph = load_subject(tiny_bundle_dir / "model.onnx")
    assert count_params(graph) == count_params(load_subject(tiny_bundle_dir))
    teacher = load_subject(tiny_teacher_dir, device="cpu")
    assert count_params(teacher) > wanted


def test_reports_tell_of_runs_bundles_and_their_teacher(run_dir):
    bundle = run_dir / "bundle"
    cpu, found = reported_latencies(["sample", str(run_dir), str(bundle)])
    assert cpu == "Some CPU"
    assert found == {"sample": 12.5, str(run_dir): 3.25, str(bundle): 3.25}
    assert find_latencies(["sample", str(run_dir)], "auto", engine="onnxruntime")[0] == "Some CPU"
    where, found = find_latencies(["sample", str(bundle)], "estimated", engine="onnxruntime")
    assert where == "jetson-agx-orin@30w, estimated"
    assert found == {"sample": 1.5, str(bundle): 0.75}
    assert find_latencies(["sample"], "none", engine="onnxruntime") == ("", {})


def test_reports_do_not_tell_of_others(run_dir, tmp_path):
    with pytest.raises(InputError, match="no report says how quick other-teacher is") as caught:
        find_latencies([str(run_dir), "other-teacher"], "reported", engine="onnxruntime")
    assert "--latency measured" in str(caught.value.hint)
    with pytest.raises(InputError, match="bundle-int8 is"):  # not the bundle of the report
        reported_latencies([str(run_dir), str(run_dir / "bundle-int8")])
    other = tmp_path / "other"
    other.mkdir()
    write_report(other, "sample", "bundle", cpu="Another CPU")
    with pytest.raises(InputError, match=r"different places \(Another CPU, Some CPU\)"):
        reported_latencies([str(run_dir), str(other)])
    (other / "report.json").write_text('{"teacher": 3}')
    with pytest.raises(InputError, match="no report says how quick"):
        reported_latencies([str(other)])


def test_auto_measures_what_no_report_tells(tiny_bundle_dir, monkeypatch):
    monkeypatch.setattr("dimefm_edge.commands.sizing._SECONDS", 0.1)
    cpu, found = find_latencies([str(tiny_bundle_dir)], "auto", engine="onnxruntime")
    assert cpu
    assert 0 < found[str(tiny_bundle_dir)] < 1000
