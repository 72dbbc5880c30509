"""embed and distill, through the command line."""

from __future__ import annotations

import json

import pytest

from dimefm_edge import cli, pipeline
from dimefm_edge.config import RunConfig, load
from dimefm_edge.errors import BudgetError


def _json(capsys, *words):
    code = cli.main([*map(str, words), "--json"])
    return code, json.loads(capsys.readouterr().out)


@pytest.fixture
def sentences(tmp_path):
    path = tmp_path / "sentences.txt"
    path.write_text("a cat on a mat\na dog\n\nan eel in the sea\n")
    return path


def test_embed_fills_a_store_and_a_second_run_adds_nothing(
    tiny_teacher_dir, labelled_dir, sentences, tmp_path, capsys
):
    store = tmp_path / "store"
    words = ("embed", "--teacher", tiny_teacher_dir, "--images", labelled_dir, "--texts",
             sentences, "--store", store)  # fmt: skip
    code, values = _json(capsys, *words)
    assert code == 0
    assert values["teacher"] == str(tiny_teacher_dir)
    assert (values["images"]["num_rows"], values["images"]["num_bad"]) == (12, 0)
    assert values["texts"]["num_rows"] == 3
    assert values["texts"]["embed_dim"] == 16
    before = {p: p.stat().st_mtime_ns for p in store.rglob("*.*") if "manifest" not in p.name}
    assert before
    assert _json(capsys, *words, "--verify") == (0, values)
    assert {p: p.stat().st_mtime_ns for p in before} == before


def test_embed_counts_the_sentences_that_it_leaves_out(
    tiny_teacher_dir, sentences, tmp_path, capsys
):
    with sentences.open("ab") as stream:
        stream.write(b"caf\xe9\n" * 2)
    words = ["embed", "--teacher", str(tiny_teacher_dir), "--texts", str(sentences), "--store",
             str(tmp_path / "store")]  # fmt: skip
    assert cli.main(words) == 2
    said = capsys.readouterr().err
    assert "2 of 5 sentences cannot be used, more than --max-bad allows (0)" in said
    assert f"the first is {sentences}:5 (not UTF-8)" in said
    assert "--max-bad 2" in said
    assert cli.main([*words, "--max-bad", "2"]) == 0
    head, _, row = capsys.readouterr().out.splitlines()[:3]
    assert head.split()[:4] == ["store", "rows", "left", "out"]
    assert row.split()[:3] == ["texts", "3", "2"]
    code, values = _json(capsys, *words)
    assert (code, values["texts"]["num_rows"], values["texts"]["num_bad"]) == (0, 3, 2)


def test_corpus_refuses_too_many_sentences_left_out(
    tiny_teacher_dir, labelled_dir, sentences, tmp_path, capsys
):
    with sentences.open("ab") as stream:
        stream.write(b"caf\xe9\n" * 2)
    words = ["corpus", "--teacher", str(tiny_teacher_dir), "--images", str(labelled_dir),
             "--texts", str(sentences), "--out", str(tmp_path / "out"), "--keep", "1"]  # fmt: skip
    assert cli.main(words) == 2
    assert "2 of 5 sentences cannot be used" in capsys.readouterr().err
    assert cli.main([*words, "--max-bad", "2"]) == 0


def test_a_store_of_another_teacher_is_refused(
    tiny_teacher_dir, tiny_run_dir, sentences, tmp_path, capsys
):
    words = ["embed", "--texts", str(sentences), "--store", str(tmp_path / "store")]
    assert cli.main([*words, "--teacher", str(tiny_teacher_dir)]) == 0
    assert cli.main([*words, "--teacher", str(tiny_run_dir)]) == 2
    said = capsys.readouterr().err
    assert str(tiny_teacher_dir) in said
    assert "Traceback" not in said


def test_dry_run_prints_settings_that_make_the_same_run(tmp_path, capsys):
    words = ["distill", "--dry-run", "--epochs", "3", "--out", str(tmp_path / "run")]
    assert cli.main(words) == 0
    path = tmp_path / "run.toml"
    path.write_text(capsys.readouterr().out)
    settings = load(path, RunConfig)
    assert settings.train.epochs == 3
    assert settings.data.eval_sets == ("scenes",)
    assert settings == pipeline.resolve(settings)
    assert not (tmp_path / "run").exists()
    code, values = _json(capsys, *words)
    assert code == 0
    assert values["train"]["epochs"] == 3


class _Report:
    def __init__(self, *, fits_budget):
        self.fits_budget = fits_budget

    def to_dict(self):
        return {"fits_budget": self.fits_budget}

    def to_markdown(self):
        return "# report"


@pytest.mark.parametrize(("fits", "code"), [(True, 0), (False, 3)])
def test_distill_hands_over_its_settings_and_judges_the_budget(fits, code, monkeypatch, capsys):
    seen = {}

    def run(config, *, resume):
        seen.update(config=config, resume=resume)
        return _Report(fits_budget=fits)

    monkeypatch.setattr(pipeline, "run", run)
    words = ["distill", "--target", "jetson-nano", "--images", "a", "b", "--resume"]
    assert cli.main(words) == code
    assert capsys.readouterr().out == "# report\n"
    assert seen["resume"]
    assert seen["config"].target == "jetson-nano"
    assert seen["config"].data.images == ("a", "b")
    assert _json(capsys, *words) == (code, {"fits_budget": fits})


def test_distill_without_a_student_that_fits(monkeypatch, capsys):
    def run(config, *, resume):
        raise BudgetError("no student meets 0.1 ms", hint="dimefm-edge fit")

    monkeypatch.setattr(pipeline, "run", run)
    assert cli.main(["distill"]) == 3
    assert capsys.readouterr().err == ("error: no student meets 0.1 ms\n  try: dimefm-edge fit\n")


def test_distill_on_another_rank_says_nothing(monkeypatch, capsys):
    monkeypatch.setattr(pipeline, "run", lambda config, *, resume: None)
    assert _words_of(capsys, cli.main(["distill", "--json"])) == (0, "")


def _words_of(capsys, code):
    return code, capsys.readouterr().out


def test_resuming_what_is_not_there_begins_no_default_run(tmp_path, capsys):
    (tmp_path / "first").mkdir()
    assert cli.main(["distill", "--out", str(tmp_path / "frist"), "--resume"]) == 2
    said = capsys.readouterr().err
    assert "there is no run to go on with" in said
    assert "the nearest in" in said
    assert "'first'" in said
    assert not (tmp_path / "frist").exists()
