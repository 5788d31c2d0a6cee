"""The page, in a real browser, on a real service."""

from __future__ import annotations

import os
import re
from typing import TYPE_CHECKING

import pytest
from browser import EXECUTABLE, Browser, axe, chromium, is_wider_than_the_window
from playwright.sync_api import expect
from programs import PATIENT, fake, shell, write_program
from service import PATIENCE
from test_failures import ANSWERS_500

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from playwright.sync_api import Locator, Page
    from programs import Programs
    from service import Service

pytestmark = pytest.mark.slow

QUICK = ("-probation", "300ms", "-drain", "5s")
STEPS = ["Choose", "Copy", "Start", "Test", "Hand over", "Watch"]
WIDTHS = (360, 768, 1440)

HOLDS = """
import sys
if "-upgrade" in sys.argv:
    print("is held", file=sys.stderr, flush=True)
    open({!r}).read()
"""
"""A fault that holds a successor before it stands by until somebody has opened a pipe, and closed it."""

expect.set_options(timeout=PATIENCE * 1000)


@pytest.fixture(scope="module")
def browser(tool: Callable[[str], str]) -> Iterator[Browser]:
    """Start a browser for all these tests."""
    tool(EXECUTABLE)
    with chromium() as browser:
        yield browser


def url(service: Service) -> str:
    return f"http://localhost:{service.address[1]}/"


def add(service: Service, program: Path, name: str | None = None) -> None:
    """Put a candidate into the upgrade directory."""
    (service.upgrade_dir / (name or program.name)).symlink_to(program)


def agree(page: Page, way: str) -> None:
    """Check what the page asks for, and agree."""
    expect(page.locator("#confirm-way")).to_have_text(way)
    page.locator("#confirm-yes").click()


def states(page: Page) -> list[str]:
    """Return what becomes of the steps that are shown."""
    return [item.get_attribute("class") or "" for item in page.locator("#steps li").all()]


def last_entry(page: Page) -> Locator:
    return page.locator("#history > li").first


def look(page: Page, state: str) -> None:
    """Check that everybody can read the page as it is now: axe-core, light and dark, and each width."""
    assert axe(page) == [], state
    page.emulate_media(color_scheme="dark")
    assert axe(page, "color-contrast") == [], f"{state}, dark"
    page.emulate_media(color_scheme="light")
    for width in WIDTHS:
        page.set_viewport_size({"width": width, "height": 800})
        assert not is_wider_than_the_window(page), (state, width)


def test_an_upgrade_from_click_to_new_version(
    start: Callable[..., Service], programs: Programs, browser: Browser
) -> None:
    """It is seen from its first step to the new version, in one page, which says each step once."""
    service = start("-probation", "3s", "-drain", "5s")
    add(service, programs.version("1.1.0"))
    with browser.visit(url(service)) as page:
        expect(page.locator("#version")).to_have_text("1.0.0")
        expect(page).to_have_title("1.0.0 · self-update")
        page.evaluate("""() => {
            window.mark = "the same page";
            window.said = [];
            const now = document.getElementById("now");
            new MutationObserver(() => window.said.push(now.textContent)).observe(now, { childList: true });
        }""")
        page.get_by_role("button", name="Upgrade to 1.1.0…").click()
        expect(page.locator("#confirm-way")).to_have_text("1.0.0 → 1.1.0")
        expect(page.locator("#confirm-text")).to_contain_text(
            "self-update-1.1.0, signed by nobody, is started beside 1.0.0"
        )
        page.locator("#confirm-yes").dblclick()
        expect(page.locator("#progress-title")).to_have_text("Upgrade 1.0.0 → 1.1.0")
        expect(page.locator("#upgrade")).to_be_disabled()
        expect(page.locator("#steps .now .name")).to_have_text("Watch")
        expect(page.locator("#steps .now .time")).to_have_text(re.compile(r"\d\.[1-9] s"))  # it goes on
        expect(page.locator("#log")).to_contain_text("took over")
        expect(page.locator("#now")).to_have_text("1.1.0 serves.")
        expect(page.locator("#version")).to_have_text("1.1.0")
        expect(page).to_have_title("1.1.0 · self-update")
        assert page.locator("#steps .name").all_text_contents() == STEPS
        assert states(page) == ["done"] * 6
        expect(last_entry(page)).to_contain_text("Upgrade 1.0.0 → 1.1.0 committed")
        expect(last_entry(page).get_by_role("img")).to_have_attribute(
            "aria-label", re.compile(r"^Timeline: Choose \d+ ms, Copy .*, Watch [3-9]\.\d s$")
        )
        expect(page.locator("#facts")).to_contain_text("Generation1")
        expect(page.locator("#offer")).to_contain_text("Nothing is newer than 1.1.0.")
        assert page.evaluate("window.mark") == "the same page"
        said = page.evaluate("window.said")
        assert len(said) == len(set(said)), "each step is announced once"
        assert said[-2:] == ["1.1.0 serves, on trial. 1.0.0 stays warm, to take over again.", "1.1.0 serves."]
    assert len(service.get("/upgrades")["upgrades"]) == 1


