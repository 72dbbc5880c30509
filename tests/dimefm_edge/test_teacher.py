"""Teachers: loaded from every kind of source, frozen, and loud when something is wrong."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import pytest
import torch
from open_clip.transform import PreprocessCfg, image_transform_v2
from PIL import Image
from safetensors.torch import load_file, save_file

from dimefm_edge.data.scenes import scene_image, scene_test_set
from dimefm_edge.errors import (
    CheckpointError,
    ConfigError,
    DataError,
    DimeFMError,
    MissingExtraError,
    UnknownNameError,
)
from dimefm_edge.preprocess import PreprocessSpec, preprocess_images
from dimefm_edge.students import build_student, save_student, vit_spec
from dimefm_edge.teacher import SAMPLE_DIR, TEXT_TEACHER_KEY, load_teacher

TINY: dict[str, Any] = {
    "embed_dim": 16,
    "vision_cfg": {"image_size": 32, "patch_size": 16, "width": 32, "layers": 2, "head_width": 16},
    "text_cfg": {"context_length": 12, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1},
}


@pytest.fixture(scope="module")
def tiny_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An open_clip folder with random weights and preprocessing of its own."""
    folder = tmp_path_factory.mktemp("tiny")
    torch.manual_seed(0)
    model = open_clip.CLIP(**TINY)
    preprocess = {"mean": [0.4, 0.5, 0.6], "std": [0.2, 0.3, 0.4], "resize_mode": "squash"}
    (folder / "open_clip_config.json").write_text(
        json.dumps({"model_cfg": TINY, "preprocess_cfg": preprocess})
    )
    save_file(model.state_dict(), folder / "open_clip_model.safetensors")
    return folder


