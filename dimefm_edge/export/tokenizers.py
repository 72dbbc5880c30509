"""open_clip's tokenizers as a `tokenizer.json` that needs neither torch nor open_clip.

CLIP's own (`SimpleTokenizer`, Python and the `regex` package) is written as a BPE of the
`tokenizers` package that gives the same ids; a Hugging Face tokenizer brings its own file.
What no such file can say (cleaning, a zeroed token) is in the `TokenizerSpec` beside it.
"""

from __future__ import annotations

import copy
import functools
import json
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from dimefm_edge.errors import ExportError
from dimefm_edge.tokenizer import Tokenizer, TokenizerSpec

PROBES = (
    "",
    "a photo of a dog.",
    "Two Dogs &amp; one cat's   toy: 3.5 kg, they've “played”!",
    "un café à la plage 🏖️, 日本語 и по-русски",
    "_snake_case_ <start_of_text> http://example.org/?q=1&r=2",
    "a very long sentence " * 400,
)
"""Sentences that every converted tokenizer is compared on: entities, scripts, truncation."""

_CONTRACTIONS = ("'s", "'t", "'re", "'ve", "'m", "'ll", "'d")
_NUM_CODE_POINTS = 0x110000
_WITHOUT_TEXT = "dimefm-edge export --teacher NAME --image-only  (a bundle without its text side)"


def convert_tokenizer(
    tokenize: Callable[[Sequence[str]], Any], *, name: str, sentences: Sequence[str] = ()
) -> Tokenizer:
    """Make a tokenizer that gives the ids of open_clip's, and prove it on sentences.

    Args:
        tokenize: open_clip's tokenizer, or one of ours, which is returned as it is.
        name: The teacher, for errors.
        sentences: Compared beside `PROBES`.

    Raises:
        ExportError: If it is of a kind that cannot be converted, or gives other ids.
    """
    if isinstance(tokenize, Tokenizer):
        return tokenize
    from open_clip.tokenizer import HFTokenizer, SimpleTokenizer

    if isinstance(tokenize, SimpleTokenizer):
        values, spec = _convert_simple(tokenize, name)
    elif isinstance(tokenize, HFTokenizer):
        values, spec = _convert_hugging_face(tokenize, name)
    else:
        raise _cannot(name, f"its tokenizer is a {type(tokenize).__name__}")
    data = json.dumps(values, ensure_ascii=False, separators=(",", ":")).encode()
    converted = Tokenizer(data, spec, where=f"the tokenizer of {name}")
    _check_equal(converted, tokenize, [*PROBES, *sentences], name)
    return converted


def _check_equal(
    converted: Tokenizer,
    tokenize: Callable[[Sequence[str]], Any],
    sentences: Sequence[str],
    name: str,
) -> None:
    wanted: npt.NDArray[np.int64] = np.asarray(tokenize(list(sentences)))
    found = converted(sentences)
    wrong = [] if wanted.shape == found.shape else [0]
    wrong = wrong or np.flatnonzero((wanted != found).any(axis=1)).tolist()
    if wrong:
        raise _cannot(
            name,
            f"the converted tokenizer gives other ids for {sentences[wrong[0]][:60]!r} "
            f"({len(wrong)} of {len(sentences)} sentences differ)",
        )


def _cannot(name: str, reason: str) -> ExportError:
    return ExportError(
        f"the tokenizer of {name} cannot run without open_clip: {reason}", hint=_WITHOUT_TEXT
    )


def _clean_name(tokenizer: Any, name: str) -> str:
    from open_clip.tokenizer import get_clean_fn

    for clean in ("lower", "whitespace", "canonicalize"):
        if tokenizer.clean_fn is get_clean_fn(clean):
            return clean
    raise _cannot(name, "it cleans sentences in a way of its own")


# ------------------------------------------------------------------------- CLIP's own


def _convert_simple(tokenizer: Any, name: str) -> tuple[dict[str, Any], TokenizerSpec]:
    """A BPE with the same merges, after a split by the same classes of characters."""
    spec = TokenizerSpec(tokenizer.context_length, _clean_name(tokenizer, name))
    if tokenizer.reduction_fn is not None:
        raise _cannot(name, "it drops words of long sentences by chance")
    if spec.clean == "whitespace":  # then <Start_of_text> is one word too
        raise _cannot(name, "it keeps upper case")
    if len(tokenizer.all_special_ids) != 2:
        raise _cannot(name, "it has special tokens of its own")
    vocab = dict(tokenizer.encoder)
    merges = [list(pair) for pair in sorted(tokenizer.bpe_ranks, key=tokenizer.bpe_ranks.get)]
    specials = [tokenizer.decoder[i] for i in tokenizer.all_special_ids]
    for special in specials:
        merges += _merge_whole(special, vocab, tokenizer)
    split = {"type": "Split", "pattern": {"Regex": _split_pattern(specials)}, "invert": True}
    level = {
        "type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False,
    }  # fmt: skip
    model = {
        "type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": "",
        "end_of_word_suffix": "</w>", "fuse_unk": False, "vocab": vocab, "merges": merges,
    }  # fmt: skip
    values = {
        "version": "1.0",
        **_fixed_length(spec.context_length),
        "added_tokens": [],
        "normalizer": None,
        "pre_tokenizer": {
            "type": "Sequence", "pretokenizers": [{**split, "behavior": "Removed"}, level],
        },
        "post_processor": _between(tokenizer.sot_token_id, tokenizer.eot_token_id),
        "decoder": level,
        "model": model,
    }  # fmt: skip
    return values, spec