def test_a_rollback(start: Callable[..., Service], programs: Programs, browser: Browser) -> None:
    """The version before the last is offered, and comes back."""
    service = start(*QUICK)
    add(service, programs.version("1.1.0"))
    with browser.visit(url(service), bypass_csp=True) as page:
        expect(page.locator("#upgrade")).to_be_enabled()
        expect(page.locator("#rollback")).to_be_hidden()
        assert service.upgrade()["outcome"] == "committed"
        page.get_by_role("button", name="Roll back to 1.0.0…").click()
        agree(page, "1.1.0 → 1.0.0")
        expect(page.locator("#now")).to_have_text("1.0.0 serves.")
        expect(page.locator("#version")).to_have_text("1.0.0")
        expect(last_entry(page)).to_contain_text("Rollback 1.1.0 → 1.0.0 committed")
        candidate = page.locator("#candidates li")
        expect(candidate).to_contain_text("Not chosen: was rolled back from at")
        look(page, "rolled back")
        candidate.get_by_role("button", name="Try 1.1.0 again…").click()
        agree(page, "1.0.0 → 1.1.0")
        expect(page.locator("#version")).to_have_text("1.1.0")
        expect(page.locator("#history > li")).to_have_count(3)


@pytest.mark.parametrize(
    ("fault", "step", "outcome", "reason", "says"),
    [
        (
            'import sys\nif "-upgrade" in sys.argv: sys.exit("no DATABASE_URL")',
            "Start",
            "aborted",
            "bad ended with status 1 before it stood by.",
            "no DATABASE_URL",
        ),
        (ANSWERS_500, "Watch", "rolled back", "bad is not healthy: it answered 500 on trial.", "took over"),
    ],
    ids=["at-start", "on-trial"],
)
def test_an_upgrade_that_fails(  # noqa: PLR0913, PLR0917 - each is one thing that the page must say
    start: Callable[..., Service],
    programs: Programs,
    browser: Browser,
    fault: str,
    step: str,
    outcome: str,
    reason: str,
    says: str,
) -> None:
    """The step at which it failed, the reason, and the end of the log are there, and the old version is."""
    service = start("-probation", "5s", "-drain", "5s")
    add(service, programs.faulty("2.0.0", "bad", fault), "bad")
    with browser.visit(url(service)) as page:
        page.get_by_role("button", name="Upgrade to 2.0.0…").click()
        agree(page, "1.0.0 → 2.0.0")
        expect(page.locator("#now")).to_have_text(f"Failed at “{step}”. 1.0.0 serves on.")
        expect(page.locator("#steps .failed .name")).to_have_text(step)
        expect(page.locator("#failure")).to_have_text(reason)
        expect(page.locator("#log")).to_contain_text(says)
        expect(page.locator("#version")).to_have_text("1.0.0")
        expect(last_entry(page)).to_contain_text(outcome)
        expect(page.locator("#candidates li")).to_contain_text("failed before")
        expect(page.locator("#upgrade")).to_be_disabled()


