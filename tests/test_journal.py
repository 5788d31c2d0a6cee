"""The record of upgrades."""

from __future__ import annotations

import errno
import json
import os
import threading
import time
from typing import TYPE_CHECKING, Any

import pytest
from service import PATIENCE

from selfupdate.errors import UpgradeError
from selfupdate.journal import KEPT, LAST_SEQ, ROTATED_AT, Entry, Journal, Record

if TYPE_CHECKING:
    from pathlib import Path

THEN = "2026-07-14T09:30:00.000Z"


def test_a_record_grows_with_its_upgrade(tmp_path: Path) -> None:
    """Each phase is noted with its time; fields are replaced; the outcome ends it."""
    journal = Journal(tmp_path / "journal")
    record = journal.begin("1.0.0", "CHOOSING")
    assert journal.current() == record
    journal.change(record.id, "STAGING", to_version="1.1.0", name="a", sha256="00")
    journal.change(record.id, reason="because")
    ended = journal.change(record.id, "RUNNING", outcome="aborted", ended_at=THEN)
    assert journal.current() is None
    assert journal.get(record.id) == ended
    assert [phase for phase, _, _ in ended.timeline] == ["CHOOSING", "STAGING", "RUNNING"]
    assert ended.as_json()["timeline"][0].keys() == {"phase", "at", "seq"}
    assert (ended.as_json()["from"], ended.as_json()["to"], ended.reason) == ("1.0.0", "1.1.0", "because")


def test_a_record_survives_the_way_to_another_process() -> None:
    """What JSON gives back is the same record."""
    timeline = (Entry("CHOOSING", THEN, 1), Entry("PROBING", THEN, 2))
    record = Record("1", "1.0.0", "PROBING", THEN, to_version="2.0.0", timeline=timeline)
    assert Record.from_json(json.loads(json.dumps(record.as_json()))) == record


@pytest.mark.parametrize("text", ["yesterday", "", "2026-07-14T09:30:00.000"])
@pytest.mark.parametrize("place", ["started_at", "ended_at", "timeline"])
def test_a_line_with_a_time_that_is_none_is_passed_over(tmp_path: Path, place: str, text: str) -> None:
    """Nor is one without its zone a time: nobody can say how long it is since another."""
    value: object = [{"phase": "CHOOSING", "at": text, "seq": 1}] if place == "timeline" else text
    assert not read_with(tmp_path / "journal", **{place: value})


@pytest.mark.parametrize("entry", [None, 1, "CHOOSING", ["CHOOSING"], {}, {"phase": "CHOOSING"}])
def test_a_line_with_a_step_that_is_none_is_passed_over(tmp_path: Path, entry: object) -> None:
    """Whatever is in its place: a service that has a history starts."""
    assert not read_with(tmp_path / "journal", timeline=[entry])


@pytest.mark.parametrize("seq", [-1, LAST_SEQ + 1, 10**30, 1.5, "1", None])
def test_a_line_with_a_number_that_no_listener_can_come_back_with_is_passed_over(tmp_path: Path, seq: object) -> None:
    """Each that follows would be greater still; the greatest is read."""
    assert not read_with(tmp_path / "journal", timeline=[{"phase": "CHOOSING", "at": THEN, "seq": seq}])
    assert read_with(tmp_path / "journal", timeline=[{"phase": "CHOOSING", "at": THEN, "seq": LAST_SEQ}])


def read_with(path: Path, **changes: object) -> list[Record]:
    """Return what is read of a journal with one line, which was changed by hand."""
    record = Record("1", "1.0.0", "RUNNING", THEN, outcome="aborted", ended_at=THEN, timeline=(Entry("RUNNING", THEN),))
    path.write_text(json.dumps({**record.as_json(), **changes}) + "\n", encoding="utf-8")
    journal = Journal(path)
    journal.read()
    return journal.records()


def test_who_ends_an_upgrade_hears_of_it_once(tmp_path: Path) -> None:
    """And not who is told of it, nor when more becomes known; what was ended before it was asked comes first."""
    journal, other = Journal(tmp_path / "journal"), Journal(tmp_path / "other")
    ended: list[Record] = []
    heard: list[Record] = []
    told: list[Record] = []
    other.follow_ends(heard.append)
    journal.follow(lambda record: told.append(other.put(record)))
    first, second = journal.begin("1.0.0", "CHOOSING"), journal.begin("1.0.0", "CHOOSING")
    journal.conclude(first.id, outcome="interrupted")
    journal.follow_ends(ended.append)
    journal.change(second.id, "STAGING")
    journal.change(second.id, "RETIRED", outcome="committed")
    journal.conclude(second.id, installed=True)
    other.conclude(second.id, pid_not_kept="because")
    assert [(record.id, record.outcome) for record in ended] == [(first.id, "interrupted"), (second.id, "committed")]
    assert told[-1].installed
    assert not heard


