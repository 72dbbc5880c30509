"""Distillation losses: pure functions of tensors, no modules, devices or files.

Used by distill.py. The terms are DIME-FM's (arXiv 2303.18232, ICCV 2023): vl (student image
against teacher text), pvl (student image against teacher image, standing in for text) and
udist (student image against student image). For comparison: `feature`, the regression of
embeddings that other tools use, and `contrastive`, CLIP's loss on labelled pairs. As in the
authors' code there is no T**2 factor, and pvl and udist are doubled so that they weigh as the
two directions of vl. A text student has the same terms with the sides exchanged.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from dimefm_edge.config import LossConfig, TextStudentConfig


def vl_loss(
    student_image_embeds: Tensor,
    teacher_image_embeds: Tensor,
    teacher_text_embeds: Tensor,
    *,
    logit_scale: float,
    temperature: float = 1.0,
) -> Tensor:
    """Match how student images and teacher sentences rank each other.

    Args:
        student_image_embeds: (B, E), L2-normalised, receives gradients.
        teacher_image_embeds: (B, E), L2-normalised, same order of images.
        teacher_text_embeds: (T, E), L2-normalised, not paired with the images.
        logit_scale: Multiplies cosines before the softmax; CLIP uses about 100.
        temperature: Softmax temperature, > 0.

    Returns:
        Scalar in nats: KL over rows (image to text), averaged over B, plus KL over columns
        (text to image), averaged over T. Zero when student equals teacher.

    Raises:
        ValueError: If shapes differ or temperature is not positive.
    """
    _check(student_image_embeds, teacher_image_embeds, temperature)
    student_logits = logit_scale * student_image_embeds @ teacher_text_embeds.T
    teacher_logits = logit_scale * teacher_image_embeds @ teacher_text_embeds.T
    return _row_kl(student_logits, teacher_logits, temperature) + _row_kl(
        student_logits.T, teacher_logits.T, temperature
    )


def pvl_loss(
    student_image_embeds: Tensor,
    teacher_image_embeds: Tensor,
    *,
    logit_scale: float,
    temperature: float = 3.0,
) -> Tensor:
    """Match how student images rank the teacher's images.

    Args:
        student_image_embeds: (B, E), L2-normalised, receives gradients.
        teacher_image_embeds: (B, E), L2-normalised, same order of images.
        logit_scale: Multiplies cosines before the softmax.
        temperature: Softmax temperature, > 0.

    Returns:
        Scalar in nats: twice the KL over rows, averaged over B. Zero when student equals
        teacher.

    Raises:
        ValueError: If shapes differ or temperature is not positive.
    """
    _check(student_image_embeds, teacher_image_embeds, temperature)
    return 2 * _row_kl(
        logit_scale * student_image_embeds @ teacher_image_embeds.T,
        logit_scale * teacher_image_embeds @ teacher_image_embeds.T,
        temperature,
    )


def udist_loss(
    student_image_embeds: Tensor,
    teacher_image_embeds: Tensor,
    *,
    logit_scale: float,
    temperature: float = 7.0,
) -> Tensor:
    """Match the distances among the student's own images to those among the teacher's.

    Args:
        student_image_embeds: (B, E), L2-normalised, receives gradients on both sides.
        teacher_image_embeds: (B, E), L2-normalised, same order of images.
        logit_scale: Multiplies cosines before the softmax.
        temperature: Softmax temperature, > 0.

    Returns:
        Scalar in nats: twice the KL over rows, averaged over B. Zero when student equals
        teacher, or a rotation of it.

    Raises:
        ValueError: If shapes differ or temperature is not positive.
    """
    _check(student_image_embeds, teacher_image_embeds, temperature)
    return 2 * _row_kl(
        logit_scale * student_image_embeds @ student_image_embeds.T,
        logit_scale * teacher_image_embeds @ teacher_image_embeds.T,
        temperature,
    )


def feature_loss(student_image_embeds: Tensor, teacher_image_embeds: Tensor) -> Tensor:
    """Regress the teacher's embedding (https://github.com/NVIDIA-AI-IOT/clip-distillation).

    Of unit vectors the squared distance is 2 (1 - cosine): a cosine loss of half this weight
    is the same loss, so there is no other.

    Args:
        student_image_embeds: (B, E), L2-normalised, receives gradients.
        teacher_image_embeds: (B, E), L2-normalised, same order of images.

    Returns:
        Scalar in [0, 4]: squared distance summed over E, so that it does not shrink with E,
        averaged over B.

    Raises:
        ValueError: If shapes differ.
    """
    _check(student_image_embeds, teacher_image_embeds, 1.0)
    return (student_image_embeds - teacher_image_embeds).square().sum(1).mean()


def contrastive_loss(
    student_image_embeds: Tensor,
    paired_text_embeds: Tensor,
    *,
    logit_scale: float,
    labels: Tensor | None = None,
) -> Tensor:
    """CLIP's symmetric InfoNCE of images and their own sentences (arXiv 2103.00020).

    The text encoder is frozen, so its logit scale is too.

    Args:
        student_image_embeds: (B, E), L2-normalised, receives gradients.
        paired_text_embeds: (B, E), L2-normalised, row i belongs to image i.
        logit_scale: Multiplies cosines before the softmax.
        labels: (B,) integers; images of one label then share their sentences as positives, each
            of the same part (UniCL, arXiv 2204.03610). None: row i is image i's only positive.

    Returns:
        Scalar in nats: mean of the cross-entropies of rows and of columns.

    Raises:
        ValueError: If shapes differ.
    """
    _check(student_image_embeds, paired_text_embeds, 1.0)
    logits = logit_scale * student_image_embeds @ paired_text_embeds.T
    if labels is None:
        targets = torch.eye(len(logits), dtype=logits.dtype, device=logits.device)
    else:
        targets = (labels[:, None] == labels[None, :]).to(logits.dtype)
        targets = targets / targets.sum(1, keepdim=True)
    return (F.cross_entropy(logits, targets) + F.cross_entropy(logits.T, targets)) / 2


def distillation_loss(
    student_image_embeds: Tensor,
    teacher_image_embeds: Tensor,
    teacher_text_embeds: Tensor,
    *,
    config: LossConfig,
    logit_scale: float,
    paired_text_embeds: Tensor | None = None,
    labels: Tensor | None = None,
) -> dict[str, Tensor]:
    """All terms with a positive weight, unweighted by name, and `loss`, their weighted sum.

    `contrastive` needs `paired_text_embeds` (B, E) and `labels` (B,) of the same images.
    """
    student, teacher = student_image_embeds, teacher_image_embeds
    terms: dict[str, Tensor] = {}
    if config.vl_weight:
        terms["vl"] = vl_loss(
            student,
            teacher,
            teacher_text_embeds,
            logit_scale=logit_scale,
            temperature=config.vl_temperature,
        )
    if config.pvl_weight:
        terms["pvl"] = pvl_loss(
            student, teacher, logit_scale=logit_scale, temperature=config.pvl_temperature
        )
    if config.udist_weight:
        terms["udist"] = udist_loss(
            student, teacher, logit_scale=logit_scale, temperature=config.udist_temperature
        )
    if config.feature_weight:
        terms["feature"] = feature_loss(student, teacher)
    if config.contrastive_weight:
        if paired_text_embeds is None:
            raise ValueError("the contrastive term needs images with sentences of their own")
        terms["contrastive"] = contrastive_loss(
            student,
            paired_text_embeds,
            logit_scale=logit_scale,
            labels=labels if config.contrastive_positives == "label" else None,
        )
    return _with_sum(terms, {name: getattr(config, f"{name}_weight") for name in terms})


def text_vl_loss(
    student_text_embeds: Tensor,
    teacher_text_embeds: Tensor,
    teacher_image_embeds: Tensor,
    *,
    logit_scale: float,
    temperature: float = 1.0,
) -> Tensor:
    """Match how student sentences rank the teacher's images: the columns of `vl_loss`.

    Args:
        student_text_embeds: (B, E), L2-normalised, receives gradients.
        teacher_text_embeds: (B, E), L2-normalised, same order of sentences.
        teacher_image_embeds: (T, E), L2-normalised, not paired with the sentences.
        logit_scale: Multiplies cosines before the softmax.
        temperature: Softmax temperature, > 0.

    Returns:
        Scalar in nats: KL over rows (text to image), averaged over B. Zero when student equals
        teacher.

    Raises:
        ValueError: If shapes differ or temperature is not positive.
    """
    _check(student_text_embeds, teacher_text_embeds, temperature)
    return _row_kl(
        logit_scale * student_text_embeds @ teacher_image_embeds.T,
        logit_scale * teacher_text_embeds @ teacher_image_embeds.T,
        temperature,
    )


def text_distillation_loss(
    student_text_embeds: Tensor,
    teacher_text_embeds: Tensor,
    teacher_image_embeds: Tensor,
    *,
    config: TextStudentConfig,
    logit_scale: float,
) -> dict[str, Tensor]:
    """All terms of a text student with a positive weight, by name, and `loss`, their sum.

    `vl` is `text_vl_loss`; `pvl` and `feature` are those of images with sentences in their place.
    Shapes as for `text_vl_loss`.
    """
    student, teacher = student_text_embeds, teacher_text_embeds
    terms: dict[str, Tensor] = {}
    if config.text_vl_weight:
        terms["vl"] = text_vl_loss(student, teacher, teacher_image_embeds, logit_scale=logit_scale)
    if config.text_pvl_weight:
        terms["pvl"] = pvl_loss(student, teacher, logit_scale=logit_scale)
    if config.text_feature_weight:
        terms["feature"] = feature_loss(student, teacher)
    return _with_sum(terms, {name: getattr(config, f"text_{name}_weight") for name in terms})


def _with_sum(terms: dict[str, Tensor], weights: dict[str, float]) -> dict[str, Tensor]:
    weighted = [weights[name] * value for name, value in terms.items()]
    return {**terms, "loss": sum(weighted[1:], start=weighted[0])}


def _row_kl(student_logits: Tensor, teacher_logits: Tensor, temperature: float) -> Tensor:
    """KL(teacher || student) of row softmaxes, averaged over rows ("batchmean")."""
    return F.kl_div(
        F.log_softmax(student_logits / temperature, dim=1),
        F.log_softmax(teacher_logits / temperature, dim=1),
        reduction="batchmean",
        log_target=True,
    )


def _check(student: Tensor, teacher: Tensor, temperature: float) -> None:
    if student.shape != teacher.shape or student.ndim != 2:
        raise ValueError(
            "student and teacher embeddings must both be (B, E), got "
            f"{tuple(student.shape)} and {tuple(teacher.shape)}"
        )
    if temperature <= 0:
        raise ValueError(f"temperature must be positive, got {temperature}")
