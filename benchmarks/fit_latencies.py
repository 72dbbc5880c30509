"""Fit the latency model to published latencies: writes dimefm_edge/latency/published.json.

    python benchmarks/fit_latencies.py ROWS.csv [--write] | python benchmarks/record.py latencies

ROWS.csv has the columns of shared/data/edge_latency.csv. Prints the error on models that were
held out (8 folds, grouped by model; the mean of twelve ways to fold, and of twelve others that no
setting was chosen by), on rows that were held out, the rank correlation within each context and
each device, and how often the truth lies in the 80% interval.
Detectors and torchvision's models, which some devices have nothing but, are among them
(row_models.py).

Rows left out, and why: see NOT_ONE_CALL and FALLS_BACK. One call of the model is what is fitted.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from itertools import repeat
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from dimefm_edge.latency.analogy import LEVELS
from dimefm_edge.latency.operators import COSTS, PRIORS, RATES
from dimefm_edge.latency.published import (
    MODEL_PATH,
    Context,
    context_of,
    parse_published,
    with_fallback,
)
from dimefm_edge.latency.rows import TraceCache, timm_key

if __package__:
    from benchmarks.fit_analogy import fit_analogy, to_dict
    from benchmarks.row_models import OTHER_MODELS, trace_any
else:
    from fit_analogy import fit_analogy, to_dict
    from row_models import OTHER_MODELS, trace_any


NOT_ONE_CALL = re.compile("throughput|offline|multistream|dla|p99|b8|pipeline", re.I)
NOT_ONE_CALL_SOURCES = re.compile("THROUGHPUT|from FPS")
"""Runtimes and sources whose rows are not the time of one call: images per second turned round,
several engines at once, whole applications, tails. Hailo's 1000/FPS at batch 1 stay: it has no
others, and a context of its own."""
FALLS_BACK = ("SA8775P ADP", "tflite (NPU)", "fp16")
"""Eight times slower than the same chip's qnn_dlc on most models: it did not run on the NPU."""

NOTED = (  # (device, runtime, precision, model, ms): onnxsim/onnxsim scripts/nvidia/README.md, as
    # shared/devices.md quotes it: 3.1 and 3.5 GMAC/ms; the only ViT on a Jetson
    ("Jetson Orin Nano 8GB (MAXN_SUPER)", "TensorRT 10.3 (trtexec GPU compute)", "fp16",
     "vit_base_patch16_224@224", 17.5 / 3.1),
    ("Jetson Orin Nano 8GB (MAXN_SUPER)", "TensorRT 10.3 (trtexec GPU compute)", "int8",
     "vit_base_patch16_224@224", 17.5 / 3.5),
)  # fmt: skip
"""Latencies that are in no table but in its notes."""

LEVEL_SPREADS = {  # standard deviations of a level's offsets: of all, of a rate, of one cost
    "all": (0.0, 2.0, 0.3),
    "hardware": (1.0, 0.5, 0.5),
    "hardware-precision": (0.5, 0.3, 0.15),
    "runtime-precision": (0.3, 0.3, 0.16),
    "device": (1.5, 0.3, 0.0),
    "context": (0.3, 0.15, 0.0),
}
"""What one cost takes beside others is a matter of hardware: with most of it shared by all, what
NPUs pay for attention and norms became a CPU's price, and ViTs there several times too slow."""
FALLBACK_SPREAD = 1.5
"""The same of `macs_fallback` at `all`: what leaves the accelerator is one CPU's work whatever the
precision, so that transformers in one tell what they take in another."""
RESIDUAL_SPREADS = {"hardware": 0.025, "hardware-precision": 0.015, "runtime-precision": 0.0125}
"""What single models take more or less than their costs say, while fitting: keeps twenty rows of
one model on twenty phones from counting as twenty. Narrow, since what it explains of odd models
the tails of the residuals explain as well, and models never seen are the better for it."""
KEPT_RESIDUALS = {"hardware-precision": 1.0, "runtime-precision": 1.0}
"""Levels at which the fit keeps a model's residual for later, and how many rows it is shrunk by."""
NOISE, DEGREES = 0.10, 2.0
FOLDS, SEEDS = 8, tuple(range(12))
OTHER_SEEDS = tuple(range(24, 36))
"""Of folds that no setting above was chosen by; those of SEEDS, and the twelve after, were looked
at. Which models share a fold decides: one way had 36% at the 90th percentile, one 57%."""
RATE_OF = torch.tensor([list(RATES).index(cost.rate) for cost in COSTS])
FALLBACK = [cost.name for cost in COSTS].index("macs_fallback")
torch.set_default_dtype(torch.float64)
torch.set_num_threads(1)  # small tensors: a second thread only waits


