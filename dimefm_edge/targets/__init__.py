"""Targets: the devices a student can be made for, as data in profiles/*.toml.

A board is only a target together with its power mode: the same AGX Orin has 16 SMs at 1.3 GHz
or 6 at 0.4 GHz. `jetson-orin@30w` names both; without a mode it is the one the vendor ships.
No torch here.
"""

from __future__ import annotations

import functools
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dimefm_edge.errors import ConfigError, lookup

if sys.version_info >= (3, 11):
    import tomllib
else:  # JetPack 6 has Python 3.10
    import tomli as tomllib

_PROFILES_DIR = Path(__file__).parent / "profiles"
LOCAL = "local"
"""The machine at hand."""


@dataclass(frozen=True)
class Target:
    """A device in one power mode, and how models run there."""

    name: str
    aliases: tuple[str, ...]
    """What else `load_target` takes for the name."""
    mode: str
    """Power mode, as in `name@mode`."""
    modes: tuple[str, ...]
    """All modes that are known for the device."""
    title: str
    runtime: str
    """tensorrt or onnxruntime."""
    precision: str
    """What is used unless the user says otherwise."""
    precisions: tuple[str, ...]
    """What the runtime runs faster than, or as fast as, fp32."""
    latency_ms: float
    """Default budget for one image."""
    peak_tflops: dict[str, float]
    """Dense peak by precision, in 1e12 operations per second (a multiply-add is two)."""
    bandwidth_gbs: float
    """Memory bandwidth, in 1e9 bytes per second."""
    prices: dict[str, str]
    """Whose published latencies stand for it (latency/published.py): `device` and `runtime` as
    the tables write them; `mode`, the target whose peaks those rows had; a precision's name there
    where it is another."""
    providers: tuple[str, ...]
    """ONNX Runtime's execution providers there, the preferred one first."""
    quant_rules: str | None
    """How int8 graphs are quantised for its CPU; None: as the machine at hand wants it."""
    sm: str | None
    """CUDA architecture, such as sm_87; None on CPUs."""
    jetpack: str | None
    tensorrt: str | None
    sources: tuple[str, ...]
    """Where each figure comes from; derived and unconfirmed ones say so. How well its latencies
    are known, `latency.estimate.place_on` says."""

    @property
    def full_name(self) -> str:
        """`name@mode`, which `load_target` takes."""
        return f"{self.name}@{self.mode}"


def load_target(name: str) -> Target:
    """Find a target by name or alias, with or without `@mode`.

    Raises:
        UnknownNameError: If the device or its mode is not known; the message offers the nearest.
    """
    device, _, mode = name.strip().lower().partition("@")
    profile = lookup(_profiles_by_name(), device, kind="target")
    if profile["name"] == LOCAL:
        from dimefm_edge.targets.local import measure_peaks

        profile = {**profile, "modes": {"measured": measure_peaks()}}
    chosen = mode or profile["default_mode"]
    return _target(profile, chosen)


def list_targets() -> list[Target]:
    """Every device in its default mode, by name; `local` is measured on the way."""
    return [load_target(name) for name in sorted({p["name"] for p in _profiles()})]


@functools.cache
def _profiles() -> tuple[dict[str, Any], ...]:
    paths = sorted(_PROFILES_DIR.glob("*.toml"))
    return tuple(tomllib.loads(path.read_text(encoding="utf-8")) for path in paths)


@functools.cache
def _profiles_by_name() -> dict[str, dict[str, Any]]:
    table: dict[str, dict[str, Any]] = {}
    for profile in _profiles():
        for name in (profile["name"], *profile.get("aliases", ())):
            if name in table:
                raise ConfigError(f"two target profiles are called {name}")
            table[name] = profile
    return table


def _target(profile: dict[str, Any], mode: str) -> Target:
    figures = lookup(profile["modes"], mode, kind=f"power mode of {profile['name']}")
    return Target(
        name=profile["name"],
        aliases=tuple(profile.get("aliases", ())),
        mode=mode,
        modes=tuple(profile["modes"]),
        title=profile["title"],
        runtime=profile["runtime"],
        precision=profile["precision"],
        precisions=tuple(profile["precisions"]),
        latency_ms=float(profile["latency_ms"]),
        peak_tflops={k: float(v) for k, v in figures["peak_tflops"].items()},
        bandwidth_gbs=float(figures["bandwidth_gbs"]),
        prices=dict(profile["prices"]),
        providers=tuple(profile.get("providers", ("cpu",))),
        quant_rules=profile.get("quant_rules"),
        sm=profile.get("sm"),
        jetpack=profile.get("jetpack"),
        tensorrt=profile.get("tensorrt"),
        sources=(*profile["sources"], *figures["sources"]),
    )
