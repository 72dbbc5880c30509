"""What `calibrate` measured on this machine: prices of each cost, kept in the user's folder.

A profile holds for one machine (CPU or GPU, runtime version, threads); on another it is not
used. calibrate.py makes them, estimate.py reads them. No torch here.
"""

from __future__ import annotations

import functools
import hashlib
import json
import logging
import platform
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from dimefm_edge.errors import CheckpointError
from dimefm_edge.files import atomic_file, user_config_dir
from dimefm_edge.latency.operators import COST_NAMES, COUNTING, Vector
from dimefm_edge.targets import LOCAL, Target

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Profile:
    """Prices on one machine, in one precision."""

    precision: str
    log_prices: Vector
    """log ms of one unit of each cost, shape (len(COSTS),)."""
    spread: float
    """Half width of the 80% interval in log ms: of errors on models left out of the fit."""
    models: int
    """How many were measured."""
    median_error: float
    """Of models left out, as a fraction."""

    def to_dict(self) -> dict[str, Any]:
        """JSON values; prices by name."""
        prices = zip(COST_NAMES, map(float, self.log_prices), strict=True)
        return {
            "log_prices": {name: round(value, 4) for name, value in prices},
            "spread": round(self.spread, 4),
            "models": self.models,
            "median_error": round(self.median_error, 4),
        }


@functools.cache
def machine_key() -> str:
    """What a profile holds for: CPU, its cores, and ONNX Runtime's version."""
    from dimefm_edge.latency.measure import machine_info

    info = machine_info()
    parts = (
        info["cpu"], info["architecture"], info["cores_physical"], info["cores_available"],
        info["versions"].get("onnxruntime"), platform.system(),
    )  # fmt: skip
    return hashlib.sha256("|".join(map(str, parts)).encode()).hexdigest()[:12]


def profile_path() -> Path:
    """Where this machine's profile is kept."""
    return user_config_dir("profiles", f"{machine_key()}.json")


def load_profile(target: Target, precision: str) -> Profile | None:
    """This machine's profile in a precision; None if it is another target, was not measured, or
    what models count has changed since.

    Raises:
        CheckpointError: If the file is there and cannot be read.
    """
    if target.name != LOCAL:
        return None
    path = profile_path()
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise _unreadable(path, str(error)) from error
    try:
        if values["format"] != COUNTING:
            logger.warning("%s was measured by older counts and is left out: calibrate again", path)
            return None
        if precision not in values["precisions"]:
            return None
        return _parse(precision, values["precisions"][precision])
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise _unreadable(path, f"{type(error).__name__} {error}") from error


def _parse(precision: str, values: dict[str, Any]) -> Profile:
    prices = np.array([float(values["log_prices"][name]) for name in COST_NAMES])
    if not np.isfinite(prices).all():
        raise ValueError("a price is not finite")
    return Profile(
        precision, prices, float(values["spread"]), int(values["models"]),
        float(values["median_error"]),
    )  # fmt: skip


def save_profile(profiles: list[Profile], machine: dict[str, Any]) -> Path:
    """Write this machine's profile, by rename; precisions that were not measured anew stay."""
    path = profile_path()
    try:
        before = json.loads(path.read_text(encoding="utf-8"))
        kept = before["precisions"] if before["format"] == COUNTING else {}
    except (OSError, ValueError, KeyError, TypeError):
        kept = {}
    kept.update({profile.precision: profile.to_dict() for profile in profiles})
    path.parent.mkdir(parents=True, exist_ok=True)
    values = {"format": COUNTING, "machine": machine, "precisions": kept}
    with atomic_file(path) as stream:
        stream.write((json.dumps(values, indent=2) + "\n").encode())
    return path


def _unreadable(path: Path, why: str) -> CheckpointError:
    return CheckpointError(
        f"{path} is not a profile of this machine: {why}",
        hint="dimefm-edge calibrate makes it anew",
    )
