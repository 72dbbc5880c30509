"""Captioned sets in every layout, and what is no captioned set."""

from __future__ import annotations

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dimefm_edge.data.captioned import open_captioned
from dimefm_edge.data.images import decode_image
from dimefm_edge.data.scenes import captioned_scene, scene_pair
from dimefm_edge.errors import DataError

CAPTIONS = (("a red star", "one star"), ("two rings",), ("a ring", "rings", "more rings"))
COCO = {
    "images": [{"id": 7 + i, "file_name": f"{i}.jpg"} for i in range(3)],
    "annotations": [
        {"image_id": 7 + i, "caption": text} for i, texts in enumerate(CAPTIONS) for text in texts
    ],
}
KARPATHY = {
    "images": [
        {"filename": f"{i}.jpg", "split": "test", "sentences": [{"raw": t} for t in texts]}
        for i, texts in enumerate(CAPTIONS)
    ]
    + [{"filename": "gone.jpg", "split": "train", "sentences": [{"raw": "not tested"}]}]
}
TABLE = [(f"{i}.jpg", text) for i, texts in enumerate(CAPTIONS) for text in texts]


def _lines(rows, delimiter):
    return ["image" + delimiter + "caption", *(f"{i}{delimiter}{t}" for i, t in rows)]


FILES = {
    "captions.txt": "\n".join(_lines(TABLE, ",")),
    "captions.csv": "\n".join(["image_name, comment", *(f'{i}, "{t}"' for i, t in TABLE)]),
    "captions.tsv": "\n".join(_lines(TABLE, "\t")),
    "captions.json": json.dumps(COCO),
    "results.json": json.dumps(KARPATHY),
    "metadata.jsonl": "\n\n".join(
        json.dumps({"file_name": f"{i}.jpg", "captions": list(texts)})
        for i, texts in enumerate(CAPTIONS)
    ),
}


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("folder", ["", "images/"])
def test_folder_with_a_captions_file(name, folder, tmp_path, encoded, write_files):
    images = {f"{folder}{i}.jpg": encoded(i) for i in range(3)}
    write_files(tmp_path / "flickr", {**images, name: FILES[name].encode()})
    for source in (tmp_path / "flickr", tmp_path / "flickr" / name):
        captioned = open_captioned(str(source))
        assert captioned.captions == CAPTIONS
        for row in range(3):
            wanted = decode_image(encoded(row), "").tobytes()
            assert captioned.pool.load(row).tobytes() == wanted
    assert open_captioned(str(tmp_path / "flickr")).name == "flickr"


@pytest.mark.parametrize("ending", ["txt", "json", "list.json"])
def test_web_dataset(ending, tmp_path, encoded, write_tar):
    for shard in range(2):
        members = {}
        for i in range(shard, 3, 2):
            text = "\n".join(CAPTIONS[i]) + "\n"
            if ending == "json":
                text = json.dumps({"caption": CAPTIONS[i][0], "url": "x"})
            elif ending == "list.json":
                text = json.dumps(list(CAPTIONS[i]))
            members |= {f"s{i}.webp": encoded(i), f"s{i}.{ending[-4:].strip('.')}": text.encode()}
        write_tar(tmp_path / "coco" / "test" / f"{shard}.tar", members)
    captioned = open_captioned(str(tmp_path / "coco"))
    wanted = [CAPTIONS[i] if ending != "json" else CAPTIONS[i][:1] for i in (0, 2, 1)]
    assert list(captioned.captions) == wanted
    assert (captioned.name, len(captioned.pool)) == ("coco", 3)
    shards = open_captioned(str(tmp_path / "coco" / "test" / "*.tar"))
    assert shards.captions == captioned.captions


def test_scenes_have_five_sentences_and_share_nothing_with_training():
    captioned = open_captioned("scenes:12")
    assert len(captioned.pool) == 12
    assert {len(texts) for texts in captioned.captions} == {5}
    image, texts = captioned_scene(3)
    assert captioned.captions[3] == texts
    assert captioned.pool.load(3).tobytes() == image.tobytes()
    assert image.tobytes() != scene_pair(3)[0].tobytes()
    assert len(open_captioned("scenes").pool) == 500
    with pytest.raises(IndexError):
        captioned.pool.load(12)


