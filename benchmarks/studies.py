"""What each choice of the recipe brings: the same student, trainer, images and steps, one change.

    python benchmarks/studies.py unpaired --data real --seeds 0 1 2 --out /tmp/studies
    python benchmarks/studies.py losses   --data real --seeds 0 1 2 --out /tmp/studies
    python benchmarks/studies.py unpaired --json | python benchmarks/record.py study_unpaired

| study | compares |
|---|---|
| `unpaired` | distillation without pairs, and CLIP's loss on images with their sentences |
| `losses` | vl, pvl, udist and feature regression, alone and together |
| `corpus` | sentences near to images, any, class prompts; hard negatives |
| `scale` | shares of the images and of the sentences |
| `image-only` | no sentence at all, against distillation with them |
| `extras` | what is not the paper's: pseudo-texts, views that the teacher saw, hard negatives |
| `students` | many students: does what `fit` goes by rank them as training does (scenes)? |

`--data scenes`: the sample teacher, procedural images; each image's pair is its own sentence.
`--data real`: Tiny-ImageNet and CIFAR-10 by real_teacher.py's teacher, which is trained when it
is missing (an hour); unlabelled images, captions and glosses; pairs are the labelled images,
which that teacher was trained on, and sentences of their classes.

A run's folder is named by the hash of its settings: what is finished is not done again, what was
stopped goes on, and several processes of one command share its runs. Scores are of the last
step's averaged weights, zero-shot on test sets that nothing was chosen by.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import fcntl
import functools
import hashlib
import json
import statistics
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch

from dimefm_edge.batches import CachedPixels, DistillData
from dimefm_edge.config import TrainConfig
from dimefm_edge.corpus import ROWS_FILE, build_corpus, class_prompts, load_kept_rows
from dimefm_edge.data import scenes
from dimefm_edge.data.images import (
    ImagePool,
    PixelCache,
    decode_batches,
    open_images,
    open_labelled,
    row_batches,
)
from dimefm_edge.data.neighbours import open_neighbours
from dimefm_edge.data.pairs import Pairs, class_pairs
from dimefm_edge.data.sentences import open_sentences
from dimefm_edge.data.store import EmbeddingStore
from dimefm_edge.data.views import Views
from dimefm_edge.distill import distill
from dimefm_edge.embed import embed_images, embed_texts
from dimefm_edge.files import atomic_file
from dimefm_edge.fit import student_score
from dimefm_edge.judge import Scorer
from dimefm_edge.labels import build_label_bank
from dimefm_edge.latency.operators import total_gmacs, total_params_m
from dimefm_edge.latency.trace import trace_student
from dimefm_edge.prepare import view_specs
from dimefm_edge.run_log import STATE_FILE
from dimefm_edge.students import StudentSpec, build_student, save_student, student_spec
from dimefm_edge.students.vit import inherit_from_teacher
from dimefm_edge.tables import format_table
from dimefm_edge.teacher import Teacher, load_teacher

if __package__:
    from benchmarks import real_teacher
    from benchmarks.study_arms import STUDIES, Arm
else:
    import real_teacher
    from study_arms import STUDIES, Arm

RESULT_FILE = "result.json"


@dataclass(frozen=True)
class Setup:
    """What differs between scenes and real images."""

    student: str
    image_size: int
    train: TrainConfig
    eval_sets: tuple[str, ...]
    images: str
    texts: str


def setup_of(args: argparse.Namespace) -> Setup:
    root = args.data_dir
    common = TrainConfig(
        batch_size=128, text_batch_size=512, lr=2e-3, ema_decay=0.995, threads=args.threads
    )
    if args.data == "scenes":
        train = dataclasses.replace(common, min_crop=0.9, flip=False, steps=args.steps or 800)
        count = "" if args.limit is None else f":{args.limit}"
        return Setup(
            "vit-nano", 64, train, ("scenes",), f"scenes{count}", f"scenes{count}"
        )  # fmt: skip
    train = dataclasses.replace(common, min_crop=0.35, flip=True, steps=args.steps or 1500)
    sets = tuple(str(root / "zeroshot" / name) for name in real_teacher.SETS)
    return Setup(
        "timm:resnet10t", 32, train, sets, str(root / "images/*.tar"), str(root / "text/*.gz")
    )


@contextlib.contextmanager
def locked(path: Path, *, wait: bool = True) -> Iterator[bool]:
    """Hold a file's lock; False where another process has it and we do not wait."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            yield False
            return
        yield True


