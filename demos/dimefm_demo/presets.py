"""Label lists to begin with, and example pictures: drawn by `scenes`, so none is shipped."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from dimefm_edge.data.scenes import scene_test_set
from dimefm_edge.errors import MissingExtraError
from dimefm_edge.runtime.text import DEFAULT_TEMPLATES

_EXAMPLE_SIDE = 256
_NUM_EXAMPLES = 5
_CIFAR10 = (
    "airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck",
)  # fmt: skip


@dataclass(frozen=True)
class Preset:
    """Labels with the templates that suit them."""

    labels: tuple[str, ...]
    templates: tuple[str, ...] = DEFAULT_TEMPLATES


def _scenes() -> Preset:
    drawn = scene_test_set()
    return Preset(drawn.classnames, drawn.templates)


def _imagenet() -> Preset:
    try:
        from open_clip.zero_shot_metadata import IMAGENET_CLASSNAMES
    except ImportError as error:
        raise MissingExtraError(
            "ImageNet's 1,000 class names come with open_clip, which is not installed",
            hint="pip install open_clip_torch",
        ) from error
    return Preset(tuple(dict.fromkeys(IMAGENET_CLASSNAMES)))


PRESETS: dict[str, Callable[[], Preset]] = {
    "scenes": _scenes,
    "CIFAR-10": lambda: Preset(_CIFAR10),
    "ImageNet": _imagenet,
}


def save_examples(folder: Path) -> list[Path]:
    """Draw example pictures: of each a kind that no model of ours was trained on."""
    drawn = scene_test_set()
    step = len(drawn.classnames) // _NUM_EXAMPLES + 1
    paths = []
    for number in range(_NUM_EXAMPLES):
        index = number * step
        path = folder / f"{drawn.classnames[drawn.label(index)].replace(' ', '-')}.png"
        size = (_EXAMPLE_SIDE, _EXAMPLE_SIDE)
        drawn.image(index).resize(size, Image.Resampling.BICUBIC).save(path)
        paths.append(path)
    return paths
