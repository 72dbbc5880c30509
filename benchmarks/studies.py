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
| `extras` | views that the teacher saw too; with `--teacher A+B`, several teachers as one |
| `recipe` | all that helps together, and with each part left out; take `--probe` |
| `retention` | that recipe and pairs for 4,000 steps at 64 px, more images, views: for a GPU |
| `activations` | hybrids with GELU, as FastViT, and with ReLU, which int8 takes in |
| `resolution` | the same students on smaller images |
| `kernels` | hybrids and convnets with mixers of 3, 5 and 7 elements a side |
| `hand-picked` | real images at 64 px: ours and those of timm's that one would pick by hand |
| `students` | many: does what `fit` goes by rank them as training does, and beat timm's (scenes)? |

`--data scenes`: the sample teacher, procedural images; each image's pair is its own sentence.
`--data real`: Tiny-ImageNet and CIFAR-10 by real_teacher.py's teacher, which is trained when it
is missing (an hour); unlabelled images, captions and glosses; pairs are the labelled images,
which that teacher was trained on, and sentences of their classes.

`--probe` adds linear probes of the test sets' classes, learned from the labelled images.

A run's folder is named by the hash of its settings: what is finished is not done again, what was
stopped goes on, and several processes of one command share its runs. Scores are of the last
step's averaged weights, zero-shot on test sets that nothing was chosen by.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch import nn

from dimefm_edge.config import TrainConfig
from dimefm_edge.distill import distill
from dimefm_edge.encoders import module_encoder
from dimefm_edge.errors import UnknownNameError, lookup
from dimefm_edge.evaluate.features import embed_pool
from dimefm_edge.evaluate.linear_probe import evaluate_linear_probe, fit_linear_probe
from dimefm_edge.files import atomic_file
from dimefm_edge.preprocess import PreprocessSpec
from dimefm_edge.run_log import STATE_FILE
from dimefm_edge.students import (
    StudentSpec,
    build_student,
    load_student,
    save_student,
    student_spec,
)
from dimefm_edge.students.inherit import inherit_from_teacher
from dimefm_edge.students.vit import vit_geometry
from dimefm_edge.tables import format_table

if __package__:
    from benchmarks.small_maps import with_small_maps
    from benchmarks.study_arms import STUDIES, Arm
    from benchmarks.study_data import StudyData, locked, run_key
    from benchmarks.study_fit import (
        against_hand_picked,
        fit_figures,
        measured_ms,
        rank_correlations,
    )
    from benchmarks.torch_logistic import TorchLogisticRegression
else:
    from small_maps import with_small_maps
    from study_arms import STUDIES, Arm
    from study_data import StudyData, locked, run_key
    from study_fit import against_hand_picked, fit_figures, measured_ms, rank_correlations
    from torch_logistic import TorchLogisticRegression

RESULT_FILE = "result.json"


class Study(StudyData):
    """Students of every arm, each trained once a seed and scored."""

    def spec(self, arm: Arm) -> StudentSpec:
        return student_spec(
            arm.student or self.setup.student,
            image_size=self.image_size(arm),
            embed_dim=self.teacher.embed_dim,
        )

    @functools.cache  # noqa: B019
    def teacher_scores(self) -> dict[str, float]:
        """Zero-shot top-1 of the teacher, the ceiling."""
        tower = self.teacher.image_tower
        scores = self.evaluate(tower)
        return scores | (self.probe(tower, self.teacher.preprocess) if self.args.probe else {})

    def run(self, name: str, arm: Arm, seed: int) -> dict[str, Any] | None:
        """Train one arm with one seed, or read what it came to; None: another process is at it."""
        train = dataclasses.replace(self.setup.train, seed=seed, **arm.train)
        settings = {
            "arm": dataclasses.asdict(arm), "train": dataclasses.asdict(train),
            "student": self.spec(arm).to_dict(), "teacher": self.teacher.weights_hash,
            "limit": self.args.limit,
        }  # fmt: skip
        settings["train"].pop("threads")
        run_dir = self.out / "runs" / run_key(settings)
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
            values: dict[str, Any] = json.loads(result.read_text())
            if self.args.probe and not any("probe" in name for name in values["scores"]):
                student = load_student(run_dir).student
                values["scores"] |= self.probe(student, self.preprocess(arm))
                with atomic_file(result) as stream:
                    stream.write(json.dumps(values, indent=1).encode())
        return values

    def finished(self, name: str, arm: Arm, seed: int) -> dict[str, Any]:
        """`run`, for who cannot go on without."""
        values = self.run(name, arm, seed)
        if values is None:
            sys.exit(f"another process trains {name}: run this again when it is done")
        return values

    def probe(self, tower: nn.Module, preprocess: PreprocessSpec) -> dict[str, float]:
        """Top-1 of a linear probe of each test set, in percent, learned from labelled images."""
        encode = module_encoder(tower.to(self.teacher.device).eval(), preprocess)
        scores = {}
        for test, train in zip(self.evaluate.eval_sets, self.probe_sets(), strict=True):
            learned, asked = (
                embed_pool(encode, preprocess, s.pool, name=s.name) for s in (train, test)
            )
            probe = fit_linear_probe(
                learned.embeds, train.labels[learned.rows], len(train.classnames),
                name=train.name, solve=self._solve,
            )  # fmt: skip
            report = evaluate_linear_probe(
                probe, asked.embeds, test.labels[asked.rows], name=test.name, train_name=train.name
            )
            scores[f"{test.name}_probe_pct"] = report.value_pct
        return scores

    def _solve(self, embeds: Any, labels: Any, c: float) -> Any:
        return TorchLogisticRegression(c, device=str(self.teacher.device)).fit(embeds, labels)

    def _train(self, arm: Arm, train: TrainConfig, run_dir: Path) -> dict[str, Any]:
        torch.manual_seed(train.seed)
        spec = self.spec(arm)
        student = with_small_maps(build_student(spec))
        if arm.inherits:
            inherit_from_teacher(student, self.teacher.image_tower)
        begun = time.process_time()
        preprocess = self.preprocess(arm)
        report = distill(
            student, self.arm_data(arm, train), loss=arm.loss, run_dir=run_dir, resume=True,
            train=dataclasses.replace(train, eval_every=train.steps or 1),
            save_weights=lambda path, m: save_student(path, m, spec, preprocess, {}),
            evaluate=dataclasses.replace(self.evaluate, preprocess=preprocess),
        )  # fmt: skip
        scores = {k: v for k, v in report.best.items() if k != "step"}
        return {
            "scores": scores, "epochs": report.epochs, "cpu_s": time.process_time() - begun,
            "final_loss": report.final_loss, "device": device_name(),
        }  # fmt: skip


