"""What `fit` knows of the study's students before they are trained, and what it was worth.

Used by studies.py `students`: rank correlations of each figure with the trained students' top-1,
and each of timm's models, which one would pick by hand, against the best of ours that is no
slower in ONNX Runtime on this machine.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pandas as pd

from dimefm_edge.latency.calibrate import export_graphs, measure_graphs
from dimefm_edge.latency.student_counts import count_student
from dimefm_edge.student_score import is_convolutional, learns_quickly, student_score
from dimefm_edge.students import StudentSpec
from dimefm_edge.students.heirs import layers_share

Rows = dict[str, dict[str, float]]
_FIGURES = ("gmacs", "params_m", "score", "p50_ms")


def fit_figures(
    spec: StudentSpec, *, inherits: bool, teacher: Mapping[str, Any] | None = None
) -> dict[str, float]:
    """Multiply-adds, parameters in millions, and the score that `fit` ranks by with a teacher of
    that geometry."""
    counts = count_student(spec)
    score = student_score(
        counts.gmacs, inherits=inherits, is_convolutional=is_convolutional(counts.costs),
        learns_quickly=learns_quickly(spec), layers=layers_share(spec.args, teacher),
    )  # fmt: skip
    return {"gmacs": counts.gmacs, "params_m": counts.params_m, "score": score}


def measured_ms(specs: Mapping[str, StudentSpec]) -> dict[str, float]:
    """Milliseconds at batch 1 on one thread, fp32, all in turn; random weights do."""
    with tempfile.TemporaryDirectory(prefix="dimefm-study-") as folder:
        graphs: dict[tuple[str, str], tuple[Path, StudentSpec]] = {}
        for i, (name, spec) in enumerate(specs.items()):
            path = export_graphs(spec, Path(folder) / f"{i}", ["fp32"])["fp32"]
            graphs[name, "fp32"] = (path, spec)
        times = measure_graphs(graphs, threads=1)
    return {name: times[name, "fp32"] for name in specs}


def rank_correlations(rows: Rows, score: str) -> dict[str, float]:
    """Spearman's, of each figure with what training came to; none while fewer than two are done."""
    done = pd.DataFrame([row for row in rows.values() if score in row])
    if len(done) < 2:
        return {}
    return {
        name: float(done[name].corr(done[score], method="spearman"))
        for name in _FIGURES
        if name in done
    }


def against_hand_picked(rows: Rows, score: str) -> dict[str, dict[str, Any]]:
    """For each of timm's models: the student that `fit` prefers among ours that are no slower.

    One of timm's that starts from the teacher's weights is ours: nobody makes it by hand.

    Returns:
        By the model: `ours`, that student; top-1 of both; its time over the model's.
    """
    done = {name: row for name, row in rows.items() if score in row and "p50_ms" in row}
    theirs = {name for name in done if name.startswith("timm:") and "inherits" not in name}
    found = {}
    for name, row in done.items():
        ours = {
            other: figures
            for other, figures in done.items()
            if other not in theirs and figures["p50_ms"] <= row["p50_ms"]
        }
        if name in theirs and ours:
            best = max(ours, key=lambda other: ours[other]["score"])
            found[name] = {
                "ours": best, "ours_pct": ours[best][score], "theirs_pct": row[score],
                "time_ratio": ours[best]["p50_ms"] / row["p50_ms"],
            }  # fmt: skip
    return found