@pytest.fixture(scope="module")
def tiny_architecture(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The same model as an architecture that open_clip knows by name."""
    path = tmp_path_factory.mktemp("configs") / "ViT-dimefm-tiny.json"
    path.write_text(json.dumps(TINY))
    open_clip.add_model_config(path)
    return path.stem


def test_a_folder_brings_its_own_preprocessing_and_scale(tiny_dir: Path) -> None:
    teacher = load_teacher(str(tiny_dir))
    assert teacher.embed_dim == 16
    assert teacher.preprocess == PreprocessSpec(
        image_size=32, mean=(0.4, 0.5, 0.6), std=(0.2, 0.3, 0.4), resize_mode="squash"
    )
    assert teacher.logit_scale == pytest.approx(1 / 0.07, rel=1e-4)
    assert not any(p.requires_grad for p in teacher.image_tower.parameters())
    embeds = teacher.encode_images(np.zeros((3, 32, 32, 3), np.uint8))
    assert embeds.shape == (3, 16)
    assert embeds.dtype == np.float32
    np.testing.assert_allclose(np.linalg.norm(embeds, axis=1), 1, atol=1e-6)


def test_embeddings_equal_open_clips_own(tiny_dir: Path) -> None:
    teacher = load_teacher(str(tiny_dir))
    model, transform = open_clip.create_model_from_pretrained(f"local-dir:{tiny_dir}")
    tokenizer = open_clip.get_tokenizer(f"local-dir:{tiny_dir}")
    model.eval()
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 52, 3), dtype=np.uint8))
    pixels = np.asarray(image.resize((32, 32), Image.Resampling.BICUBIC))[None]
    with torch.inference_mode():
        expected = model.encode_image(transform(image)[None], normalize=True).numpy()
        expected_text = model.encode_text(tokenizer(["a dog", "two"]), normalize=True).numpy()
    np.testing.assert_allclose(teacher.encode_images(pixels), expected, atol=1e-5)
    np.testing.assert_allclose(teacher.encode_texts(["a dog", "two"]), expected_text, atol=1e-6)


@pytest.mark.parametrize("resize_mode", ["shortest", "longest", "squash"])
@pytest.mark.parametrize("size", [(64, 64), (97, 131), (200, 77), (20, 33)])
@pytest.mark.parametrize("channels", [(3,), ()])
def test_preprocessing_equals_open_clips(
    resize_mode: str, size: tuple[int, int], channels: tuple[int, ...]
) -> None:
    rng = np.random.default_rng(0)
    image = Image.fromarray(rng.integers(0, 256, (*size, *channels), dtype=np.uint8))
    spec = PreprocessSpec(image_size=48, resize_mode=resize_mode)
    cfg = PreprocessCfg(size=48, mean=spec.mean, std=spec.std, resize_mode=resize_mode)
    expected = image_transform_v2(cfg, is_train=False)(image).numpy()
    np.testing.assert_allclose(preprocess_images([image], spec)[0], expected, atol=1e-5)


def test_a_checkpoint_file_of_a_named_architecture(
    tiny_dir: Path, tiny_architecture: str, tmp_path: Path
) -> None:
    state = open_clip.create_model(f"local-dir:{tiny_dir}").state_dict()
    torch.save({"state_dict": state}, tmp_path / "clip.pt")
    save_file(state, tmp_path / "clip.safetensors")
    pixels = np.full((1, 32, 32, 3), 90, np.uint8)
    teachers = [
        load_teacher(f"{tiny_architecture}:{tmp_path / name}")
        for name in ("clip.pt", "clip.safetensors")
    ]
    np.testing.assert_array_equal(*(t.encode_images(pixels) for t in teachers))
    assert teachers[0].weights_hash == teachers[1].weights_hash
    assert load_teacher(f"{tiny_architecture}:random").weights_hash != teachers[0].weights_hash


def test_a_pickle_with_code_is_not_run(tiny_architecture: str, tmp_path: Path) -> None:
    class Bomb:
        def __reduce__(self) -> tuple[Any, ...]:
            return (Path.touch, (tmp_path / "exploded",))

    torch.save({"state_dict": Bomb()}, tmp_path / "clip.pt")
    with pytest.raises(CheckpointError, match="cannot be read"):
        load_teacher(f"{tiny_architecture}:{tmp_path / 'clip.pt'}")
    assert not (tmp_path / "exploded").exists()


def test_a_run_of_ours_teaches_with_its_teachers_text_side(tiny_dir: Path, tmp_path: Path) -> None:
    text_teacher = load_teacher(str(tiny_dir))
    spec = vit_spec(image_size=32, embed_dim=16, patch_size=16, width=32, depth=1, num_heads=2)
    save_student(
        tmp_path / "checkpoint.safetensors",
        build_student(spec),
        spec,
        text_teacher.preprocess,
        {TEXT_TEACHER_KEY: str(tiny_dir)},
    )
    teacher = load_teacher(str(tmp_path))
    np.testing.assert_array_equal(
        teacher.encode_texts(["a cat"]), text_teacher.encode_texts(["a cat"])
    )
    pixels = np.full((1, 32, 32, 3), 90, np.uint8)
    assert not np.allclose(teacher.encode_images(pixels), text_teacher.encode_images(pixels))
    assert teacher.weights_hash != text_teacher.weights_hash


@pytest.mark.parametrize(
    ("name", "kind", "message"),
    [
        (
            "ViT-B-33:openai",
            UnknownNameError,
            "unknown teacher 'ViT-B-33'. Did you mean 'ViT-",
        ),
        ("smaple", UnknownNameError, "Did you mean 'sample'"),
        ("ViT-B-32", UnknownNameError, "needs weights: a tag"),
        ("ViT-B-32:laion2b", UnknownNameError, "unknown tag of ViT-B-32 'laion2b'. Did you mean"),
        ("ViT-B-32:missing/clip.pt", CheckpointError, "no checkpoint file at missing/clip.pt"),
        ("/nowhere/at/all", DataError, "/nowhere/at/all does not exist"),
        ("clip.pt", CheckpointError, "does not say its architecture"),
    ],
)
def test_wrong_names_are_answered(name: str, kind: type[DimeFMError], message: str) -> None:
    with pytest.raises(kind) as caught:
        load_teacher(name)
    assert message in str(caught.value)
    assert caught.value.exit_code == 2


def test_a_folder_that_is_no_teacher(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"neither open_clip_config\.json nor checkpoint"):
        load_teacher(str(tmp_path))


def test_a_tokenizer_file_counts_when_it_says_how_long(tiny_dir: Path, tmp_path: Path) -> None:
    """The tokenizer.json beside open_clip's own weights does not: its CLIP tokenizer is used."""
    shutil.copytree(tiny_dir, tmp_path, dirs_exist_ok=True)
    wanted = load_teacher(str(tiny_dir)).encode_texts(["a dog"])
    (tmp_path / "tokenizer.json").write_text('{"padding": null, "truncation": null}')
    teacher = load_teacher(str(tmp_path))
    np.testing.assert_array_equal(teacher.encode_texts(["a dog"]), wanted)
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"tokenizer\.json is not a tokenizer file of ours"):
        load_teacher(str(tmp_path)).encode_texts(["a dog"])


def test_a_tokenizer_is_loaded_when_it_is_asked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """SigLIP's needs transformers and a download; its images need neither."""
    monkeypatch.setitem(sys.modules, "transformers", None)  # importing it raises ImportError
    path = tmp_path / "dimefm-tiny-siglip.json"
    text_cfg = {**TINY["text_cfg"], "hf_tokenizer_name": "timm/ViT-B-16-SigLIP"}
    path.write_text(json.dumps({**TINY, "text_cfg": text_cfg}))
    open_clip.add_model_config(path)
    teacher = load_teacher("dimefm-tiny-siglip:random")
    assert teacher.encode_images(np.zeros((1, 32, 32, 3), np.uint8)).shape == (1, 16)
    with pytest.raises(MissingExtraError, match="needs a package that is not installed") as error:
        teacher.encode_texts(["a dog"])
    assert error.value.hint == "pip install transformers sentencepiece"


