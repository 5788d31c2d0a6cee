"""Service: how many requests a second, and how others fare beside a crowd that only holds connections."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from bench.crowd import Idle, Slow
from bench.figures import COUNT, SELF, Table, percentile
from bench.generator import Load, Plan
from bench.peers import FIRST, memory

if TYPE_CHECKING:
    from bench.course import Course
    from bench.peers import Kind, Peer
    from bench.trace import Trace

RATE = 200.0
"""Requests a second of those beside a crowd."""

_PEERS = (SELF, "waitress", "gunicorn-gthread", "http.server")
_CEILING = "nginx"
"""Its figures tell how much the generator can ask."""


def measure(course: Course) -> list[Table]:
    """Ask each peer, in turn."""
    scale = course.scale
    kept = Table("Service: 16 connections kept alive", f"closed loop; {_CEILING} tells what the generator can do")
    single = Table("Service: a connection a request", f"16 clients, closed loop; {_CEILING} as above")
    others = f"others ask {RATE:.0f} times a second, over connections kept alive"
    idle = Table(f"Service beside {scale.idle:,} idle connections", others)
    slow = Table(f"Service beside {scale.slow:,} clients that send a byte each 50 ms", others)
    for number in range(scale.rounds):
        for keeps, table in ((True, kept), (False, single)):
            for kind in course.among(*_PEERS, _CEILING):
                course.say(
                    f"service, round {number + 1}, {'kept alive' if keeps else 'a connection each'}: {kind.name}"
                )
                with course.running(kind) as peer:
                    _enter_requests(table, kind.name, _ask(peer, scale.seconds, keeps=keeps))
        for kind in course.among(*_PEERS):
            course.say(f"service, round {number + 1}, beside crowds: {kind.name}")
            _beside_idle(course, kind, idle)
            _beside_slow(course, kind, slow)
    return [kept, single, idle, slow]


def _ask(peer: Peer, seconds: float, *, keeps: bool, rate: float | None = None) -> Trace:
    with Load(Plan(*peer.address, keeps=keeps, rate=rate)) as load:
        load.first_answer(FIRST)
        time.sleep(seconds)  # how long is measured
        return load.stop()


def _enter_requests(table: Table, peer: str, trace: Trace) -> None:
    latencies = trace.latencies(trace.whole)
    table.add(peer, "requests", "1/s", trace.rate)
    table.add(peer, "latency p50", "ms", percentile(latencies, 50) * 1000)
    table.add(peer, "latency p99", "ms", percentile(latencies, 99) * 1000)
    _enter_failures(table, peer, trace)
    table.add(peer, "connections that ended by a reset", COUNT, trace.resets)


def _enter_failures(table: Table, peer: str, trace: Trace) -> None:
    table.add(peer, "failed requests", COUNT, len(trace.failures))
    for kind, count in trace.failed().items():
        table.add(peer, f"  of these: {kind}", COUNT, count)


def _beside_idle(course: Course, kind: Kind, table: Table) -> None:
    with course.running(kind) as peer:
        alone = _ask(peer, course.scale.seconds, keeps=True, rate=RATE)
        before = memory(peer.pids())
        with Idle(peer.address, course.scale.idle) as crowd:
            after = memory(peer.pids())
            beside = _ask(peer, course.scale.seconds, keeps=True, rate=RATE)
            table.add(kind.name, "connections still open at the end", COUNT, crowd.open())
    table.add(kind.name, "resident memory without them", "MiB", before)
    table.add(kind.name, "resident memory, more with them", "MiB", after - before)
    _compare(table, kind.name, alone, beside)


def _beside_slow(course: Course, kind: Kind, table: Table) -> None:
    with course.running(kind) as peer:
        alone = _ask(peer, course.scale.seconds, keeps=True, rate=RATE)
        with Slow(peer.address, course.scale.slow) as crowd:
            beside = _ask(peer, course.scale.seconds, keeps=True, rate=RATE)
        table.add(kind.name, "slow requests that were answered", COUNT, crowd.answered)
    _compare(table, kind.name, alone, beside)


def _compare(table: Table, peer: str, alone: Trace, beside: Trace) -> None:
    for name, percent in (("p50", 50.0), ("p99", 99.0)):
        without, beside_them = (percentile(trace.latencies(trace.whole), percent) * 1000 for trace in (alone, beside))
        table.compare(peer, f"latency {name} of others", "ms", ("without", without), ("with", beside_them))
    _enter_failures(table, peer, beside)
