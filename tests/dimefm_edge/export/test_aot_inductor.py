"""Students to .pt2: really compiled for this CPU, loaded and run; parity refused by name."""

from __future__ import annotations

import json

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from dimefm_edge.errors import ExportError, ParityError  # noqa: E402
from dimefm_edge.export import export_student  # noqa: E402
from dimefm_edge.export.aot_inductor import _check_parity, export_aot_inductor  # noqa: E402
from dimefm_edge.manifest import PT2_BUILD_FILE, PT2_FILE, native_build  # noqa: E402
from dimefm_edge.preprocess import PreprocessSpec  # noqa: E402
from dimefm_edge.runtime import load_bundle, load_engine  # noqa: E402
from dimefm_edge.students import LoadedStudent, build_student, vit_spec  # noqa: E402

SPEC = vit_spec(image_size=32, embed_dim=16, patch_size=16, width=32, depth=1, num_heads=1)
# The C++ around the kernels hardly matters, and takes most of the time to compile.
FAST = {"aot_inductor.compile_wrapper_opt_level": "O0"}
IMAGES = np.random.default_rng(0).normal(size=(9, 3, 32, 32)).astype(np.float32)


@pytest.fixture
def student():
    torch.manual_seed(0)
    return build_student(SPEC).eval()


def _embed(model):
    def embed(images):
        with torch.inference_mode():
            return model(images).numpy()

    return embed


@pytest.mark.slow
def test_a_bundle_with_a_package_runs_in_both_engines(student, tmp_path):
    """`export --format pt2`, then both engines on batch sizes that were not exported."""
    out = export_student(
        LoadedStudent(student, SPEC, PreprocessSpec(32), {}), tmp_path / "bundle", fmt="pt2",
        parity_images=IMAGES, logit_scale=100.0,
    )  # fmt: skip
    bundle = load_bundle(out)
    assert {PT2_FILE, PT2_BUILD_FILE, "model.onnx"} <= set(bundle.manifest["files"])
    build = json.loads((out / PT2_BUILD_FILE).read_text())
    assert build.items() >= native_build(torch, "cpu").items()
    native, onnx = load_engine(bundle, engine="aot-inductor"), load_engine(bundle)
    for count in (0, 1, 5):
        found = native.encode_image(IMAGES[:count])
        assert found.shape == (count, 16)
        np.testing.assert_allclose(found, onnx.encode_image(IMAGES[:count]), atol=1e-4)
    pixels = np.full((2, 32, 32, 3), 90, np.uint8)
    np.testing.assert_allclose(native.encode_pixels(pixels), onnx.encode_pixels(pixels), atol=1e-4)


@pytest.mark.slow
def test_fp16_with_a_fixed_batch(student, tmp_path):
    report = export_aot_inductor(
        student, tmp_path / PT2_FILE, image_size=32, precision="fp16", parity_images=IMAGES,
        batch_size=2, configs=FAST,
    )  # fmt: skip
    assert 0.999 <= report.min_cosine <= 1
    assert 1e-7 < report.max_abs_diff < 1e-2
    runner = torch._inductor.aoti_load_package(str(tmp_path / PT2_FILE))
    embeds = runner(torch.from_numpy(IMAGES[:2]))
    assert embeds.dtype == torch.float32
    assert json.loads((tmp_path / PT2_BUILD_FILE).read_text())["batch_size"] == "2"


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_parity_is_measured(student, precision):
    report = _check_parity(_embed(student), student, IMAGES, sizes=(1, 7, 32), precision=precision)
    assert report.num_inputs == 9
    assert report.max_abs_diff < 1e-6
    assert report.min_cosine > 0.9999


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
@pytest.mark.parametrize("change", [lambda e: -e, lambda e: e * np.nan])
def test_other_answers_are_refused(student, precision, change):
    embed = _embed(student)
    with pytest.raises(ParityError, match=rf"the {precision} \.pt2 does not answer as the student"):
        _check_parity(
            lambda images: change(embed(images)), student, IMAGES, sizes=(7,), precision=precision
        )


def test_what_torch_cannot_compile_is_an_export_error(tmp_path):
    class Branch(torch.nn.Module):
        def forward(self, image):
            return image if image.sum() > 0 else -image  # depends on the data

    with pytest.raises(ExportError, match="cannot compile the student for cpu") as caught:
        export_aot_inductor(
            Branch(), tmp_path / PT2_FILE, image_size=32, precision="fp32", parity_images=IMAGES
        )
    assert "--format onnx" in str(caught.value)
    assert list(tmp_path.iterdir()) == []
