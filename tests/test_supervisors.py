"""Under other service managers than systemd, and as the first process of a container: one process id, for good."""

from __future__ import annotations

import contextlib
import os
import signal
from typing import TYPE_CHECKING, Any, Protocol

import pytest
from programs import fake
from supervisors import NONE, RUNIT, S6, SUPERVISORD, TINI, Supervised, Supervisor, supervise

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from programs import Programs

pytestmark = pytest.mark.slow

WITH_CONTROL = (RUNIT, S6, SUPERVISORD)
"""Those that stay when the service has been stopped, and start it again when it has crashed."""


def each(*supervisors: Supervisor) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("supervisor", supervisors, ids=lambda supervisor: supervisor.name)


class Served:
    """A service that serves, and the processes that there are when nothing is under way."""

    def __init__(self, service: Supervised, programs: Programs) -> None:
        service.line(message="serving")
        self.service = service
        self.pid = service.pid
        self.all = self.pids()
        self._programs = programs

    def pids(self) -> set[int]:
        return {process.pid for process in self.service.namespaces.inhabitants()}

    def offer(self, version: str) -> None:
        (self.service.upgrade_dir / version).symlink_to(self._programs.version(version))

    def upgrade(self, version: str) -> None:
        """Upgrade to a version, and wait until it has settled."""
        self.offer(version)
        record = self.service.upgrade()
        assert (record["to"], record["outcome"]) == (version, "committed"), record
        assert self.settled()["version"] == version

    def settled(self) -> Any:
        """Return the status when the process that the supervisor knows serves, and the others are those of before."""
        return self.service.status_when(
            lambda status: (status["pid"], status["phase"]) == (self.pid, "RUNNING") and self.pids() == self.all
        )


class Start(Protocol):
    """Has a supervisor start version 1.0.0."""

    def __call__(self, supervisor: Supervisor, *flags: str) -> Served: ...


@pytest.fixture
def start(programs: Programs, tmp_path: Path, tool: Callable[[str], str]) -> Iterator[Start]:
    """Have a supervisor start the service, all of it ended with the test."""
    with contextlib.ExitStack() as stack:

        def start(supervisor: Supervisor, *flags: str) -> Served:
            for name in supervisor.tools:
                tool(name)
            service = stack.enter_context(supervise(supervisor, programs.version("1.0.0"), tmp_path, *flags))
            return Served(service, programs)

        yield start


@each(*WITH_CONTROL, TINI, NONE)
def test_the_process_that_the_supervisor_knows_is_the_one_that_serves(start: Start, supervisor: Supervisor) -> None:
    """After three upgrades and a rollback it is the same one, and none is there that was not there before."""
    served = start(supervisor)
    for version in ("1.1.0", "1.2.0", "1.3.0"):
        served.upgrade(version)
        assert served.service.pid == served.pid
    assert served.service.roll_back()["outcome"] == "committed"
    status = served.settled()
    assert (status["version"], status["installed"]) == ("1.2.0", {"version": "1.2.0", "reason": None})
    assert served.service.pid == served.pid


@each(*WITH_CONTROL, TINI, NONE)
def test_the_supervisor_s_hang_up_upgrades(start: Start, supervisor: Supervisor) -> None:
    """SIGHUP, which each of them can send, starts an upgrade."""
    served = start(supervisor)
    served.offer("1.1.0")
    served.service.reload()
    served.service.line(phase="RETIRED", outcome="committed")
    assert served.settled()["version"] == "1.1.0"


@each(*WITH_CONTROL)
@pytest.mark.parametrize("upgrades", [0, 1])
def test_the_supervisor_s_stop_stops_it(start: Start, supervisor: Supervisor, upgrades: int) -> None:
    """No process is left that serves on, or was left behind, and the supervisor does not start it again."""
    served = start(supervisor)
    if upgrades:
        served.upgrade("1.1.0")
    served.service.stop()
    served.service.line(message="stopped", pid=served.pid)
    served.service.wait_for_pids(lambda pids: pids == served.all - {served.pid})


@each(*WITH_CONTROL)
def test_a_crash_brings_back_the_version_that_was_upgraded_to(start: Start, supervisor: Supervisor) -> None:
    """The supervisor starts the program again, which is the new one."""
    served = start(supervisor)
    served.upgrade("1.1.0")
    since = len(served.service.lines)
    served.service.namespaces.run("kill", "-KILL", str(served.pid))
    line = served.service.line(since, message="serving", generation=0)
    assert line["version"] == "1.1.0"
    assert line["pid"] == served.service.pid != served.pid


@each(TINI, NONE)
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("upgrades", [0, 1])
def test_a_container_that_is_stopped_ends_with_0(
    start: Start, supervisor: Supervisor, number: signal.Signals, upgrades: int
) -> None:
    """A signal to its first process ends the service cleanly, in whichever version."""
    served = start(supervisor)
    if upgrades:
        served.upgrade("1.1.0")
    os.kill(served.service.namespaces.pid, number)
    assert served.service.namespaces.wait() == 0
    served.service.line(message="stopped", pid=served.pid)


@each(TINI, NONE)
@pytest.mark.parametrize("told", ["original", "trial"])
def test_a_stop_signal_reaches_the_version_on_trial(start: Start, supervisor: Supervisor, told: str) -> None:
    """Whichever of the two processes is told, both end cleanly, and the container with them."""
    served = start(supervisor, "-probation", "30s")
    served.offer("1.1.0")
    served.service.ask("POST", "/upgrade")
    served.service.line(phase="PROBATION")
    if told == "original":
        os.kill(served.service.namespaces.pid, signal.SIGTERM)
    else:
        trial = served.service.line(message="started a successor")["successor"]
        served.service.namespaces.run("kill", str(trial))
    assert served.service.namespaces.wait() == 0
    for version in ("1.0.0", "1.1.0"):
        served.service.line(message="stopped", version=version)


@pytest.mark.parametrize("upgrades", [0, 1])
def test_the_first_process_reaps_strangers(start: Start, upgrades: int) -> None:
    """A process whose parent has gone falls to the first one, and does not stay as a zombie."""
    served = start(NONE)
    if upgrades:
        served.upgrade("1.1.0")
    orphan = int(served.service.namespaces.run("sh", "-c", "cat <&0 & echo $!").stdout)
    served.service.wait_for_pids(lambda pids: orphan not in pids)


@pytest.mark.parametrize("name", ["plain", "full"])
def test_the_first_process_stays_with_one_that_cannot_hand_back(start: Start, name: str) -> None:
    """A foreign program serves; the container goes on, and ends with it when it is told to stop."""
    served = start(NONE, "-drain", "2s")
    fake(served.service.upgrade_dir / "foreign", name, "2.0.0", "serves")
    assert served.service.ask("POST", "/upgrade", {"name": "foreign"}).status == 202
    served.service.line(message="retired", pid=served.pid)
    assert served.service.get("/version")["version"] == "2.0.0"
    os.kill(served.service.namespaces.pid, signal.SIGTERM)
    assert served.service.namespaces.wait() == 1  # as the foreign one ends: by the signal
