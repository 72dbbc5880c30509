"""The eval command: which models, which sets, which measures."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from dimefm_edge.commands.outcome import Outcome
from dimefm_edge.errors import DataError, InputError

if TYPE_CHECKING:
    from dimefm_edge.data.images import ImagePool, LabelledSet
    from dimefm_edge.options import EvalOptions
    from dimefm_edge.scorecard import EvalPlan
    from dimefm_edge.subjects import EncodeTexts, Subject
    from dimefm_edge.suites import EvalSet, MissingSet

_OWN = "own"


def run_eval(options: EvalOptions) -> Outcome:
    """Accuracy of one model or several."""
    names = options.subjects or ("",)
    if len(set(names)) < len(names):
        raise InputError("a model is named twice", hint="name each model once")
    from dimefm_edge.commands.score_tables import out_folder, tell_scores
    from dimefm_edge.files import make_out_folder
    from dimefm_edge.scorecard import score_subject
    from dimefm_edge.subjects import load_subject

    _check_libraries(options)
    plan, missing = _make_plan(options)
    out = out_folder(options)
    if out is not None:
        make_out_folder(out)
    # All are loaded and timed before any is scored: what is wrong shows in seconds, not hours.
    subjects = [load_subject(name, engine=options.engine) for name in names]
    texts = [
        s.encode_texts if options.teacher is None else _text_side(options.teacher, s)
        for s in subjects
    ]
    where, latencies = _latencies(options)
    params = {}
    if len(names) > 1 or options.plot:
        from dimefm_edge.commands.sizing import count_params

        params = {subject.name: count_params(subject) for subject in subjects}
    scores = [
        score_subject(subject, plan, encode_texts)
        for subject, encode_texts in zip(subjects, texts, strict=True)
    ]
    return tell_scores(options, scores, missing, params, where, latencies)


# ---------------------------------------------------------------------- what is measured


def _check_libraries(options: EvalOptions) -> None:
    """What the measures need is there, or the run ends before it has begun.

    Raises:
        MissingExtraError: If it is not.
    """
    if options.linear_probe is not None:
        from dimefm_edge.evaluate.metrics import import_sklearn

        import_sklearn("linear_model")
    if options.corruptions:
        from dimefm_edge.evaluate.robustness import import_imagecorruptions

        import_imagecorruptions()
    if options.plot:
        from dimefm_edge.score_plots import import_matplotlib

        import_matplotlib()


def _make_plan(options: EvalOptions) -> tuple[EvalPlan, list[MissingSet]]:
    from dimefm_edge.data.captioned import open_captioned
    from dimefm_edge.scorecard import EvalPlan

    sets, reference, missing = _open_sets(options)
    captioned = tuple(open_captioned(source) for source in options.retrieval)
    for kind in ([s.name for s in sets], [c.name for c in captioned]):
        if len(set(kind)) < len(kind):
            double = next(name for name in kind if kind.count(name) > 1)
            raise InputError(f"two test sets are called '{double}'", hint="rename a folder")
    if options.shift:
        reference = reference or (sets[0].name if sets else None)
        if len(sets) < 2:
            raise InputError(
                "a shift is between two test sets", hint="--data REFERENCE SHIFTED --shift"
            )
    plan = EvalPlan(
        sets=tuple(sets),
        captioned=captioned,
        reference=reference,
        with_ece=options.ece,
        with_corruptions=options.corruptions,
        corruption_images=options.corruption_images,
        seed=options.seed,
        batch_size=options.batch_size,
        workers=options.workers,
    )
    return plan, missing


def _open_sets(options: EvalOptions) -> tuple[list[EvalSet], str | None, list[MissingSet]]:
    """Labelled sets of --data and --suite, the suite's reference, and what it lacks here."""
    from dimefm_edge.data.images import open_labelled
    from dimefm_edge.suites import EvalSet, load_suite, open_suite

    sources = options.data
    if not sources and options.suite is None and not options.retrieval:
        own = (_own_sets(name) for name in options.subjects)
        sources = next((found for found in own if found), ())
        if not sources and any(options.subjects):
            raise InputError(
                "eval needs a labelled set", hint="--data scenes, or a folder of classes"
            )
    probe = options.linear_probe
    shared = open_labelled(probe) if probe not in (None, _OWN) else None
    sets = []
    for source in sources:
        test = open_labelled(source)
        train = _own_train(source) if probe == _OWN else shared
        sets.append(EvalSet(test, train=_if_same_classes(train, test.classnames)))
    reference: str | None = None
    missing: list[MissingSet] = []
    if options.suite is not None:
        suite = load_suite(options.suite)
        found, missing = open_suite(suite, options.data_root, with_train=probe == _OWN)
        if shared is not None:
            found = [
                EvalSet(s.test, s.metric, _if_same_classes(shared, s.test.classnames))
                for s in found
            ]
        sets += found
        reference = suite.reference
    if shared is not None:
        _refuse_fit_on_test(shared, probe, sets)
    if probe is not None and all(s.train is None for s in sets):
        what = f"'{probe}' has" if shared is not None else "the sets' own training splits have"
        raise DataError(
            f"{what} not the classes of any test set, so no linear probe can be fitted",
            hint="--linear-probe with a training set of the same class names",
        )
    return sets, reference, missing


def _refuse_fit_on_test(train: LabelledSet, probe: str | None, sets: Sequence[EvalSet]) -> None:
    """A probe that is fitted on the images that it is tested on tells nothing.

    Raises:
        InputError: If a test set is the training set.
    """
    for test in (s.test for s in sets):
        if _place(test.pool) == _place(train.pool):
            raise InputError(
                f"--linear-probe {probe} is the test set '{test.name}' itself: a probe must be "
                "fitted on other images than it is tested on",
                hint=f"--linear-probe {_OWN}: the training split beside each test set; or a "
                "training set of the same classes",
            )


def _place(pool: ImagePool) -> tuple[int, Path]:
    """Equal for the same images on this disk, however the user wrote where they are."""
    return len(pool), Path(pool.name(0)).resolve()


def _own_train(source: str) -> LabelledSet | None:
    """The training split of a CLIP-benchmark folder; None where there is none."""
    from dimefm_edge.data.images import open_labelled
    from dimefm_edge.data.labelled import list_tars

    if source == "scenes":
        return open_labelled("scenes-train")
    folder = Path(source).expanduser()
    return open_labelled(source, split="train") if list_tars(folder / "train") else None


def _if_same_classes(train: LabelledSet | None, classnames: tuple[str, ...]) -> LabelledSet | None:
    return train if train is not None and train.classnames == classnames else None


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


def _latencies(options: EvalOptions) -> tuple[str, dict[str, float]]:
    if options.latency == "auto" and not options.plot:
        return "", {}
    from dimefm_edge.commands.sizing import find_latencies

    return find_latencies(options.subjects, options.latency, engine=options.engine)
