"""The TensorRT engine against the recorded API and a stand-in driver: no GPU and no TensorRT.

The double answers with ONNX Runtime's embeddings of the same graph where the engine's output
should lie on the device, when the stream comes to it. So what comes back proves buffers, shapes,
padding, order, graphs and waits; speed and TensorRT's own arithmetic it does not.
"""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dimefm_edge.errors import CheckpointError, ConfigError, DimeFMError, MissingExtraError
from dimefm_edge.runtime import ZeroShotClassifier, load_bundle, load_engine
from dimefm_edge.runtime.bundle import Bundle
from dimefm_edge.runtime.tensorrt import TensorRtEngine, open_engine
from dimefm_edge.runtime.tensorrt_build import BuiltEngine, EngineOptions, build_engine
from dimefm_edge.runtime.tensorrt_cache import facts_path

VERSIONS = ("10.3", "10.16", "11.4")
Fake = Callable[[str], Any]


@pytest.fixture
def bundle(exported_bundles: dict[str, Path]) -> Bundle:
    return load_bundle(exported_bundles["fp16"])


@pytest.fixture
def images() -> np.ndarray:
    return np.random.default_rng(0).normal(size=(11, 3, 32, 32)).astype(np.float32)


def build(bundle: Bundle, *batch: int) -> BuiltEngine:
    return build_engine(bundle, EngineOptions(batch=batch or (1, 2, 4)))  # type: ignore[arg-type]


def live_bytes(double: Any) -> int:
    return int(ctypes.c_size_t.in_dll(double.driver, "fake_live_bytes").value)


@pytest.mark.parametrize("version", VERSIONS)
def test_it_answers_as_onnx_runtime_does_for_any_batch(
    version: str, bundle: Bundle, images: np.ndarray, fake_tensorrt: Fake
) -> None:
    double = fake_tensorrt(version)
    build(bundle)
    engine = load_engine(bundle, engine="tensorrt")
    assert isinstance(engine, TensorRtEngine)
    assert (engine.embed_dim, engine.min_batch, engine.max_batch) == (24, 1, 4)
    expected = load_engine(bundle, threads=1).encode_image(images)
    for size in (1, 4, 11, 4, 11, 3, 0):
        embeds = engine.encode_image(images[:size])
        assert embeds.shape == (size, 24)
        assert embeds.dtype == np.float32
        np.testing.assert_allclose(embeds, expected[:size], atol=2e-3)
    assert double.driver.fake_launches() > 0
    engine.close()
    engine.close()
    with pytest.raises(ValueError, match="the engine is closed"):
        engine.encode_image(images)


def test_pixels_are_normalised_as_the_bundle_says(bundle: Bundle, fake_tensorrt: Fake) -> None:
    fake_tensorrt("10.3")
    build(bundle)
    pixels = np.random.default_rng(1).integers(0, 256, (2, 32, 32, 3)).astype(np.uint8)
    embeds = load_engine(bundle, engine="tensorrt").encode_pixels(pixels)
    np.testing.assert_allclose(
        embeds, load_engine(bundle, threads=1).encode_pixels(pixels), atol=2e-3
    )


def test_few_images_are_padded_to_the_least_batch(
    bundle: Bundle, images: np.ndarray, fake_tensorrt: Fake
) -> None:
    double = fake_tensorrt("10.3")
    engine = TensorRtEngine(build(bundle, 3, 3, 3).artifact, bundle=bundle)
    expected = load_engine(bundle, threads=1).encode_image(images)
    np.testing.assert_allclose(engine.encode_image(images[:2]), expected[:2], atol=2e-3)
    np.testing.assert_allclose(engine.encode_image(images[:4]), expected[:4], atol=2e-3)
    shapes = [c for c in double.calls if c.startswith("IExecutionContext.set_input_shape")]
    assert all("(3, 3, 32, 32)" in shape for shape in shapes)


def test_a_batch_size_is_recorded_when_it_comes_again(
    bundle: Bundle, images: np.ndarray, fake_tensorrt: Fake
) -> None:
    double = fake_tensorrt("10.3")
    engine = TensorRtEngine(build(bundle, 1, 1, 8).artifact, bundle=bundle)
    launches = []
    for size in (1, 1, 1, 2, 2):
        engine.encode_image(images[:size])
        launches.append(double.driver.fake_launches())
    assert launches == [0, 1, 2, 2, 3]
    expected = load_engine(bundle, threads=1).encode_image(images)
    for size in (*range(1, 8), *range(1, 8)):  # more sizes than graphs are kept
        np.testing.assert_allclose(engine.encode_image(images[:size]), expected[:size], atol=2e-3)
    assert len(engine._graphs) == 4


