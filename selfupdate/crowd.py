"""The open connections: what each waits for, and until when. All of it is the loop's own, but the count."""

from __future__ import annotations

import contextlib
import math
import selectors
import socket
import time
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

    from selfupdate.connection import Connection
    from selfupdate.settings import Limits


class Wait(dict["Connection", float]):
    """Connections that wait for the same thing, with the deadline of each, in seconds of `time.monotonic()`.

    All wait for as long, so that the one that came first has the next deadline.
    """

    def __init__(self, name: str, time_limit: float = math.inf, *, is_watched: bool = True) -> None:
        """Let connections wait for `time_limit` seconds; the loop sees what arrives on them if that `is_watched`."""
        self.name = name
        self.time_limit = time_limit
        self.is_watched = is_watched


_NOWHERE = Wait("nowhere", is_watched=False)


class Crowd:
    """Knows where each open connection is."""

    def __init__(self, selector: selectors.BaseSelector, limits: Limits) -> None:
        """Have the loop's `selector` watch those connections on which something may arrive."""
        self._selector = selector
        self.idle = Wait("idle", limits.idle_time)
        """For a request."""
        self.receiving = Wait("receiving", limits.request_time)
        """For the rest of a request, or for the first one."""
        self.busy = Wait("busy", is_watched=False)
        """For a worker."""
        self.streaming = Wait("streaming", limits.sign_of_life_interval)
        """For news, or for the next sign of life."""
        self.closing = Wait("closing", limits.linger_time)
        """For the client to close, too."""
        self._waits = (self.idle, self.receiving, self.busy, self.streaming, self.closing)
        self.where: dict[Connection, Wait] = {}
        """What each waits for."""

    def __len__(self) -> int:
        return len(self.where)

    def count(self) -> dict[str, int]:
        """Return how many connections there are, by what they wait for; from any thread."""
        return {wait.name: len(wait) for wait in self._waits}

    def put(self, connection: Connection, wait: Wait) -> None:
        """Have `connection` wait for something, from now on."""
        before = self.where.get(connection, _NOWHERE)
        before.pop(connection, None)
        if wait.is_watched and not before.is_watched:
            self._selector.register(connection, selectors.EVENT_READ)
        elif not wait.is_watched and before.is_watched:
            self._selector.unregister(connection)
        self.where[connection] = wait
        wait[connection] = time.monotonic() + wait.time_limit

    def drop(self, connection: Connection) -> None:
        """Close `connection`."""
        before = self.where.pop(connection, _NOWHERE)
        before.pop(connection, None)
        if before.is_watched:
            self._selector.unregister(connection)
        connection.close()

    def part_from(self, connection: Connection) -> None:
        """Close `connection` behind its last answer when the client has, too, or when its time is over."""
        if connection.ends_with_client:
            self.drop(connection)
            return
        # A close(2) with unread input resets the connection, and the client may lose the answer.
        with contextlib.suppress(OSError):
            connection.connection.shutdown(socket.SHUT_WR)
        if connection.has_left():
            self.drop(connection)
        else:
            self.put(connection, self.closing)

    def has_room(self, most: int) -> bool:
        """Tell whether one more may come, of at most `most`; one that is merely kept alive makes room for it."""
        if len(self) < most:
            return True
        silent = next((connection for connection in self.idle if not connection.has_input()), None)
        if silent is not None:
            self.drop(silent)
        return silent is not None

    def next_deadline(self) -> float:
        """Return when the next time is over."""
        return min([next(iter(wait.values())) for wait in self._waits if wait], default=math.inf)

    def expired(self, now: float) -> Iterator[Connection]:
        """Yield each connection whose time is over; whoever asks drops it, or has it wait anew."""
        for wait in self._waits:
            while wait and (first := next(iter(wait.items())))[1] <= now:
                yield first[0]

    def drop_silent(self) -> None:
        """Drop those from which nothing is under way."""
        for connection in (*self.idle, *self.closing):
            self.drop(connection)

    def cut(self) -> None:
        """Drop all that can be dropped, and have the workers give the others back at once."""
        self.drop_silent()
        for connection in tuple(self.receiving):
            self.drop(connection)
        for connection in self.busy:  # its worker finds the connection ended
            with contextlib.suppress(OSError):
                connection.connection.shutdown(socket.SHUT_RDWR)
