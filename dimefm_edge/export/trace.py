"""torch modules to ONNX graphs: traced once, then written as the target's runtime likes it."""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from collections.abc import Iterator
from typing import TYPE_CHECKING

from dimefm_edge.errors import DimeFMError, ExportError
from dimefm_edge.export.simplify import ready_for_tracing

if TYPE_CHECKING:
    import onnx
    import onnx_ir as ir
    from torch import Tensor, nn

logger = logging.getLogger(__name__)


def trace(
    module: nn.Module,
    example: Tensor,
    *,
    input_name: str,
    output_name: str,
    opset: int,
    attention: str,
    has_dynamic_batch: bool = True,
) -> onnx.ModelProto:
    """Write a module as a graph of one input and one output; it prints nothing.

    Args:
        module: One tensor in, one out; traced as a copy, made ready by simplify.py.
        example: An input. With a dynamic batch, of 2 rows or more: torch.export takes 0 and 1
            for constants.
        input_name: The graph's.
        output_name: The graph's.
        opset: Of the graph.
        attention: A name in `lower.ATTENTION_FORMS`.
        has_dynamic_batch: Leave the first dimension open; else it is the example's.

    Raises:
        ExportError: If torch cannot export the module.
    """
    import onnx_ir as ir
    import torch

    from dimefm_edge.export.lower import lower_attentions, translation_table
    from dimefm_edge.export.plugin import add_meaning

    shapes = ({0: torch.export.Dim("batch")},) if has_dynamic_batch else None
    try:
        with silence(), torch.no_grad():
            program = torch.onnx.export(
                ready_for_tracing(module),
                (example,),
                dynamo=True,
                opset_version=opset,
                input_names=[input_name],
                output_names=[output_name],
                dynamic_shapes=shapes,
                custom_translation_table=translation_table(),
                optimize=True,
                verbose=False,
            )
            assert program is not None
            lower_attentions(program.model, attention)
            _clean(program.model)
            model: onnx.ModelProto = ir.to_proto(program.model)
            if attention == "plugin":
                add_meaning(model, opset)
    except DimeFMError:
        raise
    # The exporter wraps whatever its dozen passes raise.
    except Exception as error:
        reason = next((line for line in str(error).splitlines() if line.strip()), repr(error))
        raise ExportError(
            f"torch {torch.__version__} cannot export the model to ONNX: {reason}",
            hint="run with --verbose for the exporter's own report",
        ) from error
    found = next(o.version for o in model.opset_import if o.domain in ("", "ai.onnx"))
    if found != opset:
        raise ExportError(f"torch wrote opset {found} when asked for {opset}")
    return model


def _clean(model: ir.Model) -> None:
    """Fold what is constant, shapes of reshapes included; drop what nothing reads."""
    import onnxscript.optimizer
    import onnxscript.rewriter
    from onnx_ir.passes.common import DeduplicateInitializersPass
    from onnxscript.rewriter.rules.common import expand_before_binary_op_rules

    onnxscript.optimizer.optimize(model)
    onnxscript.rewriter.rewrite(model, pattern_rewrite_rules=expand_before_binary_op_rules)
    DeduplicateInitializersPass()(model)


@contextlib.contextmanager
def silence() -> Iterator[None]:
    """Send what the exporter prints and warns to the debug log."""
    noise = io.StringIO()
    with (
        contextlib.redirect_stdout(noise),
        contextlib.redirect_stderr(noise),
        warnings.catch_warnings(record=True) as caught,
    ):
        warnings.simplefilter("always")
        levels = {
            name: logging.getLogger(name).level for name in ("torch", "onnxscript", "onnx_ir")
        }
        for name in levels:
            logging.getLogger(name).setLevel(logging.ERROR)
        try:
            yield
        finally:
            for name, level in levels.items():
                logging.getLogger(name).setLevel(level)
    for line in noise.getvalue().splitlines() + [str(w.message) for w in caught]:
        logger.debug("torch.onnx: %s", line)
