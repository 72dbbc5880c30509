"""Every setting of a run, and its TOML form.

`RunConfig` is what the user asked for; each section goes to the step that reads it, never
the whole. Command-line flags, their help and `config.toml` all come from these dataclasses.
No torch here: `dimefm-edge --help` reads this file.
"""

from __future__ import annotations

import dataclasses
import math
import sys
import types
import typing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeVar

from dimefm_edge.errors import ConfigError, nearest_names

if sys.version_info >= (3, 11):
    import tomllib
else:  # JetPack 6 has Python 3.10
    import tomli as tomllib

C = TypeVar("C")

DEFAULT_EPOCHS, DEFAULT_MIN_CROP = 20.0, 0.5
RUN_FILE = "config.toml"
"""A run's resolved settings, in its folder."""


@dataclass(frozen=True)
class DataConfig:
    """What is distilled on and what is tested on."""

    images: tuple[str, ...] = ("scenes",)
    """Unlabelled images: folders, .tar shards, Parquet files, globs and brace patterns, or
    `scenes[:COUNT]`."""
    texts: tuple[str, ...] = ("scenes",)
    """Sentences: .txt, .jsonl, .csv or .parquet files, each also .gz, globs, `prompts:TEST_SET`
    (its class names in its templates), or `scenes[:COUNT]`."""
    labelled: str | None = None
    """Labelled images for `contrastive_weight`, in the layouts of test sets: the student is
    trained on these instead of `images`."""
    eval_sets: tuple[str, ...] = ()
    """Labelled test sets: class folders or CLIP-benchmark folders, `scenes`,
    `scenes-relations`. Default: `scenes` when the images are scenes, else none."""
    image_column: str = "image"
    """Column of images in Parquet files and Hugging Face data sets."""
    text_column: str = "text"
    """Column or key of sentences in .jsonl, .csv and .parquet files."""
    text_rows: str | None = None
    """kept_rows.npz that `dimefm-edge corpus` made of these sentences: only those are used."""
    max_bad: float = 0.1
    """Stop when more images, or more sentences, than this cannot be used: a share of them below
    1, else a count."""
    workers: int = 0
    """Decoding processes; 0 chooses."""

    def __post_init__(self) -> None:
        if not self.images:
            raise ConfigError("images: name at least one source of images")
        if not self.texts:
            raise ConfigError("texts: name at least one source of sentences")
        _require_not_negative(self, "max_bad", "workers")


@dataclass(frozen=True)
class StudentConfig:
    """Which student is trained; what is not given is fitted to the budget."""

    student: str = "auto"
    """`auto` fits one to the budget; or a family (vit, hybrid, convnet, resnet), a named student,
    or `timm:NAME`."""
    latency_ms: float | None = None
    """Budget for one image on the target, in ms. Default: the smaller of the target's own
    and half of the teacher's estimated latency there; all of it where no student takes half."""
    max_memory_mib: float | None = None
    """Limit of its weights and its largest operator's tensors on the target, in MiB."""
    image_size: int | None = None
    """Input side in pixels. Default: the teacher's, or a smaller one that `auto` chooses."""
    init: Literal["auto", "random", "teacher", "pretrained"] = "auto"
    """Initial weights: auto inherits from the teacher where the shapes allow it; pretrained
    asks timm for its own."""
    init_from: str | None = None
    """A run (or a cut of `fit --elastic`) whose student is trained on; instead of `student`,
    `image_size` and `init`."""
    elastic: bool = False
    """Train smaller students within the student, for `fit --elastic` to take out; a step takes
    three times the images and 1.4 to 2 times the arithmetic."""

    def __post_init__(self) -> None:
        _require_positive(self, "latency_ms", "max_memory_mib", "image_size")
        own = {n: f"--{n} auto" for n in ("student", "init") if getattr(self, n) != "auto"}
        own |= {"image_size": "drop image_size"} if self.image_size is not None else {}
        if self.init_from is not None and own:
            name, mend = next(iter(own.items()))
            raise ConfigError(f"init_from brings its own {name}", hint=mend)


