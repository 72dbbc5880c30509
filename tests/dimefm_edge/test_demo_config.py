"""The demo's settings refuse what no page can be."""

from __future__ import annotations

import pytest

from dimefm_edge.demo_config import DemoConfig
from dimefm_edge.errors import InputError


@pytest.mark.parametrize("name", ["concurrency", "max_queue", "max_upload_mib"])
def test_counts_are_one_at_least(name):
    with pytest.raises(InputError, match=f"{name} must be 1 at least, got 0"):
        DemoConfig(**{name: 0})
    assert getattr(DemoConfig(**{name: 1}), name) == 1


@pytest.mark.parametrize("port", [0, -1, 65536])
def test_ports_are_tcps(port):
    with pytest.raises(InputError, match=f"port must be 1 to 65535, got {port}"):
        DemoConfig(port=port)
    assert DemoConfig(port=65535).port == 65535
