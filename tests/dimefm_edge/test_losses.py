"""The losses against a float64 computation written from the formulas of design.md part 1."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from dimefm_edge.config import LossConfig, TextStudentConfig
from dimefm_edge.losses import (
    contrastive_loss,
    distillation_loss,
    feature_loss,
    pvl_loss,
    text_distillation_loss,
    text_vl_loss,
    udist_loss,
    vl_loss,
)


def unit_rows(seed: int, count: int, dim: int = 16) -> np.ndarray:
    rows = np.random.default_rng(seed).normal(size=(count, dim))
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def softmax(logits: np.ndarray) -> np.ndarray:
    shifted = np.exp(logits - logits.max(axis=1, keepdims=True))
    return shifted / shifted.sum(axis=1, keepdims=True)


def row_kl(teacher_logits: np.ndarray, student_logits: np.ndarray, temperature: float) -> float:
    """sum_ij p_ij (log p_ij - log q_ij) / number of rows."""
    p, q = softmax(teacher_logits / temperature), softmax(student_logits / temperature)
    total = 0.0
    for p_row, q_row in zip(p, q, strict=True):
        for p_ij, q_ij in zip(p_row, q_row, strict=True):
            if p_ij > 0:
                total += p_ij * (np.log(p_ij) - np.log(q_ij))
    return total / len(p)


STUDENT, TEACHER, TEXT = unit_rows(0, 7), unit_rows(1, 7), unit_rows(2, 11)
S, T, X = (torch.from_numpy(a) for a in (STUDENT, TEACHER, TEXT))


@pytest.mark.parametrize(("scale", "temperature"), [(10.0, 1.0), (30.0, 3.0), (100.0, 7.0)])
def test_vl_is_rows_plus_columns(scale: float, temperature: float) -> None:
    student, teacher = scale * STUDENT @ TEXT.T, scale * TEACHER @ TEXT.T
    expected = row_kl(teacher, student, temperature) + row_kl(teacher.T, student.T, temperature)
    value = vl_loss(S, T, X, logit_scale=scale, temperature=temperature)
    assert value.item() == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize(("scale", "temperature"), [(10.0, 1.0), (30.0, 3.0), (100.0, 7.0)])
def test_pvl_is_twice_the_rows_against_teacher_images(scale: float, temperature: float) -> None:
    expected = 2 * row_kl(scale * TEACHER @ TEACHER.T, scale * STUDENT @ TEACHER.T, temperature)
    value = pvl_loss(S, T, logit_scale=scale, temperature=temperature)
    assert value.item() == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize(("scale", "temperature"), [(10.0, 1.0), (30.0, 3.0), (100.0, 7.0)])
def test_udist_is_twice_the_rows_among_student_images(scale: float, temperature: float) -> None:
    expected = 2 * row_kl(scale * TEACHER @ TEACHER.T, scale * STUDENT @ STUDENT.T, temperature)
    value = udist_loss(S, T, logit_scale=scale, temperature=temperature)
    assert value.item() == pytest.approx(expected, rel=1e-9)


def test_feature_is_the_squared_distance_and_twice_the_cosine_loss() -> None:
    mse = np.mean([np.sum((s - t) ** 2) for s, t in zip(STUDENT, TEACHER, strict=True)])
    cosine = np.mean([1 - s @ t for s, t in zip(STUDENT, TEACHER, strict=True)])
    assert feature_loss(S, T).item() == pytest.approx(mse) == pytest.approx(2 * cosine)


def infonce(logits: np.ndarray, targets: np.ndarray) -> float:
    """Cross-entropy of row softmaxes with rows of targets, averaged over rows."""
    return float(-np.mean((targets * np.log(softmax(logits))).sum(1)))


def test_contrastive_is_clips_loss_on_pairs() -> None:
    logits, pairs = 10 * STUDENT @ TEACHER.T, np.eye(7)
    expected = (infonce(logits, pairs) + infonce(logits.T, pairs)) / 2
    assert contrastive_loss(S, T, logit_scale=10.0).item() == pytest.approx(expected)


def test_contrastive_shares_the_sentences_of_equal_labels() -> None:
    labels = np.asarray([3, 1, 3, 0, 1, 3, 9])
    targets = (labels[:, None] == labels).astype(float)
    targets /= targets.sum(1, keepdims=True)
    logits = 10 * STUDENT @ TEACHER.T
    expected = (infonce(logits, targets) + infonce(logits.T, targets)) / 2
    value = contrastive_loss(S, T, logit_scale=10.0, labels=torch.from_numpy(labels))
    assert value.item() == pytest.approx(expected)
    apart = contrastive_loss(S, T, logit_scale=10.0, labels=torch.arange(7))
    assert apart.item() == pytest.approx(contrastive_loss(S, T, logit_scale=10.0).item())


@pytest.mark.parametrize("positives", ["pair", "label"])
def test_contrastive_takes_labels_only_where_they_are_asked_for(positives) -> None:  # type: ignore[no-untyped-def]
    labels = torch.tensor([0, 0, 0, 1, 1, 1, 2])
    config = LossConfig(
        vl_weight=0, pvl_weight=0, contrastive_weight=2.0, contrastive_positives=positives
    )
    terms = distillation_loss(
        S, T, X, config=config, logit_scale=10.0, paired_text_embeds=T, labels=labels
    )
    asked = labels if positives == "label" else None
    expected = contrastive_loss(S, T, logit_scale=10.0, labels=asked)
    assert set(terms) == {"contrastive", "loss"}
    torch.testing.assert_close(terms["loss"], 2 * expected)


def test_every_term_is_zero_when_student_equals_teacher() -> None:
    values = [
        vl_loss(T, T, X, logit_scale=100.0),
        pvl_loss(T, T, logit_scale=100.0),
        udist_loss(T, T, logit_scale=100.0),
        feature_loss(T, T),
    ]
    assert [v.item() for v in values] == pytest.approx([0.0] * 4, abs=1e-12)


def test_udist_does_not_see_a_rotation_and_the_others_do() -> None:
    rotation = torch.from_numpy(np.linalg.qr(np.random.default_rng(3).normal(size=(16, 16)))[0])
    assert udist_loss(T @ rotation, T, logit_scale=10.0).item() == pytest.approx(0, abs=1e-9)
    assert pvl_loss(T @ rotation, T, logit_scale=10.0).item() > 0.01
    assert vl_loss(T @ rotation, T, X, logit_scale=10.0).item() > 0.01


def test_gradient_reaches_the_student_and_matches_finite_differences() -> None:
    def total(x: torch.Tensor) -> torch.Tensor:
        config = LossConfig(udist_weight=0.2, feature_weight=0.1)
        embeds = F.normalize(x, dim=1)
        return distillation_loss(embeds, T, X, config=config, logit_scale=20.0)["loss"]

    raw = torch.randn(7, 16, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(total, (raw,), atol=1e-5)


def test_the_weighted_sum_is_the_papers() -> None:
    terms = distillation_loss(S, T, X, config=LossConfig(), logit_scale=100.0)
    assert set(terms) == {"vl", "pvl", "loss"}
    vl = vl_loss(S, T, X, logit_scale=100.0, temperature=1.0)
    pvl = pvl_loss(S, T, logit_scale=100.0, temperature=3.0)
    torch.testing.assert_close(terms["loss"], 0.7 * vl + 0.3 * pvl)


def test_one_hot_teacher_in_float32_stays_finite() -> None:
    student = F.normalize(torch.randn(4, 16), dim=1).requires_grad_()
    teacher = torch.eye(16)[:4]
    loss = vl_loss(student, teacher, torch.eye(16), logit_scale=1000.0)
    loss.backward()
    assert torch.isfinite(loss)
    assert student.grad is not None
    assert torch.isfinite(student.grad).all()


@pytest.mark.parametrize(
    ("call", "match"),
    [
        (lambda: pvl_loss(S, T[:3], logit_scale=1.0), r"both be \(B, E\), got \(7, 16\) and \(3,"),
        (lambda: vl_loss(S, T, X, logit_scale=1.0, temperature=0.0), "must be positive, got 0"),
        (lambda: contrastive_loss(S, T[:3], logit_scale=1.0), r"both be \(B, E\)"),
        (
            lambda: distillation_loss(
                S, T, X, config=LossConfig(contrastive_weight=1.0), logit_scale=1.0
            ),
            "needs images with sentences of their own",
        ),
    ],
)
def test_wrong_arguments_are_named(call, match: str) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(ValueError, match=match):
        call()


# ------------------------------------------------------------------- a text student's


@pytest.mark.parametrize(("scale", "temperature"), [(10.0, 1.0), (100.0, 7.0)])
def test_text_vl_is_the_columns_of_vl(scale: float, temperature: float) -> None:
    """Sentences S (as the student embeds them) and T rank the images X."""
    student, teacher = scale * STUDENT @ TEXT.T, scale * TEACHER @ TEXT.T
    value = text_vl_loss(S, T, X, logit_scale=scale, temperature=temperature)
    assert value.item() == pytest.approx(row_kl(teacher, student, temperature), rel=1e-9)


ALL_TEXT_TERMS = TextStudentConfig(text_feature_weight=0.5)


def text_terms(student: torch.Tensor, teacher: torch.Tensor, images: torch.Tensor) -> dict:
    return text_distillation_loss(
        student, teacher, images, config=ALL_TEXT_TERMS, logit_scale=100.0
    )


@settings(deadline=None, max_examples=25)
@given(st.integers(0, 10**6), st.integers(1, 9), st.integers(1, 13))
def test_text_terms_are_zero_when_equal_and_do_not_see_the_order(
    seed: int, num_sentences: int, num_images: int
) -> None:
    student, teacher, images = (
        torch.from_numpy(unit_rows(seed + i, count))
        for i, count in enumerate((num_sentences, num_sentences, num_images))
    )
    assert [v.item() for v in text_terms(teacher, teacher, images).values()] == pytest.approx(
        [0.0] * 4, abs=1e-10
    )
    terms = text_terms(student, teacher, images)
    assert min(value.item() for value in terms.values()) >= -1e-12  # KL and squares
    rng = np.random.default_rng(seed)
    rows, columns = (torch.from_numpy(rng.permutation(n)) for n in (num_sentences, num_images))
    moved = text_terms(student[rows], teacher[rows], images[columns])
    for name, value in terms.items():
        assert moved[name].item() == pytest.approx(value.item(), rel=1e-9, abs=1e-12), name
    if num_sentences > 1:  # the student's alone in another order are other sentences
        wrong = text_terms(student.roll(1, 0), teacher, images)
        assert wrong["feature"].item() != pytest.approx(terms["feature"].item(), rel=1e-9)


def test_the_text_sum_is_weighted_and_terms_of_no_weight_are_left_out() -> None:
    terms = text_distillation_loss(S, T, X, config=TextStudentConfig(), logit_scale=100.0)
    assert set(terms) == {"vl", "pvl", "feature", "loss"}
    vl, pvl = text_vl_loss(S, T, X, logit_scale=100.0), pvl_loss(S, T, logit_scale=100.0)
    torch.testing.assert_close(terms["loss"], 0.7 * vl + 0.3 * pvl + 3.0 * feature_loss(S, T))
    alone = TextStudentConfig(text_vl_weight=0, text_pvl_weight=0, text_feature_weight=2.0)
    terms = text_distillation_loss(S, T, X, config=alone, logit_scale=100.0)
    assert set(terms) == {"feature", "loss"}
    torch.testing.assert_close(terms["loss"], 2 * feature_loss(S, T))


def test_text_gradients_match_finite_differences_and_shapes_are_checked() -> None:
    def total(x: torch.Tensor) -> torch.Tensor:
        return text_terms(F.normalize(x, dim=1), T, X)["loss"] / 10

    raw = torch.randn(7, 16, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(total, (raw,), atol=1e-5)
    with pytest.raises(ValueError, match=r"both be \(B, E\), got \(7, 16\) and \(3,"):
        text_vl_loss(S, T[:3], X, logit_scale=1.0)
