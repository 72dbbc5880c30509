"""Does `fit --target local` keep a budget and use it? Students chosen, exported and timed again.

    dimefm-edge calibrate && python benchmarks/bench_fit.py --json | python benchmarks/record.py fit

For each budget the choice, as `fit` measured it, and its share of the budget when the student is
exported anew and timed once more: 0.75 to 1 is asked. Quiet machines only.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from typing import Any

from dimefm_edge.fit import fit_student
from dimefm_edge.latency.calibrate import measure_student
from dimefm_edge.targets import LOCAL

BUDGETS_MS = (2.0, 5.0, 12.0, 30.0, 60.0)


def try_budget(budget_ms: float, image_size: int, precision: str) -> dict[str, Any]:
    """One fit, and its student measured again."""
    begun = time.perf_counter()
    report = fit_student(
        LOCAL, image_size=image_size, embed_dim=512, latency_ms=budget_ms, precision=precision,
        measure=measure_student,
    )  # fmt: skip
    seconds = time.perf_counter() - begun
    best = report.chosen_candidate
    again_ms = measure_student(report.chosen, precision)
    return {
        "student": report.chosen.name, "gmacs": best.gmacs, "measured_ms": best.measured_ms,
        "again_ms": again_ms, "share": again_ms / budget_ms, "seconds": seconds,
        "measured": sum(c.measured_ms is not None for c in report.candidates),
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--budgets", type=float, nargs="+", default=BUDGETS_MS)
    parser.add_argument("--image-size", type=int, default=224)
    parser.add_argument("--precision", default="fp32", choices=("fp32", "int8"))
    parser.add_argument("--json", action="store_true", help="for record.py")
    args = parser.parse_args()
    values: dict[str, Any] = {"image_size": args.image_size, "precision": args.precision}
    for budget in args.budgets:
        found = try_budget(budget, args.image_size, args.precision)
        print(f"{budget:g} ms: {found}", file=sys.stderr, flush=True)
        values[f"{budget:g}_ms"] = found
    if args.json:
        print(json.dumps(values))


if __name__ == "__main__":
    main()
