"""How sentences become a text tower's input: one tokenizer for training, export and the device.

A `tokenizer.json` of the `tokenizers` package with the cleaning that open_clip does before it
(open_clip/tokenizer.py), which no such file can express: ftfy mends broken Unicode, HTML
entities are decoded. No torch here.
"""

from __future__ import annotations

import html
import string
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

from dimefm_edge.errors import CheckpointError, ConfigError, MissingExtraError, lookup

T = TypeVar("T")

MAX_TOKENIZER_BYTES = 2**26  # SigLIP 2's, of 256,000 words, has 34 MiB
MAX_CONTEXT_LENGTH = 4096

_NO_PUNCTUATION = str.maketrans("", "", string.punctuation)


@dataclass(frozen=True)
class TokenizerSpec:
    """What is done around a `tokenizer.json`."""

    context_length: int
    """L: every sentence becomes so many tokens, cut or padded."""
    clean: str = "none"
    """none, or one of open_clip's: lower, whitespace, canonicalize."""
    zeroed_id: int | None = None
    """A token whose place is taken by 0 (open_clip's `strip_sep_token`)."""

    def __post_init__(self) -> None:
        if not 0 < self.context_length <= MAX_CONTEXT_LENGTH:
            raise ConfigError(
                f"context_length must be 1 to {MAX_CONTEXT_LENGTH}, got {self.context_length}"
            )
        lookup(_CLEANERS, self.clean, kind="way to clean text")

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


class Tokenizer:
    """Sentences to token ids; equal to what open_clip's tokenizer gives, id by id."""

    def __init__(self, data: bytes, spec: TokenizerSpec | None = None, *, where: str) -> None:
        """Read a `tokenizer.json`, trusting nothing in it.

        Args:
            data: The file's bytes.
            spec: What is done around it; default: nothing, and the file's own length.
            where: The file, for errors.

        Raises:
            CheckpointError: If it is no tokenizer, or does not give rows of `context_length`.
        """
        self._data, self._where = data, where
        self._tokenizer = self._guarded(_parse, data)
        # Looked at before it is used: a padding to a billion tokens would be allocated.
        length = _own_length(self._tokenizer, where)
        if spec is not None and length != spec.context_length:
            raise _bad_file(
                where, f"it pads to {length} tokens, the text tower takes {spec.context_length}"
            )
        self.spec = spec or TokenizerSpec(length)
        self(["a"])  # a file may be read and still fail at the first word

    def __call__(self, sentences: Sequence[str]) -> npt.NDArray[np.int64]:
        """Tokenise sentences: (B, L) int64, cut and padded to the context length.

        Raises:
            CheckpointError: If the file turns out not to fit together.
            MissingExtraError: If a sentence is more than plain ASCII and ftfy is not installed.
        """
        clean = _CLEANERS[self.spec.clean]
        cleaned = [clean(sentence) for sentence in sentences]
        tokens: npt.NDArray[np.int64] = self._guarded(self._encode, cleaned)
        if self.spec.zeroed_id is not None:
            tokens[tokens == self.spec.zeroed_id] = 0
        return tokens

    def _encode(self, cleaned: list[str]) -> npt.NDArray[np.int64]:
        rows = [row.ids for row in self._tokenizer.encode_batch_fast(cleaned)]
        return np.asarray(rows, np.int64).reshape(len(cleaned), self.spec.context_length)

    def _guarded(self, call: Callable[[T], Any], argument: T) -> Any:
        """Call into Rust, which raises bare Exceptions, and BaseExceptions when it panics."""
        try:
            return call(argument)
        except (KeyboardInterrupt, SystemExit, MemoryError):
            raise
        except BaseException as error:
            raise _bad_file(self._where, str(error).splitlines()[0][:200]) from error

    def to_bytes(self) -> bytes:
        """The `tokenizer.json` that it was read from."""
        return self._data


def load_tokenizer(path: Path, spec: TokenizerSpec | None = None) -> Tokenizer:
    """Read a `tokenizer.json`.

    Args:
        path: The file.
        spec: What is done around it; default: nothing, and the file's own length.

    Raises:
        CheckpointError: If the file is missing, too large, or no tokenizer that pads.
    """
    try:
        size = path.stat().st_size
        if size > MAX_TOKENIZER_BYTES:
            raise _bad_file(str(path), f"it has {size / 2**20:.0f} MiB, which none has")
        data = path.read_bytes()
    except OSError as error:
        raise CheckpointError(f"no tokenizer at {path}: {error.strerror}") from error
    return Tokenizer(data, spec, where=str(path))


# --------------------------------------------------------------------------- cleaning


def _mend(text: str) -> str:
    """What open_clip calls basic_clean; plain ASCII without `&` needs none of it."""
    if text.isascii() and text.isprintable() and "&" not in text:
        return text.strip()
    try:
        import ftfy
    except ImportError as error:
        raise MissingExtraError(
            f"{text[:40]!r} needs ftfy, which is not installed: it is not plain ASCII, and the "
            "model was trained on text that ftfy mended",
            hint="pip install ftfy",
        ) from error
    return html.unescape(html.unescape(ftfy.fix_text(text))).strip()


def _clean_whitespace(text: str) -> str:
    return " ".join(_mend(text).split())


def _clean_lower(text: str) -> str:
    return _clean_whitespace(text).lower()


def _canonicalize(text: str) -> str:
    text = _mend(text).replace("_", " ").translate(_NO_PUNCTUATION)
    return " ".join(text.lower().split())


_CLEANERS: dict[str, Callable[[str], str]] = {
    "none": lambda text: text,
    "lower": _clean_lower,
    "whitespace": _clean_whitespace,
    "canonicalize": _canonicalize,
}


# ----------------------------------------------------------------------------- checks


def _parse(data: bytes) -> Any:
    from tokenizers import Tokenizer as JsonTokenizer

    return JsonTokenizer.from_buffer(data)


def _own_length(tokenizer: Any, where: str) -> int:
    """Tokens that it both cuts and pads to."""
    padding, truncation = tokenizer.padding or {}, tokenizer.truncation or {}
    pads_to, cuts_to = padding.get("length"), truncation.get("max_length")
    if pads_to is None or pads_to != cuts_to or padding.get("pad_to_multiple_of") is not None:
        raise _bad_file(where, f"it cuts to {cuts_to} tokens and pads to {pads_to}")
    if not 0 < pads_to <= MAX_CONTEXT_LENGTH:
        raise _bad_file(where, f"it pads to {pads_to} tokens; 1 to {MAX_CONTEXT_LENGTH} can be")
    return int(pads_to)


def _bad_file(where: str, reason: str) -> CheckpointError:
    return CheckpointError(f"{where} is not a tokenizer file of ours: {reason}")
