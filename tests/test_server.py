"""The HTTP server on its own: framing, time limits, and pause, resume and drain."""

from __future__ import annotations

import contextlib
import itertools
import re
import socket
import struct
import subprocess
import sys
import threading
import time
from typing import TYPE_CHECKING

import pytest
from build import ROOT
from service import PATIENCE

from selfupdate import listener as listeners
from selfupdate.listener import Address
from selfupdate.messages import Request, Response, json_response
from selfupdate.server import Server
from selfupdate.settings import Limits

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

GET = b"GET /x HTTP/1.1\r\nHost: localhost\r\n\r\n"
_NUMBERS = itertools.count()

BIG = 16 << 20
"""Bytes of an answer that no client's kernel takes at once."""
CLOSE = b"\r\nConnection: close\r\n"


class Site:
    """A server with an application that echoes, or waits where a test holds it."""

    def __init__(self, limits: Limits) -> None:
        self.gate = threading.Event()
        self.entered = threading.Semaphore(0)
        self.asked: list[str] = []
        """The path of each request, in the order in which they came to be answered."""
        self.name = f"server {next(_NUMBERS)}"
        self.server = Server(self.name, self.answer, limits, at_hand={"/hand", "/big", "/defect"})
        self.listener = listeners.bind(Address("localhost", 0))
        self.address: tuple[str, int] = self.listener.getsockname()
        self.server.accept(self.listener)

    def answer(self, request: Request) -> Response:
        self.asked.append(request.path)
        if request.path == "/wait":
            self.entered.release()
            assert self.gate.wait(PATIENCE)
        if request.path == "/big":
            return Response(200, b"x" * BIG)
        if request.path == "/defect":
            raise OSError("a defect")
        return json_response({"method": request.method, "path": request.path, "body": request.body.decode()})

    def connect(self) -> socket.socket:
        return socket.create_connection(self.address, PATIENCE)

    def ask(self, raw: bytes) -> bytes:
        """Send `raw`, and return all that is answered until the connection ends."""
        with self.connect() as client:
            client.sendall(raw)
            return read_all(client)


def read_all(client: socket.socket) -> bytes:
    answer = b""
    while chunk := client.recv(65536):
        answer += chunk
    return answer


def read_one(client: socket.socket) -> bytes:
    """Read one answer of a connection that lives on."""
    answer = b""
    while not answer.endswith(b"}\n"):
        chunk = client.recv(65536)
        assert chunk, answer
        answer += chunk
    return answer


@pytest.fixture
def make() -> Iterator[Callable[..., Site]]:
    """Make servers, each closed with the test."""
    sites: list[Site] = []

    def make(**limits: float) -> Site:
        sites.append(Site(Limits(**limits)))  # type: ignore[arg-type]  # whole numbers where they are due
        return sites[-1]

    yield make
    for site in sites:
        site.gate.set()
        site.server.close(0)
        assert not [thread for thread in threading.enumerate() if thread.name == site.name]


