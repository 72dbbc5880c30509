"""Commands that judge what is there: eval, doctor."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from dimefm_edge.commands.outcome import Outcome
from dimefm_edge.errors import CheckpointError, InputError
from dimefm_edge.tables import format_table

if TYPE_CHECKING:
    from dimefm_edge.data.images import LabelledSet
    from dimefm_edge.evaluate.zero_shot import ZeroShotReport
    from dimefm_edge.labels import LabelBank
    from dimefm_edge.options import DoctorOptions, EvalOptions
    from dimefm_edge.subjects import EncodeTexts, Subject


_FAILED = 1


def run_eval(options: EvalOptions) -> Outcome:
    """Zero-shot accuracy on labelled sets."""
    sources = options.data or _own_sets(options.subject)
    if not sources:
        raise InputError("eval needs a labelled set", hint="--data scenes, or a folder of classes")
    from dimefm_edge.data.images import open_labelled
    from dimefm_edge.subjects import load_subject

    labelled_sets = [open_labelled(source) for source in sources]
    subject = load_subject(options.subject, engine=options.engine)
    encode_texts = subject.encode_texts
    if options.teacher is not None:
        encode_texts = _text_side(options.teacher, subject)
    reports = evaluate_subject(
        subject,
        labelled_sets,
        encode_texts,
        batch_size=options.batch_size,
        workers=options.workers,
    )
    rows = [
        (r.name, r.num_classes, r.num_images, r.num_bad, r.chance_pct, r.top1_pct, r.top5_pct)
        for r in reports
    ]
    headers = ("zero-shot", "classes", "images", "unreadable", "chance %", "top-1 %", "top-5 %")
    text = f"{subject.kind} {subject.name}\n\n{format_table(headers, rows)}"
    values = {
        "subject": subject.name,
        "kind": subject.kind,
        "results": [asdict(r) for r in reports],
    }
    return Outcome(values, text)


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

    return [
        evaluate_zero_shot(
            subject.encode_pixels,
            subject.preprocess,
            labelled,
            _bank_of(subject, labelled, encode_texts),
            batch_size=batch_size,
            workers=workers,
        )
        for labelled in labelled_sets
    ]


def _own_sets(subject: str) -> tuple[str, ...]:
    """The test sets of the run that this is, or whose bundle it is."""
    from dimefm_edge.config import load_saved

    path = Path(subject).expanduser()
    if not path.is_dir():
        return ()
    saved = load_saved(path) or load_saved(path.parent)
    return saved.data.eval_sets if saved else ()


def _text_side(teacher: str, subject: Subject) -> EncodeTexts:
    from dimefm_edge.teacher import load_teacher

    loaded = load_teacher(teacher)
    if loaded.embed_dim != subject.embed_dim:
        raise InputError(
            f"teacher {teacher} answers in {loaded.embed_dim} dimensions, {subject.name} in "
            f"{subject.embed_dim}",
            hint="--teacher with the teacher that it was distilled from",
        )
    return loaded.encode_texts


def _bank_of(
    subject: Subject, labelled: LabelledSet, encode_texts: EncodeTexts | None
) -> LabelBank:
    """The set's class names as embeddings: baked in the bundle, else embedded now."""
    from dimefm_edge.labels import build_label_bank

    if encode_texts is not None:
        return build_label_bank(
            labelled.name, labelled.classnames, labelled.templates, encode_texts
        )
    for bank in subject.label_banks.values():
        if bank.classnames == labelled.classnames:
            return bank
    carried = ", ".join(subject.label_banks) or "none"
    raise CheckpointError(
        f"{subject.name} has no text side and does not carry the class names of '{labelled.name}' "
        f"(it carries: {carried})",
        hint="--teacher with the teacher that it was distilled from, or evaluate the run",
    )


def run_doctor(options: DoctorOptions) -> Outcome:
    """Look at this machine."""
    from dimefm_edge.doctor import examine

    checks = examine(options.disk)
    rows = [(c.status, c.name, c.detail, c.mend or "") for c in checks]
    text = format_table(("", "what", "found", "mend"), rows)
    broken = any(c.status == "missing" and c.is_required for c in checks)
    values = {"ok": not broken, "checks": [asdict(c) for c in checks]}
    return Outcome(values, text, _FAILED if broken else 0)
