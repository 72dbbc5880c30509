"""Numbers that no evaluation can have are refused in the words of their flags."""

from __future__ import annotations

import pytest

from dimefm_edge.errors import InputError
from dimefm_edge.eval_config import EvalConfig


def test_batches_hold_an_image():
    with pytest.raises(InputError, match="--batch-size must be positive, got 0"):
        EvalConfig(batch_size=0)


@pytest.mark.parametrize("name", ["workers", "corruption_images", "seed"])
def test_counts_are_not_negative(name):
    flag = "--" + name.replace("_", "-")
    with pytest.raises(InputError, match=f"{flag} must not be negative, got -1"):
        EvalConfig(**{name: -1})
    assert getattr(EvalConfig(**{name: 0}), name) == 0
