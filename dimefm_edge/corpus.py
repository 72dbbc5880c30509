"""Choose the sentences to distil on: those that the teacher finds near to images of the pool.

DIME-FM (arXiv 2303.18232) builds its corpus of visually grounded sentences in this way. A
sentence's score is the mean cosine of its k nearest images in the teacher's space. Memory is
some 40 bytes a sentence; scores are kept as they are found, so a killed run goes on.
"""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import re
import unicodedata
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import numpy.typing as npt

from dimefm_edge.data.nearest import MAX_EXACT_ROWS, NearestRows, store_key
from dimefm_edge.data.sentences import SentencePool
from dimefm_edge.data.store import EmbeddingStore
from dimefm_edge.errors import DataError, StoreError
from dimefm_edge.files import atomic_file
from dimefm_edge.progress import counting

SENTENCES_FILE, ROWS_FILE, REPORT_FILE = "sentences.txt.gz", "kept_rows.npz", "report.json"
DEFAULT_TOP_K = 5
_BLOCK_ROWS = 8192
_NEAR_NEIGHBOURS = 16
_NUM_EXAMPLES = 5
_NUM_BINS = 20
_BETWEEN_WORDS = re.compile(r"[\W_]+")

Rows = npt.NDArray[np.int64]
Mask = npt.NDArray[np.bool_]


@dataclass(frozen=True)
class CorpusReport:
    """What was kept, what went, and why."""

    num_sentences: int
    num_kept: int
    num_duplicates: int
    """Equal to an earlier sentence but for case, spaces and punctuation."""
    num_near_duplicates: int
    """Nearer to an earlier sentence that is kept than was asked."""
    num_ungrounded: int
    """Scored below the threshold."""
    num_prompts: int
    """Sentences made of class names, which are kept whatever they score."""
    threshold: float
    """Least score kept."""
    histogram: dict[str, list[float]] = field(default_factory=dict)
    """`edges` (21) and `counts` (20) of the scores of all sentences."""
    examples: dict[str, list[str]] = field(default_factory=dict)
    """Sentences of each kind; `best` and `worst` by score."""


def build_corpus(
    sentences: SentencePool,
    images: EmbeddingStore,
    texts: EmbeddingStore,
    out_dir: Path,
    *,
    keep: float | None = 0.5,
    threshold: float | None = None,
    top_k: int = DEFAULT_TOP_K,
    near_duplicates: float | None = None,
    prompts: Sequence[str] = (),
    max_exact: int = MAX_EXACT_ROWS,
) -> CorpusReport:
    """Write the corpus: `sentences.txt.gz`, `kept_rows.npz` and `report.json`.

    Duplicates go first, then what is not grounded, then near duplicates.

    Args:
        sentences: The pool that `texts` holds, in its order.
        images: The teacher's embeddings of the images.
        texts: Its embeddings of the sentences.
        out_dir: Folder for the files; scores found earlier are used again.
        keep: Share of the sentences without duplicates that is kept, in (0, 1].
        threshold: Instead of a share: least score, a cosine.
        top_k: Nearest images that a score is the mean of.
        near_duplicates: Cosine from which on a later sentence is a duplicate; None: no such rule.
        prompts: Sentences to put first, whatever they score.
        max_exact: Images up to which the search is exact.

    Raises:
        DataError: If nothing is kept.
        StoreError: If `texts` is not of these sentences.
        MissingExtraError: If faiss is not installed.
    """
    if texts.manifest.source != sentences.fingerprint:
        raise StoreError("the store holds other sentences", hint="another --store")
    out_dir.mkdir(parents=True, exist_ok=True)
    scores = score_sentences(images, texts, out_dir, top_k=top_k, max_exact=max_exact)
    is_first = first_of_duplicates(sentences)
    least = threshold
    if least is None:
        least = float(np.quantile(scores[is_first], 1 - (1.0 if keep is None else keep)))
    is_kept = is_first & (scores >= least)
    grounded = np.flatnonzero(is_kept)
    if near_duplicates is not None and len(grounded):
        is_kept = _without_near(texts, grounded, near_duplicates, out_dir, max_exact)
    if not is_kept.any() and not prompts:
        raise DataError(
            f"no sentence scores {least:.3f}; the best scores {scores.max():.3f}",
            hint=f"--threshold {np.quantile(scores, 0.5):.3f} keeps about half",
        )
    _write_rows(out_dir / ROWS_FILE, np.flatnonzero(is_kept), texts)
    reasons = {
        "duplicates": ~is_first,
        "ungrounded": is_first & (scores < least),
        "near_duplicates": is_first & (scores >= least) & ~is_kept,
    }
    examples = _write_sentences(
        out_dir / SENTENCES_FILE, sentences, is_kept, prompts, _chosen(scores, is_kept, reasons)
    )
    counts, edges = np.histogram(scores, _NUM_BINS)
    report = CorpusReport(
        num_sentences=len(scores),
        num_kept=int(is_kept.sum()),
        num_prompts=len(prompts),
        threshold=least,
        histogram={"edges": edges.round(4).tolist(), "counts": counts.tolist()},
        examples=examples,
        **{f"num_{name}": int(mask.sum()) for name, mask in reasons.items()},
    )
    with atomic_file(out_dir / REPORT_FILE) as stream:
        stream.write((json.dumps(report.__dict__, indent=1) + "\n").encode())
    return report


