"""fit: the best student in the budget, teachers' geometry first, and honest refusals."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch
from open_clip.transformer import VisionTransformer

from dimefm_edge.errors import BudgetError, ConfigError, UnknownNameError
from dimefm_edge.fit import FitReport, fit_student
from dimefm_edge.fit_limits import TEACHER_SHARES
from dimefm_edge.latency.estimate import estimate_latency, total_gmacs, trace_ops
from dimefm_edge.latency.trace import trace_student
from dimefm_edge.students import student_spec
from dimefm_edge.students.vit import vit_geometry
from dimefm_edge.targets import load_target

SIZES = {"image_size": 64, "embed_dim": 128}


@pytest.fixture(scope="module")
def teacher():
    """The sample teacher's image tower: its geometry and its kernels."""
    with torch.device("meta"):
        tower = VisionTransformer(
            image_size=64, patch_size=8, width=192, layers=8, heads=6, mlp_ratio=4.0,
            output_dim=128,
        )  # fmt: skip
    ops = trace_ops(tower, 64)
    return {"teacher_geometry": vit_geometry(tower), "teacher_ops": ops}


@pytest.fixture(scope="module")
def report(teacher):
    return fit_student("jetson-orin", **SIZES, **teacher)


def test_the_sample_teacher_gets_a_student_that_inherits(report, teacher):
    args = report.chosen.args
    assert (report.chosen.family, args["patch_size"], args["width"]) == ("vit", 8, 192)
    assert args["depth"] in (2, 3)
    chosen = report.chosen_candidate
    assert chosen.inherits
    assert chosen.gmacs <= TEACHER_SHARES[0][1] * total_gmacs(teacher["teacher_ops"])
    assert chosen.latency_ms <= report.budget_ms <= load_target("jetson-orin").latency_ms


def test_the_choice_is_the_best_that_fits(report):
    fitting = [c for c in report.candidates if c.fits]
    assert report.chosen_candidate.score == max(c.score for c in fitting)
    for candidate in report.candidates:
        within = candidate.latency_ms <= report.budget_ms
        assert candidate.fits == (within and candidate.gmacs <= report.max_gmacs)
        assert candidate.low_ms < candidate.latency_ms < candidate.high_ms


def test_the_front_is_what_nobody_beats(report):
    front = {c.spec.name for c in report.pareto}
    for candidate in report.candidates:
        beaten = any(
            (o.latency_ms <= candidate.latency_ms and o.score > candidate.score)
            or (o.latency_ms < candidate.latency_ms and o.score >= candidate.score)
            for o in report.candidates
        )
        assert beaten == (candidate.spec.name not in front)


def test_depth_is_extrapolated_exactly(report):
    target = load_target("jetson-orin")
    deep = next(c for c in report.candidates if c.spec.name == "vit-p8-w128-d12")
    direct = estimate_latency(trace_student(deep.spec), target)
    assert deep.latency_ms == pytest.approx(direct.latency_ms, rel=1e-6)
    assert deep.gmacs == pytest.approx(direct.gmacs, rel=1e-9)
    assert deep.params_m == pytest.approx(direct.params_m, rel=1e-9)


def test_a_bigger_budget_gives_a_bigger_student():
    sizes = {"image_size": 224, "embed_dim": 64, "families": ("hybrid",)}
    reports = [fit_student("jetson-orin", latency_ms=ms, **sizes) for ms in (1.0, 2.0, 8.0)]
    gmacs = [r.chosen_candidate.gmacs for r in reports]
    assert gmacs[0] < gmacs[1] < gmacs[2]
    assert all(r.max_gmacs is None for r in reports)
    assert {c.spec.family for c in reports[0].candidates} == {"hybrid"}


