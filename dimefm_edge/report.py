"""What a run is worth, in one page: `report.json` for scripts, `report.md` for people."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from dimefm_edge.evaluate.zero_shot import ZeroShotReport
from dimefm_edge.targets import LOCAL

COUNTS_DIFFER = 1.05
"""An exported graph's operators, counted, may come to that much more than the module's."""


@dataclass(frozen=True)
class AccuracyRow:
    """Zero-shot accuracy of teacher and student on one test set."""

    teacher: ZeroShotReport
    student: ZeroShotReport

    @property
    def is_above_chance(self) -> bool:
        """Whether the teacher's top-1 is two standard errors of guessing above it."""
        chance = self.teacher.chance_pct / 100
        error = math.sqrt(chance * (1 - chance) / self.teacher.num_images)
        return self.teacher.top1_pct > 100 * (chance + 2 * error)

    @property
    def retention_pct(self) -> float | None:
        """The student's top-1 as a share of the teacher's; None where the teacher guesses."""
        return 100 * self.student.top1_pct / self.teacher.top1_pct if self.is_above_chance else None


@dataclass(frozen=True)
class ModelRow:
    """Size and speed of one image tower, here and on the target."""

    name: str
    params_m: float
    gmacs: float
    target_ms: float
    target_low_ms: float
    target_high_ms: float
    here_runtime: str
    here_p50_ms: float
    here_p90_ms: float


@dataclass(frozen=True)
class PrecisionRow:
    """The student's graph in one precision."""

    name: str
    """fp32, int8 PTQ (by calibration) or int8 QAT (trained)."""
    top1_pct: dict[str, float]
    """Zero-shot, by test set."""
    mean_cosine: float
    """Of its embeddings to those of the first row."""
    size_mib: float
    """Of the graph's file."""
    here_p50_ms: float
    integer_products: int
    """Products that ran in integers in ONNX Runtime here."""
    float_products: tuple[str, ...]
    """Those that did not, by name."""


@dataclass(frozen=True)
class TextRow:
    """Size and speed of one text tower, here; one sentence, its words included."""

    name: str
    params_m: float
    size_mib: float | None
    """Of the graph's file; None where there is no graph."""
    here_runtime: str
    here_p50_ms: float
    here_p90_ms: float


@dataclass(frozen=True)
class TextAccuracyRow:
    """Zero-shot top-1 on one test set, of both sides' images by both sides' labels."""

    name: str
    teacher_image_teacher_text_pct: float
    teacher_image_student_text_pct: float
    student_image_teacher_text_pct: float
    student_image_student_text_pct: float
    label_cosine_mean: float
    """Of the student's label embeddings to the teacher's."""
    label_cosine_min: float


@dataclass(frozen=True)
class TextReport:
    """The text student beside the teacher's text tower."""

    teacher: TextRow
    student: TextRow
    spec: dict[str, Any]
    inherited: tuple[str, ...]
    accuracy: tuple[TextAccuracyRow, ...]
    parity: dict[str, Any]
    training: dict[str, Any]
    init_from: str | None = None
    """The run whose text student was trained on."""

    def lines(self) -> list[str]:
        """Its part of the page."""
        lines = [
            "",
            "| text encoder | parameters | file | here p50 / p90 |",
            "|---|---:|---:|---:|",
        ]
        for row in (self.teacher, self.student):
            size = "-" if row.size_mib is None else f"{row.size_mib:.2f} MiB"
            lines.append(
                f"| {_cell(row.name)} | {row.params_m:.2f} M | {size} "
                f"| {row.here_p50_ms:.2f} / {row.here_p90_ms:.2f} ms ({row.here_runtime}) |"
            )
        if self.accuracy:
            lines += [
                "",
                "| zero-shot top-1: images by, labels by | teacher, teacher | teacher, student "
                "| student, teacher | student, student | cosine of labels: mean, least |",
                "|---|---:|---:|---:|---:|---:|",
            ]
        for entry in self.accuracy:
            lines.append(
                f"| {_cell(entry.name)} | {entry.teacher_image_teacher_text_pct:.1f}% "
                f"| {entry.teacher_image_student_text_pct:.1f}% "
                f"| {entry.student_image_teacher_text_pct:.1f}% "
                f"| {entry.student_image_student_text_pct:.1f}% "
                f"| {entry.label_cosine_mean:.3f}, {entry.label_cosine_min:.3f} |"
            )
        return lines

    def notes(self) -> list[str]:
        """What is said of it below the tables."""
        found = self.training
        source = f"{len(self.inherited)} tensors from the teacher's" if self.inherited else "random"
        if self.init_from is not None:
            source = f"those of `{self.init_from}`"
        return [
            f"- Text student: {found['steps']} steps, {found['sentences_per_s']:.0f} sentences/s; "
            f"initial weights {source}; parity on {self.parity.get('num_sentences')} sentences: "
            f"least cosine {self.parity.get('min_cosine', float('nan')):.6f}. The bundle's baked "
            "labels are the teacher's; any other label is embedded by the student.",
        ]


