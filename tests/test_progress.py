"""What -apply, -rollback and -status show on a terminal: the steps of an upgrade, as they are taken."""

from __future__ import annotations

import io
import os
import re
import socket
import subprocess
import threading
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any

import pytest
from programs import PATIENT, shell, write_program
from screen import Command, Screen
from service import PATIENCE

from selfupdate.lifecycle import Phase
from selfupdate.progress import STEPS, Progress, steps
from selfupdate.terminal import Terminal

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from programs import Programs
    from service import Service

BEGIN = datetime.fromisoformat("2026-07-14T09:30:00.000Z")
PATH = [*STEPS, Phase.RETIRED]
CTRL_C = b"\x03"
HOSTILE = r"printf '\033]0;owned\007\033[2J\302\233Jtwo\nlines\342\200\256\n' >&2; exit 3"


def _record(*phases: Phase, begin: datetime = BEGIN, apart: float = 0.5, **fields: Any) -> dict[str, Any]:
    """Return a record as the service tells it, whose `phases` began `apart` seconds one behind the other."""
    timeline = [
        {"phase": phase, "at": (begin + timedelta(seconds=apart * number)).isoformat()}
        for number, phase in enumerate(phases)
    ]
    known = {"kind": "upgrade", "from": "1.0.0", "to": "1.1.0", "name": "new", "log": None}
    return {**known, "timeline": timeline, "outcome": None, "reason": None, "ended_at": None, **fields}


@pytest.mark.parametrize(
    ("record", "after", "text"),
    [
        (_record(*PATH[:1]), 0.26, "choose 0.2s > copy > start > probe > hand over > watch"),
        (_record(*PATH[:3]), 1.0, "choose 0.5s > copy 0.5s > start 0.0s > probe > hand over > watch"),
        (
            _record(*PATH[:6], apart=12.5),
            1062.4,
            "choose 12s > copy 12s > start 12s > probe 12s > hand over 12s > watch 999s",
        ),
        (_record(*PATH[:3]), 4000, "choose 0.5s > copy 0.5s > start 66m > probe > hand over > watch"),
        (_record(*PATH[:2]), -9, "choose 0.5s > copy 0.0s > start > probe > hand over > watch"),
        (
            _record(*PATH, outcome="committed", ended_at="2026-07-14T09:30:03.000Z"),
            99,
            "choose 0.5s > copy 0.5s > start 0.5s > probe 0.5s > hand over 0.5s > watch 0.5s",
        ),
        (
            _record(*PATH[:3], Phase.ABORTING, reason="it failed"),
            1.75,
            "choose 0.5s > copy 0.5s > start failed 0.5s > probe > hand over > watch > undo 0.2s",
        ),
        (
            _record(*PATH[:6], Phase.ROLLING_BACK, Phase.RUNNING, outcome="rolled-back", reason="it failed"),
            99,
            "choose 0.5s > copy 0.5s > start 0.5s > probe 0.5s > hand over 0.5s > watch failed 0.5s",
        ),
        (
            _record(*PATH[:4], outcome="interrupted", reason="a crash", ended_at="2026-07-14T09:30:04.500Z"),
            99,
            "choose 0.5s > copy 0.5s > start 0.5s > probe interrupted 3.0s > hand over > watch",
        ),
    ],
)
def test_the_steps_and_their_times(record: dict[str, Any], after: float, text: str) -> None:
    """Each step that was reached has the time that it took; the last one counts on, or says how it ended."""
    assert " > ".join(map(str, steps(record, BEGIN + timedelta(seconds=after)))) == text


