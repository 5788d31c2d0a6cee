"""What `make bench` says is so: its statistics, and what its load generator makes of what servers do."""

from __future__ import annotations

import itertools
import os
import socket
import struct
import threading
import time
from array import array
from typing import TYPE_CHECKING, Self

import pytest
from bench.answers import Answer, WrongAnswerError, parse
from bench.figures import COUNT, RATIO, SELF, Table, multiple, percentile, shown
from bench.generator import Load, Plan
from bench.ticks import Ticks
from bench.trace import ASKED, CUT, IDLE, LATE, NONE, REFUSED, RESET, UNASKED, UNENDED, Failure, Trace, Window
from service import PATIENCE

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

BODY = b'{"version": "1.0.0"}'
ANSWER = b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%s" % (len(BODY), BODY)
LAST_ANSWER = ANSWER.replace(b"\r\n\r\n", b"\r\nConnection: close\r\n\r\n")


# Statistics.


@pytest.mark.parametrize(
    ("values", "percent", "expected"),
    [
        ([], 99, 0),
        ([7], 50, 7),
        ([7], 99, 7),
        ([3, 1, 2], 50, 2),
        ([4, 3, 2, 1], 50, 2),
        (range(1, 101), 99, 99),
        (range(1, 101), 100, 100),
        (range(1, 1001), 99.9, 999),
    ],
)
def test_a_percentile_is_one_of_the_values(values: list[float], percent: float, expected: float) -> None:
    """By the nearest rank: no value is made up between two."""
    assert percentile(values, percent) == expected


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (0, "0"),
        (0.01234, "0.0123"),
        (1.0, "1.00"),
        (12.34, "12.3"),
        (123.4, "123"),
        (-2.5, "-2.50"),
        (12345.6, "12,346"),
    ],
)
def test_three_digits_are_shown(value: float, expected: str) -> None:
    """Fewer would hide a difference, more would be noise."""
    assert shown(value) == expected


def test_a_table_shows_medians_ranges_and_ratios() -> None:
    """Peers are compared with this program; what is counted adds up; what is a ratio has none of its own."""
    table = Table("title", "note")
    table.add(SELF, "time", "ms", 1, 2, 9)
    table.add("other", "time", "ms", 5)
    table.add("other", "time", "ms", 7)
    table.add(SELF, "failed", COUNT, 1)
    table.add(SELF, "failed", COUNT, 2)
    table.compare("other", "p99", "ms", ("steady", 4), ("upgrade", 5))
    dash, times = "\N{EN DASH}", "\N{MULTIPLICATION SIGN}"
    assert [line.split() for line in table.text().splitlines()] == [
        ["title"],
        ["note"],
        [SELF, "other"],
        ["time,", "ms", "2.00", "6.00"],
        ["range", f"1.00{dash}9.00", f"5.00{dash}7.00"],
        ["of", f"{SELF}'s", f"{times}3.00"],
        ["failed", "3"],
        ["p99,", "steady,", "ms", "4.00"],
        ["p99,", "upgrade,", "ms", "5.00"],
        ["p99,", "upgrade", ":", "steady", f"{times}1.25"],
    ]
    time_row, failed, *_, ratio = table.as_json()["rows"]
    assert time_row["peers"]["other"] == {"median": 6, "low": 5, "high": 7, "ratio": 3, "values": [5, 7]}
    assert failed["peers"][SELF] == {"sum": 3, "values": [1, 2]}
    assert (ratio["unit"], ratio["peers"]["other"]["median"]) == (RATIO, 1.25)
    assert multiple(1.25) == f"{times}1.25"


def traced(*requests: tuple[float, float]) -> Trace:
    """Return a trace of requests that were due, and answered, at the given times."""
    due, answered = (array("d", times) for times in zip(*requests, strict=True))
    return Trace(due, due, answered)


def test_a_request_belongs_to_the_window_in_which_it_was_under_way() -> None:
    """Also where it was due before, or was answered after: the window is what held it up."""
    trace = traced((0, 1), (1.5, 2), (1, 3.5), (3, 4), (2.5, 5), (6, 7))
    assert trace.latencies(Window(2.25, 2.75)) == [2.5, 2.5]
    assert trace.latencies(Window(10, 11)) == []
    assert trace.count(Window(2, 4)) == 3
    assert trace.whole == Window(1, 7)


def test_a_gap_that_reaches_into_the_window_counts_whole() -> None:
    """A window cuts no silence in two."""
    trace = traced((0, 1), (0, 2), (0, 5), (0, 5.5), (0, 6))
    assert trace.longest_gap(Window(4, 4.5)) == 3
    assert trace.longest_gap(Window(5.1, 5.9)) == 0.5
    assert trace.longest_gap(Window(0, 9)) == 3


def test_a_trace_survives_on_disk(tmp_path: Path) -> None:
    """The generator's process leaves it, the driver's reads it."""
    trace = traced((0.1, 0.2), (0.3, 0.4))
    trace.versions["1.0.0"] = 0.2
    trace.failures.append(Failure(0.3, RESET))
    trace.closed.append(Failure(0.4, IDLE))
    trace.resets = 5
    trace.save(tmp_path / "trace")
    assert Trace.load(tmp_path / "trace") == trace


