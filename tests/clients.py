"""Clients for the tests: one that asks without pause, and one whose request is under way."""

from __future__ import annotations

import http.client
import socket
import threading
from collections import Counter

from service import PATIENCE


class Asking:
    """A client that asks without pause, each time over a new connection, and is never to be refused."""

    def __init__(self, address: tuple[str, int]) -> None:
        self.failed: Counter[str] = Counter()
        self.answered = 0
        self._address = address
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _run(self) -> None:
        while not self._stop.is_set():
            connection = http.client.HTTPConnection(*self._address, timeout=PATIENCE)
            try:
                connection.request("GET", "/version")
                connection.getresponse().read()
                self.answered += 1
            except (OSError, http.client.HTTPException) as error:
                self.failed[type(error).__name__] += 1
            finally:
                connection.close()

    def stop(self) -> None:
        self._stop.set()
        self._thread.join()


class UnderWay:
    """A request whose head and half of whose body have been sent."""

    def __init__(self, address: tuple[str, int]) -> None:
        self._connection = socket.create_connection(address, PATIENCE)
        self._connection.sendall(b"POST /upgrade HTTP/1.1\r\nHost: localhost\r\nExpect: 100-continue\r\n")
        self._connection.sendall(b"Content-Length: 8\r\n\r\n")
        # The service asks for the body: the request is under way, and not still in a queue.
        assert self._connection.recv(1024) == b"HTTP/1.1 100 Continue\r\n\r\n"
        self._connection.sendall(b'{"na')

    def finish(self) -> bytes:
        with self._connection:
            self._connection.sendall(b"me!}")
            answer = b""
            while chunk := self._connection.recv(4096):
                answer += chunk
        return answer
