"""What are weights worth that a student selects from a wider network of its kind?

    python benchmarks/bench_inherit.py --out /tmp/studies --json \\
        | python benchmarks/record.py inherit

Hybrids and convnets, on scenes: each small student is trained from random weights, and from those
of a larger one that the same study trained, before anything is trained (`selected`) and after as
many steps. Runs are kept as those of studies.py are, and the random ones shared with its
`students`. What a ViT inherits, from the sample teacher itself, is an arm of that study.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
import time
from typing import Any

import torch
from torch import nn

from dimefm_edge.distill import distill
from dimefm_edge.files import atomic_file
from dimefm_edge.students import build_student, load_student, save_student
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

PAIRS = (
    ("convnet-w8-d1.1.1.1", "convnet-w16-d1.1.1.1"),
    ("hybrid-w16-d1.1.1.1", "hybrid-w24-d1.1.2.1"),
)
"""Student, and whose weights it selects from."""


def heir(study: studies.Study, name: str, source: dict[str, Any], seed: int) -> dict[str, Any]:
    """A student that starts from a trained one's weights: top-1 before and after, CPU seconds."""
    settings = {"heir": name, "of": source["settings"], "seed": seed}
    run_dir = study.out / "inherit" / run_key(settings)
    result = run_dir / studies.RESULT_FILE
    with locked(run_dir / ".lock"):
        if result.is_file():
            return json.loads(result.read_text())  # type: ignore[no-any-return]
        spec = study.spec(Arm(student=name))
        preprocess = study.preprocess(Arm(student=name))
        wide = study.out / "runs" / run_key(source["settings"])
        torch.manual_seed(seed)
        student = build_student(spec)
        if not inherit_from_teacher(student, load_student(wide).student):
            sys.exit(f"{name} inherits nothing")
        values: dict[str, Any] = {"selected_pct": top1(study, student)}
        train = dataclasses.replace(study.setup.train, seed=seed)
        begun = time.process_time()
        report = distill(
            student, study.arm_data(Arm(), train), loss=Arm().loss, run_dir=run_dir, resume=True,
            train=dataclasses.replace(train, eval_every=train.steps or 1),
            save_weights=lambda path, m: save_student(path, m, spec, preprocess, {}),
            evaluate=study.evaluate,
        )  # fmt: skip
        values["cpu_s"] = time.process_time() - begun
        values["trained_pct"] = next(v for k, v in report.best.items() if k != "step")
        with atomic_file(result) as stream:
            stream.write(json.dumps(values, indent=1).encode())
        return values


def top1(study: studies.Study, student: nn.Module) -> float:
    """In percent, of the test set; the student is left in train mode."""
    found = next(iter(study.evaluate(student.eval()).values()))
    student.train()
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    studies.add_scenes_flags(parser)
    args = parser.parse_args()
    study = studies.scenes_study(args)
    found: dict[str, Any] = {"steps": args.steps, "seeds": {}}
    lines: list[list[Any]] = []
    for seed in args.seeds:
        rows = found["seeds"][seed] = {}
        for name, wide in PAIRS:
            source = study.finished(wide, Arm(student=wide), seed)
            score = next(iter(source["scores"]))
            random_pct = study.finished(name, Arm(student=name), seed)["scores"][score]
            row = heir(study, name, source, seed)
            rows[name] = {
                "of": wide,
                "of_pct": source["scores"][score],
                "random_pct": random_pct,
            } | row
            lines.append([str(seed), name, wide, source["scores"][score], random_pct,
                          row["selected_pct"], row["trained_pct"], row["cpu_s"]])  # fmt: skip
            print(f"seed {seed}, {name}: {rows[name]}", file=sys.stderr, flush=True)
    if args.json:
        print(json.dumps(found))
        return
    headers = ["seed", "student", "of", "its top-1", "random", "selected", "trained", "CPU s"]
    print(format_table(headers, lines))


if __name__ == "__main__":
    main()
