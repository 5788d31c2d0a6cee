"""Handover: what clients notice while a server is replaced by its next version.

The *window* of an upgrade goes from its trigger to the end of the last process
that it leaves behind. What clients see in it stands beside what they saw in the same
time before the trigger, in the same run: the two are as long, so that their
greatest values can be compared.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, NamedTuple

from bench.figures import COUNT, SELF, Table, percentile
from bench.generator import Load, Plan
from bench.peers import FIRST
from bench.trace import ASKED, Window

if TYPE_CHECKING:
    from bench.course import Course
    from bench.peers import Peer, Upgrade
    from bench.trace import Trace

RATE = 500.0

_AFTERMATH = 0.1
"""Seconds behind a window that are not taken for calm."""


class Scenario(NamedTuple):
    """How the clients ask."""

    loop: str
    rate: float | None
    keeps: bool

    @property
    def title(self) -> str:
        return f"{self.loop}, {'connections kept alive' if self.keeps else 'a connection a request'}"


SCENARIOS = tuple(
    Scenario(loop, rate, keeps)
    for loop, rate in (("closed loop of 16 clients", None), (f"open loop of {RATE:.0f} requests/s", RATE))
    for keeps in (True, False)
)


def measure(course: Course) -> list[Table]:
    """Replace each peer under each kind of load, in turn."""
    scale = course.scale
    count = max(1, scale.upgrades // scale.rounds)
    note = f"{count * scale.rounds} upgrades each"
    tables = {scenario: Table(f"Handover: {scenario.title}", note) for scenario in SCENARIOS}
    for number in range(scale.rounds):
        for scenario, table in tables.items():
            for kind in course.kinds:
                if kind.replaces_itself:
                    course.say(f"handover, round {number + 1}, {scenario.title}: {kind.name}")
                    with course.running(kind) as peer:
                        trace, upgrades = replace(peer, course, scenario, count)
                    enter(table, kind.name, trace, upgrades, scenario)
    return [*tables.values(), *_at_length(course)]


def _at_length(course: Course) -> list[Table]:
    """Replace this program alone, under so many requests that a rare failure shows."""
    scale = course.scale
    if not scale.long_requests:
        return []
    table = Table("Handover at length", f"{scale.long_requests:,} requests or more over {scale.long_upgrades} upgrades")
    closed = [scenario for scenario in SCENARIOS if scenario.rate is None]
    for kind in course.among(SELF):
        for scenario in closed:
            course.say(f"handover at length, {scenario.title}")
            requests, upgrades = (value // len(closed) for value in (scale.long_requests, scale.long_upgrades))
            with course.running(kind) as peer:
                enter(table, kind.name, *replace(peer, course, scenario, upgrades, requests), scenario)
    return [table]


def replace(
    peer: Peer, course: Course, scenario: Scenario, count: int, requests: int = 0
) -> tuple[Trace, list[Upgrade]]:
    """Replace a peer `count` times under load, `requests` at least."""
    versions = [f"1.0.{number}" for number in range(1, count + 1)]
    for version in versions:
        course.programs.version(version)  # a build takes time, and is done before anybody asks
    upgrades: list[Upgrade] = []
    calm = course.scale.calm
    with Load(Plan(*peer.address, keeps=scenario.keeps, rate=scenario.rate)) as load:
        load.first_answer(FIRST)
        time.sleep(calm)  # all of its processes have started, which each peer tells otherwise, or not at all
        for number, version in enumerate(versions, 1):
            peer.prepare(version)
            # The steady state that the upgrade is compared with: what is measured is this time itself.
            time.sleep(max([calm, *(upgrade.window.length for upgrade in upgrades[-1:])]) + _AFTERMATH)
            while load.answered() < requests * number / count:
                time.sleep(calm)  # the generator is not held up by having to tell: it is asked again
            upgrades.append(peer.upgrade(version, load))
        time.sleep(calm)  # as much steady state behind the last upgrade as before it
        return load.stop(), upgrades


def calm_before(upgrades: list[Upgrade], number: int, began: float) -> Window:
    """Return the time before an upgrade, as long as its window where nothing else lies there."""
    window = upgrades[number].window
    free = upgrades[number - 1].window.end + _AFTERMATH if number else began
    return Window(max(free, window.begin - window.length), window.begin)


def enter(table: Table, peer: str, trace: Trace, upgrades: list[Upgrade], scenario: Scenario) -> None:
    """Put what one run showed into the table."""
    windows = [upgrade.window for upgrade in upgrades]
    calms = [calm_before(upgrades, number, trace.answered[0]) for number in range(len(upgrades))]
    _enter_counts(table, peer, trace, scenario)
    for name, percent in (("p50", 50.0), ("p99", 99.0), ("max", 100.0)):
        steady, during = (
            percentile([latency for span in spans for latency in trace.latencies(span)], percent) * 1000
            for spans in (calms, windows)
        )
        table.compare(peer, f"latency {name}", "ms", ("steady", steady), ("upgrade", during))
    steady, during = (max(map(trace.longest_gap, spans)) * 1000 for spans in (calms, windows))
    table.compare(peer, "longest gap between answers", "ms", ("steady", steady), ("upgrade", during))
    firsts = [(upgrade.first_answer - upgrade.trigger) * 1000 for upgrade in upgrades]
    table.add(peer, "trigger to the new version's first answer", "ms", *firsts)
    table.add(
        peer,
        "trigger to the old process's end",
        "ms",
        *((upgrade.end - upgrade.trigger) * 1000 for upgrade in upgrades),
    )
    if scenario.rate:
        table.add(peer, "the generator's own lateness, p99", "ms", percentile(trace.lateness(), 99) * 1000)
    else:
        answers, seconds = sum(map(trace.count, calms)), sum(span.length for span in calms)
        table.add(peer, "requests, steady", "1/s", answers / seconds)


def _enter_counts(table: Table, peer: str, trace: Trace, scenario: Scenario) -> None:
    table.add(peer, "answers", COUNT, len(trace.answered))
    table.add(peer, "failed requests", COUNT, len(trace.failures))
    for kind, count in trace.failed().items():
        table.add(peer, f"  of these: {kind}", COUNT, count)
    if scenario.keeps:
        table.add(peer, "kept connections closed without a word", COUNT, len(trace.closed))
        table.add(peer, "  of these with a request on its way", COUNT, trace.closings()[ASKED])
    table.add(peer, "connections that ended by a reset", COUNT, trace.resets)
