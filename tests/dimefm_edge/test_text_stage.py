"""A run with a text student: what it leaves, who uses it, what it refuses before it begins."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import pytest
import torch
from safetensors.torch import save_file

from dimefm_edge import cli
from dimefm_edge.config import TextStudentConfig, TrainConfig
from dimefm_edge.data.scenes import scene_image, scene_sentence
from dimefm_edge.distributed import Ranks
from dimefm_edge.encoders import TextTower
from dimefm_edge.errors import ConfigError, ExportError, UnknownNameError
from dimefm_edge.run_log import read_metrics
from dimefm_edge.runtime import ZeroShotClassifier, load_bundle, load_text_encoder
from dimefm_edge.students.text_checkpoint import load_text_student
from dimefm_edge.subjects import load_subject
from dimefm_edge.teacher import SAMPLE_DIR, load_teacher
from dimefm_edge.text_stage import TextPlan, plan_text, text_stage

pytestmark = pytest.mark.usefixtures("short_timing")

CLIP: dict[str, Any] = {
    "embed_dim": 16,
    "vision_cfg": {"image_size": 32, "patch_size": 16, "width": 32, "layers": 2, "head_width": 16},
    "text_cfg": {"context_length": 32, "vocab_size": 426, "width": 16, "heads": 2, "layers": 3},
}
LABELS = ["a red ball", "two small blue rings"]
AUTO = TextStudentConfig(text_student="auto")


@pytest.fixture(scope="module")
def teacher_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A teacher with random weights and the sample's tokenizer."""
    folder = tmp_path_factory.mktemp("teacher")
    torch.manual_seed(0)
    settings = {"model_cfg": CLIP, "preprocess_cfg": {}}
    (folder / "open_clip_config.json").write_text(json.dumps(settings))
    save_file(open_clip.CLIP(**CLIP).state_dict(), folder / "open_clip_model.safetensors")
    shutil.copy(SAMPLE_DIR / "tokenizer.json", folder)
    return folder


@pytest.fixture(scope="module")
def words(teacher_dir: Path, labelled_dir: Path, tmp_path_factory: pytest.TempPathFactory):
    """A command line that distils both students in seconds; `--out` comes last."""
    folder = tmp_path_factory.mktemp("data")
    (folder / "images").mkdir()
    for index in range(20):
        scene_image(index).save(folder / "images" / f"{index:03d}.png")
    (folder / "texts.txt").write_text("".join(f"{scene_sentence(i)}\n" for i in range(30)))
    return [
        "distill", "--teacher", str(teacher_dir), "--images", str(folder / "images"),
        "--texts", str(folder / "texts.txt"), "--eval-sets", str(labelled_dir), "--steps", "4",
        "--batch-size", "8", "--text-batch-size", "8", "--student", "vit-p16-w32-d2",
        "--latency-ms", "1", "--text-student", "auto", "--text-steps", "30", "--amp", "off",
        "--threads", "1", "--out", str(folder / "run"),
    ]  # fmt: skip


@pytest.fixture(scope="module")
def run_dir(words: list[str]) -> Path:
    assert cli.main(words) == 0
    return Path(words[-1])


def test_the_run_holds_a_text_student_and_says_what_it_is_worth(run_dir: Path) -> None:
    for name in ("checkpoint.safetensors", "tokenizer.json", "training_state.pt", "metrics.jsonl"):
        assert (run_dir / "text" / name).is_file(), name
    text = json.loads((run_dir / "report.json").read_text())["text"]
    assert text["student"]["name"] == "text-w16-d1-e4"
    assert text["student"]["params_m"] < 0.5 * text["teacher"]["params_m"]
    assert text["student"]["size_mib"] < text["teacher"]["size_mib"]
    assert text["teacher"]["here_runtime"] == "ONNX Runtime"
    assert 0 < text["student"]["here_p50_ms"] <= text["student"]["here_p90_ms"]
    assert text["inherited"]
    assert text["training"]["steps"] == 30
    assert text["parity"]["max_abs_diff"] < 1e-4
    (row,) = text["accuracy"]
    figures = [row[f"{i}_image_{t}_text_pct"] for i in ("teacher", "student")
               for t in ("teacher", "student")]  # fmt: skip
    assert all(0 <= figure <= 100 for figure in figures)
    assert -1 <= row["label_cosine_min"] <= row["label_cosine_mean"] <= 1
    page = (run_dir / "report.md").read_text()
    assert f"| text-w16-d1-e4 | {text['student']['params_m']:.2f} M |" in page
    assert f"{row['student_image_student_text_pct']:.1f}%" in page
    losses = [r["loss"] for r in read_metrics(run_dir / "text") if "loss" in r]
    assert len(losses) == 30
    assert np.mean(losses[-5:]) < np.mean(losses[:5])


