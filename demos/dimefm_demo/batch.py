"""Many pictures to a table: one line each, those that cannot be read with the reason."""

from __future__ import annotations

import csv
from collections.abc import Iterator
from pathlib import Path

from dimefm_demo.classify import Question, classify
from dimefm_demo.models import Model, Models
from dimefm_edge.data.images import BadImageError, ImagePool

_FORMULA = ("=", "+", "-", "@", "\t", "\r")


def classify_batch(
    models: Models, model: Model, pool: ImagePool, question: Question, out: Path, *, top_k: int
) -> Iterator[int]:
    """Classify every picture of a pool into a CSV file.

    Args:
        models: The page's, which keep label embeddings.
        model: One of them.
        pool: The pictures.
        question: The same for each.
        out: Written line by line: `file`, `label_1`, `probability_1` and so on to `top_k`,
            `error`.
        top_k: Labels per picture; fewer when there are fewer.

    Yields:
        How many pictures are done; a caller that stops asking leaves a table of those.

    Raises:
        CheckpointError: If the model has no text side, nor these labels baked in.
        DataError: If a template lacks `{c}`.
    """
    count = min(top_k, len(question.labels) + question.with_none)
    places = range(1, count + 1)
    heads = [f"{name}_{place}" for place in places for name in ("label", "probability")]
    with out.open("w", newline="", encoding="utf-8") as stream:
        writer = csv.writer(stream)
        writer.writerow(["file", *heads, "error"])
        for row in range(len(pool)):
            name, cells, error = pool.name(row), [""] * len(heads), ""
            try:
                answer = classify(models, model, pool.load(row), question)
            except BadImageError as bad:
                error = bad.reason
            else:
                pairs = answer.ranked[:count]
                cells = [text for label, p in pairs for text in (_inert(label), f"{p:.6f}")]
            writer.writerow([_inert(name), *cells, _inert(error)])
            stream.flush()
            yield row + 1


def _inert(text: str) -> str:
    """Spreadsheets run a cell that begins like a formula: a quote before it stops that."""
    return f"'{text}" if text.startswith(_FORMULA) else text