def test_an_heir_on_smaller_images_counts_less_than_one_as_large_on_whole_ones(report, teacher):
    shrunk = fit_student("jetson-orin", **SIZES, **teacher, can_shrink=True)
    assert {c.spec for c in report.candidates} < {c.spec for c in shrunk.candidates}
    by_name = {c.name: c for c in shrunk.candidates}
    assert len(by_name) == len(shrunk.candidates)
    whole, small = by_name["vit-p8-w192-d8"], by_name["vit-p8-w192-d8 at 48 px"]
    assert (whole.resolution, small.resolution) == (1, 0.75)
    assert (small.spec.image_size, small.inherits, small.layers) == (48, True, 1)
    assert small.latency_ms < whole.latency_ms
    as_large = dataclasses.replace(small, resolution=1.0)
    assert small.score < as_large.score < whole.score
    again = FitReport.from_dict(json.loads(json.dumps(shrunk.to_dict())))
    assert again == shrunk
    older = shrunk.to_dict()
    for row in older["candidates"]:
        del row["resolution"]
    assert {c.resolution for c in FitReport.from_dict(older).candidates} == {1}


def test_a_student_can_be_named(teacher):
    names = {
        "vit-p8-w192-d5": (0.12, True),
        "vit-nano": (0.02, True),  # narrower, with heads of its teacher's size
        "vit-p16-w128-d4": (0.01, False),
        "timm:resnet10t": (0.01, False),
    }
    for name, (gmacs, inherits) in names.items():
        one = fit_student("jetson-orin", student=name, **SIZES, **teacher)
        (candidate,) = one.candidates
        assert candidate.spec == one.chosen
        assert candidate.gmacs > gmacs
        assert candidate.inherits == inherits
    assert not fit_student("jetson-orin", student="vit-base", **SIZES, **teacher).candidates[0].fits
    with pytest.raises(BudgetError, match="the fastest, vit-p8-w768-d12, is estimated at"):
        fit_student("jetson-orin", student="vit-base", latency_ms=0.1, **SIZES)
    with pytest.raises(UnknownNameError, match=r"unknown student 'hybird'\. Did you mean 'hybrid'"):
        fit_student("jetson-orin", student="hybird", **SIZES)
    families = {c.spec.family for c in fit_student("local", student="hybrid", **SIZES).candidates}
    assert families == {"hybrid"}


def test_an_impossible_budget_names_one_that_would_do():
    with pytest.raises(BudgetError, match=r"no student meets 1e-05 ms on jetson-agx-orin@30w") as e:
        fit_student("jetson-orin", latency_ms=1e-5, families=("vit",), **SIZES)
    assert e.value.exit_code == 3
    flag, enough = e.value.hint.split(" ")
    assert flag == "--latency-ms"  # beside all that was asked
    again = fit_student("jetson-orin", latency_ms=float(enough), families=("vit",), **SIZES)
    assert again.chosen.name in str(e.value)


def test_memory_is_a_limit_too():
    free = fit_student("jetson-orin", latency_ms=50.0, **SIZES)
    limit = free.chosen_candidate.memory_mib / 3
    report = fit_student("jetson-orin", latency_ms=50.0, max_memory_mib=limit, **SIZES)
    assert report.chosen_candidate.memory_mib <= limit
    assert report.chosen_candidate.score < free.chosen_candidate.score
    assert all(c.memory_mib <= limit for c in report.candidates if c.fits)
    weights_mib = report.chosen_candidate.params_m * 1e6 * 2 / 2**20  # fp16
    assert weights_mib < report.chosen_candidate.memory_mib < 2 * weights_mib + 10
    with pytest.raises(BudgetError, match=r"and 0.01 MiB .* the smallest, .*, needs") as error:
        fit_student("jetson-orin", latency_ms=50.0, max_memory_mib=0.01, **SIZES)
    enough = float(error.value.hint.rsplit(" ", 1)[1])
    fit_student("jetson-orin", latency_ms=50.0, max_memory_mib=enough, **SIZES)


def test_the_report_comes_back_from_its_json(report):
    again = FitReport.from_dict(json.loads(json.dumps(report.to_dict())))
    assert again == report


def test_a_report_from_before_there_were_scores_comes_back(report):
    values = json.loads(json.dumps(report.to_dict()))
    for row in values["candidates"]:
        del row["score"], row["is_convolutional"]
    del values["teacher_ms"]
    assert FitReport.from_dict(values) == dataclasses.replace(report, teacher_ms=None)


