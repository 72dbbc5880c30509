"""The training loop: exact resuming, ranks that equal one process, and loud failure."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from dimefm_edge import distill as distill_module
from dimefm_edge.batches import BatchPlan
from dimefm_edge.config import LossConfig
from dimefm_edge.distributed import Ranks
from dimefm_edge.errors import CheckpointError, ConfigError, TrainingError
from dimefm_edge.run_log import STATE_FILE, read_metrics
from tests.dimefm_edge import distill_case as case
from tests.dimefm_edge.forks import Fork

ROOT = Path(__file__).parents[2]


def weights(run_dir: Path, name: str = "checkpoint.safetensors") -> dict[str, torch.Tensor]:
    return load_file(run_dir / name)


def assert_equal_bits(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> None:
    assert left.keys() == right.keys()
    different = [key for key in left if not torch.equal(left[key], right[key])]
    assert different == []


def process(run_dir: Path, *flags: str) -> Fork:
    return Fork(case.main, [run_dir, *flags], run_dir.parent / f"{run_dir.name}{len(flags)}.log")


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def test_training_through_fused_attention_is_training_without_it(tmp_path: Path) -> None:
    for choice in ("off", "on"):
        train = dataclasses.replace(case.TRAIN, steps=3, fused_attention=choice)
        case.run_case(tmp_path / choice, train=train)
    plain, fused = weights(tmp_path / "off"), weights(tmp_path / "on")
    assert plain.keys() == fused.keys()
    for name, value in plain.items():
        torch.testing.assert_close(fused[name], value, atol=2e-4, rtol=0)


def test_a_run_learns_and_leaves_what_it_promises(tmp_path: Path) -> None:
    train = dataclasses.replace(case.TRAIN, steps=60, lr=3e-3, min_crop=1.0, flip=False)
    report = case.run_case(tmp_path / "run", train=train)
    names = {path.name for path in (tmp_path / "run").iterdir()}
    assert {
        "checkpoint.safetensors",
        "best.safetensors",
        "metrics.jsonl",
        STATE_FILE,
        "tensorboard",
    } <= names
    rows = [row for row in read_metrics(tmp_path / "run") if "loss" in row]
    assert [row["step"] for row in rows] == list(range(60))
    first, last = (np.mean([r["loss"] for r in part]) for part in (rows[:5], rows[-5:]))
    assert last < 0.8 * first
    assert report.steps == 60
    assert report.images_per_s > 0
    assert report.best["norm"] > 0


def test_a_text_student_learns_and_says_sentences(tmp_path: Path) -> None:
    train = dataclasses.replace(case.TRAIN, steps=80, lr=3e-3)
    report = case.run_case(tmp_path / "run", train=train, is_text=True)
    rows = [row for row in read_metrics(tmp_path / "run") if "loss" in row]
    assert {"vl", "pvl", "feature", "sentences_per_s"} <= set(rows[0])
    for name in ("vl", "pvl", "feature"):
        first, last = (np.mean([r[name] for r in part]) for part in (rows[:5], rows[-5:]))
        assert last < 0.8 * first, name
    assert report.epochs == pytest.approx(80 * 16 / case.NUM_TEXTS)


def test_a_text_student_is_not_resumed_with_other_settings(tmp_path: Path) -> None:
    case.run_case(tmp_path / "run", is_text=True)
    data = case.make_text_data(tmp_path / "store")
    other = dataclasses.replace(data, image_rows=np.arange(10))
    with pytest.raises(CheckpointError, match=r"image_rows was None and is "):
        case.run_case(tmp_path / "run", data=other, is_text=True, resume=True)
    with pytest.raises(CheckpointError, match=r"batch_size was 16 and is 8"):
        case.run_case(
            tmp_path / "run", train=dataclasses.replace(case.TRAIN, batch_size=8), is_text=True,
            resume=True,
        )  # fmt: skip


def test_two_runs_are_bitwise_equal(tmp_path: Path) -> None:
    case.run_case(tmp_path / "a")
    case.run_case(tmp_path / "b")
    assert_equal_bits(weights(tmp_path / "a"), weights(tmp_path / "b"))


@pytest.mark.parametrize(
    "flags",
    [(), ("--text",), ("--elastic",), pytest.param(("--int8",), marks=pytest.mark.slow)],
    ids=["float", "text", "elastic", "int8"],
)
def test_kill_9_and_resume_equals_an_uninterrupted_run(
    tmp_path: Path, flags: tuple[str, ...]
) -> None:
    # Both processes read it.
    (case.make_text_data if "--text" in flags else case.make_data)(tmp_path / "store")
    whole = process(tmp_path / "whole", *flags)
    broken = process(tmp_path / "broken", "--pause", "30", "--eval-every", "6", *flags)
    metrics = tmp_path / "broken" / "metrics.jsonl"
    deadline = time.monotonic() + 90
    # Step 6's evaluation sleeps: by then the state of step 4 is on disk and step 6's is not.
    while not metrics.is_file() or metrics.read_text().count("\n") < 6:
        assert broken.poll() is None, broken.said
        assert time.monotonic() < deadline
        time.sleep(0.05)
    broken.send_signal(signal.SIGKILL)
    assert broken.wait(60) == -signal.SIGKILL
    state = torch.load(tmp_path / "broken" / STATE_FILE, weights_only=True)
    assert state["step"] == 4

    resumed = process(tmp_path / "broken", "--resume", *flags)
    for finished in (whole, resumed):
        assert finished.wait(120) == 0, finished.said
    assert_equal_bits(weights(tmp_path / "whole"), weights(tmp_path / "broken"))
    states = [
        torch.load(tmp_path / name / STATE_FILE, weights_only=True) for name in ("whole", "broken")
    ]
    assert_equal_bits(states[0]["student"], states[1]["student"])
    rows = [[r for r in read_metrics(tmp_path / n) if "loss" in r] for n in ("whole", "broken")]
    assert [r["step"] for r in rows[1]] == list(range(12))
    assert [r["loss"] for r in rows[0]] == [r["loss"] for r in rows[1]]


EXTRAS = {
    "contrastive": (
        {"pairs": lambda _: case.make_pairs()},
        {},
        LossConfig(vl_weight=0, pvl_weight=0, contrastive_weight=1, contrastive_positives="label"),
    ),
    "hard negatives": (
        {"neighbours": lambda _: case.make_neighbours()},
        {"hard_negatives": 0.5},
        LossConfig(),
    ),
    "views": ({"views": lambda folder: case.make_views(folder / "views")}, {}, LossConfig()),
}
"""What a run may be given: parts of its data, of TrainConfig, and its losses."""


@pytest.mark.parametrize("name", list(EXTRAS))
def test_with_extras_a_broken_run_ends_as_a_whole_one(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    parts, settings, loss = EXTRAS[name]
    data = dataclasses.replace(
        case.make_data(tmp_path / "store"), **{k: make(tmp_path) for k, make in parts.items()}
    )
    train = dataclasses.replace(case.TRAIN, **settings)
    case.run_case(tmp_path / "whole", data=data, loss=loss, train=train)
    optimise = distill_module._Loop.optimise

    def stop_at_7(self) -> float:  # type: ignore[no-untyped-def]
        if self.step == 7:
            raise KeyboardInterrupt
        return optimise(self)

    monkeypatch.setattr(distill_module._Loop, "optimise", stop_at_7)
    with pytest.raises(KeyboardInterrupt):
        case.run_case(tmp_path / "broken", data=data, loss=loss, train=train)
    monkeypatch.setattr(distill_module._Loop, "optimise", optimise)
    case.run_case(tmp_path / "broken", data=data, loss=loss, train=train, resume=True)
    assert_equal_bits(weights(tmp_path / "whole"), weights(tmp_path / "broken"))
    case.run_case(tmp_path / "plain", loss=LossConfig())
    plain = weights(tmp_path / "plain")
    assert any(not torch.equal(v, plain[k]) for k, v in weights(tmp_path / "whole").items())


def test_a_run_is_not_resumed_with_other_pairs(tmp_path: Path) -> None:
    loss = EXTRAS["contrastive"][2]
    data = dataclasses.replace(case.make_data(tmp_path / "store"), pairs=case.make_pairs())
    case.run_case(tmp_path / "run", data=data, loss=loss)
    other = dataclasses.replace(data, pairs=case.make_pairs(seed=9))
    with pytest.raises(CheckpointError, match=r"pairs was .* and is "):
        case.run_case(tmp_path / "run", data=other, loss=loss, resume=True)


def test_contrastive_training_learns_the_pairs(tmp_path: Path) -> None:
    loss = EXTRAS["contrastive"][2]
    data = dataclasses.replace(case.make_data(tmp_path / "store"), pairs=case.make_pairs())
    train = dataclasses.replace(case.TRAIN, steps=80, lr=3e-3, min_crop=1.0, flip=False)
    case.run_case(tmp_path / "run", data=data, loss=loss, train=train)
    rows = [row for row in read_metrics(tmp_path / "run") if "loss" in row]
    first, last = (np.mean([r["contrastive"] for r in part]) for part in (rows[:5], rows[-5:]))
    assert last < 0.8 * first


def test_ctrl_c_saves_the_last_whole_step(tmp_path: Path) -> None:
    running = process(tmp_path / "run", "--steps", "4000")
    metrics = tmp_path / "run" / "metrics.jsonl"
    deadline = time.monotonic() + 90
    while not metrics.is_file() or metrics.read_text().count("\n") < 6:
        assert running.poll() is None, running.said
        assert time.monotonic() < deadline
        time.sleep(0.02)
    running.send_signal(signal.SIGINT)
    assert running.wait(60) != 0
    assert "KeyboardInterrupt" in running.said
    state = torch.load(tmp_path / "run" / STATE_FILE, weights_only=True)
    rows = [r for r in read_metrics(tmp_path / "run") if "loss" in r]
    assert state["step"] == rows[-1]["step"] + 1
    assert state["step"] % 4 != 0 or state["step"] >= 4


@pytest.mark.parametrize(
    "flags",
    [
        (),
        pytest.param(("--int8",), marks=pytest.mark.slow),
        pytest.param(("--text",), marks=pytest.mark.slow),
    ],
    ids=["float", "int8", "text"],
)
def test_two_ranks_equal_one_process_of_the_double_batch(
    tmp_path: Path, flags: tuple[str, ...]
) -> None:
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}", "OMP_NUM_THREADS": "1"}
    subprocess.run(
        [
            sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2",
            case.__file__, str(tmp_path / "two"), *flags,
        ],
        env=environment, check=True, capture_output=True, timeout=180,
    )  # fmt: skip
    case.run_case(tmp_path / "one", is_int8="--int8" in flags, is_text="--text" in flags)
    one, two = weights(tmp_path / "one"), weights(tmp_path / "two")
    for key, value in one.items():
        if key.endswith("in_proj_bias"):
            # A bias of all keys moves no softmax: its gradient is rounding, which Adam scales up.
            value, two[key] = (torch.stack(t.chunk(3))[[0, 2]] for t in (value, two[key]))
        torch.testing.assert_close(two[key], value, rtol=2e-4, atol=2e-6, msg=key)
    rows = [[r for r in read_metrics(tmp_path / n) if "loss" in r] for n in ("one", "two")]
    losses = [[r["loss"] for r in part] for part in rows]
    np.testing.assert_allclose(losses[0], losses[1], rtol=1e-4)


def test_two_ranks_train_one_elastic_student(tmp_path: Path) -> None:
    """Their micro-batches are not one process's, but every step's cuts are, and its losses near."""
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}", "OMP_NUM_THREADS": "1"}
    subprocess.run(
        [
            sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2",
            case.__file__, str(tmp_path / "two"), "--elastic",
        ],
        env=environment, check=True, capture_output=True, timeout=180,
    )  # fmt: skip
    case.run_case(tmp_path / "one", is_elastic=True)
    rows = [[r for r in read_metrics(tmp_path / n) if "loss" in r] for n in ("one", "two")]
    losses = [[r["loss"] for r in part] for part in rows]
    assert len(losses[1]) == 12
    np.testing.assert_allclose(losses[0], losses[1], rtol=0.05)


def test_an_int8_student_trains_with_ranges_that_saw_images_first(tmp_path: Path) -> None:
    case.run_case(tmp_path / "run", is_int8=True)
    rows = [row for row in read_metrics(tmp_path / "run") if "loss" in row]
    assert [row["step"] for row in rows] == list(range(12))
    found = weights(tmp_path / "run")
    highs = [value for name, value in found.items() if name.endswith(".high")]
    assert highs
    assert all(value > 0 for value in highs)
    assert found["graph.trunk.blocks.0.attn.core.q.weight"].shape == (32, 32)


def test_nan_stops_with_the_batch_saved(tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    rows = np.random.default_rng(0).normal(size=(case.NUM_TEXTS, case.EMBED_DIM))
    rows[3] = np.nan
    case.write_rows(tmp_path / "bad", "texts", rows)
    data = case.make_data(tmp_path / "store")
    broken = dataclasses.replace(data, texts=type(data.texts).open(tmp_path / "bad"))
    with pytest.raises(TrainingError, match=r"not finite at step \d+ .*vl nan") as caught:
        case.run_case(run_dir, data=broken)
    assert "--lr" in str(caught.value)
    saved = load_file(run_dir / "nan_batch_rank0.safetensors")
    assert saved["pixels"].shape == (16, 16, 16, 3)
    assert torch.isnan(saved["text_embeds"]).any()
    assert 3 in saved["text_rows"]


def test_resume_refuses_other_settings_and_damage(tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    case.run_case(run_dir)
    other = dataclasses.replace(case.TRAIN, lr=5e-4)
    with pytest.raises(CheckpointError, match=r"lr was 0\.001 and is 0\.0005"):
        case.run_case(run_dir, train=other, resume=True)
    state = run_dir / STATE_FILE
    state.write_bytes(state.read_bytes()[:1000])
    with pytest.raises(CheckpointError, match="is damaged"):
        case.run_case(run_dir, resume=True)


def test_resuming_a_finished_run_changes_nothing(tmp_path: Path) -> None:
    report = case.run_case(tmp_path / "run")
    before = weights(tmp_path / "run")
    lines = (tmp_path / "run" / "metrics.jsonl").read_text()
    assert case.run_case(tmp_path / "run", resume=True) == report
    assert_equal_bits(before, weights(tmp_path / "run"))
    assert (tmp_path / "run" / "metrics.jsonl").read_text() == lines


def test_accumulation_averages_the_micro_batches(tmp_path: Path) -> None:
    # With a loss that is a mean over images, two halves make the same step as the whole.
    feature = LossConfig(vl_weight=0, pvl_weight=0, feature_weight=1.0)
    for name, parts in (("whole", 1), ("halves", 2)):
        train = dataclasses.replace(case.TRAIN, accumulate=parts)
        case.run_case(tmp_path / name, train=train, loss=feature)
    whole, halves = weights(tmp_path / "whole"), weights(tmp_path / "halves")
    for key, value in whole.items():
        torch.testing.assert_close(halves[key], value, rtol=2e-4, atol=2e-6, msg=key)


def test_epochs_are_permutations_and_ranks_split_the_batch(tmp_path: Path) -> None:
    data = case.make_data(tmp_path / "store")
    plan = BatchPlan(data, case.TRAIN, Ranks())
    seen = np.concatenate([plan.image_rows(step) for step in range(45)])  # 8 epochs of 90 rows
    epochs = seen.reshape(8, 90)
    assert all(sorted(epoch) == list(range(90)) for epoch in epochs)
    assert not np.array_equal(epochs[0], epochs[1])
    halves = [BatchPlan(data, case.TRAIN, Ranks(rank, 2)).local_rows(5) for rank in (0, 1)]
    np.testing.assert_array_equal(np.concatenate(halves), plan.image_rows(5))


def test_a_batch_that_ranks_do_not_divide_is_refused(tmp_path: Path) -> None:
    train = dataclasses.replace(case.TRAIN, batch_size=16, accumulate=16)
    with pytest.raises(ConfigError, match="must divide batch_size"):
        dataclasses.replace(train, accumulate=3)
    with pytest.raises(ValueError, match="16 cannot be split over 3 ranks"):
        Ranks(0, 3).slice(16)


def test_metrics_of_a_killed_run_are_readable(tmp_path: Path) -> None:
    lines = [json.dumps({"step": step, "loss": 1.0}) for step in range(3)]
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines) + '\n{"step": 3, "lo')
    assert [row["step"] for row in read_metrics(tmp_path)] == [0, 1, 2]
