"""Stop signals: in every phase, to either process or both, both end, and what is under way is answered."""

from __future__ import annotations

import os
import signal
import socket
import threading
import time
from typing import TYPE_CHECKING

import pytest
from clients import UnderWay
from programs import shell, write_program
from service import PATIENCE

from selfupdate.lifecycle import TRANSITIONS, Event, Phase
from selfupdate.settings import Limits

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from programs import Programs
    from service import Service

pytestmark = pytest.mark.slow

# The incumbent waits in a phase until the test opens the gate: just behind the step into the phase,
# or, where the phase begins with something that has to be there, just behind that.
_HOLD_IN_STEP = """
from selfupdate import upgrade
step = upgrade.Upgrader._step
def hold(self, upgrade_id, event, **fields):
    step(self, upgrade_id, event, **fields)
    if self._lifecycle.phase == {phase!r}:
        open({gate!r}).read()
upgrade.Upgrader._step = hold
"""
_HOLD_IN_CALL = """
from selfupdate import candidates, successor
call = {owner}.{name}
def hold(self, *arguments):
    open({gate!r}).read()
    return call(self, *arguments)
{owner}.{name} = hold
"""
_CALLS = {
    Phase.CHOOSING: ("candidates.Scanner", "choose"),
    Phase.STARTING: ("successor.Successor", "wait_for_standby"),
}

_GOES_BAD = """
from selfupdate import messages, presence
health = presence.Presence._health
def answer(self, request):
    return messages.problem(500, "Out of order.") if self._lifecycle.phase == "TRIAL" else health(self, request)
presence.Presence._health = answer
"""

INCUMBENT, SUCCESSOR, BOTH = "incumbent", "successor", "both"
_WITH_SUCCESSOR = (Phase.PROBING, Phase.REPLACING, Phase.PROBATION)

CASES = [
    *((phase, INCUMBENT) for phase in Phase if Event.STOP in TRANSITIONS[phase] and phase not in {"STANDBY", "TRIAL"}),
    *((phase, target) for phase in _WITH_SUCCESSOR for target in (SUCCESSOR, BOTH)),
]
"""Every phase of the incumbent; in the last three the successor is in STANDBY, STANDBY and TRIAL."""


@pytest.mark.parametrize(("phase", "target"), CASES, ids=str)
def test_a_stop_signal_ends_both_processes_and_no_request_is_lost(
    start: Callable[..., Service], programs: Programs, tmp_path: Path, phase: Phase, target: str
) -> None:
    """Requests under way are answered, no process is left, and each that was asked to stop exits with 0."""
    gate = tmp_path / "gate"
    os.mkfifo(gate)
    if phase in _CALLS:
        owner, name = _CALLS[phase]
        fault = _HOLD_IN_CALL.format(owner=owner, name=name, gate=str(gate))
    else:
        fault = _HOLD_IN_STEP.format(phase=str(phase), gate=str(gate))
    service = start("-probation", "20s", program=programs.faulty("1.0.0", f"held-in-{phase}", fault))
    if phase is Phase.ABORTING:
        shell(service.upgrade_dir / "candidate", "2.0.0", "exit 3")
    elif phase is Phase.ROLLING_BACK:
        programs.faulty("2.0.0", "bad", _GOES_BAD).rename(service.upgrade_dir / "candidate")
    else:
        (service.upgrade_dir / "candidate").symlink_to(programs.version("2.0.0"))

    under_way = [UnderWay(service.address)]
    asking = None
    if phase is not Phase.RUNNING:
        asking = socket.create_connection(service.address, PATIENCE)
        asking.sendall(b"POST /upgrade HTTP/1.1\r\nHost: localhost\r\nContent-Length: 0\r\nConnection: close\r\n\r\n")
        opened = gate.open("wb", buffering=0)  # the incumbent waits at its end
    incumbent, successor = service.process.pid, 0
    if phase in _WITH_SUCCESSOR:
        successor = service.line(message="started a successor")["successor"]
    if phase is Phase.PROBATION:
        under_way.append(UnderWay(service.address))  # on the successor, which alone accepts

    told = {INCUMBENT: [incumbent], SUCCESSOR: [successor], BOTH: [incumbent, successor]}[target]
    for pid in told:
        os.kill(pid, signal.SIGTERM)
    for pid in told:
        service.line(message="stopping", pid=pid)
    if phase is not Phase.RUNNING:
        opened.close()
    for request in under_way:
        assert request.finish().startswith(b"HTTP/1.1 400 ")
    service.wait_for_end()
    assert service.statuses[incumbent] == 0
    if successor:
        service.line(message="the successor ended with status 0", successor=successor)
    if asking is not None:
        with asking:
            assert asking.recv(4096).startswith(b"HTTP/1.1 "), "the request for the upgrade was not answered"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_the_connections_that_wait_at_the_end_are_answered(
    start: Callable[..., Service], number: signal.Signals
) -> None:
    """A client that has connected is served, whatever came first: its request or the signal."""
    service = start()
    with socket.create_connection(service.address, PATIENCE) as client:
        os.kill(service.process.pid, number)
        service.line(message="stopping")
        client.sendall(b"GET /version HTTP/1.1\r\nHost: localhost\r\n\r\n")
        answer = client.recv(4096)
    assert answer.startswith(b"HTTP/1.1 200 ")
    assert b"\r\nConnection: close\r\n" in answer
    service.wait_for_end()
    assert service.statuses[service.process.pid] == 0


