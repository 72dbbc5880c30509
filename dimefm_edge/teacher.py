"""Teachers: any open_clip model, a run of ours, or the sample that ships in the package.

A teacher brings its own preprocessing, tokenizer and logit scale. It is frozen and only ever
answers in L2-normalised embeddings.
"""

from __future__ import annotations

import functools
import hashlib
import json
import logging
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dimefm_edge.data.sources import missing_path
from dimefm_edge.encoders import JoinedTowers, TextTower, module_encoder
from dimefm_edge.errors import (
    CheckpointError,
    ConfigError,
    DimeFMError,
    MissingExtraError,
    UnknownNameError,
    lookup,
)
from dimefm_edge.open_clip_model import build_open_clip, first_line
from dimefm_edge.preprocess import PreprocessSpec
from dimefm_edge.tokenizer import load_tokenizer

logger = logging.getLogger(__name__)

SAMPLE_DIR = Path(__file__).parent / "assets" / "sample_teacher"
OPEN_CLIP_CONFIG = "open_clip_config.json"
RUN_CHECKPOINT = "checkpoint.safetensors"
TEXT_TEACHER_KEY = "teacher"
"""Metadata key of a run's checkpoint: the teacher whose text side the student answers to."""

Tokenize = Callable[[Sequence[str]], Tensor | npt.NDArray[np.int64]]
"""Sentences -> (B, L) int64 tokens."""


class Teacher:
    """A frozen image and text encoder with everything needed to ask it.

    Attributes:
        name: What the user typed.
        weights_hash: 16 hex digits over all weights.
        preprocess: Its own image preprocessing.
        embed_dim: Size E of its embeddings.
        logit_scale: Exponentiated; logits are logit_scale * cosine.
        device: Where it runs.
        image_tower: (B, 3, S, S) float, preprocessed -> (B, E), not normalised.
        text_tower: (B, L) int64 tokens -> (B, E), not normalised.
    """

    def __init__(
        self,
        name: str,
        *,
        image_tower: nn.Module,
        text_tower: nn.Module,
        load_tokenize: Callable[[], Tokenize],
        preprocess: PreprocessSpec,
        embed_dim: int,
        logit_scale: float,
        weights_hash: str,
        device: torch.device,
    ) -> None:
        self.name = name
        self.weights_hash = weights_hash
        self.preprocess = preprocess
        self.embed_dim = embed_dim
        self.logit_scale = logit_scale
        self.device = device
        self.image_tower = image_tower
        self.text_tower = text_tower
        self._load_tokenize = load_tokenize
        self._encode_pixels = module_encoder(image_tower, preprocess)

    @functools.cached_property
    def tokenize(self) -> Tokenize:
        """Its tokenizer, loaded when it is first asked for: some need a package or the network.

        Raises:
            CheckpointError: If its file is damaged.
            DimeFMError: If it cannot be downloaded.
            MissingExtraError: If it needs a package that is not installed.
        """
        return self._load_tokenize()

    def encode_images(self, pixels: npt.NDArray[np.uint8]) -> npt.NDArray[np.float32]:
        """Embed (B, S, S, 3) uint8 pixels, already resized: (B, E) float32, L2-normalised."""
        return self._encode_pixels(pixels)

    @torch.inference_mode()
    def encode_texts(self, sentences: Sequence[str]) -> npt.NDArray[np.float32]:
        """Embed sentences: (B, E) float32, L2-normalised."""
        tokens = torch.as_tensor(self.tokenize(list(sentences))).to(self.device)
        with self._autocast():
            embeds = self.text_tower(tokens)
        return _normalised(embeds)

    def _autocast(self) -> torch.autocast:
        is_gpu = self.device.type == "cuda"
        return torch.autocast(self.device.type, torch.float16, enabled=is_gpu)


def load_teacher(name: str, *, device: str | None = None) -> Teacher:
    """Load and freeze a teacher.

    Args:
        name: `sample`; an open_clip architecture with a pretrained tag or a checkpoint file
            after a colon (`ViT-B-32:laion2b_s34b_b79k`, `ViT-B-32:clip.pt`; `:random` for
            random weights); `hf-hub:ORG/NAME`; a folder with `open_clip_config.json`; a
            run folder of ours, whose student then teaches; or several of these joined by `+`,
            whose logits are averaged.
        device: Such as `cuda`; default: a GPU where there is one.

    Raises:
        UnknownNameError: If the architecture or the tag is not known to open_clip.
        CheckpointError: If a file is missing, or what is there damaged or of another architecture.
        DataError: If a folder is missing.
        ConfigError: If teachers that are joined prepare images differently.
        DimeFMError: If weights cannot be downloaded.
    """
    where = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    path = Path(name).expanduser()
    if "+" in name and not path.exists():
        return _join([load_teacher(part, device=device) for part in name.split("+")], name, where)
    if name == "sample":
        return _load_folder(SAMPLE_DIR, name=name, device=where)
    if name.startswith("hf-hub:"):
        return _from_open_clip(name, None, name=name, device=where)
    if path.is_dir():
        if (path / RUN_CHECKPOINT).is_file():
            return _load_run(path, name=name, device=where)
        return _load_folder(path, name=name, device=where)
    architecture, _, weights = name.partition(":")
    if path.suffix in (".pt", ".pth", ".bin", ".safetensors") and not weights:
        found = "is there, but" if path.is_file() else "does not exist, and"
        raise CheckpointError(
            f"teacher file {name} {found} a file alone does not say its architecture",
            hint=f"--teacher ARCHITECTURE:{name}, for example ViT-B-32:{name}",
        )
    if "/" in architecture or name.startswith((".", "~")):
        raise missing_path(path)
    return _load_named(architecture, weights, name=name, device=where)