@pytest.mark.parametrize(
    ("raw", "status"),
    [
        (b"GET /x HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n", 200),
        (b"GET /x HTTP/1.0\r\n\r\n", 200),
        (b"HEAD /x HTTP/1.0\r\n\r\n", 200),
        (b"POST /x HTTP/1.1\r\nHost: a\r\nContent-Length: 3\r\nConnection: close\r\n\r\nabc", 200),
        (b"GET /x HTTP/1.1\r\nHost: a\r\nHost: b\r\n\r\n", 400),
        (b"GET /x HTTP/1.1\r\n\r\n", 400),
        (b"GET /x HTTP/1.1\r\nHost : a\r\n\r\n", 400),
        (b"POST /x HTTP/1.1\r\nHost: a\r\nContent-Length: 3\r\nContent-Length: 4\r\n\r\nabcd", 400),
        (b"POST /x HTTP/1.1\r\nHost: a\r\nContent-Length: -1\r\n\r\n", 400),
        (b"POST /x HTTP/1.1\r\nHost: a\r\nContent-Length: +4\r\n\r\nabcd", 400),
        (b"POST /x HTTP/1.1\r\nHost: a\r\nContent-Length: 1_0\r\n\r\nabcdefghij", 400),
        (b"POST /x HTTP/1.1\r\nHost: a\r\nContent-Length: 99999999999\r\n\r\n", 413),
        (b"POST /x HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n", 501),
        (b"GET /x HTTP/1.1\r\nHost: a\r\nContent-Length: 36\r\n\r\nGET /smuggled HTTP/1.1\r\nHost: a\r\n\r\n", 400),
        (b"GET /x HTTP/1.0\r\nContent-Type: multipart/form-data; boundary*=undefined''x\r\n\r\n", 200),
        (b"GET /x HTTP/1.0\r\nContent-Type: multipart/x; b*1=u; b*=u\r\n\r\n", 200),
        (b"GET /x HTTP/1.0\r\nContent-Type: message/delivery-status\r\n\r\n", 200),
        (b"GET /x HTTP/1.1\r\nHost: a\r\nFrom a\r\n\r\n", 400),
        (b"GET /x HTTP/1.1\r\nHost: a\r\n: a\r\n\r\n", 400),
        (b"GET /x HTTP/0.9\r\nHost: a\r\n\r\n", 400),
        (b"GET /" + b"x" * 2048 + b" HTTP/1.1\r\nHost: a\r\n\r\n", 414),
        (b"GET /x HTTP/1.0\r\nContent-Type: multipart/form-data; boundary=x\r\n\r\n", 200),
        (b"nonsense\r\n\r\n", 400),
        (b"GET /x\r\n\r\n", 400),
        (b"GET http://a/x HTTP/1.1\r\nHost: a\r\n\r\n", 400),
        (b"GET /\x1b HTTP/1.1\r\nHost: a\r\n\r\n", 400),
        (b"GET /\xff HTTP/1.1\r\nHost: a\r\n\r\n", 400),
        (b"GET /x HTTP/1.1\r\nHost: a\r\nX: a\rHost: b\r\n\r\n", 400),
        (b"GET /x HTTP/1.1\r\nHost: a\r\nX: a\0\r\n\r\n", 400),
        (b"GET /x HTTP/1.1\r\nHost: a\r\nX: a\r\n b\r\n\r\n", 400),
        (b"GET /x HTTP/1.1\r\nHost: a\r\nOrigin: http://b\r\nOrigin: http://a\r\n\r\n", 400),
        (b"POST /x HTTP/1.1\r\nHost: a\r\nExpect: 100-continue\r\nContent-Length: 999999\r\n\r\n", 413),
        (b"\r\nGET /x HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n", 200),
        (b"GET /x HTTP/9.9\r\n\r\n", 505),
        (b"GET /" + b"x" * 70000 + b" HTTP/1.1\r\n\r\n", 414),
        (b"GET /x HTTP/1.1\r\n" + b"A: b\r\n" * 101 + b"\r\n", 431),
        (b"GET /x HTTP/1.1\r\nA: " + b"b" * 70000 + b"\r\n\r\n", 431),
        (b"GET /defect HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n", 500),
    ],
)
def test_one_request_gets_one_answer(make: Callable[..., Site], raw: bytes, status: int) -> None:
    """What is not certain about a request's end is refused, and the connection closed: nothing is smuggled."""
    answer = make().ask(raw)
    assert answer.startswith(b"HTTP/1.1 %d " % status)
    assert len(re.findall(rb"HTTP/1\.1 [0-9]{3} ", answer)) == 1
    assert CLOSE in answer
    assert b"Python" not in answer
    assert (b"application/problem+json" in answer) == (status != 200)
    if raw.startswith(b"HEAD"):
        assert answer.endswith(b"\r\n\r\n")


def test_a_connection_serves_many_requests(make: Callable[..., Site]) -> None:
    """Kept alive, and pipelined, with answers in order."""
    site = make()
    with site.connect() as client:
        for _ in range(3):
            client.sendall(GET)
            assert read_one(client).startswith(b"HTTP/1.1 200 ")
        client.sendall(b"GET /1 HTTP/1.1\r\nHost: a\r\n\r\nGET /2 HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n")
        answer = read_all(client)
    assert answer.index(b'"/1"') < answer.index(b'"/2"')


