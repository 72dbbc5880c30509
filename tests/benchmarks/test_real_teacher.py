"""benchmarks/real_teacher.py on a data folder of its own: it learns, resumes and is a teacher."""

from __future__ import annotations

import gzip
import importlib
import io
import json
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

torch = pytest.importorskip("torch")

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
COLOURS = {"red": (220, 30, 30), "green": (30, 200, 40), "blue": (40, 60, 220), "grey": (90,) * 3}


@pytest.fixture
def script(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    yield importlib.import_module("real_teacher")
    for name in ("real_teacher", "train_teacher"):
        sys.modules.pop(name, None)


def add(tar: tarfile.TarFile, name: str, content: bytes) -> None:
    info = tarfile.TarInfo(name)
    info.size = len(content)
    tar.addfile(info, io.BytesIO(content))


def jpeg(colour: tuple[int, ...], seed: int) -> bytes:
    noise = np.random.default_rng(seed).integers(-20, 20, (32, 32, 3))
    pixels = np.clip(np.asarray(colour) + noise, 0, 255).astype(np.uint8)
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, "JPEG")
    return stream.getvalue()


@pytest.fixture
def data_dir(tmp_path) -> Path:
    """The layout of the studies' data: two classes in each set, told apart by colour."""
    root = tmp_path / "data"
    (root / "teacher").mkdir(parents=True)
    (root / "text").mkdir()
    sets = {"cifar10": ("red", "green"), "tiny-imagenet": ("blue", "grey")}
    listed = {
        "cifar10": [{"names": [name]} for name in sets["cifar10"]],
        "tiny-imagenet": [{"wnid": n, "names": [n, f"{n} thing"]} for n in sets["tiny-imagenet"]],
    }
    (root / "teacher/classes.json").write_text(json.dumps(listed))
    with gzip.open(root / "text/oewn_noun_verb_glosses.txt.gz", "wt") as stream:
        stream.write("red: the colour of blood\ngreen: the colour of grass\n")
    for name, classes in sets.items():
        with tarfile.open(root / f"teacher/{name}-labeled-00000.tar", "w") as tar:
            for number in range(12):
                colour = classes[number % 2]
                add(tar, f"{colour}/{number}.jpg", jpeg(COLOURS[colour], number))
        test = root / "zeroshot" / name / "test"
        test.mkdir(parents=True)
        (test.parent / "classnames.txt").write_text("\n".join(classes) + "\n")
        (test.parent / "zeroshot_classification_templates.txt").write_text("a {c}\n")
        with tarfile.open(test / "shard-00000.tar", "w") as tar:
            for number in range(8):
                content = jpeg(COLOURS[classes[number % 2]], 100 + number)
                add(tar, f"{number}.jpg", content)
                add(tar, f"{number}.cls", str(number % 2).encode())
    return root


def test_it_learns_and_is_a_teacher_of_ours(script, data_dir, tmp_path):
    from dimefm_edge.teacher import load_teacher

    out = tmp_path / "teacher"
    words = ["--data", str(data_dir), "--out", str(out), "--steps", "25", "--batch", "16"]
    done = script.real_teacher(script.parse_args([*words, "--vocab", "300", "--lr", "1e-3"]))
    assert set(done["top1_pct"]) == {"cifar10", "tiny-imagenet"}
    assert sum(done["top1_pct"].values()) > 120  # chance: 100
    teacher = load_teacher(str(out))
    assert (teacher.embed_dim, teacher.preprocess.image_size) == (256, 64)
    assert np.linalg.norm(teacher.encode_texts(["a red"]), axis=1) == pytest.approx(1, abs=1e-3)
    begun = (out / "open_clip_model.safetensors").stat().st_mtime_ns
    assert script.real_teacher(script.parse_args(words)) == done  # finished: nothing is done again
    assert (out / "open_clip_model.safetensors").stat().st_mtime_ns == begun
    more = [*words[:2], "--out", str(tmp_path / "more"), "--steps", "1", "--batch", "4",
            "--vocab", "300", "--lr", "1e-9", "--init", str(out)]  # fmt: skip
    assert script.real_teacher(script.parse_args(more))["top1_pct"] == done["top1_pct"]


def test_a_resumed_run_ends_as_an_unbroken_one(script, data_dir, tmp_path, monkeypatch):
    def words(out):
        common = ["--data", str(data_dir), "--steps", "6", "--batch", "4", "--vocab", "300"]
        return script.parse_args([*common, "--save-every", "3", "--out", str(tmp_path / out)])

    script.real_teacher(words("whole"))
    real = script.augment
    calls = []

    def stop_at_the_fifth(*args, **settings):
        calls.append(1)
        if len(calls) == 5:
            raise KeyboardInterrupt
        return real(*args, **settings)

    monkeypatch.setattr(script, "augment", stop_at_the_fifth)
    with pytest.raises(KeyboardInterrupt):
        script.real_teacher(words("broken"))
    monkeypatch.setattr(script, "augment", real)
    script.real_teacher(words("broken"))
    weights = [(tmp_path / n / "open_clip_model.safetensors").read_bytes() for n in
               ("whole", "broken")]  # fmt: skip
    assert weights[0] == weights[1]


def test_cutmix_shares_the_target(script):
    from dimefm_edge.data.augment import seeded_generator

    images = torch.stack([torch.full((3, 64, 64), v, dtype=torch.uint8) for v in (0, 255)])
    targets = torch.eye(2)
    mixed = 0
    for seed in range(12):
        x, shares = script.augment(
            images, targets, 32, seeded_generator(seed), min_crop=0.3, cutmix=0.5
        )
        assert x.shape == (2, 3, 32, 32)
        assert shares.sum(1) == pytest.approx([1, 1])
        is_mixed = [bool(image[0].std() > 0.1) for image in x]
        assert is_mixed[0] == is_mixed[1] == bool(shares[0, 1] > 0)
        mixed += is_mixed[0]
    assert 2 < mixed < 11


def test_the_studies_teacher_has_two_stages_and_is_kept(script, data_dir, tmp_path, monkeypatch):
    asked = []
    real = script.parse_args

    def small(words):
        asked.append(words)
        return real([*words, "--steps", "1", "--batch", "4", "--vocab", "300"])

    monkeypatch.setattr(script, "parse_args", small)
    script.studies_teacher(tmp_path / "teacher", data_dir)
    assert [("--init" in words) for words in asked] == [False, True]
    assert (tmp_path / "teacher-1" / script.DONE_FILE).is_file()
    assert (tmp_path / "teacher" / script.DONE_FILE).is_file()
    script.studies_teacher(tmp_path / "teacher", data_dir)
    assert len(asked) == 2
