"""Commands that make files: embed, distill, export."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dimefm_edge.commands.outcome import Outcome
from dimefm_edge.errors import ConfigError, DataError, InputError, lookup
from dimefm_edge.tables import format_table

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    from dimefm_edge.config import RunConfig
    from dimefm_edge.data.images import ImagePool
    from dimefm_edge.labels import LabelBank
    from dimefm_edge.options import (
        DistillOptions,
        EmbedOptions,
        ExportOptions,
    )
    from dimefm_edge.preprocess import PreprocessSpec


_NUM_PARITY_IMAGES = 32
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
            teacher, texts, Path(options.store, "texts"), batch_size=2 * options.batch_size
        )
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
    rows = [(k, v["num_rows"], v["num_bad"], v["embed_dim"], v["path"]) for k, v in values.items()]
    table = format_table(("store", "rows", "unreadable", "E", "folder"), rows)
    return Outcome({"teacher": teacher.name} | values, table)


def run_distill(options: DistillOptions) -> Outcome | None:
    """Run the whole walk; None on ranks of torchrun other than 0."""
    from dimefm_edge import pipeline

    if options.dry_run:
        return _settings(pipeline.resolve(options.run))
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


def run_export(options: ExportOptions) -> Outcome:
    """Write a run as a bundle."""
    from dimefm_edge.export import EXPORTERS, export_student, graph_spec
    from dimefm_edge.runtime import load_bundle
    from dimefm_edge.students import load_student
    from dimefm_edge.subjects import run_logit_scale

    if not options.run:
        raise InputError("export needs a run", hint="dimefm-edge export runs/first")
    lookup(EXPORTERS, options.format, kind="export format")
    run = Path(options.run).expanduser()
    loaded = load_student(run)
    run_dir = run if run.is_dir() else run.parent
    out = options.out or run_dir / f"bundle-{options.precision}"
    banks, extra = _baked(run_dir, loaded.metadata)
    export_student(
        loaded,
        out,
        fmt=options.format,
        graph=graph_spec(None, precision=options.precision),
        label_banks=banks,
        parity_images=_parity_images(options, run_dir, loaded.preprocess),
        logit_scale=run_logit_scale(loaded.metadata, options.run),
        extra=extra,
    )
    bundle = load_bundle(out)
    parity = bundle.manifest["parity"]
    text = (
        f"{out}: {bundle.name}, {bundle.precision}, {bundle.size_mib:.2f} MiB, label sets: "
        f"{', '.join(bundle.label_banks) or 'none'}\nparity on {parity['num_images']} images: max "
        f"abs difference {parity['max_abs_diff']:.1e}, least cosine {parity['min_cosine']:.6f}"
    )
    values = {
        "bundle": str(out),
        "name": bundle.name,
        "precision": bundle.precision,
        "size_mib": bundle.size_mib,
        "label_sets": list(bundle.label_banks),
        "parity": parity,
    }
    return Outcome(values, text)


def _baked(run_dir: Path, metadata: dict[str, str]) -> tuple[Sequence[LabelBank], dict[str, Any]]:
    """Label banks and origin of a run: its bundle's, else made from its test sets."""
    from dimefm_edge.config import load_saved
    from dimefm_edge.data.images import open_labelled
    from dimefm_edge.labels import build_label_bank
    from dimefm_edge.runtime import load_bundle
    from dimefm_edge.teacher import TEXT_TEACHER_KEY, load_teacher

    teacher = metadata.get(TEXT_TEACHER_KEY)
    extra = {"target": metadata.get("target"), "teacher": teacher}
    if (run_dir / "bundle" / "manifest.json").is_file():
        return list(load_bundle(run_dir / "bundle").label_banks.values()), extra
    saved = load_saved(run_dir)
    sources = saved.data.eval_sets if saved else ()
    if not sources or teacher is None:
        return [], extra
    encode_texts = load_teacher(teacher).encode_texts
    sets = [open_labelled(source) for source in sources]
    banks = [build_label_bank(s.name, s.classnames, s.templates, encode_texts) for s in sets]
    return banks, extra


def _parity_images(
    options: ExportOptions, run_dir: Path, preprocess: PreprocessSpec
) -> npt.NDArray[np.float32]:
    from dimefm_edge.config import load_saved
    from dimefm_edge.data.images import open_images
    from dimefm_edge.preprocess import preprocess_images

    sources, column = options.images, options.image_column
    if not sources:
        saved = load_saved(run_dir)
        if saved is None:
            raise ConfigError(
                f"{run_dir} has no config.toml that names images to check parity on",
                hint="--images with a folder of real images",
            )
        sources, column = saved.data.images, saved.data.image_column
    images = _first_images(open_images(sources, column=column))
    if not images:
        raise DataError("none of the images can be read", hint="--images with real images")
    return preprocess_images(images, preprocess)


def _first_images(pool: ImagePool) -> list[Any]:
    from dimefm_edge.data.images import BadImageError

    images: list[Any] = []
    for row in range(min(len(pool), 10 * _NUM_PARITY_IMAGES)):
        try:
            images.append(pool.load(row))
        except BadImageError:
            continue
        if len(images) == _NUM_PARITY_IMAGES:
            break
    return images
