"""Settings: what is written is read back, what is wrong is named with its place."""

from __future__ import annotations

import contextlib
import dataclasses
import math
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dimefm_edge.config import (
    DataConfig,
    LossConfig,
    RunConfig,
    StudentConfig,
    TrainConfig,
    from_dict,
    load,
    save,
)
from dimefm_edge.errors import ConfigError, DimeFMError

NAMES = st.text(st.characters(codec="utf-8", exclude_characters="\0"), min_size=1, max_size=20)
RUNS = st.builds(
    RunConfig,
    target=NAMES,
    store=st.none() | NAMES,
    data=st.builds(
        DataConfig,
        images=st.lists(NAMES, min_size=1, max_size=3).map(tuple),
        max_bad=st.floats(0, 1e6),
    ),
    student=st.builds(
        StudentConfig,
        latency_ms=st.none() | st.floats(1e-3, 1e4),
        init=st.sampled_from(["auto", "random", "teacher", "pretrained"]),
    ),
    train=st.builds(
        TrainConfig,
        epochs=st.floats(1e-3, 1e3),
        steps=st.none() | st.integers(1, 10**9),
        flip=st.none() | st.booleans(),
        seed=st.integers(0, 2**31),
    ),
)


@given(run=RUNS)
def test_what_is_saved_is_loaded(run, tmp_path_factory):
    path = tmp_path_factory.getbasetemp() / "round.toml"
    save(run, path)
    assert load(path, RunConfig) == run


def test_defaults_are_a_whole_run(tmp_path):
    path = tmp_path / "empty.toml"
    path.write_text("")
    assert load(path, RunConfig) == RunConfig()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('tarjet = "x"', r"unknown key 'tarjet'\. Did you mean 'target'\?"),
        ("[train]\nepoch = 1", r"train: unknown key 'epoch'\. Did you mean 'epochs'\?"),
        ("[train]\nepochs = 'many'", r"train: epochs must be float, got 'many'"),
        ("[train]\nsteps = 1.5", r"train: steps must be int, got 1\.5"),
        ("[train]\nsteps = true", r"train: steps must be int, got True"),
        ("[data]\nimages = 'x'", r"data: images must be a list, got 'x'"),
        ("[train]\npseudo_texts = 64", r"train: unknown key 'pseudo_texts'"),
        ("[data]\nimages = [1]", r"data: images must be str, got 1"),
        ('precision = "int4"', r"precision must be one of fp32, fp16, got 'int4'"),
        ("train = 3", r"train must be TrainConfig, got 3"),
        ("target = ", r"is not TOML"),
        ("[train]\nbatch_size = 10\naccumulate = 3", r"accumulate \(3\) must divide batch_size"),
    ],
)
def test_a_wrong_file_is_answered_with_its_place(text, message, tmp_path):
    path = tmp_path / "run.toml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=message) as caught:
        load(path, RunConfig)
    assert "is not TOML" in message or "accumulate" in message or str(path) in str(caught.value)


def test_files_that_cannot_be_read(tmp_path):
    with pytest.raises(ConfigError, match=r"no config file at .*none\.toml"):
        load(tmp_path / "none.toml", RunConfig)
    with pytest.raises(ConfigError, match="cannot read"):
        load(tmp_path, RunConfig)
    (tmp_path / "latin.toml").write_bytes(b'target = "\xe9"')
    with pytest.raises(ConfigError, match="is not TOML"):
        load(tmp_path / "latin.toml", RunConfig)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: DataConfig(images=()), "at least one source of images"),
        (lambda: DataConfig(texts=()), "at least one source of sentences"),
        (lambda: DataConfig(max_bad=-1), "max_bad must not be negative, got -1"),
        (lambda: StudentConfig(latency_ms=0), "latency_ms must be positive, got 0"),
        (lambda: StudentConfig(image_size=-3), "image_size must be positive, got -3"),
        (lambda: LossConfig(vl_weight=0, pvl_weight=0), "loss weights"),
        (lambda: LossConfig(udist_weight=-1), "udist_weight must not be negative, got -1"),
        (lambda: LossConfig(vl_weight=math.nan), "vl_weight must not be negative, got nan"),
        (lambda: LossConfig(pvl_temperature=0), "pvl_temperature must be positive, got 0"),
        (lambda: TrainConfig(lr=math.nan), "lr must be positive, got nan"),
        (lambda: TrainConfig(lr=math.inf), "lr must be positive, got inf"),
        (lambda: TrainConfig(clip_norm=-1), "clip_norm must not be negative, got -1"),
        (lambda: TrainConfig(weight_decay=-1), "weight_decay must not be negative, got -1"),
        (lambda: TrainConfig(threads=-3), "threads must not be negative, got -3"),
        (lambda: TrainConfig(warmup_ratio=-2), r"warmup_ratio must be in \[0, 1\], got -2"),
        (lambda: TrainConfig(min_lr_ratio=math.nan), r"min_lr_ratio must be in \[0, 1\], got nan"),
        (lambda: DataConfig(workers=-2), "workers must not be negative, got -2"),
        (lambda: TrainConfig(lr=0), "lr must be positive, got 0"),
        (lambda: TrainConfig(steps=0), "steps must be positive, got 0"),
        (lambda: TrainConfig(min_crop=0), r"min_crop must be in \(0, 1\], got 0"),
        (lambda: TrainConfig(ema_decay=1), r"ema_decay must be in \[0, 1\), got 1"),
        (lambda: TrainConfig(seed=-1), r"seed must be in \[0, 2\*\*63\), got -1"),
        (lambda: TrainConfig(seed=2**63), "seed must be in"),
    ],
)
def test_values_that_cannot_be(build, message):
    with pytest.raises(ConfigError, match=message):
        build()


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner),
    max_leaves=5,
)
FIELDS = [f.name for f in dataclasses.fields(RunConfig)] + [
    f.name for f in dataclasses.fields(TrainConfig)
]


@given(st.dictionaries(st.sampled_from(FIELDS), JSON, max_size=4))
def test_anything_is_a_config_or_a_config_error(values):
    for kind in (RunConfig, TrainConfig, LossConfig):
        with contextlib.suppress(DimeFMError):
            assert isinstance(from_dict(values, kind), kind)


def test_numbers_of_the_paper():
    loss = LossConfig()
    assert (loss.vl_weight, loss.pvl_weight, loss.udist_weight) == (0.7, 0.3, 0.0)
    assert (loss.vl_temperature, loss.pvl_temperature, loss.udist_temperature) == (1, 3, 7)
    assert math.isclose(TrainConfig().min_lr_ratio, 4e-5 / 8e-4)


def test_saving_leaves_none_out(tmp_path):
    path = Path(tmp_path, "run.toml")
    save(RunConfig(), path)
    assert "store" not in path.read_text()


@pytest.mark.parametrize(
    ("own", "hint"),
    [
        ({"student": "vit"}, "--student auto"),
        ({"init": "random"}, "--init auto"),
        ({"image_size": 64}, "drop image_size"),
    ],
)
def test_a_student_that_is_trained_on_brings_its_own_shape(own, hint):
    with pytest.raises(ConfigError, match="init_from brings its own") as caught:
        StudentConfig(init_from="runs/cut", **own)
    assert caught.value.hint == hint
    assert StudentConfig(init_from="runs/cut", latency_ms=2.0).init_from == "runs/cut"


def test_a_run_from_before_a_setting_went_is_read(tmp_path):
    path = tmp_path / "config.toml"
    path.write_text("[train]\npseudo_texts = 0\nsteps = 3\n")
    assert load(path, RunConfig).train.steps == 3
