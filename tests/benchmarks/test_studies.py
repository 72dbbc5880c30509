"""benchmarks/studies.py on the sample teacher and a few scenes: runs are kept, shared, resumed."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import json
import sys
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from dimefm_edge.errors import UnknownNameError  # noqa: E402
from dimefm_edge.student_score import INHERITANCE_BONUS  # noqa: E402

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def script(monkeypatch, tmp_path):
    """The script, with a test set of three classes of two images."""
    from dimefm_edge.data.scenes import scene_image

    for label, name in enumerate(("cat", "dog", "eel")):
        (tmp_path / "test" / name).mkdir(parents=True)
        for i in range(2):
            scene_image(2 * label + i).save(tmp_path / "test" / name / f"{i}.png")
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    module = importlib.import_module("studies")
    data = sys.modules["study_data"]
    real = data.setup_of
    monkeypatch.setattr(
        data,
        "setup_of",
        lambda args: dataclasses.replace(real(args), eval_sets=(str(tmp_path / "test"),)),
    )
    yield module
    for name in ("studies", "study_arms", "study_data", "real_teacher", "train_teacher"):
        sys.modules.pop(name, None)


def arguments(script, tmp_path, *words):
    return script.parse_args(
        ["unpaired", "--data", "scenes", "--limit", "80", "--steps", "1", "--out",
         str(tmp_path / "out"), *words]
    )  # fmt: skip


def test_a_study_keeps_its_runs_and_goes_on(script, tmp_path, monkeypatch):
    arms = script.STUDIES["unpaired"]
    names = ("distilled, unlabelled images", "contrastive, shared labels")
    monkeypatch.setitem(script.STUDIES, "unpaired", {name: arms[name] for name in names})
    values = script.run_study(arguments(script, tmp_path, "--seeds", "0"))
    assert tuple(values["arms"]) == names
    assert all(row["seeds"] == 1 for row in values["arms"].values())
    assert json.loads((tmp_path / "out/scenes/unpaired.json").read_text()) == values
    runs = sorted((tmp_path / "out/scenes/runs").glob("*/result.json"))
    assert len(runs) == 2
    begun = {path: path.stat().st_mtime_ns for path in runs}
    more = script.run_study(arguments(script, tmp_path, "--seeds", "0", "1"))
    assert all(row["seeds"] == 2 and "test_top1_pct_sd" in row for row in more["arms"].values())
    assert begun == {path: path.stat().st_mtime_ns for path in runs}
    monkeypatch.setattr(script, "distill", None)  # all is there: nothing is trained
    assert script.run_study(arguments(script, tmp_path, "--seeds", "0", "1")) == more
    with contextlib.ExitStack() as others:  # other processes have every run
        for result in runs:
            others.enter_context(script.locked(result.with_name(".lock")))
        shared = script.run_study(arguments(script, tmp_path, "--seeds", "0"))
        assert shared["elsewhere"] == 2
        assert {row["seeds"] for row in shared["arms"].values()} == {0}
    table = script.table_of(more["arms"], more["teacher"])
    assert "contrastive, shared labels" in table
    assert "±" in table


def test_students_are_ranked_by_what_fit_goes_by(script, tmp_path, monkeypatch):
    names = ("vit-p16-w32-d2", "convnet-w16-d1.1.1.1", "vit-p8-w192-d2, inherits")
    arms = {
        name: script.Arm(student=name.split(",")[0], inherits="inherits" in name) for name in names
    }
    monkeypatch.setitem(script.STUDIES, "students", arms)
    args = arguments(script, tmp_path, "--seeds", "0")
    args.study, args.prepare = "students", True
    assert script.run_study(args)["rank_correlation"] == {}
    args.prepare = False
    values = script.run_study(args)
    rows = values["arms"]
    assert rows[names[2]]["score"] == INHERITANCE_BONUS * 2 / 8 * rows[names[2]]["gmacs"]
    assert rows[names[0]]["score"] == rows[names[0]]["gmacs"] < rows[names[2]]["gmacs"]
    assert set(values["rank_correlation"]) == {"gmacs", "params_m", "score", "p50_ms"}
    assert values["hand_picked"] == {}  # none of timm's was trained
    specs = {
        json.loads(path.read_text())["settings"]["student"]["name"]
        for path in (tmp_path / "out/scenes/runs").glob("*/result.json")
    }
    assert specs == {name.split(",")[0] for name in names}


def test_some_arms_only(script, tmp_path):
    args = arguments(script, tmp_path, "--seeds", "0", "--arms", "contrastive, shared labels")
    args.prepare = True
    assert list(script.run_study(args)["arms"]) == ["contrastive, shared labels"]
    args = arguments(script, tmp_path, "--seeds", "0", "--arms", "contrastive")
    with pytest.raises(UnknownNameError, match="arm of unpaired 'contrastive'"):
        script.run_study(args)


def test_the_signal_is_all_that_differs(script, tmp_path):
    """The paired images of scenes are the unlabelled ones: distilled, they end alike."""
    from safetensors.numpy import load_file

    script.run_study(arguments(script, tmp_path, "--seeds", "3"))
    weights = {}
    for result in (tmp_path / "out/scenes/runs").glob("*/result.json"):
        weights[json.loads(result.read_text())["arm"]] = load_file(
            result.with_name("checkpoint.safetensors")
        )
    first, same, contrastive = (
        weights[name]
        for name in (
            "distilled, unlabelled images", "distilled, the paired images",
            "contrastive, own sentence",
        )
    )  # fmt: skip
    assert all(np.array_equal(first[key], same[key]) for key in first)
    assert any(not np.array_equal(first[key], contrastive[key]) for key in first)


def test_shares_are_nested(script, tmp_path):
    study = script.Study(arguments(script, tmp_path))
    rows = [
        study.arm_data(script.Arm(image_share=s, text_share=s), study.setup.train)
        for s in (0.25, 0.5, 1.0)
    ]  # fmt: skip
    assert [len(data.usable_images()) for data in rows] == [20, 40, 80]
    assert set(rows[0].image_rows) < set(rows[1].image_rows)
    assert set(rows[0].text_rows) < set(rows[1].text_rows)
    assert rows[2].text_rows is None


def test_every_arm_gets_the_data_that_it_names(script, tmp_path):
    study = script.Study(arguments(script, tmp_path))
    found = {}
    for name, arm in {**script.STUDIES["corpus"], **script.STUDIES["extras"]}.items():
        train = dataclasses.replace(study.setup.train, **arm.train)
        found[name] = study.arm_data(arm, train)
    assert {name: sorted(data.extras()) for name, data in found.items() if data.extras()} == {
        "the most grounded 0.5": ["text_rows"],
        "the most grounded 0.1": ["text_rows"],
        "any 0.1": ["text_rows"],
        "all, hard negatives 0.5": ["neighbours"],
        "class prompts and all, hard negatives 0.5": ["neighbours"],
        **{f"{name}, 8 views": ["views"] for name in ("the paper's", "class prompts", "ours")},
    }
    assert set(found["the most grounded 0.1"].text_rows) < set(
        found["the most grounded 0.5"].text_rows
    )
    assert [len(found[n].texts) for n in ("all", "class prompts", "class prompts and all")] == [
        80, 3, 83,
    ]  # fmt: skip


def test_spread_is_over_seeds(script):
    runs = [{"scores": {"s": value}, "cpu_s": 2.0} for value in (1.0, 2.0, 3.0)]
    assert script.summary_of({"a": runs, "b": []}) == {
        "a": {"seeds": 3, "s": 2.0, "s_sd": 1.0, "cpu_s": 2.0},
        "b": {"seeds": 0},
    }


def test_probes_are_added_to_what_is_finished(script, tmp_path, monkeypatch):
    monkeypatch.setattr(script.Study, "probe_sets", lambda study: study.evaluate.eval_sets)
    monkeypatch.setitem(script.STUDIES, "unpaired", {"distilled": script.Arm()})
    plain = script.run_study(arguments(script, tmp_path, "--seeds", "0"))
    probed = script.run_study(arguments(script, tmp_path, "--seeds", "0", "--probe"))
    name = "test_probe_pct"
    assert name not in plain["arms"]["distilled"]
    for row in (probed["teacher"], probed["arms"]["distilled"]):
        assert 0 <= row.pop(name) <= 100
    assert (probed["teacher"], probed["arms"]) == (plain["teacher"], plain["arms"])
    assert probed["devices"] == [script.device_name()]


def test_sentences_are_embedded_once(script, tmp_path, monkeypatch):
    study = script.Study(arguments(script, tmp_path))
    study.data("unlabelled", study.teacher.preprocess)
    asked = []
    real = study.teacher.encode_texts
    monkeypatch.setattr(
        study.teacher, "encode_texts", lambda texts: asked.extend(texts) or real(texts)
    )
    arm = script.Arm(texts="beside")
    data = study.arm_data(arm, study.setup.train)
    assert asked == ["a photo of a cat.", "a photo of a dog.", "a photo of a eel."]
    texts = sys.modules["study_data"].EmbeddingStore.open(study.store_dir / "texts")
    rows = np.arange(80)
    assert np.array_equal(data.texts.gather(rows + 3), texts.gather(rows))
    assert np.allclose(data.texts.gather(np.arange(3)), real(asked), atol=1e-3)