@pytest.mark.parametrize(
    ("sent", "answered"),
    [
        (b"", b""),
        (b"GET /x HT", b"HTTP/1.1 408 "),
        (b"GET /x HTTP/1.1\r\nHost", b"HTTP/1.1 408 "),
        (b"POST /x HTTP/1.1\r\nHost: a\r\nContent-Length: 9\r\n\r\nabc", b"HTTP/1.1 408 "),
        (b"POST /x HTTP/1.1\r\nHost: a\r\nExpect: 100-continue\r\nContent-Length: 9\r\n\r\n", b"HTTP/1.1 100 "),
    ],
    ids=["idle", "request-line", "head", "body", "awaited-body"],
)
def test_a_client_that_does_not_finish_is_cut_off(make: Callable[..., Site], sent: bytes, answered: bytes) -> None:
    """Idle connections, heads and bodies have time limits."""
    site = make(idle_time=0.2, request_time=0.2, body_time=0.2)
    site.server.pause(PATIENCE)  # its time begins when it has sent all that it will
    with site.connect() as client:
        client.sendall(sent)
        site.server.resume()
        assert read_all(client).startswith(answered)


def test_a_client_that_drips_is_cut_off(make: Callable[..., Site]) -> None:
    """The limit is for the whole head: each piece of it does not begin the time anew."""
    site = make(request_time=0.5)
    began = time.monotonic()
    with site.connect() as client:
        client.settimeout(0.1)  # the pace of the drip
        received = b""
        while not received and time.monotonic() < began + PATIENCE:
            client.sendall(b"G")
            with contextlib.suppress(TimeoutError):
                received = client.recv(65536)
    assert received.startswith(b"HTTP/1.1 408 ")


def test_threads_are_bounded_and_all_are_served(make: Callable[..., Site]) -> None:
    """More requests than threads wait for one; idle connections need none."""
    site = make(threads=3)
    with contextlib.ExitStack() as clients:
        for _ in range(50):
            clients.enter_context(site.connect())
        waiting = [clients.enter_context(site.connect()) for _ in range(10)]
        for client in waiting:
            client.sendall(b"GET /wait HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n")
        for _ in range(3):
            assert site.entered.acquire(timeout=PATIENCE)
        workers = [thread for thread in threading.enumerate() if thread.name.startswith(f"{site.name}-")]
        assert len(workers) == 3
        site.gate.set()
        for client in waiting:
            assert read_all(client).startswith(b"HTTP/1.1 200 ")


def test_slow_clients_cost_no_worker(make: Callable[..., Site]) -> None:
    """Many that have begun a request and do not go on keep nobody waiting."""
    site = make(threads=1)
    with contextlib.ExitStack() as clients:
        for beginning in (
            b"G",
            b"GET /x HTTP/1.1\r\nHo",
            b"POST /x HTTP/1.1\r\nHost: a\r\nContent-Length: 9\r\n\r\nab",
        ):
            for _ in range(20):
                clients.enter_context(site.connect()).sendall(beginning)
        assert b"200 OK" in site.ask(GET.replace(b"\r\n\r\n", b"\r\nConnection: close\r\n\r\n"))


def test_new_clients_find_room_among_idle_ones(make: Callable[..., Site]) -> None:
    """At the bound of connections, the one that was idle longest makes room."""
    site = make(connections=5)
    with contextlib.ExitStack() as clients:
        for _ in range(20):
            client = clients.enter_context(site.connect())
            client.sendall(GET)
            read_one(client)
        assert b"HTTP/1.1 200 " in site.ask(GET.replace(b"\r\n\r\n", b"\r\nConnection: close\r\n\r\n"))


def test_pause_lets_connections_wait_and_resume_serves_them(make: Callable[..., Site]) -> None:
    """While it is paused nothing is accepted, none is refused, and kept connections are told that they end."""
    site = make()
    with site.connect() as kept, site.connect() as busy:
        kept.sendall(GET)
        assert CLOSE not in read_one(kept)
        busy.sendall(GET.replace(b"/x", b"/wait"))
        assert site.entered.acquire(timeout=PATIENCE)
        site.server.pause(drain=PATIENCE)
        with site.connect() as waiting:
            waiting.sendall(GET)
            kept.sendall(GET)
            assert CLOSE in read_all(kept)
            site.gate.set()
            assert CLOSE in read_all(busy)
            waiting.settimeout(0.1)
            with pytest.raises(TimeoutError):
                waiting.recv(1)
            waiting.settimeout(PATIENCE)
            site.server.resume()
            assert CLOSE not in read_one(waiting)


