"""The AOTInductor engine: runs a bundle's `model.pt2` with torch, on the device it was made for.

A `.pt2` holds native code, which is run as it is. So it is loaded only when a user asks for this
engine by name, and only from a bundle whose manifest lists it with a hash that was checked; and
it is refused where torch, system, device or chip differ from those it was compiled with.
torch is imported here and nowhere else in the runtime, when an engine is made.
"""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import numpy.typing as npt

from dimefm_edge.errors import CheckpointError, DimeFMError, MissingExtraError
from dimefm_edge.manifest import PT2_BUILD_FILE, PT2_FILE, native_build
from dimefm_edge.preprocess import normalise_pixels
from dimefm_edge.runtime.bundle import Bundle
from dimefm_edge.runtime.onnxruntime import count_physical_cores

_COMPILE_AGAIN = "on this device: dimefm-edge export RUN --format pt2 --out BUNDLE"


class AotInductorEngine:
    """A package of native code in torch.

    Attributes:
        threads: Threads of torch in this process, which loading sets; cpu packages only.
        embed_dim: Size E of the embeddings.
        build: What the package was compiled for.
    """

    def __init__(self, bundle: Bundle, *, threads: int = 0) -> None:
        """Load the package of a checked bundle.

        Args:
            bundle: Keep it while the engine is loaded.
            threads: 0 takes one per physical core that this process may use.

        Raises:
            CheckpointError: If the bundle has no package, or one for another torch or device.
            MissingExtraError: If torch is not installed.
        """
        if threads < 0:
            raise ValueError(f"threads must not be negative, got {threads}")
        self.threads = threads or count_physical_cores()
        self.embed_dim = bundle.embed_dim
        self.takes_any_size = False
        self._preprocess = bundle.preprocess
        self.build = _read_build(bundle)
        self._torch = _import_torch()
        self._check_build(bundle)
        self._torch.set_num_threads(self.threads)
        path = bundle.model_path.with_name(PT2_FILE)
        try:
            self._run = self._torch._inductor.aoti_load_package(str(path))
        except (RuntimeError, OSError) as error:
            raise CheckpointError(
                f"torch {self._torch.__version__} cannot load {path}: {_reason(error)}",
                hint=_COMPILE_AGAIN,
            ) from error

    def encode_image(self, image: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
        """Embed preprocessed images: (B, 3, S, S) float32 -> (B, E) float32, L2-normalised.

        Raises:
            DimeFMError: If the package cannot run, on a batch size that it does not take say.
            ValueError: If the shape or type is another.
        """
        side = self._preprocess.image_size
        if image.ndim != 4 or image.shape[1:] != (3, side, side) or image.dtype != np.float32:
            raise ValueError(
                f"image must be (B, 3, {side}, {side}) float32, got {image.shape} {image.dtype}"
            )
        if not len(image):
            return np.empty((0, self.embed_dim), np.float32)
        try:
            with self._torch.inference_mode():
                batch = self._torch.from_numpy(np.ascontiguousarray(image))
                embeds = self._run(batch.to(self.build["device"]))
        except RuntimeError as error:
            raise DimeFMError(
                f"{PT2_FILE} cannot run on {len(image)} images: {_reason(error)}",
                hint=f"it takes {self.build.get('batch_size', 'other counts')} at once",
            ) from error
        return np.asarray(embeds.cpu().numpy(), np.float32)

    def encode_pixels(self, pixels: npt.NDArray[np.uint8]) -> npt.NDArray[np.float32]:
        """Embed resized images: (B, S, S, 3) uint8, RGB -> (B, E) float32, L2-normalised."""
        if pixels.ndim != 4 or pixels.shape[3] != 3 or pixels.dtype != np.uint8:
            raise ValueError(
                f"pixels must be (B, S, S, 3) uint8, got {pixels.shape} {pixels.dtype}"
            )
        return self.encode_image(normalise_pixels(pixels, self._preprocess))

    def _check_build(self, bundle: Bundle) -> None:
        device = self.build["device"]
        if device == "cuda" and not self._torch.cuda.is_available():
            raise CheckpointError(
                f"{bundle.path}: {PT2_FILE} is for a GPU ({self.build.get('chip')}), and torch "
                "finds none here",
                hint=_COMPILE_AGAIN,
            )
        here = native_build(self._torch, device)
        other = [key for key, value in here.items() if self.build.get(key) != value]
        if other:
            pairs = ", ".join(f"{k} {self.build.get(k)} (here {here[k]})" for k in other)
            raise CheckpointError(
                f"{bundle.path}: {PT2_FILE} was compiled for {pairs}", hint=_COMPILE_AGAIN
            )


def _read_build(bundle: Bundle) -> dict[str, str]:
    """What the package was compiled for; both files are in the manifest, so they were checked."""
    if not {PT2_FILE, PT2_BUILD_FILE} <= set(bundle.manifest["files"]):
        raise CheckpointError(f"{bundle.path} has no {PT2_FILE}", hint=_COMPILE_AGAIN)
    text = bundle.model_path.with_name(PT2_BUILD_FILE).read_text(encoding="utf-8")
    try:
        build = json.loads(text)
    except ValueError:
        build = None
    if not isinstance(build, dict) or build.get("device") not in ("cpu", "cuda"):
        raise CheckpointError(
            f"{bundle.path}: {PT2_BUILD_FILE} does not say what {PT2_FILE} was compiled for",
            hint=_COMPILE_AGAIN,
        )
    return {str(key): str(value) for key, value in build.items()}


def _import_torch() -> Any:
    try:
        import torch
    except ImportError as error:
        raise MissingExtraError(
            f"{PT2_FILE} needs torch, which is not installed", hint="pip install torch"
        ) from error
    return torch


def _reason(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
