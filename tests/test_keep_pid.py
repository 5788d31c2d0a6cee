"""The process id is kept: the original process becomes each new version, and nothing is lost on the way.

The process that is on trial is the *trial* here, and the one that the service was started as the *original*,
whatever version it is just then.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import statistics
import threading
import time
from typing import TYPE_CHECKING, Any

import pytest
from clients import Asking, UnderWay
from load import Load
from programs import fake
from service import PATIENCE, Service, resident, resources

from selfupdate.settings import Limits

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from programs import Programs

pytestmark = pytest.mark.slow

UPGRADES = 30

# The trial waits at the gate before a step of the hand-back.
_HOLD = """
import os
from selfupdate import lifecycle
step = lifecycle.Lifecycle.step
def held(self, event):
    self.hands_back = event == "hand-back" or getattr(self, "hands_back", False)
    if self.hands_back and event == {event!r} and os.path.exists({gate!r}):
        open({gate!r}).read()
    return step(self, event)
lifecycle.Lifecycle.step = held
"""

# What a release does when the original process has executed it.
_ON_RETURN = """
from selfupdate import incumbent
init = incumbent.Incumbent.__init__
def begin(self, environ):
    init(self, environ)
    if self.comes_back:
        {then}
incumbent.Incumbent.__init__ = begin
"""
_CANNOT_EXECUTE = """
import errno, os
def refuse(*_):
    raise OSError(errno.ENOMEM, os.strerror(errno.ENOMEM))
os.execve = refuse
"""
_IS_UNHEALTHY = """
from selfupdate import incumbent, messages, presence
init, health = incumbent.Incumbent.__init__, presence.Presence.health
returned = []
def begin(self, environ):
    init(self, environ)
    returned.append(self.comes_back)
def answer(self):
    bad = returned == [True] and self._lifecycle.phase == {phase!r}
    return messages.json_response({{}}, 503) if bad else health(self)
incumbent.Incumbent.__init__, presence.Presence.health = begin, answer
"""

# Asks for health only when a request is under way.
_WAITS_UNHEALTHY = """
from selfupdate import successor
watch = successor.Successor.watch
def wait(self, seconds):
    if self.announces_itself:
        __import__("threading").Event().wait(1.0)
    watch(self, seconds)