@dataclass
class Rows:
    """Rows ready for fitting."""

    frame: pd.DataFrame
    costs: np.ndarray
    """(rows, len(COSTS))"""
    log_ms: np.ndarray
    contexts: list[Context]
    models: list[str]

    def take(self, mask: np.ndarray) -> Rows:
        where = np.flatnonzero(mask)
        return Rows(
            self.frame.iloc[where], self.costs[where], self.log_ms[where],
            [self.contexts[i] for i in where], [self.models[i] for i in where],
        )  # fmt: skip

    def keys(self, level: str) -> list[str]:
        return [c.levels[level] for c in self.contexts]


def read_rows(path: Path, cache: TraceCache) -> Rows:
    """Read, clean and trace."""
    frame = pd.read_csv(path, dtype={"resolution": str})
    is_latency = ~frame.runtime.str.contains(NOT_ONE_CALL)
    is_latency &= ~frame.source_repo_or_url.str.contains(NOT_ONE_CALL_SOURCES)
    same = [
        row == FALLS_BACK for row in zip(frame.device, frame.runtime, frame.precision, strict=True)
    ]
    names = ("device", "runtime", "precision", "timm_name_if_any", "latency_ms")
    noted = pd.DataFrame([{**dict(zip(names, n, strict=True)), "batch": 1.0} for n in NOTED])
    noted["timm_name_if_any"], noted["resolution"] = zip(
        *noted.timm_name_if_any.str.split("@"), strict=True
    )
    frame = pd.concat([frame[is_latency & ~np.array(same)], noted], ignore_index=True)
    kept, costs, contexts, models = [], [], [], []
    for idx, row in frame.iterrows():
        context = context_of(row.device, row.runtime, row.precision)
        model = _model(row)
        if model is None or (model.startswith("ultralytics") and context.hardware == "npu"):
            continue
        vector = cache.costs(model, 1 if np.isnan(row.batch) else int(row.batch), trace=trace_any)
        kept.append(idx)
        costs.append(with_fallback(vector, context))
        contexts.append(context)
        models.append(model)
    frame = frame.loc[kept].reset_index(drop=True)
    return Rows(frame, np.array(costs), np.log(frame.latency_ms.to_numpy()), contexts, models)


def _model(row: Any) -> str | None:
    """`name@size`, the cache's key."""
    if isinstance(row.timm_name_if_any, str):
        if row.timm_name_if_any.startswith("sequencer"):
            return None  # LSTMs: no runtime runs them step by step as the trace sees them
        size = str(row.resolution)
        return timm_key(row.timm_name_if_any, int(size) if size.isdigit() else None)
    extra = OTHER_MODELS.get(row.model)
    is_same = str(row.resolution) in ("224", "227", "256", "640") or row.model.startswith(
        "6x ViT-B"
    )
    return extra if extra is not None and is_same else None


