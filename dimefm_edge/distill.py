"""The training loop: a student learns to answer as the teacher's stored embeddings do.

Every random number of a step is a function of (seed, step): resuming needs no generator
state, and two ranks draw what one process of the double batch would.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import math
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from timm.utils.model_ema import ModelEmaV3
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from dimefm_edge.batches import DistillData, prefetch
from dimefm_edge.config import LossConfig, TextStudentConfig, TrainConfig
from dimefm_edge.data.augment import seeded_generator
from dimefm_edge.distributed import Ranks
from dimefm_edge.errors import CheckpointError, ConfigError, TrainingError
from dimefm_edge.optimizer import build_optimizer, count_steps, learning_rate
from dimefm_edge.run_log import (
    STATE_FILE,
    RunLog,
    StopSignal,
    load_state,
    require_same,
    save_state,
    training_progress,
)
from dimefm_edge.sides import SavedBatch, Side, image_layout, side_of
from dimefm_edge.students.attention import use_fused_attention, wants_fused_attention
from dimefm_edge.text_batches import TextData

logger = logging.getLogger(__name__)

Evaluate = Callable[[nn.Module], dict[str, float]]

_DROP_STREAM = 3  # of random numbers; batches.py and text_batches.py have 0 to 8, elastic.py 9
_WARM_UP_STEPS = 8


@runtime_checkable
class FollowsTraining(Protocol):
    """A student that wants to see images first, and to know how far training is (quantize/)."""

    def warm_up(self, batches: Iterable[Tensor]) -> None:
        """See batches (B, 3, S, S), preprocessed, before the first step."""

    def on_step(self, step: int, total: int) -> None:
        """Know that a step begins."""


@dataclass(frozen=True)
class DistillReport:
    """What a training run did, in all processes that it took to its end."""

    steps: int
    epochs: float
    seconds: float
    images_per_s: float
    """Of a text student: sentences."""
    data_wait_pct: float
    final_loss: float
    best: dict[str, float]


def distill(
    student: nn.Module,
    data: DistillData | TextData,
    *,
    loss: LossConfig | TextStudentConfig,
    train: TrainConfig,
    run_dir: Path,
    save_weights: Callable[[Path, nn.Module], None],
    evaluate: Evaluate | None = None,
    resume: bool = False,
    ranks: Ranks | None = None,
    device: torch.device | None = None,
) -> DistillReport:
    """Train `student` in place; its averaged weights end up in `checkpoint.safetensors`.

    Args:
        student: Of images, (B, 3, S, S) -> (B, E), L2-normalised; or of sentences, for `TextData`:
            (B, N) int64 tokens -> (B, E), L2-normalised.
        data: Stores, and pixels or tokens whose rows are those of their store.
        loss: Weights and temperatures; a text student's are in `TextStudentConfig`.
        train: Schedule, batch (of images, or of sentences), optimiser.
        run_dir: Existing folder for checkpoints, metrics and state.
        save_weights: Writes a module as a checkpoint file, atomically.
        evaluate: Zero-shot scores by name, higher is better; picks `best.safetensors`.
        resume: Go on from `training_state.pt` where there is one.
        ranks: This process among those of the run.
        device: Default: a GPU where there is one.

    Raises:
        TrainingError: On a loss that is not finite; the batch is saved beside the run.
        CheckpointError: If the state to resume from is damaged or of another run.
        KeyboardInterrupt: On Ctrl-C, after the state of the last whole step is saved.
    """
    ranks = ranks or Ranks()
    device = device or default_device()
    side = side_of(data, loss, train, ranks, device)
    loop = _Loop(student, side, train, run_dir, save_weights, evaluate, ranks, device)
    if resume and (run_dir / STATE_FILE).is_file():
        loop.restore()
    return loop.run()


def require_split(train: TrainConfig, ranks: Ranks) -> None:
    """Refuse a batch that the ranks' micro-batches do not divide.

    Raises:
        ConfigError: With the nearest that they do.
    """
    parts = ranks.world_size * train.accumulate
    if train.batch_size % parts:
        nearest = max(1, round(train.batch_size / parts)) * parts
        raise ConfigError(
            f"batch_size {train.batch_size} cannot be split over {ranks.world_size} ranks x "
            f"{train.accumulate} micro-batches",
            hint=f"--batch-size {nearest}",
        )


def default_device() -> torch.device:
    """A GPU where there is one."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


