"""The whole walk on one page: target and data in, bundle and report out.

    target + budget -> fit -> StudentSpec
    images, sentences -> teacher -> embedding store
    StudentSpec + store -> distill (-> cuts) (-> train in int8) (-> a text student) -> checkpoint
    checkpoint -> export -> bundle -> measured, reported

Read `run` first; every step below it is also a command of its own.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import itertools
import json
import logging
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from torch import nn

from dimefm_edge import config as config_file
from dimefm_edge.batches import DistillData
from dimefm_edge.choice import (
    begins_from,
    choose_student,
    forget_choice,
    inherited_by,
    initial_student,
    keep_choice,
)
from dimefm_edge.config import RunConfig
from dimefm_edge.cuts import NUM_BATCHES, Cut, cut_rows, elastic_stage, keep_cuts
from dimefm_edge.data.images import ImagePool, open_images, open_labelled, sample_rows
from dimefm_edge.data.sentences import SentencePool, open_sentences
from dimefm_edge.distill import default_device, distill, require_split
from dimefm_edge.distributed import Ranks, join_ranks
from dimefm_edge.errors import ConfigError, InputError
from dimefm_edge.export import record_accuracy
from dimefm_edge.files import atomic_file, held_folder
from dimefm_edge.judge import Scorer, compare_accuracy, compare_latency, model_row
from dimefm_edge.labels import build_label_bank
from dimefm_edge.latency.estimate import estimate_onnx
from dimefm_edge.latency.measure import LatencyReport, machine_info
from dimefm_edge.precisions import (
    NUM_CALIBRATION_IMAGES,
    NUM_PARITY_IMAGES,
    compare_precisions,
    export_precisions,
    keep_float_products,
    kept_float,
    require_int8,
    train_int8,
)
from dimefm_edge.prepare import embed_pools, from_anywhere, open_data
from dimefm_edge.preprocess import PreprocessSpec, preprocess_images
from dimefm_edge.report import RunReport
from dimefm_edge.run_log import STATE_FILE
from dimefm_edge.runtime import Bundle
from dimefm_edge.sides import training_inputs
from dimefm_edge.student_grid import elastic_cuts
from dimefm_edge.students import CHECKPOINT_FILE, StudentSpec, save_student
from dimefm_edge.students.elastic import ElasticStudent
from dimefm_edge.students.text_checkpoint import load_text_student
from dimefm_edge.targets import LOCAL, Target, load_target
from dimefm_edge.teacher import TEXT_TEACHER_KEY, Teacher, load_teacher
from dimefm_edge.text_judge import TextScorer, compare_text, teacher_features
from dimefm_edge.text_stage import plan_text, train_text

logger = logging.getLogger(__name__)

_SCENES = "scenes"
_NUM_PARITY_SENTENCES = 64
_TRAIN = {
    "epochs": config_file.DEFAULT_EPOCHS,
    "min_crop": config_file.DEFAULT_MIN_CROP,
    "flip": True,
}
_SCENES_TRAIN = {"epochs": 5.0, "min_crop": 0.9, "flip": False}


def run(config: RunConfig, *, resume: bool = False) -> RunReport | None:
    """Distil, export and measure a student.

    Args:
        config: What the user asked for.
        resume: Go on in an existing run folder.

    Returns:
        The report, also written to the run folder; None on ranks other than 0.

    Raises:
        DimeFMError: With the message and the mend, for anything a user can put right.
    """
    ranks = join_ranks()
    require_split(config.train, ranks)
    saved = Path(config.out, config_file.RUN_FILE)
    with held_folder(saved.parent) if ranks.is_main else contextlib.nullcontext():
        before = saved.read_bytes() if resume and saved.is_file() else None
        trained = _changed_at(saved.with_name(STATE_FILE))
        try:
            return _run(resolve(config), resume=resume, ranks=ranks)
        except InputError:
            is_refused = trained == _changed_at(saved.with_name(STATE_FILE))
            if before is not None and is_refused and ranks.is_main:  # that changes nothing
                with atomic_file(saved) as stream:
                    stream.write(before)
            raise


def _run(config: RunConfig, *, resume: bool, ranks: Ranks) -> RunReport | None:
    clock = _Clock()
    run_dir = _open_run(config, resume=resume, ranks=ranks)
    target = load_target(config.target)
    teacher = load_teacher(config.teacher)
    text_plan = plan_text(
        config.text, config.train, teacher, ranks, init_from=config.student.init_from,
        run_dir=run_dir if resume else None,
    )  # fmt: skip
    labelled = open_labelled(config.data.labelled) if config.data.labelled else None
    pool = labelled.pool if labelled else open_images(
        config.data.images, column=config.data.image_column
    )  # fmt: skip
    sentences = open_sentences(config.data.texts, column=config.data.text_column)
    eval_sets = [open_labelled(source) for source in config.data.eval_sets]
    with clock("fit"):
        fit = choose_student(config, target, teacher) if ranks.is_main else None
    if fit is not None:
        config_file.save(config, run_dir / config_file.RUN_FILE)
        keep_choice(fit, config)
    ranks.barrier()
    fit = fit or choose_student(config, target, teacher)  # rank 0's
    preprocess = dataclasses.replace(teacher.preprocess, image_size=fit.chosen.image_size)
    with clock("embed"):
        store_dir = Path(config.store) if config.store else run_dir / "store"
        if ranks.is_main:
            embed_pools(config, teacher, pool, sentences, preprocess, store_dir)
        ranks.barrier()
        data = open_data(config, teacher, pool, labelled, preprocess, store_dir)
        banks = [
            build_label_bank(s.name, s.classnames, s.templates, teacher.encode_texts)
            for s in eval_sets
        ]
    student, inherited = initial_student(
        config.student, fit.chosen, teacher, seed=config.train.seed,
        is_begun=resume and (run_dir / STATE_FILE).is_file(),
    )  # fmt: skip
    inherited = inherited_by(run_dir, inherited, keep=ranks.is_main)
    evaluate = Scorer(eval_sets, banks, preprocess) if eval_sets else None
    metadata = _metadata(config, teacher)
    specs = elastic_cuts(fit.chosen) if config.student.elastic else ()
    with clock("train"):
        trained = distill(
            ElasticStudent(student, specs, seed=config.train.seed) if specs else student,
            data,
            loss=config.loss,
            train=elastic_stage(config.train) if specs else config.train,
            run_dir=run_dir,
            save_weights=_Saver(fit.chosen, preprocess, metadata),
            evaluate=evaluate,
            resume=resume,
            ranks=ranks,
        )
    cuts: tuple[Cut, ...] = ()
    if specs and ranks.is_main:
        with clock("score cuts"):
            device = default_device()
            seen = functools.partial(
                training_inputs, data, config.loss, config.train, NUM_BATCHES, device
            )
            cuts = keep_cuts(run_dir, specs, seen, evaluate, device)
    trained_int8 = None
    if ranks.is_main:
        images = _some_images(pool, data, preprocess, is_int8=config.quant.is_int8)
    if config.quant.is_int8 and ranks.is_main:
        with clock("choose"):
            keep_float_products(
                run_dir, target=target, images=images, quant=config.quant, evaluate=evaluate
            )
    ranks.barrier()  # rank 0 has written the float student
    if config.quant.qat == "int8":
        with clock("train in int8"):
            trained_int8 = train_int8(
                run_dir,
                data,
                target=target,
                steps=trained.steps,
                quant=config.quant,
                loss=config.loss,
                train=config.train,
                evaluate=evaluate,
                resume=resume,
                ranks=ranks,
            )
    trained_text = None
    if text_plan is not None:
        with clock("train the text student"):
            features = teacher_features(teacher, eval_sets) if ranks.is_main else ()
            trained_text = train_text(
                run_dir,
                text_plan,
                teacher,
                data,
                sentences,
                config=config.text,
                train=config.train,
                steps=trained.steps,
                store_dir=store_dir,
                evaluate=TextScorer(eval_sets, features, text_plan.tokenizer) if features else None,
                metadata=metadata,
                resume=resume,
                ranks=ranks,
            )
    if not ranks.is_main:
        return None
    with clock("export"):
        bundles = export_precisions(
            run_dir,
            target=target,
            precision=config.precision,
            quant=config.quant,
            label_banks=banks,
            images=images,
            logit_scale=teacher.logit_scale,
            extra={"target": target.name, "teacher": teacher.name, "budget_ms": fit.budget_ms},
            text_student=load_text_student(run_dir) if trained_text else None,
            sentences=list(itertools.islice(sentences, _NUM_PARITY_SENTENCES))
            if trained_text
            else (),
        )
        bundle = list(bundles.values())[-1]
    with clock("evaluate"):
        accuracy = compare_accuracy(eval_sets, banks, teacher, bundle)
    with clock("measure"):
        latencies = compare_latency(teacher, bundle)
        precisions = compare_precisions(
            bundles, eval_sets, banks, images[-NUM_PARITY_IMAGES:],
            outcome={row.student.name: row.student.top1_pct for row in accuracy},
        )  # fmt: skip
        text = None
        if trained_text is not None:
            text = compare_text(run_dir, trained_text, teacher, bundle, eval_sets, banks, features)
    report = RunReport(
        run_dir=str(run_dir),
        bundle=str(bundle.path),
        target=target.full_name,
        runtime=target.runtime,
        target_precision=target.precision,
        precision=bundle.precision,
        budget_ms=fit.budget_ms,
        teacher=model_row(
            teacher.name, teacher.image_tower, target, latencies[0], teacher.preprocess
        ),
        student=model_row(fit.chosen.name, student, target, latencies[1], preprocess),
        student_spec=fit.chosen.to_dict(),
        inherited=inherited,
        accuracy=accuracy,
        parity=bundle.manifest["parity"],
        training=dataclasses.asdict(trained),
        data=_data_summary(data, pool, sentences),
        seconds=clock.seconds,
        machine=machine_info(),
        precisions=precisions,
        kept_float=kept_float(run_dir, config.quant),
        int8_training=dataclasses.asdict(trained_int8) if trained_int8 else None,
        exported_ms=_exported_ms(bundles, target, latencies[1]),
        text=text,
        cuts=cut_rows(cuts, target),
        init_from=config.student.init_from,
    )
    _write_report(report, run_dir)
    return report


def _changed_at(path: Path) -> int | None:
    return path.stat().st_mtime_ns if path.is_file() else None


def resolve(config: RunConfig) -> RunConfig:
    """Fill in the defaults that depend on the data, so that the saved config says them."""
    config = from_anywhere(config)
    sources = (config.data.labelled,) if config.data.labelled else config.data.images
    is_scenes = all(source.partition(":")[0] == _SCENES for source in sources)
    defaults: dict[str, Any] = _SCENES_TRAIN if is_scenes else _TRAIN
    unset = {k: v for k, v in defaults.items() if getattr(config.train, k) is None}
    eval_sets = config.data.eval_sets or ((_SCENES,) if is_scenes else ())
    if config.quant.is_int8:
        require_int8(config.quant, eval_sets, load_target(config.target))
    return dataclasses.replace(
        config,
        data=dataclasses.replace(config.data, eval_sets=eval_sets),
        train=dataclasses.replace(config.train, **unset),
        student=begins_from(config.student, Path(config.out)),
    )


# --------------------------------------------------------------------------- the steps


def _open_run(config: RunConfig, *, resume: bool, ranks: Ranks) -> Path:
    """The run's folder; another run is never overwritten, but one that never began to train is
    begun anew."""
    run_dir = Path(config.out)
    if ranks.is_main:
        is_begun = any((run_dir / name).is_file() for name in (STATE_FILE, CHECKPOINT_FILE))
        if is_begun and not resume:
            raise ConfigError(
                f"{run_dir} already holds a run", hint="--resume to go on with it, or another --out"
            )
        if resume and not (run_dir / config_file.RUN_FILE).is_file():
            logger.warning("%s holds no run yet: beginning one", run_dir)
        if not resume:
            forget_choice(run_dir)
    ranks.barrier()
    return run_dir


def _metadata(config: RunConfig, teacher: Teacher) -> dict[str, str]:
    return {
        TEXT_TEACHER_KEY: config.teacher,
        "teacher_weights_hash": teacher.weights_hash,
        "logit_scale": repr(teacher.logit_scale),
        "target": config.target,
    }


@dataclass(frozen=True)
class _Saver:
    spec: StudentSpec
    preprocess: PreprocessSpec
    metadata: dict[str, str]

    def __call__(self, path: Path, module: nn.Module) -> None:
        module = module.student if isinstance(module, ElasticStudent) else module
        save_student(path, module, self.spec, self.preprocess, self.metadata)


def _exported_ms(bundles: dict[str, Bundle], target: Target, here: LatencyReport) -> float:
    """What was exported, on the target: measured on this machine, else by its float graph, whose
    operators are the ones that estimates are made for."""
    if target.name == LOCAL:
        return here.p50_ms
    path = next(iter(bundles.values())).model_path
    return estimate_onnx(path, target, precision=target.precision).latency_ms


def _some_images(
    pool: ImagePool, data: DistillData, preprocess: PreprocessSpec, *, is_int8: bool
) -> npt.NDArray[np.float32]:
    """Real ones: the last are for parity, int8 is calibrated on those before."""
    count = NUM_CALIBRATION_IMAGES * is_int8 + NUM_PARITY_IMAGES
    valid = data.images.valid_rows()
    rows = valid[sample_rows(len(valid), count)]
    return preprocess_images([pool.load(int(row)) for row in rows], preprocess)


def _data_summary(data: DistillData, pool: ImagePool, texts: SentencePool) -> dict[str, Any]:
    bad = data.images.manifest.bad_rows
    return {
        "num_images": len(data.images),
        "num_bad": len(bad),
        "num_texts": len(data.texts if data.text_rows is None else data.text_rows),
        "num_texts_embedded": len(data.texts),
        "num_texts_left_out": texts.stats.num_left_out,
        "bad_examples": [f"{pool.name(row)}: {why}" for row, why in bad[:10]],
    }


def _write_report(report: RunReport, run_dir: Path) -> None:
    accuracy = {
        row.student.name: {"top1_pct": row.student.top1_pct, "top5_pct": row.student.top5_pct}
        for row in report.accuracy
    }
    record_accuracy(Path(report.bundle), accuracy)
    with atomic_file(run_dir / "report.json") as stream:
        stream.write((json.dumps(report.to_dict(), indent=2) + "\n").encode())
    with atomic_file(run_dir / "report.md") as stream:
        stream.write(report.to_markdown().encode())


@dataclass(frozen=True)
class _Clock:
    """Seconds of each step, by name."""

    seconds: dict[str, float] = field(default_factory=dict)

    @contextlib.contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        begun = time.perf_counter()
        yield
        self.seconds[name] = round(time.perf_counter() - begun, 1)
