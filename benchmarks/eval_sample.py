"""What the sample teacher is worth by every measure of `dimefm-edge eval`, on scenes.

    python benchmarks/eval_sample.py --json | python benchmarks/record.py eval_sample

Some three minutes on one core; corruptions on 150 images, each embedded 76 times, are most of it.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from typing import Any

from dimefm_edge.data.captioned import open_captioned
from dimefm_edge.data.images import open_labelled
from dimefm_edge.scorecard import EvalPlan, figures_of, score_subject
from dimefm_edge.subjects import load_subject
from dimefm_edge.suites import EvalSet


def measure(name: str, corruption_images: int) -> dict[str, Any]:
    """Every figure of one subject, by set and measure, and what it was taken on."""
    plan = EvalPlan(
        sets=(EvalSet(open_labelled("scenes"), train=open_labelled("scenes-train")),),
        captioned=(open_captioned("scenes"),),
        with_ece=True,
        with_corruptions=True,
        corruption_images=corruption_images,
    )
    begun, cpu = time.perf_counter(), time.process_time()
    subject = load_subject(name)
    score = score_subject(subject, plan, subject.encode_texts)
    (entry,), (retrieval,) = score.sets, score.retrieval
    assert entry.linear_probe is not None
    assert entry.corruptions is not None
    return {
        "figures_pct": {f"{f.set_name} {f.measure}": f.value for f in figures_of(score)},
        "probe_c": entry.linear_probe.c,
        "probe_train_images": entry.linear_probe.num_train,
        "test_images": entry.num_images,
        "retrieval_images": retrieval.num_images,
        "retrieval_sentences": retrieval.num_sentences,
        "corruption_images": entry.corruptions.num_images,
        "corruption_clean_top1_pct": entry.corruptions.clean_top1_pct,
        "corruption_top1_pct": {
            corruption: sum(values) / len(values)
            for corruption, values in entry.corruptions.top1_pct.items()
        },
        "wall_s": time.perf_counter() - begun,
        "cpu_s": time.process_time() - cpu,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--subject", default="sample")
    parser.add_argument("--corruption-images", type=int, default=150)
    parser.add_argument("--json", action="store_true", help="print JSON only")
    args = parser.parse_args()
    values = measure(args.subject, args.corruption_images)
    if args.json:
        json.dump(values, sys.stdout, indent=2)
    else:
        for name, value in values["figures_pct"].items():
            print(f"{name:40} {value:6.2f}")


if __name__ == "__main__":
    main()