class Fit:
    """Maximum a posteriori of the offsets; non-centred, so that L-BFGS converges."""

    def __init__(self, rows: Rows) -> None:
        self.keys = {level: sorted(set(rows.keys(level))) for level in LEVEL_SPREADS}
        self.residual_keys = {
            level: sorted({f"{k} {m}" for k, m in zip(rows.keys(level), rows.models, strict=True)})
            for level in RESIDUAL_SPREADS
        }
        z: dict[str, Tensor] = {}
        for level, keys in self.keys.items():
            z[f"{level}/speed"] = torch.zeros(len(keys), 1)
            z[f"{level}/rate"] = torch.zeros(len(keys), len(RATES))
            z[f"{level}/cost"] = torch.zeros(len(keys), len(COSTS))
        for level, names in self.residual_keys.items():
            z[f"{level}/residual"] = torch.zeros(len(names))
        self.z = {name: value.requires_grad_(True) for name, value in z.items()}
        self._solve(rows)
        self.z = {name: value.detach() for name, value in self.z.items()}

    def _solve(self, rows: Rows) -> None:
        costs, target = torch.tensor(rows.costs), torch.tensor(rows.log_ms)
        where = {level: _positions(self.keys[level], rows.keys(level)) for level in self.keys}
        own = {
            level: _positions(
                names, [f"{k} {m}" for k, m in zip(rows.keys(level), rows.models, strict=True)]
            )
            for level, names in self.residual_keys.items()
        }
        optimizer = torch.optim.LBFGS(
            list(self.z.values()), max_iter=500, history_size=30,
            line_search_fn="strong_wolfe", tolerance_change=1e-7,
        )  # fmt: skip

        def loss() -> Tensor:
            optimizer.zero_grad()
            price = torch.tensor(PRIORS) + sum(
                self.offsets(level)[where[level]] for level in self.keys
            )
            extra = sum(RESIDUAL_SPREADS[k] * self.z[f"{k}/residual"][own[k]] for k in own)
            miss = (target - extra - torch.log((costs * price.exp()).sum(1))) / NOISE
            likelihood = (DEGREES + 1) / 2 * torch.log1p(miss**2 / DEGREES)
            value = likelihood.sum() + sum((z**2).sum() for z in self.z.values()) / 2
            value.backward()
            return value

        optimizer.step(loss)

    def offsets(self, level: str) -> Tensor:
        """(keys, len(COSTS))"""
        speed, rate, _ = LEVEL_SPREADS[level]
        z = self.z
        return (
            speed * z[f"{level}/speed"]
            + rate * z[f"{level}/rate"][:, RATE_OF]
            + self._singles(level)
        )

    def _singles(self, level: str) -> Tensor:
        """Of costs alone, (keys, len(COSTS))."""
        spread = torch.full((len(COSTS),), LEVEL_SPREADS[level][2])
        if level == "all":
            spread[FALLBACK] = FALLBACK_SPREAD
        return spread * self.z[f"{level}/cost"]

    def to_dict(self) -> dict[str, Any]:
        """Offsets as published.json holds them: by rate, then by cost."""
        levels: dict[str, Any] = {}
        for level, keys in self.keys.items():
            speed, rate, _ = LEVEL_SPREADS[level]
            rates = speed * self.z[f"{level}/speed"] + rate * self.z[f"{level}/rate"]
            singles = self._singles(level)
            levels[level] = {
                key: _named(RATES, rates[i]) | _named([c.name for c in COSTS], singles[i])
                for i, key in enumerate(keys)
            }
        return levels


def _positions(keys: list[str], wanted: list[str]) -> Tensor:
    place = {key: i for i, key in enumerate(keys)}
    return torch.tensor([place[key] for key in wanted])


def _named(names: Any, values: Tensor) -> dict[str, float]:
    rounded = {name: round(float(value), 3) for name, value in zip(names, values, strict=True)}
    return {name: value for name, value in rounded.items() if abs(value) >= 0.005}


def fit(rows: Rows) -> dict[str, Any]:
    """The values of published.json but for the spreads."""
    values = {"offsets": Fit(rows).to_dict(), "residuals": {}, "spreads": {"other": [0.3, 0.5]}}
    keys = {level: rows.keys(level) for level in LEVELS}
    found = fit_analogy(rows.costs, rows.log_ms, keys, rows.models)
    values["analogy"] = to_dict(*found, rows.costs, rows.keys("context"), rows.models)
    for level, shrink in KEPT_RESIDUALS.items():  # each level: what the levels before leave
        miss = rows.log_ms - predict(values, rows)
        groups: dict[str, list[float]] = {}
        for key, model, value in zip(rows.keys(level), rows.models, miss, strict=True):
            groups.setdefault(f"{key} {model}", []).append(float(value))
        values["residuals"][level] = {
            name: round(float(np.median(v)) * len(v) / (len(v) + shrink), 3)
            for name, v in groups.items()
        }
    return values


def predict(values: dict[str, Any], rows: Rows) -> np.ndarray:
    """log ms of each row."""
    model = parse_published(values)
    return np.log([
        model.latency_ms(context, costs, model=name)
        for context, costs, name in zip(rows.contexts, rows.costs, rows.models, strict=True)
    ])  # fmt: skip


def cross_validate(rows: Rows, groups: list[Any], seed: int) -> np.ndarray:
    """Predictions of each row by a fit that saw no row of its group."""
    unique = sorted(set(groups), key=str)
    order = np.random.default_rng(seed).permutation(len(unique))
    fold_of = {unique[i]: place % FOLDS for place, i in enumerate(order)}
    folds = np.array([fold_of[g] for g in groups])
    out = np.zeros(len(folds))
    for fold in range(FOLDS):
        values = fit(rows.take(folds != fold))
        out[folds == fold] = predict(values, rows.take(folds == fold))
        print(f"seed {seed}, fold {fold}", file=sys.stderr, flush=True)
    return out


