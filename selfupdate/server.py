"""An HTTP/1.1 server, with `http.server`'s parser, that can be paused, resumed and drained.

One thread, the loop, waits for everything that can arrive: connections on the
listeners, and the next request on each open connection. It answers what the
application has at hand. With any other request that is complete, a connection
goes to one of a fixed number of workers, which parses it, calls the application,
writes the answer, and gives the connection back. So neither an idle connection
nor a slow client costs a thread. The loop alone owns the connections; others ask
it to act by `_call`, and wait for it.

Pausing means: no connection is accepted, and each open one is closed behind its
next answer, which says so (`Connection: close`). What `http.server` does by
default and a handover can't live with: a listener that blocks in accept(2), a
backlog of 5, a thread for each connection without bound, threads that are
dropped with a request under way, reads without time limits, and a name server
that is asked when it binds.
"""

from __future__ import annotations

import collections
import contextlib
import errno
import functools
import logging
import math
import queue
import selectors
import socket
import threading
import time
from typing import TYPE_CHECKING

from selfupdate.connection import Connection
from selfupdate.crowd import Crowd
from selfupdate.listener import BACKLOG
from selfupdate.messages import Request, Response, problem
from selfupdate.streams import Streams

if TYPE_CHECKING:
    from collections.abc import Callable, Collection

    from selfupdate.settings import Limits

_log = logging.getLogger(__name__)

_ACCEPTS_AT_ONCE = 64
"""Connections accepted before the loop looks at the others again."""
_NO_ROOM_TIME = 0.1
"""Seconds until accepting is tried again where there was no room: the kernel does not tell when there is."""


