"""What `classify` names, by which labels, and how it is run. No torch here."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from tyro.conf import Positional

from dimefm_edge.errors import InputError


@dataclass(frozen=True)
class ClassifyConfig:
    """A bundle, images, and what to tell apart."""

    bundle: Positional[str] = ""
    """A bundle's folder or .zip, or a run that has one."""
    images: Positional[tuple[str, ...]] = ()
    """Image files, folders (images at any depth) and globs."""
    labels: tuple[str, ...] = ()
    """A label set of the bundle by its name; or, where the bundle has a text side, names of your
    own: two or more, or a classnames.txt with one a line. Default: the first label set."""
    top: int = 5
    """Names for each image, the likeliest first."""
    out: Path | None = None
    """Write them to this CSV file, too: file, rank, label, probability."""
    engine: str = "onnxruntime"
    """What runs the bundle: onnxruntime, tensorrt, or an .engine file."""
    threads: int = 0
    """CPU threads of one call; 0 takes one per physical core."""

    def __post_init__(self) -> None:
        if self.top < 1:
            raise InputError(f"--top must be 1 at least, got {self.top}")
        if self.threads < 0:
            raise InputError(f"--threads must not be negative, got {self.threads}")