class Study:
    """The data that all arms share, made once and kept in `out/DATA`."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args, self.setup = args, setup_of(args)
        self.out: Path = args.out / args.data
        if args.threads:
            torch.set_num_threads(args.threads)
        self.teacher = self._teacher()
        self.preprocess = dataclasses.replace(
            self.teacher.preprocess, image_size=self.setup.image_size
        )
        sets = [open_labelled(source) for source in self.setup.eval_sets]
        banks = [
            build_label_bank(s.name, s.classnames, s.templates, self.teacher.encode_texts)
            for s in sets
        ]
        self.evaluate = Scorer(sets, banks, self.preprocess)

    def spec(self, arm: Arm) -> StudentSpec:
        return student_spec(
            arm.student or self.setup.student,
            image_size=self.setup.image_size,
            embed_dim=self.teacher.embed_dim,
        )

    def _teacher(self) -> Teacher:
        if self.args.data == "scenes":
            return load_teacher(self.args.teacher or "sample")
        folder = Path(self.args.teacher or self.args.out / "teacher")
        with locked(folder.parent / f".{folder.name}.lock"):
            real_teacher.studies_teacher(folder, self.args.data_dir)
        return load_teacher(str(folder))

    @functools.cache  # noqa: B019
    def teacher_scores(self) -> dict[str, float]:
        """Zero-shot top-1 of the teacher, the ceiling."""
        scorer = dataclasses.replace(self.evaluate, preprocess=self.teacher.preprocess)
        return scorer(self.teacher.image_tower)

    @functools.cache  # noqa: B019
    def data(self, images: str) -> DistillData:
        """Stores and pixels of one pool of images, and pairs where it has any."""
        teacher, store_dir = self.teacher, self.store_dir
        pool, pairs = self._pool(images)
        with locked(self.out / ".data.lock"):
            texts = embed_texts(teacher, open_sentences([self.setup.texts]), store_dir / "texts")
            store = embed_images(teacher, pool, store_dir / images)
            path = store_dir / f"{images}-{self.preprocess.digest()}.u8"
            cache = PixelCache.create(path, len(pool), self.preprocess, pool.fingerprint)
            if not cache.is_complete:
                batches = row_batches([range(len(pool))], 512)
                for batch in decode_batches(pool, batches, self.preprocess):
                    cache.write(batch.rows, batch.pixels)
                cache.mark_complete()
        return DistillData(
            store, texts, CachedPixels(cache), self.preprocess, teacher.logit_scale, pairs
        )

    @property
    def store_dir(self) -> Path:
        return self.out / "store" / self.teacher.weights_hash

    def _pool(self, images: str) -> tuple[ImagePool, Pairs | None]:
        if images == "unlabelled":
            return open_images([self.setup.images]), None
        if self.args.data == "scenes":
            pool = open_images([self.setup.images])
            rng = np.random.default_rng(0)
            drawn = [scenes.scene_pair(row)[1] for row in range(len(pool))]
            sentences = [scenes.describe(scene, rng) for scene in drawn for _ in range(2)]
            embeds = self.teacher.encode_texts(sentences).reshape(len(pool), 2, -1)
            return pool, Pairs(np.arange(len(pool)), embeds)
        labelled = open_labelled(str(self.args.data_dir / "teacher/*-labeled-*.tar"))
        classes = real_teacher.Classes.read(self.args.data_dir)
        names = dict(zip(classes.folders, classes.names, strict=True))
        labelled = dataclasses.replace(
            labelled,
            classnames=tuple(names[folder][0] for folder in labelled.classnames),
            templates=tuple(frame.replace("{}", "{c}") for frame in real_teacher.FRAMES),
        )
        return labelled.pool, class_pairs(labelled, self.teacher.encode_texts)

    def arm_data(self, arm: Arm, train: TrainConfig) -> DistillData:
        """An arm's share of the data; a smaller share is part of a larger one."""
        data, folder = self.data(arm.images), self.store_dir
        with locked(self.out / ".data.lock"):
            if arm.texts in ("prompts", "beside"):
                data = dataclasses.replace(data, texts=self._prompted(arm.texts))
            rows = {}
            if arm.image_share < 1:
                rows["image_rows"] = any_share(len(data.images), arm.image_share)
            if arm.texts == "grounded":
                rows["text_rows"] = self._grounded(data, arm.text_share)
            elif arm.text_share < 1:
                rows["text_rows"] = any_share(len(data.texts), arm.text_share)
            data = dataclasses.replace(data, **rows)
            if train.hard_negatives:
                table = open_neighbours(
                    data.images, data.texts, folder / "neighbours", text_rows=data.text_rows
                )
                data = dataclasses.replace(data, neighbours=table)
            specs = view_specs(train)
            if specs:
                pool, _ = self._pool(arm.images)
                stores = tuple(
                    embed_images(self.teacher, pool, folder / f"view-{s.digest()}", view=s)
                    for s in specs
                )
                data = dataclasses.replace(data, views=Views(specs, stores))
        return data

    def _grounded(self, data: DistillData, share: float) -> np.ndarray:
        folder = self.store_dir / "corpus" / f"{share:g}"
        if not (folder / ROWS_FILE).is_file():
            sentences = open_sentences([self.setup.texts])
            build_corpus(sentences, data.images, data.texts, folder, keep=share)
        return load_kept_rows(folder / ROWS_FILE, data.texts)

    def _prompted(self, which: str) -> EmbeddingStore:
        """Sentences about the test sets' classes, alone or beside all others."""
        path = self.store_dir / "prompts.txt"
        path.parent.mkdir(parents=True, exist_ok=True)
        sets = self.evaluate.eval_sets
        lines = [line for s in sets for line in class_prompts(s.classnames, s.templates)]
        path.write_text("\n".join(lines) + "\n", encoding="utf-8")
        sources = [str(path), *([self.setup.texts] if which == "beside" else [])]
        return embed_texts(self.teacher, open_sentences(sources), self.store_dir / which)

    def run(self, name: str, arm: Arm, seed: int) -> dict[str, Any] | None:
        """Train one arm with one seed, or read what it came to; None: another process is at it."""
        train = dataclasses.replace(self.setup.train, seed=seed, **arm.train)
        settings = {
            "arm": dataclasses.asdict(arm), "train": dataclasses.asdict(train),
            "student": self.spec(arm).to_dict(), "teacher": self.teacher.weights_hash,
            "limit": self.args.limit,
        }  # fmt: skip
        settings["train"].pop("threads")
        key = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:12]
        run_dir = self.out / "runs" / key
        result = run_dir / RESULT_FILE
        with locked(run_dir / ".lock", wait=False) as is_ours:
            if not is_ours:
                return None
            if not result.is_file():
                values = {"arm": name, "seed": seed, **self._train(arm, train, run_dir)}
                with atomic_file(result) as stream:
                    stream.write(json.dumps(values | {"settings": settings}, indent=1).encode())
                for name in (STATE_FILE, "best.safetensors"):  # the checkpoint is the same
                    (run_dir / name).unlink()
        values = json.loads(result.read_text())
        return dict(values)

    def _train(self, arm: Arm, train: TrainConfig, run_dir: Path) -> dict[str, Any]:
        torch.manual_seed(train.seed)
        spec = self.spec(arm)
        student = build_student(spec)
        if arm.inherits:
            inherit_from_teacher(student, self.teacher.image_tower)
        begun = time.process_time()
        report = distill(
            student, self.arm_data(arm, train), loss=arm.loss, run_dir=run_dir, resume=True,
            train=dataclasses.replace(train, eval_every=train.steps or 1),
            save_weights=lambda path, m: save_student(path, m, spec, self.preprocess, {}),
            evaluate=self.evaluate,
        )  # fmt: skip
        scores = {k: v for k, v in report.best.items() if k != "step"}
        return {
            "scores": scores, "epochs": report.epochs, "cpu_s": time.process_time() - begun,
            "final_loss": report.final_loss,
        }  # fmt: skip


