"""A Jetson's power and temperatures through jtop, where jetson-stats is installed.

jtop's service knows which rail is the total of which board (its core/power.py), and needs no
rights to read. Without it `sensors` reads the INA3221's own files. Layout: jetson-stats 7.2.
"""

from __future__ import annotations

import contextlib
from typing import Any

_INTERVAL_S = 0.1
"""Asked for; the service may answer more slowly when others listen too."""


class Jtop:
    """An open connection to jtop's service."""

    def __init__(self, client: Any) -> None:
        self._client = client

    def power_w(self) -> dict[str, float]:
        """The board's total by the name of its rail, else the sum of all; empty without rails."""
        total = (self._client.power or {}).get("tot")
        if not total:
            return {}
        return {str(total.get("name", "all rails")): total["power"] / 1e3}

    def temperature_c(self) -> dict[str, float]:
        """By sensor; those that are off say -256 and are left out."""
        return {
            str(name): float(values["temp"])
            for name, values in self._client.temperature.items()
            if values.get("online", True)
        }

    def close(self) -> None:
        with contextlib.suppress(Exception):  # it is to be left, whatever its threads say
            self._client.close()


def open_jtop(notes: list[str]) -> Jtop | None:
    """Connect to jtop's service and wait for its first figures.

    Args:
        notes: Gets why not, where jtop is installed and does not answer.

    Returns:
        None where jetson-stats is not installed, does not answer, or knows no rail.
    """
    try:
        from jtop import JtopException, jtop
    except ImportError:
        return None
    client = jtop(interval=_INTERVAL_S)
    try:
        client.start()
        client.ok()  # waits: before that there are no figures
        found = Jtop(client)
        if found.power_w():
            return found
        notes.append("power: jtop knows no rail of this machine")
    except (JtopException, OSError, KeyError, EOFError) as error:
        said = str(error).strip().splitlines() or [type(error).__name__]
        notes.append(f"power: jtop does not answer: {' '.join(said)}")
    Jtop(client).close()
    return None
