"""What no classification can be is refused in the words of its flags."""

from __future__ import annotations

import pytest

from dimefm_edge.classify_config import ClassifyConfig
from dimefm_edge.errors import InputError


def test_an_image_has_a_name_at_least():
    with pytest.raises(InputError, match="--top must be 1 at least, got 0"):
        ClassifyConfig(top=0)
    assert ClassifyConfig(top=1).top == 1


def test_threads_are_not_negative():
    with pytest.raises(InputError, match="--threads must not be negative, got -1"):
        ClassifyConfig(threads=-1)
