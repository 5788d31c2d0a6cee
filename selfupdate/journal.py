"""The record of upgrades: what was done, when, and how it ended.

This is the one place that is asked for history, and it keeps it in memory. A
successor gets a copy of each record as it changes (see `incumbent` and
`successor`), so the history goes on across a handover. Only the process that
drives an upgrade writes its record; the other only takes in what it is told.
"""

from __future__ import annotations

import secrets
import threading
import time
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

KEPT = 500
"""Records that are kept; the oldest go first."""


def now() -> str:
    """Return the time of day as RFC 3339 in UTC, to the millisecond."""
    return datetime.now(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


@dataclass(frozen=True)
class Record:
    """One upgrade. `outcome` is None while it is under way."""

    id: str
    from_version: str
    phase: str
    started_at: str
    to_version: str | None = None
    name: str | None = None
    sha256: str | None = None
    outcome: str | None = None
    reason: str | None = None
    ended_at: str | None = None
    timeline: tuple[tuple[str, str], ...] = ()
    """Each phase with the time at which it began."""
    is_fault_of_release: bool = False
    """Whether the release is to blame for the outcome, and is not chosen again unasked."""

    def as_json(self) -> dict[str, Any]:
        """Return the record as the HTTP interface shows it."""
        return {
            "id": self.id,
            "from": self.from_version,
            "to": self.to_version,
            "name": self.name,
            "sha256": self.sha256,
            "phase": self.phase,
            "outcome": self.outcome,
            "reason": self.reason,
            "started_at": self.started_at,
            "ended_at": self.ended_at,
            "timeline": [{"phase": phase, "at": at} for phase, at in self.timeline],
            "is_fault_of_release": self.is_fault_of_release,
        }

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> Record:
        """Return the record that `as_json` gave; raises KeyError or TypeError on anything else."""
        timeline = tuple((str(entry["phase"]), str(entry["at"])) for entry in value["timeline"])
        same = {name: value[name] for name in cls.__dataclass_fields__ if name in value and name != "timeline"}
        return cls(from_version=value["from"], to_version=value["to"], timeline=timeline, **same)


class Journal:
    """All upgrades that are known, newest first. Safe to use from any thread."""

    def __init__(self) -> None:
        """Begin with no history."""
        self._changed = threading.Condition()
        self._records: dict[str, Record] = {}
        self._followers: list[Callable[[Record], None]] = []

    def begin(self, from_version: str, phase: str) -> Record:
        """Add an upgrade that starts now."""
        at = now()
        stem = datetime.now(UTC).strftime("%Y%m%dT%H%M%S")
        return self.put(Record(f"{stem}-{secrets.token_hex(3)}", from_version, phase, at, timeline=((phase, at),)))

    def change(self, upgrade_id: str, phase: str | None = None, **fields: Any) -> Record:
        """Replace `fields` of an upgrade, and note the phase that it enters, if it enters one."""
        with self._changed:
            record = replace(self._records[upgrade_id], **fields)
            if phase is not None:
                record = replace(record, phase=phase, timeline=(*record.timeline, (phase, now())))
            return self.put(record)

    def put(self, record: Record) -> Record:
        """Take in a record as it is."""
        with self._changed:
            self._records[record.id] = record
            if len(self._records) > KEPT:
                # What failed must not be forgotten for what is merely more recent.
                passing = (key for key, old in self._records.items() if not old.is_fault_of_release)
                del self._records[next(passing, next(iter(self._records)))]
            for follower in self._followers:
                follower(record)
            self._changed.notify_all()
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

    def current(self) -> Record | None:
        """Return the upgrade that is under way, or None."""
        return next((record for record in self.records() if record.outcome is None), None)

    def fault_of(self, sha256: str) -> Record | None:
        """Return the last upgrade to the release `sha256` if it failed through that release."""
        last = next((record for record in self.records() if record.sha256 == sha256), None)
        return last if last and last.is_fault_of_release else None

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

    def follow(self, follower: Callable[[Record], None]) -> Iterable[Record]:
        """Call `follower` with each record from now on as it changes; return those until now, oldest first."""
        with self._changed:
            self._followers.append(follower)
            return list(self._records.values())

    def unfollow(self, follower: Callable[[Record], None]) -> None:
        """Call `follower` no more."""
        with self._changed:
            if follower in self._followers:
                self._followers.remove(follower)
