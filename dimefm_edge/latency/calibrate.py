"""Measure this machine: a set of models through its engine, and the prices that explain them.

The prices start from those of published rows (scaled to this machine's peaks) and move as far as
the measured times ask: maximum a posteriori by damped Gauss-Newton, with Student-t residuals, so
that one disturbed timing does not bend the rest. What the profile is worth is measured too: each
model is left out once and predicted by the others.
"""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from dimefm_edge.errors import ConfigError, DimeFMError, lookup
from dimefm_edge.latency.measure import machine_info
from dimefm_edge.latency.operators import COSTS, RATES, Vector, cost_vector
from dimefm_edge.latency.profile import Profile, save_profile
from dimefm_edge.latency.settle import fastest, products, settled_ms
from dimefm_edge.runtime.onnxruntime import count_physical_cores

if TYPE_CHECKING:
    from dimefm_edge.students import StudentSpec

logger = logging.getLogger(__name__)

PRECISIONS = ("fp32", "int8")
MODELS = (  # (timm model or named student, pixels): every kind of operator, 1 to 60 ms
    ("timm:resnet18", 224), ("timm:resnet18d", 128), ("timm:resnet50", 160),
    ("timm:resnet26", 128), ("timm:resnext50_32x4d", 128), ("timm:resnext26ts", 128),
    ("timm:inception_v3", 160), ("timm:densenet121", 128), ("timm:hgnetv2_b0", 160),
    ("timm:mobilenetv2_100", 224), ("timm:mobilenetv3_small_100", 224),
    ("timm:mobilenetv3_large_100", 160), ("timm:mobilenetv4_conv_small_050", 224),
    ("timm:mobileone_s0", 192), ("timm:efficientnet_lite0", 192), ("timm:tinynet_e", 106),
    ("timm:lcnet_100", 224), ("timm:ghostnet_100", 224), ("timm:repghostnet_100", 192),
    ("timm:regnetx_004", 224), ("timm:regnetx_006", 160), ("timm:regnety_002", 224),
    ("timm:regnety_004", 192), ("timm:repvit_m0_9", 224), ("timm:fasternet_t0", 192),
    ("timm:starnet_s1", 192), ("timm:convnext_atto", 224), ("timm:convnext_pico", 160),
    ("timm:convnext_nano", 96), ("timm:convnextv2_femto", 128), ("timm:poolformerv2_s12", 128),
    ("timm:mobilevit_xs", 192), ("timm:mobilevitv2_075", 160), ("timm:levit_128s", 224),
    ("timm:fastvit_t8", 192), ("timm:edgenext_x_small", 192), ("timm:efficientformer_l1", 224),
    ("timm:swiftformer_xs", 224), ("timm:pit_ti_224", 224), ("timm:xcit_nano_12_p16_224", 224),
    ("timm:vit_tiny_patch16_224", 224), ("timm:vit_small_patch32_224", 224),
    ("timm:vit_small_patch16_224", 224), ("timm:mixer_s32_224", 224), ("timm:gmlp_ti16_224", 224),
    ("vit-p8-w128-d4", 64), ("vit-p16-w128-d4", 128), ("vit-p16-w192-d6", 128),
    ("vit-p16-w320-d4", 160), ("vit-p16-w448-d6", 224), ("vit-p32-w512-d8", 224),
    ("vit-p32-w768-d4", 224), ("convnet-w32-d1.1.2.1", 128), ("convnet-w48-d2.2.4.2", 160),
    ("hybrid-w16-d1.1.1.1", 64), ("hybrid-w32-d1.1.2.1", 128), ("hybrid-w48-d2.2.4.2", 160),
    ("hybrid-w64-d2.2.6.2", 224), ("hybrid-w80-d1.1.2.1", 96),
)  # fmt: skip
"""What is measured, by the names that `student_spec` takes. The more kinds, the better: of 72
models by chance, 32 told the others within 22% (fp32) and 29% (int8) at the 90th percentile, 56
within 19% both (mean of 8 draws; an Intel Xeon with AMX)."""
EMBED_DIM = 512
MIN_MODELS = 8

