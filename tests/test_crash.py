"""A kill at every step: whoever is left serves, or the program on disk does, and the journal explains it.

The cases are generated from the transition table, so that no step can be forgotten. A process is
held at a moment of a transition, just before anything of it is done or just behind its record in
the journal; behind its effect is just before the next. Then the incumbent, the successor or both
are killed, and the rest goes on.
"""

from __future__ import annotations

import contextlib
import http.client
import os
import shutil
import signal
import subprocess
import threading
from dataclasses import dataclass
from typing import TYPE_CHECKING

import pytest
from clients import Asking
from programs import shell
from service import PATIENCE, Service, has_settled

from selfupdate.lifecycle import TRANSITIONS, Event, Phase

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from programs import Programs

pytestmark = pytest.mark.slow

BEFORE, RECORDED = "before", "recorded"
INCUMBENT, SUCCESSOR, BOTH = "incumbent", "successor", "both"
UPGRADE, ROLLBACK = "upgrade", "rollback"
NO_GOOD = "old"
"""A candidate that is not eligible: asking for one that is not there is written down nowhere."""

# Waits at the gate at the moment, once, in the process that is on its way from the phase by the event.
_HOLD = """
import os
from selfupdate import lifecycle, upgrade
phase, event, moment, kind, gate = os.environ.get("HOLD", "::::").split(":")
held = []
def hold(then):
    if then == moment and not held and os.path.exists(gate):
        held.append(True)
        open(gate).read()
step, write = lifecycle.Lifecycle.step, upgrade.Upgrader._step
def machine_step(self, given):
    is_it = (self._phase, given) == (phase, event) and is_kind()
    if is_it:
        hold("before")
    target = step(self, given)
    if is_it and phase in ("RUNNING", "STANDBY", "TRIAL"):
        hold("recorded")
    return target
def driver_step(self, upgrade_id, given, **fields):
    is_it = (self._lifecycle.phase, given) == (phase, event) and is_kind()
    write(self, upgrade_id, given, **fields)
    if is_it:
        hold("recorded")
kinds = []
claim = upgrade.Upgrader._claim
def remember(self, kind, **fields):
    kinds.append(kind)
    return claim(self, kind, **fields)
def is_kind():
    return not kinds or kinds[-1] == kind
lifecycle.Lifecycle.step, upgrade.Upgrader._step, upgrade.Upgrader._claim = machine_step, driver_step, remember
"""

# What goes wrong on the way from a phase: in the incumbent, or in the successor as soon as it is one.
_INCUMBENT_FAILS = {
    Phase.CHOOSING: """
from selfupdate import errors, upgrade
def previous(self):
    raise errors.NotEligibleError("gone")
upgrade.Upgrader._previous = previous
""",
    Phase.STAGING: """
from selfupdate import errors, releases
confirm = releases.Store.confirm
def refuse(self, release):
    if release.name != "1.2.0":
        raise errors.CandidateError("changed")
    confirm(self, release)
releases.Store.confirm = refuse
""",
}
_FAILS_TO_START = """
import sys
if "-upgrade" in sys.argv:
    sys.exit(3)
"""
_FAILS_ON_TRIAL = """
from selfupdate import messages, presence
health = presence.Presence._health
def answer(self, request):
    return messages.problem(500, "Out of order.") if self._lifecycle.phase == "TRIAL" else health(self, request)
presence.Presence._health = answer
"""
_SUCCESSOR_FAILS = {
    Phase.STARTING: _FAILS_TO_START,
    Phase.ABORTING: _FAILS_TO_START,
    Phase.PROBING: """
from selfupdate import messages, presence
health = presence.Presence.health
def answer(self):
    return messages.json_response({}, 503) if self._lifecycle.phase == "STANDBY" else health(self)
presence.Presence.health = answer
""",
    Phase.REPLACING: """
from selfupdate import incumbent, messages
incumbent.Standby._take_over = lambda self: messages.problem(503, "No.")
""",
    Phase.PROBATION: _FAILS_ON_TRIAL,
    Phase.ROLLING_BACK: _FAILS_ON_TRIAL,
}


@dataclass(frozen=True)
class Case:
    """One kill: at a moment of a transition, of an upgrade or a rollback, of one process or both."""

    kind: str
    phase: Phase
    event: Event
    moment: str
    target: str

    def __str__(self) -> str:
        return f"{self.kind}-{self.phase}-{self.event}-{self.moment}-{self.target}"

    @property
    def is_successors(self) -> bool:
        return self.phase in {Phase.STANDBY, Phase.TRIAL}

    @property
    def goes_wrong(self) -> bool:
        """Whether the transition belongs to an upgrade that fails by itself."""
        return self.event in {Event.FAILED, Event.REVERTED}


# With a successor that is alive at each moment of the transition.
_ACCOMPANIED = {Phase.STARTING, Phase.PROBING, Phase.REPLACING, Phase.PROBATION, Phase.STANDBY, Phase.TRIAL}
# Stops have tests of their own; UP_TO_DATE ends what was nothing; the way from the end is none;
# and an orphan is what the other kills make.
_ELSEWHERE = {Event.STOP, Event.UP_TO_DATE, Event.STOPPED, Event.ORPHANED, Event.HAND_BACK, Event.DISMISSED}
"""What is shown elsewhere: the last two in `test_keep_pid`."""