def _fixed_length(length: int) -> dict[str, Any]:
    """Cut and padded with 0; the end token is put after the cut, so it is always there."""
    return {
        "truncation": {
            "direction": "Right", "max_length": length, "strategy": "LongestFirst", "stride": 0,
        },
        "padding": {
            "strategy": {"Fixed": length}, "direction": "Right", "pad_to_multiple_of": None,
            "pad_id": 0, "pad_type_id": 0, "pad_token": "!",
        },
    }  # fmt: skip


def _between(start: int, end: int) -> dict[str, Any]:
    """Put a sentence between two tokens."""
    sentence = {"Sequence": {"id": "A", "type_id": 0}}
    first, last = ({"SpecialToken": {"id": name, "type_id": 0}} for name in ("start", "end"))
    return {
        "type": "TemplateProcessing",
        "single": [first, sentence, last],
        "pair": [first, sentence, {"Sequence": {"id": "B", "type_id": 0}}, last],
        "special_tokens": {
            name: {"id": name, "ids": [token], "tokens": [name]}
            for name, token in (("start", start), ("end", end))
        },
    }


def _merge_whole(special: str, vocab: dict[str, int], tokenizer: Any) -> list[list[str]]:
    """Last merges, which make one token of a `<start_of_text>` written in a sentence.

    open_clip's split takes it for one word, which its BPE keeps whole; as a special token of
    `tokenizers` it would be found before the split, within words too. No other word begins
    with these merges: nowhere else are `<` and a letter in one word. `vocab` gets the steps.
    """
    plain = copy.copy(tokenizer)
    plain.cache = {}  # which keeps the special ones whole
    joined, *parts = plain.bpe(special).split(" ")
    merges = []
    for part in parts:
        merges.append([joined, part])
        joined += part
        vocab[joined] = max(vocab.values()) + 1
    vocab[joined] = vocab.pop(special)
    return merges


def _split_pattern(specials: Sequence[str]) -> str:
    """The split of open_clip's SimpleTokenizer, with its classes and cases written out.

    Which characters are letters is a matter of the Unicode version, and `tokenizers` has
    another than `regex` has, here and on the device.
    """
    whole = ["".join(f"[{_class_of(c)}]" for c in word) for word in (*specials, *_CONTRACTIONS)]
    letters, numbers, others = map(_class_of, (r"\p{L}", r"\p{N}", r"[^\s\p{L}\p{N}]"))
    return "|".join([*whole, f"[{letters}]+", f"[{numbers}]", f"[{others}]+"])


@functools.cache
def _class_of(pattern: str) -> str:
    """The characters that a pattern of one character matches, as the inside of `[...]`."""
    import regex  # type: ignore[import-untyped]

    runs = regex.finditer(f"(?:{pattern})+", _all_characters(), regex.IGNORECASE)
    ends = [(ord(run[0][0]), ord(run[0][-1])) for run in runs]
    return "".join(f"\\x{{{a:X}}}" + (f"-\\x{{{b:X}}}" if b > a else "") for a, b in ends)


@functools.cache
def _all_characters() -> str:
    codes = (code for code in range(_NUM_CODE_POINTS) if not 0xD800 <= code <= 0xDFFF)
    return "".join(map(chr, codes))


# ----------------------------------------------------------------------- Hugging Face


def _convert_hugging_face(tokenizer: Any, name: str) -> tuple[dict[str, Any], TokenizerSpec]:
    """The fast tokenizer's own file, with the lengths that a call sets on it."""
    length, inner = tokenizer.context_length, tokenizer.tokenizer
    if getattr(tokenizer, "tokenizer_mode", ""):
        raise _cannot(name, f"its mode '{tokenizer.tokenizer_mode}' is open_clip's own")
    if not getattr(inner, "is_fast", False):
        raise _cannot(name, f"{type(inner).__name__} has no fast version")
    tokenizer(["a"])
    values = json.loads(inner.backend_tokenizer.to_str())
    zeroed_id = inner.sep_token_id if tokenizer.strip_sep_token else None
    return values, TokenizerSpec(length, _clean_name(tokenizer, name), zeroed_id)