_SPEED, _RATE, _COST = 1.0, 0.7, 0.5  # standard deviations in log ms: of all, a rate, one cost
_NOISE, _DEGREES = 0.05, 4.0
_STEPS = 40
_CALIBRATION_IMAGES = 4
_SESSIONS, _MIN_ROUNDS = 3, 12  # of one student
_BESIDE = 192, 16  # side and number of products in turn with one student


@dataclass(frozen=True)
class Measured:
    """One model's time on this machine."""

    model: str
    image_size: int
    precision: str
    latency_ms: float
    """Median of its runs, in turn with all others."""
    predicted_ms: float
    """By prices fitted on the other models."""

    @property
    def error(self) -> float:
        """Of the prediction, as a fraction of the truth; signed."""
        return self.predicted_ms / self.latency_ms - 1.0


@dataclass(frozen=True)
class CalibrationReport:
    """What was measured and what came of it."""

    path: Path
    profiles: tuple[Profile, ...]
    measured: tuple[Measured, ...]
    skipped: tuple[tuple[str, str], ...]
    """Models that could not be run here, and why."""


Progress = Callable[[str], None]


def calibrate(
    *,
    precisions: Sequence[str] = PRECISIONS,
    models: Sequence[tuple[str, int]] = MODELS,
    threads: int = 0,
    progress: Progress = lambda what: None,
) -> CalibrationReport:
    """Measure this machine and keep its profile, which estimates for `local` then use.

    Args:
        precisions: Of `PRECISIONS`.
        models: As `MODELS` has them; at least `MIN_MODELS`.
        threads: Of ONNX Runtime; 0: one a physical core.
        progress: Called with each model's name as it is built, and loaded in each precision, and
            with each round of timing: models x (1 + precisions) + MAX_ROUNDS calls.

    Raises:
        ConfigError: If there are too few models.
        DimeFMError: If too few of them can be run.
    """
    for precision in precisions:
        lookup(dict.fromkeys(PRECISIONS), precision, kind="precision to calibrate")
    if len(models) < MIN_MODELS:
        raise ConfigError(f"calibrating takes {MIN_MODELS} models or more, got {len(models)}")
    costs: dict[str, Vector] = {}
    with tempfile.TemporaryDirectory(prefix="dimefm-calibrate-") as folder:
        graphs, skipped = export_models(models, precisions, Path(folder), costs, progress)
        times = measure_graphs(graphs, threads=threads, progress=progress)
    profiles: list[Profile] = []
    measured = []
    for precision in sorted(set(precisions), key=PRECISIONS.index):
        names = [name for name, kind in times if kind == precision]
        if len(names) < MIN_MODELS:
            raise DimeFMError(
                f"only {len(names)} of {len(models)} models run in {precision} here",
                hint="dimefm-edge doctor",
            )
        table = np.array([costs[name] for name in names])
        milliseconds = np.array([times[name, precision] for name in names])
        # int8 starts from what fp32 was found to take here: nearer than any published int8.
        start = profiles[0].log_prices if profiles else prior(precision)
        profile, left_out = fit_profile(table, milliseconds, prior=start, precision=precision)
        profiles.append(profile)
        for name, truth, guess in zip(names, milliseconds, left_out, strict=True):
            model, _, size = name.rpartition("@")
            measured.append(Measured(model, int(size), precision, float(truth), float(guess)))
    path = save_profile(profiles, machine_info())
    return CalibrationReport(path, tuple(profiles), tuple(measured), tuple(skipped))


def prior(precision: str) -> Vector:
    """log prices before anything is measured: published ones, scaled to this machine's peaks."""
    from dimefm_edge.latency.estimate import published_place
    from dimefm_edge.targets import LOCAL, load_target

    return published_place(load_target(LOCAL), precision).log_prices


