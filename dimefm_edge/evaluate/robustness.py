"""Robustness: ImageNet-C's corruptions at five severities, and natural shift between test sets.

The corruptions are those of Hendrycks and Dietterich (arXiv 1903.12261) as the package
`imagecorruptions-imaug` has them: pure numpy, scipy and OpenCV, images of any size from 32 pixels.
As in ImageNet-C an image is resized and cropped first (to 224 pixels, or its own short side if
less) and corrupted then, so that all models see the same corrupted images, whatever size they take.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from dimefm_edge.data.decode import WrappedPool
from dimefm_edge.data.images import ImagePool, LabelledSet
from dimefm_edge.errors import DataError, MissingExtraError
from dimefm_edge.evaluate.features import EncodePixels, embed_pool
from dimefm_edge.evaluate.metrics import label_ranks
from dimefm_edge.evaluate.zero_shot import check_classes, cosine_scores
from dimefm_edge.labels import LabelBank
from dimefm_edge.preprocess import PreprocessSpec, resize_image

CORRUPTIONS = (
    "gaussian_noise", "shot_noise", "impulse_noise", "defocus_blur", "glass_blur", "motion_blur",
    "zoom_blur", "snow", "frost", "fog", "brightness", "contrast", "elastic_transform", "pixelate",
    "jpeg_compression",
)  # fmt: skip
SEVERITIES = (1, 2, 3, 4, 5)
MAX_SIDE = 224
_MIN_SIDE = 32
_SEEDED = ("impulse_noise", "glass_blur")  # draw from generators of their own
# The library draws from numpy's global generator, which all threads share.
_GENERATOR = threading.Lock()

Pixels = npt.NDArray[np.uint8]


@dataclass(frozen=True)
class CorruptionReport:
    """Zero-shot top-1 under corruption, in percent."""

    name: str
    clean_top1_pct: float
    """Of the same images, cropped as they are before they are corrupted."""
    top1_pct: dict[str, tuple[float, ...]]
    """By corruption, at severities 1 to 5."""
    num_images: int

    @property
    def mean_top1_pct(self) -> float:
        """Over corruptions and severities."""
        return float(np.mean([list(values) for values in self.top1_pct.values()]))

    @property
    def kept_pct(self) -> float:
        """Mean corruption top-1 as a share of the clean one."""
        return 100 * self.mean_top1_pct / self.clean_top1_pct if self.clean_top1_pct else 0.0

    def mean_corruption_error_pct(self, reference: CorruptionReport) -> float:
        """mCE: errors over the five severities as a share of the reference's, averaged over
        corruptions; the reference takes AlexNet's place. NaN where it makes no error."""
        ratios = []
        for corruption, values in self.top1_pct.items():
            theirs = 100 - np.asarray(reference.top1_pct[corruption])
            ratios.append((100 - np.asarray(values)).sum() / theirs.sum() if theirs.sum() else
                          np.nan)  # fmt: skip
        return float(100 * np.mean(ratios))


@dataclass(frozen=True)
class ShiftReport:
    """What a model loses between two test sets, on the classes that both have; in percent."""

    reference: str
    name: str
    num_classes: int
    """Shared by name."""
    reference_top1_pct: float
    top1_pct: float

    @property
    def drop_points(self) -> float:
        """Percentage points."""
        return self.reference_top1_pct - self.top1_pct

    @property
    def relative_drop_pct(self) -> float:
        """The drop as a share of the accuracy on the reference set."""
        if not self.reference_top1_pct:
            return 0.0
        return 100 * self.drop_points / self.reference_top1_pct


class CorruptedPool(WrappedPool):
    """The images of a pool, resized, cropped and corrupted: the same ones every time."""

    def __init__(
        self, pool: ImagePool, corruption: str | None, severity: int = 1, *, seed: int = 0
    ) -> None:
        """
        Args:
            pool: The images.
            corruption: Of `CORRUPTIONS`; None only resizes and crops.
            severity: 1 to 5.
            seed: Of the noise.
        """
        super().__init__(pool)
        self._corruption, self._severity, self._seed = corruption, severity, seed

    def name(self, row: int) -> str:
        return f"{super().name(row)} ({self._corruption} {self._severity})"

    def load(self, row: int) -> Image.Image:
        pixels = _square(self.pool.load(row))
        if self._corruption is not None:
            number = CORRUPTIONS.index(self._corruption)
            # One draw an image: severities of one corruption share it, as far as they draw alike.
            seed = int(np.random.SeedSequence([self._seed, number, row]).generate_state(1)[0])
            pixels = corrupt(pixels, self._corruption, self._severity, seed=seed)
        return Image.fromarray(pixels)


