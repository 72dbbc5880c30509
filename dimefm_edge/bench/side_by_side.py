"""The bench itself: models made ready, loaded, warmed up, and timed in rounds of short turns.

Each model has a process of its own, stopped but in its turn; a round gives each a turn in random
order. A machine that slows down slows all of a round, so ratios are taken round by round. What
fails ends its model only, and Ctrl-C keeps what there is.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from dimefm_edge.bench.accuracy import zero_shot_top1
from dimefm_edge.bench.machine import COPY_BYTES, GEMM_FLOP, machine_subject
from dimefm_edge.bench.prepare import Prepared
from dimefm_edge.bench.processes import (
    Message,
    SubjectProcess,
    load_message,
    prepare_apart,
    subject_process,
)
from dimefm_edge.bench.results import BenchResult, SubjectResult
from dimefm_edge.bench.runnable import Load
from dimefm_edge.bench.sensors import Recorder, Sensors, find_sensors
from dimefm_edge.bench.specs import SubjectSpec, parse_subjects
from dimefm_edge.bench.stages import image_files, name_some
from dimefm_edge.bench.summary import summarise_calls, summarise_stages
from dimefm_edge.bench_config import BenchConfig
from dimefm_edge.errors import DimeFMError
from dimefm_edge.latency.measure import machine_info
from dimefm_edge.progress import counting
from dimefm_edge.runtime.onnxruntime import count_physical_cores

TURN_S = 0.1
"""Timed calls of one turn: short beside the machine's moods, long beside a stop and a start."""

_YARDSTICK_S = 0.02
_MIN_ROUNDS = 5
_STAGE_TURN_S = 0.3
_SUSTAINED_S = 3.0
_LOADGEN_S = 5.0
_SAVED_EVERY_S = 5.0
_GRACE = 10  # a step may take so many times what it is asked to take, before it counts as hung

Save = Callable[[BenchResult], None]


@dataclass
class _Subject:
    """One model while it is measured."""

    spec: SubjectSpec
    result: SubjectResult
    prepared: Prepared | None = None
    process: SubjectProcess | None = None
    takes_images: bool = False
    times_ms: list[float] = field(default_factory=list)

    @property
    def is_alive(self) -> bool:
        return self.result.error is None

    def fail(self, error: DimeFMError) -> None:
        self.result.error, self.result.hint = str(error.args[0]), error.hint
        self.result.state = "partial" if self.result.rounds_ms else "failed"


def bench_models(config: BenchConfig, folder: Path, *, save: Save | None = None) -> BenchResult:
    """Measure models side by side.

    Args:
        config: What and how.
        folder: For exported graphs and the like; must live until this returns.
        save: Called now and then with what there is so far.

    Returns:
        The result; its `state` is `stopped` after Ctrl-C. Models that failed say why.

    Raises:
        InputError: If no model is named, or cannot run as it is asked to.
        DimeFMError: If none of the models could be measured: the first one's error.
    """
    specs = parse_subjects(config.models, default_runtime=config.engine)
    threads = config.threads or len(config.pin) or count_physical_cores()
    subjects = [
        _Subject(spec, SubjectResult(spec.label, batch_size=config.batch_size, threads=threads))
        for spec in specs
    ]
    values = {k: str(v) if isinstance(v, Path) else v for k, v in asdict(config).items()}
    result = BenchResult([s.result for s in subjects], machine_info(), values)
    sensors = find_sensors()
    result.notes += sensors.notes
    bench = _Bench(config, folder, threads, subjects, result, sensors, save or (lambda _: None))
    try:
        with ExitStack() as stack:
            bench.run(stack)
        result.state = "complete"
    except KeyboardInterrupt:
        result.notes.append("stopped by Ctrl-C: what was measured until then")
    finally:
        bench.finish()
    failed = [s for s in subjects if s.result.state == "failed"]
    if len(failed) == len(subjects) and result.state == "complete":
        first = failed[0]
        assert first.result.error is not None
        raise (bench.first_error or DimeFMError(first.result.error, hint=first.result.hint))
    return result


