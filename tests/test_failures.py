"""Each kind of bad candidate: the old version serves on, says why, and no request is lost."""

from __future__ import annotations

import contextlib
import socket
from typing import TYPE_CHECKING, Any

import pytest
from load import Load
from programs import BLIND, Programs, fake, shell, write_program
from service import Service

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

pytestmark = pytest.mark.slow

STANDBY = 5.0
"""Seconds that the service under test gives a successor to stand by."""


class Site:
    """A service under load, for candidate after candidate."""

    def __init__(self, service: Service, load: Load, programs: Programs) -> None:
        self.service = service
        self.load = load
        self.programs = programs
        self.pid: int = service.get("/status")["pid"]

    def candidate(self, name: str) -> Path:
        return self.service.upgrade_dir / name

    def fail(self, name: str) -> Any:
        """Upgrade to the candidate `name`; return the record when the old version serves again, and is alone."""
        record = self.service.upgrade(name)
        status = self.service.get("/status")
        assert (status["version"], status["pid"], status["phase"]) == ("1.0.0", self.pid, "RUNNING")
        assert status["upgrade"] is None
        self.service.wait_until_alone(self.pid)
        return record


@pytest.fixture(scope="module")
def site(programs: Programs, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    """One service for all kinds: none may leave a trace in it."""
    directory = tmp_path_factory.mktemp("site")
    flags = ("-standby", f"{STANDBY:g}s", "-probation", "1s", "-drain", "10s")
    with Service(programs.faulty("1.0.0", "blind", BLIND), directory, *flags) as service, Load(service.address) as load:
        yield Site(service, load, programs)


@pytest.fixture(autouse=True)
def no_request_is_lost(request: pytest.FixtureRequest) -> Iterator[None]:
    """Hold the load against each kind."""
    if "site" not in request.fixturenames:
        yield
        return
    site: Site = request.getfixturevalue("site")
    site.load.take()
    yield
    figures = site.load.take()
    assert figures.answered > 0
    assert not figures.failed
    assert figures.ended_between_answers == 0


@pytest.mark.parametrize(
    ("then", "reason"),
    [
        ("exit 3", "ended with status 3 before it stood by"),
        ("kill -SEGV $$", "was killed by SIGSEGV before it stood by"),
        ("exec sleep 600", f"did not stand by within {STANDBY:g} s"),
        ("trap '' TERM; while :; do sleep 600; done", f"did not stand by within {STANDBY:g} s"),
        ("sleep 600 & exit 3", "ended with status 3 before it stood by"),
        ("setsid sleep 0.1 & exit 3", "ended with status 3 before it stood by"),
    ],
    ids=["exits", "killed", "hangs", "ignores-sigterm", "leaves-child", "leaves-session"],
)
def test_it_never_stands_by(site: Site, then: str, reason: str) -> None:
    """What ends or hangs before it stands by is ended with all that it started."""
    shell(site.candidate("bad"), "2.0.0", then)
    record = site.fail("bad")
    assert (record["outcome"], record["reason"]) == ("aborted", f"bad {reason}")
    assert [entry["phase"] for entry in record["timeline"]] == [
        *("CHOOSING", "STAGING", "STARTING", "ABORTING", "RUNNING"),
    ]


HEALTH = """
from selfupdate import messages, presence
presence.Presence.health = lambda self: messages.json_response({}, 503)
"""
OTHER_VERSION = """
import sys
if sys.argv[1:] == ["-version"]:
    sys.exit(print("3.0.0"))
"""
HANGS_ON_REPLACE = """
import threading
from selfupdate import incumbent
incumbent.Standby._take_over = lambda self: threading.Event().wait()
"""
REFUSES_REPLACE = """
from selfupdate import incumbent, messages
incumbent.Standby._take_over = lambda self: messages.problem(503, "Not in the mood.")
"""
ANSWERS_500 = """
from selfupdate import messages, presence
health = presence.Presence._health
def answer(self, request):
    if self._lifecycle.phase == "TRIAL" and "user-agent" not in request.headers:
        return messages.problem(500, "Out of order.")
    return health(self, request)
presence.Presence._health = answer
"""
LEAVES_ON_TRIAL = """
import os, signal
from selfupdate import service
accept = service._Service._accept
def leave(self, listener):
    accept(self, listener)
    self._incumbent = None
    os.kill(os.getpid(), signal.SIGTERM)
service._Service._accept = leave
"""


@pytest.mark.parametrize(
    ("version", "fault", "outcome", "reason"),
    [
        ("2.0.0", OTHER_VERSION, "aborted", "says '2.0.0' when it runs, and said 3.0.0 to -version"),
        ("2.0.0", HEALTH, "aborted", "is not healthy: it answered 503 when it was probed"),
        ("2.0.0", HANGS_ON_REPLACE, "rolled-back", "did not answer GET /replace when it was to take over in time"),
        ("2.0.0", REFUSES_REPLACE, "rolled-back", "did not take over: it answered 503: Not in the mood."),
        ("2.0.0", ANSWERS_500, "rolled-back", "is not healthy: it answered 500 on trial"),
    ],
    ids=["other-version", "unhealthy", "hangs-on-replace", "refuses-replace", "answers-500"],
)
def test_it_stands_by_and_is_no_good(site: Site, version: str, fault: str, outcome: str, reason: str) -> None:
    """What fails behind its announcement is ended; what had taken over gives the port back."""
    site.programs.faulty(version, "bad", fault).rename(site.candidate("bad"))
    record = site.fail("bad")
    assert (record["outcome"], record["reason"]) == (outcome, f"bad {reason}")


def test_it_leaves_on_trial(site: Site) -> None:
    """A successor that ends of its own accord, however cleanly, has failed."""
    site.programs.faulty("2.0.0", "bad", LEAVES_ON_TRIAL).rename(site.candidate("bad"))
    record = site.fail("bad")
    assert record["outcome"] == "rolled-back"
    # Whichever is seen first: that it says it is stopping, or its end.
    assert record["reason"] in {"bad is not healthy: it answered 503 on trial", "bad ended with status 0 on trial"}


@pytest.mark.parametrize("mode", ["blocks the listener", "shuts the listener down"])
def test_it_harms_the_listener_that_it_shares(start: Callable[..., Service], mode: str) -> None:
    """The socket is everybody's who holds it: the old version puts it right and serves on, on the same port."""
    service = start()
    fake(service.upgrade_dir / "bad", "full", "2.0.0", mode)
    upgrade_id = service.ask("POST", "/upgrade").json["id"]
    service.line(upgrade=upgrade_id, outcome="aborted")
    assert service.get(f"/upgrades/{upgrade_id}")["reason"] == "bad ended with status 3 before it stood by"
    service.stop()
    assert service.statuses[service.process.pid] == 0


def test_it_answers_a_byte_at_a_time(site: Site) -> None:
    """The time to take over is for the whole answer."""
    fake(site.candidate("bad"), "full", "2.0.0", "drips")
    record = site.fail("bad")
    assert (record["outcome"], record["reason"]) == (
        "rolled-back",
        "bad did not answer GET /replace when it was to take over in time",
    )


def test_it_dies_before_it_accepts(site: Site) -> None:
    """Connections wait in the shared queue while a successor dies that said it had taken over."""
    fake(site.candidate("bad"), "full", "2.0.0", "dies before it accepts")
    record = site.fail("bad")
    assert record["outcome"] == "rolled-back"
    assert record["reason"].startswith("bad ended with status 7 ")


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"#!/bin/sh\nexec sleep 600\n", "did not answer -version within 5 s"),
        (b"#!/bin/sh\nexec yes 1.2.3\n", "answered -version with more than 4096 bytes"),
        (b"#!/bin/sh\necho no idea >&2; exit 1\n", "-version ended with status 1: no idea"),
        (b"#!/bin/sh\nkill -KILL $$\n", "-version was killed by SIGKILL"),
        (b"#!/bin/sh\necho soon\n", "-version printed 'soon': 'soon' is not a version: expected Semantic Versioning"),
        (b"#!/bin/sh\nsleep 600 & echo 2.0.0\n", "answered -version and left a process behind"),
        (b"\x7fELF\x02\x01\x01" + bytes(57), "cannot be executed on this machine: Exec format error"),
        (b"#!/no/such/interpreter\n", "cannot be executed on this machine: No such file or directory"),
        (b"", "is empty"),
    ],
    ids=[
        "hangs",
        "floods",
        "exits-1",
        "killed",
        "nonsense",
        "leaves-child",
        "other-machine",
        "no-interpreter",
        "empty",
    ],
)
def test_it_does_not_tell_its_version(site: Site, content: bytes, reason: str) -> None:
    """What does not answer `-version` is no candidate, and the reason stands in the list and in the record."""
    write_program(site.candidate("bad"), content)
    record = site.fail("bad")
    assert record["outcome"] == "aborted"
    assert record["reason"].startswith(f"bad cannot be upgraded to: {reason}")
    assert site.service.upgrade()["outcome"] == "up-to-date"
    (listed,) = site.service.get("/candidates")["candidates"]
    assert (listed["name"], listed["eligible"], listed["version"]) == ("bad", False, None)
    assert listed["reason"].startswith(reason)


