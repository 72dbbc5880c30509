"""One real student, exported once in each precision: a tiny ViT with two label sets."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest


@pytest.fixture(scope="session")
def exported_bundles(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """By precision. Do not change them: `bundle_dir` is a copy."""
    import torch

    from dimefm_edge.data.scenes import scene_image
    from dimefm_edge.export import GraphSpec, export_student
    from dimefm_edge.labels import LabelBank
    from dimefm_edge.preprocess import PreprocessSpec, preprocess_images
    from dimefm_edge.students import LoadedStudent, build_student, vit_spec

    torch.manual_seed(1)
    spec = vit_spec(image_size=32, embed_dim=24, patch_size=16, width=32, depth=1, num_heads=1)
    student = build_student(spec).eval()
    images = preprocess_images([scene_image(i) for i in range(4)], PreprocessSpec(32))
    with torch.no_grad():
        embeds = student(torch.from_numpy(images)).numpy()
    # Classes named after images: what is right is known.
    banks = [
        LabelBank("images", tuple(f"image {i}" for i in range(4)), ("{c}",), embeds),
        LabelBank("pair", ("second", "first"), ("{c}",), np.ascontiguousarray(embeds[1::-1])),
    ]
    folder = tmp_path_factory.mktemp("exported")
    return {
        precision: export_student(
            LoadedStudent(student, spec, PreprocessSpec(32), {}), folder / precision,
            graph=GraphSpec(precision=precision), label_banks=banks, parity_images=images,
            logit_scale=100.0,
        )
        for precision in ("fp32", "fp16")
    }  # fmt: skip


@pytest.fixture(scope="session")
def exported_bundle(exported_bundles: dict[str, Path]) -> Path:
    return exported_bundles["fp32"]


@pytest.fixture
def bundle_dir(exported_bundle: Path, tmp_path: Path) -> Path:
    """A copy of the bundle that a test may damage."""
    return Path(shutil.copytree(exported_bundle, tmp_path / "bundle"))