def test_two_browsers_at_once(
    start: Callable[..., Service], programs: Programs, tmp_path: Path, browser: Browser
) -> None:
    """What one asks for, both see; and one of two who ask at once is shown what the other began."""
    service = start(*QUICK)
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    add(service, programs.faulty("1.1.0", "held", HOLDS.format(str(pipe))))
    conflict = ("status of 409",)
    with browser.visit(url(service), but=conflict) as one, browser.visit(url(service), but=conflict) as other:
        for page in (one, other):
            page.locator("#upgrade").click()
            expect(page.locator("#confirm-way")).to_have_text("1.0.0 → 1.1.0")
        for page in (one, other):
            with page.expect_response("**/upgrade"):
                page.locator("#confirm-yes").click()
        pipe.write_text("", encoding="ascii")
        for page in (one, other):
            expect(page.locator("#now")).to_have_text("1.1.0 serves.")
            expect(page.locator("#version")).to_have_text("1.1.0")
            expect(page.locator("#history > li")).to_have_count(1)
            expect(page.locator("#message")).to_be_hidden()


def test_a_page_left_open_over_three_upgrades(
    start: Callable[..., Service], programs: Programs, browser: Browser
) -> None:
    """It shows each, asks nothing of the one who looks, and what was unfolded stays so."""
    service = start(*QUICK)
    with browser.visit(url(service)) as page:
        expect(page.locator("#offer")).to_contain_text("Nothing is newer")
        for number in (1, 2, 3):
            version = f"1.0.{number}"
            add(service, programs.version(version))
            assert service.upgrade()["outcome"] == "committed"
            expect(page.locator("#now")).to_have_text(f"{version} serves.")
            expect(page.locator("#version")).to_have_text(version)
            expect(page.locator("#history > li")).to_have_count(number)
            if number == 1:
                last_entry(page).locator("summary").click()
        opened = page.locator("#history details[open]")
        expect(opened).to_have_count(1)
        expect(opened).to_contain_text("RETIRED")
        expect(page.locator("#facts")).to_contain_text("Generation3")


def test_a_hostile_candidate(start: Callable[..., Service], browser: Browser) -> None:
    """Names, versions and words are shown as text, keep their direction to themselves, and widen nothing."""
    service = start(*QUICK)
    evil = "<script>document.title=0</script><img src=x onerror=document.title=0>"
    words = f"{evil}\\033[31m\\342\\200\\256desrever \\327\\251\\327\\234\\327\\225\\327\\235 {'x' * 500}"
    says = f"#!/bin/sh\nprintf '{words}\\n' | sed s/x$/y/ >&2\n".encode()
    write_program(service.upgrade_dir / "\u202egpj<img src=x onerror=alert(1)>", says)
    write_program(service.upgrade_dir / "שלום", says)
    write_program(service.upgrade_dir / "speaks", says + b"exit 1\n")
    write_program(service.upgrade_dir / "lies", b"#!/bin/sh\nprintf '1.2.3<script>\\033[31m\\n'\n")
    shell(service.upgrade_dir / "bad", "2.0.0-" + "x" * 100, says.decode().partition("\n")[2] + "exit 3")
    # Without the policy, what got through as markup would act.
    with browser.visit(url(service), viewport={"width": 360, "height": 740}, bypass_csp=True) as page:
        expect(page.locator("#candidates > li")).to_have_count(5)
        expect(page.locator("#candidates")).to_contain_text("\\u202egpj<img src=x onerror=alert(1)>")
        expect(page.locator("#candidates")).to_contain_text(f"-version ended with status 1: {evil}\\x1b[31m")
        expect(page.locator("#candidates")).to_contain_text("1.2.3<script>\\x1b[31m")
        page.locator("#upgrade").click()
        page.locator("#confirm-yes").click()
        expect(page.locator("#log")).to_contain_text(f"{evil}\\x1b[31m\\u202edesrever שלום")
        expect(page.locator("#failure")).to_contain_text("bad ended with status 3")
        expect(page.locator("#candidates")).to_contain_text("failed before")  # they have been listed anew
        last_entry(page).locator("summary").click()
        kept = [
            text.evaluate("element => getComputedStyle(element).unicodeBidi")
            for text in page.locator("#candidates .name > *, #candidates .reason > *, #failure .reason > *, #log").all()
        ]
        assert sorted(kept) == ["isolate"] * 11 + ["plaintext"], "each says its own direction"
        assert page.locator("main img, main script").count() == 1, "the page's own icon alone"
        assert page.title().endswith("self-update")
        look(page, "hostile")


