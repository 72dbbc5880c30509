"""A torch module as a function from pixels to embeddings, for evaluation."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from dimefm_edge.preprocess import PreprocessSpec

EncodePixels = Callable[[npt.NDArray[np.uint8]], npt.NDArray[np.float32]]
"""(B, S, S, 3) uint8 pixels -> (B, E) float32, L2-normalised."""


def module_encoder(student: nn.Module, preprocess: PreprocessSpec) -> EncodePixels:
    """Wrap a student, which normalises its own embeddings, on the device it lies on."""
    device = next(student.parameters()).device
    mean = torch.tensor(preprocess.mean, device=device).view(1, 3, 1, 1) * 255
    std = torch.tensor(preprocess.std, device=device).view(1, 3, 1, 1) * 255

    def encode(pixels: npt.NDArray[np.uint8]) -> npt.NDArray[np.float32]:
        batch = torch.from_numpy(np.array(pixels)).to(device)
        with torch.inference_mode():
            embeds = student((batch.permute(0, 3, 1, 2).float() - mean) / std)
        array: npt.NDArray[np.float32] = embeds.float().cpu().numpy()
        return array

    return encode
