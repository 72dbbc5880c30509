"""The report in a real browser, off the network: every plot is seen, nothing is fetched."""

from __future__ import annotations

import shutil
from html.parser import HTMLParser

import pytest

from dimefm_edge.bench.html import report_html
from tests.dimefm_edge.bench.bench_case import full_result, stopped_result

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")


def test_what_users_name_cannot_become_markup():
    page = report_html(full_result())
    for text in ("<script", "student <b>", "<i>none", "n<1>"):
        assert text not in page
    assert "<b>student &lt;b&gt;</b>" in page
    assert "teacher &amp; co" in page


def test_tags_are_closed():
    class Checker(HTMLParser):
        open_tags: list[str]

        def handle_starttag(self, tag, attrs):
            if tag not in ("meta", "br"):
                self.open_tags.append(tag)

        def handle_endtag(self, tag):
            assert self.open_tags.pop() == tag

        def handle_startendtag(self, tag, attrs):
            pass

    for result in (full_result(), stopped_result()):
        checker = Checker()
        checker.open_tags = []
        checker.feed(report_html(result))
        assert checker.open_tags == []


def test_a_stopped_bench_says_so():
    page = report_html(stopped_result())
    assert "stopped halfway: these are partial results" in page
    assert "gone: failed, died &lt;by&gt; SIGSEGV" in page
    assert "Throttled: cpu0 (core)" in report_html(full_result())


@pytest.mark.skipif(CHROMIUM is None, reason="Debian's chromium is not installed")
@pytest.mark.parametrize(("width", "scheme"), [(1280, "light"), (390, "dark")])
def test_in_a_browser_without_network(width, scheme, tmp_path):
    from playwright.sync_api import sync_playwright

    path = tmp_path / "report.html"
    path.write_text(report_html(full_result()), encoding="utf-8")
    asked, errors = [], []
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
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
        page.screenshot(path=tmp_path / "report.png", full_page=True)
        browser.close()
    assert asked == [path.as_uri()]
    assert errors == []
