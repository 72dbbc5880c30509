"""Teachers as bundles: any open_clip architecture, honest about what it is."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import pytest
import torch

from dimefm_edge.data.scenes import scene_image, scene_sentence
from dimefm_edge.errors import ExportError
from dimefm_edge.export import export_student, image_tower
from dimefm_edge.export.towers import file_name_of
from dimefm_edge.preprocess import preprocess_images, resize_image
from dimefm_edge.runtime import load_bundle, load_engine, load_text_encoder
from dimefm_edge.students import LoadedStudent, build_student, vit_spec
from dimefm_edge.teacher import Teacher, load_teacher

TEXT = {"context_length": 8, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1}
SIGLIP = {**TEXT, "no_causal_mask": True, "proj_bias": True, "pool_type": "last"}
MODELS: dict[str, dict[str, Any]] = {
    "resnet": {
        "vision_cfg": {"image_size": 64, "layers": [1, 1, 1, 1], "width": 16, "patch_size": None},
        "text_cfg": TEXT,
    },
    "bidirectional": {  # as SigLIP; a name with that word asks open_clip for its tokenizer
        "custom_text": True,
        "init_logit_bias": -10,
        "vision_cfg": {
            "image_size": 224, "timm_model_name": "vit_tiny_patch16_224",
            "timm_model_pretrained": False, "timm_pool": "avg", "timm_proj": "linear",
        },
        "text_cfg": SIGLIP,
    },
    "mobileclip": {
        "custom_text": True,
        "vision_cfg": {
            "image_size": 64, "timm_model_name": "fastvit_t8", "timm_model_pretrained": False,
            "timm_pool": "avg", "timm_proj": "linear",
        },
        "text_cfg": {**TEXT, "no_causal_mask": True},
    },
}  # fmt: skip


def parity_images(teacher: Teacher, count: int = 4) -> np.ndarray:
    return preprocess_images([scene_image(i) for i in range(count)], teacher.preprocess)


def export(teacher: Teacher, out: Path, **others: Any) -> Path:
    return export_student(
        image_tower(teacher), out, parity_images=parity_images(teacher),
        logit_scale=teacher.logit_scale, text_teacher=teacher,
        parity_sentences=[scene_sentence(i) for i in range(8)], **others,
    )  # fmt: skip


def check_answers(bundle_dir: Path, teacher: Teacher) -> None:
    """The bundle answers as the teacher does, images and sentences."""
    bundle = load_bundle(bundle_dir)
    pixels = np.stack([resize_image(scene_image(i), teacher.preprocess) for i in range(5)])
    found = load_engine(bundle, threads=1).encode_pixels(pixels)
    np.testing.assert_allclose(found, teacher.encode_images(pixels), atol=1e-4)
    sentences = [scene_sentence(i) for i in range(5)] + ["", "naïve &amp; “quoted” 🐕"]
    embeds = load_text_encoder(bundle, threads=1).encode_texts(sentences)
    np.testing.assert_allclose(embeds, teacher.encode_texts(sentences), atol=1e-4)
    np.testing.assert_allclose(np.linalg.norm(embeds, axis=1), 1, atol=1e-5)


@pytest.mark.parametrize(
    ("teacher", "name"),
    [
        ("sample", "sample"),
        ("ViT-B-32:laion2b_s34b_b79k", "ViT-B-32-laion2b_s34b_b79k"),
        ("ViT-B-32:/my models/clip v2.pt", "ViT-B-32-clip-v2"),
        ("hf-hub:apple/MobileCLIP-S1", "hf-hub-MobileCLIP-S1"),
        ("/data/teachers/mine/", "mine"),
        ("..\\teachers\\mine", "mine"),
        ("../..", "teacher"),
        ("Vögel:random", "V-gel-random"),
    ],
)
def test_names_of_files(teacher: str, name: str) -> None:
    assert file_name_of(teacher) == name


def test_a_teachers_bundle_says_what_it_is(
    tiny_open_bundle_dir: Path, tiny_teacher_dir: Path
) -> None:
    teacher = load_teacher(str(tiny_teacher_dir))
    bundle = load_bundle(tiny_open_bundle_dir)
    manifest = bundle.manifest
    assert manifest["spec"] == {
        "name": tiny_teacher_dir.name, "family": "open_clip", "image_size": 32, "embed_dim": 16,
    }  # fmt: skip
    assert bundle.name == tiny_teacher_dir.name
    assert bundle.preprocess == teacher.preprocess
    assert bundle.logit_scale == pytest.approx(teacher.logit_scale)
    assert sorted(manifest["files"]) == ["model.onnx", "text.onnx", "tokenizer.json"]
    text = manifest["text"]
    assert (text["clean"], text["context_length"], text["zeroed_id"]) == ("lower", 12, None)
    assert (text["precision"], text["opset"]) == ("fp32", 20)
    assert text["parity"]["num_sentences"] == 9
    assert text["parity"]["max_abs_diff"] < 1e-5
    assert text["graph"]["nodes"] == sum(text["graph"]["op_counts"].values())
    check_answers(tiny_open_bundle_dir, teacher)


def test_a_text_side_of_another_teacher_is_refused(tiny_teacher_dir: Path, tmp_path: Path) -> None:
    teacher = load_teacher(str(tiny_teacher_dir))
    spec = vit_spec(image_size=32, embed_dim=24, patch_size=16, width=32, depth=1, num_heads=1)
    student = LoadedStudent(build_student(spec).eval(), spec, teacher.preprocess, {})
    with pytest.raises(ExportError, match="answers in 16 dimensions, the student in 24: it was"):
        export_student(
            student, tmp_path / "b", parity_images=parity_images(teacher), logit_scale=1.0,
            text_teacher=teacher,
        )  # fmt: skip
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
@pytest.mark.parametrize("kind", list(MODELS))
def test_small_models_of_every_kind(
    kind: str, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.mktemp("configs") / f"dimefm-tiny-{kind}.json"
    path.write_text(json.dumps({"embed_dim": 16, **MODELS[kind]}))
    open_clip.add_model_config(path)
    torch.manual_seed(0)
    teacher = load_teacher(f"{path.stem}:random")
    check_answers(export(teacher, tmp_path / "bundle"), teacher)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["ViT-B-32", "ViT-B-16", "RN50", "MobileCLIP2-S0"])
def test_named_models(name: str, tmp_path: Path) -> None:
    """Random weights: the architecture is what is proven."""
    torch.manual_seed(0)
    teacher = load_teacher(f"{name}:random")
    check_answers(export(teacher, tmp_path / "bundle"), teacher)


@pytest.mark.slow
def test_siglip_without_its_text_side(tmp_path: Path) -> None:
    """Its tokenizer has to be downloaded; its images need nothing."""
    teacher = load_teacher("ViT-B-16-SigLIP:random")
    out = export_student(
        image_tower(teacher), tmp_path / "bundle", parity_images=parity_images(teacher),
        logit_scale=teacher.logit_scale,
    )  # fmt: skip
    bundle = load_bundle(out)
    assert bundle.text is None
    assert bundle.embed_dim == 768
