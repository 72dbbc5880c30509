"""The page about a run: derived figures, JSON with everything, tables that hold together."""

from __future__ import annotations

import dataclasses
import json
import re

import pytest

from dimefm_edge.evaluate.zero_shot import ZeroShotReport
from dimefm_edge.report import (
    AccuracyRow,
    CutRow,
    ModelRow,
    PrecisionRow,
    RunReport,
    TextReport,
    TextRow,
)

TEACHER = ModelRow("ViT-L-14", 303.97, 77.83, 41.7, 31.2, 55.5, "PyTorch", 812.25, 850.75)
STUDENT = ModelRow("vit_s16", 22.05, 4.25, 4.36, 3.27, 5.81, "ONNX Runtime", 81.23, 97.5)


def scored(name: str, top1: float, num_classes: int = 8) -> ZeroShotReport:
    return ZeroShotReport(name, top1, top1 + 1.25, 100 / num_classes, 4321, num_classes, 17)


def accuracy(name: str, teacher: float, student: float) -> AccuracyRow:
    return AccuracyRow(scored(name, teacher), scored(name, student))


def make(**changes) -> RunReport:
    report = RunReport(
        run_dir="runs/a",
        bundle="runs/a/bundle",
        target="Jetson Orin Nano",
        runtime="TensorRT",
        target_precision="fp16",
        precision="fp32",
        budget_ms=5.0,
        teacher=TEACHER,
        student=STUDENT,
        student_spec={"family": "vit", "image_size": 224, "stages": (1, 2)},
        inherited=("blocks.0", "blocks.1", "head"),
        accuracy=(accuracy("cifar10", 90.0, 72.0), accuracy("scenes", 64.25, 64.25)),
        parity={"num_images": 32, "max_abs_diff": 3.5e-7, "min_cosine": 0.9999987},
        training={"steps": 1234, "images_per_s": 567.8, "data_wait_pct": 8.76, "final_loss": 0.25},
        data={
            "num_images": 12_000,
            "num_bad": 19,
            "num_texts": 20_011,
            "bad_examples": ["3"],
            "num_texts_embedded": 20_011,
            "num_texts_left_out": 0,
        },
        seconds={"embed": 61.4, "train": 3723.0},
        machine={"cpu": "Test CPU 9000", "cores_available": 2},
    )
    return dataclasses.replace(report, **changes)


def tables(markdown: str) -> list[list[list[str]]]:
    """Every table as rows of stripped cells, by GitHub's rules; bars after a backslash are text."""
    found: list[list[list[str]]] = []
    is_inside = False
    for line in markdown.splitlines():
        if not line.startswith("|"):
            is_inside = False
            continue
        assert line.endswith("|")
        if not is_inside:
            found.append([])
        is_inside = True
        found[-1].append([cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]])
    return found


@pytest.mark.parametrize(
    ("teacher", "student", "retention"),
    [(90.0, 72.0, 80.0), (50.0, 55.0, 110.0), (80.0, 0.0, 0.0), (13.6, 13.6, 100.0)],
)
def test_retention_is_the_share_of_the_teachers_top1(teacher, student, retention):
    assert accuracy("a", teacher, student).retention_pct == pytest.approx(retention)


@pytest.mark.parametrize("top1", [0.0, 9.0, 12.5, 13.4])
def test_a_teacher_that_guesses_has_no_retention(top1):
    """Of 4,321 images in 8 classes two standard errors above chance are 13.51%."""
    report = make(accuracy=(accuracy("a|b", top1, 14.0), accuracy("scenes", 64.25, 64.25)))
    assert [row["retention_pct"] for row in report.to_dict()["accuracy"]] == [None, 100.0]
    page = report.to_markdown()
    assert tables(page)[0][2] == [r"a\|b", "8", "12.5%", f"{top1:.1f}%", "14.0%", "-"]
    more = ", or test on more" if top1 > 12.5 else ""
    assert (
        rf"- The teacher knows nothing of a\|b ({top1:.1f}% of 4321 images, chance 12.5%): "
        f"name another `--teacher`{more}.\n"
    ) in page
    assert "knows nothing of scenes" not in page
    assert "knows nothing" not in make().to_markdown()