successor.Successor.watch = wait
"""

EVENTS = ("hand-back", "announced", "probed", "replaced", "blessed")
"""The steps of a hand-back: before it begins, when the original stands by, is probed, has taken over, is to stay."""
ORIGINAL, TRIAL, BOTH = "original", "trial", "both"


class Handover:
    """An upgrade whose hand-back is held before a step, until it is let go on."""

    def __init__(self, service: Service, programs: Programs, directory: Path, event: str) -> None:
        self.gate = directory / "gate"
        os.mkfifo(self.gate)
        fault = _HOLD.format(event=event, gate=str(self.gate))
        (service.upgrade_dir / "new").symlink_to(programs.faulty("1.1.0", "held", fault))
        self.original = service.process.pid
        service.ask("POST", "/upgrade")
        self._opened = self.gate.open("wb", buffering=0)  # the trial waits at its other end
        self.trial = service.line(message="started a successor")["successor"]

    def processes(self, which: str) -> list[int]:
        return {ORIGINAL: [self.original], TRIAL: [self.trial], BOTH: [self.original, self.trial]}[which]

    def go_on(self) -> None:
        self.gate.unlink()
        self._opened.close()


@pytest.fixture
def service(start: Callable[..., Service]) -> Service:
    """Return a service with a short trial."""
    return start("-probation", "100ms", "-drain", "20s", "-standby", "10s")


def settled(service: Service, version: str, pid: int | None = None) -> Any:
    """Return the status once `version` serves for good as the process `pid`, or as the original one."""
    pid = pid or service.process.pid
    return service.status_when(
        lambda status: (status["version"], status["pid"], status["phase"]) == (version, pid, "RUNNING")
    )


def test_thirty_upgrades_and_rollbacks_under_load_keep_the_process_id(
    start: Callable[..., Service], programs: Programs, figure: Callable[[str], None]
) -> None:
    """No request of 16 clients fails, one process is left after each, and it holds no more than after the first."""
    service = start("-probation", "100ms", "-drain", "10s")
    pid = service.process.pid
    assert service.get("/version") == {"version": "1.0.0"}
    before, used, gaps, answered = resources(pid), [], [], 0
    with Load(service.address) as load:
        load.take()
        for number in range(1, UPGRADES + 1):
            version = f"1.0.{number}"
            if number % 10 == 0:  # back, and forth again by name
                assert service.roll_back()["outcome"] == "committed"
                settled(service, f"1.0.{number - 2}")
                assert service.upgrade(f"1.0.{number - 1}")["outcome"] == "committed"
                settled(service, f"1.0.{number - 1}")
            shutil.copy2(programs.version(version), service.upgrade_dir / version)
            assert service.upgrade()["outcome"] == "committed"
            settled(service, version)
            service.wait_until_alone(pid)
            figures = load.take()
            assert not figures.failed
            assert figures.ended_between_answers == 0
            answered += figures.answered
            gaps.append(figures.longest_gap)
            used.append(resident(pid))
    # The clients have gone; the last of their connections may still be closing, and nothing tells when they are.
    after = service.poll(lambda: resources(pid), lambda after: after["fd"] <= before["fd"])
    assert after["task"] < Limits().threads + 10
    assert used[-1] <= 1.2 * used[0]
    service.stop()
    assert service.statuses[pid] == 0
    figure(
        f"{UPGRADES} upgrades under one process id, {answered} requests, 0 failed; longest gap, median (worst): "
        f"{statistics.median(gaps) * 1000:.0f} ({max(gaps) * 1000:.0f}) ms; descriptors {before['fd']} before and "
        f"{after['fd']} after, resident {used[0]} and {used[-1]} KiB"
    )


def test_without_keep_pid_the_original_process_exits(start: Callable[..., Service], programs: Programs) -> None:
    """As in the plain protocol."""
    service = start("-probation", "100ms", "-keep-pid=false")
    (service.upgrade_dir / "new").symlink_to(programs.version("1.1.0"))
    assert service.upgrade()["outcome"] == "committed"
    assert service.process.wait(PATIENCE) == 0
    assert service.get("/status")["pid"] != service.process.pid


@pytest.mark.parametrize(
    ("fault", "reason"),
    [
        (_ON_RETURN.format(then="raise SystemExit(3)"), "ended before it stood by"),
        (_ON_RETURN.format(then="__import__('threading').Event().wait()"), "did not stand by within 7 s"),
        (_IS_UNHEALTHY.format(phase="STANDBY"), "is not healthy: it answered 503 when it was probed"),
        (_IS_UNHEALTHY.format(phase="TRIAL"), "is not healthy: it answered 503 on trial"),
    ],
    ids=["dies", "hangs", "unhealthy when probed", "unhealthy when it serves"],
)
def test_the_trial_serves_on_where_the_original_does_not_come_up(
    start: Callable[..., Service], programs: Programs, fault: str, reason: str
) -> None:
    """No request fails, the history says why the process id is another, and the next upgrade works."""
    service = start("-probation", "100ms", "-drain", "1s", "-standby", "6s")
    (service.upgrade_dir / "new").symlink_to(programs.faulty("1.1.0", "does-not-return", fault))
    asking = Asking(service.address)
    record = service.upgrade()
    assert record["outcome"] == "committed"
    trial = service.line(message="started a successor")["successor"]
    record = service.record_when(record["id"], lambda record: record["pid_not_kept"])
    assert record["pid_not_kept"] == f"the original process {reason}"
    settled(service, "1.1.0", trial)
    (service.upgrade_dir / "newer").symlink_to(programs.version("1.2.0"))
    assert service.upgrade()["outcome"] == "committed"
    settled(service, "1.2.0", trial)
    asking.stop()
    assert not asking.failed
    assert asking.answered
    service.stop()
    service.line(message="stopped", pid=trial)


def test_a_request_is_answered_by_an_original_that_is_not_wanted(
    start: Callable[..., Service], programs: Programs
) -> None:
    """The version that passed its trial takes over again at once, and lets the original end what it has begun."""
    service = start("-probation", "100ms", "-drain", "20s")
    fault = _IS_UNHEALTHY.format(phase="TRIAL")
    (service.upgrade_dir / "new").symlink_to(programs.faulty("1.1.0", "slow-when-unhealthy", fault + _WAITS_UNHEALTHY))
    service.ask("POST", "/upgrade")
    original, trial = service.process.pid, 0
    service.line(message="took over", pid=original)
    under_way = UnderWay(service.address)
    trial = service.line(message="started a successor")["successor"]
    service.line(message="the service has another process id than before")
    settled(service, "1.1.0", trial)
    assert under_way.finish().startswith(b"HTTP/1.1 400 ")
    os.kill(original, signal.SIGTERM)
    service.wait_for_end()
    assert service.statuses[original] == 0


@pytest.mark.parametrize("target", [ORIGINAL, TRIAL])
def test_where_it_cannot_be_executed_the_original_stays_with_the_trial(
    start: Callable[..., Service], programs: Programs, target: str
) -> None:
    """It passes a stop signal on, ends with it, and the next upgrade keeps the trial's process id."""
    program = programs.faulty("1.0.0", "cannot-execute", _CANNOT_EXECUTE)
    service = start("-probation", "100ms", "-drain", "1s", program=program)
    (service.upgrade_dir / "new").symlink_to(programs.version("1.1.0"))
    asking = Asking(service.address)
    record = service.upgrade()
    original, trial = service.process.pid, service.line(message="started a successor")["successor"]
    record = service.record_when(record["id"], lambda record: record["pid_not_kept"])
    assert record["pid_not_kept"] == "the original process failed: Cannot allocate memory"
    (service.upgrade_dir / "newer").symlink_to(programs.version("1.2.0"))
    assert service.upgrade()["outcome"] == "committed"
    settled(service, "1.2.0", trial)
    service.wait_until_alone(original, trial)
    asking.stop()
    assert not asking.failed
    os.kill({ORIGINAL: original, TRIAL: trial}[target], signal.SIGTERM)
    service.wait_for_end()
    assert service.statuses[original] == 0


