"""Take pictures of the page: an upgrade under way for the README, and each state to look at, in dist/screenshots.

Run by `make screenshots`.
"""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from browser import chromium
from keys import SshKeys
from playwright.sync_api import expect
from programs import Programs, write_program
from service import Service

if TYPE_CHECKING:
    from playwright.sync_api import Page

ROOT = Path(__file__).resolve().parent.parent
README = ROOT / "README.png"
TARGET = ROOT / "dist" / "screenshots"

MOST_BYTES = 60_000
WIDTHS = (360, 768, 1440)

FAILS = 'import sys\nif "-upgrade" in sys.argv: sys.exit("KeyError: \'DATABASE_URL\'")'


class Site:
    """A service that takes what alice has signed."""

    def __init__(self, directory: Path) -> None:
        (directory / "built").mkdir()
        self._programs = Programs(directory / "built")
        self._key = SshKeys(directory).key("alice")
        allowed = directory / "allowed_signers"
        allowed.write_text(self._key.line(), encoding="ascii")
        allowed.chmod(0o644)
        flags = ("-dev", "-allowed-signers", str(allowed), "-drain", "5s")
        self.service = Service(self._programs.version("1.3.0"), directory / "service", *flags)

    def add(self, version: str, fault: str = "") -> None:
        """Put a signed candidate into the upgrade directory."""
        name = f"self-update-{version}"
        program = self._programs.faulty(version, "bad", fault) if fault else self._programs.version(version)
        content = program.read_bytes()
        self.service.upgrade_dir.joinpath(f"{name}.sig").write_bytes(self._key.sign(content))
        write_program(self.service.upgrade_dir / name, content)


def take(page: Page, state: str) -> None:
    """Save what is shown, in each width, light and dark."""
    for scheme in ("light", "dark"):
        page.emulate_media(color_scheme="dark" if scheme == "dark" else "light", reduced_motion="reduce")
        for width in WIDTHS:
            page.set_viewport_size({"width": width, "height": 900})
            page.screenshot(path=TARGET / f"{state}-{scheme}-{width}.png", full_page=True)
    page.emulate_media(color_scheme="light")


def main() -> None:
    """Bring a service through its states, and save each."""
    TARGET.mkdir(parents=True, exist_ok=True)
    os.umask(0o022)
    with tempfile.TemporaryDirectory() as directory, chromium() as browser:
        site = Site(Path(directory))
        with site.service as service, browser.visit("about:blank") as page:
            address = f"http://localhost:{service.line()['message'].rpartition(':')[2]}/"
            page.goto(address)
            now, button = page.locator("#now"), page.locator("#upgrade")

            def offered(version: str) -> None:
                expect(button).to_have_text(f"Upgrade to {version}…", timeout=30_000)
                expect(button).to_be_enabled()

            expect(page.locator("#candidates")).to_contain_text("There is none.")
            take(page, "1-nothing-newer")
            site.add("1.4.0")
            offered("1.4.0")
            take(page, "2-offer")
            button.click()
            take(page, "3-question")
            page.locator("#confirm-yes").click()
            expect(now).to_have_text("1.4.0 serves.", timeout=30_000)
            take(page, "4-committed")
            site.add("1.5.0-rc.1", FAILS)
            offered("1.5.0-rc.1")
            button.click()
            page.locator("#confirm-yes").click()
            expect(now).to_contain_text("Failed at")
            take(page, "5-failed")
            site.add("1.5.0")
            offered("1.5.0")
            button.click()
            page.locator("#confirm-yes").click()
            expect(page.locator("#steps .now .name")).to_have_text("Watch")
            expect(page.locator("#steps .now .time")).to_contain_text("2.")
            page.set_viewport_size({"width": 760, "height": 640})
            page.evaluate("scrollTo(0, 0)")
            page.screenshot(path=README)
            take(page, "6-under-way")
    size = README.stat().st_size
    print(f"{README.relative_to(ROOT)}: {size} bytes; the states are in {TARGET.relative_to(ROOT)}")
    if size > MOST_BYTES:
        raise SystemExit(f"{README.name} has {size} bytes; at most {MOST_BYTES} are to be: show less of the page")


if __name__ == "__main__":
    main()
