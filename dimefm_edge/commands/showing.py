"""The command that shows models to people: demo."""

from __future__ import annotations

from importlib.util import find_spec
from typing import TYPE_CHECKING

from dimefm_edge.commands.outcome import Outcome
from dimefm_edge.errors import MissingExtraError

if TYPE_CHECKING:
    from dimefm_edge.options import DemoOptions


def run_demo(options: DemoOptions) -> Outcome:
    """Serve the page until it is stopped."""
    if find_spec("dimefm_demo") is None:  # a bare checkout
        raise MissingExtraError(
            "the demo's folder is not on Python's path", hint="pip install -e '.[demo]'"
        )
    from dimefm_demo import serve

    serve(options)
    return Outcome({"stopped": True}, "the demo has stopped; what visitors sent is deleted")
