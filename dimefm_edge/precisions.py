"""The student in fp32 and in integers, side by side: trained on in int8, then all compared.

Called by pipeline.py after the float stage. What training in integers is, quantize/ says; what a
graph in integers is, export/int8.py.
"""

from __future__ import annotations

import functools
import json
import logging
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from dimefm_edge.batches import DistillData
from dimefm_edge.config import LossConfig, QuantConfig, TrainConfig
from dimefm_edge.data.images import LabelledSet
from dimefm_edge.distill import DistillReport, Evaluate, distill
from dimefm_edge.distributed import Ranks
from dimefm_edge.errors import ConfigError, MissingExtraError
from dimefm_edge.evaluate.zero_shot import evaluate_zero_shot
from dimefm_edge.export import export_student, graph_spec
from dimefm_edge.export.graph_spec import require_precision
from dimefm_edge.export.integer_kernels import count_integer_kernels
from dimefm_edge.files import atomic_file
from dimefm_edge.labels import LabelBank
from dimefm_edge.latency.measure import measure_blocks
from dimefm_edge.report import PrecisionRow
from dimefm_edge.runtime import Bundle, load_bundle, load_engine
from dimefm_edge.students import CHECKPOINT_FILE, LoadedStudent, load_student
from dimefm_edge.targets import Target

if TYPE_CHECKING:
    from dimefm_edge.quantize.qat import FakeQuantStudent
    from dimefm_edge.students.text_checkpoint import LoadedTextStudent

logger = logging.getLogger(__name__)

NUM_CALIBRATION_IMAGES = 256
NUM_PARITY_IMAGES = 32
QAT_DIR = "qat"
"""The int8 stage, in its run's folder: a run folder of its own."""
_KEPT_FILE = "keep_float.json"
_QAT_EMA_DECAY = 0.99
_MAX_SECONDS = 4.0  # of timing, for each precision


def require_int8(quant: QuantConfig, eval_sets: Sequence[str], target: Target) -> None:
    """Say before hours of training what int8 would lack after them.

    Raises:
        ConfigError: If a loss is to be kept and there is nothing to test on.
        ExportError: If the target has no int8.
        MissingExtraError: If torchao is not installed.
    """
    require_precision(target, "int8", hint="drop --qat and --ptq, or another --target")
    if quant.max_drop is not None and not eval_sets:
        raise ConfigError(
            "--max-drop is in points of zero-shot top-1, and there is no test set",
            hint="--eval-sets with a labelled set, or drop --max-drop",
        )
    if find_spec("torchao") is None:
        raise MissingExtraError(
            "int8 students need torchao", hint="pip install 'dimefm_edge[train]'"
        )


def train_int8(
    run_dir: Path,
    data: DistillData,
    *,
    target: Target,
    steps: int,
    quant: QuantConfig,
    loss: LossConfig,
    train: TrainConfig,
    evaluate: Evaluate | None = None,
    resume: bool = False,
    ranks: Ranks | None = None,
) -> DistillReport:
    """Train the run's float student on in integers; same data, losses and loop.

    Args:
        run_dir: Of a run whose float stage is done, and `keep_float_products` with it.
        data: As in the float stage.
        target: By whose runtime's rules integers round.
        steps: Of the float stage.
        quant: Share of steps and rate.
        loss: As in the float stage.
        train: Of the float stage.
        evaluate: As for `distill`.
        resume: Go on from the stage's own state where there is one.
        ranks: This process among those of the run.

    Raises:
        DimeFMError: As `qat_prepare` and `distill`.
    """
    from dimefm_edge.quantize.checkpoint import float_before
    from dimefm_edge.quantize.qat import qat_prepare

    folder = run_dir / QAT_DIR
    folder.mkdir(exist_ok=True)
    loaded, keep_float = load_student(run_dir), kept_float(run_dir, quant)
    prepare = functools.partial(
        qat_prepare, loaded.student, image_size=loaded.spec.image_size,
        rules_name=_rules_name(target),
    )  # fmt: skip
    student = prepare(keep_float=keep_float)
    if resume and (older := float_before(folder / CHECKPOINT_FILE, student)):
        student = prepare(keep_float=(*keep_float, *older))
    return distill(
        student,
        data,
        loss=loss,
        train=int8_stage(train, steps, quant),
        run_dir=folder,
        save_weights=_Saver(loaded),
        evaluate=evaluate,
        resume=resume,
        ranks=ranks,
    )