def test_where_the_trial_dies_the_original_that_stays_with_it_ends_with_a_failure(
    start: Callable[..., Service], programs: Programs
) -> None:
    """So that a supervisor starts the service again."""
    service = start("-probation", "100ms", program=programs.faulty("1.0.0", "cannot-execute", _CANNOT_EXECUTE))
    (service.upgrade_dir / "new").symlink_to(programs.version("1.1.0"))
    record = service.upgrade()
    service.record_when(record["id"], lambda record: record["pid_not_kept"])
    os.kill(service.line(message="started a successor")["successor"], signal.SIGKILL)
    service.wait_for_end()
    assert service.statuses[service.process.pid] == 1


@pytest.mark.parametrize("target", [ORIGINAL, TRIAL, BOTH])
@pytest.mark.parametrize("event", EVENTS)
def test_a_kill_at_any_step_of_the_hand_back_leaves_the_other_one_serving(
    service: Service, programs: Programs, tmp_path: Path, event: str, target: str
) -> None:
    """Whoever is left serves, or the next start brings the new version; a further upgrade succeeds."""
    asking = Asking(service.address)
    handover = Handover(service, programs, tmp_path, event)
    for pid in handover.processes(target):
        os.kill(pid, signal.SIGKILL)
    handover.go_on()
    status = service.survivor()
    asking.stop()
    # Nobody is left where the trial no longer looks whether the original lives.
    if target == BOTH or (event, target) == ("blessed", ORIGINAL):
        assert status is None
        service.wait_for_end()
        service.restart()
        status = settled(service, "1.1.0")
    else:
        assert not asking.failed["ConnectionRefusedError"]
        (left,) = set(handover.processes(BOTH)) - set(handover.processes(target))
        assert status == settled(service, "1.1.0", left)
    (service.upgrade_dir / "newer").symlink_to(programs.version("1.2.0"))
    assert service.upgrade("newer")["outcome"] == "committed"
    settled(service, "1.2.0", status["pid"])


