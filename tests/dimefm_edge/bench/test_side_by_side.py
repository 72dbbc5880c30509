"""The whole bench on real models and on ones that crash, hang or cannot be loaded."""

from __future__ import annotations

import pytest

from dimefm_edge.bench.results import BenchResult
from dimefm_edge.bench.side_by_side import bench_models
from dimefm_edge.bench.stages import STAGES
from dimefm_edge.bench_config import BenchConfig
from dimefm_edge.errors import CheckpointError, InputError
from tests.dimefm_edge.bench.conftest import SUBJECTS


def subject(name: str) -> str:
    return f"{SUBJECTS}:{name}"


def bench(folder, *models, save=None, **settings) -> BenchResult:
    settings = {"threads": 1, "seconds": 0.5} | settings
    config = BenchConfig(models=tuple(map(str, models)), **settings)
    return bench_models(config, folder / "work", save=save)


@pytest.mark.slow
def test_every_kind_side_by_side(
    tiny_teacher_dir, tiny_run_dir, tiny_bundle_dir, foreign_graph, tmp_path
):
    models = (tiny_bundle_dir, tiny_run_dir, f"{tiny_teacher_dir}@eager", foreign_graph)
    result = bench(
        tmp_path, *models, batch_size=2, image_size=32, operators=True, images=("scenes:4",)
    )
    assert result.state == "complete"
    bundle, run, eager, foreign = result.subjects
    assert [s.runtime for s in result.subjects] == ["ONNX Runtime"] * 2 + [
        "PyTorch", "ONNX Runtime"
    ]  # fmt: skip
    for s in result.subjects:
        assert (s.state, s.error, s.batch_size) == ("measured", None, 2)
        assert 0 < s.p50_ms <= s.p90_ms <= s.p95_ms <= s.p99_ms <= s.p999_ms
        assert s.images_per_s == pytest.approx(2e3 / s.mean_ms)
        assert len(s.rounds_ms) == len(result.yardstick_ms) >= 5
        assert s.ratio_low <= s.ratio <= s.ratio_high
        assert s.peak_rss_mib > s.memory_mib > 0
        assert s.time_to_first_ms > s.load_ms > 0
    assert (bundle.ratio, bundle.ratio_low, bundle.ratio_high) == (1, 1, 1)
    assert bundle.stages_ms.keys() == run.stages_ms.keys() == eager.stages_ms.keys()
    assert sum(bundle.operators["kinds"].values()) == pytest.approx(1)
    assert "no stages: how its images are prepared is not known" in foreign.notes
    assert sum(eager.operators["kinds"].values()) == pytest.approx(1)
    assert result.peak_gflop_per_s > 1
    assert result.copy_gb_per_s > 0.1
    assert result.machine["cpu"]


def test_two_of_the_same_are_told_the_same_and_a_slower_one_is_told(tmp_path):
    result = bench(tmp_path, subject("quick"), subject("quick"), subject("slower"), seconds=3.0)
    _, same, slower = result.subjects
    assert same.label.endswith("(2)")
    assert same.ratio == pytest.approx(1, abs=0.15)
    assert slower.ratio == pytest.approx(1.5, abs=0.25)
    assert slower.ratio_low > max(1.1, same.ratio)
    assert len(result.starts) == 2
    assert sorted(result.starts) == result.starts


def test_what_fails_ends_itself_only(tmp_path, tiny_bundle_dir):
    broken = tmp_path / "broken.onnx"
    broken.write_bytes(b"not a graph")
    models = (
        subject("quick"), subject("crashes"), subject("raises"), broken, subject("gives_nothing"),
        subject("hangs"), tiny_bundle_dir,
    )  # fmt: skip
    result = bench(tmp_path, *models, time_limit_s=8.0)
    quick, crashes, raises, graph, nothing, hangs, bundle = result.subjects
    assert (quick.state, bundle.state) == ("measured", "measured")
    assert bundle.ratio > 0
    for s, words in (
        (crashes, "died by SIGABRT"),
        (raises, "RuntimeError: no such accelerator"),
        (graph, "ONNX Runtime"),
        (nothing, "gave no call to time"),
        (hangs, "was ended: load took longer than 8 s"),
    ):
        assert s.state == "failed"
        assert words in s.error
        assert s.p50_ms is None


def test_one_that_dies_halfway_keeps_what_it_had(tmp_path):
    result = bench(tmp_path, subject("quick"), subject("crashes_later"), seconds=3.0, restarts=1)
    quick, dies = result.subjects
    assert quick.state == "measured"
    assert dies.state == "partial"
    assert "died with exit code 7" in dies.error
    assert 0 < len(dies.rounds_ms) < len(quick.rounds_ms)
    assert dies.ratio > 0


def test_unreadable_images_are_told_once_and_cost_nothing(
    tiny_bundle_dir, photos_with_bad, labelled_dir, tmp_path
):
    result = bench(
        tmp_path, tiny_bundle_dir, images=(str(photos_with_bad),), data=(str(labelled_dir),)
    )
    (bundle,) = result.subjects
    assert (bundle.state, bundle.error) == ("measured", None)
    assert bundle.stages_ms.keys() == set(STAGES)
    assert list(bundle.top1_pct) == [labelled_dir.name]
    (told,) = [note for note in result.notes if "cannot be read" in note]
    assert told.startswith("2 of 4 images cannot be read, and are left out: ")
    assert "trunc.jpg" in told
    assert "empty.jpg" in told


def test_stages_that_fail_leave_the_accuracy(tiny_bundle_dir, labelled_dir, tmp_path, monkeypatch):
    def gone(sources, folder):
        return [tmp_path / "gone.jpg"], []  # as if it went after it was looked at

    monkeypatch.setattr("dimefm_edge.bench.side_by_side.image_files", gone)
    result = bench(tmp_path, tiny_bundle_dir, images=("x",), data=(str(labelled_dir),))
    (bundle,) = result.subjects
    assert bundle.state == "partial"
    assert "gone.jpg" in bundle.error
    assert list(bundle.top1_pct) == [labelled_dir.name]


def test_images_that_are_not_there_end_the_bench_before_it_begins(tmp_path):
    def never(partial):
        raise AssertionError("timed before the check")

    with pytest.raises(InputError, match="does not exist"):
        bench(tmp_path, subject("quick"), images=(str(tmp_path / "gone"),), save=never)


def test_ctrl_c_keeps_what_there_is(tmp_path):
    def stop(result):
        saved.append(len(result.subjects[0].rounds_ms))
        raise KeyboardInterrupt

    saved: list[int] = []
    result = bench(tmp_path, subject("quick"), subject("slower"), save=stop)
    assert result.state == "stopped"
    assert saved == [1]
    assert [s.state for s in result.subjects] == ["partial", "partial"]
    assert all(s.p50_ms > 0 for s in result.subjects)
    assert any("Ctrl-C" in note for note in result.notes)


def test_if_none_can_be_measured_the_first_error_is_raised(tmp_path):
    with pytest.raises(CheckpointError, match="no ONNX file at"):
        bench(tmp_path, tmp_path / "gone.onnx", subject("raises"))


def test_memory_is_the_models_own(tmp_path):
    result = bench(tmp_path, subject("quick"), subject("takes"))
    quick, takes = result.subjects
    assert takes.memory_mib - quick.memory_mib == pytest.approx(64, abs=16)


@pytest.mark.parametrize(
    "settings", [{"batch_size": 0}, {"seconds": 0}, {"threads": -1}, {"restarts": 0}]
)
def test_bad_settings(settings):
    with pytest.raises(InputError, match="must"):
        BenchConfig(**settings)
