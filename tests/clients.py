"""Clients for the tests: one that asks without pause, one whose request is under way, and one that listens."""

from __future__ import annotations

import contextlib
import http.client
import json
import socket
import threading
from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from service import PATIENCE

if TYPE_CHECKING:
    from collections.abc import Callable, Collection


class Asking:
    """A client that asks without pause, each time over a new connection, and is never to be refused."""

    def __init__(self, address: tuple[str, int]) -> None:
        self.failed: Counter[str] = Counter()
        self.answered = 0
        self._address = address
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
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


@dataclass(frozen=True)
class Event:
    """One server-sent event."""

    kind: str
    id: int | None
    data: Any


class Listening:
    """A client of `GET /events` that comes back by Last-Event-ID, as a browser does."""

    def __init__(
        self,
        address: tuple[str, int],
        last_id: int | None = None,
        *,
        leaves_at: Collection[str] = (),
        path: str = "/events",
    ) -> None:
        """Listen, told how the service stands: what happens from now on is told, too.

        Leave, and come back, behind each event of a phase that is one of `leaves_at`, too.
        """
        self.events: list[Event] = []
        self.connections = 0
        self._address = address
        self._path = path
        self._last_id = last_id
        self._leaves_at = leaves_at
        self._news = threading.Condition()
        self._stopped = False
        self._connection: socket.socket | None = None
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()
        try:
            self.first = self.wait_for(lambda event: event.kind == "status")
        except BaseException:
            self.stop()
            raise

    def wait_for(self, is_it: Callable[[Event], bool]) -> Event:
        """Return the first event that `is_it`."""
        with self._news:
            self._news.wait_for(lambda: any(map(is_it, self.events)), PATIENCE)
            found = next(filter(is_it, self.events), None)
        assert found is not None, [(event.kind, event.id, event.data["phase"]) for event in self.events]
        return found

    def phases(self, upgrade_id: str | None = None) -> list[tuple[str, int | None]]:
        """Return each phase that was told, of one upgrade or of all, with the event's id."""
        told = [event for event in self.events if event.kind == "phase"]
        return [(one.data["phase"], one.id) for one in told if upgrade_id in {None, one.data["upgrade"]}]

    def stop(self) -> None:
        """Leave for good."""
        self._stopped = True
        with contextlib.suppress(OSError, AttributeError):
            self._connection.shutdown(socket.SHUT_RDWR)  # type: ignore[union-attr]
        self._thread.join(PATIENCE)

    def _run(self) -> None:
        while not self._stopped:
            with contextlib.suppress(OSError):
                self._listen()

    def _listen(self) -> None:
        with socket.create_connection(self._address, PATIENCE) as self._connection:
            if self._stopped:  # while there was no connection yet to be shut down
                return
            last = "" if self._last_id is None else f"Last-Event-ID: {self._last_id}\r\n"
            self._connection.sendall(f"GET {self._path} HTTP/1.1\r\nHost: localhost\r\n{last}\r\n".encode())
            with self._connection.makefile("rb") as stream:
                status = stream.readline()
                assert not status or b" 200 " in status, status
                while (line := stream.readline()) != b"\r\n":
                    if not line:  # the process was killed
                        return
                self.connections += 1
                fields: dict[str, str] = {}
                for line in stream:
                    name, _, text = line.decode().rstrip("\n").partition(": ")
                    if name:
                        fields[name] = text
                    elif self._take(fields):
                        return
                    else:
                        fields = {}

    def _take(self, fields: dict[str, str]) -> bool:
        """Take an event in; tell whether to leave behind it."""
        if "data" not in fields:
            return False
        event = Event(fields["event"], int(fields["id"]) if "id" in fields else None, json.loads(fields["data"]))
        self._last_id = event.id or self._last_id
        with self._news:
            self.events.append(event)
            self._news.notify_all()
        return event.kind == "phase" and event.data["phase"] in self._leaves_at
