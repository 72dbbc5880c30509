"""The zero-shot classifier: PIL images of any kind to ranked names."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dimefm_edge.data.scenes import scene_image
from dimefm_edge.errors import CheckpointError, UnknownNameError
from dimefm_edge.export import GraphSpec, export_student
from dimefm_edge.image_files import BadImageError
from dimefm_edge.labels import LabelBank
from dimefm_edge.preprocess import PreprocessSpec, preprocess_images
from dimefm_edge.runtime import ZeroShotClassifier, load_bundle
from dimefm_edge.students import LoadedStudent, build_student, vit_spec


def test_each_image_is_its_own_class(exported_bundle: Path) -> None:
    classifier = ZeroShotClassifier(exported_bundle, threads=1)
    pictures = [scene_image(i % 4) for i in range(40)]  # more than one call's worth
    answers = classifier.classify(pictures)
    assert [ranked[0][0] for ranked in answers] == [f"image {i % 4}" for i in range(40)]
    for ranked in answers:
        assert len(ranked) == 4  # all there are, though five were asked for
        shares = [share for _, share in ranked]
        assert shares == sorted(shares, reverse=True)
        assert sum(shares) == pytest.approx(1)
    assert classifier.classify([]) == []


def test_probabilities_are_the_softmax_of_scaled_cosines(exported_bundle: Path) -> None:
    bundle = load_bundle(exported_bundle)
    classifier = ZeroShotClassifier(bundle, threads=1)
    (ranked,) = classifier.classify([scene_image(1)], labels="pair", top_k=2)
    embed = classifier.engine.encode_pixels(
        np.asarray(scene_image(1).resize((32, 32), Image.Resampling.BICUBIC))[None]
    )[0]
    logits = [100 * float(embed @ row) for row in bundle.label_banks["pair"].embeds]
    expected = np.exp(logits) / np.exp(logits).sum()
    assert dict(ranked) == pytest.approx({"second": expected[0], "first": expected[1]}, abs=1e-4)
    (top,) = classifier.classify([scene_image(0)], labels="pair", top_k=1)
    assert [name for name, _ in top] == ["first"]


@pytest.mark.parametrize("mode", ["L", "RGBA", "P", "CMYK", "1", "I;16"])
@pytest.mark.parametrize("size", [(1, 1), (500, 3), (32, 32), (33, 640)])
def test_any_mode_and_size(exported_bundle: Path, mode: str, size: tuple[int, int]) -> None:
    image = Image.new(mode, size)
    (ranked,) = ZeroShotClassifier(exported_bundle, threads=1).classify([image], top_k=3)
    assert len(ranked) == 3
    assert all(0 <= share <= 1 for _, share in ranked)


@pytest.mark.parametrize("batch_size", [None, 2])
def test_a_graph_that_resizes_gets_images_as_they_are(
    batch_size: int | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch

    torch.manual_seed(1)
    preprocess = PreprocessSpec(32)
    spec = vit_spec(image_size=32, embed_dim=24, patch_size=16, width=32, depth=1, num_heads=1)
    student = build_student(spec).eval()
    sizes = [(50, 40), (50, 40), (33, 97), (50, 40), (500, 3)]
    pictures = [scene_image(i).resize(size) for i, size in enumerate(sizes)]
    pictures[1] = pictures[1].convert("L")
    prepared = preprocess_images(pictures, preprocess)
    with torch.no_grad():
        embeds = student(torch.from_numpy(prepared)).numpy()
    bank = LabelBank("images", tuple(f"image {i}" for i in range(5)), ("{c}",), embeds)
    graph = GraphSpec(runtime="onnxruntime", image_input="image", batch_size=batch_size)
    loaded = LoadedStudent(student, spec, preprocess, {})
    out = export_student(loaded, tmp_path / "b", graph=graph, label_banks=[bank],
                         parity_images=prepared, logit_scale=100.0)  # fmt: skip
    for name in ("load_inputs", "load_pixels"):
        monkeypatch.setattr(f"dimefm_edge.runtime.classifier.{name}", None)
    classifier = ZeroShotClassifier(out, threads=1)
    np.testing.assert_allclose(classifier._embed(pictures), embeds, atol=2e-2)
    ranked = classifier.classify(pictures, top_k=1)
    assert [top[0][0] for top in ranked] == [f"image {i}" for i in range(5)]


@pytest.fixture(scope="module")
def uint8_bundle(exported_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The student of `exported_bundle` in a graph that normalises by itself."""
    import torch

    torch.manual_seed(1)
    spec = vit_spec(image_size=32, embed_dim=24, patch_size=16, width=32, depth=1, num_heads=1)
    loaded = LoadedStudent(build_student(spec).eval(), spec, PreprocessSpec(32), {})
    images = preprocess_images([scene_image(i) for i in range(4)], PreprocessSpec(32))
    return export_student(
        loaded, tmp_path_factory.mktemp("uint8") / "b", parity_images=images, logit_scale=100.0,
        graph=GraphSpec(runtime="onnxruntime", image_input="uint8"),
        label_banks=list(load_bundle(exported_bundle).label_banks.values()),
    )  # fmt: skip


