"""The models a page compares: they load behind it, one after the other, and it waits for none.

Each is asked through its subject; label embeddings are kept, so a changed label costs one.
"""

from __future__ import annotations

import logging
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np

from dimefm_demo.model_specs import SAMPLE, ModelSpec, require_torch, teacher_id
from dimefm_edge import DimeFMError, __version__, load_bundle, load_subject
from dimefm_edge.errors import CheckpointError, ExportError, InputError
from dimefm_edge.files import user_cache_dir
from dimefm_edge.labels import LabelBank
from dimefm_edge.manifest import MANIFEST_FILE, TEXT_FILE, sha256_of
from dimefm_edge.runtime import load_engine
from dimefm_edge.runtime.text import LabelEncoder
from dimefm_edge.subjects import Subject, bundle_subject

logger = logging.getLogger(__name__)

_WAIT_S = 300
_SAMPLE_WEIGHTS = "assets/sample_teacher/open_clip_model.safetensors"


class Model:
    """A loaded model. Calls from several threads are safe, as its subject's are."""

    def __init__(self, spec: ModelSpec, subject: Subject) -> None:
        self.spec = spec
        self.subject = subject
        self.manifest: dict[str, Any] = getattr(subject.owner, "manifest", {})
        self.precision = str(self.manifest.get("precision", "fp32"))
        self.teacher = teacher_id(str(self.manifest.get("extra", {}).get("teacher") or ""))
        text = self.manifest.get("files", {}).get(TEXT_FILE, {})
        self.text_id = str(text.get("sha256", spec.name))
        """Equal where text sides are, so that a label is embedded once for all of them."""
        self.runtime = spec.engine if subject.kind == "bundle" else "PyTorch"

    @property
    def name(self) -> str:
        return self.spec.name

    def baked_rows(self, labels: Sequence[str]) -> LabelBank | None:
        """Labels as the model carries them, if one of its label sets has them all."""
        for bank in self.subject.label_banks.values():
            rows = {name: row for row, name in enumerate(bank.classnames)}
            if all(label in rows for label in labels):
                embeds = bank.embeds[[rows[label] for label in labels]]
                return LabelBank(bank.name, tuple(labels), bank.templates, embeds)
        return None


@dataclass
class _Slot:
    """Where a model appears when it is loaded, or why it did not."""

    spec: ModelSpec
    done: threading.Event = field(default_factory=threading.Event)
    model: Model | None = None
    error: str = ""
    cause: Exception | None = None
    doing: str = "waiting"


class Models:
    """The page's models, by name, in its order."""

    def __init__(self, specs: Sequence[ModelSpec], *, threads: int = 0) -> None:
        """
        Args:
            specs: At least one; names are unique.
            threads: CPU threads of one call; 0 takes one per physical core.
        """
        self._slots = {spec.name: _Slot(spec) for spec in specs}
        self._threads = threads
        self._encoders: dict[str, LabelEncoder] = {}
        self._text_lock = threading.Lock()

    @property
    def names(self) -> list[str]:
        return list(self._slots)

    @property
    def specs(self) -> list[ModelSpec]:
        return [slot.spec for slot in self._slots.values()]

    @property
    def is_settled(self) -> bool:
        """Whether every model is loaded or has failed."""
        return all(slot.done.is_set() for slot in self._slots.values())

    def load_behind(self) -> None:
        """Load all models on a thread of their own, bundles first: they take the least."""
        order = sorted(self._slots.values(), key=lambda slot: slot.spec.kind != "bundle")
        threading.Thread(target=self._load_all, args=(order,), daemon=True).start()

    def _load_all(self, slots: Sequence[_Slot]) -> None:
        for slot in slots:
            try:
                slot.doing = "made ready" if slot.spec.kind == SAMPLE else "loading"
                slot.model = load_model(slot.spec, threads=self._threads)
            except DimeFMError as error:  # said on the page, and to who started it
                if len(self._slots) > 1:  # of one, `require_one` says it
                    logger.warning("%s: %s", slot.spec.name, error)
                slot.error, slot.cause = str(error), error
            except Exception as error:  # the page lives on without this model
                logger.exception("%s cannot be loaded", slot.spec.name)
                slot.error, slot.cause = f"{type(error).__name__}: {error}", error
            slot.done.set()

    def states(self) -> list[tuple[str, str]]:
        """(name, `ready`, what is being done, or why it failed) of each model."""
        return [(n, s.error or ("ready" if s.model else s.doing)) for n, s in self._slots.items()]

    def loaded(self) -> list[Model]:
        """Those that are ready now."""
        return [slot.model for slot in self._slots.values() if slot.model is not None]

    def first_ready(self) -> Model | None:
        """The first in order that is ready, once one is; None if all have failed."""
        while not self.is_settled and not self.loaded():
            time.sleep(0.05)
        return next(iter(self.loaded()), None)

    def require_one(self) -> None:
        """Wait until a model is ready.

        Raises:
            CheckpointError: If none can be loaded; of one model alone, its own error of ours.
        """
        if self.first_ready() is not None:
            return
        slots = list(self._slots.values())
        if len(slots) == 1 and isinstance(slots[0].cause, DimeFMError):
            raise slots[0].cause
        why = "; ".join(f"{slot.spec.name}: {slot.error}" for slot in slots)
        raise CheckpointError(
            f"no model can be loaded: {why}", hint="name a run, a bundle or a teacher"
        ) from slots[0].cause

    def wait_for(self, name: str) -> Model:
        """One model, once it is loaded.

        Raises:
            CheckpointError: If it could not be loaded, or takes too long.
            InputError: If there is no such model.
        """
        slot = self._slots.get(name)
        if slot is None:
            raise InputError(f"there is no model {name!r} here", hint=", ".join(self._slots))
        if not slot.done.wait(_WAIT_S):
            raise CheckpointError(f"{name} is not loaded yet ({slot.doing})", hint="wait a little")
        if slot.model is None:
            raise CheckpointError(f"{name} could not be loaded: {slot.error}")
        return slot.model

    def has_text(self, model: Model) -> bool:
        """Whether any label can be asked for, rather than those that were baked in."""
        return self._text_model(model) is not None

    def label_bank(
        self, model: Model, labels: Sequence[str], templates: Sequence[str]
    ) -> LabelBank:
        """Embed labels for a model; a label that was embedded before costs nothing.

        Raises:
            CheckpointError: If the model has no text side, nor these labels baked in.
            DataError: If a template lacks `{c}`.
        """
        text = self._text_model(model)
        if text is None:
            bank = model.baked_rows(labels)
            if bank is None:
                raise CheckpointError(
                    f"{model.name} has no text side, so it knows its own labels only: "
                    f"{_described(model)}",
                    hint="choose these labels, or bake a text side in: "
                    "dimefm-edge export RUN --text",
                )
            return bank
        # One at a time: a second visitor with the same labels finds them embedded.
        with self._text_lock:
            assert text.subject.encode_texts is not None
            encoder = self._encoders.setdefault(
                text.text_id, LabelEncoder(text.subject.encode_texts)
            )
            return encoder.bank(labels, templates=templates)

    def _text_model(self, model: Model) -> Model | None:
        """The model whose text side this one answers to: its own, or its teacher's."""
        if model.subject.encode_texts is not None:
            return model
        for slot in self._slots.values():
            if model.teacher and slot.spec.teaches == model.teacher:
                teacher = self.wait_for(slot.spec.name)
                return teacher if teacher.subject.encode_texts is not None else None
        return None


