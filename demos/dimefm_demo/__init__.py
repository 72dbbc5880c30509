"""The demo: a page that shows a student beside its teacher. `dimefm-edge demo` opens it.

    from dimefm_demo import DemoConfig, serve
    serve(DemoConfig(models=("runs/first",)))

Built on the public API of `dimefm_edge`; gradio and faiss come with its extra `demo`.
"""

from __future__ import annotations

from dimefm_demo.server import serve, serving
from dimefm_edge.demo_config import DemoConfig

__all__ = ["DemoConfig", "serve", "serving"]