@dataclass(frozen=True)
class TextStudentConfig:
    """The text encoder that is distilled beside the image student, for labels on the device."""

    text_student: str = "none"
    """`none`: the text side stays the teacher's. `auto` sizes one after the teacher's text tower;
    or `text-wWIDTH-dDEPTH`, with `-eTOKEN_DIM` for a token embedding of two factors."""
    text_init: Literal["auto", "random"] = "auto"
    """Initial weights: auto inherits from the teacher's text tower where the shapes allow it."""
    text_steps: int | None = None
    """Steps of `text_batch_size` sentences. Default: as many as the image student's."""
    text_images: int = 512
    """Images per step that sentences are compared with."""
    text_lr: float = 1e-3
    """Peak learning rate (AdamW)."""
    text_vl_weight: float = 0.7
    """Vision-language score term, text to image: student text against teacher image."""
    text_pvl_weight: float = 0.3
    """Pseudo vision-language term: student text against teacher text."""
    text_feature_weight: float = 3.0
    """Regression of the teacher's text embedding."""

    def __post_init__(self) -> None:
        _require_positive(self, "text_steps", "text_images", "text_lr")
        weights = ("text_vl_weight", "text_pvl_weight", "text_feature_weight")
        _require_not_negative(self, *weights)
        if not any(getattr(self, name) for name in weights):
            raise ConfigError("one of the text weights must be positive")


@dataclass(frozen=True)
class LossConfig:
    """Weights and temperatures of the distillation terms (DIME-FM, arXiv 2303.18232)."""

    vl_weight: float = 0.7
    """Vision-language score term: student image against teacher text."""
    pvl_weight: float = 0.3
    """Pseudo vision-language term: student image against teacher image."""
    udist_weight: float = 0.0
    """Uni-modal distance term: student image against student image."""
    feature_weight: float = 0.0
    """Regression of the teacher's image embedding, the loss of other tools."""
    contrastive_weight: float = 0.0
    """CLIP's loss on (image, sentence of its class) pairs of `labelled`; no distillation."""
    contrastive_positives: Literal["pair", "label"] = "pair"
    """Sentences that an image is matched with: its own only, or those of all images of the
    batch that have its label (UniCL, arXiv 2204.03610)."""
    vl_temperature: float = 1.0
    pvl_temperature: float = 3.0
    udist_temperature: float = 7.0

    def __post_init__(self) -> None:
        names = [f.name for f in dataclasses.fields(self)]
        weights = [name for name in names if name.endswith("_weight")]
        _require_not_negative(self, *weights)
        if not any(getattr(self, name) for name in weights):
            raise ConfigError("one of the loss weights must be positive")
        _require_positive(self, *(name for name in names if name.endswith("_temperature")))