class _Squares(WrappedPool):
    """The images of a pool, resized, cropped and kept: as much as is asked for."""

    def __init__(self, pool: ImagePool) -> None:
        super().__init__(pool)
        self._kept: dict[int, Image.Image] = {}

    def load(self, row: int) -> Image.Image:
        if row not in self._kept:
            self._kept[row] = Image.fromarray(_square(self.pool.load(row)))
        return self._kept[row]


def _square(image: Image.Image) -> Pixels:
    """(S, S, 3): the short side brought to at most 224 pixels and at least 32, the middle kept."""
    side = max(_MIN_SIDE, min(MAX_SIDE, *image.size))
    return resize_image(image, PreprocessSpec(image_size=side))


def corrupt(pixels: Pixels, corruption: str, severity: int, *, seed: int) -> Pixels:
    """Corrupt one image.

    Args:
        pixels: (H, W, 3) uint8, RGB, 32 pixels or more a side.
        corruption: Of `CORRUPTIONS`.
        severity: 1 to 5.
        seed: 0 to 2**32 - 1.

    Raises:
        MissingExtraError: If imagecorruptions-imaug is not installed.
    """
    library = import_imagecorruptions()
    options = {"seed": seed} if corruption in _SEEDED else {}
    with _GENERATOR:
        state = np.random.get_state()
        np.random.seed(seed)
        try:
            found: Pixels = library.corrupt(
                pixels, severity=severity, corruption_name=corruption, **options
            )
        finally:
            np.random.set_state(state)
    return found


def evaluate_corruptions(
    encode_pixels: EncodePixels,
    preprocess: PreprocessSpec,
    labelled: LabelledSet,
    bank: LabelBank,
    *,
    num_images: int = 0,
    seed: int = 0,
    batch_size: int = 250,
    workers: int = 0,
    advance: Callable[[int], None] | None = None,
) -> CorruptionReport:
    """Zero-shot top-1 under every corruption at every severity.

    Args:
        encode_pixels: (B, S, S, 3) uint8 -> (B, E), L2-normalised.
        preprocess: The model's own.
        labelled: The clean test set.
        bank: Text embeddings of its class names.
        num_images: Take so many, drawn with the seed; 0 takes all.
        seed: Of the choice and the noise.
        batch_size: Images per call.
        workers: Decoding threads; 0 chooses.
        advance: Told how many images each batch had.

    Raises:
        DataError: If the bank's classes are not the set's, or no image can be read.
        MissingExtraError: If imagecorruptions-imaug is not installed.
    """
    check_classes(bank, labelled.name, labelled.classnames)
    import_imagecorruptions()

    def right(pool: ImagePool, rows: npt.NDArray[np.int64]) -> tuple[npt.NDArray[np.int64], int]:
        """Rows that could be read, and how many of them are told right."""
        features = embed_pool(
            encode_pixels, preprocess, pool, name=labelled.name, rows=rows,
            batch_size=batch_size, workers=workers, advance=advance,
        )  # fmt: skip
        ranks = label_ranks(cosine_scores(features, bank), labelled.labels[features.rows])
        return features.rows, int((ranks < 1).sum())

    rows = chosen_rows(len(labelled.pool), num_images, seed)
    rows, clean = right(CorruptedPool(labelled.pool, None), rows)
    hits = np.zeros((len(CORRUPTIONS), len(SEVERITIES)), np.int64)
    for start in range(0, len(rows), batch_size):
        squares = _Squares(labelled.pool)  # a batch is decoded once for all of its corruptions
        for i, corruption in enumerate(CORRUPTIONS):
            for j, severity in enumerate(SEVERITIES):
                pool = CorruptedPool(squares, corruption, severity, seed=seed)
                hits[i, j] += right(pool, rows[start : start + batch_size])[1]
    return CorruptionReport(
        name=labelled.name,
        clean_top1_pct=100 * clean / len(rows),
        top1_pct={
            corruption: tuple(float(100 * count / len(rows)) for count in hits[i])
            for i, corruption in enumerate(CORRUPTIONS)
        },
        num_images=len(rows),
    )


