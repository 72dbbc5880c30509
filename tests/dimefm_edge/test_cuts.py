"""Cuts of an elastic run: scored, kept, loaded, taken out; what is damaged or no run is named."""

from __future__ import annotations

import dataclasses
import shutil

import pytest

torch = pytest.importorskip("torch")

from safetensors import safe_open  # noqa: E402
from safetensors.torch import load_file, save_file  # noqa: E402

from dimefm_edge import config as config_file  # noqa: E402
from dimefm_edge.config import RunConfig, TrainConfig  # noqa: E402
from dimefm_edge.cuts import (  # noqa: E402
    CUTS_FILE,
    Cut,
    cut_rows,
    elastic_stage,
    keep_cuts,
    load_cuts,
    save_cut,
)
from dimefm_edge.errors import CheckpointError, ConfigError  # noqa: E402
from dimefm_edge.preprocess import PreprocessSpec  # noqa: E402
from dimefm_edge.student_grid import elastic_cuts  # noqa: E402
from dimefm_edge.students import (  # noqa: E402
    CHECKPOINT_FILE,
    build_student,
    load_student,
    save_student,
    student_spec,
)
from dimefm_edge.students.elastic import cut_student, recalibrate  # noqa: E402
from dimefm_edge.targets import load_target  # noqa: E402

NAMES = ("vit-p8-w64-d3", "convnet-w8-d1.1.1.1")


def batches():
    generator = torch.Generator().manual_seed(3)
    return (torch.randn(4, 3, 32, 32, generator=generator) for _ in range(2))


def evaluate(module):
    """Something that differs between cuts and hangs on their averages."""
    assert not module.training
    with torch.no_grad():
        answer = module(torch.ones(1, 3, 32, 32))
    return {"set_top1_pct": float(answer[0, 0]), "other_top1_pct": 50.0}


@pytest.fixture(params=NAMES)
def run_dir(request, tmp_path):
    spec = student_spec(request.param, image_size=32, embed_dim=16)
    torch.manual_seed(0)
    student = build_student(spec)
    recalibrate(student, batches())
    folder = tmp_path / "run"
    save_student(
        folder / CHECKPOINT_FILE, student, spec, PreprocessSpec(image_size=32), {"target": "local"}
    )
    config_file.save(RunConfig(out=str(folder)), folder / config_file.RUN_FILE)
    return folder


@pytest.fixture
def kept(run_dir):
    spec = load_student(run_dir).spec
    return run_dir, keep_cuts(run_dir, elastic_cuts(spec), batches, evaluate, torch.device("cpu"))


def test_every_cut_is_scored_with_averages_of_its_own(kept):
    run_dir, cuts = kept
    whole = load_student(run_dir)
    assert [cut.spec for cut in cuts] == list(elastic_cuts(whole.spec))
    for cut in cuts[:-1]:
        student = cut_student(whole.student, whole.spec, cut.spec)
        recalibrate(student, batches())
        assert cut.scores == pytest.approx(evaluate(student.eval()))
    assert cuts[-1].scores == pytest.approx(evaluate(whole.student))
    assert cuts[0].top1_pct == pytest.approx((cuts[0].scores["set_top1_pct"] + 50) / 2)
    assert Cut(whole.spec, {}).top1_pct is None


def test_what_is_kept_comes_back(kept):
    run_dir, cuts = kept
    for where in (run_dir, run_dir / CHECKPOINT_FILE, str(run_dir)):
        run = load_cuts(where)
        assert run.cuts == cuts
    for cut in cuts:
        assert evaluate(run.take(cut.spec)) == pytest.approx(cut.scores)


def test_a_cut_is_a_run_of_its_own(kept, tmp_path):
    run_dir, cuts = kept
    (run_dir / "text").mkdir()
    for name in (CHECKPOINT_FILE, "tokenizer.json", "training_state.pt"):
        shutil.copy(run_dir / CHECKPOINT_FILE, run_dir / "text" / name)
    out = tmp_path / "cut"
    save_cut(load_cuts(run_dir), cuts[0].spec, out, target="jetson-orin@30w", latency_ms=0.5)
    loaded = load_student(out)
    assert loaded.spec == cuts[0].spec
    assert loaded.metadata == {"target": "jetson-orin@30w", "cut_from": str(run_dir)}
    assert evaluate(loaded.student) == pytest.approx(cuts[0].scores)
    copied = sorted(path.name for path in (out / "text").iterdir())
    assert copied == [CHECKPOINT_FILE, "tokenizer.json"]
    settings = config_file.load_saved(out)
    assert settings is not None
    assert (settings.out, settings.student.init_from) == (f"{out}-tuned", str(out))
    assert (settings.target, settings.student.latency_ms) == ("jetson-orin@30w", 0.5)
    assert settings.store == str(run_dir / "store")
    before = (out / CHECKPOINT_FILE).read_bytes()
    with pytest.raises(ConfigError, match="is there already"):
        save_cut(load_cuts(run_dir), cuts[1].spec, out, target="local", latency_ms=1.0)
    assert (out / CHECKPOINT_FILE).read_bytes() == before


