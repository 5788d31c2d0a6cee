"""A load generator: clients that ask `GET /version`, in one process and one thread, on epoll(7).

In a *closed loop* each of the clients asks again as soon as it has its answer.
In an *open loop* requests are due at a rate, whatever became of those before:
a client that waits is replaced by a further one, and the time that a request
takes counts from when it was due, so that a peer that stalls is not spared the
requests that would have met it (coordinated omission).

A client either keeps its connection or makes one for each request. It reads a
connection that is to end until it ends, so that it learns how.

The process takes what it is to do as JSON, as its argument, and says in a line
of JSON when each version first answered. A line on its standard input asks how
many answers there are; at the end of that it waits for the answers that are due,
and leaves a `Trace`.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import errno
import gc
import json
import os
import queue
import select
import socket
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from bench.answers import LAST_REQUEST, REQUEST, Answer, WrongAnswerError, parse
from bench.ticks import Ticks
from bench.trace import ASKED, CUT, IDLE, LATE, MOST_TIME, NONE, REFUSED, RESET, UNASKED, UNENDED, Failure, Trace

REST = 0.01
"""Seconds that a client of a closed loop rests after a failure, so as not to keep a peer from coming back."""

PRIORITY = -10
"""Of the generator, where it may have one (nice(2))."""

_SWEEP = 0.1
"""Seconds between two looks for answers that are late."""
_KNOWN = 4096
"""Answers that are remembered by their bytes; a Date makes a new one each second."""

_KINDS = {errno.ECONNREFUSED: REFUSED, errno.ECONNRESET: RESET, errno.EPIPE: RESET}


@dataclass(frozen=True)
class Plan:
    """What a generator is to do."""

    host: str
    port: int
    keeps: bool
    """Whether a client keeps its connection."""
    clients: int = 16
    rate: float | None = None
    """Requests a second in an open loop; None for a closed one."""
    patience: float = MOST_TIME

    @property
    def request(self) -> bytes:
        return REQUEST if self.keeps else LAST_REQUEST


class _Client:
    __slots__ = ("due", "is_asking", "is_ending", "is_used", "received", "sent", "socket")

    def __init__(self) -> None:
        self.socket: socket.socket | None = None
        self.is_used = False
        """Whether an answer has come over this connection."""
        self.is_asking = False
        self.is_ending = False
        """Whether the last answer has come, and the connection's end is due."""
        self.due = self.sent = 0.0
        self.received = b""


