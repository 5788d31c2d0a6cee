"""A browser for the tests: Debian's Chromium, one for all of them, and a page that must leave a clean console."""

from __future__ import annotations

import contextlib
import importlib.resources
from typing import TYPE_CHECKING, Any

from playwright.sync_api import sync_playwright
from service import PATIENCE

if TYPE_CHECKING:
    from collections.abc import Iterator

    from playwright.sync_api import Browser as Chromium
    from playwright.sync_api import Page

EXECUTABLE = "/usr/bin/chromium"

_AXE = importlib.resources.files("axe_playwright_python").joinpath("axe.min.js").read_text(encoding="utf-8")


class Browser:
    """One browser, in which each visitor is a stranger to the others."""

    def __init__(self, chromium: Chromium) -> None:
        self._chromium = chromium

    @contextlib.contextmanager
    def visit(self, url: str, *, but: tuple[str, ...] = (), **context: Any) -> Iterator[Page]:
        """Open a page with storage of its own, and check at the end that its console had no complaint.

        `but` are words of complaints that belong to what is tested. `context` is as Browser.new_context takes it.
        """
        complaints: list[str] = []
        visitor = self._chromium.new_context(**context)
        visitor.set_default_timeout(PATIENCE * 1000)
        page = visitor.new_page()
        page.on("console", lambda line: complaints.append(line.text) if line.type in {"error", "warning"} else None)
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.goto(url)
        try:
            yield page
        finally:
            visitor.close()
        assert [text for text in complaints if not any(words in text for words in but)] == []


@contextlib.contextmanager
def chromium() -> Iterator[Browser]:
    """Start the browser, and end it."""
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=EXECUTABLE)
        try:
            yield Browser(browser)
        finally:
            browser.close()


def axe(page: Page, *rules: str) -> list[str]:
    """Return what axe-core finds wrong with a page as it is shown now, one line each; by these `rules`, or by all.

    Needs a visitor with `bypass_csp`: the page itself lets no script in but its own.
    """
    if not page.evaluate("Boolean(window.axe)"):
        page.add_script_tag(content=_AXE)
    options = {"resultTypes": ["violations"], **({"runOnly": rules} if rules else {})}
    found = page.evaluate("options => axe.run(options)", options)
    assert found["passes"], "it has looked at something"
    return [f"{wrong['id']}: {node['html']}" for wrong in found["violations"] for node in wrong["nodes"]]


def is_wider_than_the_window(page: Page) -> bool:
    """Tell whether a page must be scrolled sideways."""
    return bool(page.evaluate("document.documentElement.scrollWidth > innerWidth"))
