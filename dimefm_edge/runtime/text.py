"""The text side on the device: sentences to embeddings, and any labels to a label bank."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

from dimefm_edge.errors import CheckpointError, DimeFMError, InputError
from dimefm_edge.labels import LabelBank, build_label_bank
from dimefm_edge.manifest import EXPORT_AGAIN, TEXT_INPUT_NAME, TEXT_OUTPUT_NAME
from dimefm_edge.runtime.bundle import Bundle
from dimefm_edge.runtime.onnxruntime import count_physical_cores, first_line, load_session
from dimefm_edge.tokenizer import Tokenizer, load_tokenizer

DEFAULT_TEMPLATES = ("a photo of a {c}.",)

_SENTENCES_PER_CALL = 32
_MAX_KEPT_LABELS = 4096


class TextEncoder:
    """A text tower in ONNX Runtime with its tokenizer; calls from several threads are safe.

    Attributes:
        tokenizer: Sentences to (B, L) int64.
        embed_dim: Size E of the embeddings.
        threads: Threads of one call.
    """

    def __init__(
        self, model_path: Path, tokenizer: Tokenizer, *, embed_dim: int, threads: int = 0
    ) -> None:
        """Load a text tower.

        Args:
            model_path: The `text.onnx`, already checked.
            tokenizer: Gives what the graph takes.
            embed_dim: Size E that the graph must answer in.
            threads: 0 takes one per physical core that this process may use.

        Raises:
            CheckpointError: If ONNX Runtime cannot load the graph, or it is not `tokens` to
                `text_embeds` of these sizes.
            MissingExtraError: If ONNX Runtime is not installed.
        """
        if threads < 0:
            raise ValueError(f"threads must not be negative, got {threads}")
        self.tokenizer = tokenizer
        self.embed_dim = embed_dim
        self.threads = threads or count_physical_cores()
        self._session = load_session(model_path, self.threads)
        self._check_signature(model_path)

    def encode_texts(self, sentences: Sequence[str]) -> npt.NDArray[np.float32]:
        """Embed sentences: (B, E) float32, L2-normalised.

        Raises:
            DimeFMError: If ONNX Runtime fails, for want of memory say.
            MissingExtraError: If a sentence is more than plain ASCII and ftfy is not installed.
        """
        embeds = np.empty((len(sentences), self.embed_dim), np.float32)
        for start in range(0, len(sentences), _SENTENCES_PER_CALL):
            chunk = slice(start, start + _SENTENCES_PER_CALL)
            tokens = self.tokenizer(sentences[chunk])
            try:
                (embeds[chunk],) = self._session.run([TEXT_OUTPUT_NAME], {TEXT_INPUT_NAME: tokens})
            except Exception as error:  # no public base but Exception
                raise DimeFMError(
                    f"ONNX Runtime cannot run the text tower: {first_line(error)}",
                    hint="close something: memory may have run out; or " + EXPORT_AGAIN,
                ) from error
        return embeds

    def _check_signature(self, model_path: Path) -> None:
        length = self.tokenizer.spec.context_length
        inputs = {i.name: (i.type, list(i.shape[1:])) for i in self._session.get_inputs()}
        outputs = {o.name: (o.type, list(o.shape[1:])) for o in self._session.get_outputs()}
        wanted_in = {TEXT_INPUT_NAME: ("tensor(int64)", [length])}
        wanted_out = {TEXT_OUTPUT_NAME: ("tensor(float)", [self.embed_dim])}
        if inputs != wanted_in or outputs != wanted_out:
            raise CheckpointError(
                f"{model_path} takes {inputs} and gives {outputs}; the manifest says {wanted_in} "
                f"and {wanted_out}",
                hint=EXPORT_AGAIN,
            )


def load_text_encoder(bundle: Bundle, *, threads: int = 0) -> TextEncoder:
    """Load a bundle's text side.

    Args:
        bundle: A checked bundle; keep it while the encoder is used.
        threads: CPU threads of one call; 0 takes one per physical core.

    Raises:
        CheckpointError: If it has none, or it cannot be loaded.
        MissingExtraError: If ONNX Runtime is not installed.
    """
    if bundle.text is None:
        raise CheckpointError(
            f"{bundle.path} has no text side: it knows its baked label sets only",
            hint="dimefm-edge export RUN --text, or export --teacher NAME",
        )
    tokenizer = load_tokenizer(bundle.text.tokenizer_path, bundle.text.spec)
    return TextEncoder(
        bundle.text.model_path, tokenizer, embed_dim=bundle.embed_dim, threads=threads
    )


class LabelEncoder:
    """Label banks of any labels; each label is embedded once, so changing one costs one."""

    def __init__(self, encode_texts: Callable[[Sequence[str]], npt.NDArray[np.float32]]) -> None:
        self._encode_texts = encode_texts
        self._rows: dict[tuple[str, tuple[str, ...]], npt.NDArray[np.float32]] = {}

    def bank(
        self, labels: Sequence[str], *, templates: Sequence[str] = DEFAULT_TEMPLATES
    ) -> LabelBank:
        """Embed labels in every template, averaged as CLIP's zero-shot heads are.

        Args:
            labels: C names, repeated ones allowed.
            templates: Sentences with `{c}` where a label goes.

        Raises:
            DataError: If there is no template, or one lacks `{c}`.
            InputError: If there is no label, or one is blank.
        """
        labels, templates = tuple(labels), tuple(templates)
        blank = [i for i, label in enumerate(labels) if not label.strip()]
        if not labels or blank:
            what = f"label {blank[0]} of {len(labels)} is blank" if blank else "there are no labels"
            raise InputError(f"cannot classify: {what}", hint='labels=["a cat", "a dog"]')
        missing = [n for n in dict.fromkeys(labels) if (n, templates) not in self._rows]
        if missing:
            made = build_label_bank("labels", missing, templates, self._encode_texts)
            if len(self._rows) + len(missing) > _MAX_KEPT_LABELS:
                self._rows = {k: v for k, v in self._rows.items() if k[0] in labels}
            self._rows |= {(n, templates): e for n, e in zip(missing, made.embeds, strict=True)}
        embeds = np.stack([self._rows[label, templates] for label in labels])
        return LabelBank("labels", labels, templates, embeds)
