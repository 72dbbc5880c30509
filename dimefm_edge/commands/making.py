"""Commands that make files: embed, corpus, distill."""

from __future__ import annotations

import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dimefm_edge.commands.outcome import Outcome
from dimefm_edge.errors import InputError
from dimefm_edge.tables import format_table

if TYPE_CHECKING:
    from dimefm_edge.config import RunConfig
    from dimefm_edge.options import CorpusOptions, DistillOptions, EmbedOptions


_OVER_BUDGET = 3


def run_embed(options: EmbedOptions) -> Outcome:
    """Fill a store with a teacher's embeddings."""
    if not options.store:
        raise InputError("embed needs a folder for the embeddings", hint="--store stores/mine")
    if not options.images and not options.texts:
        raise InputError("embed needs something to embed", hint="--images FOLDER --texts FILE")
    if options.batch_size < 1 or options.max_bad < 0:
        raise InputError("batch size must be positive, max bad not negative")
    from dimefm_edge.data.images import open_images
    from dimefm_edge.data.sentences import open_sentences
    from dimefm_edge.embed import embed_images, embed_texts
    from dimefm_edge.teacher import load_teacher

    pool = open_images(options.images, column=options.image_column) if options.images else None
    texts = open_sentences(options.texts, column=options.text_column) if options.texts else None
    teacher = load_teacher(options.teacher)
    stores = {}
    if pool is not None:
        stores["images"] = embed_images(
            teacher,
            pool,
            Path(options.store, "images"),
            max_bad=options.max_bad,
            batch_size=options.batch_size,
            workers=options.workers,
        )
    if texts is not None:
        stores["texts"] = embed_texts(
            teacher, texts, Path(options.store, "texts"), max_bad=options.max_bad,
            batch_size=2 * options.batch_size,
        )  # fmt: skip
    if options.verify:
        for store in stores.values():
            store.verify()
    values: dict[str, dict[str, Any]] = {
        kind: {
            "path": str(Path(options.store, kind)),
            "num_rows": len(store),
            "num_bad": len(store.manifest.bad_rows),
            "embed_dim": store.embed_dim,
            "teacher": store.manifest.teacher,
        }
        for kind, store in stores.items()
    }
    if texts is not None:  # no rows of the store, unlike images
        values["texts"]["num_bad"] = texts.stats.num_left_out
    rows = [(k, v["num_rows"], v["num_bad"], v["embed_dim"], v["path"]) for k, v in values.items()]
    table = format_table(("store", "rows", "left out", "E", "folder"), rows)
    return Outcome({"teacher": teacher.name} | values, table)


def run_corpus(options: CorpusOptions) -> Outcome:
    """Choose the sentences to distil on."""
    if options.out is None:
        raise InputError("corpus needs a folder for the sentences", hint="--out corpora/mine")
    if not options.images or not options.texts:
        raise InputError("corpus needs both sides", hint="--images FOLDER --texts FILE")
    if not 0 < options.keep <= 1 or options.top_k < 1:
        raise InputError("--keep must be in (0, 1] and --top-k 1 or more")
    if options.templates and not options.classnames:
        raise InputError("--templates needs the names", hint="--classnames FILE")
    from dimefm_edge.corpus import build_corpus
    from dimefm_edge.data.images import open_images
    from dimefm_edge.data.sentences import open_sentences
    from dimefm_edge.embed import embed_images, embed_texts
    from dimefm_edge.teacher import load_teacher

    prompts = _prompts(options)
    pool = open_images(options.images, column=options.image_column)
    sentences = open_sentences(options.texts, column=options.text_column)
    teacher = load_teacher(options.teacher)
    store_dir = Path(options.store) if options.store else options.out / "store"
    images = embed_images(
        teacher, pool, store_dir / "images", max_bad=options.max_bad, workers=options.workers
    )
    texts = embed_texts(teacher, sentences, store_dir / "texts", max_bad=options.max_bad)
    report = build_corpus(
        sentences, images, texts, options.out,
        keep=options.keep, threshold=options.threshold, top_k=options.top_k,
        near_duplicates=options.near_duplicates, prompts=prompts,
    )  # fmt: skip
    rows = [
        ("kept", report.num_kept),
        ("duplicates", report.num_duplicates),
        ("below the threshold", report.num_ungrounded),
        ("near duplicates", report.num_near_duplicates),
        ("prompts added", report.num_prompts),
    ]
    shown = "\n".join(
        f"{name}: {' | '.join(report.examples[name][:3])}"
        for name in ("best", "worst")
        if name in report.examples
    )
    text = f"{format_table(('sentences', 'count'), rows)}\n\nthreshold {report.threshold:.3f}\n"
    return Outcome({"out": str(options.out)} | asdict(report), f"{text}{shown}\n{options.out}")


def _prompts(options: CorpusOptions) -> list[str]:
    from dimefm_edge.data.labelled import open_classes, read_template_file
    from dimefm_edge.data.sentences import class_prompts

    if options.classnames is None:
        return []
    _, classnames, templates = open_classes(str(options.classnames))
    if options.templates is not None:
        if not options.templates.is_file():
            raise InputError(f"no templates at {options.templates}", hint="lines with {c}")
        templates = read_template_file(options.templates)
    return class_prompts(classnames, templates)


def run_distill(options: DistillOptions) -> Outcome | None:
    """Run the whole walk; None on ranks of torchrun other than 0."""
    from dimefm_edge import pipeline
    from dimefm_edge.config import DataConfig
    from dimefm_edge.data.sources import missing_path

    if options.dry_run:
        return _settings(pipeline.resolve(options.run))
    out = Path(options.run.out)
    if options.resume and options.run.data == DataConfig() and not out.exists():  # a slip, likely
        raise InputError(
            f"there is no run to go on with: {missing_path(out)}", hint="without --resume it begins"
        )
    report = pipeline.run(options.run, resume=options.resume)
    if report is None:
        return None
    exit_code = 0 if report.fits_budget else _OVER_BUDGET
    return Outcome(report.to_dict(), report.to_markdown(), exit_code, is_markdown=True)


def _settings(run: RunConfig) -> Outcome:
    from dimefm_edge import config as config_file

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "config.toml")
        config_file.save(run, path)
        return Outcome(asdict(run), path.read_text(encoding="utf-8").rstrip())