def export_models(
    models: Sequence[tuple[str, int]],
    precisions: Sequence[str],
    folder: Path,
    costs: dict[str, Vector],
    progress: Progress,
) -> tuple[dict[tuple[str, str], tuple[Path, StudentSpec]], list[tuple[str, str]]]:
    """Write each model in each precision.

    Args:
        models: As `MODELS` has them.
        precisions: Of `PRECISIONS`.
        folder: Where the files go.
        costs: Gets each model's counts, by name.
        progress: Called with what is being done.

    Returns:
        (name, precision) -> file and spec; and the models that could not be written, with why.
    """
    from dimefm_edge.latency.trace import trace_student
    from dimefm_edge.students import student_spec

    graphs: dict[tuple[str, str], tuple[Path, StudentSpec]] = {}
    skipped = []
    for model, size in models:
        name = f"{model}@{size}"
        progress(f"export {name}")
        try:
            spec = student_spec(model, image_size=size, embed_dim=EMBED_DIM)
            costs[name] = cost_vector(trace_student(spec))
            for precision, path in export_graphs(
                spec, folder / f"{len(costs)}", precisions
            ).items():
                graphs[name, precision] = path, spec
        except DimeFMError as error:
            logger.warning("calibrate: %s left out: %s", name, error)
            skipped.append((name, str(error)))
    return graphs, skipped


def export_graphs(spec: StudentSpec, stem: Path, precisions: Sequence[str]) -> dict[str, Path]:
    """Write a student with random weights as it would be deployed here: precision -> file."""
    import onnx
    import torch

    from dimefm_edge.export import export_onnx, graph_spec
    from dimefm_edge.export.int8 import quantize_graph
    from dimefm_edge.export.quant_rules import QUANT_RULES
    from dimefm_edge.students import build_student
    from dimefm_edge.targets import LOCAL, load_target
    from dimefm_edge.targets.cpu import cpu_quant_rules

    torch.manual_seed(0)
    student = build_student(spec).eval()
    side = spec.image_size
    noise = np.random.default_rng(0).normal(size=(_CALIBRATION_IMAGES, 3, side, side))
    images = noise.astype(np.float32)
    path = stem.with_suffix(".fp32.onnx")
    graph = graph_spec(load_target(LOCAL))
    export_onnx(student, path, image_size=side, parity_images=images, metadata={}, spec=graph)
    written = {"fp32": path}
    if "int8" in precisions:
        rules = QUANT_RULES[cpu_quant_rules()]
        written["int8"] = stem.with_suffix(".int8.onnx")
        onnx.save(quantize_graph(onnx.load(path), images, rules=rules), written["int8"])
    return {precision: written[precision] for precision in precisions}


def measure_student(spec: StudentSpec, precision: str) -> float:
    """Milliseconds of a student with random weights on this machine, batch 1: see `settle`.

    Of the fastest of several sessions: one's memory may lie better than another's for as long as it
    lives. Each takes turns with a chain of small products, lest it stay at one speed.
    """
    beside = {"products": products(*_BESIDE, count_physical_cores())}
    with tempfile.TemporaryDirectory(prefix="dimefm-measure-") as folder:
        path = export_graphs(spec, Path(folder) / "student", [precision])[precision]
        times: list[float] = []
        for _ in range(_SESSIONS):
            found = settled_ms(
                {spec.name: _encode(path, spec, precision)} | beside, min_rounds=_MIN_ROUNDS
            )
            times.append(found[spec.name])
    return float(np.median(fastest(times)))


def measure_graphs(
    graphs: dict[tuple[str, str], tuple[Path, StudentSpec]],
    *,
    threads: int = 0,
    progress: Progress = lambda what: None,
) -> dict[tuple[str, str], float]:
    """Time graphs in turn at batch 1, until the fastest blocks of each agree: milliseconds."""
    calls: dict[str, Callable[[], object]] = {}
    for (name, precision), (path, spec) in graphs.items():
        calls[f"{precision} {name}"] = _encode(path, spec, precision, threads=threads)
        progress(f"load {name} {precision}")
    times = settled_ms(calls, progress=progress)
    return {(name, precision): times[f"{precision} {name}"] for name, precision in graphs}