def test_blanks_and_empty_lines_are_no_captions(tmp_path, encoded, write_tar):
    path = write_tar(tmp_path / "a.tar", {"0.jpg": encoded(0), "0.txt": b"  a  star \n\n \nring"})
    assert open_captioned(str(path)).captions == (("a star", "ring"),)


@pytest.mark.parametrize(
    ("members", "complaint"),
    [
        ({"0.txt": b"a star"}, "hold no image"),
        ({"0.jpg": b"x"}, r"0\.jpg has neither \.txt nor \.json beside it"),
        ({"0.jpg": b"x", "0.txt": b" \n"}, r"has no captions: all are empty"),
        ({"0.jpg": b"x", "0.json": b"{"}, "cannot be read"),
        ({"0.jpg": b"x", "0.json": b'{"caption": 3}'}, "has no captions"),
        ({"0.jpg": b"x", "0.txt": b"\xff"}, "cannot be read"),
    ],
)
def test_tars_that_are_no_captioned_set(members, complaint, tmp_path, write_tar):
    with pytest.raises(DataError, match=complaint):
        open_captioned(str(write_tar(tmp_path / "a.tar", members)))


@pytest.mark.parametrize(
    ("name", "text", "complaint"),
    [
        ("captions.csv", "picture,words\n0.jpg,a star", "names no image"),
        ("captions.csv", "image,words\n0.jpg,a star", "has no captions"),
        ("captions.csv", "image,caption\n", "names no image"),
        ("captions.csv", "image,caption\n0.jpg,\n", "all are empty"),
        ("captions.csv", "image,caption\ngone.jpg,a star\n", "names gone.jpg, which is not in"),
        ("captions.csv", "image,caption\n../0.jpg,a star\n", r"names \.\./0.jpg, which is not in"),
        ("captions.json", '{"annotations": [], "images": 3}', "not a list of images"),
        ("captions.json", '{"annotations": [{"image_id": 1}], "images": []}', "has the id 1"),
        ("captions.json", '{"annotations": [], "images": [{}]}', "cannot be read"),
        ("captions.jsonl", '"0.jpg"', "must name an image"),
        ("captions.jsonl", "{", "cannot be read"),
        ("notes.md", "nothing", "holds no captioned image"),
    ],
)
def test_folders_that_are_no_captioned_set(name, text, complaint, tmp_path, encoded, write_files):
    root = write_files(tmp_path / "set", {"0.jpg": encoded(0), name: text.encode()})
    write_files(tmp_path, {"0.jpg": encoded(0)})
    with pytest.raises(DataError, match=complaint):
        open_captioned(str(root))


def test_a_file_beside_a_tar_is_refused(tmp_path, encoded, write_files, write_tar):
    write_tar(tmp_path / "a.tar", {"0.jpg": encoded(0), "0.txt": b"x"})
    write_files(tmp_path, {"b.jpg": encoded(1)})
    with pytest.raises(DataError, match=r"b\.jpg is no captioned test set"):
        open_captioned(f"{tmp_path}/*")


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4)
    | st.dictionaries(
        st.sampled_from(["images", "annotations", "id", "file_name", "image_id", "caption",
                         "captions", "sentences", "raw", "split", "image"]),
        inner, max_size=5,
    ),
    max_leaves=12,
)  # fmt: skip


@settings(deadline=None, max_examples=150)
@given(value=json_values, lines=st.booleans())
def test_any_json_is_read_or_refused(value, lines, tmp_path_factory):
    root = tmp_path_factory.mktemp("json")
    name = "captions.jsonl" if lines else "captions.json"
    (root / name).write_text(json.dumps(value), encoding="utf-8", errors="surrogatepass")
    try:
        captioned = open_captioned(str(root))
    except DataError:
        return
    assert len(captioned.captions) == len(captioned.pool)


@settings(deadline=None, max_examples=100)
@given(data=st.binary(max_size=80), name=st.sampled_from(["captions.csv", "captions.tsv"]))
def test_any_table_is_read_or_refused(data, name, tmp_path_factory):
    root = tmp_path_factory.mktemp("table")
    (root / name).write_bytes(b"image,caption\n" + data)
    with pytest.raises(DataError):  # no image is there
        open_captioned(str(root))
