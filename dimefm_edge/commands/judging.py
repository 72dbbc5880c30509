"""Commands that judge what is there: doctor; and zero-shot accuracy for `build`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING

from dimefm_edge.commands.outcome import Outcome
from dimefm_edge.tables import format_table

if TYPE_CHECKING:
    from dimefm_edge.data.images import LabelledSet
    from dimefm_edge.evaluate.zero_shot import ZeroShotReport
    from dimefm_edge.options import DoctorOptions
    from dimefm_edge.subjects import EncodeTexts, Subject


_FAILED = 1


def evaluate_subject(
    subject: Subject,
    labelled_sets: Sequence[LabelledSet],
    encode_texts: EncodeTexts | None = None,
    *,
    batch_size: int = 250,
    workers: int = 0,
) -> list[ZeroShotReport]:
    """Zero-shot accuracy of one subject; class names it does not carry need `encode_texts`."""
    from dimefm_edge.evaluate.zero_shot import evaluate_zero_shot
    from dimefm_edge.subjects import label_bank_of

    return [
        evaluate_zero_shot(
            subject.encode_pixels,
            subject.preprocess,
            labelled,
            label_bank_of(
                subject, labelled.name, labelled.classnames, labelled.templates, encode_texts
            ),
            batch_size=batch_size,
            workers=workers,
        )
        for labelled in labelled_sets
    ]


def run_doctor(options: DoctorOptions) -> Outcome:
    """Look at this machine."""
    from dimefm_edge.doctor import examine

    checks = examine(options.disk)
    rows = [(c.status, c.name, c.detail, c.mend or "") for c in checks]
    text = format_table(("", "what", "found", "mend"), rows)
    broken = any(c.status == "missing" and c.is_required for c in checks)
    values = {"ok": not broken, "checks": [asdict(c) for c in checks]}
    return Outcome(values, text, _FAILED if broken else 0)