def any_share(count: int, share: float) -> np.ndarray:
    """Rows by chance, ascending; a smaller share is part of a larger one."""
    return np.sort(np.random.default_rng(0).permutation(count)[: round(share * count)])


def summary_of(results: dict[str, list[dict[str, Any]]]) -> dict[str, dict[str, float]]:
    """Mean, spread (standard deviation over seeds) and number of runs of every arm."""
    rows: dict[str, dict[str, float]] = {}
    for name, runs in results.items():
        row: dict[str, float] = {"seeds": len(runs)}
        for score in runs[0]["scores"] if runs else ():
            values = [run["scores"][score] for run in runs]
            row[score] = statistics.fmean(values)
            if len(values) > 1:
                row[f"{score}_sd"] = statistics.stdev(values)
        if runs:
            row["cpu_s"] = statistics.fmean(run["cpu_s"] for run in runs)
        rows[name] = row
    return rows


def fit_figures(study: Study, arm: Arm) -> dict[str, float]:
    """What `fit` knows of a student before it is trained."""
    spec = study.spec(arm)
    ops = trace_student(spec)
    return {
        "gmacs": total_gmacs(ops), "params_m": total_params_m(ops),
        "score": student_score(total_gmacs(ops), inherits=arm.inherits),
    }  # fmt: skip


