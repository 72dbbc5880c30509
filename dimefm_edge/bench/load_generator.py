"""MLPerf's LoadGen as a source of load: SingleStream, MultiStream, Offline and Server.

Scenarios and percentiles are those of MLPerf Inference (arXiv 1911.02549); figures are read from
LoadGen's own log. Runs here are short, so their results are no MLPerf submissions.
"""

from __future__ import annotations

import json
import queue
import tempfile
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from dimefm_edge.bench.runnable import Feed, Load, Runnable, stack
from dimefm_edge.errors import DimeFMError, MissingExtraError

SCENARIOS = ("single-stream", "multi-stream", "offline", "server")
MULTI_STREAM_SAMPLES = 8
"""Images of one query, as MLPerf Inference sets it."""

_SAMPLES = 64
_ENOUGH = {"single-stream": 64, "multi-stream": 662, "offline": 1, "server": 500}
"""Queries without which LoadGen's early stopping calls a run invalid; a few more for the server."""
_LONGEST_S = 30.0
"""So many queries are sent only where they take no longer."""
_MARK = ":::MLLOG "
_PERCENTILES = ("50.00", "90.00", "95.00", "97.00", "99.00", "99.90")


def run_scenario(
    runnable: Runnable,
    load: Load,
    *,
    scenario: str,
    seconds: float,
    expected_ms: float,
    server_qps: float,
    bound_ms: float,
) -> dict[str, Any]:
    """Run one scenario on random images.

    Args:
        runnable: The loaded model.
        load: `batch_size` images are run at once at most, where the scenario queues them.
        scenario: A name in `SCENARIOS`.
        seconds: LoadGen's minimum duration.
        expected_ms: What one call takes about.
        server_qps: Queries a second that the server scenario sends, Poisson distributed.
        bound_ms: Latency that 99% of the server's queries must keep.

    Returns:
        Percentiles in ms, `samples_per_s` where it is the scenario's result, `is_valid` and
        `why_invalid` as LoadGen says, `log`, and our own count of images answered.

    Raises:
        MissingExtraError: If mlcommons-loadgen is not installed.
        DimeFMError: If the model fails under it.
    """
    lg = _import_loadgen()
    settings = _settings(
        lg, scenario, seconds=seconds, expected_ms=expected_ms, server_qps=server_qps,
        bound_ms=bound_ms, batch_size=load.batch_size, seed=load.seed,
    )  # fmt: skip
    rng = np.random.default_rng(load.seed)
    samples = [runnable.make(rng, 1) for _ in range(_SAMPLES)]
    system = _System(lg, runnable, samples, load.batch_size)
    with tempfile.TemporaryDirectory(prefix="dimefm_edge_loadgen_") as folder:
        output = lg.LogOutputSettings()
        output.outdir, output.copy_summary_to_stdout = folder, False
        log = lg.LogSettings()
        log.log_output, log.enable_trace = output, False
        sut = lg.ConstructSUT(system.issue, lambda: None)
        qsl = lg.ConstructQSL(_SAMPLES, _SAMPLES, lambda _: None, lambda _: None)
        try:
            lg.StartTestWithLogSettings(sut, qsl, settings, log)
        finally:
            system.close()
            lg.DestroyQSL(qsl)
            lg.DestroySUT(sut)
        if system.error is not None:
            raise DimeFMError(f"the model failed under LoadGen: {system.error}")
        entries = parse_log((Path(folder) / "mlperf_log_detail.txt").read_text())
    return summarise_log(entries, scenario) | {"answered": system.answered}


def parse_log(text: str) -> dict[str, Any]:
    """Key -> value of LoadGen's detail log; of a key that comes again, the last."""
    values: dict[str, Any] = {}
    for line in text.splitlines():
        if not line.startswith(_MARK):
            continue
        try:
            entry = json.loads(line[len(_MARK) :])
        except ValueError:  # a line that was cut
            continue
        if isinstance(entry, dict) and "key" in entry:
            values[str(entry["key"])] = entry.get("value")
    return values


