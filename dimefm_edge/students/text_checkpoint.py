"""A text student on disk: weights and spec in one safetensors file, its tokenizer beside it.

They lie in a folder of their own in the run. With them a run needs its teacher no more to embed
sentences.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from dataclasses import dataclass
from pathlib import Path

from dimefm_edge.errors import CheckpointError, DimeFMError
from dimefm_edge.files import atomic_file
from dimefm_edge.students import CHECKPOINT_FILE, read_safetensors, write_safetensors
from dimefm_edge.students.text import TextSpec, TextStudent
from dimefm_edge.tokenizer import Tokenizer, TokenizerSpec, load_tokenizer

TEXT_DIR = "text"
"""Of the text student, in its run's folder: a run folder of its own."""
_TOKENIZER_FILE = "tokenizer.json"
_FORMAT = "dimefm_edge.text_student/1"


@dataclass(frozen=True)
class LoadedTextStudent:
    """A trained text student, in eval mode on the CPU."""

    student: TextStudent
    tokenizer: Tokenizer
    metadata: dict[str, str]

    @property
    def spec(self) -> TextSpec:
        return self.student.spec

    # What export/text.py asks of a text side, whosever it is.

    @property
    def name(self) -> str:
        return self.spec.name

    @property
    def embed_dim(self) -> int:
        return self.spec.embed_dim

    @property
    def text_tower(self) -> TextStudent:
        return self.student

    @property
    def tokenize(self) -> Tokenizer:
        return self.tokenizer

    @property
    def logit_scale(self) -> float:
        """The teacher's, exponentiated."""
        return float(self.metadata["logit_scale"])


def save_tokenizer(folder: Path, tokenizer: Tokenizer) -> None:
    """Put a text student's tokenizer where its checkpoint will be; what is there stays if equal."""
    path = folder / _TOKENIZER_FILE
    if not path.is_file() or path.read_bytes() != tokenizer.to_bytes():
        with atomic_file(path) as stream:
            stream.write(tokenizer.to_bytes())


def save_text_student(
    path: Path, student: TextStudent, tokenizer: Tokenizer, metadata: dict[str, str]
) -> None:
    """Write the checkpoint, atomically; `save_tokenizer` writes what it was trained with.

    Raises:
        DimeFMError: If it cannot be written; the old file then stays.
    """
    header = {
        "format": _FORMAT,
        "spec": json.dumps(student.spec.to_dict()),
        "tokenizer": json.dumps(tokenizer.spec.to_dict()),
        "tokenizer_sha256": _digest(tokenizer),
        "metadata": json.dumps(metadata),
    }
    write_safetensors(path, student, header)


def copy_text_student(run_dir: Path, other: Path) -> None:
    """Put a run's text student, where it has one, into another run."""
    if not has_text_student(run_dir):
        return
    (other / TEXT_DIR).mkdir(parents=True)
    for name in (CHECKPOINT_FILE, _TOKENIZER_FILE):
        shutil.copy(run_dir / TEXT_DIR / name, other / TEXT_DIR)


def has_text_student(run_dir: Path) -> bool:
    """Whether a run has a text encoder of its own."""
    return (run_dir / TEXT_DIR / CHECKPOINT_FILE).is_file()


def load_text_student(run_dir: Path) -> LoadedTextStudent:
    """Load a run's text student.

    Args:
        run_dir: The run, not the folder in it.

    Raises:
        CheckpointError: If the file is missing, truncated, not a text student of ours, does not
            hold the weights that its spec asks for, or its tokenizer is missing or another.
    """
    path = run_dir / TEXT_DIR / CHECKPOINT_FILE
    tensors, header = read_safetensors(path)
    if header.get("format") != _FORMAT:
        raise CheckpointError(
            f"{path} is a safetensors file, but not a text student of dimefm_edge",
            hint="name a run that was distilled with --text-student",
        )
    try:
        student = TextStudent(TextSpec(**json.loads(header["spec"])))
        student.load_state_dict(tensors)
        tokenizer_spec = TokenizerSpec(**json.loads(header["tokenizer"]))
        metadata = {str(k): str(v) for k, v in json.loads(header["metadata"]).items()}
        digest, _ = header["tokenizer_sha256"], float(metadata["logit_scale"])
    except (KeyError, TypeError, ValueError, AttributeError, RuntimeError, DimeFMError) as error:
        reason = str(error).splitlines()[0]
        raise CheckpointError(
            f"{path} is damaged: its weights and its description disagree ({reason})",
            hint="copy it again, or train again with --resume",
        ) from error
    tokenizer = load_tokenizer(path.with_name(_TOKENIZER_FILE), tokenizer_spec)
    if _digest(tokenizer) != digest:
        raise CheckpointError(
            f"{path.with_name(_TOKENIZER_FILE)} is not the tokenizer that {path} was trained with",
            hint="copy the run's folder again, as a whole",
        )
    return LoadedTextStudent(student.eval(), tokenizer, metadata)


def _digest(tokenizer: Tokenizer) -> str:
    return hashlib.sha256(tokenizer.to_bytes()).hexdigest()