def absolute_teacher(name: str) -> str:
    """What `load_teacher` takes, with whole paths: for a config that is read from elsewhere.

    Parts stay as they are where a `+` above them would be read as a join.
    """
    path = Path(name).expanduser()
    if name in ("", "sample") or name.startswith("hf-hub:"):
        return name
    if path.exists():
        return str(path.absolute())
    if "+" in name:
        parts = [(part, absolute_teacher(part)) for part in name.split("+")]
        return "+".join(part if "+" in whole else whole for part, whole in parts)
    architecture, _, weights = name.partition(":")
    file = Path(weights).expanduser()
    whole = f"{architecture}:{file.absolute()}"
    return whole if weights and file.is_file() and "+" not in whole else name


def _join(members: Sequence[Teacher], name: str, device: torch.device) -> Teacher:
    """An ensemble as one teacher, whose logits are the mean of its members'.

    Its embeddings are theirs end to end, each scaled by the root of its part of all logit scales.
    """
    first = members[0]
    for other in members[1:]:
        if other.preprocess != first.preprocess:
            raise ConfigError(
                f"teachers {first.name} and {other.name} prepare images differently: "
                f"{first.preprocess} and {other.preprocess}",
                hint="join teachers with one image size and normalisation",
            )
    total = sum(member.logit_scale for member in members)
    scales = [math.sqrt(member.logit_scale / total) for member in members]

    def tokenize(sentences: Sequence[str]) -> Tensor:
        return torch.cat([torch.as_tensor(m.tokenize(sentences)) for m in members], dim=1)

    widths = [torch.as_tensor(member.tokenize([""])).shape[1] for member in members]
    salt = "+".join(member.weights_hash for member in members)
    return Teacher(
        name,
        image_tower=JoinedTowers([m.image_tower for m in members], scales),
        text_tower=JoinedTowers([m.text_tower for m in members], scales, widths=widths),
        load_tokenize=lambda: tokenize,
        preprocess=first.preprocess,
        embed_dim=sum(member.embed_dim for member in members),
        logit_scale=total / len(members),
        weights_hash=hashlib.sha256(salt.encode()).hexdigest()[:16],
        device=device,
    )


def _load_named(architecture: str, weights: str, *, name: str, device: torch.device) -> Teacher:
    import open_clip

    models = [m for m in open_clip.list_models() if ":" not in m]
    lookup(dict.fromkeys([*models, "sample"]), architecture, kind="teacher")
    tags = open_clip.list_pretrained_tags_by_model(architecture)
    is_file = bool(weights) and Path(weights).expanduser().is_file()
    if not weights:
        raise UnknownNameError(
            f"teacher {architecture} needs weights: a tag ({', '.join(tags) or 'none known'}) "
            "or a checkpoint file",
            hint=f"--teacher {architecture}:{tags[0] if tags else 'FILE'}",
        )
    if not is_file and weights not in tags and weights != "random":
        if "/" in weights or "." in weights:
            raise CheckpointError(f"no checkpoint file at {weights}", hint="check the path")
        lookup(dict.fromkeys([*tags, "random"]), weights, kind=f"tag of {architecture}")
    pretrained = None if weights == "random" else str(Path(weights).expanduser())
    return _from_open_clip(architecture, pretrained, name=name, device=device)


def _load_folder(folder: Path, *, name: str, device: torch.device) -> Teacher:
    if not (folder / OPEN_CLIP_CONFIG).is_file():
        raise CheckpointError(
            f"{folder} is not a teacher: it has neither {OPEN_CLIP_CONFIG} nor {RUN_CHECKPOINT}",
            hint="dimefm-edge distill --help  (what --teacher takes)",
        )
    tokenizer_path = folder / "tokenizer.json"
    load_tokenize = None
    if tokenizer_path.is_file() and _has_length(tokenizer_path):
        load_tokenize = functools.partial(load_tokenizer, tokenizer_path)
    return _from_open_clip(
        f"local-dir:{folder}", None, name=name, device=device, load_tokenize=load_tokenize
    )