def test_it_is_used_by_keyboard_alone(start: Callable[..., Service], programs: Programs, browser: Browser) -> None:
    """Each control is reached with Tab, where the focus is can be seen, and it is never lost."""
    service = start(*QUICK)
    for version in ("1.1.0", "1.2.0"):
        add(service, programs.version(version))

    def focused() -> str:
        return str(page.evaluate("document.activeElement.id || document.activeElement.textContent"))

    with browser.visit(url(service)) as page:
        expect(page.locator("#upgrade")).to_be_enabled()
        reached = []
        for _ in range(4):
            page.keyboard.press("Tab")
            reached.append(focused())
            assert page.evaluate("getComputedStyle(document.activeElement).outlineStyle") == "solid"
        copies = ["Copy digest of self-update-1.2.0", "Copy digest of self-update-1.1.0", "Upgrade to 1.1.0…"]
        assert reached == ["upgrade", *copies]
        while focused() != "upgrade":
            page.keyboard.press("Shift+Tab")
        page.keyboard.press("Enter")
        expect(page.locator("#confirm")).to_be_visible()
        page.keyboard.press("Escape")
        expect(page.locator("#confirm")).to_be_hidden()
        assert focused() == "upgrade"
        while focused() != "Upgrade to 1.1.0…":
            page.keyboard.press("Tab")
        page.keyboard.press("Space")
        expect(page.locator("#confirm-way")).to_have_text("1.0.0 → 1.1.0")
        while focused() != "confirm-yes":
            page.keyboard.press("Tab")
        page.keyboard.press("Enter")
        expect(page.locator("#progress-title")).to_be_focused()
        expect(page.locator("#now")).to_have_text("1.1.0 serves.")
        expect(page.locator("#progress-title")).to_be_focused()


def test_the_token_is_asked_for(
    start: Callable[..., Service], programs: Programs, browser: Browser, tmp_path: Path
) -> None:
    """Once for the tab; a wrong one is said to be wrong; and it is sent with orders alone."""
    path = tmp_path / "token"
    path.write_text("the-right-token-it-is\n", encoding="ascii")
    path.chmod(0o600)
    service = start(*QUICK, "-token-file", str(path))
    add(service, programs.version("1.1.0"))
    with browser.visit(url(service), but=("status of 401",), bypass_csp=True) as page:
        bearers = []
        page.on("request", lambda request: bearers.append((request.method, request.headers.get("authorization"))))
        page.locator("#upgrade").click()
        agree(page, "1.0.0 → 1.1.0")
        expect(page.locator("#token")).to_be_focused()
        page.keyboard.type("a-wrong-token-of-its-own")
        page.keyboard.press("Enter")
        expect(page.locator("#message")).to_have_text("That is not the service's token.")
        look(page, "the token")
        page.keyboard.type("the-right-token-it-is")
        page.keyboard.press("Enter")
        expect(page.locator("#version")).to_have_text("1.1.0")
        expect(page.locator("#token-form")).to_be_hidden()
        page.get_by_role("button", name="Roll back to 1.0.0…").click()
        agree(page, "1.1.0 → 1.0.0")
        expect(page.locator("#now")).to_have_text("1.0.0 serves.")
        right = "Bearer the-right-token-it-is"
        posted = [bearer for method, bearer in bearers if method == "POST"]
        assert posted == [None, "Bearer a-wrong-token-of-its-own", right, right]
        assert {bearer for method, bearer in bearers if method == "GET"} == {None}
        assert page.evaluate("Object.keys(localStorage).length + document.cookie.length") == 0


def test_nothing_waits_for_the_candidates(
    start: Callable[..., Service], programs: Programs, tmp_path: Path, browser: Browser
) -> None:
    """While one takes its time to tell its version, the page shows all else."""
    service = start(program=programs.faulty("1.0.0", "patient", PATIENT))
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    write_program(service.upgrade_dir / "slow", f"#!/bin/sh\ncat {pipe}\n".encode())
    with browser.visit(url(service)) as page:
        expect(page.locator("#version")).to_have_text("1.0.0")
        expect(page.locator("#history")).to_contain_text("No upgrade so far.")
        expect(page.locator("#offer")).to_have_text("Looking for candidates…")
        pipe.write_text("2.0.0\n", encoding="ascii")
        expect(page.locator("#upgrade")).to_have_text("Upgrade to 2.0.0…")