@pytest.mark.parametrize("is_allowed", [True, False])
def test_without_graphs_it_answers_the_same(
    is_allowed: bool,
    bundle: Bundle,
    images: np.ndarray,
    fake_tensorrt: Fake,
    caplog: pytest.LogCaptureFixture,
) -> None:
    double = fake_tensorrt("10.3")
    ctypes.c_int.in_dll(double.driver, "fake_allows_capture").value = int(is_allowed)
    engine = TensorRtEngine(build(bundle).artifact, bundle=bundle, use_cuda_graphs=not is_allowed)
    expected = load_engine(bundle, threads=1).encode_image(images)
    for _ in range(3):
        np.testing.assert_allclose(engine.encode_image(images[:2]), expected[:2], atol=2e-3)
    assert double.driver.fake_launches() == 0
    assert ("TensorRT runs without CUDA graphs" in caplog.text) == (not is_allowed)


def test_threads_take_turns(bundle: Bundle, images: np.ndarray, fake_tensorrt: Fake) -> None:
    fake_tensorrt("10.3")
    engine = TensorRtEngine(build(bundle).artifact, bundle=bundle)
    expected = load_engine(bundle, threads=1).encode_image(images)
    failed = []

    def work(start: int) -> None:
        for _ in range(5):
            piece = slice(start, start + 3)
            if not np.allclose(engine.encode_image(images[piece]), expected[piece], atol=2e-3):
                failed.append(start)

    threads = [threading.Thread(target=work, args=(start,)) for start in (0, 3, 6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failed == []


def test_close_gives_the_gpu_back(bundle: Bundle, images: np.ndarray, fake_tensorrt: Fake) -> None:
    double = fake_tensorrt("10.3")
    engine = TensorRtEngine(build(bundle).artifact, bundle=bundle)
    engine.encode_image(images[:2])
    engine.encode_image(images[:2])
    pinned = engine._image.nbytes + engine._embeds.nbytes
    assert live_bytes(double) == 2 * pinned
    engine.close()
    assert live_bytes(double) == pinned  # until the engine itself goes
    del engine
    assert live_bytes(double) == 0


@pytest.mark.parametrize("version", VERSIONS)
def test_layers_are_timed(version: str, bundle: Bundle, fake_tensorrt: Fake) -> None:
    fake_tensorrt(version)
    built = build(bundle)
    engine = TensorRtEngine(built.artifact, bundle=bundle)
    times = engine.layer_times_ms(2, repeats=3)
    assert list(times) == [layer["name"] for layer in built.artifact.facts["layers"]]
    assert set(times.values()) == {0.25}
    with pytest.raises(ValueError, match="batch size must be 1 to 4"):
        engine.layer_times_ms(5)


def test_a_classifier_can_run_on_it(bundle: Bundle, fake_tensorrt: Fake) -> None:
    from dimefm_edge.data.scenes import scene_image

    fake_tensorrt("10.3")
    build(bundle)
    classifier = ZeroShotClassifier(bundle, engine="tensorrt")
    assert isinstance(classifier.engine, TensorRtEngine)
    ranked = classifier.classify([scene_image(i) for i in range(4)], top_k=1)
    assert [answer[0][0] for answer in ranked] == [f"image {i}" for i in range(4)]


# --------------------------------------------------------------------------- refusals


def test_nothing_built_names_the_command(bundle: Bundle, fake_tensorrt: Fake) -> None:
    fake_tensorrt("10.3")
    with pytest.raises(CheckpointError, match="no TensorRT engine of") as caught:
        load_engine(bundle, engine="tensorrt")
    assert caught.value.hint == f"dimefm-edge build {bundle.path}"


def test_an_engine_file_can_be_named(
    bundle: Bundle, images: np.ndarray, fake_tensorrt: Fake, tmp_path: Path
) -> None:
    fake_tensorrt("10.3")
    path = tmp_path / "my.engine"
    build_engine(bundle, out=path)
    assert load_engine(bundle, engine=str(path)).encode_image(images).shape == (11, 24)
    facts_path(path).unlink()
    with pytest.raises(CheckpointError, match="which says what it is, is missing"):
        load_engine(bundle, engine=str(path))


def test_refused_engines_never_reach_tensorrt(bundle: Bundle, fake_tensorrt: Fake) -> None:
    path = build_with(fake_tensorrt, "10.3", bundle)
    double = fake_tensorrt("10.16")
    with pytest.raises(CheckpointError, match=r"built by TensorRT 10\.3\.0, and this is 10\.16"):
        open_engine(bundle, path)
    double = fake_tensorrt("10.3")
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match="it is truncated"):
        open_engine(bundle, path)
    assert not [call for call in double.calls if "deserialize" in call]


def build_with(fake_tensorrt: Fake, version: str, bundle: Bundle) -> Path:
    fake_tensorrt(version)
    return build(bundle).artifact.path


def test_what_tensorrt_itself_refuses_is_told(bundle: Bundle, fake_tensorrt: Fake) -> None:
    double = fake_tensorrt("10.3")
    artifact = build(bundle).artifact
    artifact.path.write_bytes(b"not a plan")
    with pytest.raises(CheckpointError, match=r"cannot load the engine .* wrong magic tag") as e:
        TensorRtEngine(artifact, bundle=bundle)
    assert e.value.hint == f"dimefm-edge build {bundle.path} --rebuild"
    double.run_error = "CUDA error 700"
    engine = TensorRtEngine(build(bundle).artifact, bundle=bundle)
    with pytest.raises(DimeFMError, match="cannot run the engine on 2 images: CUDA error 700"):
        engine.encode_image(np.zeros((2, 3, 32, 32), np.float32))


def test_an_engine_of_other_sizes_is_refused(
    bundle: Bundle, fake_tensorrt: Fake, exported_bundles: dict[str, Path]
) -> None:
    double = fake_tensorrt("10.3")
    artifact = build(bundle).artifact
    double.icudaengine_get_tensor_shape = lambda this, name: double._dims([-1, 7])
    with pytest.raises(CheckpointError, match=r"takes and gives .* the bundle says"):
        TensorRtEngine(artifact, bundle=bundle)


def test_wrong_shapes_are_value_errors(bundle: Bundle, fake_tensorrt: Fake) -> None:
    fake_tensorrt("10.3")
    engine = TensorRtEngine(build(bundle).artifact, bundle=bundle)
    with pytest.raises(ValueError, match=r"image must be \(B, 3, 32, 32\) float32, got \(3, 32"):
        engine.encode_image(np.zeros((3, 32, 32), np.float32))
    with pytest.raises(ValueError, match=r"pixels must be \(B, 32, 32, 3\) uint8, got .* float32"):
        engine.encode_pixels(np.zeros((1, 32, 32, 3), np.float32))  # type: ignore[arg-type]


def test_without_tensorrt_it_says_what_is_missing(
    bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "tensorrt", None)
    with pytest.raises(MissingExtraError, match="TensorRT's Python package cannot be imported"):
        load_engine(bundle, engine="tensorrt")


@pytest.mark.gpu
@pytest.mark.tensorrt
def test_on_a_gpu(exported_bundles: dict[str, Path], tmp_path: Path) -> None:
    """The same with TensorRT itself, where it and a GPU are."""
    pytest.importorskip("tensorrt", reason="TensorRT is not installed")
    for precision, atol in (("fp32", 2e-3), ("fp16", 5e-3)):
        bundle = load_bundle(exported_bundles[precision])
        built = build_engine(bundle, EngineOptions(batch=(1, 2, 4)), out=tmp_path / "a.engine")
        engine = TensorRtEngine(built.artifact, bundle=bundle)
        images = np.random.default_rng(0).normal(size=(11, 3, 32, 32)).astype(np.float32)
        expected = load_engine(bundle, threads=1).encode_image(images)
        for _ in range(3):
            np.testing.assert_allclose(engine.encode_image(images), expected, atol=atol)
        assert sum(engine.layer_times_ms(2).values()) > 0
        engine.close()


@pytest.fixture(scope="module")
def pixel_bundles(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Bundle]:
    """By what the graph takes: resized pixels, or images of any size."""
    import torch

    from dimefm_edge.data.scenes import scene_image
    from dimefm_edge.export import GraphSpec, export_student
    from dimefm_edge.preprocess import PreprocessSpec, preprocess_images
    from dimefm_edge.students import LoadedStudent, build_student, vit_spec

    torch.manual_seed(1)
    spec = vit_spec(image_size=32, embed_dim=24, patch_size=16, width=32, depth=1, num_heads=1)
    student, preprocess = build_student(spec).eval(), PreprocessSpec(32)
    folder = tmp_path_factory.mktemp("pixels")
    runtimes = {"uint8": "tensorrt", "image": "onnxruntime"}
    return {
        kind: load_bundle(export_student(
            LoadedStudent(student, spec, preprocess, {}), folder / kind,
            graph=GraphSpec(runtime=runtime, image_input=kind),  # type: ignore[arg-type]
            parity_images=preprocess_images([scene_image(i) for i in range(4)], preprocess),
            logit_scale=100.0,
        ))
        for kind, runtime in runtimes.items()
    }  # fmt: skip


@pytest.mark.parametrize("version", VERSIONS)
def test_a_graph_that_takes_pixels_gets_pixels(
    version: str, pixel_bundles: dict[str, Bundle], fake_tensorrt: Fake
) -> None:
    fake_tensorrt(version)
    bundle = pixel_bundles["uint8"]
    build(bundle)
    engine = load_engine(bundle, engine="tensorrt")
    pixels = np.random.default_rng(1).integers(0, 256, (5, 32, 32, 3)).astype(np.uint8)
    expected = load_engine(bundle, threads=1).encode_pixels(pixels)
    for _ in range(3):
        np.testing.assert_allclose(engine.encode_pixels(pixels), expected, atol=1e-5)
    with pytest.raises(ValueError, match="takes pixels and prepares them itself: encode_pixels"):
        engine.encode_image(np.zeros((1, 3, 32, 32), np.float32))


def test_a_graph_that_resizes_is_refused_before_anything_is_built(
    pixel_bundles: dict[str, Bundle], fake_tensorrt: Fake
) -> None:
    double = fake_tensorrt("10.16")
    with pytest.raises(ConfigError, match=r"resizes images in its graph.*\n.*--input uint8"):
        build(pixel_bundles["image"])
    assert not any(call.startswith("Builder.") for call in double.calls)
