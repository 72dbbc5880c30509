"""The server: the page behind its limits, from the first request to the last temporary file."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import tempfile
import threading
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

from dimefm_demo.limits import body_limit
from dimefm_demo.model_specs import SAMPLE, find_models
from dimefm_demo.models import Models, check_samples
from dimefm_demo.search import ServerIndexes
from dimefm_edge.demo_config import DemoConfig
from dimefm_edge.errors import InputError, MissingExtraError

logger = logging.getLogger(__name__)

_INSTALL = "pip install 'dimefm_edge[demo]'"
_LOOK_S = 0.5
_MAX_SESSIONS = 64
"""Visitors whose charts and indexes are kept; the oldest go first."""
_OTHER_THREADS = 8
"""For what is no answer: cameras, a long job, pages that wait for the first model."""
_GRADIO = {
    "GRADIO_ANALYTICS_ENABLED": "False",
    # Else it makes a table of the last 10,000 requests at each one, for a page that is off.
    "GRADIO_ANALYTICS_CACHE_FREQUENCY": "1000",
    "GRADIO_ANALYTICS_MAX_EVENTS": "100",
}
_LOOPBACK = ("127.0.0.1", "localhost", "::1")


def serve(config: DemoConfig) -> None:
    """Show the page until Ctrl-C or SIGTERM; then nothing that a visitor sent is left.

    Raises:
        DimeFMError: If nothing of that name can be shown or searched, or the port is taken.
        MissingExtraError: If gradio is not installed.
    """
    with serving(config) as url:
        _say(f"The demo is at {url}  (Ctrl-C stops it)")
        stop = threading.Event()
        before = signal.signal(signal.SIGTERM, lambda *_: stop.set())
        try:
            while not stop.wait(_LOOK_S):  # a wait without end could not be interrupted
                pass
        except KeyboardInterrupt:
            pass
        finally:
            signal.signal(signal.SIGTERM, before)


@contextlib.contextmanager
def serving(config: DemoConfig) -> Iterator[str]:
    """The page, served from a thread while the block runs; gives its address.

    Raises:
        DimeFMError: As `serve` does.
    """
    _require_gradio()
    specs = find_models(config.models, engines=config.engine)
    check_samples(specs)
    auth = _credentials(config.auth)
    indexes = ServerIndexes(config.search)
    indexes.check()
    models = Models(specs, threads=config.threads)
    # The sample can be made, so the page comes before it; of the others, one must be there.
    is_page_first = any(spec.kind == SAMPLE for spec in specs)
    if auth is None and (config.share or config.host not in _LOOPBACK):
        logger.warning("whoever reaches %s can use this page: --auth USER:PASSWORD", config.host)
    with tempfile.TemporaryDirectory(prefix="dimefm_edge_demo_") as folder:
        os.environ |= {**_GRADIO, "GRADIO_TEMP_DIR": str(Path(folder) / "uploads")}
        from dimefm_demo.page import CSS, build_page, theme

        page = build_page(models, indexes, Path(folder))
        page.queue(
            max_size=config.max_queue, default_concurrency_limit=config.concurrency, api_open=False
        )
        if not is_page_first:
            models.load_behind()
            models.require_one()
        try:
            _, local, public = page.launch(
                server_name=config.host, server_port=config.port, share=config.share, auth=auth,
                max_file_size=f"{config.max_upload_mib}mb", theme=theme(), css=CSS, quiet=True,
                prevent_thread_lock=True, ssr_mode=False, footer_links=["api"], run_history=False,
                max_threads=config.concurrency + _OTHER_THREADS, strict_cors=True,
                state_session_capacity=_MAX_SESSIONS,
                app_kwargs={"middleware": [body_limit(config.max_upload_mib)]},
            )  # fmt: skip
        except OSError as error:
            raise InputError(f"the server cannot start: {error}", hint="another --port") from error
        if is_page_first:
            models.load_behind()
        try:
            yield public or local
        finally:
            page.close(verbose=False)


def _credentials(auth: str | None) -> tuple[str, str] | None:
    """USER:PASSWORD, or the file that holds it."""
    if auth is None:
        return None
    if auth.startswith("@"):
        try:
            auth = Path(auth[1:]).expanduser().read_text(encoding="utf-8").strip()
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(f"{auth[1:]} cannot be read: {error}", hint="--auth @FILE") from error
    user, colon, password = auth.partition(":")
    if not (user and colon and password):
        raise InputError("--auth needs a name and a password", hint="--auth USER:PASSWORD")
    return user, password


def _require_gradio() -> None:
    missing = [name for name in ("gradio", "faiss") if find_spec(name) is None]
    if missing:
        raise MissingExtraError(
            f"the demo needs {' and '.join(missing)}, which is not installed", hint=_INSTALL
        )


def _say(text: str) -> None:
    from rich.console import Console

    Console(stderr=True).print(text, markup=False, highlight=False)
