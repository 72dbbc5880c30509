"""Students to `.pt2`: native code by torch's AOTInductor, for PyTorch users on a Jetson.

The package lies beside `model.onnx` in a usual bundle and is for the device at hand alone: a GPU
where there is one, else this CPU. Attention goes through dimefm_kernels, which AOTInductor sees
into (they are `triton_op`s), so that on a GPU the package holds the kernels' machine code and
needs neither Triton nor this package to run.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from dimefm_edge.errors import ExportError, ParityError, UnsupportedExportError
from dimefm_edge.export.graph_spec import GraphSpec
from dimefm_edge.export.onnx import EXAMPLE_BATCH, OnnxGraph, export_onnx
from dimefm_edge.export.parity import (
    MAX_ABS_DIFF_FP32,
    MIN_COSINE,
    PARITY_BATCHES,
    ParityReport,
    module_embeds,
)
from dimefm_edge.manifest import PT2_BUILD_FILE, PT2_FILE, native_build

if TYPE_CHECKING:
    from torch import Tensor, nn

logger = logging.getLogger(__name__)

_MAX_BATCH = 1024


def export_onnx_and_pt2(student: nn.Module, path: Path, **arguments: Any) -> OnnxGraph:
    """`export_onnx`, and `model.pt2` with what it was compiled for beside it.

    Args:
        student: As in `export_onnx`.
        path: The `.onnx` file; the other two go into its folder.
        arguments: Those of `export_onnx`.

    Raises:
        ExportError: If one of the two cannot be made.
        ParityError: If one of the two does not answer as the student does.
    """
    spec = arguments.get("spec") or GraphSpec()
    if spec.precision not in ("fp32", "fp16"):
        raise UnsupportedExportError(
            f"a .pt2 is fp32 or fp16, not {spec.precision}",
            hint="--format onnx, or --precision fp16",
        )
    graph = export_onnx(student, path, **arguments)
    export_aot_inductor(
        student,
        path.with_name(PT2_FILE),
        image_size=arguments["image_size"],
        precision=spec.precision,
        parity_images=arguments["parity_images"],
        batch_size=spec.batch_size,
    )
    return graph


def export_aot_inductor(
    student: nn.Module,
    path: Path,
    *,
    image_size: int,
    precision: str,
    parity_images: npt.NDArray[np.float32],
    device: str | None = None,
    batch_size: int | None = None,
    configs: dict[str, Any] | None = None,
) -> ParityReport:
    """Compile a student for the device at hand, and check that it answers as torch does.

    Args:
        student: (B, 3, S, S) -> (B, E), L2-normalised; not changed.
        path: The `.pt2` to write; `PT2_BUILD_FILE` goes beside it. Neither stays if parity
            fails.
        image_size: S.
        precision: fp32, or fp16 (weights and activations; input and output stay float32).
        parity_images: (N, 3, S, S) float32, preprocessed real images.
        device: cpu or cuda; default cuda where there is one.
        batch_size: The only batch size that it will take; None takes 1 to 1024.
        configs: Of torch._inductor, as in `aoti_compile_and_package`.

    Raises:
        ExportError: If torch cannot compile the student, for want of a C++ compiler say.
        ParityError: If the package's embeddings are not the student's.
    """
    import torch

    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    model = _prepared(student, precision).to(device)
    example = torch.zeros(batch_size or EXAMPLE_BATCH, 3, image_size, image_size, device=device)
    _compile(model, example, path, is_dynamic=batch_size is None, configs=configs)
    build = {**native_build(torch, device), "precision": precision}
    build["batch_size"] = "1 to 1024" if batch_size is None else str(batch_size)
    path.with_name(PT2_BUILD_FILE).write_text(json.dumps(build, indent=2) + "\n", encoding="utf-8")
    runner = torch._inductor.aoti_load_package(str(path))
    try:
        return _check_parity(
            lambda images: _as_numpy(runner(images.to(device))),
            student,
            parity_images,
            sizes=(batch_size,) if batch_size else PARITY_BATCHES,
            precision=precision,
        )
    except ParityError:
        path.unlink()
        path.with_name(PT2_BUILD_FILE).unlink()
        raise


def _compile(
    model: nn.Module, example: Tensor, path: Path, *, is_dynamic: bool, configs: Any
) -> None:
    import torch

    batch = torch.export.Dim("batch", min=1, max=_MAX_BATCH)
    try:
        with torch.no_grad():
            program = torch.export.export(
                model, (example,), dynamic_shapes=({0: batch},) if is_dynamic else None
            )
            torch._inductor.aoti_compile_and_package(
                program, package_path=str(path), inductor_configs=configs
            )
    except Exception as error:  # export, Inductor and the C++ compiler share no base
        raise ExportError(
            f"torch {torch.__version__} cannot compile the student for {example.device.type}: "
            f"{(str(error).strip() or type(error).__name__).splitlines()[0]}",
            hint="a C++ compiler is needed (apt install g++); or --format onnx",
        ) from error


def _prepared(student: nn.Module, precision: str) -> nn.Module:
    """A copy in eval mode with fused attention, in the precision asked for."""
    import torch

    from dimefm_edge.students.attention import use_fused_attention
    from dimefm_edge.students.hybrid import reparameterise

    model = reparameterise(student)
    logger.info("%d attentions are fused", use_fused_attention(model))
    if precision == "fp32":
        return model

    class Half(torch.nn.Module):
        """Half inside, float32 outside."""

        def __init__(self) -> None:
            super().__init__()
            self.model = model.half()

        def forward(self, image: Tensor) -> Tensor:
            embeds: Tensor = self.model(image.half()).float()
            return embeds

    return Half().eval()


def _check_parity(
    embed: Callable[[Tensor], npt.NDArray[np.float32]],
    student: nn.Module,
    images: npt.NDArray[np.float32],
    *,
    sizes: tuple[int, ...],
    precision: str,
) -> ParityReport:
    """Compare on every image, in batches of each size; the limits are those of ONNX."""
    import torch

    wanted = module_embeds(student, images)
    diff, cosine = 0.0, 1.0
    for size in sizes:
        rows = np.arange(-(-len(images) // size) * size) % len(images)
        found = np.concatenate(
            [embed(torch.from_numpy(images[part])) for part in rows.reshape(-1, size)]
        )
        norms = np.linalg.norm(found, axis=1) * np.linalg.norm(wanted[rows], axis=1)
        cosines = (found * wanted[rows]).sum(axis=1) / np.maximum(norms, 1e-12)
        # fmax and fmin would drop NaN; max and min of numpy keep it.
        diff = float(np.maximum(diff, np.abs(found - wanted[rows]).max()))
        cosine = float(np.minimum(cosine, cosines.min()))
    is_good = cosine >= MIN_COSINE["fp16"] if precision == "fp16" else diff <= MAX_ABS_DIFF_FP32
    if not is_good:  # nor is NaN
        raise ParityError(
            f"the {precision} .pt2 does not answer as the student does: max abs difference "
            f"{diff:.3g}, least cosine {cosine:.6f}",
            hint="dimefm-edge export RUN --format pt2 --precision fp32"
            if precision == "fp16"
            else "another torch release, or --format onnx",
        )
    return ParityReport(diff, min(1.0, cosine), len(images))


def _as_numpy(embeds: Tensor) -> npt.NDArray[np.float32]:
    array: npt.NDArray[np.float32] = embeds.detach().cpu().numpy()
    return array
