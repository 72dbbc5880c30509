"""Is the demo's first page quick, its answer nearly the engine's, and does it hold under load?

Starts `dimefm-edge demo` as a user does, on the default models. Promises: the first page within
2 s of the server's start (Chromium, until the page can be used); an answer within 30 ms of the
engine's own time at p50 (one visitor over plain HTTP, upload and all); 200 requests from 16
clients of gradio_client, each with its own picture, of which none is lost or answered with
another's; and the server's memory less than 5% up after 2,000 more.

    python benchmarks/bench_demo.py --json | python benchmarks/record.py demo
"""

from __future__ import annotations

import argparse
import http.client
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import uuid
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import psutil

from dimefm_edge.data.scenes import scene_test_set
from dimefm_edge.latency.measure import machine_info

NUM_CLIENTS = 16
NUM_PICTURES = 64
ROOT = Path(__file__).parents[1]


@contextmanager
def demo(folder: Path, words: list[str]) -> Iterator[tuple[str, psutil.Process]]:
    """The command in a process of its own: its address, as soon as it says it."""
    log = folder / "stderr.txt"
    paths = os.pathsep.join(str(ROOT / name) for name in (".", "kernels", "demos"))
    environment = {**os.environ, "PYTHONPATH": paths}
    command = [sys.executable, "-m", "dimefm_edge", "demo", *words]
    with log.open("w") as stderr:
        process = subprocess.Popen(
            command, cwd=folder, stderr=stderr, stdout=subprocess.DEVNULL, env=environment
        )
    try:
        while "http://" not in (said := log.read_text()):
            if process.poll() is not None:
                raise SystemExit(said)
            time.sleep(0.01)
        yield "http://" + said.split("http://", 1)[1].split()[0], psutil.Process(process.pid)
    finally:
        process.terminate()
        process.wait(timeout=30)


def first_page_figures(folder: Path, words: list[str], rounds: int) -> dict[str, Any]:
    """From what the server says at its start to a page that can be used; a server each time."""
    chromium = shutil.which("chromium")
    if chromium is None:
        return {"first_page": "no Chromium here"}
    from playwright.sync_api import sync_playwright

    arguments = ["--headless", "--no-sandbox", "--disable-gpu"]
    seconds = []
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=arguments)
        for _ in range(rounds):
            page = browser.new_context().new_page()
            with demo(folder, words) as (url, _):
                begun = time.perf_counter()
                page.goto(url)
                page.locator("#classify").wait_for(state="visible")
                seconds.append(time.perf_counter() - begun)
        browser.close()
    return {"first_page_s": statistics.median(seconds), "first_page_max_s": max(seconds)}


class Visitor:
    """One who asks over plain HTTP, as a browser or curl does, on a connection that stays open."""

    def __init__(self, url: str, model: str) -> None:
        drawn = scene_test_set()
        self._rest = ["\n".join(drawn.classnames), "\n".join(drawn.templates), 1, False, model, 5]
        self._session = uuid.uuid4().hex  # without one, gradio makes a session for each request
        self._connection = http.client.HTTPConnection(url.split("//")[1].rstrip("/"))

    def ask(self, picture: bytes) -> dict[str, Any]:
        """Upload a picture and wait for its answer."""
        mark = uuid.uuid4().hex
        head = (
            f'--{mark}\r\nContent-Disposition: form-data; name="files"; filename="a.png"\r\n'
            "Content-Type: image/png\r\n\r\n"
        )
        body = head.encode() + picture + f"\r\n--{mark}--\r\n".encode()
        kind = f"multipart/form-data; boundary={mark}"
        (path,) = json.loads(self._send("upload", body, kind))
        file = {"path": path, "meta": {"_type": "gradio.FileData"}}
        asked = json.dumps({"data": [file, *self._rest], "session_hash": self._session}).encode()
        event = json.loads(self._send("call/classify", asked, "application/json"))["event_id"]
        said = self._send(f"call/classify/{event}").decode()
        _, completed, rest = said.partition("event: complete\ndata: ")  # heartbeats come before
        if not completed:
            raise RuntimeError(said)
        (answer,) = json.loads(rest.splitlines()[0])
        return dict(answer)

    def _send(self, place: str, body: bytes | None = None, kind: str = "") -> bytes:
        headers = {"Content-Type": kind} if body is not None else {}
        method = "POST" if body is not None else "GET"
        self._connection.request(method, f"/gradio_api/{place}", body, headers)
        return self._connection.getresponse().read()


