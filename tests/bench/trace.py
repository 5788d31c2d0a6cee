"""What a load generator saw: each answer with its times, each failure with its kind. Times are `time.monotonic`'s."""

from __future__ import annotations

import bisect
import json
from array import array
from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from pathlib import Path

    Times = array[float]

# Kinds of failure. Others are an answer's own: "status 503", "wrong body".
REFUSED = "refused"
RESET = "reset"
"""The connection was reset before a byte of the answer."""
NONE = "no answer"
"""The connection was closed in order, before a byte of the answer."""
CUT = "cut answer"
LATE = "late"
"""There was no complete answer within the time that a client waits."""
UNASKED = "unasked answer"
UNENDED = "no end"
"""The answer says that the connection ends, and it does not."""

# How a kept connection is closed between two answers, without the first of them having said so.
IDLE = "nothing asked"
ASKED = "asked"
"""The next request was on its way already: it may be sent again, if it is one that does nothing twice."""

MOST_TIME = 10.0
"""Seconds that a client waits for an answer, unless told otherwise."""


class Window(NamedTuple):
    """A span of time."""

    begin: float
    end: float

    @property
    def length(self) -> float:
        return self.end - self.begin


class Failure(NamedTuple):
    """A request that got no answer, or a wrong one."""

    at: float
    kind: str


def _times() -> Times:
    return array("d")


@dataclass
class Trace:
    """All that became of the requests of one run."""

    due: Times = field(default_factory=_times)
    """When each answered request was to be sent: in an open loop by the schedule, whatever the generator was at."""
    sent: Times = field(default_factory=_times)
    answered: Times = field(default_factory=_times)
    """In order."""
    versions: dict[str, float] = field(default_factory=dict)
    """Each version, with the time of its first answer."""
    failures: list[Failure] = field(default_factory=list)
    closed: list[Failure] = field(default_factory=list)
    """Kept connections that were closed between two answers without a word."""
    resets: int = 0
    """Connections that ended by a reset where an end was due, behind the last answer."""

    @property
    def whole(self) -> Window:
        """From the first answer to the last."""
        return Window(self.answered[0], self.answered[-1]) if self.answered else Window(0, 0)

    @property
    def rate(self) -> float:
        """Answers a second."""
        return len(self.answered) / self.whole.length if self.whole.length else 0.0

    def failed(self) -> Counter[str]:
        return Counter(failure.kind for failure in self.failures)

    def closings(self) -> Counter[str]:
        return Counter(closing.kind for closing in self.closed)

    def latencies(self, window: Window) -> list[float]:
        """Return the seconds from due to answered of each request that was under way in a window."""
        first = bisect.bisect_left(self.answered, window.begin)
        last = bisect.bisect_right(self.answered, window.end + MOST_TIME)
        return [
            self.answered[number] - self.due[number] for number in range(first, last) if self.due[number] <= window.end
        ]

    def lateness(self) -> list[float]:
        """Return how many seconds after it was due each request was sent: the generator's own fault."""
        return [sent - due for sent, due in zip(self.sent, self.due, strict=True)]

    def longest_gap(self, window: Window) -> float:
        """Return the longest time between two answers, to any client, a part of which is in a window."""
        first = max(1, bisect.bisect_left(self.answered, window.begin))
        last = min(len(self.answered), bisect.bisect_right(self.answered, window.end) + 1)
        return max((self.answered[number] - self.answered[number - 1] for number in range(first, last)), default=0.0)

    def count(self, window: Window) -> int:
        """Return how many answers came in a window."""
        return bisect.bisect_right(self.answered, window.end) - bisect.bisect_left(self.answered, window.begin)

    def save(self, path: Path) -> None:
        head = {
            "answers": len(self.due),
            "versions": self.versions,
            "failures": self.failures,
            "closed": self.closed,
            "resets": self.resets,
        }
        with path.open("wb") as file:
            file.write(json.dumps(head).encode() + b"\n")
            for times in (self.due, self.sent, self.answered):
                times.tofile(file)

    @classmethod
    def load(cls, path: Path) -> Trace:
        with path.open("rb") as file:
            head = json.loads(file.readline())
            trace = cls(versions=head["versions"], resets=head["resets"])
            trace.failures = [Failure(*values) for values in head["failures"]]
            trace.closed = [Failure(*values) for values in head["closed"]]
            for times in (trace.due, trace.sent, trace.answered):
                times.fromfile(file, head["answers"])
        return trace
