"""Debian's Chromium, driven by Playwright, on the demo's page."""

from __future__ import annotations

import contextlib
import shutil
from pathlib import Path
from typing import Any

from playwright.sync_api import Error, Page, TimeoutError, expect

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
ARGUMENTS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking",
    "--disable-component-update", "--disable-sync", "--use-fake-device-for-media-stream",
    "--use-fake-ui-for-media-stream",
)  # fmt: skip
_PATIENCE_MS = 30_000


def launch(playwright: Any) -> Any:
    return playwright.chromium.launch(executable_path=CHROMIUM, args=list(ARGUMENTS))


class Demo:
    """One visitor's page, by what a person sees on it."""

    def __init__(self, page: Page, url: str, artefacts: Path) -> None:
        self.page = page
        self._artefacts = artefacts
        self.errors: list[str] = []
        self.strangers: list[str] = []
        page.set_default_timeout(_PATIENCE_MS)
        page.on("pageerror", lambda error: self.errors.append(str(error)))
        page.on("request", lambda request: self._note(request.url, url))
        page.goto(url)
        expect(page.locator("#classify")).to_be_visible(timeout=_PATIENCE_MS)
        expect(page.locator("#states")).to_contain_text("baked ready", timeout=_PATIENCE_MS)

    def _note(self, asked: str, url: str) -> None:
        if not asked.startswith((url, "data:", "blob:")):
            self.strangers.append(asked)

    def open_tab(self, name: str) -> None:
        self.page.get_by_role("tab", name=name, exact=True).click()

    def upload(self, where: str, *files: dict[str, Any] | Path) -> None:
        """Send files; each is a path, or a name, type and bytes."""
        field = self.page.locator(f"{where} input[type=file]").first
        field.set_input_files(list(files))

    def write(self, where: str, text: str) -> None:
        field = self.page.locator(f"{where} textarea, {where} input").first
        field.fill(text)
        field.blur()

    def text_of(self, where: str) -> str:
        return self.page.locator(f"{where} textarea, {where} input").first.input_value()

    def expect_top(self, label: str, *, model: int = 0) -> None:
        """Wait for a model's answer."""
        heading = self.page.locator(f"#bars-{model} h2")
        expect(heading).to_have_text(label, timeout=_PATIENCE_MS)

    def expect_message(self, text: str) -> None:
        """Wait for a message that a person can read, and close it."""
        toast = self.page.get_by_test_id("toast-text").filter(has_text=text).first
        expect(toast).to_be_visible(timeout=_PATIENCE_MS)
        for button in self.page.get_by_test_id("toast-close").all():
            with contextlib.suppress(TimeoutError):  # it went by itself
                button.click(timeout=1000)

    def width_overflow_px(self) -> int:
        """How much of the page lies right of the window."""
        overflow: int = self.page.evaluate(
            "document.documentElement.scrollWidth - window.innerWidth"
        )
        return overflow

    def keep(self, name: str) -> None:
        """A screenshot of the whole page, as a test artefact; none where Chromium, on a busy
        machine, cannot draw it."""
        with contextlib.suppress(Error):
            self.page.screenshot(path=self._artefacts / f"{name}.png", full_page=True)