def test_drain_ends_with_its_time(make: Callable[..., Site]) -> None:
    """Connections that stay silent are closed when the drain time is over, and the server is empty."""
    site = make()
    with site.connect() as silent:
        silent.sendall(GET)
        read_one(silent)
        site.server.pause(drain=0.2)
        assert silent.recv(1) == b""
        site.server.wait_until_empty()


def test_release_frees_the_address(make: Callable[..., Site]) -> None:
    """Another process can bind at once; what waited is served first."""
    site = make()
    with site.connect() as waiting:
        site.server.release(drain=PATIENCE)
        successor = listeners.bind(Address(*site.address))
        waiting.sendall(GET)
        assert CLOSE in read_all(waiting)
        site.server.accept(successor)
        with site.connect() as client:
            client.sendall(GET)
            read_one(client)


def test_close_serves_what_has_arrived(make: Callable[..., Site]) -> None:
    """Requests under way, in the queue, and just behind the last answer are answered; then nobody listens."""
    site = make(last_call_time=5.0)
    with site.connect() as kept, site.connect() as busy:
        kept.sendall(GET)
        read_one(kept)
        busy.sendall(GET.replace(b"/x", b"/wait"))
        assert site.entered.acquire(timeout=PATIENCE)
        closing = threading.Thread(target=site.server.close, args=(PATIENCE,))
        with site.connect() as queued:
            queued.sendall(GET)
            closing.start()
            kept.sendall(GET)
            assert b"200 OK" in read_all(kept)
            assert b"200 OK" in read_one(queued)  # a client that asks early may stay for the last call
        site.gate.set()
        assert CLOSE in read_all(busy)
        closing.join(PATIENCE)
    with pytest.raises(ConnectionRefusedError):
        site.connect()


def test_clients_that_reset_harm_nobody(make: Callable[..., Site]) -> None:
    """A client may leave at any moment, with its answer unread."""
    site = make(threads=2)
    for _ in range(200):
        with site.connect() as client:
            client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            client.sendall(GET)
    assert b"200 OK" in site.ask(GET.replace(b"\r\n\r\n", b"\r\nConnection: close\r\n\r\n"))


def test_requests_that_waited_find_room(make: Callable[..., Site]) -> None:
    """More connections than there may be, each with its request sent, are all answered: those without room wait."""
    site = make(connections=60, threads=2)
    site.server.pause(PATIENCE)
    with contextlib.ExitStack() as clients:
        waiting = [clients.enter_context(site.connect()) for _ in range(100)]
        for client in waiting:
            client.sendall(GET.replace(b"\r\n\r\n", b"\r\nConnection: close\r\n\r\n"))
        site.server.resume()
        for client in waiting:
            assert b"200 OK" in read_all(client)
            client.close()


def test_the_last_answer_is_not_lost_to_a_reset(make: Callable[..., Site]) -> None:
    """A client that still sends when the connection is closed gets its answer first."""
    site = make()
    for _ in range(50):
        with site.connect() as client:
            client.sendall(b"POST /x HTTP/1.1\r\nHost: a\r\nContent-Length: 99999999\r\n\r\n" + b"x" * 60000)
            assert read_all(client).startswith(b"HTTP/1.1 413 ")


def test_several_listeners_are_served_alike(make: Callable[..., Site], tmp_path: Path) -> None:
    """Accepting, pausing, resuming and closing mean all of them, whatever their kind."""
    site = make()
    path = Address(path=str(tmp_path / "s"))
    site.server.accept(site.listener, listeners.bind(path))
    ask = GET.replace(b"\r\n\r\n", b"\r\nConnection: close\r\n\r\n")
    for _ in range(2):
        with site.connect() as one, listeners.connect(path, PATIENCE) as other:
            for client in (one, other):
                client.sendall(ask)
                assert b"200 OK" in read_all(client)
        site.server.pause(PATIENCE)
        with site.connect() as one, listeners.connect(path, PATIENCE) as other:
            for client in (one, other):
                client.sendall(ask)
                client.settimeout(0.1)
                with pytest.raises(TimeoutError):
                    client.recv(1)
                client.settimeout(PATIENCE)
            site.server.resume()
            for client in (one, other):
                assert b"200 OK" in read_all(client)
    with site.connect() as one, listeners.connect(path, PATIENCE) as other:
        site.server.release(PATIENCE)
        for client in (one, other):
            client.sendall(ask)
            assert b"200 OK" in read_all(client)
        with pytest.raises(ConnectionRefusedError):
            site.connect()
        with pytest.raises(ConnectionRefusedError):
            listeners.connect(path, PATIENCE)