@dataclass
class _Bench:
    config: BenchConfig
    folder: Path
    threads: int
    subjects: list[_Subject]
    result: BenchResult
    sensors: Sensors
    save: Save
    first_error: DimeFMError | None = None
    _recorder: Recorder | None = None
    _saved_at: float = 0.0

    def run(self, stack: ExitStack) -> None:
        """Every step, in order."""
        files = self._open_images()
        self._prepare()
        if not self._alive():
            return
        yardstick = self._measure_machine(stack)
        self._recorder = Recorder(self.sensors)
        rounds = max(_MIN_ROUNDS, round(self.config.seconds / TURN_S))
        restarts = min(self.config.restarts, rounds // _MIN_ROUNDS)
        self._load(stack)
        if not self._alive():
            return
        with counting("timing", rounds) as advance:
            for number in range(restarts):
                part = (number + 1) * rounds // restarts - number * rounds // restarts
                if number:
                    self._load(stack)
                self._warm_up()
                self._rounds(yardstick, part, advance)
        self._memory()
        if self.sensors.has_power:
            self._sustained()
        timed = self._alive()  # accuracy needs none of what comes between
        if files:
            self._stages(files)
        for scenario in self.config.scenario:
            self._scenario(scenario)
        if self.config.operators or self.config.out is not None:
            self._operators()
        if self.config.data:
            self._accuracy(timed)
        for subject in self._alive():
            subject.result.state = "measured"

    def finish(self) -> None:
        """Figures out of the times, whatever came between."""
        for subject in self.subjects:
            self._summarise(subject)
        if self._recorder is not None:
            self._recorder.stop()
            self.result.trace = self._recorder.trace()
            self.result.throttled = self._recorder.throttled()
        self.sensors.close()
        if self.result.yardstick_ms:
            best = float(np.percentile(self.result.yardstick_ms, 5))
            self.result.peak_gflop_per_s = GEMM_FLOP / best / 1e6

    # -------------------------------------------------------------------------- steps

    def _open_images(self) -> list[str]:
        """Files for the stages, before anything takes its time; bad ones are left out and told."""
        if not self.config.images:
            return []
        files, bad = image_files(self.config.images, self.folder / "images")
        if bad:
            found = f"{len(bad)} of {len(files) + len(bad)} images cannot be read"
            self.result.notes.append(f"{found}, and are left out: {name_some(bad)}")
        return [str(path) for path in files]

    def _prepare(self) -> None:
        with counting("making ready", len(self.subjects), is_transient=True) as advance:
            for place, subject in enumerate(self.subjects):
                made = self.folder / str(place)
                made.mkdir(parents=True)
                with self._guard(subject):
                    prepared = prepare_apart(
                        subject.spec, made, seed=self.config.seed, limit_s=self.config.time_limit_s
                    )
                    subject.prepared, result = prepared, subject.result
                    result.runtime, result.size_mib = prepared.runtime, prepared.size_mib
                    result.params_m, result.image_size = prepared.params_m, prepared.image_size
                    result.notes += prepared.notes
                advance(1)

    def _measure_machine(self, stack: ExitStack) -> SubjectProcess:
        """The memory's bandwidth now; the product stays loaded, for every round."""
        load = Load(batch_size=self.threads, threads=self.threads)
        with subject_process("the machine", threads=self.threads) as copy:
            self._start(copy, machine_subject("copy"), load)
            times = copy.ask("turn", limit_s=60, seconds=0.5)["ms"]
            self.result.copy_gb_per_s = COPY_BYTES / min(times) / 1e6
        gemm = stack.enter_context(subject_process("the machine", threads=self.threads))
        self._start(gemm, machine_subject("gemm"), load)
        return gemm

    def _load(self, stack: ExitStack) -> None:
        """New processes, in place of those that there may be."""
        load = Load(self.config.batch_size, self.threads, self.config.image_size, self.config.seed)
        for subject in self._alive():
            if subject.process is not None:
                subject.process.close()
            with self._guard(subject):
                assert subject.prepared is not None
                process = stack.enter_context(
                    subject_process(subject.spec.label, threads=self.threads)
                )
                answer = self._start(process, subject.prepared, load)
                subject.process, result = process, subject.result
                result.load_ms, result.first_ms = answer["load_ms"], answer["first_ms"]
                result.time_to_first_ms = 1e3 * (answer["ready_at"] - process.started_at)
                subject.takes_images = answer["takes_images"]

    def _warm_up(self) -> None:
        for subject in self._alive():
            with self._guard(subject):
                answer = self._ask(subject, "warm_up", seconds=self.config.seconds)
                subject.result.warmup_runs = answer["runs"]
                subject.result.is_steady = answer["is_steady"]

    def _rounds(
        self, yardstick: SubjectProcess, rounds: int, advance: Callable[[int], None]
    ) -> None:
        """Turns of the processes that there are; a late round is the last."""
        if self.result.yardstick_ms:
            self.result.starts.append(len(self.result.yardstick_ms))
        deadline = time.monotonic() + 2 * rounds * TURN_S * len(self.subjects)
        for index, alive in self._turns(rounds):
            if index >= _MIN_ROUNDS and time.monotonic() > deadline:
                advance(rounds - index)
                break
            times = yardstick.ask("turn", limit_s=60, seconds=_YARDSTICK_S)["ms"]
            found: dict[int, list[float]] = {}
            for subject in alive:
                with self._guard(subject):
                    found[id(subject)] = self._ask(subject, "turn", seconds=TURN_S)["ms"]
            # A round counts when all of it is there, so that rounds stay paired.
            for subject in self._alive():
                subject.times_ms += found[id(subject)]
                subject.result.rounds_ms.append(float(np.median(found[id(subject)])))
            self.result.yardstick_ms.append(float(np.median(times)))
            advance(1)
            self._save_now_and_then()

    def _turns(self, rounds: int) -> Iterator[tuple[int, list[_Subject]]]:
        """Round numbers with the models that are alive, in random order."""
        rng = np.random.default_rng([self.config.seed, len(self.result.yardstick_ms)])
        for index in range(rounds):
            alive = self._alive()
            if not alive:
                return
            yield index, [alive[i] for i in rng.permutation(len(alive))]

    def _memory(self) -> None:
        for subject in self._alive():
            with self._guard(subject):
                answer = self._ask(subject, "memory", seconds=1)
                subject.result.peak_rss_mib = answer["peak_rss_mib"]
                subject.result.memory_mib = answer["peak_rss_mib"] - answer["bare_rss_mib"]
                assert subject.process is not None
                pid = subject.process.pid
                subject.result.gpu_memory_mib = self.sensors.gpu_memory_mib(pid)

    def _sustained(self) -> None:
        """Power needs seconds of one model alone: counters are slow."""
        assert self._recorder is not None
        for subject in self._alive():
            with self._guard(subject):
                begun = time.monotonic()
                times = self._ask(subject, "turn", seconds=_SUSTAINED_S)["ms"]
                power = self._recorder.mean_power_w(begun, time.monotonic())
                if power is not None:
                    images = self.config.batch_size
                    subject.result.power_w = power
                    subject.result.energy_mj_per_image = power * float(np.mean(times)) / images

    def _stages(self, files: list[str]) -> None:
        """Files to labels, in rounds like the calls alone."""
        willing = [s for s in self._alive() if s.takes_images]
        for subject in self._alive():
            if not subject.takes_images:
                subject.result.notes.append("no stages: how its images are prepared is not known")
        rounds = max(_MIN_ROUNDS, round(self.config.seconds / _STAGE_TURN_S))
        rows: dict[int, list[list[list[float]]]] = {id(s): [] for s in willing}
        rng = np.random.default_rng(self.config.seed)
        with counting("files to labels", rounds) as advance:
            for index in range(rounds):
                for place in rng.permutation(len(willing)):
                    subject = willing[place]
                    if not subject.is_alive:
                        continue
                    options = {"files": files, "seconds": _STAGE_TURN_S, "first": 7 * index}
                    with self._guard(subject):
                        answer = self._ask(
                            subject, "stages", seconds=_STAGE_TURN_S, options=options
                        )
                        rows[id(subject)].append(answer["ms"])
                advance(1)
        for subject in willing:
            summarise_stages(subject.result, rows[id(subject)], rows[id(willing[0])])

    def _scenario(self, scenario: str) -> None:
        alive = self._alive()
        with counting(f"LoadGen {scenario}", len(alive)) as advance:
            for subject in alive:
                p50 = float(np.median(subject.times_ms))
                options = {
                    "scenario": scenario,
                    "seconds": min(self.config.seconds, _LOADGEN_S),
                    "expected_ms": p50,
                    "server_qps": self.config.server_qps or 500 / p50,
                    "bound_ms": self.config.server_bound_ms or 8 * p50,
                }
                with self._note_errors(subject):
                    answer = self._ask(subject, "load_generator", seconds=60, options=options)
                    subject.result.scenarios.append(answer)
                advance(1)

    def _operators(self) -> None:
        for subject in self._alive():
            with self._note_errors(subject):
                answer = self._ask(subject, "operators", seconds=60)
                subject.result.gmacs = answer.pop("gmacs")
                subject.result.moved_mib = answer.pop("moved_mib")
                subject.result.operators = answer

    def _accuracy(self, subjects: list[_Subject]) -> None:
        for subject in subjects:
            with self._note_errors(subject):
                subject.result.top1_pct = zero_shot_top1(
                    subject.spec, self.config.data, limit_s=self.config.time_limit_s
                )

    # ------------------------------------------------------------------------ workings

    def _summarise(self, subject: _Subject) -> None:
        first = self.subjects[0].result
        summarise_calls(subject.result, subject.times_ms, first, self.result.starts)

    def _start(self, process: SubjectProcess, prepared: Prepared, load: Load) -> Message:
        message = load_message(prepared, load, self.config.pin)
        return process.ask("load", limit_s=self.config.time_limit_s, **message)

    def _ask(self, subject: _Subject, what: str, *, seconds: float, **values: Any) -> Message:
        assert subject.process is not None
        limit = min(self.config.time_limit_s, 60 + _GRACE * seconds)
        return subject.process.ask(what, limit_s=limit, seconds=seconds, **values)

    def _alive(self) -> list[_Subject]:
        return [s for s in self.subjects if s.is_alive]

    @contextlib.contextmanager
    def _guard(self, subject: _Subject) -> Iterator[None]:
        """An error ends its model only."""
        try:
            yield
        except DimeFMError as error:
            self.first_error = self.first_error or error
            subject.fail(error)
            if subject.process is not None:
                subject.process.close(now=True)

    @contextlib.contextmanager
    def _note_errors(self, subject: _Subject) -> Iterator[None]:
        """An error in what is extra leaves the model's times as they are."""
        try:
            yield
        except DimeFMError as error:
            subject.result.notes.append(str(error.args[0]))

    def _save_now_and_then(self) -> None:
        if time.monotonic() - self._saved_at > _SAVED_EVERY_S:
            for subject in self.subjects:
                self._summarise(subject)
            self.save(self.result)
            self._saved_at = time.monotonic()