@pytest.mark.parametrize("columns", [80, 40, 20, 10])
@pytest.mark.parametrize("phases", [PATH[:6], [*PATH[:6], Phase.ROLLING_BACK]])
def test_the_line_leaves_the_last_column_free(
    monkeypatch: pytest.MonkeyPatch, columns: int, phases: list[Phase]
) -> None:
    """However long it takes: a line that reached the end would go on in the next, and not be written over."""
    monkeypatch.setattr(Terminal, "columns", columns)
    stream = io.StringIO()
    progress = Progress(Terminal(stream, has_reader=True, redraws=True, has_colours=True))
    begin = datetime.now(UTC) - timedelta(seconds=100 * len(phases) - 50)
    progress.show(_record(*phases, begin=begin, apart=100, to=None))
    screen = Screen(columns)
    screen.feed(stream.getvalue())
    assert len(screen.lines) == 1
    assert 0 < len(screen.text) < columns
    if columns == 80:
        all_steps = "choose 100s > copy 100s > start 100s > probe 100s > hand over 100s > watch [0-9]+s"
        assert re.fullmatch(f"{all_steps}|roll back [0-9]+s", screen.text)
    elif columns == 40:
        assert re.fullmatch("step 6 of 6: watch [0-9]+s|roll back [0-9]+s", screen.text)


def test_what_a_record_says_is_no_order_to_the_terminal() -> None:
    """Whoever answers: the service escapes what a candidate wrote, and it need not be the service that answers."""
    stream = io.StringIO()
    progress = Progress(Terminal(stream, has_reader=True, redraws=True, has_colours=False))
    hostile = "a\x1b[2J\x9bJ\rb\u202e"
    record = _record(*PATH[:3], Phase.ABORTING, kind=hostile, to=hostile, name=hostile, reason="it failed")
    progress.show(record)
    progress.end({**record, "outcome": "aborted", "log": f"{hostile}\n{hostile}"})
    screen = Screen(80)
    screen.feed(stream.getvalue().replace("\n", "\r\n"))  # as the terminal's driver does
    assert screen.text.count("a\\x1b[2J\\x9bJ\\rb\\u202e") == 5
    assert screen.lines[-3:] == ["  a\\x1b[2J\\x9bJ\\rb\\u202e"] * 2 + [""]


def test_the_screen_of_these_tests() -> None:
    """It writes over and erases as a terminal does, tells of a line that was too long, and knows no other codes."""
    screen = Screen(5)
    screen.feed("abcd\rx\x1b[K\x1b[1mye\x1b[0m\r\n")
    assert (screen.lines, screen.has_wrapped, screen.styles) == (["xye", ""], False, {"1", "0"})
    screen.feed("123456")
    assert (screen.lines, screen.has_wrapped) == (["xye", "12345", "6"], True)
    for piece in ("\x1b", "[", "3", "1m7"):  # as much of a code as has come is none yet
        screen.feed(piece)
    assert (screen.lines[-1], screen.styles, screen.begun) == ("67", {"1", "0", "31"}, "")
    for code in ("\x1b[2J", "\x1b]0;x\x07", "\x9bJ", "\a"):
        with pytest.raises(AssertionError):
            screen.feed(code)


# In a terminal.


@pytest.fixture
def run(tool: Callable[[str], str]) -> Iterator[Callable[..., Command]]:
    """Run a command of a service in a terminal of so many columns."""
    commands: list[Command] = []

    def run(service: Service, columns: int, *flags: str, **environ: str) -> Command:
        service.line(message="serving")
        command = [str(service.program), "-state-dir", str(service.state_dir), *flags]
        environ = {"TERM": "xterm", "NO_COLOR": "", **environ}
        commands.append(Command(tool("setsid"), command, columns, environ))
        return commands[-1]

    yield run
    for command in commands:
        with command:
            pass


def _all_steps(screen: Screen) -> list[str]:
    """Return the steps that stand on the screen in the end, which take as many lines as they need."""
    lines = [line.removesuffix(" >") for line in screen.lines if re.match(rf"({'|'.join(STEPS.values())})\b", line)]
    return [re.sub(" [0-9.]+[sm]$", "", step) for step in " > ".join(lines).split(" > ")]