def test_files_and_bytes_are_seen_as_the_picture_in_them(
    exported_bundle: Path, uint8_bundle: Path, tmp_path: Path
) -> None:
    picture = scene_image(2).resize((400, 400), Image.Resampling.BICUBIC)
    exif = Image.Exif()
    exif[0x0112] = 6
    turned = picture.transpose(Image.Transpose.ROTATE_90)
    path = tmp_path / "phone.jpg"
    turned.save(path, quality=95, exif=exif)
    images = [path, str(path), path.read_bytes(), Image.open(path)]
    plain = ZeroShotClassifier(exported_bundle, threads=1)
    (wanted,) = plain._embed([picture])
    for bundle in (exported_bundle, uint8_bundle):
        for exact in (False, True):
            classifier = ZeroShotClassifier(bundle, threads=1, exact=exact)
            np.testing.assert_allclose(classifier._embed(images) @ wanted, 1, atol=2e-3)
            ranked = classifier.classify(images, labels="images", top_k=1)
            assert [top[0][0] for top in ranked] == ["image 2"] * 4


def test_exact_is_what_training_prepares(exported_bundle: Path, uint8_bundle: Path) -> None:
    picture = scene_image(1).resize((300, 200), Image.Resampling.BICUBIC)
    prepared = preprocess_images([picture], PreprocessSpec(32))
    (wanted,) = ZeroShotClassifier(exported_bundle, threads=1).engine.encode_image(prepared)
    found = {
        (bundle, exact): ZeroShotClassifier(bundle, threads=1, exact=exact)._embed([picture])[0]
        for bundle in (exported_bundle, uint8_bundle)
        for exact in (False, True)
    }
    for (_, exact), embed in found.items():
        assert np.abs(embed - wanted).max() < (1e-5 if exact else 1e-2)
        assert exact or np.abs(embed - wanted).max() > 1e-5


def test_bad_requests(exported_bundle: Path) -> None:
    classifier = ZeroShotClassifier(str(exported_bundle), threads=1)
    with pytest.raises(UnknownNameError, match=r"unknown label set 'pairs'\. Did you mean 'pair'"):
        classifier.classify([scene_image(0)], labels="pairs")
    with pytest.raises(ValueError, match="top_k must be at least 1, got 0"):
        classifier.classify([scene_image(0)], top_k=0)
    with pytest.raises(ValueError, match="templates must be a list"):
        ZeroShotClassifier(str(exported_bundle), templates="a {c}")
    for one in (Path("x.jpg"), scene_image(0)):
        with pytest.raises(ValueError, match="images must be a list"):
            classifier.classify(one)
    with pytest.raises(ValueError, match="images must be a list"):
        classifier.classify("photo.jpg")
    with pytest.raises(BadImageError, match=r"image no\.jpg cannot be read: No such file"):
        classifier.classify([scene_image(0), "no.jpg"])
    classifier.bundle.label_banks.clear()
    with pytest.raises(CheckpointError, match="has no label sets to choose from\n  try: export it"):
        classifier.classify([scene_image(0)])
    with pytest.raises(CheckpointError, match="no bundle at nowhere"):
        ZeroShotClassifier("nowhere")