class _Loop:
    """The mutable state of one training run."""

    def __init__(
        self,
        student: nn.Module,
        side: Side[Any],
        train: TrainConfig,
        run_dir: Path,
        save_weights: Callable[[Path, nn.Module], None],
        evaluate: Evaluate | None,
        ranks: Ranks,
        device: torch.device,
    ) -> None:
        self.ranks, self.device = ranks, device
        require_split(train, ranks)
        if train.threads:
            torch.set_num_threads(train.threads)
        if self.device.type == "cpu":
            torch.set_flush_denormal(True)
        self.side, self.train, self.run_dir = side, train, run_dir
        self.save_weights, self.evaluate = save_weights, evaluate
        layout = image_layout(device)
        self.student: nn.Module = student.to(self.device, memory_format=layout).train()  # type: ignore[call-overload]
        if wants_fused_attention(train.fused_attention, self.device.type):
            use_fused_attention(self.student)
        self.net: nn.Module = self.student
        if self.ranks.world_size > 1:
            self.net = nn.parallel.DistributedDataParallel(self.student)
        self.optimizer = build_optimizer(self.student, train)
        self.ema = None
        if train.ema_decay:
            self.ema = ModelEmaV3(self.student, decay=train.ema_decay, use_warmup=True)
        self.amp_dtype = _amp_dtype(train.amp, self.device)
        self.scaler = torch.amp.GradScaler(
            self.device.type, enabled=self.amp_dtype is torch.float16
        )
        self.total = count_steps(train, side.num_rows)
        self.eval_every = train.eval_every or max(1, math.ceil(self.total / 3))
        self.save_every = train.save_every or max(1, math.ceil(self.total / 10))
        self.step = self.timed_from = 0
        self.seconds = self.waited_seconds = 0.0
        self.best: dict[str, float] = {}
        self.last_loss = math.nan

    # ------------------------------------------------------------------ one step

    def forward_backward(self, batch: SavedBatch) -> dict[str, float]:
        """Gradients of one global batch; returns the unweighted terms and `loss`."""
        train, ranks = self.train, self.ranks
        torch.manual_seed(
            seeded_generator(train.seed, _DROP_STREAM, self.step, ranks.rank).initial_seed()
        )
        inputs = self.side.inputs(batch)
        terms: dict[str, float] = {}
        for index in range(train.accumulate):
            piece = _piece(index, train.accumulate, len(inputs))
            is_last = index == train.accumulate - 1
            with self._no_sync(is_last), self._precision():
                student_embeds = self.net(inputs[piece]).float()
            values = self.side.terms(ranks.gather_with_grad(student_embeds), batch, piece)
            with self._no_sync(is_last), self._precision():
                scaled = values["loss"] * ranks.world_size / train.accumulate
                self.scaler.scale(scaled).backward()  # type: ignore[no-untyped-call]
            for name, value in values.items():
                terms[name] = terms.get(name, 0.0) + value.item() / train.accumulate
        if not math.isfinite(terms["loss"]):
            self._stop_on_nan(batch, terms)
        return terms

    def optimise(self) -> float:
        """Clip, step, average; returns the gradient norm before clipping."""
        rate = learning_rate(self.step, self.total, self.train)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.scaler.unscale_(self.optimizer)
        norm = torch.nn.utils.clip_grad_norm_(
            self.student.parameters(), self.train.clip_norm or math.inf
        )
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        if self.ema is not None:
            self.ema.update(self.student, step=self.step)
        return float(norm)

    def _no_sync(self, is_last: bool) -> contextlib.AbstractContextManager[Any]:
        if isinstance(self.net, nn.parallel.DistributedDataParallel) and not is_last:
            return self.net.no_sync()
        return contextlib.nullcontext()

    @contextlib.contextmanager
    def _precision(self) -> Iterator[None]:
        with contextlib.ExitStack() as stack:
            if self.device.type == "cpu":
                # At a vision student's 17 to 257 tokens, torch's CPU flash kernel takes twice
                # the time of plain matrix products in the backward pass.
                stack.enter_context(sdpa_kernel(SDPBackend.MATH))
            if self.amp_dtype is not None:
                stack.enter_context(torch.autocast(self.device.type, self.amp_dtype))
            yield

    def _stop_on_nan(self, batch: SavedBatch, terms: dict[str, float]) -> None:
        path = self.run_dir / f"nan_batch_rank{self.ranks.rank}.safetensors"
        batch.save(path)
        found = ", ".join(f"{name} {value:g}" for name, value in terms.items())
        raise TrainingError(
            f"the loss is not finite at step {self.step} ({found}); the batch is in {path}, "
            f"the last good state in {self.run_dir / STATE_FILE}",
            hint=f"a lower rate: --lr {self.train.lr / 2:g}, in a new --out",
        )

    # ------------------------------------------------------------------ the run

    def run(self) -> DistillReport:
        """Train to the last step, saving and evaluating on the way."""
        side, unit = self.side, self.side.unit
        is_shown = self.ranks.is_main and self.step < self.total
        started = time.perf_counter() - self.seconds
        follower = self.student if isinstance(self.student, FollowsTraining) else None
        if follower is not None and not self.step:
            follower.warm_up(map(side.inputs, side.batches(0, min(_WARM_UP_STEPS, self.total))))
        with (
            RunLog(self.run_dir, start_step=self.step)
            if self.ranks.is_main
            else contextlib.nullcontext() as log,
            training_progress(self.total, self.step, unit=unit, show=is_shown) as advance,
            StopSignal() as stop,
            contextlib.closing(prefetch(side.batches(self.step, self.total))) as batches,
        ):
            while self.step < self.total:
                begun = time.perf_counter()
                batch = next(batches)
                got = time.perf_counter()
                if follower is not None:
                    follower.on_step(self.step, self.total)
                terms = self.forward_backward(batch)
                norm = self.optimise()
                self.step += 1
                self.last_loss = terms["loss"]
                self.waited_seconds += got - begun
                rate = self.train.batch_size / (time.perf_counter() - begun)
                advance(rate, terms["loss"])
                values = {
                    **terms,
                    "lr": float(self.optimizer.param_groups[0]["lr"]),
                    "grad_norm": norm,
                    f"{unit}_per_s": rate,
                    "data_wait_ms": 1000 * (got - begun),
                }
                if log is not None:
                    log.write(self.step - 1, values)
                self.seconds = time.perf_counter() - started
                is_stopping = stop.is_set  # asked once: a signal may come while saving
                self._save_and_evaluate(log, is_stopping=is_stopping)
                if is_stopping:
                    raise KeyboardInterrupt
            if stop.is_set:  # while the last step was saved
                raise KeyboardInterrupt
        timed = (self.total - self.timed_from) * self.train.batch_size
        return DistillReport(
            steps=self.total,
            epochs=self.total * self.train.batch_size / side.num_rows,
            seconds=self.seconds,
            images_per_s=timed / self.seconds if self.seconds else 0.0,
            data_wait_pct=100 * self.waited_seconds / self.seconds if self.seconds else 0.0,
            final_loss=self.last_loss,
            best=self.best,
        )

    def deployed(self) -> nn.Module:
        """The weights that are exported: the moving average where there is one."""
        if self.ema is None:
            return self.student
        averaged: nn.Module = self.ema.module
        return averaged

    def _save_and_evaluate(self, log: RunLog | None, *, is_stopping: bool) -> None:
        is_end = self.step == self.total
        if self.ranks.is_main and self.evaluate and (is_end or self.step % self.eval_every == 0):
            model = self.deployed().eval()
            scores = self.evaluate(model)
            self.student.train()
            if log is not None:
                log.write(self.step - 1, {f"eval/{k}": v for k, v in scores.items()})
            if not self.best or sum(scores.values()) > sum(
                v for k, v in self.best.items() if k != "step"
            ):
                self.best = {"step": float(self.step), **scores}
                self.save_weights(self.run_dir / "best.safetensors", model)
        if self.ranks.is_main and (is_end or is_stopping or self.step % self.save_every == 0):
            self.save()

    def save(self) -> None:
        """Write the state to resume from and the deployable checkpoint."""
        save_state(
            self.run_dir,
            {
                "step": self.step,
                "plan": self._identity(),
                "student": self.student.state_dict(),
                "ema": None if self.ema is None else self.ema.module.state_dict(),
                "optimizer": self.optimizer.state_dict(),
                "scaler": self.scaler.state_dict(),
                "best": self.best,
                "loss": self.last_loss,
                "timed_from": self.timed_from,
                "seconds": self.seconds,
                "waited_seconds": self.waited_seconds,
            },
        )
        self.save_weights(self.run_dir / "checkpoint.safetensors", self.deployed())

    def restore(self) -> None:
        """Go on from the saved state.

        Raises:
            CheckpointError: If it is damaged, or its settings or data are not this run's.
        """
        state = load_state(self.run_dir)
        require_same(self.run_dir, self._identity(), state.get("plan", {}))
        try:
            self.student.load_state_dict(state["student"])
            if self.ema is not None:
                self.ema.module.load_state_dict(state["ema"])
            self.optimizer.load_state_dict(state["optimizer"])
            self.scaler.load_state_dict(state["scaler"])
            self.step, self.best, self.last_loss = state["step"], state["best"], state["loss"]
            self.timed_from = state.get("timed_from", self.step)  # older states have no times
            self.seconds = state.get("seconds", 0.0)
            self.waited_seconds = state.get("waited_seconds", 0.0)
        except (KeyError, RuntimeError, ValueError, TypeError) as error:
            path = self.run_dir / STATE_FILE
            raise CheckpointError(
                f"{path} is not this student's: {str(error)[:120]}",
                hint=f"delete {path} to train this stage anew, or another --out",
            ) from error
        logger.info("resuming at step %d of %d", self.step, self.total)

    def _identity(self) -> dict[str, Any]:
        free = {"eval_every", "save_every", "threads", "fused_attention"}
        settings = dataclasses.asdict(self.train)
        return {
            **{k: v for k, v in settings.items() if k not in free},
            **self.side.identity(),
            "num_parameters": sum(p.numel() for p in self.student.parameters()),
        }


def _piece(index: int, count: int, size: int) -> slice:
    return slice(index * size // count, (index + 1) * size // count)


def _amp_dtype(amp: str, device: torch.device) -> torch.dtype | None:
    if amp == "auto":
        if device.type == "cuda":
            return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float16
        has_bf16 = hasattr(torch.cpu, "get_capabilities") and torch.cpu.get_capabilities().get(
            "avx512_bf16", False
        )
        return torch.bfloat16 if has_bf16 else None
    return {"off": None, "bf16": torch.bfloat16, "fp16": torch.float16}[amp]
