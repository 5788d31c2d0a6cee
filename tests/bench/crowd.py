"""Crowds: clients that hold connections, and ask nothing or take their time."""

from __future__ import annotations

import contextlib
import socket
import threading
from typing import Self

from bench.answers import REQUEST, exchange
from service import PATIENCE

PACE = 0.05
"""Seconds between two bytes of a slow client."""


class Idle:
    """Connections that were used once, and are kept."""

    def __init__(self, address: tuple[str, int], count: int) -> None:
        self._connections: list[socket.socket] = []
        for _ in range(count):
            connection = socket.create_connection(address, PATIENCE)
            self._connections.append(connection)
            exchange(connection, REQUEST)
            connection.setblocking(False)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for connection in self._connections:
            connection.close()

    def open(self) -> int:
        """Return how many the server has not ended."""
        return sum(map(_is_open, self._connections))


def _is_open(connection: socket.socket) -> bool:
    try:
        connection.recv(1)
    except BlockingIOError:
        return True
    except OSError:
        pass
    return False


class Slow:
    """Clients that each send a request byte by byte, read the answer, and begin anew; where they are cut off, too."""

    def __init__(self, address: tuple[str, int], count: int) -> None:
        self.answered = 0
        self._address = address
        self._connections: list[tuple[socket.socket, int]] = [(self._connect(), 0) for _ in range(count)]
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()
        for connection, _sent in self._connections:
            connection.close()

    def _run(self) -> None:
        while not self._stop.wait(PACE):
            self._connections = [self._step(connection, sent) for connection, sent in self._connections]

    def _step(self, connection: socket.socket, sent: int) -> tuple[socket.socket, int]:
        try:
            if sent < len(REQUEST):
                connection.send(REQUEST[sent : sent + 1])
                return connection, sent + 1
            received = connection.recv(65536)
        except BlockingIOError:  # its answer is still to come
            return connection, sent
        except OSError:
            received = b""
        if received:
            self.answered += 1
            return connection, 0
        connection.close()
        return self._connect(), 0

    def _connect(self) -> socket.socket:
        connection = socket.socket()
        connection.setblocking(False)
        with contextlib.suppress(BlockingIOError):
            connection.connect(self._address)
        return connection
