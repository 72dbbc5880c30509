"""What a text student is worth: labels by it for the teacher's images; see test_text_stage too."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from dimefm_edge.config import TextStudentConfig, TrainConfig
from dimefm_edge.data.images import open_labelled
from dimefm_edge.distributed import Ranks
from dimefm_edge.evaluate.features import Features
from dimefm_edge.labels import build_label_bank
from dimefm_edge.students.text import TextStudent
from dimefm_edge.teacher import load_teacher
from dimefm_edge.text_judge import TextScorer, teacher_features, text_encoder
from dimefm_edge.text_stage import plan_text

AUTO = TextStudentConfig(text_student="auto")


def test_the_score_is_of_the_teachers_images_by_the_students_labels(labelled_dir: Path) -> None:
    """Images that lie where the student puts the labels are all told; turned round, none."""
    plan = plan_text(AUTO, TrainConfig(), load_teacher("sample"), Ranks())
    assert plan is not None
    torch.manual_seed(0)
    student, labelled = TextStudent(plan.spec).eval(), open_labelled(str(labelled_dir))
    bank = build_label_bank(
        "x", labelled.classnames, labelled.templates, text_encoder(student, plan.tokenizer)
    )
    rows = np.arange(len(labelled.labels))
    for sign, wanted in ((1, 100.0), (-1, 0.0)):
        features = Features(rows, sign * bank.embeds[labelled.labels], 0)
        (score,) = TextScorer([labelled], [features], plan.tokenizer)(student).values()
        assert score == wanted


def test_the_teachers_features_are_of_every_image(labelled_dir: Path) -> None:
    labelled, teacher = open_labelled(str(labelled_dir)), load_teacher("sample")
    (features,) = teacher_features(teacher, [labelled])
    assert features.embeds.shape == (len(labelled.labels), teacher.embed_dim)
    np.testing.assert_allclose(np.linalg.norm(features.embeds, axis=1), 1.0, atol=1e-5)