@pytest.mark.parametrize("target", [ORIGINAL, TRIAL, BOTH])
@pytest.mark.parametrize("event", EVENTS)
def test_a_stop_at_any_step_of_the_hand_back_ends_both(
    service: Service, programs: Programs, tmp_path: Path, event: str, target: str
) -> None:
    """What is under way is answered, and the original, which a supervisor knows, is the last to leave, with 0."""
    handover = Handover(service, programs, tmp_path, event)
    under_way = UnderWay(service.address)  # with whoever accepts
    for pid in handover.processes(target):
        os.kill(pid, signal.SIGTERM)
        service.line(message="stopping", pid=pid)
    handover.go_on()
    assert under_way.finish().startswith(b"HTTP/1.1 400 ")
    service.wait_for_end()
    assert service.statuses[handover.original] == 0
    last = [line["pid"] for line in service.lines if line["message"] in {"stopped", "retired"}]
    assert set(last) == {handover.original, handover.trial}


def test_a_request_that_is_under_way_at_the_original_is_answered_first(service: Service, programs: Programs) -> None:
    """It becomes the new version when the last one has its answer, and others are served meanwhile."""
    under_way = UnderWay(service.address)
    (service.upgrade_dir / "new").symlink_to(programs.version("1.1.0"))
    assert service.ask("POST", "/upgrade").status == 202
    service.line(message="settled", phase="STARTING")
    assert service.get("/version") == {"version": "1.1.0"}
    assert not [line for line in service.lines if line["message"] == "becomes the new version"]
    assert under_way.finish().startswith(b"HTTP/1.1 400 ")
    settled(service, "1.1.0")


def test_a_stop_signal_while_the_release_is_executed_is_not_lost(
    service: Service, programs: Programs, tmp_path: Path
) -> None:
    """It waits until the new image can take it (signal mask and pending signals outlast execve(2))."""
    gate = tmp_path / "gate"
    os.mkfifo(gate)
    pid = tmp_path / "pid"
    wait = f"import os\nif open({str(pid)!r}).read() == str(os.getpid()):\n    open({str(gate)!r}).close()"
    pid.write_text(str(service.process.pid))
    (service.upgrade_dir / "new").symlink_to(programs.faulty("1.1.0", "slow-to-start", wait))
    service.ask("POST", "/upgrade")
    with gate.open("wb"):  # the new image has begun, and has no handler yet
        os.kill(service.process.pid, signal.SIGTERM)
    service.wait_for_end()
    assert service.statuses[service.process.pid] == 0


@pytest.mark.parametrize("event", ["announced", "replaced"])
def test_an_upgrade_that_is_asked_for_meanwhile_is_done_by_the_original(
    service: Service, programs: Programs, tmp_path: Path, event: str
) -> None:
    """Whichever accepts just then: the request waits, and gets its answer from the process that does it."""
    handover = Handover(service, programs, tmp_path, event)
    (service.upgrade_dir / "newer").symlink_to(programs.version("1.2.0"))
    answers: list[Any] = []
    asking = threading.Thread(target=lambda: answers.append(service.ask("POST", "/upgrade")))
    asking.start()
    handover.go_on()
    asking.join(PATIENCE)
    assert answers[0].status == 202
    settled(service, "1.2.0")


def test_a_version_that_dies_as_it_is_blessed_is_started_by_the_original(service: Service, programs: Programs) -> None:
    """It is committed, nobody serves it, and the original has the listeners still."""
    dies = """
import os
from selfupdate import incumbent
take = incumbent.Standby._take_message
def die(self, message):
    if "blessed" in message:
        os._exit(7)
    take(self, message)
if "-upgrade" in __import__("sys").argv and not os.path.exists("returned"):
    incumbent.Standby._take_message = die
    open("returned", "w").close()
"""
    asking = Asking(service.address)
    (service.upgrade_dir / "new").symlink_to(programs.faulty("1.1.0", "dies-as-blessed", dies))
    service.ask("POST", "/upgrade")
    assert service.survivor() is not None
    settled(service, "1.1.0")
    asking.stop()
    assert not asking.failed["ConnectionRefusedError"]
    service.wait_until_alone(service.process.pid)
    (service.upgrade_dir / "newer").symlink_to(programs.version("1.2.0"))
    assert service.upgrade("newer")["outcome"] == "committed"
    settled(service, "1.2.0")