def device_name() -> str:
    return torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"


def summary_of(results: dict[str, list[dict[str, Any]]]) -> dict[str, dict[str, float]]:
    """Mean, spread (standard deviation over seeds) and number of runs of every arm."""
    rows: dict[str, dict[str, float]] = {}
    for name, runs in results.items():
        row: dict[str, float] = {"seeds": len(runs)}
        for score in runs[0]["scores"] if runs else ():
            if any(score not in run["scores"] for run in runs):  # probed in some only
                continue
            values = [run["scores"][score] for run in runs]
            row[score] = statistics.fmean(values)
            if len(values) > 1:
                row[f"{score}_sd"] = statistics.stdev(values)
        if runs:
            row["cpu_s"] = statistics.fmean(run["cpu_s"] for run in runs)
        rows[name] = row
    return rows


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


def chosen_arms(args: argparse.Namespace) -> dict[str, Arm]:
    """Those that were asked for.

    Raises:
        UnknownNameError: If the study has no such arm.
    """
    arms = STUDIES[args.study]
    return {name: lookup(arms, name, kind=f"arm of {args.study}") for name in args.arms or arms}


def run_study(args: argparse.Namespace) -> dict[str, Any]:
    """Every arm with every seed, seeds outermost: a stopped study has whole comparisons."""
    arms = chosen_arms(args)
    study = Study(args)
    for arm in arms.values() if args.prepare else ():
        study.arm_data(arm, dataclasses.replace(study.setup.train, **arm.train))
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
        "devices": sorted({run["device"] for runs in results.values() for run in runs}),
    }  # fmt: skip
    if args.study in ("students", "hand-picked"):
        specs = {name: study.spec(arm) for name, arm in arms.items()}
        times = {} if args.prepare else measured_ms(specs)
        for name, row in summary.items():
            row |= fit_figures(
                specs[name], inherits=arms[name].inherits,
                teacher=vit_geometry(study.teacher.image_tower),
            )  # fmt: skip
            row |= {"p50_ms": times[name]} if name in times else {}
        score = next(iter(study.teacher_scores()))
        values["rank_correlation"] = rank_correlations(summary, score)
        values["hand_picked"] = against_hand_picked(summary, score)
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
    parser.add_argument("--arms", nargs="+", default=[], help="default: all of the study's")
    parser.add_argument("--steps", type=int, help="default: 1500 on real images, 800 on scenes")
    parser.add_argument("--out", type=Path, default=Path("runs/studies"))
    parser.add_argument("--teacher", help="or A+B; default: OUT/teacher; sample on scenes")
    parser.add_argument("--limit", type=int, help="scenes only: that many images and sentences")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--probe", action="store_true", help="linear probes too")
    parser.add_argument("--prepare", action="store_true", help="make teacher and stores only")
    parser.add_argument("--json", action="store_true", help="for record.py, instead of a table")
    return parser.parse_args(words)


def add_scenes_flags(parser: argparse.ArgumentParser) -> None:
    """Flags of a benchmark that trains students on scenes, beside its own."""
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--limit", type=int, help="of images and sentences, for a short try")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=Path("runs/studies"))
    parser.add_argument("--json", action="store_true", help="for record.py, instead of a table")


def scenes_study(args: argparse.Namespace) -> Study:
    """The study `students` on scenes, by those flags: finished runs of it are found."""
    words = ["students", "--data", "scenes", "--steps", str(args.steps), "--out", str(args.out),
             "--threads", str(args.threads)]  # fmt: skip
    words += [] if args.limit is None else ["--limit", str(args.limit)]
    return Study(parse_args(words))


def main() -> None:
    args = parse_args()
    try:
        values = run_study(args)
    except UnknownNameError as error:
        sys.exit(str(error))
    if args.json:
        print(json.dumps(values))
        return
    print(table_of(values["arms"], values["teacher"]))
    for name, value in values.get("rank_correlation", {}).items():
        print(f"{name} ranks the students as training does: {value:.2f}")
    for name, row in values.get("hand_picked", {}).items():
        print(f"{name} {row['theirs_pct']:.1f}%, fit's choice that is no slower {row['ours']} "
              f"{row['ours_pct']:.1f}%, at {row['time_ratio']:.2f} of its time")  # fmt: skip
    if values["elsewhere"]:
        print(f"{values['elsewhere']} runs are under way in another process")


if __name__ == "__main__":
    main()
