"""What `eval` measures, of which models, on what. No torch here."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from tyro.conf import Positional

from dimefm_edge.errors import InputError


@dataclass(frozen=True)
class EvalConfig:
    """Models, test sets and measures."""

    subjects: Positional[tuple[str, ...]] = ()
    """Runs, bundles (folder or .zip), model.onnx files of ours, teachers; of several, the first is
    what the others are compared to."""
    data: tuple[str, ...] = ()
    """Labelled sets: class folders, CLIP-benchmark folders, `scenes`, `scenes-relations`.
    Default: those of the run."""
    suite: str | None = None
    """elevater, imagenet, imagenet-shifts, or a .toml file of that form; sets that are not in
    --data-root are named and left out."""
    data_root: Path = Path("data")
    """Folder that holds the suite's sets."""
    linear_probe: str | None = None
    """Labelled set to fit a linear probe on, for the test sets of the same classes; `own`: each
    test set's own training split."""
    retrieval: tuple[str, ...] = ()
    """Captioned sets: CLIP-benchmark folders, folders with captions.csv, .jsonl or .json,
    `scenes[:COUNT]`."""
    ece: bool = False
    """Expected calibration error of zero-shot, at the teacher's logit scale."""
    corruptions: bool = False
    """ImageNet-C's 15 corruptions at five severities: embeds each image 76 times."""
    corruption_images: int = 0
    """Images of each set that are corrupted; 0: all."""
    shift: bool = False
    """Natural shift from the first test set to each other, on the classes that both have."""
    latency: Literal["auto", "measured", "reported", "estimated", "none"] = "auto"
    """Of one image: measured here in turn; as the runs' reports have it, or estimate it for their
    target. auto: for --plot, reported where all models are of the same machine, else measured."""
    plot: bool = False
    """Draw accuracy against latency and parameters, as PNG and SVG in --out."""
    out: Path | None = None
    """Folder for scores.json, scores.csv and the plots. Default: none, or `scores` for --plot."""
    teacher: str | None = None
    """Whose text side embeds class names that a bundle does not carry."""
    engine: str = "onnxruntime"
    """What runs a bundle: onnxruntime, tensorrt, or an .engine file."""
    batch_size: int = 250
    """Images per call."""
    workers: int = 0
    """Decoding workers; 0 chooses."""
    seed: int = 0
    """Of the probe's validation split and of corruptions."""

    def __post_init__(self) -> None:
        if self.batch_size <= 0:
            raise InputError(f"--batch-size must be positive, got {self.batch_size}")
        for name in ("workers", "corruption_images", "seed"):
            value = getattr(self, name)
            if value < 0:
                raise InputError(f"--{name.replace('_', '-')} must not be negative, got {value}")
