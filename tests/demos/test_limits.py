"""No request is longer than its limit, whatever it says of itself."""

from __future__ import annotations

import asyncio

import pytest

from dimefm_demo.limits import BodyLimit


async def echo(scope, receive, send):
    body = b""
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise ConnectionError
        body += message["body"]
        if not message.get("more_body"):
            break
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": body})


def ask(chunks, headers=()):
    sent, queue = [], list(chunks)

    async def receive():
        data = queue.pop(0)
        return {"type": "http.request", "body": data, "more_body": bool(queue)}

    async def send(message):
        sent.append(message)

    scope = {"type": "http", "headers": list(headers)}
    asyncio.run(BodyLimit(echo, max_bytes=10)(scope, receive, send))
    return sent[0]["status"], sent[1]["body"]


def test_short_bodies_pass_and_long_ones_do_not():
    assert ask([b"12345", b"67890"]) == (200, b"1234567890")
    assert ask([b"x" * 11], [(b"content-length", b"11")]) == (413, b"too large")
    assert ask([b"x"], [(b"content-length", b"-1")]) == (413, b"too large")


def test_a_body_that_lied_is_cut_off():
    with pytest.raises(ConnectionError):
        ask([b"12345", b"67890", b"1"], [(b"content-length", b"5")])