@pytest.mark.slow
@pytest.mark.parametrize("columns", [80, 40])
def test_an_upgrade_and_the_way_back(
    start: Callable[..., Service], programs: Programs, run: Callable[..., Command], columns: int
) -> None:
    """The steps advance on one line, whose clock ticks; in the end all of them are there, and the outcome."""
    service = start("-probation", "2s", "-drain", "5s")
    (service.upgrade_dir / "new").symlink_to(programs.version("1.1.0"))
    for flag, head in (("-apply", "upgrade 1.0.0 -> 1.1.0"), ("-rollback", "rollback 1.1.0 -> 1.0.0")):
        command = run(service, columns, flag)
        assert command.end() == 0
        screen = command.screen
        assert not screen.has_wrapped
        assert len(screen.lines) == (4 if columns == 80 else 6), screen.text
        assert (screen.lines[0], screen.lines[-2]) == (head, f"committed: {head.partition(' ')[2]}")
        assert _all_steps(screen) == list(STEPS.values())
        ticks = {found[1] for line in screen.overwritten if (found := re.search("watch ([0-9.]+s)$", line))}
        assert len(ticks) > 3
        if columns == 40:
            assert [line for line in screen.overwritten if line.startswith("step 6 of 6: watch 0.")]
        assert screen.styles == {"0", "1", "2", "32"} if columns == 80 else {"0", "1", "32"}
        assert not [line for line in screen.overwritten if len(line) >= columns]

    command = run(service, columns, "-apply")
    assert command.end() == 0
    assert command.screen.lines == ["up to date: 1.0.0", ""]


@pytest.mark.slow
@pytest.mark.parametrize("columns", [80, 40])
def test_an_upgrade_that_fails(start: Callable[..., Service], run: Callable[..., Command], columns: int) -> None:
    """The step at which it did, what the candidate wrote at last, which is no order to the terminal, and the reason."""
    service = start()
    shell(service.upgrade_dir / "bad", "2.0.0", HOSTILE)
    command = run(service, columns, "-apply")
    assert command.end() == 1
    assert _all_steps(command.screen) == ["choose", "copy", "start failed", "probe", "hand over", "watch"]
    shown = "".join(command.screen.lines[-8:] if columns == 40 else command.screen.lines)
    assert "the end of what bad wrote:  \\x1b]0;owned\\x07\\x1b[2J\\x9bJtwo  lines\\u202e" in shown
    assert shown.endswith("aborted: 1.0.0 -> 2.0.0: bad ended with status 3 before it stood by")
    assert "31" in command.screen.styles


@pytest.mark.slow
def test_a_failure_that_can_be_mended(
    start: Callable[..., Service], programs: Programs, run: Callable[..., Command]
) -> None:
    """The remedy is said with the reason; nothing was written where nothing was started."""
    with socket.create_server(("localhost", 0)) as other:
        address = f"localhost:{other.getsockname()[1]}"
        service = start("-upgrade-bind", address)
        (service.upgrade_dir / "new").symlink_to(programs.version("1.1.0"))
        command = run(service, 300, "-apply")
        assert command.end() == 1
    *_, last, _end = command.screen.lines
    assert last.startswith(f"aborted: 1.0.0 -> 1.1.0: the temporary address {address} cannot be used: ")
    assert last.endswith("; to mend it: stop what listens there, or give another one with -upgrade-bind")
    assert "wrote" not in command.screen.text


@pytest.mark.slow
def test_ctrl_c_leaves_the_upgrade_alone(
    start: Callable[..., Service], programs: Programs, run: Callable[..., Command]
) -> None:
    """It ends the command with 130 and says so; the terminal is as it was, and the upgrade goes on."""
    service = start("-probation", "2m", "-drain", "5s")
    (service.upgrade_dir / "new").symlink_to(programs.version("1.1.0"))
    for flag in ("-apply", "-status"):
        command = run(service, 80, flag)
        command.until(lambda screen: re.search(" > watch [0-9]", screen.text))
        command.type(CTRL_C)
        assert command.end() == 130
        *above, last, _end = command.screen.lines
        assert re.search(" > watch [0-9.]+s", "".join(above))  # the terminal's own ^C stands somewhere behind it
        assert last == "it goes on without this command; -status shows how"
    assert service.get("/status")["upgrade"]["phase"] == "PROBATION"


