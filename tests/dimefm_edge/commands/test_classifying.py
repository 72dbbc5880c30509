"""classify: files to names, as the runtime names them; what cannot be read harms no other."""

from __future__ import annotations

import csv
import json
import subprocess
import sys

import pytest

from dimefm_edge.cli import main
from dimefm_edge.data.scenes import scene_image
from dimefm_edge.runtime import ZeroShotClassifier


@pytest.fixture
def photos(tmp_path):
    folder = tmp_path / "fotos ü"
    (folder / "deep").mkdir(parents=True)
    for index, name in enumerate(("2.png", "10.png", "deep/1.png")):
        scene_image(index).save(folder / name)
    (folder / "notes.txt").write_text("no image")
    return folder


def answer(capsys, *words):
    code = main(["classify", *map(str, words), "--json"])
    return code, json.loads(capsys.readouterr().out)


def test_a_folders_images_are_named_as_the_runtime_names_them(tiny_bundle_dir, photos, capsys):
    code, values = answer(capsys, tiny_bundle_dir, photos, "--top", "2")
    assert code == 0
    files = [entry["file"] for entry in values["images"]]
    assert files == [str(photos / name) for name in ("2.png", "10.png", "deep/1.png")]
    wanted = ZeroShotClassifier(tiny_bundle_dir).classify([photos / "10.png"], top_k=2)[0]
    assert [one["label"] for one in values["images"][1]["top"]] == [name for name, _ in wanted]
    assert [one["probability"] for one in values["images"][1]["top"]] == pytest.approx(
        [share for _, share in wanted]
    )


def test_a_table_for_people_and_a_csv(tiny_bundle_dir, photos, tmp_path, capsys):
    out = tmp_path / "names.csv"
    assert main(["classify", str(tiny_bundle_dir), f"{photos}/*.png", "--out", str(out)]) == 0
    table = capsys.readouterr().out
    assert table.splitlines()[0].split() == ["image", "1", "2", "3"]
    rows = list(csv.DictReader(out.open(newline="", encoding="utf-8")))
    assert len(rows) == 2 * 3
    assert {row["label"] for row in rows} == {"cat", "dog", "eel"}
    assert sum(float(row["probability"]) for row in rows[:3]) == pytest.approx(1, abs=1e-4)
    assert f"{rows[0]['label']} {100 * float(rows[0]['probability']):.1f}%" in table


def test_labels_of_ones_own(tiny_open_bundle_dir, photos, tmp_path, capsys):
    names = tmp_path / "names.txt"
    names.write_text("a red ball\na blue ring\n")
    for labels in (["a red ball", "a blue ring"], [str(names)]):
        _, values = answer(capsys, tiny_open_bundle_dir, photos / "2.png", "--labels", *labels)
        found = {one["label"] for one in values["images"][0]["top"]}
        assert found == {"a red ball", "a blue ring"}


def test_sources_that_overlap_name_each_file_once(tiny_bundle_dir, photos, capsys):
    (photos / "deep" / "loop").symlink_to(photos, target_is_directory=True)
    _, values = answer(capsys, tiny_bundle_dir, f"{photos}/**", photos, photos / "2.png")
    assert len(values["images"]) == 3
    assert values["unreadable"] == []


def test_an_image_that_cannot_be_read_harms_no_other(tiny_bundle_dir, photos, capsys):
    (photos / "3.png").write_bytes(b"no image")
    code, values = answer(capsys, tiny_bundle_dir, photos)
    assert (code, len(values["images"])) == (0, 3)
    (bad,) = values["unreadable"]
    assert bad["file"] == str(photos / "3.png")
    code, values = answer(capsys, tiny_bundle_dir, photos / "3.png")
    assert (code, values["error"]) == (2, "none of 1 images can be read")


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ([], "classify takes a bundle and images"),
        (["BUNDLE"], "classify takes a bundle and images"),
        (["BUNDLE", "gone.jpg"], "gone.jpg does not exist"),
        (["gone", "PHOTOS"], "no bundle at gone"),
        (["BUNDLE", "EMPTY"], "no image in"),
        (["BUNDLE", "PHOTOS", "--labels", "pest"], "Did you mean 'pets'"),
        (["BUNDLE", "PHOTOS", "--labels", "cat", "dog"], "has no text side"),
        (["BUNDLE", "PHOTOS", "--out", "."], "--out . is not a file in a folder that is there"),
        (["BUNDLE", "PHOTOS", "--out", "no/x.csv"], "--out no/x.csv is not a file"),
    ],
)
def test_what_cannot_be_is_said(words, told, tiny_bundle_dir, photos, tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    places = {"BUNDLE": tiny_bundle_dir, "PHOTOS": photos, "EMPTY": tmp_path / "empty"}
    code, values = answer(capsys, *(places.get(word, word) for word in words))
    assert code == 2
    assert told in values["error"]


def test_a_device_needs_no_torch(tiny_bundle_dir, photos):
    code = (
        "import sys; from dimefm_edge.cli import main; "
        f"assert main(['classify', {str(tiny_bundle_dir)!r}, {str(photos)!r}]) == 0; "
        "print([m for m in ('torch', 'timm', 'open_clip') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"
