"""int8 without training: ranges from images, and the layers that suffer most left in float.

The quick path beside qat.py, on the same fake-quantised student. Outlier channels are evened out
first (smooth.py). `export --precision int8` calibrates the finished graph instead (export/int8.py).
"""

from __future__ import annotations

from collections.abc import Callable, Collection

import torch
from torch import Tensor, nn

from dimefm_edge.quantize.deployed import deployed_form
from dimefm_edge.quantize.qat import FakeQuantStudent, qat_prepare
from dimefm_edge.quantize.smooth import smooth

_BATCH = 32
_NUM_SMOOTHING = 64


def calibrated(
    student: nn.Module,
    images: Tensor,
    *,
    rules_name: str,
    method: str | None = None,
    keep_float: Collection[str] = (),
) -> FakeQuantStudent:
    """Fake-quantise a trained student by what it says of images; in eval mode.

    Args:
        student: (B, 3, S, S) -> (B, E), L2-normalised; not changed.
        images: (N, 3, S, S) preprocessed, of the kind that it will see.
        rules_name: A name in `QUANT_RULES`.
        method: minmax, percentile or mse; default: what the rules say.
        keep_float: As for `qat_prepare`.

    Raises:
        DimeFMError: As `qat_prepare` and `FakeQuantStudent.calibrate`.
    """
    size = images.shape[-1]
    deployed = deployed_form(student, size)
    smooth(deployed, images[:_NUM_SMOOTHING])
    made = qat_prepare(deployed, image_size=size, rules_name=rules_name, keep_float=keep_float)
    made.calibrate(torch.split(images, _BATCH), method)
    return made.eval()


@torch.no_grad()
def sensitivity(student: FakeQuantStudent, images: Tensor) -> dict[str, float]:
    """What each product alone costs in integers: mean 1 - cosine of the embeddings, by name.

    Args:
        student: Calibrated.
        images: (N, 3, S, S) preprocessed.
    """
    with student.rounding_only(()):
        wanted = student(images)
    costs = {}
    for name in student.product_names:
        with student.rounding_only((name,)):
            costs[name] = float(1 - (student(images) * wanted).sum(dim=1).mean())
    return costs


def worst_products(
    student: FakeQuantStudent,
    images: Tensor,
    *,
    max_drop: float,
    drop: Callable[[nn.Module], float],
) -> tuple[str, ...]:
    """The products to leave in float so that int8 loses little enough.

    Args:
        student: Calibrated.
        images: (N, 3, S, S) preprocessed, to rank products on.
        max_drop: How much may be lost.
        drop: What a module loses, in the same unit.

    Returns:
        The fewest of the most sensitive ones found by doubling; perhaps none, perhaps all.
    """
    costs = sensitivity(student, images)
    ranked = sorted(costs, key=lambda name: costs[name], reverse=True)
    count = 0
    while True:
        with student.rounding_only(ranked[count:]):
            lost = drop(student)
        if lost <= max_drop or count == len(ranked):
            return tuple(ranked[:count])
        count = min(max(1, 2 * count), len(ranked))
