"""Towers of a teacher: each side as a module of its own, pixels to embeddings as a function."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dimefm_edge.preprocess import PreprocessSpec

EncodePixels = Callable[[npt.NDArray[np.uint8]], npt.NDArray[np.float32]]
"""(B, S, S, 3) uint8 pixels -> (B, E) float32, L2-normalised."""

_CPU_BATCH = 64  # activations that stay in the cache: half as fast again as 256 at once


class Normalised(nn.Module):
    """A teacher's image or text tower that answers in unit length, as students do."""

    def __init__(self, tower: nn.Module) -> None:
        super().__init__()
        self.tower = tower
        self.train(tower.training)  # what restores the mode of this one must not change it

    def forward(self, inputs: Tensor) -> Tensor:
        return F.normalize(self.tower(inputs), dim=-1)


class JoinedTowers(nn.Module):
    """Towers of several teachers as one: their unit vectors end to end, each scaled.

    With scales whose squares add up to 1 the result has unit length, and its cosines are the mean
    of the teachers' cosines, weighted by these squares.
    """

    def __init__(
        self, towers: Sequence[nn.Module], scales: Sequence[float], *, widths: Sequence[int] = ()
    ) -> None:
        """
        Args:
            towers: Each (B, ...) -> (B, E_k), normalised or not.
            scales: One a tower.
            widths: How the second dimension of the input is cut up, a piece for each tower;
                none: each takes all of it.
        """
        super().__init__()
        self.towers = nn.ModuleList(towers)
        self.scales, self.widths = tuple(scales), list(widths)
        self.train(towers[0].training)

    def forward(self, inputs: Tensor) -> Tensor:
        whole = [inputs] * len(self.towers)
        pieces = torch.split(inputs, self.widths, dim=1) if self.widths else whole
        embeds = [
            scale * F.normalize(tower(piece), dim=-1)
            for tower, scale, piece in zip(self.towers, self.scales, pieces, strict=True)
        ]
        return torch.cat(embeds, dim=-1)


class TextTower(nn.Module):
    """An open_clip model without its image tower: (B, L) int64 tokens -> (B, E), not normalised.

    The weights are the model's own, which is left as it is.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = copy.copy(model)
        self.model._modules = {k: v for k, v in model._modules.items() if k != "visual"}
        self.train(model.training)

    def forward(self, tokens: Tensor) -> Tensor:
        # 32 bits hold any vocabulary. The end token is found by an ArgMax of the ids, which
        # TensorRT's parser takes in int64 only from 9.2 on (onnx-tensorrt, operators.md).
        embeds: Tensor = self.model.encode_text(tokens.int())  # type: ignore[operator]
        return embeds


def module_encoder(tower: nn.Module, preprocess: PreprocessSpec) -> EncodePixels:
    """Wrap an image tower, on the device it lies on; in fp16 on a GPU.

    Args:
        tower: (B, 3, S, S) float, preprocessed -> (B, E), normalised or not.
        preprocess: Mean and standard deviation of its pixels.
    """
    device = next(tower.parameters()).device
    is_gpu = device.type == "cuda"
    mean = torch.tensor(preprocess.mean, device=device).view(1, 3, 1, 1) * 255
    std = torch.tensor(preprocess.std, device=device).view(1, 3, 1, 1) * 255

    def encode(pixels: npt.NDArray[np.uint8]) -> npt.NDArray[np.float32]:
        # The copy is for torch, which warns of read-only arrays such as memory maps.
        batch = torch.from_numpy(np.array(pixels)).to(device, non_blocking=True)
        size = len(batch) if is_gpu else _CPU_BATCH
        embeds = []
        with torch.inference_mode(), torch.autocast(device.type, torch.float16, enabled=is_gpu):
            for start in range(0, len(batch), size):
                images = batch[start : start + size].permute(0, 3, 1, 2).float()
                embeds.append(tower((images - mean) / std).float())
            array: npt.NDArray[np.float32] = F.normalize(torch.cat(embeds), dim=-1).cpu().numpy()
        return array

    return encode