class Server:
    """Serves an application on listeners, once told to accept."""

    def __init__(
        self,
        name: str,
        application: Callable[[Request], Response],
        limits: Limits,
        at_hand: Collection[str] = (),
    ) -> None:
        """Start the loop of a server that does not accept yet; `name` is for its threads.

        The application's answer to a GET of a path that is `at_hand`, which may become more, waits for nothing and
        takes next to no time.
        """
        self._at_hand = at_hand
        self.limits = limits
        self.ends_connections = False
        """Whether each connection is closed behind its next answer."""
        self._application = application
        self._follower: Callable[[str, str | None, int, float], None] | None = None
        self._listeners: collections.deque[socket.socket] = collections.deque()
        """The one that was accepted on last comes last: when there is no room, the others are first to get some."""
        self._accepting = False
        self._closing = False
        self._selector = selectors.DefaultSelector()
        self._wake_in, self._wake_out = socket.socketpair()
        self._wake_in.setblocking(False)
        self._wake_out.setblocking(False)
        self._selector.register(self._wake_out, selectors.EVENT_READ)
        self._calls: collections.deque[Callable[[], None]] = collections.deque()
        self._crowd = Crowd(self._selector, limits)
        self._streams = Streams(self._selector, self._crowd)
        # When something is due, of `time.monotonic()`.
        self._drain_deadline = math.inf
        self._no_room_until = math.inf
        self._next_beat = math.inf
        self._drained = False
        self._beat: Callable[[], None] = lambda: None
        self._beat_interval = 0.0
        self._empty = threading.Event()
        self._empty.set()
        self._stopped = False
        self._ready: queue.SimpleQueue[Connection | None] = queue.SimpleQueue()
        self._date = (0, "")
        self._workers = 0
        self._name = name
        self._thread = threading.Thread(target=self._loop, name=name, daemon=True)
        self._thread.start()

    # What others ask for. Each returns when it is done.

    def accept(self, *listeners: socket.socket) -> None:
        """Accept on `listeners`, which are non-blocking, and no others, and close them in the end."""

        def begin() -> None:
            self._accept_no_more()
            self._listeners = collections.deque(listeners)
            self._resume()

        self._call(begin)

    def end_connections(self) -> None:
        """From now on, close each connection behind its next answer."""
        self.ends_connections = True

    def pause(self, drain: float) -> None:
        """Accept no more; close each connection behind its next answer, and all after `drain` seconds."""
        self._call(lambda: self._pause(drain))

    def release(self, drain: float) -> None:
        """Pause, and close the listeners: their addresses are free for another process.

        The connections that wait in the listeners' queues are taken first; they would be reset.
        """

        def release() -> None:
            self._accept_all_that_wait()
            self._pause(drain)
            self._close_listeners()

        self._call(release)

    @property
    def has_listeners(self) -> bool:
        """Whether there is something to resume on."""
        return bool(self._listeners)

    def resume(self) -> None:
        """Accept again on the listeners that were kept."""
        self._call(self._resume)

    def advance_streams(self) -> None:
        """Have each stream say what is new; returns at once."""
        self._post(self._streams.advance_all)

    def beat(self, interval: float, act: Callable[[], None]) -> None:
        """Have the loop `act` every `interval` seconds, so that whoever misses that knows that it hangs."""

        def begin() -> None:
            self._beat, self._beat_interval, self._next_beat = act, interval, time.monotonic()

        self._call(begin)

    def follow(self, follower: Callable[[str, str | None, int, float], None]) -> None:
        """Call `follower` before each answer is written, in whichever thread writes it.

        With the request's method, or what came in its place; its path, or None where the application was not asked;
        the status; and the seconds that the answer took.
        """
        self._follower = follower

    def connections(self) -> dict[str, int]:
        """Return how many connections are open, by what they wait for; from any thread."""
        return self._crowd.count()

    def wait_until_empty(self) -> None:
        """Wait until the last connection has ended; after `pause`, that has a bound."""
        self._empty.wait()

    def close(self, drain: float) -> None:
        """Stop for good: take nothing new, answer within `drain` seconds what is under way.

        Connections that wait in the listeners' queues are under way, too, unless the server is
        paused: then the queues are another process's to serve.
        """
        if self._stopped:
            return
        deadline = time.monotonic() + drain
        self._call(self._begin_close)
        self._empty.wait(max(0.0, deadline - time.monotonic()))

        def stop() -> None:
            self._crowd.cut()
            self._stopped = True

        self._call(stop)
        self._thread.join()
        self._run_calls()
        for _ in range(self._workers):
            self._ready.put(None)
        self._selector.close()
        self._wake_in.close()
        self._wake_out.close()

    # What the connections use.

    def is_at_hand(self, path: str) -> bool:
        """Tell whether the answer to a GET takes no time worth a thread."""
        return path in self._at_hand

    def respond(self, request: Request) -> Response:
        """Return the application's answer; an exception is a defect, logged, and a 500."""
        try:
            return self._application(request)
        except Exception:  # noqa: BLE001 - whatever it was, the client gets an answer
            _log.exception("a request failed", extra={"method": request.method, "path": request.path})
            return problem(500, "This request met a defect in the program; its log says more.")

    def answers(self, method: str, path: str | None, status: int, seconds: float) -> None:
        """Tell of an answer that is about to be written."""
        if self._follower:
            self._follower(method, path, status, seconds)

    def date(self) -> str:
        """Return the Date field, formatted once a second."""
        now = int(time.time())
        if self._date[0] != now:
            self._date = (now, time.strftime("%a, %d %b %Y %H:%M:%S GMT", time.gmtime(now)))
        return self._date[1]

    # The loop's own.

    def _loop(self) -> None:
        while not self._stopped:
            for key, events in self._selector.select(self._timeout()):
                if key.fileobj is self._wake_out:
                    self._wake_out.recv(4096)
                    self._run_calls()
                elif isinstance(key.fileobj, Connection):
                    self._attend_to(key.fileobj, events)
                elif self._accepting and isinstance(key.fileobj, socket.socket):
                    self._accept_waiting(key.fileobj, _ACCEPTS_AT_ONCE)
            self._expire(time.monotonic())
            if not self._crowd:
                self._empty.set()

    def _timeout(self) -> float | None:
        due = min(self._crowd.next_deadline(), self._drain_deadline, self._no_room_until, self._next_beat)
        return None if due == math.inf else max(0.0, due - time.monotonic())

    def _call(self, act: Callable[[], None]) -> None:
        """Have the loop `act`, and wait until it has."""
        done = threading.Event()

        def run() -> None:
            act()
            done.set()

        self._post(run)
        done.wait()

    def _post(self, act: Callable[[], None]) -> None:
        self._calls.append(act)
        with contextlib.suppress(OSError):  # a full pipe wakes the loop, too; a closed one has no loop
            self._wake_in.send(b"\0")

    def _run_calls(self) -> None:
        with contextlib.suppress(IndexError):  # when the loop has ended, several threads may run what is left
            while True:
                self._calls.popleft()()

    def _pause(self, drain: float) -> None:
        self._accept_no_more()
        self.ends_connections = True
        self._drain_deadline = time.monotonic() + drain
        self._streams.end_all()

    def _resume(self) -> None:
        if not self._listeners or self._closing:
            return
        for listener in self._listeners:
            listener.listen(BACKLOG)  # whoever shared it may have called shutdown(2)
        self.ends_connections = False
        self._drained = False
        self._drain_deadline = math.inf
        self._no_room_until = math.inf
        if not self._accepting:
            self._accepting = True
            for listener in self._listeners:
                self._selector.register(listener, selectors.EVENT_READ)

    def _accept_no_more(self) -> None:
        if self._accepting:
            for listener in self._listeners:
                self._selector.unregister(listener)
        self._accepting = False
        self._no_room_until = math.inf

    def _wait_for_room(self) -> None:
        self._accept_no_more()
        self._no_room_until = time.monotonic() + _NO_ROOM_TIME

    def _close_listeners(self) -> None:
        while self._listeners:
            self._listeners.pop().close()

    def _accept_all_that_wait(self) -> None:
        if self._accepting or self._no_room_until < math.inf:
            for listener in tuple(self._listeners):
                self._accept_waiting(listener, None)

    def _accept_waiting(self, listener: socket.socket, count: int | None) -> None:
        """Accept at most `count` connections, as long as there is room; without `count`, all that wait."""
        while count is None or count > 0:
            if count is not None and not self._crowd.has_room(self.limits.connections):
                self._wait_for_room()
                return
            try:
                # Whether it blocks belongs to all who share it: a candidate may have changed that.
                listener.setblocking(False)
                connection, _ = listener.accept()
            except BlockingIOError:
                return
            except ConnectionAbortedError:  # the client left while it waited
                continue
            except OSError as error:
                if error.errno == errno.EINVAL:  # as in _resume
                    listener.listen(BACKLOG)
                else:  # no descriptors or no memory
                    self._wait_for_room()
                return
            if self._listeners[-1] is not listener:
                self._listeners.remove(listener)
                self._listeners.append(listener)
            if connection.family in {socket.AF_INET, socket.AF_INET6}:
                connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            connection.setblocking(False)
            self._empty.clear()
            self._welcome(Connection(connection, self))
            if count is not None:
                count -= 1

    def _welcome(self, connection: Connection) -> None:
        """Attend to a new connection, on which the first request may have arrived already."""
        if connection.collect():
            self._serve(connection)
        else:
            self._crowd.put(connection, self._crowd.receiving)

    def _wait_for_more(self, connection: Connection) -> None:
        self._crowd.put(connection, self._crowd.receiving if connection.has_begun else self._crowd.idle)

    def _attend_to(self, connection: Connection, events: int) -> None:
        """Do what can be done now for a connection on which something has arrived, or may be sent."""
        crowd = self._crowd
        waits_for = crowd.where.get(connection)
        if waits_for is crowd.idle or waits_for is crowd.receiving:
            if connection.collect():
                self._serve(connection)
            elif waits_for is crowd.idle:  # else its time goes on
                self._wait_for_more(connection)
        elif waits_for is crowd.streaming:
            self._streams.attend_to(connection, events)
        elif waits_for is crowd.closing and connection.has_left():  # else it was dropped since the selector saw it
            crowd.drop(connection)

    def _serve(self, connection: Connection) -> None:
        """Answer what has arrived at once, if its answer is at hand; leave all else to a worker."""
        if connection.is_over:
            self._crowd.drop(connection)
            return
        try:
            is_served = connection.serve_at_once()
        except Exception:  # noqa: BLE001 - as in _work
            _log.exception("a connection met a defect")
            is_served = connection.close_connection = True
        if is_served:
            self._go_on(connection)
        else:
            self._hand_to_worker(connection)

    def _go_on(self, connection: Connection) -> None:
        """Do what comes behind an answer."""
        if connection.stream is not None:
            self._streams.begin(connection, ends=self.ends_connections)
        elif connection.close_connection or self._drained:
            self._crowd.part_from(connection)
        else:
            self._wait_for_more(connection)

    def _hand_to_worker(self, connection: Connection) -> None:
        self._crowd.put(connection, self._crowd.busy)
        # Each worker that there is may have something to do.
        if self._workers < min(len(self._crowd.busy), self.limits.threads):
            threading.Thread(target=self._work, name=f"{self._name}-{self._workers}", daemon=True).start()
            self._workers += 1
        self._ready.put(connection)

    def _give_back(self, connection: Connection) -> None:
        if self._stopped:
            self._crowd.drop(connection)
        else:
            connection.connection.setblocking(False)
            self._go_on(connection)

    def _expire(self, now: float) -> None:
        for connection in self._crowd.expired(now):
            self._end_wait(connection)
        if self._drain_deadline <= now:
            self._drain_deadline = math.inf
            self._drained = True
            if self._closing:
                self._crowd.drop_silent()
            else:
                self._crowd.cut()
        if self._no_room_until <= now:
            self._resume()
        if self._next_beat <= now:
            self._beat()
            self._next_beat = now + self._beat_interval

    def _end_wait(self, connection: Connection) -> None:
        """Do what is due for a connection whose time is over."""
        waits_for = self._crowd.where[connection]
        if waits_for is self._crowd.streaming:
            self._streams.show_life(connection)
        elif waits_for is self._crowd.receiving and connection.has_begun:
            self._hand_to_worker(connection)
        else:
            self._crowd.drop(connection)

    def _begin_close(self) -> None:
        """Take what waits, close the listeners, and let each client that is about to ask get its answer.

        An open connection may have a request on its way, which nothing tells: a client that is active
        asks again within `last_call_time`, and its answer tells it that the connection ends.
        """
        self._accept_all_that_wait()
        self._accept_no_more()
        self._close_listeners()
        self.ends_connections = self._closing = True
        self._drain_deadline = time.monotonic() + self.limits.last_call_time
        self._streams.end_all()

    # The workers' own.

    def _work(self) -> None:
        while (connection := self._ready.get()) is not None:
            try:
                connection.serve()
            except Exception:  # noqa: BLE001 - whatever it was, the others are served
                _log.exception("a connection met a defect")
                connection.close_connection = True
            self._post(functools.partial(self._give_back, connection))
            if self._stopped:
                self._run_calls()