def keep_float_products(
    run_dir: Path,
    *,
    target: Target,
    images: npt.NDArray[np.float32],
    quant: QuantConfig,
    evaluate: Evaluate | None,
) -> tuple[str, ...]:
    """Which products stay float so that calibration keeps `max_drop`; found once in a run.

    Args:
        run_dir: Of a run whose float stage is done; the answer is kept in it.
        target: By whose runtime's rules integers round.
        images: (N, 3, S, S) preprocessed.
        quant: How much may be lost; None asks nothing.
        evaluate: Zero-shot top-1 by test set, in percent; `require_int8` sees that there is one.
    """
    from dimefm_edge.quantize.ptq import worst_products

    if quant.max_drop is None or evaluate is None:
        return ()
    asked = {"max_drop": quant.max_drop, "calibration": quant.calibration}
    if _read_kept(run_dir).get("asked") != asked:
        plain = load_student(run_dir).student
        best = fmean(evaluate(plain).values())
        kept = worst_products(
            _calibrated(plain, target, images, quant, ()),
            torch.from_numpy(images[:NUM_PARITY_IMAGES]),
            max_drop=quant.max_drop,
            drop=lambda module: best - fmean(evaluate(module).values()),
        )
        logger.info("%d products stay float", len(kept))
        with atomic_file(run_dir / _KEPT_FILE) as stream:
            stream.write(json.dumps({"asked": asked, "products": kept}).encode())
    return kept_float(run_dir, quant)


def kept_float(run_dir: Path, quant: QuantConfig) -> tuple[str, ...]:
    """The products that `keep_float_products` found, by name."""
    return () if quant.max_drop is None else float_products(run_dir)


def float_products(run_dir: Path) -> tuple[str, ...]:
    """The products that the last `--max-drop` of a run left in float, by name."""
    return tuple(_read_kept(run_dir).get("products", ()))


def _read_kept(run_dir: Path) -> dict[str, Any]:
    path = run_dir / _KEPT_FILE
    found: dict[str, Any] = json.loads(path.read_bytes()) if path.is_file() else {}
    return found


def _rules_name(target: Target) -> str:
    name = graph_spec(target, precision="int8").quant_rules
    assert name is not None
    return name


def _calibrated(
    student: nn.Module,
    target: Target,
    images: npt.NDArray[np.float32],
    quant: QuantConfig,
    keep_float: Collection[str],
) -> FakeQuantStudent:
    from dimefm_edge.quantize.ptq import calibrated

    return calibrated(
        student,
        torch.from_numpy(images),
        rules_name=_rules_name(target),
        method=None if quant.calibration == "auto" else quant.calibration,
        keep_float=keep_float,
    )


def int8_stage(train: TrainConfig, steps: int, quant: QuantConfig) -> TrainConfig:
    """The settings of the int8 stage after a float stage of so many steps."""
    return replace(
        train,
        steps=max(1, round(steps * quant.qat_steps_ratio)),
        lr=train.lr * quant.qat_lr_ratio,
        # A short stage has forgotten nothing at its end by a long average.
        ema_decay=min(train.ema_decay, _QAT_EMA_DECAY),
        eval_every=0,
        save_every=train.save_every,
    )


@dataclass(frozen=True)
class _Saver:
    loaded: LoadedStudent

    def __call__(self, path: Path, module: nn.Module) -> None:
        from dimefm_edge.quantize.checkpoint import save_int8_student

        student, ours = cast("FakeQuantStudent", module), self.loaded
        save_int8_student(path, student, ours.spec, ours.preprocess, ours.metadata)


