"""One elastic student or every student alone, at the same total cost: whose students are better?

    python benchmarks/bench_elastic.py --seeds 0 --out /tmp/studies --json \\
        | python benchmarks/record.py elastic

Ways to several students, on scenes, for the multiply-adds that training each alone for --steps
takes: alone; cuts of an elastic student as they are; with --tune, cuts of one that was trained for
TUNE less, each then tuned alone. `--students` says which: ViTs, heirs (the elastic one starts from
the teacher's layers too), heirs of which the elastic one has narrower cuts that are not compared,
convnets. Runs are kept as those of studies.py are, and are shared with its `students`.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from dimefm_edge.config import TrainConfig
from dimefm_edge.cuts import NUM_BATCHES, elastic_stage
from dimefm_edge.distill import distill
from dimefm_edge.files import atomic_file
from dimefm_edge.latency.operators import total_gmacs
from dimefm_edge.latency.trace import trace_student
from dimefm_edge.sides import training_inputs
from dimefm_edge.students import StudentSpec, build_student
from dimefm_edge.students.elastic import ElasticStudent, cut_student, recalibrate
from dimefm_edge.students.inherit import inherit_from_teacher
from dimefm_edge.tables import format_table

if __package__:
    from benchmarks import studies
    from benchmarks.study_arms import Arm
    from benchmarks.study_data import locked, run_key
else:
    import studies
    from study_arms import Arm
    from study_data import locked, run_key

_HEIRS = ("vit-p8-w192-d2", "vit-p8-w192-d3", "vit-p8-w192-d4")
STUDENTS = {
    "vits": (
        "vit-p8-w64-d2", "vit-p8-w128-d2", "vit-p8-w128-d4", "vit-p8-w192-d2", "vit-p8-w192-d4"
    ),
    "heirs": _HEIRS,
    "heirs-and-narrower": _HEIRS,
    "convnets": ("convnet-w8-d1.1.1.1", "convnet-w12-d1.1.1.1", "convnet-w16-d1.1.1.1"),
}  # fmt: skip
"""The smallest first; the last holds all others."""
NARROWER = (
    "vit-p8-w96-d2", "vit-p8-w128-d2", "vit-p8-w96-d3", "vit-p8-w128-d3", "vit-p8-w96-d4",
    "vit-p8-w128-d4",
)  # fmt: skip
"""Cuts that `heirs-and-narrower` trains beside its own, the smallest first."""
TUNE = 0.4
"""Share of the cost that tuning takes, where cuts are tuned."""
TUNE_LR = 0.5
"""Of the rate that they were trained with."""


def elastic_steps(specs: Sequence[StudentSpec], cuts: Sequence[StudentSpec], steps: int) -> int:
    """Steps of an elastic student of those cuts that cost what `steps` of each of `specs` alone do,
    batch for batch."""
    alone = sum(total_gmacs(trace_student(spec)) for spec in specs)
    costs = [total_gmacs(trace_student(spec)) for spec in cuts]
    return round(steps * alone / (costs[0] + statistics.fmean(costs[1:-1] or costs) + costs[-1]))


class Elastic:
    """The runs of one seed."""

    def __init__(self, study: studies.Study, which: str, seed: int) -> None:
        self.study, self.seed = study, seed
        self.inherits = which.startswith("heirs")
        self.arms = {n: Arm(student=n, inherits=self.inherits) for n in STUDENTS[which]}
        self.specs = tuple(map(study.spec, self.arms.values()))
        more = NARROWER if which == "heirs-and-narrower" else ()
        self.trained = (*(study.spec(Arm(student=n)) for n in more), *self.specs)
        self.train = dataclasses.replace(study.setup.train, seed=seed)
        self.steps: int = study.setup.train.steps or 1

    def alone(self) -> dict[str, Any]:
        """Every student on its own."""
        scores, spent = [], []
        for name, arm in self.arms.items():
            run = self.study.finished(name, arm, self.seed)
            scores.append(run["scores"])
            spent.append(run["cpu_s"])
        return self._figures(scores, spent)

    def cuts(self, share: float) -> dict[str, Any]:
        """Cuts of an elastic student that was trained for a share of the cost, as they are."""
        model, cpu_s = self._elastic(share)
        scores = [self.study.evaluate(self._cut(model, spec).eval()) for spec in self.trained]
        compared = len(self.specs)
        values = self._figures(scores[-compared:], [cpu_s])
        more = zip((spec.name for spec in self.trained), scores[:-compared], strict=False)
        return values | {"more_pct": {name: next(iter(s.values())) for name, s in more}}

    def tuned(self, share: float) -> dict[str, Any]:
        """The same, each tuned alone for the rest of the cost."""
        model, cpu_s = self._elastic(share)
        train = dataclasses.replace(
            self.train, steps=round((1 - share) * self.steps), lr=TUNE_LR * self.train.lr
        )
        scores, spent = [], [cpu_s]
        for spec in self.specs:
            student, seconds = self._trained(
                f"tuned {share:g} {spec.name}", train, functools.partial(self._cut, model, spec)
            )
            scores.append(self.study.evaluate(student.eval()))
            spent.append(seconds)
        return self._figures(scores, spent)

    def _elastic(self, share: float) -> tuple[ElasticStudent, float]:
        steps = elastic_steps(self.specs, self.trained, self.steps)
        train = dataclasses.replace(self.train, steps=round(share * steps))
        train = elastic_stage(train)
        model, seconds = self._trained(f"elastic {share:g}", train, self._untrained)
        assert isinstance(model, ElasticStudent)
        return model, seconds

    def _untrained(self) -> ElasticStudent:
        student = build_student(self.specs[-1])
        if self.inherits:
            inherit_from_teacher(student, self.study.teacher.image_tower)
        return ElasticStudent(student, self.trained, seed=self.seed)

    def _cut(self, model: ElasticStudent, spec: StudentSpec) -> nn.Module:
        student = cut_student(model.student, self.specs[-1], spec)
        data = self.study.arm_data(Arm(), self.train)
        cpu = torch.device("cpu")
        recalibrate(student, training_inputs(data, Arm().loss, self.train, NUM_BATCHES, cpu))
        return student

    def _trained(
        self, name: str, train: TrainConfig, build: Callable[[], nn.Module]
    ) -> tuple[nn.Module, float]:
        """A module with its averaged weights, trained or found, and the CPU seconds it took."""
        torch.manual_seed(train.seed)
        module = build()
        settings = {
            "name": name, "steps": self.steps,
            "students": [spec.to_dict() for spec in self.trained],
            "train": dataclasses.asdict(train) | {"threads": 0},
            "arm": dataclasses.asdict(Arm(inherits=self.inherits)), "sandwich": 2,
            "teacher": self.study.teacher.weights_hash, "limit": self.study.args.limit,
        }  # fmt: skip
        run_dir = self.study.out / "elastic" / run_key(settings)
        result = run_dir / studies.RESULT_FILE
        with locked(run_dir / ".lock"):
            if not result.is_file():
                begun = time.process_time()
                distill(
                    module, self.study.arm_data(Arm(), train), loss=Arm().loss, run_dir=run_dir,
                    train=dataclasses.replace(train, eval_every=train.steps or 1), resume=True,
                    save_weights=lambda path, m: save_file(m.state_dict(), path),
                    evaluate=self.study.evaluate,
                )  # fmt: skip
                values = {"cpu_s": time.process_time() - begun, "settings": settings}
                with atomic_file(result) as stream:
                    stream.write(json.dumps(values, indent=1).encode())
        module.load_state_dict(load_file(run_dir / "checkpoint.safetensors"))
        return module, json.loads(result.read_text())["cpu_s"]

    def _figures(self, scores: list[dict[str, float]], cpu_s: list[float]) -> dict[str, Any]:
        top1 = dict(zip(self.arms, (next(iter(s.values())) for s in scores), strict=True))
        return {"top1_pct": top1, "mean_pct": statistics.fmean(top1.values()), "cpu_s": sum(cpu_s)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--students", choices=tuple(STUDENTS), default="vits")
    parser.add_argument("--tune", action="store_true", help="cuts that are tuned alone, too")
    studies.add_scenes_flags(parser)
    args = parser.parse_args()
    study = studies.scenes_study(args)
    found: dict[str, Any] = {
        "students": args.students, "steps": args.steps, "teacher": study.teacher_scores(),
        "seeds": {},
    }  # fmt: skip
    for seed in args.seeds:
        runs = Elastic(study, args.students, seed)
        ways = {"alone": runs.alone, "elastic": functools.partial(runs.cuts, 1.0)}
        if args.tune:
            ways["elastic, not tuned yet"] = functools.partial(runs.cuts, 1 - TUNE)
            ways["elastic, tuned"] = functools.partial(runs.tuned, 1 - TUNE)
        found["seeds"][seed] = {}
        for name, way in ways.items():
            found["seeds"][seed][name] = way()
            print(f"seed {seed}, {name}: {found['seeds'][seed][name]}", file=sys.stderr, flush=True)
    if args.json:
        print(json.dumps(found))
        return
    lines = [
        [str(seed), name, *row["top1_pct"].values(), row["mean_pct"], row["cpu_s"]]
        for seed, ways in found["seeds"].items()
        for name, row in ways.items()
    ]
    print(format_table(["seed", "way", *STUDENTS[args.students], "mean", "CPU s"], lines))


if __name__ == "__main__":
    main()
