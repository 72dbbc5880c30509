"""The module that every family builds: a trunk, a projection, unit length."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn


class Student(nn.Module):
    """An image encoder that answers in the teacher's embedding space."""

    def __init__(self, trunk: nn.Module, *, num_features: int, embed_dim: int) -> None:
        """Join a trunk, (B, 3, S, S) -> (B, num_features), to a projection without bias."""
        super().__init__()
        self.trunk = trunk
        self.proj = nn.Linear(num_features, embed_dim, bias=False)
        nn.init.normal_(self.proj.weight, std=num_features**-0.5)

    def forward(self, image: Tensor) -> Tensor:
        """Embed (B, 3, S, S) preprocessed images: (B, E), L2-normalised."""
        # float(): a sum of squares overflows in fp16.
        return F.normalize(self.proj(self.trunk(image)).float(), dim=-1)