def test_the_incumbent_is_killed_on_trial(start: Callable[..., Service], programs: Programs) -> None:
    """Who has taken over serves on, and the history says what happened."""
    service = start("-probation", "20s")
    (service.upgrade_dir / "candidate").symlink_to(programs.version("2.0.0"))
    upgrade_id = service.ask("POST", "/upgrade").json["id"]
    service.line(upgrade=upgrade_id, phase="PROBATION")
    service.process.kill()
    status = service.status_when(lambda status: status["phase"] == "RUNNING")
    assert status["version"] == "2.0.0"
    record = service.record_when(upgrade_id, lambda record: record["outcome"] is not None)
    assert record["outcome"] == "interrupted"
    service.stop()
    assert service.statuses[status["pid"]] == 0


def test_the_incumbent_is_killed_while_a_stranger_starts(start: Callable[..., Service]) -> None:
    """A candidate that knows no protocol does not live on with the port: the service can be started again."""
    service = start()
    shell(service.upgrade_dir / "candidate", "2.0.0", "sleep 600")
    service.ask("POST", "/upgrade")
    service.line(message="started a successor")
    service.process.kill()
    service.wait_for_end()


def test_a_stop_signal_does_not_wait_for_candidates(start: Callable[..., Service]) -> None:
    """Those that are being asked for their version are ended, and the request gets its answer."""
    service = start()
    for number in range(20):
        write_program(service.upgrade_dir / str(number), f"#!/bin/sh\n# {number}\nexec sleep 600\n".encode())
    answers: list[int] = []
    asking = threading.Thread(target=lambda: answers.append(service.ask("POST", "/upgrade").status))
    asking.start()
    service.status_when(lambda status: status["phase"] == "CHOOSING")
    began = time.monotonic()
    os.kill(service.process.pid, signal.SIGTERM)
    service.wait_for_end()
    asking.join()
    assert answers == [503]
    assert service.statuses[service.process.pid] == 0
    assert time.monotonic() - began < Limits().version_time, "it waited for a candidate"


def test_the_incumbent_is_killed_before_the_successor_takes_over(
    start: Callable[..., Service], programs: Programs, tmp_path: Path
) -> None:
    """A successor that nobody will ask any more leaves: no process is left behind."""
    gate = tmp_path / "gate"
    os.mkfifo(gate)
    held = programs.faulty("1.0.0", "held", _HOLD_IN_STEP.format(phase="PROBING", gate=str(gate)))
    service = start(program=held)
    (service.upgrade_dir / "candidate").symlink_to(programs.version("2.0.0"))
    service.ask("POST", "/upgrade")
    successor = service.line(message="started a successor")["successor"]
    service.line(phase="PROBING")
    service.process.kill()
    service.wait_for_end()
    assert service.statuses[successor] in {0, -signal.SIGKILL}  # it left, or its guard was quicker