@pytest.mark.parametrize(
    ("used", "left_out", "expected"),
    [
        (20_011, 0, "; 12000 images (19 unreadable), 20011 sentences.\n"),
        (20_011, 400, ", 20011 sentences (400 left out).\n"),
        (471, 0, ", 471 of 20011 sentences.\n"),
        (471, 400, ", 471 of 20011 sentences (400 left out).\n"),
    ],
)
def test_sentences_are_those_that_were_trained_on(used, left_out, expected):
    data = make().data | {"num_texts": used, "num_texts_left_out": left_out}
    assert expected in make(data=data).to_markdown()


def test_the_exported_graph_decides_where_it_is_known():
    over = make(budget_ms=5.0, exported_ms=5.3)
    assert not over.fits_budget
    assert "exported graph estimated at" in over.to_markdown()
    within = make(budget_ms=0.1, exported_ms=0.104)  # counts differ by some percent
    assert within.fits_budget
    here = make(budget_ms=0.1, exported_ms=0.104, target="local")
    assert not here.fits_budget
    assert "exported graph measured at 0.104 ms: NOT MET." in here.to_markdown()
    assert "was not measured there" not in " ".join(here.to_markdown().split())


@pytest.mark.parametrize(
    ("budget_ms", "fits"), [(5.0, True), (4.36, True), (4.359, False), (0.1, False)]
)
def test_the_budget_is_met_by_the_estimate_on_the_target(budget_ms, fits):
    report = make(budget_ms=budget_ms)
    assert report.fits_budget is fits
    assert report.to_dict()["fits_budget"] is fits
    assert ("met." in report.to_markdown()) is fits
    assert ("NOT MET." in report.to_markdown()) is not fits


def test_the_latency_ratio_is_of_what_was_measured_here():
    assert make().latency_ratio == pytest.approx(81.23 / 812.25)


def leaves(value) -> list:
    if dataclasses.is_dataclass(value):
        value = {f.name: getattr(value, f.name) for f in dataclasses.fields(value)}
    if isinstance(value, dict):
        return [leaf for v in value.values() for leaf in leaves(v)]
    if isinstance(value, list | tuple):
        return [leaf for v in value for leaf in leaves(v)]
    return [value]


def test_json_has_every_figure():
    report = make()
    values = json.loads(json.dumps(report.to_dict(), allow_nan=False))
    derived = [80.0, 100.0, True, report.latency_ratio]
    assert sorted(map(repr, leaves(values))) == sorted(map(repr, leaves(report) + derived))
    assert values["student"]["here_p90_ms"] == 97.5
    assert values["accuracy"][0]["teacher"]["top1_pct"] == 90.0
    assert values["accuracy"][0]["student"]["num_bad"] == 17
    assert values["accuracy"][0]["retention_pct"] == pytest.approx(80)
    assert values["inherited"] == ["blocks.0", "blocks.1", "head"]
    assert values["latency_ratio"] == pytest.approx(81.23 / 812.25)


def test_the_tables_have_the_figures():
    scores, models = tables(make().to_markdown())
    assert scores == [
        ["zero-shot top-1", "classes", "chance", "teacher", "student", "retention"],
        ["---", "---:", "---:", "---:", "---:", "---:"],
        ["cifar10", "8", "12.5%", "90.0%", "72.0%", "80.0%"],
        ["scenes", "8", "12.5%", "64.2%", "64.2%", "100.0%"],
    ]
    assert models == [
        ["image tower", "parameters", "GMACs", "here p50 / p90", "estimate on the target"],
        ["---", "---:", "---:", "---:", "---:"],
        ["ViT-L-14", "303.97 M", "77.830", "812.25 / 850.75 ms", "41.7 ms (31 to 56)"],
        ["vit_s16", "22.05 M", "4.250", "81.23 / 97.50 ms", "4.36 ms (3.3 to 5.8)"],
    ]


def test_the_text_has_the_figures():
    page = make().to_markdown()
    for part in (
        "# vit_s16 for Jetson Orin Nano\n",
        "Distilled from `ViT-L-14` on images of 224 px; budget 5 ms on Jetson Orin Nano "
        "(TensorRT fp16), estimated "
        "4.36 ms: met.",
        "one image on Test CPU 9000, teacher (PyTorch) and student (ONNX Runtime) in turn: "
        "the student takes 0.10 of the teacher's time",
        "Parity of the exported graph with PyTorch on 32 images: max abs difference 3.5e-07, "
        "least cosine 0.999999",
        "1234 steps, 568 images/s, data wait 8.8%; 12000 images (19 unreadable), 20011 sentences",
        "Initial weights: 3 tensors from the teacher.",
        "Time: embed 61 s, train 3723 s.",
        "Bundle: `runs/a/bundle`",
    ):
        assert part in page
    assert page.endswith("\n")


