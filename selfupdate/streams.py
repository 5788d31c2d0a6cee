"""Answers that go on (`messages.Stream`): each client is told as much as it takes, and nobody is waited for.

All of it is the loop's own.
"""

from __future__ import annotations

import contextlib
import selectors
from typing import TYPE_CHECKING

from selfupdate.messages import SIGN_OF_LIFE

if TYPE_CHECKING:
    import socket

    from selfupdate.connection import Connection
    from selfupdate.crowd import Crowd
    from selfupdate.messages import Stream

_BOTH = selectors.EVENT_READ | selectors.EVENT_WRITE


class Streams:
    """The connections on which something goes on being said."""

    def __init__(self, selector: selectors.BaseSelector, crowd: Crowd) -> None:
        """Know when each connection of the `crowd` takes more by the loop's `selector`."""
        self._selector = selector
        self._crowd = crowd
        self._told: dict[Connection, _Telling] = {}

    def begin(self, connection: Connection, *, ends: bool) -> None:
        """Go on with the stream of `connection`, whose head has been sent; end it at once if it `ends`."""
        assert connection.stream is not None
        self._crowd.put(connection, self._crowd.streaming)
        self._told[connection] = _Telling(connection.stream, connection.connection)
        self._advance(connection)
        if ends and connection in self._told:  # else the client has just left
            self._end(connection)

    def attend_to(self, connection: Connection, events: int) -> None:
        """Go on where the client takes more, and drop it where it has gone."""
        if events & selectors.EVENT_READ and connection.has_left():
            self._drop(connection)
        elif events & selectors.EVENT_WRITE:
            self._advance(connection)

    def advance_all(self) -> None:
        """Tell all what is new."""
        for connection in tuple(self._told):
            self._advance(connection)

    def show_life(self, connection: Connection) -> None:
        """Show the client that it is still served; drop it if it takes nothing."""
        if self._told[connection].beat():
            self._crowd.put(connection, self._crowd.streaming)
            self._advance(connection)
        else:
            self._drop(connection)

    def end_all(self) -> None:
        """Say the last words of all, and part from them."""
        for connection in tuple(self._told):
            self._end(connection)

    def _advance(self, connection: Connection) -> None:
        try:
            is_all = self._told[connection].advance()
        except OSError:
            self._drop(connection)
        else:
            self._selector.modify(connection, selectors.EVENT_READ if is_all else _BOTH)

    def _end(self, connection: Connection) -> None:
        self._told.pop(connection).end()
        connection.close_stream()
        self._selector.modify(connection, selectors.EVENT_READ)
        self._crowd.part_from(connection)

    def _drop(self, connection: Connection) -> None:
        del self._told[connection]
        self._crowd.drop(connection)


class _Telling:
    """A stream on its way to one client."""

    def __init__(self, stream: Stream, client: socket.socket) -> None:
        self._stream = stream
        self._client = client
        self._unsent = b""
        """What the client has not taken. It has a bound: no more is asked for until it has."""
        self._has_taken = True
        """Whether it has taken anything since the last sign of life."""

    def advance(self) -> bool:
        """Send what there is to say, as far as the client takes it now; tell whether that is all. Raises OSError."""
        self._unsent = self._unsent or self._stream.more()
        if not self._unsent:
            return True
        self._send()
        return False

    def beat(self) -> bool:
        """Have a sign of life to say where nothing else waits; tell whether the client has taken any since the last."""
        is_well = self._has_taken or not self._unsent
        self._has_taken = False
        self._unsent = self._unsent or SIGN_OF_LIFE
        return is_well

    def end(self) -> None:
        """Say the last words, if the client takes them at once: it is told the rest when it comes back."""
        self._unsent += self._stream.farewell()
        with contextlib.suppress(OSError):  # it has just left
            self._send()

    def _send(self) -> None:
        with contextlib.suppress(BlockingIOError):
            self._unsent = self._unsent[self._client.send(self._unsent) :]
            self._has_taken = True
