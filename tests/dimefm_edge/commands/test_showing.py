"""`dimefm-edge demo`: flags become the demo's settings."""

from __future__ import annotations

import json

import pytest

from dimefm_edge.cli import main, parse_options
from dimefm_edge.commands import showing
from dimefm_edge.options import DemoOptions


def test_every_flag_reaches_the_server(monkeypatch, capsys):
    seen = []
    monkeypatch.setattr("dimefm_demo.serve", seen.append)
    words = ["runs/first", "b.zip", "--engine", "onnxruntime", "tensorrt", "--search", "scenes:9",
             "--port", "80", "--host", "0.0.0.0", "--auth", "a:b", "--max-upload-mib", "7",
             "--concurrency", "3", "--max-queue", "5", "--threads", "1", "--share"]  # fmt: skip
    assert main(["demo", "--json", *words]) == 0
    assert json.loads(capsys.readouterr().out) == {"stopped": True}
    (config,) = seen
    assert (config.models, config.engine) == (("runs/first", "b.zip"), ("onnxruntime", "tensorrt"))
    assert (config.search, config.port, config.host) == (("scenes:9",), 80, "0.0.0.0")
    assert (config.auth, config.share, config.threads) == ("a:b", True, 1)
    assert (config.max_upload_mib, config.concurrency, config.max_queue) == (7, 3, 5)


def test_by_default_it_is_closed_to_others():
    options = parse_options("demo", [])
    assert isinstance(options, DemoOptions)
    assert (options.host, options.share, options.auth) == ("127.0.0.1", False, None)


def test_a_checkout_without_the_demo_says_so(monkeypatch, capsys):
    monkeypatch.setattr(showing, "find_spec", lambda name: None)
    assert main(["demo"]) == 1
    assert "the demo's folder is not on Python's path" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "code", "why"),
    [
        (["./nowhere"], 2, "there is nothing at ./nowhere\n  try: name a run, a bundle"),
        (["--auth", "ann"], 2, "--auth needs a name and a password"),
        (["--port", "99999"], 2, "port must be 1 to 65535, got 99999"),
    ],
)
def test_errors_are_one_line_and_a_mend(words, code, why, capsys):
    assert main(["demo", *words]) == code
    assert why in capsys.readouterr().err
