"""The record of upgrades, durable: what was done, when, and how it ended.

A file of JSON lines that only grows: each line holds one record as it stood
then, and the last line of a record counts. A line is written and synced before
the step that it announces is taken, so whatever a crash interrupts, the journal
knows at least as much as the world. A last line that was torn by a crash is
passed over, and the next one begins on a line of its own.

Who writes: one process at a time. The incumbent writes until it has written
`committed`, and nothing after that; the successor reads the file when it
starts, learns of changes through its channel while it stands by and is on
trial, and writes only when it has been blessed or when the kernel says that the
incumbent has gone. A process that may not write keeps what it learns in memory.

When the file has doubled, and is above a size, it is written anew with the last
line of each record, beside itself and then renamed: the history stays, and there
is always one whole file.

Each step of each timeline has a sequence number, which grows with every step of
every process that was ever the service: by it, whoever lost sight of the service
is told what was missed, and nothing twice.
"""

import itertools
import json
import logging
import os
import threading
import time
from collections.abc import Callable, Iterable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple, get_type_hints

from selfupdate.errors import StateError, UpgradeError, VersionError
from selfupdate.system import sync_directory
from selfupdate.versions import parse as parse_version

_log = logging.getLogger(__name__)

KEPT = 500
"""Records that are kept; the oldest go first."""

ROTATED_AT = 1024 * 1024
"""Bytes of the file below which it is never written anew."""

LAST_SEQ = 2**53 - 1
"""The greatest sequence number: JSON's numbers are whole up to there, wherever they are read (RFC 8259, section 6)."""


