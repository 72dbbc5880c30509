"""What does a text side in int8 or int4 weigh, how near are its answers, and what do they cost?

Each tower is exported in fp32, fp16, int8 and int4 for ONNX Runtime: the file's size, the least
cosine to torch over the parity sentences, and one sentence's time on one thread by the processor's
clock, the graphs in turn. The sample teacher is trained, so its zero-shot accuracy on scenes is
told too, its labels embedded by each graph; ViT-B-32 has random weights, which are the hardest.

    python benchmarks/bench_text_precision.py --json | python benchmarks/record.py text_precision
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from dimefm_edge.data.images import open_labelled
from dimefm_edge.data.scenes import scene_sentence
from dimefm_edge.encoders import Normalised
from dimefm_edge.errors import ParityError
from dimefm_edge.export import graph_spec
from dimefm_edge.export.text import TEXT_PRECISIONS, export_text_onnx
from dimefm_edge.export.weight_only import WEIGHT_FORMATS
from dimefm_edge.labels import build_label_bank
from dimefm_edge.latency.measure import machine_info
from dimefm_edge.preprocess import resize_image
from dimefm_edge.runtime.onnxruntime import load_session
from dimefm_edge.teacher import Teacher, load_teacher

SENTENCES = 24
BATCH = 32


def encode_with(session: Any, teacher: Teacher) -> Callable[[Any], Any]:
    def encode(sentences: Any) -> Any:
        tokens = np.asarray(teacher.tokenize(list(sentences)))
        pieces = [
            session.run(None, {"tokens": tokens[i : i + BATCH]})[0]
            for i in range(0, len(tokens), BATCH)
        ]
        return np.concatenate(pieces)

    return encode


def top1_pct(teacher: Teacher, encoders: dict[str, Callable[[Any], Any]]) -> dict[str, float]:
    """Zero-shot accuracy on scenes; the images are embedded once, by the teacher."""
    data = open_labelled("scenes")
    images = np.concatenate([
        teacher.encode_images(
            np.stack([resize_image(data.pool.load(row), teacher.preprocess) for row in rows])
        )
        for rows in np.array_split(np.arange(len(data.pool)), max(1, len(data.pool) // BATCH))
    ])  # fmt: skip
    values = {}
    for name, encode in encoders.items():
        bank = build_label_bank("scenes", data.classnames, data.templates, encode)
        guesses = (images @ bank.embeds.T).argmax(axis=1)
        values[name] = 100 * float((guesses == np.asarray(data.labels)).mean())
    return values


def bench(name: str, *, seconds: float, folder: Path) -> dict[str, Any]:
    teacher = load_teacher(name, device="cpu")
    tokens = np.asarray(teacher.tokenize([scene_sentence(i) for i in range(SENTENCES)]))
    tower = Normalised(teacher.text_tower)
    values: dict[str, Any] = {"name": name.split(":")[0]}
    sessions = {}
    for precision in TEXT_PRECISIONS:
        path = folder / f"{precision}.onnx"
        try:
            graph = export_text_onnx(
                tower, path, parity_tokens=tokens, metadata={},
                spec=graph_spec(None, precision="fp16" if precision == "fp16" else "fp32"),
                weights=WEIGHT_FORMATS.get(precision),
            )  # fmt: skip
        except ParityError as error:
            values[precision] = {"refused": str(error.args[0])}
            continue
        values[precision] = {
            "size_mib": path.stat().st_size / 2**20, "min_cosine": graph.parity.min_cosine,
        }  # fmt: skip
        sessions[precision] = load_session(path, 1)
    taken: dict[str, list[float]] = {precision: [] for precision in sessions}
    end = time.perf_counter() + seconds
    while time.perf_counter() < end:
        for precision, session in sessions.items():
            begun = time.thread_time()
            session.run(None, {"tokens": tokens[:1]})
            taken[precision].append(1000 * (time.thread_time() - begun))
    for precision, times in taken.items():
        values[precision]["sentence_cpu_ms"] = float(np.median(times))
    if name == "sample":
        encoders = {p: encode_with(session, teacher) for p, session in sessions.items()}
        for precision, pct in top1_pct(teacher, encoders).items():
            values[precision]["scenes_top1_pct"] = pct
    return values


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="*", default=("sample", "ViT-B-32:random"))
    parser.add_argument("--seconds", type=float, default=20.0, help="of timed calls, for each")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    rows = []
    for name in args.models:
        with tempfile.TemporaryDirectory() as folder:
            rows.append(bench(name, seconds=args.seconds, folder=Path(folder)))
    values = {"models": rows, "machine": machine_info()}
    print(json.dumps(values, indent=None if args.json else 1))


if __name__ == "__main__":
    main()