@dataclass(frozen=True)
class CutRow:
    """A smaller student within an elastic one, in PyTorch."""

    name: str
    params_m: float
    gmacs: float
    target_ms: float
    """Of one image, estimated."""
    top1_pct: dict[str, float]
    """Zero-shot, by test set."""


@dataclass(frozen=True)
class RunReport:
    """The outcome of `dimefm-edge distill`.

    Latencies are of one image; `here_*` were measured on this machine with the
    runtime named, teacher and student in turn; `target_*` are estimated, with an interval.
    """

    run_dir: str
    bundle: str
    target: str
    runtime: str
    target_precision: str
    precision: str
    budget_ms: float
    teacher: ModelRow
    student: ModelRow
    student_spec: dict[str, Any]
    inherited: tuple[str, ...]
    accuracy: tuple[AccuracyRow, ...]
    parity: dict[str, Any]
    training: dict[str, Any]
    data: dict[str, Any]
    seconds: dict[str, float]
    machine: dict[str, Any]
    precisions: tuple[PrecisionRow, ...] = ()
    """fp32 and int8 side by side, where int8 was asked for."""
    kept_float: tuple[str, ...] = ()
    """Layers that `--max-drop` left in float."""
    int8_training: dict[str, Any] | None = None
    """As `training`, of the int8 stage."""
    exported_ms: float | None = None
    """One image on the target, estimated from the exported graph; on `local`, measured."""
    text: TextReport | None = None
    """Where a text student was asked for."""
    cuts: tuple[CutRow, ...] = ()
    """Of an elastic student, the smallest first, itself last."""
    init_from: str | None = None
    """The run whose student was trained on."""

    @property
    def is_local(self) -> bool:
        return self.target.partition("@")[0] == LOCAL

    @property
    def fits_budget(self) -> bool:
        """By the exported graph where there is one."""
        if self.exported_ms is None:
            return self.student.target_ms <= self.budget_ms
        return self.exported_ms <= self.budget_ms * (1.0 if self.is_local else COUNTS_DIFFER)

    @property
    def latency_ratio(self) -> float:
        """The student's latency here as a share of the teacher's."""
        return self.student.here_p50_ms / self.teacher.here_p50_ms

    def to_dict(self) -> dict[str, Any]:
        """Everything, with the derived figures, ready for JSON."""
        values = dataclasses.asdict(self)
        values["accuracy"] = [
            {**dataclasses.asdict(row), "retention_pct": row.retention_pct} for row in self.accuracy
        ]
        values["fits_budget"] = self.fits_budget
        values["latency_ratio"] = self.latency_ratio
        return values

    def to_markdown(self) -> str:
        """The page that is printed at the end of a run."""
        lines = [
            f"# {self.student.name} for {self.target}",
            "",
            f"Distilled from `{self.teacher.name}` on images of "
            f"{self.student_spec['image_size']} px; budget {self.budget_ms:.3g} ms on "
            f"{self.target} ({self.runtime} {self.target_precision}), estimated "
            f"{self.student.target_ms:.3g} ms{self._exported()}: "
            + ("met." if self.fits_budget else "NOT MET."),
            *_accuracy_lines(self.accuracy),
            "",
            "| image tower | parameters | GMACs | here p50 / p90 | estimate on the target |",
            "|---|---:|---:|---:|---:|",
        ]
        for model in (self.teacher, self.student):
            lines.append(
                f"| {_cell(model.name)} | {model.params_m:.2f} M | {model.gmacs:.3f} "
                f"| {model.here_p50_ms:.2f} / {model.here_p90_ms:.2f} ms "
                f"| {model.target_ms:.3g} ms ({model.target_low_ms:.2g} to "
                f"{model.target_high_ms:.2g}) |"
            )
        lines += _precision_lines(self.precisions)
        lines += _cut_lines(self.cuts)
        lines += self.text.lines() if self.text else []
        parity = self.parity
        lines += [
            "",
            f"Here = one image on {self.machine.get('cpu', 'this CPU')}, teacher "
            f"({self.teacher.here_runtime}) and student ({self.student.here_runtime}) in turn: "
            f"the student takes {self.latency_ratio:.2f} of the teacher's time."
            + (
                ""
                if self.is_local
                else " The estimate was "
                "not measured there: `dimefm-edge bench` on the device measures."
            ),
            "",
            f"- Parity of the exported graph with PyTorch on {parity.get('num_images')} images: "
            f"max abs difference {parity.get('max_abs_diff', float('nan')):.1e}, "
            f"least cosine {parity.get('min_cosine', float('nan')):.6f}.",
            f"- Training: {self.training['steps']} steps, {self.training['images_per_s']:.0f} "
            f"images/s, data wait {self.training['data_wait_pct']:.1f}%; "
            f"{self.data['num_images']} images ({self.data['num_bad']} unreadable), "
            f"{self._sentences()}.",
            *self._guessing(),
            f"- Initial weights: {self._initial_weights()}.",
            "- Time: "
            + ", ".join(f"{name} {value:.0f} s" for name, value in self.seconds.items())
            + ".",
            *self._int8_lines(),
            *self._cut_notes(),
            *(self.text.notes() if self.text else []),
            f"- Bundle: `{self.bundle}`",
            "",
        ]
        return "\n".join(lines)

    def _exported(self) -> str:
        if self.exported_ms is None:
            return ""
        how = "measured" if self.is_local else "estimated"
        return f", the exported graph {how} at {self.exported_ms:.3g} ms"

    def _sentences(self) -> str:
        used, embedded = self.data["num_texts"], self.data["num_texts_embedded"]
        left_out = self.data["num_texts_left_out"]
        share = "" if used == embedded else f" of {embedded}"
        return f"{used}{share} sentences" + (f" ({left_out} left out)" if left_out else "")

    def _guessing(self) -> list[str]:
        return [
            f"- The teacher knows nothing of {_cell(found.name)} ({found.top1_pct:.1f}% of "
            f"{found.num_images} images, chance {found.chance_pct:.1f}%): name another `--teacher`"
            + (", or test on more." if found.top1_pct > found.chance_pct else ".")
            for found in (row.teacher for row in self.accuracy if not row.is_above_chance)
        ]

    def _initial_weights(self) -> str:
        if self.init_from is not None:
            return f"those of `{self.init_from}`"
        return f"{len(self.inherited)} tensors from the teacher" if self.inherited else "random"

    def _cut_notes(self) -> list[str]:
        if not self.cuts:
            return []
        return [
            f"- {len(self.cuts) - 1} smaller students lie within this one: `dimefm-edge fit "
            f"--elastic {self.run_dir} --latency-ms MS --out FOLDER` takes the best one out."
        ]

    def _int8_lines(self) -> list[str]:
        lines = []
        if self.int8_training is not None:
            found = self.int8_training
            rate = f"{found['steps']} steps, {found['images_per_s']:.0f} images/s"
            lines.append(f"- Training in int8: {rate}.")
        if self.kept_float:
            names = ", ".join(f"`{name}`" for name in self.kept_float)
            lines.append(f"- Left in float to lose no more than was allowed: {names}.")
        if self.text is not None and self.precision == "int8":
            lines.append(
                "- The text side is not in int8: labels are embedded once. On ONNX Runtime "
                f"`dimefm-edge export {self.run_dir} --text-precision int8` stores it in 8 bits."
            )
        return lines


