"""The form of a student that is deployed, ready to be trained: what is quantised is what will run.

simplify.py merges branches and spells attention one way, as for any export. Here BatchNorm goes
into the convolutions before it, and dropout goes: both would stand between a product and the
tensor that the deployed graph quantises.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from dimefm_edge.errors import ExportError
from dimefm_edge.export.simplify import ready_for_tracing
from dimefm_edge.export.trace import silence
from dimefm_edge.quantize.points import CONVS

_MAX_DIFF = 1e-4
_EXAMPLE_BATCH = 2  # torch.export takes 0 and 1 for constants


def deployed_form(student: nn.Module, image_size: int) -> nn.Module:
    """Copy a student into the form that the exporter writes, its weights trainable.

    Args:
        student: (B, 3, S, S) -> (B, E), L2-normalised; not changed.
        image_size: S.

    Raises:
        ExportError: If torch cannot export it, or the copy answers otherwise.
    """
    deployed = ready_for_tracing(student)
    example = torch.randn(2, 3, image_size, image_size, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        wanted = deployed(example)
        for conv, norm in _followed_by_norm(deployed, image_size):
            fused: nn.Module = fuse_conv_bn_eval(_part(deployed, conv), _part(deployed, norm))
            rest = getattr(_part(deployed, norm), "act", nn.Identity())  # timm's norms hold one
            _replace(deployed, conv, fused)
            _replace(deployed, norm, rest)
        for name, part in list(deployed.named_modules()):
            if isinstance(part, nn.Dropout):
                _replace(deployed, name, nn.Identity())
            elif isinstance(part, nn.BatchNorm2d):
                part.num_batches_tracked = None  # it counts no more
        diff = float((deployed(example) - wanted).abs().max())
    if not diff <= _MAX_DIFF:
        raise ExportError(
            f"BatchNorm cannot be folded into this model's convolutions: answers change by {diff:g}"
        )
    return deployed.eval().requires_grad_(True)


def export_graph(module: nn.Module, image_size: int) -> fx.GraphModule:
    """A module as aten operators, its parameters under their own names; any batch size.

    Raises:
        ExportError: If torch cannot export it.
    """
    example = torch.zeros(_EXAMPLE_BATCH, 3, image_size, image_size)
    batch = torch.export.Dim("batch")
    try:
        with silence():
            program = torch.export.export(module, (example,), dynamic_shapes=({0: batch},))
            graph: fx.GraphModule = program.module(check_guards=False)
    except Exception as error:  # it wraps whatever tracing raises
        reason = next((line for line in str(error).splitlines() if line.strip()), repr(error))
        raise ExportError(
            f"torch {torch.__version__} cannot export the student for training in int8: {reason}",
            hint="--ptq int8, which quantises the finished graph instead",
        ) from error
    # It would insist on what it was traced with: fp32 on a CPU, where autocast has bf16 on a GPU.
    for node in list(graph.graph.nodes):
        if node.target is torch.ops.aten._assert_tensor_metadata.default:
            graph.graph.erase_node(node)
    graph.recompile()
    return graph


def _followed_by_norm(module: nn.Module, image_size: int) -> list[tuple[str, str]]:
    """Names of convolutions and of the BatchNorms that alone read what they write."""
    if not any(isinstance(part, nn.BatchNorm2d) for part in module.modules()):
        return []
    pairs = []
    for node in export_graph(module, image_size).graph.nodes:
        if node.target is not torch.ops.aten.batch_norm.default:
            continue
        source = node.args[0]
        if source.target in CONVS and len(source.users) == 1:
            weight, mean = source.args[1].target, node.args[3].target
            pairs.append((weight.removesuffix(".weight"), mean.removesuffix(".running_mean")))
    return pairs


def _part(module: nn.Module, name: str) -> Any:
    return module.get_submodule(name)


def _replace(module: nn.Module, name: str, new: nn.Module) -> None:
    parent, _, child = name.rpartition(".")
    setattr(module.get_submodule(parent), child, new)