def test_the_newest_are_kept_and_come_first(tmp_path: Path) -> None:
    """The history is bounded."""
    journal = Journal(tmp_path / "journal")
    for number in range(KEPT + 10):
        journal.put(Record(str(number), "1.0.0", "RUNNING", "", outcome="aborted"))
    numbers = [int(record.id) for record in journal.records()]
    assert numbers == list(range(KEPT + 9, 9, -1))


def test_the_file_is_written_anew_above_a_size_and_keeps_the_history(tmp_path: Path) -> None:
    """It does not grow without end; what it holds then is read as before."""
    path = tmp_path / "journal"
    journal = Journal(path)
    journal.open()
    record = journal.begin("1.0.0", "CHOOSING")
    for number in range(30):
        journal.change(record.id, reason=f"{number} " + "x" * 200_000)
    assert path.stat().st_size <= ROTATED_AT
    other = journal.begin("1.0.0", "CHOOSING")
    journal.change(other.id, outcome="aborted")
    again = Journal(path)
    again.read()
    assert again.records() == journal.records()
    assert [entry.name for entry in tmp_path.iterdir()] == ["journal"]


def test_a_journal_that_cannot_be_written_anew_says_so_and_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The new file can't take its place, or can't be opened there: no step is taken that is not written down."""
    path = tmp_path / "journal"
    journal = Journal(path)
    journal.open()
    record = journal.begin("1.0.0", "CHOOSING")
    journal.change(record.id, reason="x" * ROTATED_AT)

    real = os.open

    def fail(of: Path, *rest: Any) -> int:
        if path in {of, *rest}:
            raise OSError(errno.ENOSPC, "no room")
        return real(of, *rest)

    for owner, name in ((type(path), "replace"), (os, "open")):
        with monkeypatch.context() as broken:
            broken.setattr(owner, name, fail)
            for _ in range(2):
                with pytest.raises(UpgradeError, match="cannot be written"):
                    journal.change(record.id, reason="lost")
        changed = journal.change(record.id, reason="x" * ROTATED_AT + name)
        again = Journal(path)
        again.read()
        assert again.records() == [changed]


def test_a_long_history_is_not_written_with_every_line(tmp_path: Path) -> None:
    """A history above the size is written anew when it has doubled."""
    path = tmp_path / "journal"
    journal = Journal(path)
    journal.open()
    for number in range(20):
        record = journal.begin("1.0.0", "CHOOSING")
        journal.change(record.id, outcome="aborted", reason=f"{number} " + "x" * 100_000)
    inodes = set()
    for _ in range(20):
        journal.change(record.id, reason="again")
        inodes.add(path.stat().st_ino)
    assert len(inodes) <= 3
    assert len(journal.records()) == 20


def test_a_line_is_on_disk_before_the_step(tmp_path: Path) -> None:
    """What `change` returns is what another process reads."""
    journal = Journal(tmp_path / "journal")
    journal.open()
    record = journal.change(journal.begin("1.0.0", "CHOOSING").id, "STAGING")
    reader = Journal(tmp_path / "journal")
    reader.read()
    assert reader.records() == [record]


def test_only_the_last_try_of_a_release_counts(tmp_path: Path) -> None:
    """A release that failed and was then committed is no failure any more."""
    journal = Journal(tmp_path / "journal")
    failed = Record("1", "1.0.0", "RUNNING", "", sha256="00", outcome="aborted", is_fault_of_release=True)
    journal.put(failed)
    assert journal.fault_of("00") == failed
    assert journal.fault_of("01") is None
    journal.put(Record("2", "1.0.0", "RETIRED", "", sha256="00", outcome="committed"))
    assert journal.fault_of("00") is None


def test_waiting_ends_with_the_outcome_or_with_the_time(tmp_path: Path) -> None:
    """A waiter is woken by the change that it waits for."""
    journal = Journal(tmp_path / "journal")
    record = journal.begin("1.0.0", "CHOOSING")
    assert journal.wait(record.id, lambda record: record.outcome is not None, 0.01) == record
    ended = threading.Timer(0.05, journal.change, (record.id,), {"outcome": "committed"})
    ended.start()
    found = journal.wait(record.id, lambda record: record.outcome is not None, PATIENCE)
    assert found is not None
    assert found.outcome == "committed"
    journal.discard(record.id)
    assert journal.wait(record.id, lambda _: False, PATIENCE) is None


def test_a_follower_sees_every_change_and_all_that_was_before(tmp_path: Path) -> None:
    """Nothing falls between the history and the news."""
    journal = Journal(tmp_path / "journal")
    first = journal.begin("1.0.0", "CHOOSING")
    seen: list[Record] = []
    follower = seen.append
    journal.follow(follower)
    second = journal.change(first.id, "STAGING")
    journal.unfollow(follower)
    journal.change(first.id, "STARTING")
    assert seen == [second]


def test_each_step_has_a_greater_number_than_all_before_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the clock says, and over a restart."""
    path = tmp_path / "journal"
    journal = Journal(path)
    journal.open()
    first = journal.begin("1.0.0", "CHOOSING")
    first = journal.change(first.id, "STAGING")
    monkeypatch.setattr("time.time_ns", lambda: 0)  # somebody has set it back
    first = journal.change(first.id, "RUNNING", outcome="aborted")
    numbers = [entry.seq for entry in first.timeline]
    assert numbers == sorted(set(numbers))
    again = Journal(path)
    again.open()
    assert again.last_seq == numbers[-1]
    assert again.begin("1.0.0", "CHOOSING").timeline[0].seq == numbers[-1] + 1