def test_without_test_sets_the_table_says_so():
    report = make(accuracy=())
    assert json.loads(json.dumps(report.to_dict()))["accuracy"] == []
    scores, models = tables(report.to_markdown())
    assert len(scores) == 3
    assert scores[2] == ["none given (`--eval-sets`)", "", "", "", "", ""]
    assert len(models) == 4


@pytest.mark.parametrize("name", ["a|b", "a\nb", "||", "x | y"])
def test_names_with_bars_and_line_ends_stay_in_their_cell(name):
    student = dataclasses.replace(STUDENT, name=name)
    report = make(student=student, accuracy=(accuracy(name, 90.0, 72.0),))
    scores, models = tables(report.to_markdown())
    assert [len(row) for row in scores] == [6, 6, 6]
    assert [len(row) for row in models] == [5, 5, 5, 5]
    assert scores[2][0] == models[3][0] == " ".join(name.replace("|", r"\|").split())


def test_a_random_start_and_an_unknown_machine_are_said():
    page = make(inherited=(), machine={}).to_markdown()
    assert "- Initial weights: random.\n" in page
    assert "one image on this CPU, " in page


def precision(name: str, top1: float, ms: float, *in_float: str) -> PrecisionRow:
    return PrecisionRow(
        name=name, top1_pct={"a|b": top1}, mean_cosine=0.99987, size_mib=3.3, here_p50_ms=ms,
        integer_products=9, float_products=in_float,
    )  # fmt: skip


def test_int8_is_shown_beside_fp32():
    rows = (precision("fp32", 80.04, 4.0, "stem"), precision("int8 QAT", 79.96, 2.5))
    report = make(
        precisions=rows,
        int8_training={"steps": 321, "images_per_s": 99.6},
        kept_float=("trunk.fc1", "proj"),
    )
    table = tables(report.to_markdown())[2]
    assert table == [
        ["student in", r"a\|b top-1", "cosine to fp32", "file", "here p50", "in integers"],
        ["---", "---:", "---:", "---:", "---:", "---:"],
        ["fp32", "80.0%", "0.99987", "3.30 MiB", "4.00 ms", "9 of 10 products"],
        ["int8 QAT", "80.0%", "0.99987", "3.30 MiB", "2.50 ms", "9 of 9 products"],
    ]
    assert "- Training in int8: 321 steps, 100 images/s.\n" in report.to_markdown()
    assert "no more than was allowed: `trunk.fc1`, `proj`.\n" in report.to_markdown()


def test_a_text_side_beside_an_int8_student_is_said_to_be_in_float():
    row = TextRow("text-w64-d1", 0.24, 1.0, "ONNX Runtime", 1.0, 1.1)
    training = {"steps": 3, "sentences_per_s": 9.0}
    text = TextReport(row, row, {}, (), (), {}, training)
    hint = "`dimefm-edge export runs/a --text-precision int8` stores it in 8 bits.\n"
    assert hint in make(text=text, precision="int8").to_markdown()
    assert hint not in make(text=text, precision="fp16").to_markdown()


def test_without_int8_nothing_is_said_of_it():
    assert "int8" not in make().to_markdown()


def test_students_within_are_shown_with_the_command_that_takes_one_out():
    rows = (
        CutRow("s", 0.5, 0.01, 0.31, {"a|b": 70.04}),
        CutRow("l", 1.5, 0.07, 0.6, {"a|b": 80.0}),
    )
    page = make(cuts=rows).to_markdown()
    assert tables(page)[2] == [
        ["students within", r"a\|b top-1", "parameters", "GMACs", "estimate on the target"],
        ["---", "---:", "---:", "---:", "---:"],
        ["s", "70.0%", "0.50 M", "0.010", "0.31 ms"],
        ["l", "80.0%", "1.50 M", "0.070", "0.6 ms"],
    ]
    assert "- 1 smaller students lie within" in page
    assert "`dimefm-edge fit --elastic runs/a --latency-ms MS --out FOLDER`" in page
    assert "within" not in make().to_markdown()


def test_a_student_that_was_trained_on_says_of_what():
    assert "- Initial weights: those of `runs/b`.\n" in make(init_from="runs/b").to_markdown()
