"""Which small text encoder, and by which losses: text students beside the teacher's text tower.

Each arm is distilled from the same stores of unpaired images and sentences, tested zero-shot with
the teacher's images, and exported. Resumable, arm by arm.

    python benchmarks/bench_text_student.py --json | python benchmarks/record.py text_student
    python benchmarks/bench_text_student.py --sizes sample ViT-B-32:random --json \\
        | python benchmarks/record.py text_student_sizes

`--sizes` trains nothing: parameters, files and latency of what `auto` makes of a teacher.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dimefm_edge.batches import DistillData
from dimefm_edge.config import TextStudentConfig, TrainConfig
from dimefm_edge.data.images import LabelledSet, open_images, open_labelled
from dimefm_edge.data.sentences import open_sentences
from dimefm_edge.distributed import Ranks
from dimefm_edge.embed import embed_images, embed_texts
from dimefm_edge.encoders import Normalised
from dimefm_edge.evaluate.features import Features
from dimefm_edge.evaluate.zero_shot import score_zero_shot
from dimefm_edge.export.graph_spec import graph_spec
from dimefm_edge.export.text import export_text_onnx
from dimefm_edge.export.tokenizers import PROBES
from dimefm_edge.labels import build_label_bank
from dimefm_edge.latency.measure import machine_info, measure_blocks
from dimefm_edge.runtime.text import TextEncoder
from dimefm_edge.students.text import TextStudent
from dimefm_edge.students.text_checkpoint import load_text_student
from dimefm_edge.teacher import Teacher, load_teacher
from dimefm_edge.text_judge import TextScorer, teacher_features, text_encoder
from dimefm_edge.text_stage import TextPlan, plan_text, train_text

_ONE, _TWO = {"text_student": "text-w128-d1-e32"}, {"text_student": "text-w128-d2-e32"}
_NO_VL, _NO_PVL = {"text_vl_weight": 0.0}, {"text_pvl_weight": 0.0}
_NO_FEATURE = {"text_feature_weight": 0.0}
ARMS: dict[str, dict[str, Any]] = {
    "one layer": _ONE,
    "one layer, vl and pvl": {**_ONE, **_NO_FEATURE},
    "one layer, feature alone": {**_ONE, **_NO_VL, **_NO_PVL},
    "one layer, vl alone": {**_ONE, **_NO_PVL, **_NO_FEATURE},
    "one layer, pvl alone": {**_ONE, **_NO_VL, **_NO_FEATURE},
    "two layers, vl and pvl": {**_TWO, **_NO_FEATURE},
    "one layer, vl and pvl, random weights": {**_ONE, **_NO_FEATURE, "text_init": "random"},
    "one layer, whole token table": {"text_student": "text-w128-d1"},
}
_SENTENCE = "a photo of a red ball on a green table."


class Study:
    """What all arms share."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args, self.store = args, Path(args.store or args.out / "store")
        self.teacher = load_teacher("sample", device="cpu")
        self.sentences = open_sentences(["scenes"])
        images = embed_images(self.teacher, open_images(["scenes"]), self.store / "images")
        texts = embed_texts(self.teacher, self.sentences, self.store / "texts")
        self.data = DistillData(
            images, texts, lambda _: iter(()), self.teacher.preprocess, self.teacher.logit_scale
        )
        self.sets = [open_labelled(name) for name in ("scenes", "scenes-relations")]
        self.features = self._features()

    def _features(self) -> tuple[Features, ...]:
        path = self.args.out / f"features-{self.teacher.weights_hash}.npz"
        if not path.is_file():
            made = teacher_features(self.teacher, self.sets)
            path.parent.mkdir(parents=True, exist_ok=True)
            rows = {f"rows{i}": f.rows for i, f in enumerate(made)}
            np.savez(path, **rows, **{f"embeds{i}": f.embeds for i, f in enumerate(made)})
        with np.load(path) as found:
            return tuple(
                Features(found[f"rows{i}"], found[f"embeds{i}"], 0) for i in range(len(self.sets))
            )

    def train(self, name: str, seed: int) -> dict[str, Any]:
        """Distil one arm and test it."""
        args = self.args
        config = TextStudentConfig(**ARMS[name])
        train = TrainConfig(
            steps=args.steps, text_batch_size=args.batch_size, seed=seed, threads=args.threads
        )
        plan = plan_text(config, train, self.teacher, Ranks())
        assert plan is not None
        run_dir = args.out / f"{name.replace(' ', '-').replace(',', '')}-{seed}"
        run_dir.mkdir(parents=True, exist_ok=True)
        trained = train_text(
            run_dir, plan, self.teacher, self.data, self.sentences, config=config, train=train,
            steps=args.steps, store_dir=self.store, resume=True,
            metadata={"teacher": "sample", "logit_scale": repr(self.teacher.logit_scale)},
            evaluate=TextScorer(self.sets, self.features, plan.tokenizer),
        )  # fmt: skip
        loaded = load_text_student(run_dir)
        return {
            "student": plan.spec.name,
            "params_m": params_m(loaded.student),
            "final_loss": trained.training.final_loss,
            **{
                s.name: self.score(s, f, loaded.student, plan)
                for s, f in zip(self.sets, self.features, strict=True)
            },
        }

    def score(
        self, labelled: LabelledSet, features: Features, student: TextStudent, plan: TextPlan
    ) -> dict[str, float]:
        """The teacher's images by the student's labels and by the teacher's."""
        ours, teachers = (
            build_label_bank(labelled.name, labelled.classnames, labelled.templates, encode)
            for encode in (text_encoder(student, plan.tokenizer), self.teacher.encode_texts)
        )
        return {
            "student_text_top1_pct": score_zero_shot(features, labelled, ours).top1_pct,
            "teacher_text_top1_pct": score_zero_shot(features, labelled, teachers).top1_pct,
            "label_cosine": float((ours.embeds * teachers.embeds).sum(axis=1).mean()),
        }