def test_a_crowd_on_one_listener_leaves_room_for_another(make: Callable[..., Site]) -> None:
    """When there is no more room, what becomes free goes to each listener in turn."""
    site = make(connections=4, threads=2, linger_time=0.2)
    quiet = listeners.bind(Address("localhost", 0))
    quiet_address = quiet.getsockname()
    site.server.accept(site.listener, quiet)
    ask = GET.replace(b"\r\n\r\n", b"\r\nConnection: close\r\n\r\n")
    site.server.pause(PATIENCE)
    with contextlib.ExitStack() as clients:
        crowd = [clients.enter_context(site.connect()) for _ in range(100)]
        for client in crowd:
            client.sendall(ask)
        alone = clients.enter_context(socket.create_connection(quiet_address, PATIENCE))
        alone.sendall(ask.replace(b"/x", b"/alone"))
        site.server.resume()
        assert b"200 OK" in read_all(alone)
        assert site.asked.index("/alone") <= 3 * site.server.limits.connections
        for client in crowd:
            assert b"200 OK" in read_all(client)
            client.close()


def test_room_is_made_for_connections() -> None:
    """Up to the hard limit of descriptors, with some left for all else; nothing is taken away."""
    say = """
import resource, sys
from selfupdate import posix
for soft in (100, 264, 300):
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))
    print(posix.make_room(200), resource.getrlimit(resource.RLIMIT_NOFILE)[0])
resource.setrlimit(resource.RLIMIT_NOFILE, (100, 150))
print(posix.make_room(200), resource.getrlimit(resource.RLIMIT_NOFILE)[0])
"""
    ran = subprocess.run([sys.executable, "-c", say], capture_output=True, text=True, check=True, cwd=ROOT)
    assert ran.stdout.split("\n") == ["200 264", "200 264", "200 300", "86 150", ""]


HAND = GET.replace(b"/x", b"/hand")


def test_what_is_at_hand_waits_for_no_worker(make: Callable[..., Site]) -> None:
    """All of them are busy, and it is answered, over new connections and over kept ones."""
    site = make(threads=1)
    with site.connect() as client, site.connect() as kept:
        client.sendall(GET.replace(b"/x", b"/wait"))
        assert site.entered.acquire(timeout=PATIENCE)
        for _ in range(3):
            kept.sendall(HAND)
            assert b" 200 " in read_one(kept)
        assert site.ask(HAND.replace(b"\r\n\r\n", CLOSE + b"\r\n")).startswith(b"HTTP/1.1 200 ")
        site.gate.set()
        assert b" 200 " in read_one(client)


def test_a_client_that_does_not_take_what_is_at_hand_holds_nobody_up(make: Callable[..., Site]) -> None:
    """A worker waits for it, and in the end it has all of it."""
    site = make()
    with site.connect() as slow, site.connect() as other:
        slow.sendall(HAND.replace(b"/hand", b"/big"))
        for _ in range(3):
            other.sendall(HAND)
            assert b" 200 " in read_one(other)
        head, _, body = slow.recv(1 << 20).partition(b"\r\n\r\n")
        assert b"Content-Length: %d" % BIG in head
        while len(body) < BIG:
            chunk = slow.recv(1 << 20)
            assert chunk
            body += chunk
        slow.sendall(HAND)
        assert b" 200 " in read_one(slow)


def test_several_requests_at_once_are_answered_in_order(make: Callable[..., Site]) -> None:
    """At hand or not."""
    site = make()
    with site.connect() as client:
        last = GET.replace(b"\r\n\r\n", CLOSE + b"\r\n")
        client.sendall(HAND + GET + HAND + last)
        paths = re.findall(rb'"path": "([^"]*)"', read_all(client))
    assert paths == [b"/hand", b"/x", b"/hand", b"/x"]


def test_what_is_at_hand_ends_the_connection_when_the_server_pauses(make: Callable[..., Site]) -> None:
    """As every answer does then."""
    site = make()
    with site.connect() as client:
        client.sendall(HAND)
        assert CLOSE not in read_one(client)
        site.server.pause(PATIENCE)
        client.sendall(HAND)
        assert CLOSE in read_all(client)
    site.server.wait_until_empty()
