"""Times on a machine of two speeds: the faster is found, a steady one is asked no longer."""

from __future__ import annotations

import logging

import numpy as np
import pytest

from dimefm_edge.latency import settle
from dimefm_edge.latency.settle import (
    AGREEING,
    MAX_ROUNDS,
    MIN_ROUNDS,
    fastest,
    products,
    settled_ms,
)


@pytest.fixture
def machine(monkeypatch):
    """Subjects are functions from the number of a block to its milliseconds; logs whose turn."""
    turns: list[str] = []

    class Subject:
        def __init__(self, name, speed):
            self.name, self.speed, self.blocks = name, speed, 0

        def block(self):
            turns.append(self.name)
            self.blocks += 1
            return np.full(5, self.speed(self.blocks - 1))

    monkeypatch.setattr(settle, "time_block", lambda subject, seconds: subject.block())
    monkeypatch.setattr(settle, "_PAUSE_S", 0.0)
    return Subject, turns


def test_on_a_steady_machine_few_blocks_do_and_subjects_take_turns(machine, caplog):
    subject, turns = machine
    caplog.set_level(logging.INFO)
    subjects = {"a": subject("a", lambda i: 2.0 + 0.01 * i), "b": subject("b", lambda i: 7.0)}
    said = []
    assert settled_ms(subjects, progress=said.append) == pytest.approx({"a": 2.02, "b": 7.0})
    assert len(said) == MAX_ROUNDS
    assert said.count("settled") == MAX_ROUNDS - MIN_ROUNDS
    assert "".join(turns) == "ab" * MIN_ROUNDS
    assert not caplog.records


@pytest.mark.parametrize("seed", range(5))
def test_of_two_speeds_the_faster_is_kept(machine, caplog, seed):
    subject, _ = machine
    caplog.set_level(logging.INFO)
    rng = np.random.default_rng(seed)
    is_fast = rng.random(MAX_ROUNDS) < 0.4
    is_fast[rng.integers(MIN_ROUNDS)] = True  # else three slow ones may agree
    is_fast[-AGREEING:] = True  # else one in 300 has fewer
    noise = rng.normal(1, 0.01, MAX_ROUNDS)
    one = subject("one", lambda i: float(noise[i]) * (1.4 if is_fast[i] else 2.8))
    other = subject("other", lambda i: 3.0)
    times = settled_ms({"one": one, "other": other})
    assert times == pytest.approx({"one": 1.4, "other": 3.0}, rel=0.03)
    assert MIN_ROUNDS <= other.blocks == one.blocks <= MAX_ROUNDS
    if not is_fast[:MIN_ROUNDS].all():
        assert "1 of 2 models were slower at times, one " in caplog.text


def test_one_that_may_stay_slow_for_a_while_is_given_more_blocks(machine):
    subject, _ = machine
    waking = subject("waking", lambda i: 2.8 if i < 7 else 1.4)
    assert settled_ms({"waking": waking}) == {"waking": 2.8}
    waking.blocks = 0
    assert settled_ms({"waking": waking}, min_rounds=12) == {"waking": 1.4}
    assert waking.blocks == 12


def test_blocks_that_never_agree_end_with_the_fastest(machine):
    subject, _ = machine
    drifting = subject("drifting", lambda i: 100 / 1.2**i)
    assert settled_ms({"drifting": drifting}) == pytest.approx({"drifting": 100 / 1.2**19})
    assert drifting.blocks == MAX_ROUNDS


def test_the_fastest_are_those_near_the_fastest():
    assert fastest([1.0, 2.0, 1.09, 1.11]).tolist() == [1.0, 1.09]
    assert fastest([]).tolist() == []


def test_products_are_chained():
    (answer,) = products(8, 3, 1)()
    factors = np.random.default_rng(0).normal(scale=8**-0.5, size=(4, 8, 8))
    assert answer == pytest.approx(np.linalg.multi_dot([factors[3], *factors[:3]]), abs=1e-5)