def test_a_stranger_on_the_temporary_address_keeps_the_original_out(
    start: Callable[..., Service], programs: Programs
) -> None:
    """It stays with the version that serves on, which the supervisor does not lose."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    service = start("-probation", "100ms", "-drain", "5s", "-upgrade-bind", f"localhost:{port}")
    under_way = UnderWay(service.address)  # which holds the original up
    (service.upgrade_dir / "new").symlink_to(programs.version("1.1.0"))
    record = service.ask("POST", "/upgrade").json
    service.line(message="settled", phase="STARTING")
    with _squat(port):
        under_way.finish()
        record = service.record_when(record["id"], lambda record: record["pid_not_kept"])
        assert "Address already in use" in record["pid_not_kept"] or "another process listens" in record["pid_not_kept"]
    trial = service.line(message="started a successor")["successor"]
    settled(service, "1.1.0", trial)
    service.wait_until_alone(service.process.pid, trial)
    os.kill(service.process.pid, signal.SIGTERM)
    service.wait_for_end()
    assert service.statuses[service.process.pid] == 0


@contextlib.contextmanager
def _squat(port: int) -> Iterator[None]:
    # The trial gives the address back just behind its word that it is settled: nothing tells when.
    deadline = time.monotonic() + PATIENCE
    while True:
        try:
            squatter = socket.create_server(("127.0.0.1", port))
            break
        except OSError:
            assert time.monotonic() < deadline
    with squatter:
        yield


def test_a_stop_while_the_original_drains_reaches_the_trial_at_once(service: Service, programs: Programs) -> None:
    """Nothing new is begun for as long as the last request at the original takes."""
    under_way = UnderWay(service.address)
    (service.upgrade_dir / "new").symlink_to(programs.version("1.1.0"))
    service.ask("POST", "/upgrade")
    service.line(message="settled", phase="STARTING")
    trial = service.line(message="started a successor")["successor"]
    os.kill(service.process.pid, signal.SIGTERM)
    service.line(message="stopped", pid=trial)
    assert service.process.poll() is None
    assert under_way.finish().startswith(b"HTTP/1.1 400 ")
    service.wait_for_end()
    assert service.statuses[service.process.pid] == 0


def test_a_hang_up_while_the_original_drains_waits_for_the_new_version(service: Service, programs: Programs) -> None:
    """SIGHUP asks for an upgrade, and which version does it is all the same."""
    under_way = UnderWay(service.address)
    (service.upgrade_dir / "new").symlink_to(programs.version("1.1.0"))
    service.ask("POST", "/upgrade")
    service.line(message="settled", phase="STARTING")
    (service.upgrade_dir / "newer").symlink_to(programs.version("1.2.0"))
    os.kill(service.process.pid, signal.SIGHUP)
    under_way.finish()
    settled(service, "1.2.0")


def test_a_rebound_listener_is_handed_back_too(start: Callable[..., Service], programs: Programs) -> None:
    """Behind an upgrade to a plain successor that failed, the service has other listeners than it began with."""
    service = start("-probation", "100ms", "-drain", "1s")
    fake(service.upgrade_dir / "plain", "plain", "1.0.5", "dies after its first answer")
    assert service.upgrade()["outcome"] == "rolled-back"
    (service.upgrade_dir / "new").symlink_to(programs.version("1.1.0"))
    assert service.upgrade("new")["outcome"] == "committed"
    settled(service, "1.1.0")


def test_the_next_upgrade_waits_until_all_of_the_hand_back_is_done(
    service: Service, programs: Programs, tmp_path: Path
) -> None:
    """The original serves, and is asked to upgrade, before its main thread has come to know that it is settled."""
    gate = tmp_path / "gate"
    os.mkfifo(gate)
    hold = f"""
from selfupdate import service
settle = service._Service._settle
def wait(self):
    if self._incumbent.comes_back:
        open({str(gate)!r}).read()
    settle(self)
service._Service._settle = wait
"""
    (service.upgrade_dir / "new").symlink_to(programs.faulty("1.1.0", "settles-late", hold))
    service.upgrade()
    service.line(message="settled", phase="RUNNING", pid=service.process.pid)
    answers: list[Any] = []
    asking = threading.Thread(target=lambda: answers.append(service.ask("POST", "/rollback?wait=30s").json))
    with gate.open("wb"):
        asking.start()
        asking.join(0.5)  # nothing tells that a request waits; one that does not is done by then
        assert asking.is_alive()
    asking.join(PATIENCE)
    assert answers[0]["to"] == "1.0.0", answers
    settled(service, "1.0.0")
