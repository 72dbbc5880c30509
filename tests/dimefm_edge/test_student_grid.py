"""The grid: families, the teacher's own shape, timm's models, and students by name."""

from __future__ import annotations

import dataclasses

import pytest
import timm

from dimefm_edge.errors import ConfigError, UnknownNameError
from dimefm_edge.student_grid import (
    _EDGE_MODELS,
    FAMILIES,
    GRIDS,
    elastic_cuts,
    find_student,
    student_grid,
)
from dimefm_edge.students import STUDENTS, build_student, is_student_name, student_spec

SIZES = {"image_size": 64, "embed_dim": 32, "teacher": None}
TEACHER = {
    "patch_size": 8, "width": 96, "num_heads": 4, "mlp_ratio": 3.0, "act": "quick_gelu", "depth": 5,
}  # fmt: skip


def test_every_family_has_a_grid_of_students_of_its_own():
    assert set(GRIDS) == {*STUDENTS, "resnet"}
    for family in STUDENTS:
        found = student_grid([family], **SIZES)
        assert len(found) > 10
        assert {spec.family for spec, _ in found} == {family}
        assert not any(inherits for _, inherits in found)


def test_names_say_the_shape_and_build_it_again():
    for spec, _ in student_grid(tuple(GRIDS), **SIZES):
        assert is_student_name(spec.name)
        assert student_spec(spec.name, image_size=64, embed_dim=32) == spec


def test_the_teachers_own_shape_takes_the_place_of_ours():
    found = dict(student_grid(["vit"], **SIZES | {"teacher": TEACHER}))
    heirs = [spec for spec, inherits in found.items() if inherits]
    shapes = [(spec.args["num_heads"], spec.args["width"], spec.args["depth"]) for spec in heirs]
    assert shapes == [(heads, 24 * heads, depth) for heads in (2, 3, 4) for depth in (2, 3, 4, 5)]
    assert {spec.args["mlp_ratio"] for spec in heirs} == {3.0}
    spec, inherits = find_student("vit-p8-w96-d4", **SIZES | {"teacher": TEACHER})
    assert inherits
    assert spec.args["act"] == "quick_gelu"
    assert not find_student("vit-p8-w96-d4", **SIZES)[1]


@pytest.mark.parametrize(
    ("side", "patch", "smaller"),
    [(224, 32, (192, 160)), (224, 16, (192, 160)), (224, 14, (196, 154)), (64, 8, (56, 48))],
)
def test_heirs_of_a_vit_are_looked_at_on_smaller_images_of_whole_patches(side, patch, smaller):
    sizes = {"image_size": side, "embed_dim": 32, "teacher": TEACHER | {"patch_size": patch}}
    whole = student_grid(["vit", "hybrid"], **sizes)
    found = student_grid(["vit", "hybrid"], **sizes, can_shrink=True)
    assert found[: len(whole)] == whole
    heirs = [spec for spec, inherits in whole if inherits]
    assert found[len(whole) :] == [
        (dataclasses.replace(spec, image_size=other), True) for other in smaller for spec in heirs
    ]
    build_student(found[-1][0])
    assert student_grid(["hybrid"], **sizes, can_shrink=True) == student_grid(["hybrid"], **sizes)
    alone = sizes | {"teacher": None}
    assert student_grid(["vit"], **alone, can_shrink=True) == student_grid(["vit"], **alone)


def test_timm_models_are_timms_and_one_can_be_named():
    assert set(_EDGE_MODELS) <= set(timm.list_models())
    (found,) = student_grid(["timm:resnet10t"], **SIZES)
    assert found[0].name == "timm:resnet10t"


@pytest.mark.parametrize("name", ["vit-p16-w48-d1", "hybrid-w20-d1.1.1.1", "convnet-w8-d1.2.1.1"])
def test_shapes_of_no_grid_can_be_named(name):
    spec, _ = find_student(name, **SIZES)
    assert spec.name == name
    build_student(spec)


def test_unknown_names_are_answered():
    with pytest.raises(UnknownNameError, match=r"family to fit 'convnets'.*'convnet'"):
        student_grid(["convnets"], **SIZES)
    with pytest.raises(UnknownNameError, match=r"unknown student 'vit-p8-w96'"):
        find_student("vit-p8-w96", **SIZES)
    assert not is_student_name("vit-p8-w96")