def test_upgrades_are_off(start: Callable[..., Service], browser: Browser, tmp_path: Path) -> None:
    """The page says so, why, and what turns them on; and asks for no candidates."""
    service = start("-allowed-signers", str(tmp_path / "nothing"))
    with browser.visit(url(service), bypass_csp=True) as page:
        expect(page.locator("#banners li")).to_contain_text("Warning: Upgrades are off:")
        expect(page.locator("#banners li")).to_contain_text("To mend it:")
        expect(page.locator("#upgrade")).to_be_disabled()
        expect(page.locator("#candidates")).to_have_text("None is looked at while upgrades are off.")
        look(page, "off")


def test_where_there_are_no_events(start: Callable[..., Service], programs: Programs, browser: Browser) -> None:
    """The page asks instead, and shows the same."""
    service = start(*QUICK)
    add(service, programs.version("1.1.0"))
    with browser.visit("about:blank", but=("status of 503",)) as page:
        page.route("**/events", lambda route: route.fulfill(status=503, body="{}"))
        page.goto(url(service))
        expect(page.locator("#link")).to_have_text("Asking now and then")
        page.locator("#upgrade").click()
        agree(page, "1.0.0 → 1.1.0")
        expect(page.locator("#now")).to_have_text("1.1.0 serves.")
        expect(page.locator("#version")).to_have_text("1.1.0")
        expect(last_entry(page)).to_contain_text("committed")


def test_a_history_that_could_not_be_read_at_once(start: Callable[..., Service], browser: Browser) -> None:
    """It is asked for again; without it there is nothing that the page could show."""
    service = start(*QUICK)
    with browser.visit("about:blank", but=("ERR_FAILED",)) as page:
        page.route("**/upgrades?*", lambda route: route.abort(), times=1)
        page.goto(url(service))
        expect(page.locator("#version")).to_have_text("1.0.0")
        expect(page.locator("#history")).to_have_text("No upgrade so far.")
        expect(page.locator("#link")).to_have_text("Live")


def test_a_program_that_does_not_know_the_page_takes_over(start: Callable[..., Service], browser: Browser) -> None:
    """The page says so, and which version that is, and offers nothing."""
    service = start(*QUICK)
    fake(service.upgrade_dir / "plain", "plain", "2.0.0")
    lost = ("MIME type", "Failed to load resource: net::", "status of 404")
    with browser.visit(url(service), but=lost) as page:
        page.locator("#upgrade").click()
        agree(page, "1.0.0 → 2.0.0")
        expect(page.locator("#version")).to_have_text("2.0.0")
        expect(page.locator("#banners")).to_contain_text("Another program serves now")
        expect(page.locator("#could-run")).to_be_hidden()


def test_a_service_that_stops_and_starts_again(start: Callable[..., Service], browser: Browser) -> None:
    """The page says that nobody answers, and goes on when somebody does."""
    service = start("-bind", "localhost:0", *QUICK)
    port = service.address[1]
    with browser.visit(url(service), but=("net::ERR_CONNECTION_REFUSED",)) as page:
        expect(page.locator("#link")).to_have_text("Live")
        service.stop()
        expect(page.locator("#link")).to_contain_text("No answer")
        service.restart("-insecure-allow-unsigned", "-bind", f"localhost:{port}")
        expect(page.locator("#link")).to_have_text("Live")
        expect(page.locator("#facts")).to_contain_text(f"Process{service.process.pid}")


def test_nobody_looks_at_it(start: Callable[..., Service], programs: Programs, browser: Browser) -> None:
    """A hidden page leaves the service alone, and shows what happened when somebody looks at it again."""
    service = start(*QUICK)
    add(service, programs.version("1.1.0"))
    hide = "isHidden => { Object.defineProperty(document, 'hidden', { value: isHidden, configurable: true }); "
    hide += "document.dispatchEvent(new Event('visibilitychange')) }"
    with browser.visit(url(service)) as page:
        expect(page.locator("#upgrade")).to_be_enabled()
        page.evaluate(hide, True)
        asked = []
        page.on("request", lambda request: asked.append(request.url))
        assert service.upgrade()["outcome"] == "committed"
        expect(page.locator("#version")).to_have_text("1.0.0")
        assert asked == []
        page.evaluate(hide, False)
        expect(page.locator("#version")).to_have_text("1.1.0")
        expect(page.locator("#link")).to_have_text("Live")
        expect(last_entry(page)).to_contain_text("committed")


