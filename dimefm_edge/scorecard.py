"""All measures of one model: each image is embedded once, and every measure reads the embeddings.

A subject is anything that embeds images (`subjects.py`); which sets and which measures is an
`EvalPlan`. Figures of several subjects are compared with those of the first.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from dimefm_edge.data.captioned import CaptionedSet
from dimefm_edge.data.images import LabelledSet
from dimefm_edge.data.multilabel import MultiLabelSet
from dimefm_edge.errors import DataError, InputError
from dimefm_edge.evaluate.calibration import CalibrationReport, measure_calibration
from dimefm_edge.evaluate.features import Features, embed_pool
from dimefm_edge.evaluate.linear_probe import (
    MAX_TRIED,
    LinearProbe,
    LinearProbeReport,
    evaluate_linear_probe,
    fit_linear_probe,
)
from dimefm_edge.evaluate.metrics import Metric, score_metric
from dimefm_edge.evaluate.retrieval import RetrievalReport, measure_retrieval, unique_sentences
from dimefm_edge.evaluate.robustness import (
    CorruptionReport,
    ScoredSet,
    ShiftReport,
    chosen_rows,
    evaluate_corruptions,
    measure_shift,
    num_passes,
)
from dimefm_edge.evaluate.zero_shot import ZeroShotReport, cosine_scores, score_zero_shot
from dimefm_edge.labels import LabelBank
from dimefm_edge.progress import counting
from dimefm_edge.subjects import EncodeTexts, Subject, label_bank_of
from dimefm_edge.suites import EvalSet

_SENTENCES_PER_CALL = 1024
METRIC_TITLES: dict[Metric, str] = {
    "accuracy": "zero-shot top-1",
    "mean_per_class": "zero-shot mean per class",
    "map_11_point": "zero-shot 11-point mAP",
    "roc_auc": "zero-shot ROC AUC",
}


@dataclass(frozen=True)
class EvalPlan:
    """What is measured."""

    sets: tuple[EvalSet, ...]
    captioned: tuple[CaptionedSet, ...] = ()
    reference: str | None = None
    """Test set that natural shift is measured from; it comes before the others."""
    with_ece: bool = False
    with_corruptions: bool = False
    corruption_images: int = 0
    """Of each set; 0 takes all."""
    seed: int = 0
    batch_size: int = 250
    workers: int = 0


@dataclass(frozen=True)
class SetScore:
    """A subject on one labelled set."""

    name: str
    metric: Metric
    value_pct: float
    """The set's own metric, zero-shot."""
    num_images: int
    num_classes: int
    num_bad: int
    zero_shot: ZeroShotReport | None = None
    """None for sets with several classes an image."""
    linear_probe: LinearProbeReport | None = None
    calibration: CalibrationReport | None = None
    corruptions: CorruptionReport | None = None
    shift: ShiftReport | None = None


@dataclass(frozen=True)
class SubjectScore:
    """A subject on all sets."""

    name: str
    kind: str
    sets: tuple[SetScore, ...]
    retrieval: tuple[RetrievalReport, ...] = ()
    reference: str | None = None
    """Set that natural shift was measured from."""

    @property
    def averaged(self) -> tuple[SetScore, ...]:
        """The sets that the mean is over: without the reference, where others were shifted."""
        others = tuple(entry for entry in self.sets if entry.name != self.reference)
        return others or self.sets

    @property
    def mean_pct(self) -> float | None:
        """Of the sets' own metrics, zero-shot; None without a labelled set."""
        return float(np.mean([s.value_pct for s in self.averaged])) if self.sets else None

    def to_dict(self) -> dict[str, Any]:
        """Everything, with the derived figures, ready for JSON."""
        values = dataclasses.asdict(self) | {"mean_pct": self.mean_pct}
        for entry, score in zip(values["sets"], self.sets, strict=True):
            if score.corruptions is not None:
                entry["corruptions"]["mean_top1_pct"] = score.corruptions.mean_top1_pct
                entry["corruptions"]["kept_pct"] = score.corruptions.kept_pct
            if score.shift is not None:
                entry["shift"]["drop_points"] = score.shift.drop_points
                entry["shift"]["relative_drop_pct"] = score.shift.relative_drop_pct
        for entry, report in zip(values["retrieval"], self.retrieval, strict=True):
            entry["mean_recall_pct"] = report.mean_recall_pct
        return values


@dataclass(frozen=True)
class Figure:
    """One number of a subject."""

    set_name: str
    measure: str
    value: float
    """In percent, or percentage points."""
    is_gain: bool = True
    """Whether more is better, so that a share of the first subject's has a meaning."""


