"""`GET /events`: whoever listens is told each step of each upgrade once, whichever process serves."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import pytest
from clients import Event, Listening
from programs import shell, write_program
from service import PATIENCE, resident

from selfupdate.events import Feed
from selfupdate.journal import Journal
from selfupdate.lifecycle import Event as Change
from selfupdate.lifecycle import Lifecycle, Phase

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from programs import Programs
    from service import Service

FORWARD = ("CHOOSING", "STAGING", "STARTING", "PROBING", "REPLACING", "PROBATION")
BACK = ("ABORTING", "ROLLING_BACK", "RUNNING")
FLAGS = ("-probation", "300ms", "-drain", "5s")

DIES_ON_TRIAL = """
import os, signal
from selfupdate import incumbent
settle = incumbent.Standby._take_over
def take_over(self):
    answer = settle(self)
    os.kill(os.getpid(), signal.SIGKILL)
    return answer
incumbent.Standby._take_over = take_over
"""
TALKS_ON_TRIAL = """
import sys
from selfupdate import service
accept = service._Service._accept
def talk(self, found):
    accept(self, found)
    print("nobody knows the trouble I see", file=sys.stderr, flush=True)
service._Service._accept = talk
"""


def steps_of(record: Any) -> list[tuple[str, int | None]]:
    return [(entry["phase"], entry["seq"]) for entry in record["timeline"]]


def record_in(event: Event) -> Any:
    """Return the record that an event tells, as a whole or with a step of it."""
    return event.data["record"] if event.kind == "phase" else event.data if event.kind == "record" else {}


def is_end(event: Event) -> bool:
    """Tell whether it is the last step of an upgrade."""
    return event.kind == "phase" and event.data["phase"] in {"RUNNING", "RETIRED"}


class Listeners:
    """One that stays, one for each phase that leaves in it and comes back, and one that does so always."""

    def __init__(self, service: Service) -> None:
        self.all = [Listening(service.address)]
        self.all += [Listening(service.address, leaves_at=[phase]) for phase in (*FORWARD, *BACK, "RETIRED")]
        self.all += [Listening(service.address, leaves_at=(*FORWARD, *BACK, "RETIRED"))]

    def check(self, record: Any) -> None:
        """Check that each was told each step of the upgrade once, in order."""
        for one in self.all:
            one.wait_for(lambda event: is_end(event) and event.data["upgrade"] == record["id"])
            assert one.phases(record["id"]) == steps_of(record)

    def stop(self) -> None:
        for one in self.all:
            one.stop()


@pytest.fixture
def listen() -> Any:
    """Have clients listen, and stop them with the test."""
    listening: list[Any] = []

    def listen(kind: Any, *arguments: Any, **named: Any) -> Any:
        listening.append(kind(*arguments, **named))
        return listening[-1]

    yield listen
    for one in listening:
        one.stop()


@pytest.mark.slow
@pytest.mark.parametrize("keeps", ["true", "false"], ids=["keeps its pid", "another process"])
def test_each_step_is_told_once_and_in_order(
    start: Callable[..., Service], programs: Programs, listen: Any, keeps: str
) -> None:
    """Through an upgrade and a rollback, to clients that leave in any step and come back."""
    service = start(*FLAGS, "-keep-pid", keeps)
    listeners = listen(Listeners, service)
    shutil.copy2(programs.version("2.0.0"), service.upgrade_dir / "new")
    record = service.upgrade()
    assert record["outcome"] == "committed"
    assert [phase for phase, _ in steps_of(record)] == [*FORWARD, "RETIRED"]
    listeners.check(record)
    answer = service.ask("POST", "/rollback?wait=5s")
    back = service.record_when(answer.json["id"], lambda record: record["outcome"] is not None)
    assert back["outcome"] == "committed"
    listeners.check(back)
    for one in listeners.all:
        assert one.phases() == [*steps_of(record), *steps_of(back)]
        one.wait_for(lambda event: event.kind == "status" and event.data["version"] == "2.0.0")


@pytest.mark.slow
def test_each_step_of_a_failure_is_told_once(start: Callable[..., Service], programs: Programs, listen: Any) -> None:
    """Before the handover, and on trial, when a process was listened to that is no more."""
    service = start(*FLAGS)
    listeners = listen(Listeners, service)
    shell(service.upgrade_dir / "aborts", "2.0.0", "exit 3")
    aborted = service.upgrade("aborts")
    shutil.copy2(programs.faulty("2.0.0", "dies", DIES_ON_TRIAL), service.upgrade_dir / "dies")
    rolled_back = service.upgrade("dies")
    assert (aborted["outcome"], rolled_back["outcome"]) == ("aborted", "rolled-back")
    listeners.check(aborted)
    listeners.check(rolled_back)


@pytest.mark.slow
def test_what_was_missed_is_told_after_a_restart(
    start: Callable[..., Service], programs: Programs, listen: Any
) -> None:
    """All of it to one who was there before, nothing to one who comes for the first time."""
    service = start(*FLAGS)
    before = listen(Listening, service.address)
    seen = before.first.id
    before.stop()
    shell(service.upgrade_dir / "aborts", "2.0.0", "exit 3")
    records = [service.upgrade("aborts")]
    shutil.copy2(programs.version("3.0.0"), service.upgrade_dir / "new")
    records.append(service.upgrade("new"))
    service.status_when(lambda status: status["phase"] == "RUNNING" and status["version"] == "3.0.0")
    service.stop()
    service.restart()
    again = listen(Listening, service.address, last_id=seen)
    again.wait_for(lambda event: is_end(event) and event.data["upgrade"] == records[-1]["id"])
    assert again.phases() == [step for record in records for step in steps_of(record)]
    fresh = listen(Listening, service.address)
    assert fresh.first.id == again.phases()[-1][1]
    assert fresh.phases() == []


@pytest.mark.slow
def test_the_death_of_the_incumbent_is_told(start: Callable[..., Service], programs: Programs, listen: Any) -> None:
    """What it had begun goes on to be told by the one that serves on."""
    service = start("-probation", "1m", "-drain", "5s")
    listener = listen(Listening, service.address)
    shutil.copy2(programs.version("2.0.0"), service.upgrade_dir / "new")
    upgrade = service.ask("POST", "/upgrade").json["id"]
    listener.wait_for(lambda event: event.kind == "status" and event.data["phase"] == "TRIAL")
    os.kill(service.process.pid, signal.SIGKILL)
    told = listener.wait_for(lambda event: record_in(event).get("outcome") == "interrupted")
    assert record_in(told)["id"] == upgrade
    listener.wait_for(lambda event: event.kind == "status" and event.data["phase"] == "RUNNING")
    assert listener.phases() == steps_of(service.get(f"/upgrades/{upgrade}"))


@pytest.mark.slow
def test_what_the_successor_writes_is_told_as_it_comes(
    start: Callable[..., Service], programs: Programs, listen: Any
) -> None:
    """Before it stands by, from the old version; on trial, from the successor itself."""
    service = start("-probation", "1m", "-drain", "5s")
    listener = listen(Listening, service.address)
    os.mkfifo(service.upgrade_dir / "..gate")
    talks = f"echo one >&2; read _ < {service.upgrade_dir}/..gate; echo two; exit 3"
    shell(service.upgrade_dir / "slow", "2.0.0", talks)
    service.ask("POST", "/upgrade")
    told = listener.wait_for(lambda event: "one" in (record_in(event).get("log") or ""))
    assert (record_in(told)["phase"], record_in(told)["outcome"]) == ("STARTING", None)
    (service.upgrade_dir / "..gate").write_text("go\n", encoding="ascii")
    ended = listener.wait_for(is_end)
    assert "two" in ended.data["record"]["log"]

    shutil.copy2(programs.faulty("3.0.0", "talks", TALKS_ON_TRIAL), service.upgrade_dir / "talks")
    service.ask("POST", "/upgrade", {"name": "talks"})
    listener.wait_for(lambda event: event.kind == "status" and event.data["phase"] == "TRIAL")
    listener.wait_for(
        lambda event: (
            record_in(event).get("phase") == "PROBATION" and "nobody knows the trouble I see" in record_in(event)["log"]
        )
    )


@pytest.mark.slow
def test_a_hundred_listen_and_one_reads_nothing(
    start: Callable[..., Service], programs: Programs, listen: Any, figure: Callable[[str], None]
) -> None:
    """All are told all; the one that reads nothing holds nothing up, and costs next to no memory."""
    service = start(*FLAGS)
    deaf = socket.socket()
    deaf.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    deaf.settimeout(PATIENCE)
    with deaf:
        deaf.connect(service.address)
        deaf.sendall(b"GET /events HTTP/1.1\r\nHost: localhost\r\n\r\n")
        listening = [listen(Listening, service.address) for _ in range(100)]
        pid = service.get("/status")["pid"]
        before = resident(pid)
        shell(service.upgrade_dir / "writes", "2.0.0", "yes nobody hears this | head -c 3000000 >&2; exit 3")
        assert service.upgrade("writes")["outcome"] == "aborted"
        after = resident(pid)
        figure(f"100 who listen while a successor writes 3 MB: {before} KiB resident before, {after} after")
        assert after < before + 20 * 1024
        shutil.copy2(programs.version("3.0.0"), service.upgrade_dir / "new")
        record = service.upgrade("new")
        assert record["outcome"] == "committed"
        for one in listening:
            one.wait_for(lambda event: is_end(event) and event.data["upgrade"] == record["id"])
            assert one.phases(record["id"]) == steps_of(record)


@pytest.mark.slow
def test_that_nothing_is_newer_is_told(start: Callable[..., Service], listen: Any) -> None:
    """An upgrade that turned out to be none ends, too."""
    service = start(*FLAGS)
    listener = listen(Listening, service.address)
    gate = service.upgrade_dir / "..gate"
    os.mkfifo(gate)
    write_program(service.upgrade_dir / "old", f"#!/bin/sh\nread _ < {gate}; echo 0.9.0\n".encode())
    with ThreadPoolExecutor() as asking:
        answer = asking.submit(service.upgrade)
        listener.wait_for(lambda event: event.kind == "phase" and event.data["phase"] == "CHOOSING")
        begun = listener.wait_for(lambda event: event.kind == "status" and event.data["phase"] == "CHOOSING")
        gate.write_text("go\n", encoding="ascii")
        assert answer.result()["outcome"] == "up-to-date"
    listener.wait_for(
        lambda event: (
            event.kind == "status"
            and event.data["phase"] == "RUNNING"
            and listener.events.index(event) > listener.events.index(begun)
        )
    )


@pytest.mark.slow
def test_what_cannot_be_told_is_refused(start: Callable[..., Service]) -> None:
    """A number that is none, and one client too many: in words, with what to do."""
    service = start(*FLAGS)
    answer = service.ask("GET", "/events", headers={"Last-Event-ID": "yesterday"})
    assert (answer.status, answer.json["detail"]) == (
        400,
        "Last-Event-ID takes the id of an event that was told here.",
    )
    assert service.ask("HEAD", "/events").headers["Content-Type"] == "text/event-stream"
    assert service.ask("POST", "/events").status == 405
    listening = []
    for _ in range(128):
        listening.append(socket.create_connection(service.address, PATIENCE))
        listening[-1].sendall(b"GET /events HTTP/1.1\r\nHost: localhost\r\n\r\n")
        assert b" 200 " in listening[-1].recv(16)
    answer = service.ask("GET", "/events")
    assert (answer.status, answer.headers["Retry-After"]) == (503, "5")
    for client in listening:
        client.close()
    service.poll(lambda: _opens(service), lambda opens: opens)


def _opens(service: Service) -> bool:
    with socket.create_connection(service.address, PATIENCE) as client:
        client.sendall(b"GET /events HTTP/1.1\r\nHost: localhost\r\n\r\n")
        return b" 200 " in client.recv(16)


def test_a_number_from_a_history_that_is_lost_is_taken_for_the_last(tmp_path: Path) -> None:
    """Or the client would be told nothing until the numbers have come so far."""
    journal = Journal(tmp_path / "journal")
    record = journal.begin("1.0.0", "CHOOSING")
    feed = Feed(journal, Lifecycle(Phase.RUNNING), lambda: {"phase": "RUNNING"}, lambda: None, 1)
    listener = feed.open(10**17)
    assert listener is not None
    assert listener.more().startswith(b"event: status\n")
    journal.change(record.id, "STAGING")
    assert listener.more().startswith(b"event: phase\n")


def test_what_is_told_at_once_has_a_bound(tmp_path: Path) -> None:
    """A long history does not become one long text."""
    journal = Journal(tmp_path / "journal")
    for _ in range(20):
        record = journal.begin("1.0.0", "CHOOSING")
        journal.change(record.id, "RUNNING", outcome="aborted")
    feed = Feed(journal, Lifecycle(Phase.RUNNING), lambda: {"phase": "RUNNING"}, lambda: None, 1)
    listener = feed.open(0)
    assert listener is not None
    told = [listener.more()]
    while told[-1]:
        told.append(listener.more())
    assert [text.count(b"event: phase") for text in told] == [0, 16, 16, 8, 0]


def test_a_step_that_is_being_written_is_told_to_whoever_comes_meanwhile(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It has its number already; one who takes that for told would never hear of it."""
    journal = Journal(tmp_path / "journal")
    journal.open()
    record = journal.begin("1.0.0", "CHOOSING")
    feed = Feed(journal, Lifecycle(Phase.RUNNING), lambda: {"phase": "RUNNING"}, lambda: None, 1)
    coming = []
    with monkeypatch.context() as slow:
        slow.setattr(os, "fsync", lambda _: coming.append(feed.open(None)))
        journal.change(record.id, "STAGING")
    (listener,) = coming
    assert listener is not None
    assert listener.more().startswith(b"event: status\nid: %d\n" % record.timeline[0].seq)
    assert b'"phase": "STAGING"' in listener.more()