def test_the_number_of_a_step_that_a_crash_forgot_is_not_given_again(tmp_path: Path) -> None:
    """The first step of an upgrade is told, and not yet written."""
    journal = Journal(tmp_path / "journal")
    journal.open()
    lost = journal.begin("1.0.0", "CHOOSING").timeline[0].seq
    again = Journal(tmp_path / "journal")
    again.open()
    while time.time_ns() // 1_000_000 <= lost:  # a restart takes longer than that
        pass
    assert again.begin("1.0.0", "CHOOSING").timeline[0].seq > lost


def test_what_came_after_a_step_is_told_in_order_with_each_record(tmp_path: Path) -> None:
    """From any number on: each step behind it, and none before."""
    journal = Journal(tmp_path / "journal")
    told = []
    for _ in range(3):
        record = journal.begin("1.0.0", "CHOOSING")
        journal.change(record.id, "STAGING")
        record = journal.change(record.id, "RUNNING", outcome="aborted")
        told += [(record, entry) for entry in record.timeline]
    assert journal.after(0) == told
    for number, (_, entry) in enumerate(told, 1):
        assert journal.after(entry.seq) == told[number:]


def test_a_note_is_kept_in_memory_alone_and_only_while_an_upgrade_is_under_way(tmp_path: Path) -> None:
    """It is told to those who follow, and costs no write to the disk."""
    path = tmp_path / "journal"
    journal = Journal(path)
    journal.open()
    journal.note(log="nobody's")
    record = journal.begin("1.0.0", "CHOOSING")
    journal.change(record.id, "STAGING")
    told: list[Record] = []
    journal.follow(told.append)
    size = path.stat().st_size
    journal.note(log="begun")
    assert [record.log for record in told] == ["begun"]
    assert path.stat().st_size == size
    ended = journal.change(record.id, "RUNNING", outcome="aborted")
    journal.note(log="too late")
    assert journal.get(record.id) == ended


def test_whoever_reads_waits_for_nobody_who_is_told(tmp_path: Path) -> None:
    """One who is told may take a second to listen, and the service answers meanwhile."""
    journal = Journal(tmp_path / "journal")
    first = journal.begin("1.0.0", "CHOOSING")
    told, gate = threading.Event(), threading.Event()

    def listen(_: Record) -> None:
        told.set()
        assert gate.wait(PATIENCE)

    journal.follow(listen)
    changing = threading.Thread(target=journal.change, args=(first.id, "STAGING"))
    changing.start()
    assert told.wait(PATIENCE)
    reading = threading.Thread(target=lambda: (journal.newest(), journal.after(0), journal.records()))
    reading.start()
    reading.join(PATIENCE)
    has_waited = reading.is_alive()
    gate.set()
    changing.join(PATIENCE)
    assert not has_waited
