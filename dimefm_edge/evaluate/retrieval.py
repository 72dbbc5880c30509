"""Image-text retrieval: recall at 1, 5 and 10, both ways, with several captions an image.

CLIP-benchmark's definition: an image counts if one of its captions is among the first k of all
captions, a caption if its image is among the first k of all images. Beyond it, identical captions
are one: a sentence that is also another image's own finds that image rightly too.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from dimefm_edge.errors import DataError

RECALL_AT = (1, 5, 10)
_ROWS_PER_PRODUCT = 1024

Embeds = npt.NDArray[np.float32]
Indices = npt.NDArray[np.int64]


@dataclass(frozen=True)
class RetrievalReport:
    """Recall on one captioned set, in percent."""

    name: str
    image_to_text_pct: dict[int, float]
    """By k."""
    text_to_image_pct: dict[int, float]
    num_images: int
    num_captions: int
    num_sentences: int
    """Captions that differ: what is searched."""
    num_bad: int

    @property
    def mean_recall_pct(self) -> float:
        """Of the six figures."""
        values = [*self.image_to_text_pct.values(), *self.text_to_image_pct.values()]
        return sum(values) / len(values)


def unique_sentences(captions: Sequence[Sequence[str]]) -> tuple[list[str], list[Indices]]:
    """The sentences that differ, in order, and for each image those that are its own.

    Letter case and blanks at the ends make no difference: no tokenizer of CLIP sees them.
    """
    places: dict[str, int] = {}
    sentences: list[str] = []
    own = []
    for texts in captions:
        for text in texts:
            key = text.strip().casefold()
            if key not in places:
                places[key] = len(sentences)
                sentences.append(text.strip())
        own.append(np.asarray([places[t.strip().casefold()] for t in texts], np.int64))
    return sentences, own


def measure_retrieval(
    name: str,
    image_embeds: Embeds,
    text_embeds: Embeds,
    own: Sequence[Indices],
    *,
    num_bad: int = 0,
) -> RetrievalReport:
    """Recall of images and captions that are embedded.

    Items that score the same keep their order. Every caption is a query, repeated ones as often
    as they occur.

    Args:
        name: Of the set.
        image_embeds: (N, E), L2-normalised.
        text_embeds: (T, E), of sentences that differ (`unique_sentences`).
        own: For each image, which of the T sentences are its captions; one or more.
        num_bad: Images that could not be read; they and their captions are left out.

    Raises:
        DataError: If there is no image, or one has no caption.
    """
    if len(own) != len(image_embeds):
        raise ValueError(f"{len(image_embeds)} images, captions of {len(own)}")
    if not len(own) or any(not len(texts) for texts in own):
        raise DataError(f"'{name}' needs images that have a caption each")
    queries = np.concatenate(own)
    counts = np.bincount(queries, minlength=len(text_embeds))
    is_used = counts > 0  # sentences of images that cannot be read are not searched
    number = np.cumsum(is_used) - 1
    own = [np.unique(number[texts]) for texts in own]
    images_of: list[list[int]] = [[] for _ in range(int(is_used.sum()))]
    for image, texts in enumerate(own):
        for text in texts:
            images_of[text].append(image)
    used = text_embeds[is_used]
    image_ranks = _best_ranks(image_embeds, used, own)
    text_ranks = _best_ranks(used, image_embeds, [np.asarray(i, np.int64) for i in images_of])
    weights = counts[is_used]
    return RetrievalReport(
        name=name,
        image_to_text_pct={k: float(100 * (image_ranks < k).mean()) for k in RECALL_AT},
        text_to_image_pct={
            k: float(100 * np.average(text_ranks < k, weights=weights)) for k in RECALL_AT
        },
        num_images=len(own),
        num_captions=len(queries),
        num_sentences=len(used),
        num_bad=num_bad,
    )


def _best_ranks(queries: Embeds, items: Embeds, right: Sequence[Indices]) -> Indices:
    """(Q,) how many items come before the first right one."""
    ranks = np.empty(len(queries), np.int64)
    order = np.arange(len(items))
    for start in range(0, len(queries), _ROWS_PER_PRODUCT):
        scores = queries[start : start + _ROWS_PER_PRODUCT] @ items.T
        for row, values in enumerate(scores, start):
            own = right[row]
            if not np.isfinite(values).all():
                ranks[row] = np.iinfo(np.int64).max
                continue
            best = own[np.argmax(values[own])]
            is_before = (values > values[best]) | ((values == values[best]) & (order < best))
            ranks[row] = int(is_before.sum())
    return ranks