def load_kept_rows(path: Path, texts: EmbeddingStore) -> Rows:
    """Rows of a store that `build_corpus` kept: int64, ascending.

    Raises:
        StoreError: If the file is missing or damaged, or is of other sentences.
    """
    try:
        with np.load(path, allow_pickle=False) as arrays:
            rows, source = arrays["rows"], str(arrays["source"])
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        raise StoreError(
            f"{path} is no {ROWS_FILE} that `dimefm-edge corpus` writes, or is damaged",
            hint="dimefm-edge corpus --help",
        ) from error
    if source != texts.manifest.source:
        raise StoreError(
            f"the rows of {path} are of other sentences than {texts.store_dir}",
            hint="dimefm-edge corpus with the same --texts and --store",
        )
    is_ascending = rows.ndim == 1 and rows.dtype == np.int64 and bool((np.diff(rows) > 0).all())
    if not is_ascending or not len(rows) or rows[0] < 0 or rows[-1] >= len(texts):
        raise StoreError(f"the rows of {path} are damaged", hint="dimefm-edge corpus again")
    return np.asarray(rows, np.int64)


# ------------------------------------------------------------------------------ the steps


def score_sentences(
    images: EmbeddingStore,
    texts: EmbeddingStore,
    out_dir: Path,
    *,
    top_k: int = DEFAULT_TOP_K,
    max_exact: int = MAX_EXACT_ROWS,
) -> npt.NDArray[np.float32]:
    """Mean cosine of each sentence's nearest images: (N,) float32, in [-1, 1].

    Scores are appended to a file of `out_dir` block by block.
    """
    key = store_key(texts, None, store_key(images, None), top_k, max_exact)
    path = out_dir / f"scores-{key}.f32"
    done = path.stat().st_size // (4 * _BLOCK_ROWS) * _BLOCK_ROWS if path.is_file() else 0
    if path.is_file() and path.stat().st_size == 4 * len(texts):
        return np.fromfile(path, "<f4")
    nearest = NearestRows.open(images, out_dir, max_exact=max_exact)
    with path.open("ab") as stream, counting("score sentences", len(texts)) as advance:
        stream.truncate(4 * done)
        advance(done)
        for start in range(done, len(texts), _BLOCK_ROWS):
            rows = np.arange(start, min(start + _BLOCK_ROWS, len(texts)))
            cosines, _ = nearest.search(texts.gather(rows).astype(np.float32), top_k)
            stream.write(cosines.mean(1).astype("<f4").data)
            stream.flush()
            advance(len(rows))
    return np.fromfile(path, "<f4")


def first_of_duplicates(sentences: Sequence[str] | SentencePool) -> Mask:
    """(N,) bool: no earlier sentence is equal but for case, spaces and punctuation."""
    keys = np.fromiter(map(_key, sentences), np.uint64, len(sentences))
    is_first = np.zeros(len(keys), np.bool_)
    is_first[np.unique(keys, return_index=True)[1]] = True
    return is_first


def _key(sentence: str) -> int:
    plain = _BETWEEN_WORDS.sub(" ", unicodedata.normalize("NFKC", sentence).casefold()).strip()
    # What is all punctuation is told apart by itself.
    digest = hashlib.blake2b((plain or sentence).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little")


def _without_near(
    texts: EmbeddingStore, rows: Rows, cosine: float, folder: Path, max_exact: int
) -> Mask:
    """(N,) bool: `rows`, but for those that are as near as `cosine` to an earlier one kept."""
    is_kept = np.zeros(len(texts), np.bool_)
    is_kept[rows] = True
    nearest = NearestRows.open(texts, folder, rows=rows, max_exact=max_exact)
    with counting("near duplicates", len(rows)) as advance:
        for start in range(0, len(rows), _BLOCK_ROWS):
            block = rows[start : start + _BLOCK_ROWS]
            cosines, found = nearest.search(
                texts.gather(block).astype(np.float32), _NEAR_NEIGHBOURS
            )
            is_near = (cosines >= cosine) & (found < block[:, None])
            for place in np.flatnonzero(is_near.any(1)):  # in order: earlier ones are decided
                is_kept[block[place]] = not is_kept[found[place, is_near[place]]].any()
            advance(len(block))
    return is_kept


def _chosen(
    scores: npt.NDArray[np.float32], is_kept: Mask, reasons: dict[str, Mask]
) -> dict[int, list[str]]:
    """Row -> kinds that it is an example of."""
    picks = {name: np.flatnonzero(mask)[:_NUM_EXAMPLES] for name, mask in reasons.items()}
    order = np.argsort(scores, kind="stable")
    picks |= {"worst": order[:_NUM_EXAMPLES], "best": order[::-1][:_NUM_EXAMPLES]}
    picks["kept"] = np.flatnonzero(is_kept)[:_NUM_EXAMPLES]
    chosen: dict[int, list[str]] = {}
    for name, rows in picks.items():
        for row in rows:
            chosen.setdefault(int(row), []).append(name)
    return chosen


def _write_sentences(
    path: Path,
    sentences: SentencePool,
    is_kept: Mask,
    prompts: Sequence[str],
    chosen: dict[int, list[str]],
) -> dict[str, list[str]]:
    """Stream the pool once more; returns the examples by kind."""
    examples: dict[str, list[str]] = {}
    with (
        atomic_file(path) as raw,
        gzip.GzipFile(fileobj=raw, mode="wb", mtime=0, compresslevel=6) as packed,
        io.TextIOWrapper(packed, encoding="utf-8") as stream,
    ):
        for prompt in prompts:
            stream.write(prompt + "\n")
        for row, sentence in enumerate(sentences):
            line = " ".join(sentence.split())
            if is_kept[row]:
                stream.write(line + "\n")
            for name in chosen.get(row, ()):
                examples.setdefault(name, []).append(line)
    return examples


def _write_rows(path: Path, rows: Rows, texts: EmbeddingStore) -> None:
    with atomic_file(path) as stream:
        np.savez(stream, allow_pickle=False, rows=rows, source=np.array(texts.manifest.source))
