"""A load generator: clients that ask without pause, and count what becomes of each request.

Run as a program, with the service's host and port, or the path of its Unix socket: it asks until its standard
input ends, and answers each line there with the figures since the last one, as
one line of JSON. `Load` runs it so. Half of the clients keep their connection,
half make one for each request; they ask with GET, and with POST and a body.
"""

from __future__ import annotations

import contextlib
import json
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

Place = tuple[str, int] | str
"""Host and port, or the path of a Unix socket."""

KEEPING, SINGLE = 8, 8
TIMEOUT = 30.0

_GET = b"GET /version HTTP/1.1\r\nHost: localhost\r\n%s\r\n"
_BODY = b'{"name": ["a body that the service has to read to refuse it"]}'
_POST = b"POST /upgrade HTTP/1.1\r\nHost: localhost\r\n%sContent-Length: %d\r\n\r\n%s"


@dataclass
class Figures:
    """What became of the requests. Times in seconds."""

    answered: int = 0
    failed: Counter[str] = field(default_factory=Counter)
    """By kind: a connection that was refused or reset, an answer that is missing, cut, late or wrong."""
    ended_between_answers: int = 0
    """Kept connections that the service ended without having said so with its last answer."""
    versions: list[str] = field(default_factory=list)
    """In the order in which they first answered."""
    longest_gap: float = 0.0
    """Between two answers to any client."""
    last_answer: float = field(default_factory=time.monotonic)
    began: float = field(default_factory=time.monotonic)
    seconds: float = 0.0
    """The time that these figures are of."""


def _connect(address: Place) -> socket.socket:
    if isinstance(address, str):
        connection = socket.socket(socket.AF_UNIX)
        connection.settimeout(TIMEOUT)
        connection.connect(address)
        return connection
    connection = socket.create_connection(address, TIMEOUT)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return connection


class _EndedBetweenAnswersError(Exception):
    pass


class _Client:
    """One client, in a thread of its own."""

    def __init__(self, generator: _Generator, address: Place, *, keeps: bool) -> None:
        self._generator = generator
        self._address = address
        self._keeps = keeps
        self._connection: socket.socket | None = None
        self._is_used = False

    def run(self) -> None:
        close = b"" if self._keeps else b"Connection: close\r\n"
        requests = [(_GET % close, 200), (_POST % (close, len(_BODY), _BODY), 400)]
        while not self._generator.stopping:
            for request, expected in requests:
                try:
                    status, body = self._ask(request)
                except _EndedBetweenAnswersError:
                    self._generator.count_ended()
                except (OSError, ValueError) as error:
                    self._drop()
                    self._generator.count_failed(type(error).__name__ if isinstance(error, OSError) else str(error))
                else:
                    version = json.loads(body)["version"] if status == 200 else None
                    self._generator.count(version, None if status == expected else f"status {status}")
        self._drop()

    def _ask(self, request: bytes) -> tuple[int, bytes]:
        if self._connection is None:
            self._connection = _connect(self._address)
            self._is_used = False
        try:
            self._connection.sendall(request)
            received = self._connection.recv(65536)
        except (ConnectionResetError, BrokenPipeError):
            if self._is_used:
                self._drop()
                raise _EndedBetweenAnswersError from None
            raise
        if not received and self._is_used:
            self._drop()
            raise _EndedBetweenAnswersError
        head, body = self._read(received)
        self._is_used = True
        if not self._keeps or b"\r\nConnection: close" in head:
            self._drop()
        return int(head[9:12]), body

    def _read(self, received: bytes) -> tuple[bytes, bytes]:
        assert self._connection is not None
        while True:
            head, end, body = received.partition(b"\r\n\r\n")
            if end:
                length = int(head.partition(b"Content-Length: ")[2].partition(b"\r\n")[0])
                if len(body) >= length:
                    return head, body
            more = self._connection.recv(65536)
            if not more:
                raise ValueError("cut answer" if received else "no answer")
            received += more

    def _drop(self) -> None:
        if self._connection is not None:
            self._connection.close()
            self._connection = None


class _Generator:
    def __init__(self, address: Place) -> None:
        self.stopping = False
        self._news = threading.Condition()
        self._figures = Figures()
        clients = [_Client(self, address, keeps=number < KEEPING) for number in range(KEEPING + SINGLE)]
        self._threads = [threading.Thread(target=client.run) for client in clients]
        for thread in self._threads:
            thread.start()

    def count(self, version: str | None, fault: str | None) -> None:
        now = time.monotonic()
        with self._news:
            figures = self._figures
            figures.answered += 1
            figures.longest_gap = max(figures.longest_gap, now - figures.last_answer)
            figures.last_answer = now
            if fault is not None:
                figures.failed[fault] += 1
            if version is not None and version not in figures.versions:
                figures.versions.append(version)
            self._news.notify()

    def count_failed(self, kind: str) -> None:
        with self._news:
            self._figures.failed[kind] += 1
            self._news.notify()

    def count_ended(self) -> None:
        with self._news:
            self._figures.ended_between_answers += 1

    def take(self) -> dict[str, Any]:
        with self._news:
            self._news.wait_for(lambda: self._figures.answered or self._figures.failed, TIMEOUT)
            now = time.monotonic()
            figures, self._figures = self._figures, Figures(last_answer=self._figures.last_answer)
        figures.longest_gap = max(figures.longest_gap, now - figures.last_answer)
        figures.seconds = now - figures.began
        return vars(figures)

    def stop(self) -> None:
        self.stopping = True
        for thread in self._threads:
            thread.join()


class Load:
    """The generator as a process of its own, so that it and the tests do not slow each other down."""

    def __init__(self, address: Place) -> None:
        where = [address] if isinstance(address, str) else [address[0], str(address[1])]
        self._process = subprocess.Popen(
            [sys.executable, str(Path(__file__).resolve()), *where],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self.take()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.close()
        self._process.wait()
        self._process.stdout.close()

    def take(self) -> Figures:
        """Return the figures since the last call, of one request at least."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write("\n")
        self._process.stdin.flush()
        figures = Figures(**json.loads(self._process.stdout.readline()))
        figures.failed = Counter(figures.failed)
        return figures


def main() -> None:
    """Run the generator."""
    path, *port = sys.argv[1:]
    generator = _Generator((path, int(port[0])) if port else path)
    for _ in sys.stdin:
        print(json.dumps(generator.take()), flush=True)
    generator.stop()


if __name__ == "__main__":
    main()