def test_a_truncated_zip_is_no_candidate(site: Site) -> None:
    """A program that was cut while it was copied can't tell its version."""
    whole = site.programs.version("2.0.0").read_bytes()
    write_program(site.candidate("bad"), whole[: len(whole) // 2])
    record = site.fail("bad")
    assert record["outcome"] == "aborted"
    assert record["reason"].startswith("bad cannot be upgraded to: -version ended with status 1: ")


@pytest.mark.parametrize("then", ["rm", "touch"], ids=["removed", "changed"])
def test_it_goes_between_scan_and_start(site: Site, then: str) -> None:
    """A candidate that is not what it was when it was chosen is not started, and not held against its release."""
    bad = site.candidate("bad")
    write_program(bad, f"#!/bin/sh\n{then} '{bad}'\necho 2.0.0\n".encode())
    record = site.fail("bad")
    assert record["outcome"] == "aborted"
    did, remedy = {"rm": ("removed", "copy it there again"), "touch": ("changed", "ask for the upgrade again")}[then]
    assert (record["reason"], record["remedy"]) == (f"bad was {did} after it had been chosen", remedy)
    bad.unlink(missing_ok=True)


def test_a_release_that_failed_is_not_chosen_again_until_asked_for_by_name(site: Site) -> None:
    """One failure is enough: no loop of upgrades and rollbacks."""
    shell(site.candidate("bad"), "2.0.0", "exit 4")
    assert site.service.upgrade()["outcome"] == "aborted"
    again = site.service.upgrade()
    assert again["outcome"] == "up-to-date"
    (listed,) = again["candidates"]
    assert listed["reason"] == "failed before (bad ended with status 4 before it stood by)"
    assert (listed["code"], listed["remedy"]) == ("blocked", "ask for it by name to try it again")
    assert site.fail("bad")["reason"] == "bad ended with status 4 before it stood by"


def test_the_service_can_be_upgraded_after_all_that(site: Site) -> None:
    """None of the kinds left the service worse than it was."""
    site.candidate("bad").unlink(missing_ok=True)
    site.programs.version("2.0.0").rename(site.candidate("good"))
    with contextlib.ExitStack() as clients:
        for _ in range(100):  # nor do slow clients make a healthy successor look ill
            clients.enter_context(socket.create_connection(site.service.address)).sendall(b"G")
        assert site.service.upgrade()["outcome"] == "committed"
    assert site.service.status_when(lambda status: status["phase"] == "RUNNING")["version"] == "2.0.0"


def test_a_successor_that_dies_takes_only_its_own_connections_with_it(
    start: Callable[..., Service], figure: Callable[[str], None]
) -> None:
    """What a dead process had accepted nobody can answer; all others are answered, and none is refused."""
    service = start("-probation", "5s")
    fake(service.upgrade_dir / "bad", "full", "2.0.0", "dies with requests under way")
    with Load(service.address) as load:
        record = service.upgrade()
        figures = load.take()
        after = load.take()
    assert (record["outcome"], record["reason"]) == ("rolled-back", "bad was killed by SIGKILL on trial")
    assert sum(figures.failed.values()) <= 16
    assert set(figures.failed) <= {"ConnectionResetError", "BrokenPipeError", "no answer", "cut answer"}
    assert not after.failed
    figure(
        f"a successor killed on trial with requests under way: {dict(figures.failed)} of {figures.answered} requests"
    )