def spreads(rows: Rows, known: np.ndarray, unknown: np.ndarray) -> dict[str, list[float]]:
    """80% quantiles of the error, by hardware and precision where there are 15 rows."""
    keys = np.array(rows.keys("hardware-precision"))
    out = {}
    for key in [*sorted(set(keys)), "other"]:
        mask = np.ones(len(keys), bool) if key == "other" else keys == key
        if key == "other" or mask.sum() >= 15:
            out[key] = [
                round(float(np.quantile(abs(p - rows.log_ms)[mask], 0.8)), 3)
                for p in (known, unknown)
            ]
    return out


def report(rows: Rows, predicted: np.ndarray, half: Callable[[Context], float]) -> dict[str, float]:
    """Errors on rows with a timm name, as `estimate --rows` would be judged."""
    has_name = rows.frame.timm_name_if_any.notna().to_numpy()
    error = abs(np.exp(predicted - rows.log_ms) - 1)[has_name]
    widths = np.array([half(c) for c in rows.contexts])
    inside = (abs(predicted - rows.log_ms) <= widths)[has_name]
    by_context, by_device = (
        _ranks(rows, predicted, has_name, level) for level in ("context", "device")
    )
    return {
        "rows": len(error),
        "median_error": float(np.median(error)),
        "p90_error": float(np.quantile(error, 0.9)),
        "inside_80_interval": float(inside.mean()),
        "contexts_of_8_models": len(by_context),
        "rank_correlation_median": float(np.median(by_context)),
        "rank_correlation_least": min(by_context),
        "devices_of_8_models": len(by_device),
        "rank_correlation_device_median": float(np.median(by_device)),
        "rank_correlation_device_least": min(by_device),
    }


def _ranks(rows: Rows, predicted: np.ndarray, has_name: np.ndarray, level: str) -> list[float]:
    """Spearman's rank correlation within each context or device that has 8 models or more."""
    keys, models, found = np.array(rows.keys(level)), np.array(rows.models), []
    for key in sorted(set(keys)):
        mask = has_name & (keys == key)
        if len(set(models[mask])) >= 8:
            mine, true = pd.Series(predicted[mask]), pd.Series(rows.log_ms[mask])
            found.append(float(mine.corr(true, method="spearman")))
    return found


def mean_of(reports: list[dict[str, float]]) -> dict[str, float]:
    """Of each figure; which models share a fold moves them by several points."""
    return {name: float(np.mean([r[name] for r in reports])) for name in reports[0]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("rows", type=Path)
    parser.add_argument("--write", action="store_true", help=f"write {MODEL_PATH.name}")
    parser.add_argument("--trace-cache", type=Path, default=None)
    options = parser.parse_args()
    rows = read_rows(options.rows, TraceCache(options.trace_cache))
    models = [m.partition("@")[0].partition(".")[0] for m in rows.models]
    with ProcessPoolExecutor() as pool:
        seeds = (*SEEDS, *OTHER_SEEDS)
        predicted = list(pool.map(cross_validate, repeat(rows), repeat(models), seeds))
    unknown, anew = predicted[: len(SEEDS)], predicted[len(SEEDS) :]
    known = cross_validate(rows, list(range(len(rows.models))), SEEDS[0])
    values = fit(rows) | {"spreads": spreads(rows, known, unknown[0])}
    model = parse_published(values)
    widths = {
        c.name: model.spreads.get(c.levels["hardware-precision"], model.spreads["other"])
        for c in rows.contexts
    }
    half_known, half_unknown = (lambda c, i=i: widths[c.name][i] for i in (0, 1))
    figures = {
        "rows": len(rows.models),
        "models": len(set(rows.models)),
        "contexts": len(set(rows.keys("context"))),
        "models_never_seen": mean_of([report(rows, p, half_unknown) for p in unknown]),
        "models_never_seen_in_other_folds": mean_of([report(rows, p, half_unknown) for p in anew]),
        "rows_never_seen": report(rows, known, half_known),
        "in_the_fit": report(rows, predict(values, rows), half_known),
    }
    print(json.dumps(figures, indent=2))
    if options.write:
        MODEL_PATH.write_text(json.dumps(values, indent=0, sort_keys=True) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