# What is answered.


@pytest.mark.parametrize(
    ("received", "expected"),
    [
        (b"", None),
        (ANSWER[:-1], None),
        (ANSWER, Answer("1.0.0", says_end=False)),
        (LAST_ANSWER, Answer("1.0.0", says_end=True)),
        (ANSWER.replace(b"1.1", b"1.0", 1), Answer("1.0.0", says_end=True)),
        (
            ANSWER.replace(b"1.1", b"1.0", 1).replace(b"OK\r\n", b"OK\r\nconnection: Keep-Alive\r\n"),
            Answer("1.0.0", says_end=False),
        ),
    ],
)
def test_an_answer_says_its_version_and_whether_the_connection_ends(received: bytes, expected: Answer | None) -> None:
    """RFC 9112, section 9.3."""
    assert parse(received) == expected


@pytest.mark.parametrize(
    ("received", "what"),
    [
        (b"SSH-2.0\r\n\r\n", "no HTTP"),
        (b"HTTP/1.1 200 OK\r\n\r\n", "no length"),
        (b"HTTP/1.1 503 No\r\nContent-Length: 0\r\n\r\n", "status 503"),
        (ANSWER.replace(b"version", b"verzion"), "wrong body"),
        (ANSWER + b"!", "wrong body"),
    ],
)
def test_a_wrong_answer_is_told_from_a_right_one(received: bytes, what: str) -> None:
    """Each by what it is."""
    with pytest.raises(WrongAnswerError, match=what):
        parse(received)


# What the generator makes of servers.


class Fake:
    """A server that does with each connection what a test has it do; `number` counts them from 1."""

    def __init__(self, behave: Callable[[socket.socket, int], None]) -> None:
        self._behave = behave
        self._listener = socket.create_server(("127.0.0.1", 0), backlog=64)
        self.address: tuple[str, int] = self._listener.getsockname()
        self._count = 0
        self._news = threading.Condition()
        self._threads = [threading.Thread(target=self._accept)]
        self._threads[0].start()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        for thread in self._threads:
            thread.join()
        self._listener.close()

    def _accept(self) -> None:
        while True:
            try:
                connection, _ = self._listener.accept()
            except OSError:
                return
            with self._news:
                self._count += 1
                self._threads.append(threading.Thread(target=self._serve, args=[connection, self._count]))
                self._threads[-1].start()
                self._news.notify_all()

    def _serve(self, connection: socket.socket, number: int) -> None:
        connection.settimeout(PATIENCE)
        with connection:
            try:
                self._behave(connection, number)
            except OSError:  # the generator has ended
                return

    def wait_for(self, count: int) -> None:
        """Wait until `count` connections have come."""
        with self._news:
            assert self._news.wait_for(lambda: self._count >= count, PATIENCE)


def reset(connection: socket.socket) -> None:
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    connection.close()


def is_asked(connection: socket.socket) -> bool:
    """Read one request; its sender sends no other before the answer."""
    return bool(connection.recv(65536))


def serve(connection: socket.socket, answer: bytes = ANSWER) -> None:
    while is_asked(connection):
        connection.sendall(answer)


def seen(
    behave: Callable[[socket.socket, int], None],
    connections: int,
    *,
    keeps: bool = True,
    rate: float | None = None,
    patience: float = PATIENCE,
) -> Trace:
    """Return what one client makes of a server, after a number of connections."""
    with Fake(behave) as fake, Load(Plan(*fake.address, keeps, 1, rate, patience)) as load:
        fake.wait_for(connections)
        return load.stop()


def resets(connection: socket.socket, _: int) -> None:
    is_asked(connection)
    reset(connection)


def closes(connection: socket.socket, _: int) -> None:
    is_asked(connection)


def cuts(connection: socket.socket, _: int) -> None:
    is_asked(connection)
    connection.sendall(ANSWER[:-3])


def keeps_silent(connection: socket.socket, _: int) -> None:
    while is_asked(connection):
        pass


def stalls(connection: socket.socket, _: int) -> None:
    is_asked(connection)
    connection.sendall(ANSWER[:-3])
    is_asked(connection)


def refuses(connection: socket.socket, _: int) -> None:
    serve(connection, b"HTTP/1.1 503 No\r\nContent-Length: 0\r\n\r\n")


def says_another_thing(connection: socket.socket, _: int) -> None:
    serve(connection, ANSWER.replace(b"version", b"verzion"))


@pytest.mark.parametrize(
    ("behave", "kind"),
    [
        (resets, RESET),
        (closes, NONE),
        (cuts, CUT),
        (keeps_silent, LATE),
        (stalls, LATE),
        (refuses, "status 503"),
        (says_another_thing, "wrong body"),
    ],
)
@pytest.mark.parametrize("keeps", [True, False])
def test_a_failed_request_is_counted_as_what_it_is(
    behave: Callable[[socket.socket, int], None], kind: str, *, keeps: bool
) -> None:
    """Each failure has one kind, whether the connection is to be kept or not."""
    trace = seen(behave, 2, keeps=keeps, patience=0.3 if kind == LATE else PATIENCE)
    assert set(trace.failed()) == {kind}
    assert not trace.answered
    assert not trace.closed
    assert not trace.resets