def score_subject(
    subject: Subject, plan: EvalPlan, encode_texts: EncodeTexts | None = None
) -> SubjectScore:
    """Take all measures of one subject, with a progress bar for each set.

    Args:
        subject: The model.
        plan: What is measured.
        encode_texts: Its text side, or that of its teacher; without one, the label sets that a
            bundle carries are used.

    Raises:
        DimeFMError: If class names cannot be embedded, a set cannot be read, or a library that
            a measure needs is not installed.
    """
    walk = _Walk(subject, plan, encode_texts)
    sets = tuple(walk.score(eval_set) for eval_set in plan.sets)
    retrieval = tuple(walk.retrieve(captioned) for captioned in plan.captioned)
    return SubjectScore(subject.name, subject.kind, sets, retrieval, plan.reference)


@dataclass
class _Walk:
    """One subject's way through the sets; training sets are embedded once."""

    subject: Subject
    plan: EvalPlan
    encode_texts: EncodeTexts | None
    probes: dict[int, LinearProbe] = field(default_factory=dict)
    reference: ScoredSet | None = None

    def score(self, eval_set: EvalSet) -> SetScore:
        test = eval_set.test
        bank = self.bank(test)
        features = self.embed(test)
        scores = cosine_scores(features, bank)
        score = SetScore(
            test.name, eval_set.metric,
            score_metric(eval_set.metric, scores, _truth(test)[features.rows]),
            len(features.rows), len(test.classnames), features.num_bad,
        )  # fmt: skip
        score = dataclasses.replace(score, linear_probe=self.probe(eval_set, features))
        if isinstance(test, MultiLabelSet):
            return score
        labels = test.labels[features.rows]
        scale = self.subject.logit_scale
        return dataclasses.replace(
            score,
            zero_shot=score_zero_shot(features, test, bank),
            calibration=measure_calibration(test.name, scores, labels, scale)
            if self.plan.with_ece
            else None,
            corruptions=self.corrupt(test, bank) if self.plan.with_corruptions else None,
            shift=self.shift(ScoredSet(test.name, test.classnames, scores, labels)),
        )

    def bank(self, test: LabelledSet | MultiLabelSet) -> LabelBank:
        encode = self.encode_texts
        total = len(test.classnames) * len(test.templates) if encode is not None else 0
        with counting(f"{self.subject.name}: prompts of {test.name}", total) as advance:

            def told(sentences: Sequence[str]) -> npt.NDArray[np.float32]:
                assert encode is not None
                embeds = encode(sentences)
                advance(len(sentences))
                return embeds

            return label_bank_of(
                self.subject, test.name, test.classnames, test.templates,
                told if encode is not None else None,
            )  # fmt: skip

    def embed(self, labelled: LabelledSet | MultiLabelSet | CaptionedSet) -> Features:
        title = f"{self.subject.name}: {labelled.name}"
        with counting(title, len(labelled.pool)) as advance:
            return embed_pool(
                self.subject.encode_pixels, self.subject.preprocess, labelled.pool,
                name=labelled.name, batch_size=self.plan.batch_size, workers=self.plan.workers,
                advance=advance,
            )  # fmt: skip

    def probe(self, eval_set: EvalSet, features: Features) -> LinearProbeReport | None:
        train, test = eval_set.train, eval_set.test
        if train is None:
            return None
        if id(train) not in self.probes:
            learned = self.embed(train)
            title = f"{self.subject.name}: probe on {train.name}"
            with counting(title, MAX_TRIED) as advance:
                probe = fit_linear_probe(
                    learned.embeds, _truth(train)[learned.rows], len(train.classnames),
                    name=train.name, seed=self.plan.seed, advance=advance,
                )  # fmt: skip
                advance(MAX_TRIED - len(probe.tried))
            self.probes[id(train)] = probe
        return evaluate_linear_probe(
            self.probes[id(train)], features.embeds, _truth(test)[features.rows],
            name=test.name, train_name=train.name, metric=eval_set.metric,
        )  # fmt: skip

    def corrupt(self, test: LabelledSet, bank: LabelBank) -> CorruptionReport:
        plan = self.plan
        count = len(chosen_rows(len(test.pool), plan.corruption_images, plan.seed))
        title = f"{self.subject.name}: {test.name} corrupted"
        with counting(title, count * num_passes()) as advance:
            return evaluate_corruptions(
                self.subject.encode_pixels, self.subject.preprocess, test, bank,
                num_images=plan.corruption_images, seed=plan.seed, batch_size=plan.batch_size,
                workers=plan.workers, advance=advance,
            )  # fmt: skip

    def shift(self, scored: ScoredSet) -> ShiftReport | None:
        if self.plan.reference is None:
            return None
        if scored.name == self.plan.reference:
            self.reference = scored
            return None
        try:
            return measure_shift(self.reference, scored) if self.reference is not None else None
        except DataError:  # ObjectNet's class names are its own
            return None

    def retrieve(self, captioned: CaptionedSet) -> RetrievalReport:
        if self.encode_texts is None:
            raise InputError(
                f"{self.subject.name} has no text side, which retrieval needs",
                hint="--teacher with the teacher that it was distilled from",
            )
        features = self.embed(captioned)
        sentences, own = unique_sentences(captioned.captions)
        texts = []
        with counting(f"{self.subject.name}: sentences", len(sentences)) as advance:
            for start in range(0, len(sentences), _SENTENCES_PER_CALL):
                part = sentences[start : start + _SENTENCES_PER_CALL]
                texts.append(np.asarray(self.encode_texts(part), np.float32))
                advance(len(part))
        return measure_retrieval(
            captioned.name, features.embeds, np.concatenate(texts),
            [own[row] for row in features.rows], num_bad=features.num_bad,
        )  # fmt: skip


