"""The study on real images: distil from the unlabelled pool and test zero-shot.

    python benchmarks/real_teacher.py --data ../shared/data --out /tmp/teacher
    python benchmarks/real_data.py --teacher /tmp/teacher --data ../shared/data

Runs the product's own pipeline on Tiny-ImageNet and CIFAR-10 images and on captions and
glosses that belong to no image, prints the report and records its table in results/.
Resumable: run it again with the same flags.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from dimefm_edge.config import DataConfig, LossConfig, RunConfig, StudentConfig, TrainConfig
from dimefm_edge.pipeline import run

if __package__:
    from benchmarks.record import record
else:
    from record import record


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--teacher", required=True)
    parser.add_argument("--data", type=Path, default=Path("../shared/data"))
    parser.add_argument("--out", default="runs/real")
    parser.add_argument("--target", default="jetson-orin")
    parser.add_argument("--student", default="auto")
    parser.add_argument("--latency-ms", type=float, default=None)
    parser.add_argument("--epochs", type=float, default=15)
    parser.add_argument("--name", default="real_data", help="name in results/")
    args = parser.parse_args()
    data = DataConfig(
        images=(str(args.data / "images/*.tar"),),
        texts=(str(args.data / "text/*.gz"),),
        eval_sets=tuple(str(args.data / "zeroshot" / n) for n in ("cifar10", "tiny-imagenet")),
    )
    report = run(
        RunConfig(
            target=args.target,
            teacher=args.teacher,
            out=args.out,
            data=data,
            student=StudentConfig(student=args.student, latency_ms=args.latency_ms),
            loss=LossConfig(),
            train=TrainConfig(epochs=args.epochs),
        ),
        resume=True,
    )
    if report is None:
        return
    print(report.to_markdown())
    rows = {
        row.student.name: {
            "chance_pct": row.student.chance_pct,
            "teacher_top1_pct": row.teacher.top1_pct,
            "student_top1_pct": row.student.top1_pct,
            "retention_pct": row.retention_pct,
        }
        for row in report.accuracy
    }
    rows["student"] = {
        "name": report.student.name,
        "params_m": report.student.params_m,
        "teacher_params_m": report.teacher.params_m,
        "latency_ratio_here": report.latency_ratio,
        "images": report.data["num_images"],
        "sentences": report.data["num_texts"],
        "epochs": report.training["epochs"],
    }
    record(args.name, rows)


if __name__ == "__main__":
    main()
