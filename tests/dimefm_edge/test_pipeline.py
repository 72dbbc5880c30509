"""The whole walk with a tiny real teacher: what it leaves, resumes and refuses."""

from __future__ import annotations

import contextlib
import gzip
import io
import json
import resource
import shutil
import signal
import time
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from dimefm_edge import cli
from dimefm_edge.config import DataConfig, RunConfig, StudentConfig, TrainConfig, load
from dimefm_edge.data.scenes import scene_image, scene_sentence
from dimefm_edge.data.sentences import open_sentences
from dimefm_edge.errors import ConfigError
from dimefm_edge.pipeline import resolve, run
from tests.dimefm_edge.forks import Fork

pytestmark = pytest.mark.usefixtures("short_timing")


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("images")
    for index in range(40):
        scene_image(index).save(folder / f"{index:03d}.png")
    return folder


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("texts") / "sentences.txt.gz"
    with gzip.open(path, "wt") as stream:
        stream.writelines(f"{scene_sentence(index)}\n" for index in range(30))
    return path


def _words(*, teacher: Path, images: Path, texts: Path, labelled: Path, out: Path) -> list[str]:
    return [
        "distill", "--teacher", str(teacher), "--images", str(images),
        "--texts", str(texts), "--eval-sets", str(labelled), "--steps", "6",
        "--batch-size", "8", "--text-batch-size", "8", "--out", str(out),
        "--student", "vit-p16-w32-d2", "--latency-ms", "1",
    ]  # fmt: skip


@pytest.fixture
def words(tiny_teacher_dir: Path, images: Path, texts: Path, labelled_dir: Path, tmp_path: Path):
    """A command line that distils in seconds, writing to `tmp_path / "run"`."""
    return _words(
        teacher=tiny_teacher_dir, images=images, texts=texts, labelled=labelled_dir,
        out=tmp_path / "run",
    )  # fmt: skip