class Generator:
    """The clients, and the loop that serves them."""

    def __init__(self, plan: Plan) -> None:
        self.trace = Trace()
        self._plan = plan
        self._request = plan.request
        self._epoll = select.epoll()
        self._by_fd: dict[int, _Client] = {}
        self._free: collections.deque[_Client] = collections.deque(_Client() for _ in range(plan.clients))
        """In an open loop, those that wait for a request to be due, the one that waits longest first."""
        self._resting: collections.deque[tuple[float, _Client]] = collections.deque()
        self._known: dict[bytes, Answer] = {}
        self._ticks = Ticks(plan.rate) if plan.rate else None
        self._stopping = False

    def run(self, commands: int) -> None:
        """Ask until the descriptor `commands` ends, and wait for the answers that are due then."""
        self._epoll.register(commands, select.EPOLLIN)
        if self._ticks:
            self._epoll.register(self._ticks, select.EPOLLIN)
        else:
            while self._free:
                self._ask(self._free.popleft(), time.monotonic())
        next_sweep = time.monotonic() + _SWEEP
        while not self._stopping or any(client.is_asking for client in self._by_fd.values()):
            for fd, events in self._epoll.poll(REST if self._resting else _SWEEP):
                client = self._by_fd.get(fd)
                if client is not None:
                    self._attend(client, events)
                elif fd == commands:
                    self._obey(commands)
                elif self._ticks and fd == self._ticks.fileno() and not self._stopping:
                    for due in self._ticks.take():
                        self._ask(self._free.popleft() if self._free else _Client(), due)
            now = time.monotonic()
            while self._resting and self._resting[0][0] <= now:
                self._go_on(self._resting.popleft()[1], now)
            if now >= next_sweep:
                self._sweep(now)
                next_sweep = now + _SWEEP

    def _obey(self, commands: int) -> None:
        if os.read(commands, 4096):
            print(json.dumps({"answered": len(self.trace.answered)}), flush=True)
            return
        self._stopping = True
        self._epoll.unregister(commands)
        if self._ticks:
            self._epoll.unregister(self._ticks)

    def _ask(self, client: _Client, due: float) -> None:
        """Send the request that is due, over a new connection where there is none."""
        client.due = due
        client.is_asking = True
        client.received = b""
        try:
            if client.socket is None:
                self._connect(client)
            client.sent = time.monotonic()
            assert client.socket is not None
            client.socket.send(self._request)
        except BlockingIOError:  # the connection is not there yet
            assert client.socket is not None
            self._epoll.modify(client.socket, select.EPOLLOUT)
        except OSError as error:
            self._end(client, error)

    def _connect(self, client: _Client) -> None:
        client.is_used = False
        client.socket = socket.socket()
        client.socket.setblocking(False)
        client.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._by_fd[client.socket.fileno()] = client
        self._epoll.register(client.socket, select.EPOLLIN)
        with contextlib.suppress(BlockingIOError):
            client.socket.connect((self._plan.host, self._plan.port))

    def _attend(self, client: _Client, events: int) -> None:
        """Take what has come for a client."""
        assert client.socket is not None
        try:
            if events & select.EPOLLOUT:
                self._epoll.modify(client.socket, select.EPOLLIN)
                client.socket.send(self._request)
                return
            data = client.socket.recv(65536)
        except BlockingIOError:  # what was reported was another connection's, with the same number, before this one
            return
        except OSError as error:
            self._end(client, error)
            return
        if not data:
            self._end(client, None)
            return
        if not client.is_asking:
            self._fail(client, UNASKED)
            return
        client.received = received = client.received + data if client.received else data
        try:
            answer = self._known.get(received) or self._parse(received)
        except WrongAnswerError as error:
            self._fail(client, str(error))
            return
        if answer is not None:
            self._count(client, answer)

    def _parse(self, received: bytes) -> Answer | None:
        answer = parse(received)
        if answer is None:
            return None
        if len(self._known) >= _KNOWN:
            self._known.clear()
        self._known[received] = answer
        return answer

    def _count(self, client: _Client, answer: Answer) -> None:
        now = time.monotonic()
        trace = self.trace
        trace.due.append(client.due)
        trace.sent.append(client.sent)
        trace.answered.append(now)
        if answer.version not in trace.versions:
            trace.versions[answer.version] = now
            print(json.dumps({"version": answer.version, "at": now}), flush=True)
        client.is_asking = False
        client.is_used = True
        client.received = b""
        client.is_ending = not self._plan.keeps or answer.says_end
        if not client.is_ending:
            self._go_on(client, now)

    def _end(self, client: _Client, error: OSError | None) -> None:
        """Take the end of a connection for what it is."""
        now = time.monotonic()
        kind = NONE if error is None else _KINDS.get(error.errno or 0, type(error).__name__)
        received, is_ending = client.received, client.is_ending
        self._drop(client)
        if is_ending:
            self.trace.resets += kind == RESET
            self._go_on(client, now)
        elif not client.is_asking:
            self.trace.closed.append(Failure(now, IDLE))
        elif received:
            self._fail(client, CUT)
        elif client.is_used and kind in {NONE, RESET}:
            self.trace.closed.append(Failure(now, ASKED))
            self._ask(client, client.due)
        else:
            self._fail(client, kind)

    def _fail(self, client: _Client, kind: str) -> None:
        now = time.monotonic()
        self.trace.failures.append(Failure(now, kind))
        is_free = not client.is_asking and not client.is_ending
        self._drop(client)
        client.is_asking = False
        if is_free:
            return
        if self._ticks:
            self._go_on(client, now)
        else:
            self._resting.append((now + REST, client))

    def _go_on(self, client: _Client, now: float) -> None:
        if self._stopping:
            self._drop(client)
        elif self._ticks is None:
            self._ask(client, now)
        elif len(self._free) < self._plan.clients:
            self._free.append(client)
        else:  # it was a further one
            self._drop(client)

    def _drop(self, client: _Client) -> None:
        if client.socket is not None:
            del self._by_fd[client.socket.fileno()]
            client.socket.close()
            client.socket = None
        client.received = b""
        client.is_ending = False

    def _sweep(self, now: float) -> None:
        for client in list(self._by_fd.values()):
            if client.due + self._plan.patience <= now and (client.is_asking or client.is_ending):
                self._fail(client, LATE if client.is_asking else UNENDED)


class Load:
    """A generator as a process of its own, so that it and the peer's driver do not slow each other down."""

    def __init__(self, plan: Plan) -> None:
        """Start the generator."""
        self._directory = tempfile.TemporaryDirectory()
        self._path = Path(self._directory.name) / "trace"
        self._process = subprocess.Popen(
            [sys.executable, "-m", "bench.generator", json.dumps(dataclasses.asdict(plan)), self._path],
            cwd=Path(__file__).resolve().parent.parent,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self._patience = plan.patience
        self._news = threading.Condition()
        self._versions: dict[str, float] = {}
        self._answered: queue.SimpleQueue[int] = queue.SimpleQueue()
        self._reader = threading.Thread(target=self._read)
        self._reader.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        with self._directory:
            self._process.kill()
            self._end()

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            news = json.loads(line)
            if "answered" in news:
                self._answered.put(news["answered"])
                continue
            with self._news:
                self._versions[news["version"]] = news["at"]
                self._news.notify_all()

    def first_answer(self, version: str) -> float:
        """Wait for the first answer of a version, and return when it came. Raises TimeoutError."""
        with self._news:
            if not self._news.wait_for(lambda: version in self._versions, self._patience):
                raise TimeoutError(f"version {version} has answered none of the clients in {self._patience} s")
            return self._versions[version]

    def answered(self) -> int:
        """Return how many answers there are."""
        assert self._process.stdin is not None
        self._process.stdin.write("\n")
        self._process.stdin.flush()
        return self._answered.get(timeout=self._patience)

    def stop(self) -> Trace:
        """End the generator, and return what it saw."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(self._patience + 3 * MOST_TIME)  # the last answers are awaited, then all is saved
        self._end()
        return Trace.load(self._path)

    def _end(self) -> None:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.wait()
        self._reader.join()
        self._process.stdin.close()
        self._process.stdout.close()


def main() -> None:
    """Generate load as the argument says, until the standard input ends."""
    with contextlib.suppress(PermissionError):  # clients elsewhere would not wait for a core that the peer has
        os.setpriority(os.PRIO_PROCESS, 0, PRIORITY)
    gc.disable()  # nothing here is circular, and a pause would be taken for the peer's
    generator = Generator(Plan(**json.loads(sys.argv[1])))
    generator.run(sys.stdin.fileno())
    generator.trace.save(Path(sys.argv[2]))


if __name__ == "__main__":
    main()