def test_what_changes_while_somebody_begins_to_listen_is_told(tmp_path: Path) -> None:
    """The status that is told first was seen before; nothing else would tell that it is another since."""
    lifecycle = Lifecycle(Phase.CHOOSING)
    woken = threading.Event()

    def see() -> dict[str, Any]:
        seen = lifecycle.phase
        if seen is Phase.CHOOSING:
            lifecycle.step(Change.UP_TO_DATE)
        return {"phase": seen}

    listener = Feed(Journal(tmp_path / "journal"), lifecycle, see, woken.set, 1).open(None)
    assert listener is not None
    told = listener.more()
    while b"RUNNING" not in told:
        assert woken.wait(PATIENCE)
        woken.clear()
        told += listener.more()


def test_a_record_is_told_when_it_has_changed_and_only_then(tmp_path: Path) -> None:
    """Not one that is said again as it was, nor the one before an upgrade that turned out to be none."""
    journal = Journal(tmp_path / "journal")
    record = journal.begin("1.0.0", "CHOOSING")
    journal.change(record.id, "RUNNING", outcome="aborted")
    feed = Feed(journal, Lifecycle(Phase.RUNNING), lambda: {"phase": "RUNNING"}, lambda: None, 1)
    listener = feed.open(None)
    assert listener is not None
    assert listener.more().startswith(b"event: status\n")
    changed = journal.change(record.id, reason="because")
    assert listener.more() == b"event: record\ndata: %s\n\n" % json.dumps(changed.as_json()).encode()
    journal.put(changed._replace())
    assert listener.more() == b""
    none = journal.begin("1.0.0", "CHOOSING")
    assert listener.more().startswith(b"event: phase\n")
    journal.discard(none.id)
    assert listener.more() == b""


def test_whoever_comes_back_is_told_what_became_of_the_last_upgrade(tmp_path: Path) -> None:
    """When it ended without a step, too: the process was killed in the middle of it, and started again."""
    journal = Journal(tmp_path / "journal")
    record = journal.begin("1.0.0", "CHOOSING")
    feed = Feed(journal, Lifecycle(Phase.RUNNING), lambda: {"phase": "RUNNING"}, lambda: None, 1)
    ended = journal.conclude(record.id, outcome="interrupted")
    listener = feed.open(record.timeline[0].seq)
    assert listener is not None
    assert listener.more().startswith(b"event: status\n")
    assert listener.more() == b"event: record\ndata: %s\n\n" % json.dumps(ended.as_json()).encode()
    assert listener.more() == b""
