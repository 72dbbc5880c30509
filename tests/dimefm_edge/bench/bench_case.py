"""A result with every figure, and one of a bench that was stopped early."""

from __future__ import annotations

import numpy as np

from dimefm_edge.bench.results import BenchResult, SubjectResult
from dimefm_edge.bench.stages import STAGES


def full_result() -> BenchResult:
    subjects = [_subject("student <b>", 1.0), _subject("teacher & co", 3.5)]
    trace = [
        {"at_s": float(i), "power_w": 5.0 + i % 2, "temperature_c": 40.0 + i, "clock_mhz": 2000.0}
        for i in range(5)
    ]
    return BenchResult(
        subjects, {"cpu": "EPYC <script>alert(1)</script>", "versions": {"numpy": "2"}},
        {"seconds": 2.0, "models": ["a", "b"]}, "complete", ["energy: <i>none</i>"], 100.0, 20.0,
        [10], (1 + np.sin(np.arange(20.0)) / 50).tolist(), ["cpu0 (core)"], trace,
    )  # fmt: skip


def stopped_result() -> BenchResult:
    result = full_result()
    result.state = "stopped"
    result.subjects = [
        SubjectResult("gone", state="failed", error="died <by> SIGSEGV"),
        SubjectResult("never started"),
    ]
    result.trace, result.yardstick_ms, result.throttled = [], [], []
    return result


def _subject(label: str, factor: float) -> SubjectResult:
    rng = np.random.default_rng(0)
    times = factor * rng.lognormal(0, 0.1, 400)
    return SubjectResult(
        label, "ONNX Runtime", "measured", runs=400, rounds_ms=(factor * np.ones(20)).tolist(),
        quantiles_ms=np.percentile(times, np.linspace(0, 100, 201)).tolist(), p50_ms=factor,
        p90_ms=factor * 1.1, p99_ms=factor * 1.3, p999_ms=factor * 1.4, mean_ms=factor,
        images_per_s=1e3 / factor, ratio=factor, ratio_low=factor * 0.99, ratio_high=factor * 1.01,
        is_steady=True, load_ms=30.0, first_ms=4.0, time_to_first_ms=300.0, peak_rss_mib=90.0,
        memory_mib=30.0, size_mib=14.0, params_m=3.6, gmacs=0.02 * factor, moved_mib=10.0,
        power_w=5.5, energy_mj_per_image=5.5 * factor, top1_pct={"scenes": 90.0},
        stages_ms=dict.fromkeys(STAGES, 0.2), end_to_end={
            "p50_ms": 1.2, "p99_ms": 2.0, "images_per_s": 800.0, "ratio": factor,
            "ratio_low": factor, "ratio_high": factor,
        },
        scenarios=[{"scenario": "server", "p50_ms": 1.0, "p90_ms": 2.0, "p99_ms": 3.0,
                    "p999_ms": 3.0, "samples_per_s": 300.0, "queries": 600, "is_valid": False,
                    "why_invalid": "Reduce target QPS"}],
        operators={"operators_ms": factor, "kinds": {"gemm": 0.7, "attention": 0.3}, "top": [
            {"node": "n<1>", "operator": "MatMul", "ms": 0.5, "share": 0.5}]},
    )  # fmt: skip