def now() -> str:
    """Return the time of day as RFC 3339 in UTC, to the millisecond."""
    return datetime.now(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


class Entry(NamedTuple):
    """One step of an upgrade."""

    phase: str
    at: str
    """When the phase began."""
    seq: int = 0
    """Its sequence number; 0 where a version wrote it that gave none."""


class Record(NamedTuple):
    """One upgrade or rollback. `outcome` is None while it is under way."""

    id: str
    from_version: str
    phase: str
    started_at: str
    kind: str = "upgrade"
    """`upgrade` or `rollback`."""
    from_sha256: str | None = None
    """The release that it goes from: where a rollback of it goes to."""
    to_version: str | None = None
    name: str | None = None
    sha256: str | None = None
    outcome: str | None = None
    reason: str | None = None
    ended_at: str | None = None
    timeline: tuple[Entry, ...] = ()
    """Each phase that it went through."""
    is_fault_of_release: bool = False
    """Whether the release is to blame for the outcome, and is not chosen again unasked."""
    program: str | None = None
    """The file that is replaced when the release is blessed; None where there is none to replace."""
    installed: bool | None = None
    """Whether that file was replaced; None until that was tried."""
    not_installed: str | None = None
    """Why it was not."""
    pid_not_kept: str | None = None
    """Why the service has another process id since, where it was to keep its own."""
    signer: str | None = None
    """Who signed the release, in words; None where nobody did."""
    signer_keys: tuple[str, ...] = ()
    """The fingerprints of the keys."""
    code: str | None = None
    """The kind of the reason, for programs."""
    remedy: str | None = None
    """What to do about it."""
    log: str | None = None
    """The end of what the successor wrote; None where none was started."""

    @property
    def is_settled(self) -> bool:
        """Whether nothing more will happen: it has ended, and what a restart brings is known."""
        return self.outcome is not None and (self.outcome != "committed" or self.installed is not None)

    def as_json(self) -> dict[str, Any]:
        """Return the record as the HTTP interface shows it."""
        return {
            "id": self.id,
            "kind": self.kind,
            "from": self.from_version,
            "to": self.to_version,
            "name": self.name,
            "sha256": self.sha256,
            "phase": self.phase,
            "outcome": self.outcome,
            "reason": self.reason,
            "started_at": self.started_at,
            "ended_at": self.ended_at,
            "timeline": [entry._asdict() for entry in self.timeline],
            "from_sha256": self.from_sha256,
            "is_fault_of_release": self.is_fault_of_release,
            "program": self.program,
            "installed": self.installed,
            "not_installed": self.not_installed,
            "pid_not_kept": self.pid_not_kept,
            "signer": self.signer,
            "signer_keys": list(self.signer_keys),
            "code": self.code,
            "remedy": self.remedy,
            "log": self.log,
        }

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> "Record":
        """Return the record that `as_json` gave; raises KeyError, TypeError, ValueError or VersionError on all else."""
        timeline = tuple(map(_entry, value["timeline"]))
        keys = tuple(map(str, value.get("signer_keys", ())))
        fields = {name: value[name] for name in cls._fields if name in value}
        fields |= {"from_version": value["from"], "to_version": value["to"], "timeline": timeline, "signer_keys": keys}
        record = cls(**fields)
        for name, kinds in _KINDS.items():
            if not isinstance(getattr(record, name), kinds):
                raise TypeError(name)
        for version in (record.from_version, record.to_version):
            if version is not None:
                parse_version(version)
        for time_of_day in (record.started_at, record.ended_at, *(entry.at for entry in timeline)):
            if time_of_day is not None and datetime.fromisoformat(time_of_day).tzinfo is None:
                raise ValueError(time_of_day)
        return record


def _entry(value: dict[str, Any]) -> Entry:
    phase, at = str(value["phase"]), str(value["at"])  # a TypeError where it is no object
    seq = value.get("seq", 0)
    if not isinstance(seq, int):
        raise TypeError("seq")
    if not 0 <= seq <= LAST_SEQ:
        raise ValueError(seq)
    return Entry(phase, at, seq)


_KINDS = {name: kind for name, kind in get_type_hints(Record).items() if name not in {"timeline", "signer_keys"}}
"""The types of what a record holds; what is a tuple was made one above."""

_NOT_OURS = -1
"""In place of a descriptor: this process may not write."""
_LOST = -2
"""In place of a descriptor: the file could not be opened again, and each write fails."""

_BINARY = getattr(os, "O_BINARY", 0)
_APPEND = os.O_RDWR | os.O_APPEND | _BINARY
_NEW = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | _BINARY


class Journal:
    """All upgrades that are known, newest first. Safe to use from any thread."""

    def __init__(self, path: Path) -> None:
        """Keep the history in memory until `read` and `open` are called."""
        self._path = path
        self._fd = _NOT_OURS
        self._size = 0
        self._rotated_at = ROTATED_AT
        # Writing waits for the disk, telling for whoever is told, and reading must wait for neither: three locks,
        # always in this order.
        self._writing = threading.Lock()
        self._telling = threading.Lock()
        self._changed = threading.Condition()
        self._records: dict[str, Record] = {}
        self._followers: list[Callable[[Record], None]] = []
        self._last_seq = 0
        """The last sequence number that was given."""
        self._ended: list[Record] = []
        self._on_end: Callable[[Record], None] = self._ended.append

    def open(self) -> None:
        """Read what was written until now, and begin to write. Raises StateError where that can't be."""
        try:
            with self._writing:
                self.read()
                self._fd = os.open(self._path, _APPEND | os.O_CREAT, 0o600)
                self._size = os.fstat(self._fd).st_size
                if self._size and not self._path.read_bytes().endswith(b"\n"):
                    self._size += os.write(self._fd, b"\n")  # behind a torn line
                sync_directory(self._path.parent)
        except OSError as error:
            raise StateError(
                f"the journal {self._path} cannot be written: {error.strerror}",
                "state-unusable",
                "make it writable for this account, or give another directory with -state-dir",
            ) from error

    def begin(self, from_version: str, phase: str, **fields: Any) -> Record:
        """Add an upgrade that starts now. It is written down with its first change."""
        at = now()
        stem = datetime.now(UTC).strftime("%Y%m%dT%H%M%S")
        upgrade_id = f"{stem}-{os.urandom(3).hex()}"
        with self._changed:
            entry = Entry(phase, at, self._next_seq())
        return self.put(Record(upgrade_id, from_version, phase, at, timeline=(entry,), **fields))

    def change(self, upgrade_id: str, phase: str | None = None, **fields: Any) -> Record:
        """Replace `fields` of an upgrade, and note the phase that it enters, if it enters one.

        It is on disk when this returns. Raises UpgradeError where it can't be written: then
        nothing has changed, and the step must not be taken.
        """
        with self._writing:
            record = self._changed_record(upgrade_id, phase, fields)
            try:
                self._append(record)
            except OSError as error:
                raise UpgradeError(f"the journal {self._path} cannot be written: {error.strerror}") from error
            return self._decide(record)

    def conclude(self, upgrade_id: str, phase: str | None = None, **fields: Any) -> Record:
        """Do as `change` does on the way back, which has to be gone whether it can be written down or not."""
        with self._writing:
            record = self._changed_record(upgrade_id, phase, fields)
            try:
                self._append(record)
            except OSError as error:
                _log.error("the journal cannot be written", extra={"file": str(self._path), "reason": error.strerror})
            return self._decide(record)

    def note(self, **fields: Any) -> None:
        """Change the upgrade that is under way in memory alone: what is not worth a write to the disk."""
        with self._writing:
            if record := self.current():
                self.put(record._replace(**fields))

    def put(self, record: Record) -> Record:
        """Take in a record as it is, in memory alone."""
        with self._telling:
            with self._changed:
                _keep(self._records, record)
                self._last_seq = max(self._last_seq, _last_seq(record))
                self._changed.notify_all()
                followers = tuple(self._followers)
            for follower in followers:
                follower(record)
        return record

    def discard(self, upgrade_id: str) -> None:
        """Forget an upgrade that turned out to be none."""
        with self._changed:
            self._records.pop(upgrade_id, None)
            self._changed.notify_all()

    def get(self, upgrade_id: str) -> Record | None:
        """Return one upgrade, or None."""
        with self._changed:
            return self._records.get(upgrade_id)

    def records(self) -> list[Record]:
        """Return all upgrades, newest first."""
        with self._changed:
            return list(reversed(self._records.values()))

    def newest(self) -> Record | None:
        """Return the upgrade that began last, or None."""
        with self._changed:
            return next(reversed(self._records.values()), None)

    @property
    def last_seq(self) -> int:
        """The sequence number of the last step that was taken in; 0 before the first.

        One whose line is on its way to the disk has its number, and is not taken in yet.
        """
        with self._changed:
            return max(map(_last_seq, self._records.values()), default=0)

    def after(self, seq: int) -> list[tuple[Record, Entry]]:
        """Return each step behind the one with the number `seq`, in order, with its record as it is now."""
        with self._changed:
            # One upgrade at a time: a record has no step behind the first of the next one.
            late = itertools.takewhile(lambda record: _last_seq(record) > seq, reversed(self._records.values()))
            return [(record, entry) for record in reversed([*late]) for entry in record.timeline if entry.seq > seq]

    def current(self) -> Record | None:
        """Return the upgrade that is under way, or None."""
        return next((record for record in self.records() if record.outcome is None), None)

    def last_commit(self) -> Record | None:
        """Return the last upgrade or rollback that was committed: it says what runs, and what ran before."""
        return next((record for record in self.records() if record.outcome == "committed"), None)

    def commit_of(self, sha256: str) -> Record | None:
        """Return the upgrade by which the release `sha256` came to be committed, or None."""
        upgrades = (record for record in self.records() if record.kind == "upgrade" and record.outcome == "committed")
        return next((record for record in upgrades if record.sha256 == sha256), None)

    def signed(self, sha256: str | None) -> Record | None:
        """Return the last record that says who signed the release `sha256`, or None."""
        return next((record for record in self.records() if sha256 and record.sha256 == sha256 and record.signer), None)

    def fault_of(self, sha256: str) -> Record | None:
        """Return the last record of the release `sha256` if it says not to choose it again unasked."""
        for record in self.records():
            if record.sha256 == sha256 and record.outcome not in {None, "interrupted"}:
                return record if record.is_fault_of_release else None
            if record.from_sha256 == sha256 and record.kind == "rollback" and record.outcome == "committed":
                return record
        return None

    def wait(self, upgrade_id: str, until: Callable[[Record], bool], timeout: float) -> Record | None:
        """Wait until a record is as `until` says, at most `timeout` seconds; return it as it is then.

        Returns None where there is no such upgrade (any more).
        """
        deadline = time.monotonic() + timeout
        with self._changed:
            while (record := self._records.get(upgrade_id)) and not until(record):
                if not self._changed.wait(max(0.0, deadline - time.monotonic())) and time.monotonic() >= deadline:
                    return self._records.get(upgrade_id)
            return record

    def follow(self, follower: Callable[[Record], None]) -> None:
        """Call `follower` with each record from now on as it changes."""
        with self._changed:
            self._followers.append(follower)

    def unfollow(self, follower: Callable[[Record], None]) -> None:
        """Call `follower` no more."""
        with self._telling, self._changed:
            if follower in self._followers:
                self._followers.remove(follower)

    def follow_ends(self, follower: Callable[[Record], None]) -> None:
        """Call `follower` with each upgrade that this process ends, and with those that it has ended already.

        No other process says so of the same upgrade, but each hears of it (`follow`).
        """
        with self._changed:
            for record in self._ended:
                follower(record)
            self._on_end = follower

    def _decide(self, record: Record) -> Record:
        """Take in what this process says of an upgrade."""
        with self._changed:
            if record.outcome is not None and self._records[record.id].outcome is None:
                self._on_end(record)
        return self.put(record)

    def _changed_record(self, upgrade_id: str, phase: str | None, fields: dict[str, Any]) -> Record:
        with self._changed:
            record = self._records[upgrade_id]._replace(**fields)
            if phase is not None:
                entry = Entry(phase, now(), self._next_seq())
                record = record._replace(phase=phase, timeline=(*record.timeline, entry))
            return record

    def _next_seq(self) -> int:
        """Return one more than the last sequence number, or the time of day in milliseconds, which mostly is greater.

        The first step of an upgrade is told and not yet written: a crash forgets it, and by the clock its number is
        not given again.
        """
        self._last_seq = max(self._last_seq + 1, time.time_ns() // 1_000_000)
        return self._last_seq

    def _append(self, record: Record) -> None:
        """Write a line, whole, and wait until the disk has it. Raises OSError, with the file as it was."""
        if self._fd == _NOT_OURS:
            return
        line = _line(record)
        if self._size + len(line) > self._rotated_at:
            self._rotate()
        try:
            written = 0
            while written < len(line):
                written += os.write(self._fd, line[written:])
            os.fsync(self._fd)
        except OSError:
            os.ftruncate(self._fd, self._size)
            raise
        self._size += len(line)

    def _rotate(self) -> None:
        partial = self._path.with_name(".journal.new")
        with self._changed:
            content = b"".join(map(_line, self._records.values()))
        with open(os.open(partial, _NEW, 0o600), "wb") as file:  # noqa: PTH123 - a descriptor, not a path
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        old, self._fd = self._fd, _LOST
        if old != _LOST:
            os.close(old)  # Windows replaces no file that is open, and renames none
        try:
            partial.replace(self._path)
            sync_directory(self._path.parent)
        finally:
            self._fd = os.open(self._path, _APPEND)
            self._size = os.fstat(self._fd).st_size
        self._rotated_at = max(ROTATED_AT, 2 * self._size)  # or a long history would be written with every line

    def read(self) -> None:
        """Take in the history on disk. Raises StateError where it is there and can't be read."""
        try:
            with self._path.open("rb") as file:
                self._read_lines(file)
        except FileNotFoundError:
            return
        except OSError as error:
            raise StateError(
                f"the journal {self._path} cannot be read: {error.strerror}",
                "state-unusable",
                "make it readable for this account, or give another directory with -state-dir",
            ) from error

    def _read_lines(self, lines: Iterable[bytes]) -> None:
        found: dict[str, Record] = {}
        for number, line in enumerate(lines, 1):
            if line == b"\n":
                continue
            try:
                record = Record.from_json(json.loads(line))
            except (ValueError, KeyError, TypeError, RecursionError, VersionError):
                _log.warning("a line of the journal is passed over", extra={"file": str(self._path), "line": number})
                continue
            found.pop(record.id, None)
            _keep(found, record)
        with self._changed:  # nobody sees a part of it
            self._records = {**found, **{key: record for key, record in self._records.items() if key not in found}}
            self._last_seq = max([self._last_seq, *map(_last_seq, self._records.values())])
            self._changed.notify_all()


def _keep(records: dict[str, Record], record: Record) -> None:
    """Add a record, and remove the oldest where there are too many."""
    records[record.id] = record
    if len(records) > KEPT:
        # What failed must not be forgotten for what is merely more recent.
        passing = (key for key, old in records.items() if not old.is_fault_of_release)
        del records[next(passing, next(iter(records)))]


def _last_seq(record: Record) -> int:
    return record.timeline[-1].seq if record.timeline else 0


def _line(record: Record) -> bytes:
    return json.dumps(record.as_json()).encode() + b"\n"