def test_a_teacher_that_meets_the_budget_itself_is_told(report, teacher):
    assert not report.teacher_fits  # the default budget is half of what it takes
    needed = estimate_latency(teacher["teacher_ops"], load_target("jetson-orin")).latency_ms
    ask = dict(**SIZES, **teacher, families=("vit",))
    enough = fit_student("jetson-orin", latency_ms=1.01 * needed, **ask)
    assert enough.teacher_ms == pytest.approx(needed)
    assert enough.teacher_fits
    assert "export --teacher mine --target jetson-agx-orin@30w" in enough.teacher_note("mine")
    assert not fit_student("jetson-orin", latency_ms=0.99 * needed, **ask).teacher_fits
    assert not fit_student(  # how much memory it takes is not known
        "jetson-orin", latency_ms=1.01 * needed, max_memory_mib=1e3, **ask
    ).teacher_fits
    assert not fit_student("jetson-orin", latency_ms=50.0, **SIZES).teacher_fits


def test_bad_requests_are_answered():
    with pytest.raises(UnknownNameError, match=r"student family to fit 'vitt'.*'vit'"):
        fit_student("jetson-orin", families=("vitt",), **SIZES)
    with pytest.raises(ConfigError, match="no student of hybrid takes images of 16 px"):
        fit_student("jetson-orin", image_size=16, embed_dim=8, families=("hybrid",))
    with pytest.raises(ConfigError, match="latency_ms must be positive, got 0"):
        fit_student("jetson-orin", latency_ms=0, **SIZES)


def test_the_report_is_plain_values(report):
    values = report.to_dict()
    names = [c["spec"]["name"] for c in values["candidates"] if c["pareto"]]
    assert names == values["pareto"]
    assert values["chosen"]["name"] == report.chosen.name


def test_measuring_corrects_the_estimates_and_decides():
    """Here everything takes twice its estimate: the choice is the best that still fits."""
    sizes = {"image_size": 64, "embed_dim": 64}
    estimates = {c.spec: c for c in fit_student("local", latency_ms=1e3, **sizes).candidates}
    budget = sorted(c.latency_ms for c in estimates.values())[len(estimates) // 2]
    asked = []

    def measure(spec, precision):
        asked.append((spec, precision))
        return 2.0 * estimates[spec].latency_ms

    report = fit_student("local", latency_ms=budget, measure=measure, **sizes)
    best = report.chosen_candidate
    assert best.measured_ms == 2.0 * best.latency_ms
    assert 0.75 * budget <= best.measured_ms <= budget
    assert best.fits
    assert {c.spec for c in report.candidates if c.measured_ms} == {spec for spec, _ in asked}
    assert not next(c for c in report.candidates if c.spec == asked[0][0]).fits
    assert 2 <= len(asked) <= 6
    rest = [c for c in report.candidates if c.measured_ms is None and c.score > best.score]
    assert all(2.0 * c.latency_ms > 0.97 * budget for c in rest)


def test_a_budget_that_no_measured_student_meets_names_what_would_do():
    with pytest.raises(BudgetError, match=r"is measured at 50 ms") as caught:
        fit_student(
            "local", latency_ms=20.0, image_size=64, embed_dim=64, families=("hybrid",),
            measure=lambda spec, precision: 50.0,
        )  # fmt: skip
    assert caught.value.hint == "--latency-ms 50"


def test_trained_students_are_ranked_by_what_they_are_known_to_score():
    names = ("vit-p8-w64-d2", "vit-p8-w128-d2", "vit-p8-w128-d4")
    specs = [student_spec(name, image_size=64, embed_dim=64) for name in names]
    given = tuple(zip(specs, (30.0, 20.0, 40.0), strict=True))
    sizes = {"image_size": 64, "embed_dim": 64}
    report = fit_student("jetson-orin", latency_ms=50.0, given=given, **sizes)
    assert [c.spec for c in report.candidates] == specs
    assert report.chosen == specs[2]
    assert [c.spec for c in report.pareto] == [specs[0], specs[2]]
    assert FitReport.from_dict(json.loads(json.dumps(report.to_dict()))) == report
    between = (report.candidates[1].latency_ms + report.candidates[2].latency_ms) / 2
    assert fit_student("jetson-orin", latency_ms=between, given=given, **sizes).chosen == specs[0]
    unknown = tuple((spec, None) for spec in specs)
    found = fit_student("jetson-orin", latency_ms=between, given=unknown, **sizes)
    assert found.chosen == specs[1]  # by the stand-in