def test_a_server_that_does_not_listen_refuses() -> None:
    """A client rests after that, and tries again."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        address: tuple[str, int] = listener.getsockname()
    with Load(Plan(*address, keeps=True, clients=1)) as load:
        assert load.answered() == 0
        trace = load.stop()
    assert set(trace.failed()) == {REFUSED}


@pytest.mark.parametrize("rate", [None, 200.0])
@pytest.mark.parametrize("keeps", [True, False])
def test_good_answers_are_counted_and_nothing_else(rate: float | None, *, keeps: bool) -> None:
    """An end that an answer has announced is none of a server's faults."""

    def behave(connection: socket.socket, number: int) -> None:
        is_asked(connection)
        if keeps and number > 3:
            connection.sendall(ANSWER)
            serve(connection)
        else:
            connection.sendall(LAST_ANSWER)

    trace = seen(behave, 4, keeps=keeps, rate=rate)
    assert len(trace.answered) >= 3
    assert list(trace.versions.values()) == [trace.answered[0]]
    assert list(trace.answered) == sorted(trace.answered)
    assert all(due <= sent <= end for due, sent, end in zip(trace.due, trace.sent, trace.answered, strict=True))
    assert (trace.failures, trace.closed, trace.resets) == ([], [], 0)


def test_an_end_with_a_request_on_its_way_is_counted_and_the_request_sent_again() -> None:
    """The client can't know whether it was acted upon; GET may be sent again (RFC 9110, section 9.2.2)."""

    def behave(connection: socket.socket, number: int) -> None:
        is_asked(connection)
        connection.sendall(ANSWER)
        is_asked(connection)
        if number % 2:
            reset(connection)

    trace = seen(behave, 3)
    assert set(trace.closings()) == {ASKED}
    assert not trace.failures
    assert len(trace.answered) >= 2


def test_an_end_with_nothing_asked_is_counted() -> None:
    """Nobody was told, and a moment later it would have cost a request."""

    def behave(connection: socket.socket, _: int) -> None:
        is_asked(connection)
        connection.sendall(ANSWER)

    trace = seen(behave, 30, rate=50.0)
    assert trace.closings()[IDLE] >= 2
    assert not trace.failures


def test_a_reset_behind_the_last_answer_is_counted_and_the_answer_too() -> None:
    """It has cost nothing this time: with the answer still under way it would have."""

    def behave(connection: socket.socket, _: int) -> None:
        is_asked(connection)
        connection.sendall(LAST_ANSWER)
        reset(connection)

    trace = seen(behave, 3, keeps=False)
    assert trace.resets >= 2
    assert len(trace.answered) >= 2
    assert not trace.failures


def test_more_than_was_asked_for_is_counted() -> None:
    """With the answer, it makes that a wrong one; behind the answer, it is one that nobody asked for."""

    def behave(connection: socket.socket, _: int) -> None:
        is_asked(connection)
        connection.sendall(LAST_ANSWER)
        connection.sendall(ANSWER)
        is_asked(connection)

    assert set(seen(behave, 3, keeps=False).failed()) <= {UNASKED, "wrong body"}


def test_an_end_that_was_announced_and_does_not_come_is_counted() -> None:
    """A client that keeps to the rules would wait for it."""

    def behave(connection: socket.socket, _: int) -> None:
        is_asked(connection)
        connection.sendall(LAST_ANSWER)
        is_asked(connection)

    trace = seen(behave, 2, patience=2.0)
    assert set(trace.failed()) == {UNENDED}
    assert trace.answered


def test_a_stall_delays_no_request_of_an_open_loop() -> None:
    """Those that are due in the meantime are sent, by further clients, and all count from when they were due."""
    stalled = 10
    all_there = threading.Event()

    def behave(connection: socket.socket, number: int) -> None:
        is_asked(connection)
        if number == stalled:
            all_there.set()
        all_there.wait(PATIENCE)
        connection.sendall(LAST_ANSWER)

    trace = seen(behave, stalled, keeps=False, rate=100.0)
    latencies = sorted(answered - due for answered, due in zip(trace.answered, trace.due, strict=True))
    assert latencies[-1] >= (stalled - 1) / 100
    due = sorted(trace.due)
    assert [later - earlier for earlier, later in itertools.pairwise(due)] == pytest.approx([0.01] * (len(due) - 1))


def test_the_schedule_does_not_shift() -> None:
    """A tick that is taken late was due when it was due."""
    ticks = Ticks(1000.0)
    due: list[float] = []
    while len(due) < 20:
        due += ticks.take()
    assert due[-1] <= time.monotonic()
    assert [at - due[0] for at in due] == pytest.approx([number / 1000 for number in range(len(due))])
    os.close(ticks.fileno())