def summarise_log(entries: dict[str, Any], scenario: str) -> dict[str, Any]:
    """The figures of one scenario out of LoadGen's log."""
    per = "per_query_latency_ns" if scenario == "multi-stream" else "latency_ns"
    summary: dict[str, Any] = {"scenario": scenario}
    for percentile in _PERCENTILES:
        key = f"result_{percentile}_percentile_{per}"
        if entries.get(key) is not None:
            name = f"{float(percentile):g}".replace(".", "")
            summary[f"p{name}_ms"] = float(entries[key]) / 1e6
    rates = (
        "result_samples_per_second", "result_completed_samples_per_sec",
        "result_qps_without_loadgen_overhead",
    )  # fmt: skip
    found = [float(entries[key]) for key in rates if entries.get(key) is not None]
    summary["samples_per_s"] = found[0] if found else None
    summary["is_valid"] = entries.get("result_validity") == "VALID"
    why = entries.get("result_invalid_reason") or entries.get("early_stopping_result")
    said = " ".join(str(why or "LoadGen did not say").replace("*", " ").split())
    summary["why_invalid"] = None if summary["is_valid"] else said
    summary["queries"] = entries.get("result_query_count")
    return summary


class _System:
    """The system under test: answers what LoadGen issues, on a thread of its own."""

    def __init__(
        self, lg: Any, runnable: Runnable, samples: Sequence[Feed], batch_size: int
    ) -> None:
        self._lg, self._runnable, self._samples = lg, runnable, samples
        self._batch_size = batch_size
        self._waiting: queue.Queue[Any] = queue.Queue()
        self.answered = 0
        self.error: Exception | None = None
        self._thread = threading.Thread(target=self._answer, daemon=True)
        self._thread.start()

    def issue(self, queries: Sequence[Any]) -> None:
        for query in queries:
            self._waiting.put(query)

    def close(self) -> None:
        self._waiting.put(None)
        self._thread.join()

    def _answer(self) -> None:
        while (query := self._waiting.get()) is not None:
            batch = [query]
            while len(batch) < self._batch_size and not self._waiting.empty():
                later = self._waiting.get()
                if later is None:
                    self._waiting.put(None)
                    break
                batch.append(later)
            self._answer_batch(batch)

    def _answer_batch(self, batch: Sequence[Any]) -> None:
        if self.error is None:
            try:
                missing = max(0, (self._runnable.fixed_batch or 1) - len(batch))
                padded = [*batch, *[batch[-1]] * missing]
                self._runnable.run(stack([self._samples[query.index] for query in padded]))
                self.answered += len(batch)
            except Exception as error:  # a model's own code may raise anything
                self.error = error
        # Each must be told complete, or LoadGen waits for ever.
        self._lg.QuerySamplesComplete(
            [self._lg.QuerySampleResponse(query.id, 0, 0) for query in batch]
        )


def _settings(
    lg: Any, scenario: str, *, seconds: float, expected_ms: float, server_qps: float,
    bound_ms: float, batch_size: int, seed: int,
) -> Any:  # fmt: skip
    settings = lg.TestSettings()
    settings.mode = lg.TestMode.PerformanceOnly
    settings.min_duration_ms = int(1e3 * seconds)
    images = MULTI_STREAM_SAMPLES if scenario == "multi-stream" else 1
    query_ms = 1e3 / server_qps if scenario == "server" else images * expected_ms
    enough = _ENOUGH[scenario]
    settings.min_query_count = enough if enough * query_ms <= 1e3 * _LONGEST_S else 1
    settings.qsl_rng_seed = settings.sample_index_rng_seed = settings.schedule_rng_seed = seed + 1
    expected_ns = max(1, int(1e6 * expected_ms))
    if scenario == "single-stream":
        settings.scenario = lg.TestScenario.SingleStream
        settings.single_stream_expected_latency_ns = expected_ns
        settings.single_stream_target_latency_percentile = 0.9
    elif scenario == "multi-stream":
        settings.scenario = lg.TestScenario.MultiStream
        settings.multi_stream_samples_per_query = MULTI_STREAM_SAMPLES
        settings.multi_stream_expected_latency_ns = MULTI_STREAM_SAMPLES * expected_ns
        settings.multi_stream_target_latency_percentile = 0.99
    elif scenario == "offline":
        settings.scenario = lg.TestScenario.Offline
        settings.offline_expected_qps = 1e3 * batch_size / expected_ms
    else:
        settings.scenario = lg.TestScenario.Server
        settings.server_target_qps = server_qps
        settings.server_target_latency_ns = int(1e6 * bound_ms)
        settings.server_target_latency_percentile = 0.99
        settings.server_coalesce_queries = False
    return settings


def _import_loadgen() -> Any:
    try:
        import mlperf_loadgen
    except ImportError as error:
        raise MissingExtraError(
            "MLPerf's LoadGen is not installed",
            hint="pip install mlcommons-loadgen  (where there is no wheel it is built: g++ and "
            "Python's headers are needed); or leave --scenario out",
        ) from error
    return mlperf_loadgen
