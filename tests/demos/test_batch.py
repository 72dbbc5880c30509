"""Many pictures to a table."""

from __future__ import annotations

import csv

import pytest

from dimefm_demo.batch import classify_batch
from dimefm_demo.classify import NONE, Question
from dimefm_demo.inputs import UploadPool
from dimefm_demo.presets import PRESETS
from dimefm_edge.errors import CheckpointError
from tests.demos import bad_files as bad

SCENES = PRESETS["scenes"]()
FILES = {
    "red ladder.png": bad.encoded(bad.scene("red ladder"), "PNG"),
    "=cmd.png": bad.encoded(bad.scene("blue heart"), "PNG"),
    "broken.jpg": b"no picture",
    "blue heart.png": bad.encoded(bad.scene("blue heart"), "PNG"),
}


def run(models, tmp_path, question, *, top_k=2, stop_after=99):
    (tmp_path / "p.zip").write_bytes(bad.zipped(FILES))
    out = tmp_path / "labels.csv"
    steps = classify_batch(
        models, models.wait_for("baked"), UploadPool([tmp_path / "p.zip"]), question, out,
        top_k=top_k,
    )  # fmt: skip
    done = []
    for step in steps:
        done.append(step)
        if step == stop_after:
            steps.close()
    with out.open(newline="", encoding="utf-8") as stream:
        return done, list(csv.DictReader(stream))


def test_each_picture_is_a_line(models, tmp_path):
    question = Question(SCENES.labels, SCENES.templates)
    done, rows = run(models, tmp_path, question)
    assert done == [1, 2, 3, 4]
    assert [row["file"] for row in rows] == [
        "red ladder.png", "'=cmd.png", "broken.jpg", "blue heart.png"
    ]  # fmt: skip
    assert [row["label_1"] for row in rows] == ["red ladder", "blue heart", "", "blue heart"]
    assert rows[2]["error"].startswith("it is no JPEG")
    assert not rows[0]["error"]
    assert float(rows[0]["probability_1"]) > float(rows[0]["probability_2"]) >= 0
    assert "label_3" not in rows[0]


def test_stopped_half_way_it_keeps_what_is_done(models, tmp_path):
    done, rows = run(models, tmp_path, Question(SCENES.labels), stop_after=2)
    assert done == [1, 2]
    assert len(rows) == 2


def test_fewer_labels_make_fewer_columns(models, tmp_path):
    question = Question(("red ladder",), with_none=True)
    _, rows = run(models, tmp_path, question, top_k=9)
    assert [row["label_1"] for row in rows] == ["red ladder", NONE, "", NONE]
    assert list(rows[0])[-2:] == ["probability_2", "error"]


def test_what_cannot_be_asked_is_said_at_once(models, tmp_path):
    with pytest.raises(CheckpointError, match="baked has no text side"):
        run(models, tmp_path, Question(("a dog",)))