def _has_length(path: Path) -> bool:
    """Whether a tokenizer.json is all that it takes; a Hugging Face one leaves length to calls."""
    try:
        return json.loads(path.read_bytes())["padding"] is not None
    except (ValueError, TypeError, KeyError, RecursionError):
        return True  # damaged, which is told when it is loaded


def _load_run(folder: Path, *, name: str, device: torch.device) -> Teacher:
    """A student as a teacher: its own image tower, and its own text tower where it has one;
    else the text side that it was taught by."""
    from dimefm_edge.students import load_student
    from dimefm_edge.students.text_checkpoint import has_text_student, load_text_student

    loaded = load_student(folder)
    tower = _frozen(loaded.student, device)
    if has_text_student(folder):
        own = load_text_student(folder)
        return Teacher(
            name,
            image_tower=tower,
            text_tower=_frozen(own.student, device),
            load_tokenize=lambda: own.tokenizer,
            preprocess=loaded.preprocess,
            embed_dim=own.embed_dim,
            logit_scale=own.logit_scale,
            weights_hash=_hash_weights(tower, salt=_hash_weights(own.student)),
            device=device,
        )
    text_teacher = load_teacher(loaded.metadata[TEXT_TEACHER_KEY], device=str(device))
    return Teacher(
        name,
        image_tower=tower,
        text_tower=text_teacher.text_tower,
        load_tokenize=lambda: text_teacher.tokenize,
        preprocess=loaded.preprocess,
        embed_dim=text_teacher.embed_dim,
        logit_scale=text_teacher.logit_scale,
        weights_hash=_hash_weights(tower, salt=text_teacher.weights_hash),
        device=device,
    )


def _from_open_clip(
    model_name: str,
    pretrained: str | None,
    *,
    name: str,
    device: torch.device,
    load_tokenize: Callable[[], Tokenize] | None = None,
) -> Teacher:
    if device.type == "cpu":
        torch.set_flush_denormal(True)
    model = build_open_clip(model_name, pretrained, name=name)
    tower = _frozen(model, device)
    preprocess = _preprocess_spec(model.visual.preprocess_cfg)
    teacher = Teacher(
        name,
        image_tower=tower.visual,
        text_tower=TextTower(tower),
        load_tokenize=load_tokenize or functools.partial(_open_clip_tokenizer, model_name, name),
        preprocess=preprocess,
        embed_dim=0,
        logit_scale=float(model.logit_scale.detach().exp()),
        weights_hash=_hash_weights(tower),
        device=device,
    )
    side = preprocess.image_size
    teacher.embed_dim = teacher.encode_images(np.zeros((1, side, side, 3), np.uint8)).shape[1]
    logger.info("teacher %s: E=%d, %d px", name, teacher.embed_dim, side)
    return teacher


def _frozen(module: nn.Module, device: torch.device) -> Any:
    return module.eval().requires_grad_(False).to(device)


def _open_clip_tokenizer(model_name: str, name: str) -> Tokenize:
    import open_clip

    try:
        tokenize: Tokenize = open_clip.get_tokenizer(model_name)
    except ImportError as error:
        raise MissingExtraError(
            f"the tokenizer of teacher {name} needs a package that is not installed: "
            f"{first_line(error)}",
            hint="pip install transformers sentencepiece",
        ) from error
    except (OSError, ValueError) as error:
        raise DimeFMError(
            f"the tokenizer of teacher {name} cannot be loaded: {first_line(error)}",
            hint="check the network: open_clip downloads this one from the Hugging Face Hub",
        ) from error
    return tokenize


def _preprocess_spec(cfg: dict[str, Any]) -> PreprocessSpec:
    size = cfg["size"]
    if not isinstance(size, int):
        if size[0] != size[1]:
            raise CheckpointError(f"teachers with oblong images are not supported: {tuple(size)}")
        size = size[0]
    fill = cfg.get("fill_color", 0)
    return PreprocessSpec(
        image_size=int(size),
        mean=tuple(cfg["mean"]),
        std=tuple(cfg["std"]),
        interpolation="bicubic" if cfg["interpolation"] == "random" else cfg["interpolation"],
        resize_mode=cfg["resize_mode"],
        fill_color=int(fill if isinstance(fill, int | float) else fill[0]),
    )


def _hash_weights(module: nn.Module, *, salt: str = "") -> str:
    digest = hashlib.sha256(salt.encode())
    for key, value in sorted(module.state_dict().items()):
        digest.update(key.encode())
        digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()[:16]


def _normalised(embeds: Tensor) -> npt.NDArray[np.float32]:
    array: npt.NDArray[np.float32] = F.normalize(embeds.float(), dim=-1).cpu().numpy()
    return array