@pytest.mark.slow
def test_the_status_follows_an_upgrade(
    start: Callable[..., Service], programs: Programs, run: Callable[..., Command]
) -> None:
    """On a terminal until it has ended; elsewhere the steps that it has reached are printed once."""
    service = start("-probation", "3s", "-drain", "5s")
    (service.upgrade_dir / "new").symlink_to(programs.version("1.1.0"))
    upgrade_id = service.ask("POST", "/upgrade").json["id"]
    service.line(upgrade=upgrade_id, phase="PROBATION")
    command = run(service, 80, "-status")
    command.until(lambda screen: re.search(" > watch [0-9]", screen.text))
    plain = [str(service.program), "-state-dir", str(service.state_dir), "-status"]
    ran = subprocess.run(plain, capture_output=True, text=True, timeout=PATIENCE, check=True)
    assert (service.get("/status")["phase"], ran.stderr) == ("TRIAL", "")
    head, *phases = ran.stdout.partition("upgrade under way: ")[2].splitlines()
    assert head == "1.0.0 -> 1.1.0"
    assert [line.split()[1] for line in phases] == list(STEPS)
    assert command.end() == 0
    screen = command.screen
    assert screen.lines[0].startswith("1.1.0 on localhost:")
    assert screen.lines[-4] == "upgrade 1.0.0 -> 1.1.0"
    assert _all_steps(screen) == list(STEPS.values())
    assert screen.lines[-2] == "committed: 1.0.0 -> 1.1.0"


@pytest.mark.slow
def test_the_status_follows_an_upgrade_that_turns_out_to_be_none(
    start: Callable[..., Service], programs: Programs, run: Callable[..., Command]
) -> None:
    """The candidate says at last that it is older: the service forgets the upgrade."""
    service = start(program=programs.faulty("1.0.0", "patient", PATIENT))
    gate = service.upgrade_dir.parent / "gate"
    os.mkfifo(gate)
    write_program(service.upgrade_dir / "slow", f"#!/bin/sh\nread line < {gate}\necho 0.5.0\n".encode())
    asking = threading.Thread(target=service.ask, args=("POST", "/upgrade"))
    asking.start()
    service.status_when(lambda status: status["phase"] == "CHOOSING")
    command = run(service, 80, "-status")
    command.until(lambda screen: screen.lines[-1].startswith("choose "))
    gate.write_text("\n", encoding="utf-8")
    asking.join(PATIENCE)
    assert command.end() == 0
    assert command.screen.lines[-2] == "nothing came of the upgrade: there was no candidate for it"
    assert "choose" not in command.screen.text


@pytest.mark.slow
@pytest.mark.parametrize(
    ("environ", "redraws"), [({"TERM": "dumb"}, False), ({"TERM": ""}, False), ({"NO_COLOR": "1"}, True)]
)
def test_what_the_terminal_cannot_or_should_not_do(
    start: Callable[..., Service],
    programs: Programs,
    run: Callable[..., Command],
    environ: dict[str, str],
    *,
    redraws: bool,
) -> None:
    """One that can't write a line over gets a line for each phase; without colours, the steps are the same."""
    service = start("-probation", "100ms", "-drain", "5s")
    (service.upgrade_dir / "new").symlink_to(programs.version("1.1.0"))
    command = run(service, 80, "-apply", **environ)
    assert command.end() == 0
    assert command.screen.styles == set()
    if redraws:
        assert _all_steps(command.screen) == list(STEPS.values())
    else:
        *phases, outcome, _end = command.screen.lines
        assert [line.split()[1] for line in phases] == PATH
        assert outcome == "committed: 1.0.0 -> 1.1.0"
        assert "".join(command.screen.overwritten) == "".join(command.screen.lines)