def params_m(module: torch.nn.Module) -> float:
    """Millions of parameters."""
    return sum(p.numel() for p in module.parameters()) / 1e6


def sizes(teacher: Teacher) -> dict[str, Any]:
    """What `auto` makes of a teacher: parameters, files, and latency of one sentence, in turn."""
    plan = plan_text(TextStudentConfig(text_student="auto"), TrainConfig(), teacher, Ranks())
    assert plan is not None
    towers = {"teacher": Normalised(teacher.text_tower), "student": TextStudent(plan.spec).eval()}
    found: dict[str, Any] = {"student_name": plan.spec.name}
    with tempfile.TemporaryDirectory() as folder:
        encoders = {}
        for name, tower in towers.items():
            path = Path(folder, f"{name}.onnx")
            export_text_onnx(
                tower, path, parity_tokens=plan.tokenizer(PROBES), metadata={},
                spec=graph_spec(None),
            )  # fmt: skip
            encoders[name] = TextEncoder(path, plan.tokenizer, embed_dim=plan.spec.embed_dim)
            found[name] = {"params_m": params_m(tower), "size_mib": path.stat().st_size / 2**20}
        reports = measure_blocks(
            {
                name: lambda encoder=encoder: encoder.encode_texts([_SENTENCE])  # type: ignore[misc]
                for name, encoder in encoders.items()
            }
        )
    for report in reports:
        found[report.name] |= {"p50_ms": report.p50_ms, "p90_ms": report.p90_ms}
    found["params_share"] = found["student"]["params_m"] / found["teacher"]["params_m"]
    found["latency_ratio"] = found["student"]["p50_ms"] / found["teacher"]["p50_ms"]
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--arms", nargs="+", choices=list(ARMS), default=list(ARMS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--batch-size", type=int, default=256, help="sentences")
    parser.add_argument("--store", help="of a run on scenes, to embed nothing anew")
    parser.add_argument("--out", type=Path, default=Path("runs/text_student"))
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--sizes", nargs="+", metavar="TEACHER", help="train nothing")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    values: dict[str, Any] = {}
    if args.sizes:
        for name in args.sizes:
            values[name] = sizes(load_teacher(name, device="cpu"))
    else:
        study = Study(args)
        values = {"steps": args.steps, "batch_size": args.batch_size}
        values["teacher_text_params_m"] = params_m(study.teacher.text_tower)
        for name in args.arms:
            values[name] = {f"seed{seed}": study.train(name, seed) for seed in args.seeds}
    values["machine"] = machine_info()
    print(json.dumps(values, indent=None if args.json else 1))


if __name__ == "__main__":
    main()