def export_precisions(
    run_dir: Path,
    *,
    target: Target,
    precision: str,
    quant: QuantConfig,
    label_banks: Sequence[LabelBank],
    images: npt.NDArray[np.float32],
    logit_scale: float,
    extra: Mapping[str, Any],
    text_student: LoadedTextStudent | None = None,
    sentences: Sequence[str] = (),
) -> dict[str, Bundle]:
    """Write a run's student in each precision that was asked for, and in what int8 came from.

    Args:
        run_dir: Of a run whose training is done.
        target: Whose runtime the graphs are for.
        precision: fp32 or fp16, where no int8 is asked for.
        quant: Which int8.
        label_banks: As for `export_student`, like the rest.
        images: (N, 3, S, S) preprocessed: the last ones for parity, those before to calibrate.
        logit_scale: The teacher's.
        extra: For the manifests.
        text_student: The run's, where it has one.
        sentences: Real ones, for its parity.

    Returns:
        By name; the last one is the outcome, in `bundle`, the others lie beside it.
    """
    plain = load_student(run_dir)
    wanted = {precision: plain}
    if quant.is_int8:
        others = images[:-NUM_PARITY_IMAGES] if len(images) > NUM_PARITY_IMAGES else images
        made = _calibrated(plain.student, target, others, quant, kept_float(run_dir, quant))
        wanted["int8 PTQ"] = replace(plain, student=made)
    if quant.qat == "int8":
        trained = load_trained_int8(run_dir, _rules_name(target))
        assert trained is not None
        wanted["int8 QAT"] = trained
    bundles = {}
    for name, loaded in wanted.items():
        is_outcome = name == list(wanted)[-1]
        out = run_dir / ("bundle" if is_outcome else f"bundle-{name.split()[-1].lower()}")
        export_student(
            loaded,
            out,
            graph=graph_spec(target, precision=precision if loaded is plain else "int8"),
            label_banks=label_banks,
            parity_images=images[-NUM_PARITY_IMAGES:],
            logit_scale=logit_scale,
            extra=extra,
            text_teacher=text_student,
            parity_sentences=sentences,
        )
        bundles[name] = load_bundle(out)
        if loaded is not plain:
            for text in bundles[name].manifest["graph"]["warnings"]:
                logger.warning("%s: %s", name, text)
    return bundles


def load_trained_int8(run_dir: Path, rules_name: str) -> LoadedStudent | None:
    """A run's student that was trained in int8 by these rules.

    None where there is none; where it was trained by other rules, a warning says so.

    Raises:
        CheckpointError: If it is damaged.
    """
    if not (run_dir / QAT_DIR / CHECKPOINT_FILE).is_file():
        return None
    from dimefm_edge.quantize.checkpoint import load_int8_student

    loaded = load_int8_student(run_dir / QAT_DIR)
    trained_for = cast("FakeQuantStudent", loaded.student).rules_name
    if trained_for == rules_name:
        return loaded
    logger.warning(
        "%s was trained in int8 for %s; for %s its float student is calibrated instead. "
        "try: dimefm-edge distill --qat int8 --target ... in another --out",
        run_dir, trained_for, rules_name,
    )  # fmt: skip
    return None


def compare_precisions(
    bundles: Mapping[str, Bundle],
    eval_sets: Sequence[LabelledSet],
    banks: Sequence[LabelBank],
    images: npt.NDArray[np.float32],
    *,
    outcome: Mapping[str, float],
) -> tuple[PrecisionRow, ...]:
    """What each precision costs and gains, the first one being what others are compared to.

    Args:
        bundles: Of one student, by what they are called; nothing is said of a single one.
        eval_sets: Labelled test sets.
        banks: Their label sets.
        images: (N, 3, S, S) preprocessed, to compare embeddings of.
        outcome: Zero-shot top-1 of the last one by test set, which is known already.
    """
    if len(bundles) < 2:
        return ()
    engines = {name: load_engine(bundle) for name, bundle in bundles.items()}
    calls: dict[str, Callable[[], object]] = {
        name: lambda engine=engine: engine.encode_image(images[:1])  # type: ignore[misc]
        for name, engine in engines.items()
    }
    latencies = dict(zip(calls, measure_blocks(calls, max_seconds=_MAX_SECONDS), strict=True))
    first = next(iter(engines.values())).encode_image(images)
    rows = []
    for name, bundle in bundles.items():
        engine = engines[name]
        is_outcome = name == list(bundles)[-1]
        reports = [
            evaluate_zero_shot(engine.encode_pixels, bundle.preprocess, labelled, bank)
            for labelled, bank in zip(eval_sets, banks, strict=True)
            if not is_outcome
        ]
        cosines = (engine.encode_image(images) * first).sum(axis=1)
        kernels = count_integer_kernels(bundle.model_path, images[:1])
        rows.append(
            PrecisionRow(
                name=name,
                top1_pct=dict(outcome) if is_outcome else {r.name: r.top1_pct for r in reports},
                mean_cosine=float(cosines.mean()),
                size_mib=bundle.size_mib,
                here_p50_ms=latencies[name].p50_ms,
                integer_products=kernels.num_integer,
                float_products=kernels.left_float + kernels.fallen_back,
            )
        )
    return tuple(rows)