def _truth(
    labelled: LabelledSet | MultiLabelSet,
) -> npt.NDArray[np.int64] | npt.NDArray[np.bool_]:
    """(N,) classes, or (N, C) whether image n shows class c."""
    return labelled.labels if isinstance(labelled, LabelledSet) else labelled.targets


def is_zero_shot_only(score: SubjectScore) -> bool:
    """Whether there is nothing to tell but top-1 and top-5."""
    return not score.retrieval and all(
        entry.metric == "accuracy"
        and (entry.linear_probe, entry.calibration, entry.corruptions, entry.shift) == (None,) * 4
        for entry in score.sets
    )


def figures_of(score: SubjectScore, first: SubjectScore | None = None) -> list[Figure]:
    """Every number of a subject, in the order of the sets.

    Args:
        score: The subject.
        first: What it is compared to: its corruption errors stand for AlexNet's in mCE.
    """
    found = []
    for entry in score.sets:
        found.append(Figure(entry.name, METRIC_TITLES[entry.metric], entry.value_pct))
        if entry.zero_shot is not None:
            if entry.metric != "accuracy":
                found.append(Figure(entry.name, "zero-shot top-1", entry.zero_shot.top1_pct))
            found.append(Figure(entry.name, "zero-shot top-5", entry.zero_shot.top5_pct))
        found += _extra_figures(entry)
        theirs = next((e for e in first.sets if e.name == entry.name), None) if first else None
        if entry.corruptions is not None and theirs is not None and theirs.corruptions is not None:
            mce = entry.corruptions.mean_corruption_error_pct(theirs.corruptions)
            found.append(Figure(entry.name, "mCE, first model 100", mce, False))
    for report in score.retrieval:
        for way, recalls in (
            ("image to text", report.image_to_text_pct), ("text to image", report.text_to_image_pct)
        ):  # fmt: skip
            found += [Figure(report.name, f"{way} recall@{k}", v) for k, v in recalls.items()]
    return found + _means(score)


def _means(score: SubjectScore) -> list[Figure]:
    """As the field reports a suite: the mean over its sets, each by its own metric."""
    found = []
    if score.mean_pct is not None and len(score.averaged) > 1:
        found.append(Figure(f"mean of {len(score.averaged)} sets", "zero-shot", score.mean_pct))
    probes = [s.linear_probe.value_pct for s in score.averaged if s.linear_probe is not None]
    if len(probes) > 1:
        found.append(Figure(f"mean of {len(probes)} sets", "linear probe", float(np.mean(probes))))
    return found


def _extra_figures(entry: SetScore) -> list[Figure]:
    found = []
    if entry.linear_probe is not None:
        title = METRIC_TITLES[entry.metric].replace("zero-shot", "linear probe")
        found.append(Figure(entry.name, title, entry.linear_probe.value_pct))
    if entry.calibration is not None:
        found.append(Figure(entry.name, "ECE", entry.calibration.ece_pct, False))
        found.append(
            Figure(entry.name, "ECE, equal mass", entry.calibration.ece_equal_mass_pct, False)
        )
    if entry.corruptions is not None:
        found.append(Figure(entry.name, "corrupted top-1", entry.corruptions.mean_top1_pct))
    if entry.shift is not None:
        found.append(
            Figure(entry.name, f"drop from {entry.shift.reference}, points",
                   entry.shift.drop_points, False)
        )  # fmt: skip
    return found


def retention_pct(figure: Figure, reference: Sequence[Figure]) -> float | None:
    """A figure as a share of the first subject's; None where that has no meaning."""
    for other in reference:
        if (other.set_name, other.measure) == (figure.set_name, figure.measure):
            return 100 * figure.value / other.value if figure.is_gain and other.value else None
    return None
