"""The record of upgrades."""

from __future__ import annotations

import errno
import json
import os
import threading
from typing import TYPE_CHECKING, Any

import pytest
from service import PATIENCE

from selfupdate.errors import UpgradeError
from selfupdate.journal import KEPT, ROTATED_AT, Journal, Record

if TYPE_CHECKING:
    from pathlib import Path


def test_a_record_grows_with_its_upgrade(tmp_path: Path) -> None:
    """Each phase is noted with its time; fields are replaced; the outcome ends it."""
    journal = Journal(tmp_path / "journal")
    record = journal.begin("1.0.0", "CHOOSING")
    assert journal.current() == record
    journal.change(record.id, "STAGING", to_version="1.1.0", name="a", sha256="00")
    journal.change(record.id, reason="because")
    ended = journal.change(record.id, "RUNNING", outcome="aborted", ended_at="then")
    assert journal.current() is None
    assert journal.get(record.id) == ended
    assert [phase for phase, _ in ended.timeline] == ["CHOOSING", "STAGING", "RUNNING"]
    assert ended.as_json()["timeline"][0].keys() == {"phase", "at"}
    assert (ended.as_json()["from"], ended.as_json()["to"], ended.reason) == ("1.0.0", "1.1.0", "because")


def test_a_record_survives_the_way_to_another_process() -> None:
    """What JSON gives back is the same record."""
    record = Record("1", "1.0.0", "PROBING", "now", to_version="2.0.0", timeline=(("CHOOSING", "a"), ("PROBING", "b")))
    assert Record.from_json(json.loads(json.dumps(record.as_json()))) == record


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