def test_a_cut_that_cannot_be_written_leaves_nothing(kept, tmp_path):
    run_dir, cuts = kept
    (run_dir / "text").mkdir()
    shutil.copy(run_dir / CHECKPOINT_FILE, run_dir / "text")  # and no tokenizer beside it
    with pytest.raises(FileNotFoundError):
        save_cut(
            load_cuts(run_dir), cuts[0].spec, tmp_path / "cut", target="local", latency_ms=None
        )
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_a_run_without_its_settings_still_gives_cuts(kept, tmp_path):
    run_dir, cuts = kept
    (run_dir / config_file.RUN_FILE).unlink()
    save_cut(load_cuts(run_dir), cuts[0].spec, tmp_path / "cut", target="local", latency_ms=1.0)
    assert sorted(p.name for p in (tmp_path / "cut").iterdir()) == [CHECKPOINT_FILE]


def test_a_run_that_is_not_elastic_says_how_to_make_one(run_dir):
    with pytest.raises(CheckpointError, match="holds no smaller students") as caught:
        load_cuts(run_dir)
    assert "--elastic" in caught.value.hint
    with pytest.raises(CheckpointError, match="no checkpoint at"):
        load_cuts(run_dir / "gone")


def test_another_checkpoint_than_the_cuts_own_is_refused(kept):
    run_dir, _ = kept
    loaded = load_student(run_dir)
    with torch.no_grad():
        loaded.student.proj.weight.add_(1.0)
    save_student(
        run_dir / CHECKPOINT_FILE, loaded.student, loaded.spec, loaded.preprocess, loaded.metadata
    )
    with pytest.raises(
        CheckpointError, match=r"is of another checkpoint than .*run/checkp"
    ) as caught:
        load_cuts(run_dir)
    assert "--resume" in caught.value.hint


def test_another_checkpoint_beside_the_cuts_own_is_refused(kept):
    run_dir, cuts = kept
    loaded = load_student(run_dir)
    with torch.no_grad():
        loaded.student.proj.weight.add_(1.0)
    best = run_dir / "best.safetensors"
    save_student(best, loaded.student, loaded.spec, loaded.preprocess, loaded.metadata)
    with pytest.raises(CheckpointError, match=r"is of another checkpoint than .*best"):
        load_cuts(best)
    assert load_cuts(run_dir).cuts == cuts


@pytest.mark.parametrize(
    "header",
    [
        {}, {"cuts": "[]"}, {"cuts": "{"}, {"cuts": "[1]"}, {"cuts": '[{"spec": {}}]'},
        {"cuts": '{"a": 1}'}, {"format": "else"},
    ],
)  # fmt: skip
def test_a_damaged_header_is_named(kept, header):
    run_dir, cuts = kept
    path = run_dir / CUTS_FILE
    with safe_open(path, "pt") as reader:
        whole = reader.metadata()
    save_file(load_file(path), path, whole)
    assert load_cuts(run_dir).cuts == cuts
    save_file(load_file(path), path, header and whole | header)
    with pytest.raises(CheckpointError, match=r"cuts\.safetensors is (damaged|of another|trunc)"):
        load_cuts(run_dir)


def test_a_truncated_file_is_named(kept):
    run_dir, _ = kept
    path = run_dir / CUTS_FILE
    path.write_bytes(path.read_bytes()[:40])
    with pytest.raises(CheckpointError, match="truncated"):
        load_cuts(run_dir)


def test_averages_that_are_missing_are_not_passed_over(kept):
    run_dir, cuts = kept
    path = run_dir / CUTS_FILE
    tensors = load_file(path)
    if not tensors:
        pytest.skip("a ViT has no averages")
    with safe_open(path, "pt") as reader:
        header = reader.metadata()
    del tensors[next(iter(tensors))]
    save_file(tensors, path, header)
    with pytest.raises(CheckpointError, match=f"damaged: it lacks averages of {cuts[0].spec.name}"):
        load_cuts(run_dir).take(cuts[0].spec)


def test_rows_have_sizes_and_estimates(kept):
    _, cuts = kept
    rows = cut_rows(cuts, load_target("jetson-orin"))
    assert [row.name for row in rows] == [cut.spec.name for cut in cuts]
    assert rows[0].gmacs < rows[-1].gmacs
    assert rows[0].params_m < rows[-1].params_m
    assert 0 < rows[0].target_ms <= rows[-1].target_ms
    assert set(rows[0].top1_pct) == {"set", "other"}


def test_a_step_takes_a_batch_for_each_cut_that_it_trains():
    train = TrainConfig(epochs=2.0, batch_size=64, accumulate=2, lr=0.01)
    assert elastic_stage(train) == dataclasses.replace(
        train, epochs=6.0, batch_size=192, accumulate=6
    )
    assert elastic_stage(TrainConfig(steps=5)).steps == 5


def test_a_folder_may_be_named_by_a_link(kept, tmp_path):
    run_dir, cuts = kept
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    link = tmp_path / "link"
    save_cut(load_cuts(run_dir), cuts[0].spec, link, target="local", latency_ms=None)
    assert load_student(tmp_path / "real").spec == cuts[0].spec