@pytest.fixture(scope="module")
def finished(
    tiny_teacher_dir: Path, images: Path, texts: Path, labelled_dir: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> tuple[Path, str]:  # fmt: skip
    """What `words` leave and print. Do not change it: `run_dir` is a copy."""
    out = tmp_path_factory.mktemp("finished") / "run"
    words = _words(
        teacher=tiny_teacher_dir, images=images, texts=texts, labelled=labelled_dir, out=out
    )
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        assert cli.main(words) == 0
    return out, printed.getvalue()


@pytest.fixture
def run_dir(finished: tuple[Path, str], tmp_path: Path) -> Path:
    """A finished run of `words`."""
    run_dir = Path(shutil.copytree(finished[0], tmp_path / "run"))
    config = run_dir / "config.toml"
    config.write_text(config.read_text().replace(str(finished[0]), str(run_dir)))
    return run_dir


def _replaced(words: list[str], flag: str, value: object) -> list[str]:
    index = words.index(flag)
    return [*words[: index + 1], str(value), *words[index + 2 :]]


def _run_json(words: list[str], capsys: pytest.CaptureFixture[str]) -> tuple[int, dict]:
    code = cli.main([*words, "--json"])
    return code, json.loads(capsys.readouterr().out)


def test_the_walk_leaves_what_the_contract_says(finished, words, labelled_dir, capsys):
    run_dir, _ = finished
    report = json.loads((run_dir / "report.json").read_text())
    files = (
        "config.toml", "checkpoint.safetensors", "training_state.pt", "metrics.jsonl",
        "report.json", "report.md", "fit.png", "fit.json", "bundle/model.onnx",
        "bundle/manifest.json", "bundle/labels.npz", "store/images/manifest.json",
    )  # fmt: skip
    for name in files:
        assert (run_dir / name).is_file(), name
    assert report["data"] == {
        "num_images": 40, "num_bad": 0, "num_texts": 30, "bad_examples": [],
        "num_texts_embedded": 30, "num_texts_left_out": 0,
    }  # fmt: skip
    assert report["fits_budget"]
    assert report["student"]["target_ms"] <= report["budget_ms"]
    assert report["inherited"]
    assert report["parity"]["max_abs_diff"] <= 1e-4
    assert report["parity"]["num_images"] == 32
    assert 0 < report["student"]["here_p50_ms"] <= report["student"]["here_p90_ms"]
    accuracy = report["accuracy"][0]
    assert accuracy["student"]["num_images"] == 12
    # The commands that read the run agree with its report.
    for subject, expected in ((run_dir / "bundle", "student"), (run_dir, "student")):
        code, values = _run_json(["eval", str(subject)], capsys)
        assert code == 0, values
        assert values["results"][0]["top1_pct"] == accuracy[expected]["top1_pct"], subject
    code, values = _run_json(["eval", words[2], "--data", str(labelled_dir)], capsys)
    assert code == 0, values
    assert values["results"][0]["top1_pct"] == accuracy["teacher"]["top1_pct"]


def test_report_page_says_the_figures(finished):
    run_dir, page = finished
    assert page.strip() == (run_dir / "report.md").read_text().strip()
    values = json.loads((run_dir / "report.json").read_text())
    assert f"| {values['student']['here_p50_ms']:.2f} /" in page
    assert f"{values['accuracy'][0]['student']['top1_pct']:.1f}%" in page


def test_a_second_run_is_refused_and_resuming_a_finished_one_changes_nothing(
    words, run_dir, capsys
):
    before = load_file(run_dir / "checkpoint.safetensors")
    assert cli.main(words) == 2
    said = capsys.readouterr().err
    assert "already holds a run" in said
    assert "--resume" in said
    # Without the other flags: the run's own config.toml gives them.
    assert cli.main(["distill", "--resume", "--out", str(run_dir)]) == 0
    after = load_file(run_dir / "checkpoint.safetensors")
    assert all(np.array_equal(before[key], after[key]) for key in before)


def test_what_is_refused_leaves_the_run_as_it_was(run_dir, tmp_path, capsys):
    before = (run_dir / "config.toml").read_bytes()
    for flags, told in (
        (("--steps", "1"), "steps was 6 and is 1"),
        (("--text-rows", str(tmp_path / "none.npz")), "none.npz"),
    ):
        assert cli.main(["distill", "--resume", "--out", str(run_dir), *flags]) == 2
        assert told in capsys.readouterr().err
        assert (run_dir / "config.toml").read_bytes() == before


def test_a_store_that_is_not_there_yet_is_known_by_its_whole_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert resolve(RunConfig(store="scenes")).store == str(tmp_path / "scenes")
    assert resolve(RunConfig()).store is None


def test_a_start_that_never_trained_is_begun_anew(words, tmp_path, capsys, caplog):
    student = _replaced(words, "--student", "vit-p16-w32-d1")
    for again, name in ((words, "none.npz"), (student, "other.npz")):
        assert cli.main([*again, "--text-rows", str(tmp_path / name)]) == 2
        assert f"{name} is no kept_rows.npz" in capsys.readouterr().err
    assert cli.main([*_replaced(words, "--out", tmp_path / "typo"), "--resume"]) == 0
    assert "typo holds no run yet" in caplog.text


def test_a_killed_run_resumes_to_the_same_weights(words, tmp_path, capsys):
    words = [*_replaced(words, "--steps", 40), "--save-every", "2", "--amp", "off"]
    words += ["--threads", "1"]
    assert cli.main(words) == 0
    killed_dir = tmp_path / "killed"
    killed = _replaced(words, "--out", killed_dir)
    process = Fork(cli.main, killed, tmp_path / "killed.log")
    deadline = time.monotonic() + 120
    while not (killed_dir / "training_state.pt").is_file():
        assert process.poll() is None, process.said
        assert time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    assert process.wait(60) == -signal.SIGKILL
    assert cli.main([*killed, "--resume"]) == 0
    whole, resumed = (
        load_file(folder / "checkpoint.safetensors") for folder in (tmp_path / "run", killed_dir)
    )
    assert all(np.array_equal(whole[key], resumed[key]) for key in whole)


def test_unreadable_images_are_counted_skipped_and_reported(words, images, tmp_path, capsys):
    mixed = tmp_path / "mixed"
    shutil.copytree(images, mixed)
    (mixed / "cut.png").write_bytes((images / "000.png").read_bytes()[:300])
    (mixed / "text.jpg").write_text("not an image")
    words = _replaced(words, "--images", mixed)
    code, report = _run_json(words, capsys)
    assert code == 0, report
    assert json.loads((tmp_path / "run" / "report.json").read_text()) == report
    assert (report["data"]["num_images"], report["data"]["num_bad"]) == (42, 2)
    shown = " ".join(report["data"]["bad_examples"])
    assert "cut.png" in shown
    assert "text.jpg" in shown


def _cases(tmp_path: Path, tiny_teacher_dir: Path, images: Path) -> dict[str, tuple]:
    """name -> (flag, value, exit code, what the message holds, what the hint holds)."""
    empty = tmp_path / "empty"
    empty.mkdir()
    blank = tmp_path / "blank.txt"
    blank.write_bytes(b"\n\xff\xfe\xff\n  \n")
    broken = tmp_path / "broken"
    shutil.copytree(tiny_teacher_dir, broken)
    weights = broken / "open_clip_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:5000])
    bad = tmp_path / "bad"
    bad.mkdir()
    shutil.copy(images / "000.png", bad)
    for index in range(5):
        (bad / f"{index}.jpg").write_bytes(b"\xff\xd8\xff\xe0 cut")
    half = tmp_path / "half.txt"
    half.write_bytes(b"a red star\n" * 40 + b"caf\xe9\n" * 400)
    foreign = tmp_path / "foreign"
    foreign.write_text("a file")
    return {
        "no images": ("--images", tmp_path / "nowhere", 2, "nowhere"),
        "no tar": ("--images", tmp_path / "{00..01}.tar", 2, ".tar"),
        "no texts": ("--texts", tmp_path / "nowhere.txt", 2, "nowhere.txt"),
        "empty pool": ("--images", empty, 2, "no image"),
        "no usable line": ("--texts", blank, 2, "no sentence"),
        "teacher folder": ("--teacher", tmp_path / "nobody", 2, "nobody"),
        "teacher name": ("--teacher", "ViT-B-23:openai", 2, "Did you mean 'ViT-B-32'"),
        "truncated teacher": ("--teacher", broken, 2, "cannot be read"),
        "too many bad": ("--images", bad, 2, "more than --max-bad allows"),
        "too many left out": ("--texts", half, 2, "400 of 440 sentences cannot be used"),
        "out is a file": ("--out", foreign, 2, "is a file"),
        "test set": ("--eval-sets", tmp_path / "notest", 2, "notest"),
    }


CASES = (
    "no images", "no tar", "no texts", "empty pool", "no usable line", "teacher folder",
    "teacher name", "truncated teacher", "too many bad", "too many left out", "out is a file",
    "test set",
)  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_bad_input_is_one_line_that_names_the_mend(
    name, words, tmp_path, tiny_teacher_dir, images, capsys
):
    flag, value, code, expected = _cases(tmp_path, tiny_teacher_dir, images)[name]
    assert cli.main(_replaced(words, flag, value)) == code
    said = capsys.readouterr().err
    lines = [line for line in said.splitlines() if line.startswith(("error:", "  try:"))]
    assert expected in said
    assert lines[0].startswith("error:")
    assert "Did you mean" in lines[0] or lines[1].startswith("  try:"), said
    assert "Traceback" not in said


@pytest.mark.parametrize(
    ("flags", "code", "expected"),
    [
        (["--target", "jetson-orinn"], 2, "Did you mean 'jetson-orin'?"),
        (["--student", "vit-tini"], 2, "Did you mean 'vit-tiny'?"),
        (["--latency-ms", "0.000001"], 3, "no student meets"),
        (["--image-size", "31", "--student", "hybrid"], 2, "31 px"),
        (["--batch-size", "0"], 2, "batch_size must be positive"),
        (["--contrastive-weight", "1"], 2, "contrastive_weight needs labelled images"),
    ],
)
def test_bad_settings(flags, code, expected, words, tmp_path, capsys):
    for flag, value in zip(flags[::2], flags[1::2], strict=True):
        words = _replaced(words, flag, value) if flag in words else [*words, flag, value]
    assert cli.main(words) == code
    said = capsys.readouterr().err
    assert expected in said
    assert "Traceback" not in said
    assert not (tmp_path / "run").exists()


def test_the_contrastive_baseline_is_the_same_walk(words, labelled_dir, tmp_path, capsys):
    code, report = _run_json(
        [*words, "--labelled", str(labelled_dir), "--contrastive-weight", "1", "--vl-weight", "0",
         "--pvl-weight", "0", "--contrastive-positives", "label"], capsys,
    )  # fmt: skip
    assert code in (0, 3)
    assert report["data"]["num_images"] == 12  # the labelled set's, not those of --images
    rows = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    assert {"contrastive", "loss"} <= set(json.loads(rows[0]))
    assert not {"vl", "pvl"} & set(json.loads(rows[0]))


def test_an_empty_or_unreadable_line_of_text_is_skipped(words, tmp_path, capsys):
    path = tmp_path / "mixed.txt"
    good = "".join(f"{scene_sentence(index)}\n" for index in range(10)).encode()
    path.write_bytes(b"\n\xff\xfe broken\n" + good + b"   \n")
    code, report = _run_json(_replaced(words, "--texts", path), capsys)
    assert code == 0, report
    assert (report["data"]["num_texts"], report["data"]["num_texts_left_out"]) == (10, 1)
    page = (tmp_path / "run" / "report.md").read_text()
    assert ", 10 sentences (1 left out).\n" in page


def test_max_bad_goes_on_without_the_sentences_left_out(words, tmp_path, capsys):
    path = tmp_path / "half.txt"
    path.write_bytes(b"a red star\na blue ring\n" * 5 + b"caf\xe9\n" * 20)
    words = _replaced(words, "--texts", path)
    assert cli.main(words) == 2
    assert "try: mend them, or go on without them: --max-bad 20" in capsys.readouterr().err
    code, report = _run_json([*words, "--max-bad", "20"], capsys)
    assert code == 0, report
    assert (report["data"]["num_texts"], report["data"]["num_texts_left_out"]) == (10, 20)


def test_the_report_counts_the_sentences_that_were_trained_on(words, texts, tmp_path, capsys):
    source = open_sentences([str(texts)]).fingerprint
    np.savez(tmp_path / "kept_rows.npz", rows=np.arange(5, 25), source=source)
    flags = ["--text-rows", str(tmp_path / "kept_rows.npz")]
    code, report = _run_json([*words, *flags], capsys)
    assert code == 0, report
    assert (report["data"]["num_texts"], report["data"]["num_texts_embedded"]) == (20, 30)
    assert ", 20 of 30 sentences.\n" in (tmp_path / "run" / "report.md").read_text()


def test_a_store_of_another_teacher_is_refused_by_name(
    words, tiny_run_dir, tiny_teacher_dir, tmp_path, capsys
):
    store = ["--store", str(tmp_path / "store")]
    assert cli.main([*words, *store]) == 0
    other = _replaced(_replaced(words, "--teacher", tiny_run_dir), "--out", tmp_path / "other")
    other = _replaced(other, "--student", "vit-nano")
    capsys.readouterr()
    assert cli.main([*other, *store]) == 2
    said = capsys.readouterr().err
    assert str(tiny_teacher_dir) in said
    assert str(tiny_run_dir) in said
    assert "--store" in said
    # A second run with the same teacher shares it.
    assert cli.main([*_replaced(words, "--out", tmp_path / "third"), *store]) == 0


def test_a_truncated_checkpoint_is_named(words, run_dir, capsys):
    path = run_dir / "checkpoint.safetensors"
    path.write_bytes(path.read_bytes()[:2000])
    for command in (["eval", str(run_dir)], ["export", str(run_dir)]):
        assert cli.main(command) == 2
        said = capsys.readouterr().err
        assert "checkpoint.safetensors" in said
        assert "Traceback" not in said
    # Nor is another student chosen on the way, or one from a damaged choice.
    assert cli.main([*_replaced(words, "--latency-ms", 2), "--resume"]) == 2
    assert "latency_ms was 1.0 and is 2.0" in " ".join(capsys.readouterr().err.split())
    fit = run_dir / "fit.json"
    kept = fit.read_bytes()
    fit.write_bytes(kept[:200])
    assert cli.main([*words, "--resume"]) == 2
    assert "fit.json is damaged" in " ".join(capsys.readouterr().err.split())
    fit.write_bytes(kept)
    state = run_dir / "training_state.pt"
    state.write_bytes(state.read_bytes()[:2000])
    assert cli.main([*words, "--resume"]) == 2
    assert "training_state.pt" in capsys.readouterr().err


def on_a_full_disk() -> int:
    """A limit on the size of files stands for the disk: the state of training exceeds it."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, resource.RLIM_INFINITY))
    return cli.main()


def test_a_full_disk_is_one_line_and_loses_nothing(words, tmp_path):
    process = Fork(on_a_full_disk, words, tmp_path / "full.log")
    assert process.wait(120) in (1, 2), process.said
    assert "Traceback" not in process.said
    assert "error:" in process.said
    assert (tmp_path / "run" / "store" / "images" / "manifest.json").is_file()
    assert cli.main([*words, "--resume"]) == 0


def test_resolve_says_what_depends_on_the_data(tmp_path):
    scenes = resolve(RunConfig())
    assert scenes.data.eval_sets == ("scenes",)
    assert (scenes.train.flip, scenes.train.epochs, scenes.train.min_crop) == (False, 5, 0.9)
    own = resolve(RunConfig(data=DataConfig(images=("photos",), texts=("lines.txt",))))
    assert own.data.eval_sets == ()
    assert (own.train.flip, own.train.epochs, own.train.min_crop) == (True, 20, 0.5)
    chosen = resolve(RunConfig(train=TrainConfig(flip=True, epochs=3)))
    assert chosen.train.flip is True
    assert chosen.train.epochs == 3


def test_as_a_function(tiny_teacher_dir, images, texts, tmp_path):
    config = RunConfig(
        teacher=str(tiny_teacher_dir),
        out=str(tmp_path / "run"),
        data=DataConfig(images=(str(images),), texts=(str(texts),)),
        student=StudentConfig(student="hybrid", image_size=64, init="random", latency_ms=0.75),
        train=TrainConfig(steps=2, batch_size=4, text_batch_size=4),
        precision="fp16",
    )
    report = run(config)
    assert report is not None
    assert report.accuracy == ()
    assert report.inherited == ()
    assert report.student_spec["family"] == "hybrid"
    assert report.parity["min_cosine"] >= 0.999
    assert load(tmp_path / "run" / "config.toml", RunConfig) == resolve(config)
    with pytest.raises(ConfigError, match="already holds a run"):
        run(config)


@pytest.fixture(scope="module")
def elastic_run(
    tiny_teacher_dir: Path, images: Path, texts: Path, labelled_dir: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> Path:  # fmt: skip
    """A run of `--elastic`. Do not change it."""
    out = tmp_path_factory.mktemp("elastic") / "run"
    words = _words(
        teacher=tiny_teacher_dir, images=images, texts=texts, labelled=labelled_dir, out=out
    )
    words = _replaced(words, "--student", "convnet-w8-d1.1.1.1")
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        assert cli.main([*words, "--elastic"]) == 0
    assert "| students within |" in printed.getvalue()
    return out


def test_an_elastic_run_holds_scored_students(elastic_run, labelled_dir):
    report = json.loads((elastic_run / "report.json").read_text())
    names = [row["name"] for row in report["cuts"]]
    assert names == ["convnet-w4-d1.1.1.1", "convnet-w8-d1.1.1.1"]
    assert all(0 <= row["top1_pct"][labelled_dir.name] <= 100 for row in report["cuts"])
    assert report["student"]["name"] == names[-1]
    assert report["training"]["steps"] == 6
    assert report["training"]["epochs"] == pytest.approx(6 * 3 * 8 / 40)


def test_fit_takes_a_student_out_that_every_command_takes(elastic_run, tmp_path, capsys):
    small, tuned = tmp_path / "small", tmp_path / "tuned"
    fit = ["fit", "--elastic", str(elastic_run), "--latency-ms"]
    report = json.loads((elastic_run / "report.json").read_text())
    least, most = (row["target_ms"] for row in report["cuts"])
    code, values = _run_json([*fit, str((least + most) / 2), "--out", str(small)], capsys)
    assert code == 0
    assert values["chosen"]["name"] == "convnet-w4-d1.1.1.1"
    assert values["out"] == str(small)
    assert len(values["candidates"]) == 2
    scored = {c["spec"]["name"]: c["top1_pct"] for c in values["candidates"]}
    assert scored == {row["name"]: next(iter(row["top1_pct"].values())) for row in report["cuts"]}
    code, values = _run_json(["eval", str(small)], capsys)
    assert code == 0
    (row,) = values["results"]
    assert row["top1_pct"] == pytest.approx(scored["convnet-w4-d1.1.1.1"])
    assert cli.main(["export", str(small), "--json"]) == 0
    capsys.readouterr()
    words = ["distill", "--config", str(small / "config.toml"), "--out", str(tuned), "--steps", "2"]
    code, values = _run_json(words, capsys)
    assert code == 0
    assert values["student"]["name"] == "convnet-w4-d1.1.1.1"
    assert values["init_from"] == str(small)
    assert not values["cuts"]
    assert not (tuned / "store").exists()  # the elastic run's serves
    small.rename(tmp_path / "moved")  # what it began from is needed no more
    before = (tuned / "checkpoint.safetensors").read_bytes()
    assert cli.main(["distill", "--resume", "--out", str(tuned)]) == 0
    assert (tuned / "checkpoint.safetensors").read_bytes() == before


def test_a_cut_of_another_precision_can_be_trained_on(elastic_run, tmp_path, capsys):
    """Its budget is not the one that a run is held to."""
    words = ["fit", "--elastic", str(elastic_run), "--precision", "int8", "--latency-ms"]
    code, values = _run_json([*words, "100"], capsys)
    assert code == 0
    least = min(c["latency_ms"] for c in values["candidates"])
    out = tmp_path / "cut"
    assert cli.main([*words, str(1.0001 * least), "--out", str(out)]) == 0
    settings = load(out / "config.toml", RunConfig)
    assert settings.student.latency_ms is None
    assert settings.out == f"{out}-tuned"
    assert cli.main(["distill", "--config", str(out / "config.toml"), "--steps", "1"]) in (0, 3)
    assert (tmp_path / "cut-tuned" / "report.json").is_file()


def test_fit_says_what_is_wrong_with_an_elastic_run(elastic_run, run_dir, tmp_path, capsys):
    fit = ["fit", "--latency-ms", "1", "--elastic"]
    out = tmp_path / "out"
    out.mkdir()
    (out / "mine").touch()
    for words, code, expected in (
        ([*fit, str(run_dir)], 2, "holds no smaller students"),
        ([*fit, str(tmp_path / "gone")], 2, "no checkpoint at"),
        ([*fit, str(elastic_run), "--image-size", "64"], 2, "--image-size: the run's is 32"),
        ([*fit, str(elastic_run), "--out", str(out)], 2, "is there already"),
        ([*fit, str(elastic_run), "--families", "vit"], 2, "drop --families"),
        (["fit", "--out", str(out)], 2, "--elastic RUN"),
        ([*fit[:2], "0.0001", "--elastic", str(elastic_run)], 3, "try: --latency-ms 0."),
    ):
        assert cli.main(words) == code
        assert expected in capsys.readouterr().err
    assert [p.name for p in out.iterdir()] == ["mine"]