@dataclass(frozen=True)
class TrainConfig:
    """How the student is trained."""

    epochs: float | None = None
    """Passes over the images; `steps` overrides it. Default: 20, or 5 for scenes."""
    steps: int | None = None
    """Optimiser steps in all."""
    batch_size: int = 128
    """Images per step, over all ranks."""
    text_batch_size: int = 512
    """Sentences per step, over all ranks."""
    hard_negatives: float = 0.0
    """Share of a step's sentences that are near neighbours of its images, in [0, 1]."""
    views: int = 0
    """Augmentations of each image that the teacher embeds once and the student then sees; 0: the
    teacher sees whole images, the student new crops in every epoch."""
    accumulate: int = 1
    """Micro-batches per step; each has batch_size / accumulate images and its own loss."""
    lr: float = 1e-3
    """Peak learning rate (AdamW)."""
    min_lr_ratio: float = 0.05
    """Final over peak learning rate (the paper: 4e-5 / 8e-4)."""
    warmup_ratio: float = 0.04
    """Share of the steps with a rising rate (the paper: 4 of 100 epochs)."""
    weight_decay: float = 0.05
    """Not on biases, norms and embeddings."""
    clip_norm: float = 1.0
    """Gradient norm is clipped to this; 0 does not clip."""
    ema_decay: float = 0.998
    """Exponential moving average of the weights, which is what is exported; 0 turns it off."""
    min_crop: float | None = None
    """Smallest area of the random crop, as a share of the image. Default: 0.5, or 0.9 for
    scenes, whose few objects a crop cuts away."""
    flip: bool | None = None
    """Mirror half of the images. Default: on, but off for scenes, where left and right
    matter."""
    amp: Literal["auto", "off", "bf16", "fp16"] = "auto"
    """Mixed precision; auto is bf16 where the hardware has it, else fp16 on a GPU and off on
    a CPU."""
    fused_attention: Literal["auto", "on", "off"] = "auto"
    """Train attention through dimefm_kernels; auto is off: torch's own trains faster."""
    seed: int = 0
    """Of initial weights and of every step's random numbers, in [0, 2**63)."""
    eval_every: int = 0
    """Steps between zero-shot evaluations; 0 makes about three."""
    save_every: int = 0
    """Steps between checkpoints; 0 makes about ten."""
    threads: int = 0
    """CPU threads of torch; 0 leaves the default."""

    def __post_init__(self) -> None:
        _require_positive(
            self, "epochs", "steps", "batch_size", "text_batch_size", "accumulate", "lr"
        )
        if self.batch_size % self.accumulate:
            raise ConfigError(
                f"accumulate ({self.accumulate}) must divide batch_size ({self.batch_size})"
            )
        _require_not_negative(
            self, "views", "weight_decay", "clip_norm", "eval_every", "save_every",
            "threads",
        )  # fmt: skip
        for name in ("hard_negatives", "min_lr_ratio", "warmup_ratio"):
            if not 0 <= getattr(self, name) <= 1:
                raise ConfigError(f"{name} must be in [0, 1], got {getattr(self, name)}")
        if self.min_crop is not None and not 0 < self.min_crop <= 1:
            raise ConfigError(f"min_crop must be in (0, 1], got {self.min_crop}")
        if not 0 <= self.ema_decay < 1:
            raise ConfigError(f"ema_decay must be in [0, 1), got {self.ema_decay}")
        if not 0 <= self.seed < 2**63:
            raise ConfigError(f"seed must be in [0, 2**63), got {self.seed}")


@dataclass(frozen=True)
class QuantConfig:
    """The student in 8-bit integers, by the rules of the target's runtime."""

    qat: Literal["off", "int8"] = "off"
    """Train on with the rounding of integers after the float stage; the bundle is then int8."""
    ptq: Literal["off", "int8"] = "off"
    """Quantise the trained student by calibration alone: quick; the bundle is then int8."""
    qat_steps_ratio: float = 0.3
    """Steps of the int8 stage, as a share of the float stage's."""
    qat_lr_ratio: float = 0.1
    """Peak learning rate of the int8 stage, as a share of the float stage's."""
    calibration: Literal["auto", "minmax", "percentile", "mse"] = "auto"
    """How far the integers reach without training; auto is what the runtime's rules say."""
    max_drop: float | None = None
    """Leave the worst layers in float, until PTQ loses no more points of zero-shot top-1."""

    def __post_init__(self) -> None:
        _require_positive(self, "qat_steps_ratio", "qat_lr_ratio")
        _require_not_negative(self, "max_drop")
        for name, unset in (("max_drop", None), ("calibration", "auto")):
            if getattr(self, name) != unset and not self.is_int8:
                raise ConfigError(f"{name} needs int8", hint="--qat int8, or --ptq int8")

    @property
    def is_int8(self) -> bool:
        return "int8" in (self.qat, self.ptq)