def test_heirs_of_a_teacher_that_is_no_vit_are_asked_for():
    def can_inherit(spec):
        return spec.name in ("timm:resnet10t", "hybrid-w8-d1.1.1.1", "hybrid-w32-d1.1.2.1")

    found = student_grid(FAMILIES, **SIZES, can_inherit=can_inherit)
    heirs = {spec.name for spec, inherits in found if inherits}
    assert heirs == {"hybrid-w8-d1.1.1.1", "hybrid-w32-d1.1.2.1", "timm:resnet10t"}
    for name in heirs:
        assert find_student(name, **SIZES, can_inherit=can_inherit)[1]
    assert not find_student("timm:resnet18d", **SIZES, can_inherit=can_inherit)[1]
    named = student_grid(("vit", "hybrid"), **SIZES, can_inherit=can_inherit)
    assert {spec.family for spec, _ in named} == {"vit", "hybrid"}


def test_resnets_are_looked_at_by_default_where_they_were_measured_to_be_better():
    """From random weights: on small images, and where no student inherits."""

    def resnets(families=FAMILIES, **changed):
        found = student_grid(families, **SIZES | changed)
        return [spec.name.removeprefix("timm:") for spec, _ in found if spec.family == "timm"]

    four = [name for name in _EDGE_MODELS if "resnet" in name]
    assert resnets() == resnets(can_inherit=lambda spec: False) == four
    assert resnets(image_size=224) == resnets(teacher=TEACHER) == []
    assert resnets(("resnet",), image_size=224) == resnets(("resnet", "vit"), teacher=TEACHER)
    assert resnets(can_inherit=lambda spec: spec.name == "timm:resnet18d") == ["resnet18d"]


@pytest.mark.parametrize("family", ["vit", "hybrid", "convnet"])
def test_every_student_of_ours_holds_smaller_ones(family):
    for spec, _ in student_grid([family], **SIZES):
        width, depth = spec.args["width"], spec.args["depth"]
        cuts = elastic_cuts(spec)
        assert cuts[-1] == spec
        assert 2 <= len(set(cuts)) == len(cuts) <= 12
        for cut in cuts:
            assert cut.family == family
            assert cut.args["width"] <= width
            depths = (
                (cut.args["depth"], depth) if family != "vit" else ([cut.args["depth"]], [depth])
            )
            assert all(1 <= own <= full for own, full in zip(*depths, strict=True))
            if family == "vit":  # heads of one size
                assert cut.args["width"] * spec.args["num_heads"] == width * cut.args["num_heads"]
        smallest = cuts[0].args
        assert smallest["width"] == min(cut.args["width"] for cut in cuts)
        assert smallest["depth"] == min(cut.args["depth"] for cut in cuts)


def test_what_is_not_width_or_depth_stays():
    spec = student_spec("hybrid-w16-d1.1.2.1-k5-relu", image_size=64, embed_dim=32)
    assert {(cut.args["kernel"], cut.args["act"]) for cut in elastic_cuts(spec)} == {(5, "relu")}
    heirs = [s for s, inherits in student_grid(["vit"], **SIZES | {"teacher": TEACHER}) if inherits]
    for cut in elastic_cuts(heirs[-1]):
        assert (cut.args["mlp_ratio"], cut.args["act"]) == (3.0, "quick_gelu")
        build_student(cut)


def test_what_has_no_cuts_is_answered():
    with pytest.raises(ConfigError, match="timm:resnet18 cannot be elastic: smaller ones are cut"):
        elastic_cuts(student_spec("timm:resnet18", image_size=64, embed_dim=32))
    with pytest.raises(ConfigError, match="vit-p8-w32-d2 cannot be elastic: it has no smaller one"):
        elastic_cuts(student_spec("vit-p8-w32-d2", image_size=64, embed_dim=32))


def test_an_heir_of_no_grid_is_known_by_its_shape():
    alike = {"patch_size": 8, "mlp_ratio": 4.0, "act": "gelu", "width": 256, "depth": 8}
    for heads, name, inherits in (
        (8, "vit-p8-w64-d8", True),
        (4, "vit-p8-w64-d8", False),  # its own heads are of 32
        (8, "vit-p8-w64-d9", False),
        (8, "vit-p16-w64-d2", False),
    ):
        spec, found = find_student(name, **SIZES | {"teacher": alike | {"num_heads": heads}})
        assert (spec.name, found) == (name, inherits)