def _accuracy_lines(rows: tuple[AccuracyRow, ...]) -> list[str]:
    lines = [
        "",
        "| zero-shot top-1 | classes | chance | teacher | student | retention |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    for row in rows:
        retention = "-" if row.retention_pct is None else f"{row.retention_pct:.1f}%"
        lines.append(
            f"| {_cell(row.teacher.name)} | {row.teacher.num_classes} "
            f"| {row.teacher.chance_pct:.1f}% | {row.teacher.top1_pct:.1f}% "
            f"| {row.student.top1_pct:.1f}% | {retention} |"
        )
    return lines if rows else [*lines, "| none given (`--eval-sets`) | | | | | |"]


def _precision_lines(rows: tuple[PrecisionRow, ...]) -> list[str]:
    columns = ("cosine to fp32", "file", "here p50", "in integers")
    cells = []
    for row in rows:
        total = row.integer_products + len(row.float_products)
        cells.append([
            row.name, row.top1_pct, f"{row.mean_cosine:.5f}", f"{row.size_mib:.2f} MiB",
            f"{row.here_p50_ms:.2f} ms", f"{row.integer_products} of {total} products",
        ])  # fmt: skip
    return _top1_table("student in", columns, cells)


def _cut_lines(rows: tuple[CutRow, ...]) -> list[str]:
    columns = ("parameters", "GMACs", "estimate on the target")
    cells = [
        [row.name, row.top1_pct, f"{row.params_m:.2f} M", f"{row.gmacs:.3f}",
         f"{row.target_ms:.3g} ms"]
        for row in rows
    ]  # fmt: skip
    return _top1_table("students within", columns, cells)


def _top1_table(title: str, columns: Sequence[str], rows: Sequence[list[Any]]) -> list[str]:
    """Rows of a name, top-1 by test set, and text for each further column; nothing without rows."""
    if not rows:
        return []
    sets = list(rows[0][1])
    heads = [title, *(f"{_cell(name)} top-1" for name in sets), *columns]
    lines = ["", f"| {' | '.join(heads)} |", "|---|" + "---:|" * (len(heads) - 1)]
    for name, top1_pct, *rest in rows:
        cells = [_cell(name), *(f"{top1_pct[test]:.1f}%" for test in sets), *rest]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def _cell(name: str) -> str:
    """A name as one cell of a table: folders may hold bars and line ends in theirs."""
    return " ".join(name.replace("|", "\\|").split())