def test_a_long_history(start: Callable[..., Service], browser: Browser) -> None:
    """The newest are shown at once, and all when they are asked for."""
    service = start()
    shell(service.upgrade_dir / "bad", "2.0.0", "exit 3")
    upgrade_id = service.upgrade()["id"]
    service.stop()
    journal = service.state_dir / "journal"
    lines = journal.read_text(encoding="utf-8")
    journal.write_text("".join(lines.replace(upgrade_id, f"{number:03}") for number in range(70)), encoding="utf-8")
    service.restart()
    with browser.visit(url(service)) as page:
        expect(page.locator("#history > li")).to_have_count(50)
        page.get_by_role("button", name="Show older ones").click()
        expect(page.locator("#history > li")).to_have_count(70)
        expect(page.locator("#older")).to_be_hidden()
        last_entry(page).locator("summary").click()
        expect(last_entry(page)).to_contain_text("Id069")


def test_the_digest_can_be_copied(start: Callable[..., Service], programs: Programs, browser: Browser) -> None:
    """The whole of it, and the button says so; where the page may not use the clipboard, too."""
    service = start()
    add(service, programs.version("1.1.0"))
    (candidate,) = service.get("/candidates")["candidates"]
    with browser.visit(url(service), permissions=["clipboard-read", "clipboard-write"]) as page:
        button = page.get_by_role("button", name="Copy digest")
        for may_write in (True, False):
            expect(button).to_be_visible()
            page.evaluate("() => navigator.clipboard.writeText('something else')")
            if not may_write:
                page.evaluate("() => { navigator.clipboard.writeText = () => Promise.reject(new Error('not here')) }")
            button.click()
            expect(page.locator("#candidates .link-button")).to_contain_text("Copied")
            assert page.evaluate("() => navigator.clipboard.readText()") == candidate["sha256"]


def test_without_javascript(start: Callable[..., Service], browser: Browser) -> None:
    """The state is there, and the commands that act."""
    service = start(*QUICK)
    shell(service.upgrade_dir / "bad", "3.0.0", "exit 3")
    assert service.upgrade()["outcome"] == "aborted"
    with browser.visit(url(service), java_script_enabled=False) as page:
        expect(page.locator("noscript h1")).to_have_text("Running 1.0.0")
        expect(page.locator(".plain")).to_contain_text("Signatures are not checked")
        expect(page.locator(".plain")).to_contain_text(
            f"curl -X POST 'http://localhost:{service.address[1]}/upgrade?wait=30s'"
        )
        expect(page.locator(".plain")).to_contain_text(
            "upgrade 1.0.0 → 3.0.0abortedbad ended with status 3 before it stood by"
        )
        expect(page.locator("#page")).to_be_hidden()
        page.set_viewport_size({"width": 360, "height": 740})
        assert not is_wider_than_the_window(page)


def test_everybody_can_read_it(
    start: Callable[..., Service], programs: Programs, browser: Browser, tmp_path: Path
) -> None:
    """axe-core finds nothing, in light and dark, in each state; and nothing is wider than any window."""
    service = start("-probation", "3s", "-drain", "5s")
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)

    with browser.visit(url(service), bypass_csp=True) as page:
        expect(page.locator("#candidates")).to_contain_text("There is none.")
        look(page, "nothing there")
        shell(service.upgrade_dir / "bad", "2.0.0", "echo words >&2; exit 3")
        add(service, programs.faulty("1.1.0", "held", HOLDS.format(str(pipe))), "held")
        expect(page.locator("#candidates > li")).to_have_count(2)
        look(page, "an offer")
        page.locator("#upgrade").click()
        look(page, "the question")
        agree(page, "1.0.0 → 2.0.0")
        expect(page.locator("#now")).to_contain_text("Failed at")
        look(page, "failed")
        page.locator("#history summary").click()
        look(page, "details")
        page.locator("#upgrade").click()
        agree(page, "1.0.0 → 1.1.0")
        expect(page.locator("#log")).to_contain_text("is held")
        look(page, "under way")
        pipe.write_text("", encoding="ascii")
        expect(page.locator("#steps .now .name")).to_have_text("Watch")
        look(page, "on trial")
        expect(page.locator("#now")).to_have_text("1.1.0 serves.")
        look(page, "committed")