@dataclass(frozen=True)
class RunConfig:
    """One run of `dimefm-edge distill`."""

    target: str = "jetson-orin"
    """The device the student is for; `dimefm-edge targets` lists them."""
    teacher: str = "sample"
    """`sample`, an open_clip model (`ViT-B-32:TAG` or `ViT-B-32:FILE`), `hf-hub:ORG/NAME`, or
    a folder: an open_clip checkpoint folder or a run of ours; or several, joined by `+`."""
    out: str = "runs/distill"
    """Folder of the run."""
    store: str | None = None
    """Folder of the teacher's embeddings, shared between runs. Default: `OUT/store`."""
    precision: Literal["fp32", "fp16"] = "fp32"
    """Precision of the exported graph."""
    data: DataConfig = field(default_factory=DataConfig)
    student: StudentConfig = field(default_factory=StudentConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    quant: QuantConfig = field(default_factory=QuantConfig)
    text: TextStudentConfig = field(default_factory=TextStudentConfig)

    def __post_init__(self) -> None:
        if self.loss.contrastive_weight and not self.data.labelled:
            raise ConfigError(
                "contrastive_weight needs labelled images", hint="--labelled FOLDER_OF_CLASSES"
            )
        if self.quant.is_int8 and self.precision != "fp32":
            raise ConfigError(
                f"the graph cannot be both int8 and {self.precision}", hint="drop --precision"
            )


def _require_positive(config: object, *names: str) -> None:
    for name in names:
        value = getattr(config, name)
        if value is not None and not 0 < value < math.inf:  # NaN is neither
            raise ConfigError(f"{name} must be positive, got {value}")


def _require_not_negative(config: object, *names: str) -> None:
    for name in names:
        value = getattr(config, name)
        if value is not None and not 0 <= value < math.inf:
            raise ConfigError(f"{name} must not be negative, got {value}")


def load(path: Path, kind: type[C]) -> C:
    """Read a dataclass from a TOML file.

    Raises:
        ConfigError: If the file is missing, not TOML, or has a key or value that `kind` lacks.
    """
    try:
        values = tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ConfigError(f"no config file at {path}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not TOML: {error}") from error
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}") from error
    return from_dict(values, kind, where=str(path))


def load_saved(run_dir: Path) -> RunConfig | None:
    """The settings that a run keeps in its folder; None where there are none.

    Raises:
        ConfigError: As `load`.
    """
    path = run_dir / RUN_FILE
    return load(path, RunConfig) if path.is_file() else None


def save(config: Any, path: Path) -> None:
    """Write a dataclass as TOML; `load` gives back an equal one. None is left out."""
    import tomli_w

    path.write_text(tomli_w.dumps(_without_none(dataclasses.asdict(config))), encoding="utf-8")


_GONE = (("pseudo_texts", 0),)
"""Settings that older runs keep and that are no more, with the value that did nothing."""


def from_dict(values: dict[str, Any], kind: type[C], *, where: str = "config") -> C:
    """Build a dataclass from nested dictionaries; unknown keys and wrong types are errors."""
    hints = typing.get_type_hints(kind)
    names = [f.name for f in dataclasses.fields(kind)]  # type: ignore[arg-type]
    built: dict[str, Any] = {}
    for key, value in values.items():
        if (key, value) in _GONE:
            continue
        if key not in names:
            near = nearest_names(key, names)
            guess = f" Did you mean '{near[0]}'?" if near else ""
            raise ConfigError(f"{where}: unknown key '{key}'.{guess} Known: {', '.join(names)}.")
        built[key] = _convert(value, hints[key], f"{where}: {key}")
    return kind(**built)


def _without_none(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _without_none(v) for k, v in value.items() if v is not None}
    return list(value) if isinstance(value, tuple) else value


def _convert(value: Any, hint: Any, where: str) -> Any:
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if dataclasses.is_dataclass(hint) and isinstance(hint, type):
        if isinstance(value, dict):
            return from_dict(value, hint, where=where)
    elif origin is Literal:
        if value in args:
            return value
        raise ConfigError(f"{where} must be one of {', '.join(map(str, args))}, got {value!r}")
    elif origin in (types.UnionType, typing.Union):
        inner = next(a for a in args if a is not type(None))
        return None if value is None else _convert(value, inner, where)
    elif origin is tuple:
        if isinstance(value, list):
            return tuple(_convert(v, args[0], where) for v in value)
    elif hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    elif isinstance(value, hint) and not (hint is int and isinstance(value, bool)):
        return value
    name = "a list" if origin is tuple else getattr(hint, "__name__", str(hint))
    raise ConfigError(f"{where} must be {name}, got {value!r}")