def _described(model: Model) -> str:
    sets = [f"{b.name} ({len(b.classnames)})" for b in model.subject.label_banks.values()]
    return ", ".join(sets) or "none, and so it can only search by image"


# ----------------------------------------------------------------------------- loading


def load_model(spec: ModelSpec, *, threads: int = 0) -> Model:
    """Load one model and let it answer once: the first call takes longer than any other.

    Raises:
        DimeFMError: If it is missing, damaged or cannot run here.
    """
    if spec.kind == "subject":
        subject = load_subject(spec.source)
    else:
        path = sample_bundle(spec.source) if spec.kind == SAMPLE else Path(spec.source)
        bundle = load_bundle(path)
        engine = load_engine(bundle, threads=threads, engine=spec.engine)
        subject = bundle_subject(bundle, engine)
    side = subject.preprocess.image_size
    subject.encode_pixels(np.zeros((1, side, side, 3), np.uint8))
    return Model(spec, subject)


def cache_dir() -> Path:
    """Where the demo keeps what it need not make again: below XDG_CACHE_HOME, else ~/.cache."""
    return user_cache_dir("demo")


def _sample_path(precision: str) -> Path:
    weights = sha256_of(Path(str(files("dimefm_edge"))) / _SAMPLE_WEIGHTS)[:12]
    return cache_dir() / f"sample-{__version__}-{weights}-{precision}"


def check_samples(specs: Sequence[ModelSpec]) -> None:
    """Say before a page comes up that the sample it is to show cannot be made here.

    Raises:
        MissingExtraError: If it was not exported yet, and torch is not there to do it.
    """
    for spec in specs:
        if spec.kind == SAMPLE and not (_sample_path(spec.source) / MANIFEST_FILE).is_file():
            require_torch("the sample teacher")


def sample_bundle(precision: str) -> Path:
    """The sample teacher as a bundle for this machine: exported once, then kept in the cache.

    Raises:
        ExportError: If it cannot be exported.
        MissingExtraError: If it was not exported yet, and torch is not there to do it.
    """
    out = _sample_path(precision)
    if (out / MANIFEST_FILE).is_file():
        return out
    require_torch("the sample teacher")
    # In a process of its own: torch's tracing would hold up the page, and stay in memory.
    command = [
        sys.executable, "-m", "dimefm_edge", "export", "--teacher", SAMPLE, "--labels", "scenes",
        "--precision", precision, "--out", str(out),
        *(("--target", "local") if precision == "int8" else ()),
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        last = (done.stderr.strip() or "no message").splitlines()
        raise ExportError(
            f"the sample teacher cannot be exported: {' '.join(last[-2:])}",
            hint=f"dimefm-edge export --teacher sample --precision {precision}",
        )
    return out
