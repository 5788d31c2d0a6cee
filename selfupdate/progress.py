"""An upgrade as it goes, for people: its steps on a line that is written over on a terminal, a line for each elsewhere.

Whatever shows an upgrade names the same six steps. Those that were reached have
the time that they took, and the last of these goes on counting. All of it is
plain text, so that it can be read without colours, and on a terminal that has no
more than ASCII.
"""

import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from datetime import UTC, datetime
from typing import Any, NamedTuple

from selfupdate.foreign import shown
from selfupdate.journal import now
from selfupdate.lifecycle import Phase
from selfupdate.terminal import Style, Terminal

STEPS = {
    Phase.CHOOSING: "choose",
    Phase.STAGING: "copy",
    Phase.STARTING: "start",
    Phase.PROBING: "probe",
    Phase.REPLACING: "hand over",
    Phase.PROBATION: "watch",
}
_WAYS_BACK = {Phase.ABORTING: "undo", Phase.ROLLING_BACK: "roll back"}
_BETWEEN = " > "
_TICK = 0.1
"""Seconds between two looks at the clock: it shows tenths."""


class Step(NamedTuple):
    """One step of an upgrade, as it is shown."""

    name: str
    style: Style
    ending: str = ""
    """How it ended, where that was not well."""
    seconds: float | None = None
    """How long it took, or has taken until now; None where it was not reached."""

    def __str__(self) -> str:
        """Return it in words, at most 14 characters where it went well: six of them fit into 80 columns."""
        took = "" if self.seconds is None else _duration(self.seconds)
        return " ".join(filter(None, (self.name, self.ending, took)))


def _duration(seconds: float) -> str:
    """Return a time in at most four characters, up to a week."""
    if seconds < 10:  # noqa: PLR2004 - from there on, tenths say nothing
        return f"{int(seconds * 10) / 10}s"
    return f"{int(seconds)}s" if seconds < 1000 else f"{int(seconds / 60)}m"  # noqa: PLR2004 - it has four digits


def steps(record: Mapping[str, Any], at: datetime) -> list[Step]:
    """Return the steps of an upgrade's record (`GET /upgrades/<id>`) as they stand at a time."""
    begun = [(entry["phase"], datetime.fromisoformat(entry["at"])) for entry in record["timeline"]]
    ended = datetime.fromisoformat(record["ended_at"]) if record["ended_at"] else at
    ends = [*(begin for _, begin in begun[1:]), ended]
    took = {phase: max(0.0, (end - begin).total_seconds()) for (phase, begin), end in zip(begun, ends, strict=True)}
    last = [phase for phase in took if phase in STEPS][-1:]
    found = []
    for phase, name in STEPS.items():
        if phase not in took:
            found.append(Step(name, Style.DIM))
        elif [phase] == last:
            found.append(Step(name, *_state(record), took[phase]))
        else:
            found.append(Step(name, Style.GREEN, seconds=took[phase]))
    if record["outcome"] is None:
        found += [Step(name, Style.BOLD, seconds=took[phase]) for phase, name in _WAYS_BACK.items() if phase in took]
    return found


def _state(record: Mapping[str, Any]) -> tuple[Style, str]:
    """Return how the last step that was reached stands."""
    if record["outcome"] == "committed":
        return Style.GREEN, ""
    if record["outcome"] is None and record["reason"] is None:
        return Style.BOLD, ""
    return Style.RED, "interrupted" if record["outcome"] == "interrupted" else "failed"


class Progress:
    """Shows one upgrade, as what is known of it comes."""

    def __init__(self, terminal: Terminal) -> None:
        """Show it on `terminal`, which may be none."""
        self._terminal = terminal
        self._record: Mapping[str, Any] | None = None
        self._shown = 0
        """How many phases have been printed, where each has a line."""
        self._drawn = ""
        """What the line shows that is written over."""
        self._is_named = False

    @property
    def next_tick(self) -> float:
        """When the clock is to be looked at; of `time.monotonic()`."""
        return time.monotonic() + _TICK if self._terminal.redraws and self._record else float("inf")

    def begin(self) -> None:
        """Show that an upgrade was asked for, of which nothing is known yet."""
        if self._terminal.redraws:
            first = {"phase": Phase.CHOOSING, "at": now()}
            self.show({"timeline": [first], "outcome": None, "reason": None, "ended_at": None, "to": None})

    def show(self, record: Mapping[str, Any]) -> None:
        """Show how it stands now."""
        if not self._terminal.redraws:
            for entry in record["timeline"][self._shown :]:
                self._print(f"{entry['at']} {entry['phase']}")
            self._shown = len(record["timeline"])
            return
        self._record = record
        if record["to"] and not self._is_named:
            self.erase()
            self._print(shown(f"{record['kind']} {journey(record)}"))
            self._is_named = True
        self.tick()

    def tick(self) -> None:
        """Have the clock go on."""
        if self._record and self._terminal.redraws:
            self._draw(steps(self._record, datetime.now(UTC)))

    def end(self, record: Mapping[str, Any]) -> None:
        """Show it as it has ended: the steps, and where it failed the end of what the successor wrote."""
        self.show(record)
        if not self._terminal.redraws:
            return
        self.erase()
        for line in self._lines(steps(record, datetime.now(UTC))):
            self._print(line)
        if record["outcome"] != "committed" and record.get("log"):
            self._print(shown(f"the end of what {record['name']} wrote:"))
            for line in record["log"].rstrip("\n").split("\n"):
                self._print(f"  {shown(line)}")
        self._record = None

    def erase(self) -> None:
        """Leave no trace of the line that is written over."""
        if self._drawn:
            self._write("\r\x1b[K")
            self._drawn = ""

    def leave(self) -> None:
        """Leave the line as it is: what is printed next begins on another."""
        if self._drawn:
            self._write("\n")
            self._drawn = ""

    def _draw(self, found: Sequence[Step]) -> None:
        """Write the line over. It ends before the last column, behind which some terminals begin the next line."""
        room = self._terminal.columns - 1
        text, line = _BETWEEN.join(map(str, found)), self._painted(found)
        if len(text) > room:
            reached = [step for step in found if step.seconds is not None]
            which = f"step {len(reached)} of {len(STEPS)}: " if reached[-1].name in STEPS.values() else ""
            text = f"{which}{reached[-1]}"[:room]
            line = self._terminal.paint(text, reached[-1].style)
        if text != self._drawn:
            self._write(f"\r{line}\x1b[K")
            self._drawn = text

    def _lines(self, found: Sequence[Step]) -> Iterator[str]:
        """Return the steps on as many lines as they take; one that another follows ends as it goes on."""
        goes_on = _BETWEEN.rstrip()
        line: list[Step] = []
        for step in found:
            end = "" if step is found[-1] else goes_on
            if line and len(_BETWEEN.join(map(str, [*line, step])) + end) >= self._terminal.columns:
                yield self._painted(line) + goes_on
                line = []
            line.append(step)
        yield self._painted(line)

    def _painted(self, found: Iterable[Step]) -> str:
        return _BETWEEN.join(self._terminal.paint(str(step), step.style) for step in found)

    def _print(self, line: str) -> None:
        self._write(f"{line}\n")

    def _write(self, text: str) -> None:
        self._terminal.stream.write(text)
        self._terminal.stream.flush()


def journey(record: Mapping[str, Any]) -> str:
    """Return what an upgrade goes from, and to, if that is known."""
    return f"{record['from']} -> {record['to']}" if record["to"] else str(record["from"])
