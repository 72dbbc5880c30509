"""How long a request may be: gradio limits files, not the text that can carry one."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Message, Receive, Send], Awaitable[None]]

_OVERHEAD = 1.4
"""A file as base64, with what goes around it."""


class BodyLimit:
    """ASGI middleware that answers 413 to a longer body, and stops reading one that lied."""

    def __init__(self, app: App, max_bytes: int) -> None:
        self._app = app
        self._max_bytes = max_bytes

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        declared = dict(scope["headers"]).get(b"content-length", b"0")
        if not declared.isdigit() or int(declared) > self._max_bytes:
            await send({"type": "http.response.start", "status": 413, "headers": []})
            return await send({"type": "http.response.body", "body": b"too large"})
        read = 0

        async def counted() -> Message:
            nonlocal read
            message = await receive()
            read += len(message.get("body", b""))
            if read > self._max_bytes:
                return {"type": "http.disconnect"}
            return message

        await self._app(scope, counted, send)


def body_limit(max_upload_mib: int) -> Any:
    """The limit as an app takes it, for files of up to `max_upload_mib`."""
    from starlette.middleware import Middleware

    return Middleware(BodyLimit, max_bytes=int(max_upload_mib * _OVERHEAD * 2**20))
