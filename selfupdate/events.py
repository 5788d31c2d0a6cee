"""What listeners are told as it happens: server-sent events (HTML Living Standard, section 9.2).

A listener is a cursor into the journal, and keeps nothing that grows: one that is
slow is told later, and of what changes without a step only the latest. Nobody
waits for it.
"""

from __future__ import annotations

import json
import threading
import time
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable

    from selfupdate.journal import Journal, Record
    from selfupdate.lifecycle import Lifecycle

CONTENT_TYPE = "text/event-stream"

_AT_ONCE = 16
"""Steps that are told at once: what one listener can have waiting in memory."""
_RETRY = 100
"""Milliseconds until a client comes back that was left because this process serves no more."""


class Feed:
    """Tells all listeners what happens."""

    def __init__(
        self,
        journal: Journal,
        lifecycle: Lifecycle,
        status: Callable[[], dict[str, Any]],
        wake: Callable[[], None],
        limit: int,
    ) -> None:
        """Tell at most `limit` listeners of `journal` and of `status`; `wake` whoever sends it when there is news."""
        self.journal = journal
        self.status: dict[str, Any] = {}
        """How the service stands, as it was seen last."""
        self._see = status
        self._wake = wake
        self._limit = limit
        self._listeners: set[Listener] = set()
        self._lock = threading.Lock()
        self._news = threading.Event()
        self._thread: threading.Thread | None = None
        journal.follow(lambda _: self._tell())
        lifecycle.follow(lambda _, __: self._tell())

    def open(self, last_seq: int | None) -> Listener | None:
        """Return a new listener, which is told what came behind the step `last_seq`; None where there are too many."""
        listener = Listener(self, last_seq)
        with self._lock:
            if len(self._listeners) >= self._limit:
                return None
            self._listeners.add(listener)
            if self._thread is None:
                self._thread = threading.Thread(target=self._watch, name="events", daemon=True)
                self._thread.start()
        try:
            self.status = self._see()  # not before it is one of those for whom news are seen
        except BaseException:
            self.close(listener)
            raise
        self._news.set()  # this may have begun before, and ended after, somebody else saw what is newer
        return listener

    def close(self, listener: Listener) -> None:
        """Tell `listener` nothing more."""
        with self._lock:
            self._listeners.discard(listener)

    def _tell(self) -> None:
        if self._listeners:
            self._wake()
            self._news.set()

    def _watch(self) -> None:
        """See how the service stands whenever something has happened: that takes time, which the sender has not."""
        while self._news.wait():
            self._news.clear()
            self.status = self._see()
            self._wake()


class Listener:
    """One client that listens: a `messages.Stream`."""

    def __init__(self, feed: Feed, last_seq: int | None) -> None:
        """Tell what came behind the step `last_seq`, or, without it, what comes from now on."""
        self._feed = feed
        known = feed.journal.last_seq
        # What comes from now on has a greater number than the time (`Journal`). A process that has just taken over may
        # not know a step yet that its predecessor told; a number from the future is one of a history that is lost.
        self._cursor = known if last_seq is None else min(last_seq, max(known, time.time_ns() // 1_000_000 - 1))
        self._record = feed.journal.newest() if last_seq is None else None
        """As it was told last; None where that is not known, since another process may have told it."""
        self._status: dict[str, Any] = {}

    def more(self) -> bytes:
        """Return the events that have not been told yet, or the first of many."""
        if not self._status:
            return self._tell_status(self._cursor)  # its id has a client come back here that was told no step
        steps = self._feed.journal.after(self._cursor)[:_AT_ONCE]
        events = []
        for record, entry in steps:
            step = {"upgrade": record.id, "phase": entry.phase, "at": entry.at, "record": record.as_json()}
            events.append(_event("phase", step, entry.seq))
            self._cursor, self._record = entry.seq, record
        if not steps:
            events = [self._tell_record(self._feed.journal.newest()), self._tell_status()]
        return b"".join(events)

    def farewell(self) -> bytes:
        """Return what has the client come back soon: to whoever serves then."""
        return self.more() + b"retry: %d\n\n" % _RETRY

    def close(self) -> None:
        """Tell nothing more."""
        self._feed.close(self)

    def _tell_record(self, record: Record | None) -> bytes:
        """Tell what has changed in a record without a step; nothing, where another is the newest by now."""
        before, self._record = self._record, record
        if record is None or (before is not None and (record.id != before.id or record == before)):
            return b""
        return _event("record", record.as_json())

    def _tell_status(self, seq: int | None = None) -> bytes:
        status = self._feed.status
        if {**status, "upgrade": None} == {**self._status, "upgrade": None}:
            return b""
        self._status = status
        return _event("status", status, seq)


def _event(name: str, data: object, seq: int | None = None) -> bytes:
    """Return one event; JSON has no line feed, so its data is one line."""
    number = "" if seq is None else f"id: {seq}\n"
    return f"event: {name}\n{number}data: {json.dumps(data)}\n\n".encode()
