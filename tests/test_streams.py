"""Answers that have no end of their own: told as far as each client takes them, and nobody is waited for."""

from __future__ import annotations

import socket
import threading
from typing import TYPE_CHECKING

import pytest
from service import PATIENCE
from test_server import GET, read_all, read_one

from selfupdate import listener as listeners
from selfupdate.connection import Connection
from selfupdate.listener import Address
from selfupdate.messages import SIGN_OF_LIFE, Request, Response, json_response
from selfupdate.server import Server
from selfupdate.settings import Limits

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

LISTEN = b"GET /stream HTTP/1.1\r\nHost: localhost\r\n\r\n"


class Saying:
    """A stream that says what it is given."""

    def __init__(self) -> None:
        self.begun = threading.Event()
        self.closed = threading.Event()
        self.asked = 0
        self.words = [b"begun\n"]

    def more(self) -> bytes:
        self.asked += 1
        self.begun.set()
        return self.words.pop(0) if self.words else b""

    def farewell(self) -> bytes:
        return b"farewell\n"

    def close(self) -> None:
        self.closed.set()


class Site:
    """A server whose every stream is another one."""

    def __init__(self, limits: Limits) -> None:
        self.streams: list[Saying] = []
        self.is_listened_to = threading.Event()
        self.server = Server("http", self.answer, limits)
        self.listener = listeners.bind(Address("localhost", 0))
        self.address: tuple[str, int] = self.listener.getsockname()
        self.server.accept(self.listener)

    def answer(self, request: Request) -> Response:
        if request.path != "/stream":
            return json_response({})
        self.streams.append(Saying())
        self.is_listened_to.set()
        return Response(200, content_type="text/plain", stream=self.streams[-1])

    def connect(self) -> socket.socket:
        return socket.create_connection(self.address, PATIENCE)

    def listen(self) -> tuple[socket.socket, Saying]:
        """Return a client that has been told the first words, and its stream."""
        client = self.connect()
        client.sendall(LISTEN)
        read_until(client, b"begun\n")
        return client, self.streams[-1]

    def say(self, stream: Saying, words: bytes) -> None:
        stream.words.append(words)
        self.server.advance_streams()


def read_until(client: socket.socket, end: bytes) -> bytes:
    answer = b""
    while end not in answer:
        chunk = client.recv(65536)
        assert chunk, answer
        answer += chunk
    return answer


@pytest.fixture
def run() -> Iterator[Callable[..., Site]]:
    """Run servers with other limits than the service's."""
    sites: list[Site] = []

    def run(**limits: float) -> Site:
        sites.append(Site(Limits(threads=2, **limits)))  # type: ignore[arg-type]
        return sites[-1]

    yield run
    for site in sites:
        site.server.close(0)


def test_what_is_said_later_arrives(run: Callable[..., Site]) -> None:
    """The head says that the body has no length; each of many clients is told what is new for it."""
    site = run()
    with site.connect() as client:
        client.sendall(LISTEN)
        head = read_until(client, b"begun\n").partition(b"\r\n\r\n")[0]
        assert b"Connection: close" in head
        assert b"Content-Length" not in head
        first = site.streams[-1]
        other, second = site.listen()
        with other:
            site.say(first, b"one\n")
            site.say(second, b"two\n")
            assert read_until(client, b"one\n") == b"one\n"
            assert read_until(other, b"two\n") == b"two\n"


def test_streams_cost_no_worker(run: Callable[..., Site]) -> None:
    """More of them than there are workers, and others are answered."""
    site = run()
    listening = [site.listen()[0] for _ in range(10)]
    with site.connect() as client:
        client.sendall(GET)
        assert b" 200 " in read_one(client)
    for client in listening:
        client.close()


def test_a_client_that_leaves_is_forgotten(run: Callable[..., Site]) -> None:
    """Its stream is closed at once, without anything being said."""
    site = run()
    client, stream = site.listen()
    client.close()
    assert stream.closed.wait(PATIENCE)


def test_the_head_alone_begins_nothing(run: Callable[..., Site]) -> None:
    """HEAD is answered, and its stream closed."""
    site = run()
    with site.connect() as client:
        client.sendall(LISTEN.replace(b"GET", b"HEAD"))
        answer = read_all(client)
    assert answer.startswith(b"HTTP/1.1 200 ")
    assert answer.endswith(b"\r\n\r\n")
    assert site.streams[-1].closed.wait(PATIENCE)
    assert site.streams[-1].asked == 0


@pytest.mark.parametrize("end", ["pause", "release", "close"])
def test_streams_end_at_once_when_the_server_serves_no_more(run: Callable[..., Site], end: str) -> None:
    """Not at the end of the drain: each is told what is still to be said, and farewell."""
    site = run()
    client, stream = site.listen()
    with client:
        getattr(site.server, end)(PATIENCE)
        assert read_all(client) == b"farewell\n"
    assert stream.closed.is_set()
    site.server.wait_until_empty()


def test_a_stream_that_begins_while_the_server_ends_is_told_farewell(run: Callable[..., Site]) -> None:
    """A kept connection may ask for one after the pause."""
    site = run()
    with site.connect() as client:
        client.sendall(GET)
        read_one(client)
        site.server.pause(PATIENCE)
        client.sendall(LISTEN)
        assert read_all(client).endswith(b"begun\nfarewell\n")


def test_behind_the_last_words_nobody_is_busy(run: Callable[..., Site], monkeypatch: pytest.MonkeyPatch) -> None:
    """A client may be slow to close: that is waited for, and not asked again and again because more could be sent."""
    looks: list[Connection] = []
    has_left = Connection.has_left

    def look(connection: Connection) -> bool:
        looks.append(connection)
        return has_left(connection)

    monkeypatch.setattr(Connection, "has_left", look)
    monkeypatch.setattr(Saying, "more", lambda _: b"words\n")
    site = run(linger_time=0.5)
    with site.connect() as client:
        client.sendall(LISTEN)
        read_until(client, b"words\n")
        site.server.pause(PATIENCE)
        read_all(client)
        site.server.wait_until_empty()
    assert len(looks) == 1


def test_there_are_signs_of_life(run: Callable[..., Site]) -> None:
    """Without anything to say, too."""
    site = run(sign_of_life_interval=0.05)
    client, _ = site.listen()
    with client:
        read_until(client, SIGN_OF_LIFE * 2)


def test_one_that_reads_nothing_holds_nobody_up_and_is_left(run: Callable[..., Site]) -> None:
    """What waits for it has a bound, others are told as before, and in the end its connection is closed."""
    site = run(sign_of_life_interval=1.0)
    deaf = socket.socket()
    deaf.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    with deaf:
        deaf.settimeout(PATIENCE)
        deaf.connect(site.address)
        deaf.sendall(LISTEN)
        assert site.is_listened_to.wait(PATIENCE)
        to_deaf = site.streams[0]
        assert to_deaf.begun.wait(PATIENCE)
        client, stream = site.listen()
        with client:
            to_deaf.words += [b"x" * (1 << 20)] * 1000
            for number in range(100):
                site.say(stream, b"%d\n" % number)
                assert read_until(client, b"%d\n" % number)
            # As much as the kernel takes was asked for, and no more.
            assert to_deaf.asked < 100
            assert to_deaf.closed.wait(PATIENCE)
            assert not stream.closed.is_set()
