"""The text side on the device: the teacher's answers, labels embedded once, nothing trusted."""

from __future__ import annotations

import hashlib
import json
import shutil
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dimefm_edge.data.scenes import scene_image
from dimefm_edge.errors import CheckpointError, DataError, DimeFMError, InputError, UnknownNameError
from dimefm_edge.labels import build_label_bank
from dimefm_edge.manifest import MANIFEST_FILE, TEXT_FILE, TOKENIZER_FILE
from dimefm_edge.runtime import ZeroShotClassifier, load_bundle, load_text_encoder
from dimefm_edge.runtime.text import LabelEncoder, TextEncoder
from dimefm_edge.teacher import SAMPLE_DIR, load_teacher
from dimefm_edge.tokenizer import MAX_TOKENIZER_BYTES

SENTENCES = ["a cat on a mat", "", "Two “dogs” &amp; an éél", "eel " * 60]


@pytest.fixture
def bundle_dir(tiny_open_bundle_dir: Path, tmp_path: Path) -> Path:
    """A copy of the bundle that a test may damage."""
    return Path(shutil.copytree(tiny_open_bundle_dir, tmp_path / "bundle"))


def edit_manifest(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    manifest = json.loads((folder / MANIFEST_FILE).read_text())
    change(manifest)
    (folder / MANIFEST_FILE).write_text(json.dumps(manifest))


def relist(folder: Path, name: str) -> None:
    """Make the manifest agree with a file, as a forger would."""
    data = (folder / name).read_bytes()
    entry = {"sha256": hashlib.sha256(data).hexdigest(), "size_bytes": len(data)}
    edit_manifest(folder, lambda m: m["files"].update({name: entry}))


@pytest.mark.parametrize("is_zip", [False, True])
def test_sentences_are_embedded_as_the_teacher_does(
    is_zip: bool, tiny_open_bundle_dir: Path, tiny_teacher_dir: Path, tmp_path: Path
) -> None:
    path: Path | str = tiny_open_bundle_dir
    if is_zip:
        path = shutil.make_archive(str(tmp_path / "b"), "zip", tiny_open_bundle_dir)
    bundle = load_bundle(path)
    encoder = load_text_encoder(bundle, threads=1)
    assert (encoder.threads, encoder.embed_dim) == (1, 16)
    sentences = SENTENCES * 20  # more than one call's worth
    embeds = encoder.encode_texts(sentences)
    assert embeds.dtype == np.float32
    wanted = load_teacher(str(tiny_teacher_dir)).encode_texts(sentences)
    np.testing.assert_allclose(embeds, wanted, atol=1e-5)
    np.testing.assert_allclose(encoder.encode_texts(SENTENCES[:1])[0], embeds[0], atol=1e-6)
    assert encoder.encode_texts([]).shape == (0, 16)
    with pytest.raises(ValueError, match="threads must not be negative, got -1"):
        load_text_encoder(bundle, threads=-1)


def test_calls_from_several_threads(tiny_open_bundle_dir: Path) -> None:
    encoder = load_text_encoder(load_bundle(tiny_open_bundle_dir), threads=1)
    wanted = encoder.encode_texts(SENTENCES)
    found: dict[int, npt.NDArray[np.float32]] = {}

    def work(place: int) -> None:
        found[place] = encoder.encode_texts(SENTENCES)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 6
    for embeds in found.values():
        np.testing.assert_allclose(embeds, wanted, atol=1e-6)


# ----------------------------------------------------------------------------- labels


class Counting:
    """Two-dimensional embeddings, and every sentence that was asked for."""

    def __init__(self) -> None:
        self.asked: list[str] = []

    def __call__(self, sentences: Sequence[str]) -> npt.NDArray[np.float32]:
        self.asked += sentences
        angles = np.asarray([len(s) / 20 for s in sentences])
        return np.stack([np.cos(angles), np.sin(angles)], axis=1).astype(np.float32)


def test_changing_one_label_encodes_one() -> None:
    texts = Counting()
    encoder = LabelEncoder(texts)
    templates = ("a {c}.", "the {c}!")
    first = encoder.bank(["cat", "dog", "eel"], templates=templates)
    assert len(texts.asked) == 6
    second = encoder.bank(["cat", "giraffe", "eel"], templates=templates)
    assert texts.asked[6:] == ["a giraffe.", "the giraffe!"]
    np.testing.assert_array_equal(second.embeds[[0, 2]], first.embeds[[0, 2]])
    wanted = build_label_bank("x", second.classnames, templates, Counting())
    np.testing.assert_allclose(second.embeds, wanted.embeds, atol=1e-6)
    assert second.classnames == ("cat", "giraffe", "eel")
    encoder.bank(["eel", "cat", "cat"], templates=templates)  # order and repeats cost nothing
    assert len(texts.asked) == 8
    encoder.bank(["cat"])  # other templates are other sentences
    assert texts.asked[8:] == ["a photo of a cat."]


def test_a_thousand_typed_labels_do_not_pile_up() -> None:
    texts = Counting()
    encoder = LabelEncoder(texts)
    for start in range(0, 9000, 1000):
        encoder.bank(["cat", *(f"label {i}" for i in range(start, start + 999))])
        assert len(encoder._rows) <= 4096
    assert texts.asked.count("a photo of a cat.") == 1


@pytest.mark.parametrize(
    ("labels", "templates", "kind", "message"),
    [
        ([], ("a {c}.",), InputError, "cannot classify: there are no labels"),
        (["cat", " "], ("a {c}.",), InputError, "cannot classify: label 1 of 2 is blank"),
        (["cat"], (), DataError, "needs class names and templates"),
        (["cat"], ("a cat",), DataError, r"the template 'a cat' has no \{c\}"),
    ],
)
def test_bad_labels(labels: Any, templates: Any, kind: type[DimeFMError], message: str) -> None:
    texts = Counting()
    with pytest.raises(kind, match=message):
        LabelEncoder(texts).bank(labels, templates=templates)
    assert texts.asked == []


def test_the_classifier_takes_any_labels(
    tiny_open_bundle_dir: Path, tiny_teacher_dir: Path
) -> None:
    teacher = load_teacher(str(tiny_teacher_dir))
    labels, templates = ["red circle", "blue square", "dog"], ["a {c}.", "this is a {c}"]
    classifier = ZeroShotClassifier(
        tiny_open_bundle_dir, labels=labels, templates=templates, threads=1, exact=True
    )
    images = [scene_image(i) for i in range(3)]
    bank = build_label_bank("x", labels, templates, teacher.encode_texts)
    pixels = np.stack([np.asarray(image.resize((32, 32), 3)) for image in images])
    logits = teacher.logit_scale * teacher.encode_images(pixels) @ bank.embeds.T
    wanted = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    for row, ranked in zip(wanted, classifier.classify(images), strict=True):
        expected = {label: pytest.approx(p, abs=1e-3) for label, p in zip(labels, row, strict=True)}
        assert dict(ranked) == expected
    (other,) = classifier.classify(images[:1], labels=("an eel", "dog"))
    assert {name for name, _ in other} == {"an eel", "dog"}
    assert len(classifier.classify(images[:1])[0]) == 3  # its own labels are still there
    with pytest.raises(InputError, match="there are no labels"):
        classifier.classify(images, labels=[])
    with pytest.raises(CheckpointError, match="has no label sets to choose from"):
        classifier.classify(images, labels="pets")
    with pytest.raises(InputError, match="there are no labels"):
        ZeroShotClassifier(tiny_open_bundle_dir, labels=[])


def test_a_bundle_without_a_text_side(tiny_bundle_dir: Path) -> None:
    bundle = load_bundle(tiny_bundle_dir)
    assert bundle.text is None
    with pytest.raises(CheckpointError, match=r"has no text side: .*\n  try: .* export RUN --text"):
        load_text_encoder(bundle)
    with pytest.raises(CheckpointError, match="has no text side"):
        ZeroShotClassifier(bundle, labels=["cat", "dog"])
    classifier = ZeroShotClassifier(bundle, labels="pets", threads=1)  # a set of its own
    with pytest.raises(CheckpointError, match="has no text side"):
        classifier.classify([scene_image(0)], labels=["cat", "dog"])
    assert len(classifier.classify([scene_image(0)])[0]) == 3
    with pytest.raises(UnknownNameError, match="unknown label set 'pet'"):
        ZeroShotClassifier(bundle, labels="pet")


# ----------------------------------------------------------------------------- damage


def _write(name: str, change: Callable[[bytes], bytes]) -> Callable[[Path], None]:
    """Change a file, and the manifest with it."""

    def damage(folder: Path) -> None:
        (folder / name).write_bytes(change((folder / name).read_bytes()))
        relist(folder, name)

    return damage


def _text(**values: Any) -> Callable[[Path], None]:
    return lambda folder: edit_manifest(folder, lambda m: m["text"].update(values))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda d: (d / TEXT_FILE).unlink(), "lacks text.onnx"),
        (lambda d: (d / TOKENIZER_FILE).write_bytes(b"{}"), "tokenizer.json is truncated ("),
        (
            lambda d: (d / TEXT_FILE).write_bytes(b"\0" + (d / TEXT_FILE).read_bytes()[1:]),
            "text.onnx was changed after the export",
        ),
        (lambda d: edit_manifest(d, lambda m: m.pop("text")), "files of a text side but has no"),
        (
            lambda d: edit_manifest(d, lambda m: m["files"].pop(TOKENIZER_FILE)),
            "it has a text side but no tokenizer.json",
        ),
        (_text(context_length=0), "context_length must be 1 to 4096, got 0"),
        (_text(clean="uper"), "unknown way to clean text 'uper'"),
        (_write(TOKENIZER_FILE, lambda b: b[:-9]), "tokenizer.json is not a tokenizer file"),
        (_write(TOKENIZER_FILE, lambda b: b"[" * 10**6), "tokenizer.json is not a tokenizer file"),
        (
            _write(TOKENIZER_FILE, lambda b: (SAMPLE_DIR / TOKENIZER_FILE).read_bytes()),
            "it pads to 32 tokens, the text tower takes 12",
        ),
        (_write(TEXT_FILE, lambda b: b[: len(b) // 2]), "cannot load"),
        (
            lambda d: (shutil.copy(d / "model.onnx", d / TEXT_FILE), relist(d, TEXT_FILE)),
            "the manifest says {'tokens': ('tensor(int64)', [12])}",
        ),
        (
            lambda d: edit_manifest(
                d,
                lambda m: m["files"][TOKENIZER_FILE].update(size_bytes=MAX_TOKENIZER_BYTES + 1),
            ),
            "tokenizer.json is too large to be a tokenizer",
        ),
    ],
)
def test_damage_is_named(damage: Callable[[Path], object], message: str, bundle_dir: Path) -> None:
    damage(bundle_dir)
    with pytest.raises(CheckpointError) as caught:
        load_text_encoder(load_bundle(bundle_dir), threads=1)
    assert message in str(caught.value)
    assert caught.value.exit_code == 2


@settings(
    max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    name=st.sampled_from([TEXT_FILE, TOKENIZER_FILE]),
    place=st.floats(0, 1, exclude_max=True),
    flip=st.integers(0, 255),
    is_forged=st.booleans(),
)
def test_any_damage_is_a_checkpoint_error(
    tiny_open_bundle_dir: Path, bundle_dir: Path, name: str, place: float, flip: int,
    is_forged: bool,
) -> None:  # fmt: skip
    """A byte that changed, or (flip 0) a file that ends early; a forger mends the manifest."""
    whole = (tiny_open_bundle_dir / name).read_bytes()
    at = int(place * len(whole))
    for file in tiny_open_bundle_dir.iterdir():
        shutil.copy(file, bundle_dir)
    rest = bytes([whole[at] ^ flip]) + whole[at + 1 :] if flip else b""
    (bundle_dir / name).write_bytes(whole[:at] + rest)
    if is_forged:
        relist(bundle_dir, name)
    problem: DimeFMError | None = None
    try:
        embeds = load_text_encoder(load_bundle(bundle_dir), threads=1).encode_texts(SENTENCES)
        assert embeds.shape == (4, 16)
    except DimeFMError as error:
        problem = error
    if not is_forged:
        assert isinstance(problem, CheckpointError)
        assert name in str(problem)


def test_ids_that_the_tower_lacks(bundle_dir: Path) -> None:
    """A forged vocabulary is an error of ours, not a crash."""
    values = json.loads((bundle_dir / TOKENIZER_FILE).read_text(encoding="utf-8"))
    values["model"]["vocab"]["cat</w>"] = 10**6
    (bundle_dir / TOKENIZER_FILE).write_text(json.dumps(values), encoding="utf-8")
    relist(bundle_dir, TOKENIZER_FILE)
    encoder: TextEncoder = load_text_encoder(load_bundle(bundle_dir), threads=1)
    assert encoder.encode_texts(["dog"]).shape == (1, 16)
    with pytest.raises(DimeFMError, match=r"ONNX Runtime cannot run the text tower: .*out of"):
        encoder.encode_texts(["dog", "cat"])
