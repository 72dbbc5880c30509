"""The report in a real browser, off the network: every plot is seen, nothing is fetched."""

from __future__ import annotations

import shutil
from html.parser import HTMLParser

import pytest

from dimefm_edge.bench.html import report_html
from tests.dimefm_edge.bench.bench_case import full_result, stopped_result

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")


@pytest.fixture(scope="module")
def full_page():
    return report_html(full_result())


@pytest.fixture(scope="module")
def stopped_page():
    return report_html(stopped_result())


@pytest.fixture(scope="module")
def browser():
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        launched = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield launched
        launched.close()


def test_what_users_name_cannot_become_markup(full_page):
    for text in ("<script", "student <b>", "<i>none", "n<1>"):
        assert text not in full_page
    assert "<b>student &lt;b&gt;</b>" in full_page
    assert "teacher &amp; co" in full_page


def test_tags_are_closed(full_page, stopped_page):
    class Checker(HTMLParser):
        open_tags: list[str]

        def handle_starttag(self, tag, attrs):
            if tag not in ("meta", "br"):
                self.open_tags.append(tag)

        def handle_endtag(self, tag):
            assert self.open_tags.pop() == tag

        def handle_startendtag(self, tag, attrs):
            pass

    for page in (full_page, stopped_page):
        checker = Checker()
        checker.open_tags = []
        checker.feed(page)
        assert checker.open_tags == []


def test_a_stopped_bench_says_so(full_page, stopped_page):
    assert "stopped halfway: these are partial results" in stopped_page
    assert "gone: failed, died &lt;by&gt; SIGSEGV" in stopped_page
    assert "Throttled: cpu0 (core)" in full_page


@pytest.mark.skipif(CHROMIUM is None, reason="Debian's chromium is not installed")
@pytest.mark.parametrize(("width", "scheme"), [(1280, "light"), (390, "dark")])
def test_in_a_browser_without_network(width, scheme, browser, full_page, tmp_path):
    path = tmp_path / "report.html"
    path.write_text(full_page, encoding="utf-8")
    asked, errors = [], []
    context = browser.new_context(
        offline=True, viewport={"width": width, "height": 900}, color_scheme=scheme
    )
    page = context.new_page()
    page.on("request", lambda request: asked.append(request.url))
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.goto(path.as_uri())
    plots = page.locator("figure svg").all()
    assert len(plots) == 8
    for plot in plots:
        box = plot.bounding_box()
        assert box is not None
        assert box["width"] > 200
        assert box["height"] > 100
        assert plot.locator("path").count() > 5
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    assert page.get_by_role("heading", name="Which is faster").is_visible()
    context.close()
    assert asked == [path.as_uri()]
    assert errors == []