@pytest.mark.parametrize("length", [0, 7, 100, 5000])
def test_truncated_weights(tiny_dir: Path, tmp_path: Path, length: int) -> None:
    for path in tiny_dir.iterdir():
        content = path.read_bytes()
        is_weights = path.suffix == ".safetensors"
        (tmp_path / path.name).write_bytes(content[:length] if is_weights else content)
    with pytest.raises(CheckpointError, match=f"teacher {tmp_path}: the weights"):
        load_teacher(str(tmp_path))


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_truncated_and_foreign_checkpoint_files(
    tiny_architecture: str, tmp_path: Path, suffix: str
) -> None:
    torch.save({"a": torch.zeros(4)}, tmp_path / "whole.pt")
    save_file({"a": torch.zeros(4)}, tmp_path / "whole.safetensors")
    whole = tmp_path / f"whole{suffix}"
    (tmp_path / f"cut{suffix}").write_bytes(whole.read_bytes()[:-5])
    for path in (whole, tmp_path / f"cut{suffix}"):
        with pytest.raises(CheckpointError, match="the weights"):
            load_teacher(f"{tiny_architecture}:{path}")


def test_the_sample_teacher_keeps_its_promise() -> None:
    files = {path.name: path.stat().st_size for path in SAMPLE_DIR.iterdir()}
    assert sum(files.values()) <= 10e6
    assert {"README.md", "tokenizer.json", "open_clip_model.safetensors"} <= files.keys()
    teacher = load_teacher("sample")
    test = scene_test_set("scenes", num_per_class=5)
    weights = np.stack(
        [
            teacher.encode_texts([t.replace("{c}", name) for t in test.templates]).mean(0)
            for name in test.classnames
        ]
    )
    weights /= np.linalg.norm(weights, axis=1, keepdims=True)
    pixels = np.stack([np.asarray(test.image(i)) for i in range(len(test))])
    labels = np.array([test.label(i) for i in range(len(test))])
    guesses = (teacher.encode_images(pixels) @ weights.T).argmax(1)
    assert 100 / len(test.classnames) < 2  # chance, in percent
    assert (guesses == labels).mean() >= 0.88  # 90% on 1,920 images; this is a quarter of them
    assert scene_image(0).size == (64, 64)


class TestJoined:
    def test_logits_are_the_mean_of_the_members(self, tiny_dir: Path, tmp_path: Path) -> None:
        other_dir = tmp_path / "other"
        shutil.copytree(tiny_dir, other_dir)
        path = other_dir / "open_clip_model.safetensors"
        weights = {k: v.flip(0).contiguous() for k, v in load_file(path).items() if v.ndim}
        scale = {k: v + 0.7 for k, v in load_file(path).items() if not v.ndim}
        save_file({**weights, **scale}, path, metadata={"format": "pt"})
        members = [load_teacher(str(d)) for d in (tiny_dir, other_dir)]
        joined = load_teacher(f"{tiny_dir}+{other_dir}")
        side = joined.preprocess.image_size
        pixels = np.random.default_rng(0).integers(0, 256, (5, side, side, 3), dtype=np.uint8)
        sentences = ["a dog", "two cats on a mat", ""]

        def logits(teacher):  # type: ignore[no-untyped-def]
            cosines = teacher.encode_images(pixels) @ teacher.encode_texts(sentences).T
            return teacher.logit_scale * cosines

        assert members[0].logit_scale != members[1].logit_scale
        assert logits(joined) == pytest.approx(
            (logits(members[0]) + logits(members[1])) / 2, abs=1e-4
        )
        assert joined.embed_dim == joined.encode_images(pixels).shape[1] == 2 * members[0].embed_dim
        assert joined.weights_hash not in {m.weights_hash for m in members}

    def test_of_one_twice_it_is_that_one(self, tiny_dir: Path) -> None:
        one, twice = load_teacher(str(tiny_dir)), load_teacher(f"{tiny_dir}+{tiny_dir}")
        assert twice.logit_scale == pytest.approx(one.logit_scale)
        texts = ["a", "b c"]
        assert twice.encode_texts(texts) @ twice.encode_texts(texts).T == pytest.approx(
            one.encode_texts(texts) @ one.encode_texts(texts).T, abs=1e-5
        )

    def test_teachers_that_prepare_images_differently_are_refused(self, tiny_dir: Path) -> None:
        with pytest.raises(ConfigError, match="prepare images differently"):
            load_teacher(f"{tiny_dir}+sample")