class ClientVisitor:
    """One who asks through gradio_client, from Python."""

    def __init__(self, url: str, model: str) -> None:
        from gradio_client import Client

        # Each request makes a new TLS context, even for http: without certificates it is cheap.
        self._client = Client(url, verbose=False, ssl_verify=False)
        self._model = model

    def ask(self, path: Path) -> dict[str, Any]:
        from gradio_client import handle_file

        answer: dict[str, Any] = self._client.predict(
            picture=handle_file(str(path)), model=self._model, api_name="/classify"
        )
        return answer


@dataclass(frozen=True)
class Trip:
    """One request and its answer."""

    spent_ms: float
    engine_ms: float
    is_right: bool
    """Whether it is the answer to its own picture."""


def ask_many(
    visitors: list[Any], pictures: list[Any], known: list[dict[str, Any]], count: int
) -> list[Trip]:
    """`count` requests, each visitor one after the other; those that fail are missing."""
    trips: list[Trip] = []
    numbers, lock = iter(range(count)), threading.Lock()

    def visit(visitor: Any) -> None:
        while True:
            with lock:
                number = next(numbers, None)
            if number is None:
                return
            number %= len(pictures)
            begun = time.perf_counter()
            answer = visitor.ask(pictures[number])
            spent_ms = 1000 * (time.perf_counter() - begun)
            trips.append(Trip(spent_ms, answer["image_ms"], _same(answer, known[number])))

    with ThreadPoolExecutor(len(visitors)) as pool:
        list(pool.map(visit, visitors))
    return trips


def _same(answer: dict[str, Any], known: dict[str, Any]) -> bool:
    pairs = list(zip(answer["ranked"], known["ranked"], strict=True))
    return all(
        a["label"] == k["label"] and abs(a["probability"] - k["probability"]) < 1e-5
        for a, k in pairs
    )


def figures(
    folder: Path, url: str, server: psutil.Process, *, model: str, count: int, more: int
) -> dict[str, Any]:
    """One visitor, then many, then many more while the server's memory is watched."""
    drawn = scene_test_set()
    paths = [folder / f"{number}.png" for number in range(NUM_PICTURES)]
    for number, path in enumerate(paths):
        drawn.image(number).save(path)
    pictures = [path.read_bytes() for path in paths]
    visitor = Visitor(url, model)
    known = [visitor.ask(picture) for picture in pictures]
    alone = ask_many([visitor], pictures, known, count)
    clients = [ClientVisitor(url, model) for _ in range(NUM_CLIENTS)]
    begun = time.perf_counter()
    crowd = ask_many(clients, paths, known, count)
    seconds = time.perf_counter() - begun
    before_mib = server.memory_info().rss / 2**20
    fresh = [Visitor(url, model) for _ in range(NUM_CLIENTS)]  # servers close idle connections
    later = ask_many(fresh, pictures, known, more)
    after_mib = server.memory_info().rss / 2**20
    return {
        "alone_p50_ms": statistics.median(trip.spent_ms for trip in alone),
        "alone_engine_p50_ms": statistics.median(trip.engine_ms for trip in alone),
        "overhead_p50_ms": statistics.median(t.spent_ms - t.engine_ms for t in alone),
        "clients": NUM_CLIENTS,
        "requests": count,
        "lost": count - len(crowd),
        "mixed_up": sum(not trip.is_right for trip in crowd),
        "requests_per_s": count / seconds,
        "p50_ms": float(np.percentile([trip.spent_ms for trip in crowd], 50)),
        "p95_ms": float(np.percentile([trip.spent_ms for trip in crowd], 95)),
        "more_requests": more,
        "more_lost": more - len(later),
        "more_mixed_up": sum(not trip.is_right for trip in later),
        "more_p95_ms": float(np.percentile([trip.spent_ms for trip in later], 95)),
        "rss_before_mib": before_mib,
        "rss_after_mib": after_mib,
        "rss_growth_pct": 100 * (after_mib / before_mib - 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="*", default=[], help="as `dimefm-edge demo` takes them")
    parser.add_argument("--model", default="sample fp32", help="which of them is asked")
    parser.add_argument("--rounds", type=int, default=5, help="first pages")
    parser.add_argument("--requests", type=int, default=200)
    parser.add_argument("--more", type=int, default=2000)
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    models = [str(Path(m).resolve()) if Path(m).exists() else m for m in args.models]
    report: dict[str, Any] = {"load_average": os.getloadavg()[0]}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        report |= first_page_figures(folder, models, args.rounds)
        with demo(folder, models) as (url, server):
            report |= figures(
                folder, url, server, model=args.model, count=args.requests, more=args.more
            )
    report["machine"] = machine_info()
    if args.json:
        print(json.dumps(report))
    else:
        for key, value in report.items():
            print(f"{key:34} {value}")


if __name__ == "__main__":
    main()