def num_passes() -> int:
    """How often `evaluate_corruptions` embeds each image."""
    return 1 + len(CORRUPTIONS) * len(SEVERITIES)


def chosen_rows(total: int, count: int, seed: int) -> npt.NDArray[np.int64]:
    """So many rows of a pool, in order, drawn with a seed; all for 0."""
    if count <= 0 or count >= total:
        return np.arange(total, dtype=np.int64)
    drawn = np.random.default_rng(seed).choice(total, count, replace=False)
    return np.sort(drawn).astype(np.int64)


@dataclass(frozen=True, eq=False)
class ScoredSet:
    """A test set that is scored: what natural shift is measured between."""

    name: str
    classnames: tuple[str, ...]
    scores: npt.NDArray[np.floating[Any]]
    """(N, C) cosines."""
    labels: npt.NDArray[np.int64]
    """(N,) classes."""


def measure_shift(reference: ScoredSet, shifted: ScoredSet) -> ShiftReport:
    """Top-1 on the images and among the classes that two sets share by name.

    As ImageNet-A, -R and ObjectNet are compared with ImageNet: on their classes only.

    Raises:
        DataError: If they share less than two classes, or no image of one is of a shared class.
    """
    shared = [n for n in dict.fromkeys(reference.classnames) if n in set(shifted.classnames)]
    if len(shared) < 2:
        raise DataError(
            f"'{shifted.name}' shares {len(shared)} class names with '{reference.name}': a shift "
            "needs two or more"
        )
    return ShiftReport(
        reference.name,
        shifted.name,
        len(shared),
        _top1_among(reference, shared),
        _top1_among(shifted, shared),
    )


def effective_robustness(
    reference_pct: Sequence[float], shifted_pct: Sequence[float]
) -> list[float]:
    """Accuracy on a shifted set beyond what accuracy on the reference set foretells.

    A line in logits, fitted to all models given (Taori et al., arXiv 2007.00644, equation 1).

    Args:
        reference_pct: Top-1 of each model on the reference set, in percent.
        shifted_pct: On the shifted set.

    Returns:
        Percentage points above the line, for each model.

    Raises:
        DataError: If fewer than three models are given, or all are equal on the reference set.
    """
    if len(reference_pct) < 3 or np.ptp(reference_pct) == 0:
        raise DataError("effective robustness needs three models or more that differ")
    x, y = (_logit(np.asarray(values, np.float64)) for values in (reference_pct, shifted_pct))
    slope, offset = np.polyfit(x, y, 1)
    foretold = 100 / (1 + np.exp(-(slope * x + offset)))
    return [float(v) for v in np.asarray(shifted_pct) - foretold]


def _logit(percent: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    share = np.clip(percent / 100, 1e-4, 1 - 1e-4)
    return np.asarray(np.log(share / (1 - share)))


def _top1_among(scored: ScoredSet, shared: Sequence[str]) -> float:
    kept = set(shared)
    columns = [i for i, name in enumerate(scored.classnames) if name in kept]
    is_kept = np.isin(scored.labels, columns)
    if not is_kept.any():
        raise DataError(f"no image of '{scored.name}' is of a class that the other set has")
    scores, names = scored.scores[is_kept][:, columns], np.asarray(scored.classnames)
    found = names[columns][scores.argmax(1)]
    is_right = (found == names[scored.labels[is_kept]]) & np.isfinite(scores).all(1)
    return float(100 * is_right.mean())


def import_imagecorruptions() -> Any:
    """The library of corruptions.

    Raises:
        MissingExtraError: If it is not installed.
    """
    try:
        import imagecorruptions
    except ImportError as error:
        raise MissingExtraError(
            f"corruptions need imagecorruptions-imaug, which cannot be imported: {error}",
            hint="pip install 'dimefm_edge[eval]'",
        ) from error
    return imagecorruptions