def test_everyone_asks_the_same_text_student(run_dir: Path) -> None:
    loaded = load_text_student(run_dir)
    with torch.no_grad():
        wanted = loaded.student(torch.from_numpy(loaded.tokenizer(LABELS))).numpy()
    bundle = load_bundle(run_dir / "bundle")
    assert bundle.manifest["text"]["name"] == "text-w16-d1-e4"
    teacher = load_teacher(str(run_dir))
    subject = load_subject(run_dir)
    assert subject.encode_texts is not None
    for encode in (
        teacher.encode_texts, subject.encode_texts, load_text_encoder(bundle).encode_texts,
    ):  # fmt: skip
        np.testing.assert_allclose(encode(LABELS), wanted, atol=1e-5)
    assert teacher.logit_scale == pytest.approx(bundle.logit_scale)
    answers = ZeroShotClassifier(run_dir / "bundle").classify([scene_image(0)], labels=LABELS)
    assert sorted(name for name, _ in answers[0]) == sorted(LABELS)


def test_the_teacher_that_it_was_taught_by_is_no_longer_needed(
    run_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from dimefm_edge import teacher as teacher_module

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("the teacher was loaded")

    monkeypatch.setattr(teacher_module, "_from_open_clip", refuse)
    assert load_teacher(str(run_dir)).encode_texts(LABELS).shape == (2, 16)


def test_baked_labels_stay_the_teachers(run_dir: Path, teacher_dir: Path) -> None:
    (bank,) = load_bundle(run_dir / "bundle").label_banks.values()
    sentences = [bank.templates[0].replace("{c}", name) for name in bank.classnames]
    if len(bank.templates) == 1:
        wanted = load_teacher(str(teacher_dir)).encode_texts(sentences)
        np.testing.assert_allclose(bank.embeds, wanted, atol=1e-5)
    own = load_teacher(str(run_dir)).encode_texts(sentences)
    assert np.abs(bank.embeds - own).max() > 1e-3


@pytest.mark.parametrize(
    ("flags", "text_name"),
    [([], "text-w16-d1-e4"), (["--teacher-text"], "teacher"), (["--image-only"], None)],
    ids=["its own", "the teacher's", "none"],
)
def test_export_takes_the_runs_own_unless_told(
    flags: list[str], text_name: str | None, run_dir: Path, teacher_dir: Path, tmp_path: Path
) -> None:
    assert cli.main(["export", str(run_dir), "--out", str(tmp_path / "b"), *flags]) == 0
    text = load_bundle(tmp_path / "b").manifest["text"]
    wanted = str(teacher_dir) if text_name == "teacher" else text_name
    assert (text and text["name"]) == wanted


def test_contradicting_flags_of_export(run_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["export", str(run_dir), "--teacher-text", "--image-only"]) == 2
    assert "--teacher-text and --image-only contradict" in capsys.readouterr().err


def test_stopped_in_the_text_stage_it_goes_on_to_the_same_weights(
    run_dir: Path, words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from dimefm_edge import distill as distill_module

    optimise = distill_module._Loop.optimise

    def stop_at_17(self) -> float:  # type: ignore[no-untyped-def]
        if self.side.unit == "sentences" and self.step == 17:
            raise KeyboardInterrupt
        return optimise(self)

    stopped = [*words[:-1], str(tmp_path / "stopped")]
    monkeypatch.setattr(distill_module._Loop, "optimise", stop_at_17)
    assert cli.main(stopped) == 130
    monkeypatch.setattr(distill_module._Loop, "optimise", optimise)
    assert cli.main([*stopped, "--resume"]) == 0
    whole, resumed = (load_text_student(path).student for path in (run_dir, tmp_path / "stopped"))
    for (name, value), other in zip(
        whole.state_dict().items(), resumed.state_dict().values(), strict=True
    ):
        assert torch.equal(value, other), name


# ------------------------------------------------------------- before training begins


def test_none_is_asked_for_by_default() -> None:
    assert plan_text(TextStudentConfig(), TrainConfig(), load_teacher("sample"), Ranks()) is None


def test_the_samples_text_student() -> None:
    plan = plan_text(AUTO, TrainConfig(), load_teacher("sample"), Ranks())
    assert plan is not None
    assert (plan.spec.name, plan.spec.context_length) == ("text-w128-d1-e32", 32)


def test_what_no_text_student_can_follow_is_said_first(
    words: list[str], teacher_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    joined = [f"{teacher_dir}+{teacher_dir}" if w == str(teacher_dir) else w for w in words]
    assert cli.main([*joined[:-1], str(tmp_path / "run")]) == 2
    said = capsys.readouterr().err
    assert "an ensemble's, with a tokenizer for each of its teachers" in said
    assert "--text-student none" in said
    assert not (tmp_path / "run").exists()


def test_a_hugging_face_tower_is_named(teacher_dir: Path) -> None:
    class HFTextEncoder(torch.nn.Module):
        pass

    teacher = load_teacher(str(teacher_dir))
    model = torch.nn.Module()
    model.text = HFTextEncoder()
    teacher.text_tower = TextTower(model)
    with pytest.raises(ConfigError, match="it is a HFTextEncoder with parts of its own"):
        plan_text(AUTO, TrainConfig(), teacher, Ranks())


def test_a_tokenizer_that_cannot_come_along_is_named(teacher_dir: Path) -> None:
    teacher = load_teacher(str(teacher_dir))
    teacher.tokenize = lambda sentences: np.zeros((len(sentences), 32), np.int64)
    with pytest.raises(ExportError, match="cannot run without open_clip"):
        plan_text(AUTO, TrainConfig(), teacher, Ranks())


def test_wrong_names_and_settings(teacher_dir: Path) -> None:
    teacher = load_teacher(str(teacher_dir))
    with pytest.raises(UnknownNameError, match="unknown text student 'autoo'"):
        plan_text(TextStudentConfig(text_student="autoo"), TrainConfig(), teacher, Ranks())
    with pytest.raises(ConfigError, match="text_batch_size 9 cannot be split over 2 ranks"):
        plan_text(AUTO, TrainConfig(text_batch_size=9), teacher, Ranks(0, 2))
    with pytest.raises(ConfigError, match="text_images must be positive, got 0"):
        TextStudentConfig(text_images=0)
    with pytest.raises(ConfigError, match="one of the text weights must be positive"):
        TextStudentConfig(text_vl_weight=0, text_pvl_weight=0, text_feature_weight=0)


def test_the_settings_of_the_stage() -> None:
    train = TrainConfig(
        batch_size=64, text_batch_size=48, accumulate=2, hard_negatives=0.5, views=2, seed=9
    )
    found = text_stage(train, TextStudentConfig(text_lr=2e-3), 70)
    assert (found.steps, found.batch_size, found.lr, found.seed) == (70, 48, 2e-3, 9)
    assert (found.accumulate, found.views, found.hard_negatives) == (1, 0, 0.0)
    assert text_stage(train, TextStudentConfig(text_steps=5), 70).steps == 5


def test_a_run_that_begins_from_another_trains_its_text_student_on(
    run_dir: Path, words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    at, init = words.index("--student"), shutil.copytree(run_dir, tmp_path / "init")
    again = [*words[:at], *words[at + 2 : -1], str(tmp_path / "on"), "--init-from", str(init)]
    again += ["--text-steps", "1", "--text-lr", "1e-6"]
    assert cli.main(again) == 0
    before, after = (load_text_student(folder).student for folder in (init, tmp_path / "on"))
    for name, weight in before.state_dict().items():
        torch.testing.assert_close(after.state_dict()[name], weight, atol=1e-4, rtol=0)

    def assert_it_is_told() -> None:
        text = json.loads((tmp_path / "on" / "report.json").read_text())["text"]
        assert text["init_from"] == str(init)
        assert f"initial weights those of `{init}`" in (tmp_path / "on" / "report.md").read_text()

    assert_it_is_told()
    init.rename(tmp_path / "moved")  # begun, it needs that no more
    assert cli.main([*again, "--resume"]) == 0
    assert_it_is_told()
    shutil.rmtree(tmp_path / "on" / "text")  # not begun
    assert cli.main([*again, "--resume"]) == 2
    assert "is gone, whose text student was to be trained on" in capsys.readouterr().err


def test_another_shape_does_not_begin_from_it_and_none_is_told(
    run_dir: Path, teacher_dir: Path, caplog: pytest.LogCaptureFixture
) -> None:
    teacher = load_teacher(str(teacher_dir))

    def plan(name: str, **settings: Any) -> TextPlan | None:
        config = TextStudentConfig(text_student=name, **settings)
        return plan_text(config, TrainConfig(), teacher, Ranks(), init_from=str(run_dir))

    own, other = plan("text-w16-d1-e4"), plan("text-w16-d2-e4")
    assert own is not None
    assert other is not None
    assert (own.init_from, other.init_from) == (str(run_dir), None)
    anew = plan("auto", text_init="random")
    assert anew is not None
    assert anew.init_from is None
    assert plan("none") is None
    assert "the text student of" in caplog.text
    assert "is left behind" in caplog.text