def _encode(
    path: Path, spec: StudentSpec, precision: str, *, threads: int = 0
) -> Callable[[], object]:
    from dimefm_edge.preprocess import PreprocessSpec
    from dimefm_edge.runtime.onnxruntime import OnnxRuntimeEngine

    side = spec.image_size
    engine = OnnxRuntimeEngine(
        path, preprocess=PreprocessSpec(side), embed_dim=spec.embed_dim, threads=threads,
        precision=precision,
    )  # fmt: skip
    image = np.random.default_rng(0).normal(size=(1, 3, side, side)).astype(np.float32)
    return lambda: engine.encode_image(image)


def fit_profile(
    costs: Vector, latency_ms: Vector, *, prior: Vector, precision: str
) -> tuple[Profile, Vector]:
    """Fit prices, and predict each model by the others.

    Args:
        costs: (models, len(COSTS)).
        latency_ms: (models,).
        prior: log prices to start from, (len(COSTS),).
        precision: Noted in the profile.

    Returns:
        The profile, and (models,) ms, each from a fit without that model.
    """
    count = len(latency_ms)
    left_out = np.empty(count)
    for i in range(count):
        rest = np.arange(count) != i
        left_out[i] = np.exp(fit_prices(costs[rest], latency_ms[rest], prior=prior)) @ costs[i]
    misses = abs(np.log(left_out / latency_ms))
    profile = Profile(
        precision,
        fit_prices(costs, latency_ms, prior=prior),
        spread=max(float(np.quantile(misses, 0.8)), 0.02),
        models=count,
        median_error=float(np.median(abs(left_out / latency_ms - 1))),
    )
    return profile, left_out


def fit_prices(costs: Vector, latency_ms: Vector, *, prior: Vector) -> Vector:
    """log prices of the greatest posterior; shapes as in `fit_profile`.

    The unknowns are standard normal: one for the machine, one a rate, one a cost. Levenberg's
    damping; weights of iteratively reweighted least squares for Student-t residuals.
    """
    spread = _spreads()  # (len(COSTS), unknowns)
    unknowns = np.zeros(spread.shape[1])
    target, damping = np.log(latency_ms), 1.0

    def posterior(z: Vector) -> tuple[float, Vector, Vector]:
        parts = costs * np.exp(prior + spread @ z)
        total = parts.sum(1)
        miss = (target - np.log(total)) / _NOISE
        value = (_DEGREES + 1) / 2 * np.log1p(miss**2 / _DEGREES).sum() + z @ z / 2
        return float(value), miss, (parts / total[:, None]) @ spread / _NOISE

    value, miss, slope = posterior(unknowns)
    for _ in range(_STEPS):
        weight = (_DEGREES + 1) / (_DEGREES + miss**2)
        hessian = (slope.T * weight) @ slope + np.eye(len(unknowns))
        gradient = slope.T @ (weight * miss) - unknowns
        step = np.linalg.solve(hessian + damping * np.eye(len(unknowns)), gradient)
        new = posterior(unknowns + step)
        if new[0] < value:
            unknowns, damping = unknowns + step, damping / 3
            done = value - new[0] < 1e-6
            value, miss, slope = new
            if done:
                break
        else:
            damping *= 4
    return np.asarray(prior + spread @ unknowns)


def _spreads() -> Vector:
    """How log prices move with the unknowns: all together, by rate, one by one."""
    rates = list(RATES)
    by_rate = np.zeros((len(COSTS), len(rates)))
    for row, cost in enumerate(COSTS):
        by_rate[row, rates.index(cost.rate)] = _RATE
    return np.hstack([np.full((len(COSTS), 1), _SPEED), by_rate, _COST * np.eye(len(COSTS))])