def _cases() -> Iterator[Case]:
    for kind in (UPGRADE, ROLLBACK):
        for phase, row in TRANSITIONS.items():
            for event in row.keys() - _ELSEWHERE:
                wrong = event in {Event.FAILED, Event.REVERTED}
                accompanied = phase in _ACCOMPANIED and not (phase is Phase.STARTING and wrong)
                for moment in (BEFORE, RECORDED):
                    for target in (INCUMBENT, SUCCESSOR, BOTH) if accompanied else (INCUMBENT,):
                        yield Case(kind, phase, event, moment, target)


CASES = sorted(_cases(), key=str)


def _version_of(program: Path) -> str:
    ran = subprocess.run([program, "-version"], capture_output=True, text=True, timeout=PATIENCE, check=True)
    return ran.stdout.strip()


def _prepare(case: Case, programs: Programs, directory: Path, gate: Path) -> tuple[Service, str]:
    """Start a service, and put the candidate there; return it with the name of the candidate."""
    environ = {"HOLD": f"{case.phase}:{case.event}:{case.moment}:{case.kind}:{gate}"}
    old, new = "1.0.0", "1.1.0"
    flags = ("-probation", "100ms", "-drain", "2s", "-standby", "10s", "-keep-pid=false")

    def program(version: str, *, is_held: bool, faults: dict[Phase, str]) -> Path:
        fault = faults.get(case.phase, "") if case.goes_wrong else ""
        if not is_held and not fault:
            return programs.version(version)
        return programs.faulty(version, "faulty", (_HOLD if is_held else "") + fault)

    incumbent = program(old if case.kind == UPGRADE else new, is_held=not case.is_successors, faults=_INCUMBENT_FAILS)
    successor = program(new if case.kind == UPGRADE else old, is_held=case.is_successors, faults=_SUCCESSOR_FAILS)
    first, second = (incumbent, successor) if case.kind == UPGRADE else (successor, incumbent)
    service = Service(first, directory, *flags, environ=environ)
    shutil.copy2(second, service.upgrade_dir / new)
    shell(service.upgrade_dir / NO_GOOD, "0.9.0", "exit 3")
    if case.kind == ROLLBACK:  # from the newer version to the older one, which was there first
        assert service.upgrade()["outcome"] == "committed"
        service.status_when(lambda status: status["phase"] == "RUNNING" and status["version"] == new)
        service.process.wait(PATIENCE)
    return service, new


@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_kill_at_any_step_leaves_something_that_works(case: Case, programs: Programs, tmp_path: Path) -> None:
    """Somebody serves, the program on disk is whole and the right one, and a further upgrade succeeds."""
    gate = tmp_path / "gate"
    os.mkfifo(gate)
    service, name = _prepare(case, programs, tmp_path, gate)
    with contextlib.closing(service):
        before = service.get("/status")["version"]
        after = {"1.0.0": "1.1.0", "1.1.0": "1.0.0"}[before]
        incumbent = service.get("/status")["pid"]
        asking = Asking(service.address)
        lines = len(service.lines)
        ask = threading.Thread(target=_request, args=(service, case, name))
        ask.start()
        with gate.open("wb"):  # somebody waits at its other end
            successors = (
                [] if case.target == INCUMBENT else [service.line(lines, message="started a successor")["successor"]]
            )
            victims = {INCUMBENT: [incumbent], SUCCESSOR: successors, BOTH: [incumbent, *successors]}[case.target]
            assert victims
            for pid in victims:
                os.kill(pid, signal.SIGKILL)
            gate.unlink()
        status = service.survivor()
        ask.join(PATIENCE)
        has_survived = status is not None
        if has_survived:
            service.wait_until_alone(status["pid"])
            asking.stop()
            assert not asking.failed["ConnectionRefusedError"]
        else:
            asking.stop()
            service.wait_for_end()
            assert _version_of(service.program) in {before, after}
            service.restart()
            status = service.status_when(lambda status: status["phase"] == "RUNNING")
        newest = (service.get("/upgrades")["upgrades"] or [None])[0]
        is_this = newest is not None and newest["from"] == before
        if is_this:
            newest = service.record_when(newest["id"], has_settled)
            assert newest["outcome"] == "committed" or newest["reason"]
        committed = is_this and newest["outcome"] == "committed"
        assert _version_of(service.program) == (after if committed else before)
        if not has_survived:
            assert status["version"] == (after if committed else before)
        (service.upgrade_dir / "1.2.0").symlink_to(programs.version("1.2.0"))
        assert service.upgrade("1.2.0")["outcome"] == "committed"
        assert _version_of(service.program) == "1.2.0"


def _request(service: Service, case: Case, name: str) -> None:
    """Ask for what is to be interrupted; the answer may be lost with the process that owes it."""
    is_no_good = (case.phase, case.event) == (Phase.CHOOSING, Event.FAILED)
    with contextlib.suppress(OSError, http.client.HTTPException):
        if case.kind == ROLLBACK:
            service.ask("POST", "/rollback")
        else:
            service.ask("POST", "/upgrade", {"name": NO_GOOD if is_no_good else name})