def rank_correlations(rows: dict[str, dict[str, float]], score: str) -> dict[str, float]:
    """Spearman's, of each figure with what training came to; none while fewer than two are done."""
    done = pd.DataFrame([row for row in rows.values() if score in row])
    return (
        {}
        if len(done) < 2
        else {
            name: float(done[name].corr(done[score], method="spearman"))
            for name in ("gmacs", "params_m", "score")
        }
    )


def table_of(summary: dict[str, dict[str, float]], teacher: dict[str, float]) -> str:
    scores = list(teacher)
    lines: list[list[str | float | None]] = [["teacher", None, *teacher.values(), None]]
    for name, row in summary.items():
        cells = [
            f"{row[s]:.1f} ± {row[f'{s}_sd']:.1f}" if f"{s}_sd" in row else row.get(s)
            for s in scores
        ]
        lines.append([name, row["seeds"], *cells, row.get("cpu_s")])
    return format_table(["arm", "seeds", *scores, "CPU s"], lines)


def run_study(args: argparse.Namespace) -> dict[str, Any]:
    """Every arm with every seed, seeds outermost: a stopped study has whole comparisons."""
    study, arms = Study(args), STUDIES[args.study]
    for images in dict.fromkeys(arm.images for arm in arms.values()):
        study.data(images)
    results: dict[str, list[dict[str, Any]]] = {name: [] for name in arms}
    waiting = 0
    for seed in [] if args.prepare else args.seeds:
        for name, arm in arms.items():
            values = study.run(name, arm, seed)
            if values is None:
                waiting += 1
                continue
            results[name].append(values)
            print(f"seed {seed}, {name}: {values['scores']}, {values['cpu_s']:.0f} CPU s",
                  file=sys.stderr, flush=True)  # fmt: skip
    summary = summary_of(results)
    values = {
        "study": args.study, "data": args.data, "steps": study.setup.train.steps,
        "student": study.setup.student, "teacher": study.teacher_scores(), "arms": summary,
        "elsewhere": waiting,
    }  # fmt: skip
    if args.study == "students":
        figures = {name: fit_figures(study, arm) for name, arm in arms.items()}
        for name, row in summary.items():
            row |= figures[name]
        values["rank_correlation"] = rank_correlations(summary, next(iter(study.teacher_scores())))
    if not args.prepare:
        with atomic_file(study.out / f"{args.study}.json") as stream:
            stream.write((json.dumps(values, indent=1) + "\n").encode())
    return values


def parse_args(words: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("study", choices=tuple(STUDIES))
    parser.add_argument("--data", choices=("scenes", "real"), default="real")
    parser.add_argument("--data-dir", type=Path, default=Path("../shared/data"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, help="default: 1500 on real images, 800 on scenes")
    parser.add_argument("--out", type=Path, default=Path("runs/studies"))
    parser.add_argument("--teacher", help="default: OUT/teacher; sample on scenes")
    parser.add_argument("--limit", type=int, help="scenes only: that many images and sentences")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--prepare", action="store_true", help="make teacher and stores only")
    parser.add_argument("--json", action="store_true", help="for record.py, instead of a table")
    return parser.parse_args(words)


def main() -> None:
    args = parse_args()
    values = run_study(args)
    if args.json:
        print(json.dumps(values))
        return
    print(table_of(values["arms"], values["teacher"]))
    if values["elsewhere"]:
        print(f"{values['elsewhere']} runs are under way in another process")


if __name__ == "__main__":
    main()
