"""What a monitor is told of the service: `GET /metrics`.

What only grows is counted in lanes that outlive each process (`counters`), when it happens, by the process
that it happens in: a request before its answer is written, so whoever has the answer finds it counted, and an
upgrade by the process that says how it ended. All else is looked at when it is asked for, and is this
process's own. Nothing that a client sends becomes a series: what is not known is `other`.
"""

from __future__ import annotations

import sys
import time
from datetime import datetime
from itertools import pairwise, product
from typing import TYPE_CHECKING

from selfupdate import exposition
from selfupdate.exposition import Counter, Histogram, gauge, series
from selfupdate.lifecycle import Lifecycle, Phase

if TYPE_CHECKING:
    from collections.abc import Iterator

    from selfupdate.candidates import Scanner
    from selfupdate.counters import Counters
    from selfupdate.exposition import Observed
    from selfupdate.journal import Journal, Record
    from selfupdate.server import Server

_OTHER = "other"
"""What a client may call as it likes, and is not known."""
_METHODS = {"GET", "HEAD", "POST"}
_KINDS = ("upgrade", "rollback")
_OUTCOMES = ("committed", "rolled-back", "aborted", "interrupted")

_REQUESTS = Counter("selfupdate_http_requests_total", "Requests by the pattern of their route, method and status.")
_LATENCY = Histogram(
    "selfupdate_http_request_duration_seconds",
    "From when a request was taken up to its answer, by the pattern of its route.",
    (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30),
)
_UPGRADES = Counter("selfupdate_upgrades_total", "Upgrades and rollbacks that have ended, once a release was chosen.")
_PHASES = Histogram(
    "selfupdate_upgrade_phase_duration_seconds",
    "How long each phase of the upgrades that have ended took.",
    (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300),
)


class Metrics:
    """What is counted, and what is looked at."""

    def __init__(  # noqa: PLR0913 - each is a noun of its own, given once by the composition root
        self,
        *,
        version: str,
        generation: int,
        lifecycle: Lifecycle,
        journal: Journal,
        scanner: Scanner,
        server: Server,
        counters: Counters,
    ) -> None:
        """Count what happens from here on, and the upgrades that this process has ended already."""
        self._version = version
        self._generation = generation
        self._lifecycle = lifecycle
        self._journal = journal
        self._scanner = scanner
        self._server = server
        self._counters = counters
        self._started_at = time.time()
        self._requests: dict[tuple[str, str, int], tuple[str, Observed]] = {}
        """What each kind of request is counted under: the texts are made once."""
        # A series that is there from the start shows its first increment, too.
        counters.add(
            *((_UPGRADES.key(kind=kind, outcome=outcome), 0.0) for kind, outcome in product(_KINDS, _OUTCOMES))
        )
        journal.follow_ends(self.ended)

    def answered(self, route: str, method: str, status: int, seconds: float) -> None:
        """Count a request: its `route` is a pattern of the service, or says that it has none."""
        method = method if method in _METHODS else _OTHER
        known = self._requests.get((route, method, status))
        if known is None:
            known = _REQUESTS.key(route=route, method=method, status=str(status)), _LATENCY.of(route=route)
            self._requests[route, method, status] = known
        self._counters.add((known[0], 1.0), *known[1].amounts(seconds))

    def ended(self, record: Record) -> None:
        """Count an upgrade that has ended; one for which no release was chosen was none."""
        if record.to_version is None or record.outcome is None:
            return
        amounts = [(_UPGRADES.key(kind=record.kind, outcome=record.outcome), 1.0)]
        begun = [(entry.phase, datetime.fromisoformat(entry.at)) for entry in record.timeline]
        for (phase, began), (_, ended) in pairwise(begun):
            seconds = max(0.0, (ended - began).total_seconds())  # the clock may have been set back
            amounts += _PHASES.of(phase=phase).amounts(seconds)
        self._counters.add(*amounts)

    def text(self) -> str:
        """Return all of it in Prometheus' text format."""
        counted = exposition.by_name(self._counters.totals())
        grown = (metric.text(counted) for metric in (_REQUESTS, _LATENCY, _UPGRADES, _PHASES))
        return "".join((*self._gauges(), *grown))

    def _gauges(self) -> Iterator[str]:
        name = "selfupdate_build_info"
        python = sys.version.split(maxsplit=1)[0]
        yield gauge(name, "The version that runs.", [(series(name, version=self._version, python=python), 1.0)])
        name, now = "selfupdate_phase", self._lifecycle.phase
        yield gauge(
            name,
            "Where the process that answers stands: 1 for its phase.",
            ((series(name, phase=phase), float(phase is now)) for phase in Phase),
        )
        yield _one("selfupdate_generation", "How many handovers led to the version that runs.", self._generation)
        name, candidates = "selfupdate_candidates", self._scanner.last
        if candidates is not None:
            eligible = sum(candidate.eligible for candidate in candidates)
            numbers = {"true": float(eligible), "false": float(len(candidates) - eligible)}
            samples = ((series(name, eligible=text), number) for text, number in numbers.items())
            yield gauge(name, "Candidates when this process last looked, by whether they would be chosen.", samples)
        name = "selfupdate_connections"
        yield gauge(
            name,
            "Open connections of the process that answers.",
            ((series(name, state=state), float(number)) for state, number in self._server.connections().items()),
        )
        yield _one(
            "selfupdate_draining", "Whether each connection is closed with its answer.", self._server.ends_connections
        )
        last = self._journal.last_commit()
        if last is not None and last.ended_at is not None:
            ended_at = datetime.fromisoformat(last.ended_at).timestamp()
            about = "When the last upgrade or rollback was committed."
            yield _one("selfupdate_last_commit_timestamp_seconds", about, ended_at)
        yield _one("process_start_time_seconds", "When the program that answers was started.", self._started_at)


def _one(name: str, about: str, value: float) -> str:
    return gauge(name, about, [(name, float(value))])
