"""A run's choice of a student: made once, read again, refused by other settings."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest

from dimefm_edge import choice
from dimefm_edge.choice import inherited_by
from dimefm_edge.config import RunConfig, StudentConfig
from dimefm_edge.errors import BudgetError, CheckpointError, ConfigError
from dimefm_edge.run_log import STATE_FILE
from dimefm_edge.students import build_student, load_student, save_student, student_spec
from dimefm_edge.targets import load_target
from dimefm_edge.teacher import load_teacher


@pytest.fixture
def config(tmp_path, tiny_teacher_dir):
    student = StudentConfig(student="vit-p16-w32-d2")
    return RunConfig(
        target="jetson-orin", teacher=str(tiny_teacher_dir), out=str(tmp_path), student=student
    )


def test_a_choice_is_made_once(config, tmp_path, monkeypatch):
    target, teacher = load_target("jetson-orin"), load_teacher(config.teacher)
    first = choice.choose_student(config, target, teacher)
    choice.keep_choice(first, config)
    assert (tmp_path / "fit.png").is_file()
    kept = (tmp_path / "fit.json").read_bytes()
    monkeypatch.setattr(choice, "fit_student", None)  # it is not asked again
    assert choice.choose_student(config, target, teacher) == first
    choice.keep_choice(first, config)
    assert (tmp_path / "fit.json").read_bytes() == kept


def test_who_does_not_inherit_is_not_chosen_for_it(config):
    target, teacher = load_target("jetson-orin"), load_teacher(config.teacher)
    for init, inherits in (("auto", True), ("teacher", True), ("random", False)):
        student = StudentConfig(init=init, latency_ms=50.0)
        asked = dataclasses.replace(config, student=student)
        found = choice.choose_student(asked, target, teacher)
        assert any(c.inherits for c in found.candidates) == inherits


@pytest.mark.parametrize(
    "changed", ["student", "latency_ms", "max_memory_mib", "image_size", "elastic"]
)
def test_other_settings_are_refused(config, changed):
    target, teacher = load_target("jetson-orin"), load_teacher(config.teacher)
    choice.keep_choice(choice.choose_student(config, target, teacher), config)
    value = {"student": "vit-nano", "elastic": True}.get(changed, 64)
    student = dataclasses.replace(config.student, **{changed: value})
    with pytest.raises(CheckpointError, match=rf"cannot resume .*{changed} was .* and is {value}"):
        choice.choose_student(dataclasses.replace(config, student=student), target, teacher)


def test_on_this_machine_the_choice_is_measured(config, monkeypatch):
    config = dataclasses.replace(
        config, target="local", student=dataclasses.replace(config.student, latency_ms=1e3)
    )
    monkeypatch.setattr(choice, "measure_student", lambda spec, precision: 7.5)
    target, teacher = load_target("local"), load_teacher(config.teacher)
    assert choice.choose_student(config, target, teacher).chosen_candidate.measured_ms == 7.5


@pytest.mark.parametrize(
    "harm",
    [lambda text: text[:100], lambda text: "[]", lambda text: "{}",
     lambda text: json.dumps(json.loads(text) | {"candidates": [{}]})],
)  # fmt: skip
def test_a_damaged_choice_is_named(config, tmp_path, harm):
    target, teacher = load_target("jetson-orin"), load_teacher(config.teacher)
    choice.keep_choice(choice.choose_student(config, target, teacher), config)
    path = tmp_path / "fit.json"
    path.write_text(harm(path.read_text()))
    with pytest.raises(CheckpointError, match=r"fit\.json is damaged"):
        choice.choose_student(config, target, teacher)


def test_what_was_inherited_is_told_as_it_was(tmp_path):
    trunk, layers = ("trunk.conv1.weight", "proj.weight"), ("patch_embed", "blocks.0 <- 1")
    assert inherited_by(tmp_path / "new", trunk, keep=False) == trunk
    run = tmp_path / "run"
    run.mkdir()
    assert inherited_by(run, layers, keep=True) == layers
    assert inherited_by(run, (), keep=True) == layers  # resumed with a teacher that is gone, say
    old = tmp_path / "old"
    old.mkdir()
    (old / STATE_FILE).touch()
    assert inherited_by(old, trunk, keep=True) == ()
    assert inherited_by(old, layers, keep=True) == layers
    assert not (old / "inherited.json").exists()


def test_older_choices_are_read(config, tmp_path, monkeypatch):
    target, teacher = load_target("jetson-orin"), load_teacher(config.teacher)
    first = choice.choose_student(config, target, teacher)
    choice.keep_choice(first, config)
    path = tmp_path / "fit.json"
    values = json.loads(path.read_text())
    del values["asked"]["init_from"], values["asked"]["elastic"]
    folder = Path(config.teacher)
    values["asked"]["teacher"] = folder.name  # as it was given
    path.write_text(json.dumps(values))
    monkeypatch.chdir(folder.parent)
    assert choice.choose_student(config, target, teacher) == first


def test_a_run_to_go_on_from_is_the_choice(config, tiny_run_dir):
    target, teacher = load_target("jetson-orin"), load_teacher(config.teacher)
    student = StudentConfig(init_from=str(tiny_run_dir))
    found = choice.choose_student(dataclasses.replace(config, student=student), target, teacher)
    assert found.chosen == load_student(tiny_run_dir).spec
    assert len(found.candidates) == 1
    strict = dataclasses.replace(student, latency_ms=1e-4)
    with pytest.raises(BudgetError, match="no student meets"):
        choice.choose_student(dataclasses.replace(config, student=strict), target, teacher)


def test_a_run_of_another_teacher_is_refused(config, tmp_path):
    target, teacher = load_target("jetson-orin"), load_teacher(config.teacher)
    spec = student_spec("vit-p16-w32-d2", image_size=32, embed_dim=24)
    path = tmp_path / "other" / "checkpoint.safetensors"
    save_student(path, build_student(spec), spec, teacher.preprocess, {})
    student = StudentConfig(init_from=str(path))
    with pytest.raises(ConfigError, match=r"has embeddings of 24 numbers, teacher .* of 16"):
        choice.choose_student(dataclasses.replace(config, student=student), target, teacher)


def test_an_elastic_student_is_one_that_has_cuts(config):
    target, teacher = load_target("jetson-orin"), load_teacher(config.teacher)
    student = StudentConfig(student="vit-p8-w32-d2", elastic=True)
    with pytest.raises(ConfigError, match="it has no smaller one"):
        choice.choose_student(dataclasses.replace(config, student=student), target, teacher)


def test_an_elastic_student_is_none_of_timms(config):
    target, teacher = load_target("jetson-orin"), load_teacher(config.teacher)
    for is_elastic in (False, True):
        student = StudentConfig(init="random", latency_ms=50.0, elastic=is_elastic)
        fit = choice.choose_student(dataclasses.replace(config, student=student), target, teacher)
        assert any(c.spec.family == "timm" for c in fit.candidates) != is_elastic


def test_a_student_of_images_prepared_otherwise_is_refused(config, tmp_path):
    target, teacher = load_target("jetson-orin"), load_teacher(config.teacher)
    spec = student_spec("vit-p16-w32-d2", image_size=64, embed_dim=16)
    preprocess = dataclasses.replace(teacher.preprocess, image_size=64)
    for mean, is_same in ((preprocess.mean, True), ((0.5, 0.5, 0.5), False)):
        path = tmp_path / f"{is_same}" / "checkpoint.safetensors"
        other = dataclasses.replace(preprocess, mean=mean)
        save_student(path, build_student(spec), spec, other, {})
        asked = dataclasses.replace(config, student=StudentConfig(init_from=str(path)))
        if is_same:
            assert choice.choose_student(asked, target, teacher).chosen == spec
            continue
        with pytest.raises(ConfigError, match="prepared otherwise than teacher"):
            choice.choose_student(asked, target, teacher)


def test_no_path_is_no_run(config):
    target, teacher = load_target("jetson-orin"), load_teacher(config.teacher)
    asked = dataclasses.replace(config, student=StudentConfig(init_from=""))
    with pytest.raises(CheckpointError, match="no checkpoint at"):
        choice.choose_student(asked, target, teacher)


def test_what_it_begins_from_is_named_whole_and_not_itself(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    student = StudentConfig(init_from="run")
    found = choice.begins_from(student, tmp_path / "other")
    assert found.init_from == str(tmp_path / "run")
    assert choice.begins_from(StudentConfig(), tmp_path) == StudentConfig()
    for own in ("run", "run/checkpoint.safetensors"):
        with pytest.raises(ConfigError, match="is the run that is trained on"):
            choice.begins_from(StudentConfig(init_from=own), Path("run"))
