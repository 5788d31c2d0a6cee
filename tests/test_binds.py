"""Several addresses, Unix sockets, and sockets that a service manager passes on: each is served and handed over."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from load import Load
from programs import fake
from service import PATIENCE, Place, Service, as_manager, connect

from selfupdate import listener as listeners
from selfupdate.listener import Address

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from programs import Programs

pytestmark = pytest.mark.slow

QUICK = ("-probation", "300ms", "-drain", "10s")
TRIAL = ("-probation", "20s", "-drain", "10s")

_FAILS_ON_TRIAL = """
from selfupdate import messages, presence
health = presence.Presence._health
def answer(self, request):
    if self._lifecycle.phase == "TRIAL" and "user-agent" not in request.headers:
        return messages.problem(500, "Out of order.")
    return health(self, request)
presence.Presence._health = answer
"""


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """Return the path of a Unix socket that is not there yet."""
    return tmp_path / "s"


@pytest.fixture
def activate(programs: Programs, tmp_path: Path) -> Iterator[Callable[..., Service]]:
    """Start services that get the sockets given, as from a service manager, which keeps its own copies."""
    services: list[Service] = []

    def activate(*flags: str, passed: Sequence[socket.socket], names: str, program: Path | None = None) -> Service:
        environ = {"LISTEN_FDNAMES": names}
        chosen = program or programs.version("1.0.0")
        services.append(Service(chosen, tmp_path, *flags, passed=passed, environ=environ))
        return services[-1]

    yield activate
    for service in services:
        service.kill()


class Manager:
    """What a service manager does before it starts anything: it listens."""

    def __init__(self, path: Path) -> None:
        self.tcp = listeners.bind(Address("127.0.0.1", 0))
        self.unix = listeners.bind(Address(path=str(path)))
        self.tcp_bind = f"127.0.0.1:{self.tcp.getsockname()[1]}"
        self.unix_bind = f"unix:{path}"
        self.places: list[Place] = [("127.0.0.1", self.tcp.getsockname()[1]), str(path)]

    def close(self) -> None:
        self.tcp.close()
        self.unix.close()


@pytest.fixture
def manager(path: Path) -> Iterator[Manager]:
    """Listen on an address and on a path."""
    with contextlib.closing(Manager(path)) as manager:
        yield manager


def _run(*command: object, fds: Sequence[int] = (), **environ: str) -> subprocess.CompletedProcess[str]:
    given = {**os.environ, **environ}
    return subprocess.run(
        [str(word) for word in command],
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        check=False,
        pass_fds=fds,
        env=given,
    )


def _environ(pid: int) -> dict[str, str]:
    entries = Path(f"/proc/{pid}/environ").read_text(encoding="utf-8").split("\0")
    return dict(entry.split("=", 1) for entry in entries if "=" in entry)


def _running(service: Service, version: str) -> Any:
    """Wait until `version` serves for good, alone; return the status."""
    status = service.status_when(lambda status: (status["phase"], status["version"]) == ("RUNNING", version))
    service.wait_until_alone(status["pid"])
    return status


def _go_through_all(service: Service, programs: Programs, figure: Callable[[str], None]) -> None:
    """Upgrade, go back, and fail to upgrade; clients that ask without pause on each address lose no request."""
    bind = service.get("/status")["bind"]
    with contextlib.ExitStack() as running:
        loads = [running.enter_context(Load(place)) for place in service.places]
        (service.upgrade_dir / "good").symlink_to(programs.version("1.1.0"))
        assert service.upgrade()["outcome"] == "committed"
        assert _running(service, "1.1.0")["bind"] == bind
        assert service.roll_back()["outcome"] == "committed"
        assert _running(service, "1.0.0")["bind"] == bind
        programs.faulty("1.2.0", "bad", _FAILS_ON_TRIAL).rename(service.upgrade_dir / "bad")
        assert service.upgrade("bad")["reason"] == "bad is not healthy: it answered 500 on trial"
        assert _running(service, "1.0.0")["bind"] == bind
        for place, load in zip(service.places, loads, strict=True):
            figures = load.take()
            assert not figures.failed, place
            assert figures.ended_between_answers == 0
            assert figures.versions[:2] == ["1.0.0", "1.1.0"]
            kind = "a Unix socket" if isinstance(place, str) else "TCP"
            figure(f"upgrade, rollback and a failure over {kind}: {figures.answered} requests, 0 failed")


# Several addresses, and paths that this service makes.


@pytest.mark.parametrize("binds", [["unix"], ["localhost:0", "unix"], ["unix", "localhost:0"]], ids=" ".join)
def test_nothing_is_lost_on_any_address(
    start: Callable[..., Service], programs: Programs, figure: Callable[[str], None], path: Path, binds: list[str]
) -> None:
    """An upgrade, a rollback and a failure; the path is there all the time, and gone when the service has stopped."""
    given = [bind.replace("unix", f"unix:{path}") for bind in binds]
    service = start(*(text for bind in given for text in ("-bind", bind)), *QUICK)
    assert [isinstance(place, str) for place in service.places] == [bind == "unix" for bind in binds]
    _go_through_all(service, programs, figure)
    lock = json.loads((service.state_dir / "lock").read_text(encoding="utf-8"))
    assert lock["bind"] == service.get("/status")["bind"].split(",")[0]
    service.stop()
    assert not path.exists()


def test_the_commands_ask_on_the_first_address(start: Callable[..., Service], programs: Programs, path: Path) -> None:
    """Which may be a path."""
    service = start("-bind", f"unix:{path},localhost:0", *QUICK)
    (service.upgrade_dir / "good").symlink_to(programs.version("1.1.0"))
    service.line(message="serving")
    command = (service.program, "-state-dir", str(service.state_dir))
    assert _run(*command, "-apply").stdout.endswith("committed: 1.0.0 -> 1.1.0\n")
    port = service.address[1]
    assert _run(*command, "-status").stdout.startswith(f"1.1.0 on unix:{path},localhost:{port}: ")


def test_a_socket_that_is_not_known_by_its_address_cannot_be_asked(programs: Programs, tmp_path: Path) -> None:
    """Without a running service, its name alone leads nowhere."""
    ran = _run(programs.version("1.0.0"), "-status", "-bind", "fd:web", "-state-dir", str(tmp_path))
    why = "no service answers on fd:web (its service manager knows where that is)"
    assert (ran.returncode, ran.stderr) == (1, f"self-update: {why}; start it, or name its -state-dir or -bind\n")


@pytest.mark.parametrize("target", ["incumbent", "successor", "both"])
def test_a_stop_on_trial_leaves_no_path_and_loses_no_request(
    start: Callable[..., Service], programs: Programs, path: Path, target: str
) -> None:
    """Whoever is told, the path is there until the last of the two is about to end."""
    service = start("-bind", f"unix:{path}", *TRIAL)
    (service.upgrade_dir / "good").symlink_to(programs.version("1.1.0"))
    upgrade_id = service.ask("POST", "/upgrade").json["id"]
    successor = service.line(message="started a successor")["successor"]
    service.line(upgrade=upgrade_id, phase="PROBATION")
    kept = socket.socket(socket.AF_UNIX)
    with kept:
        kept.settimeout(PATIENCE)
        kept.connect(str(path))
        kept.sendall(b"POST /upgrade HTTP/1.1\r\nHost: localhost\r\nExpect: 100-continue\r\nContent-Length: 8\r\n\r\n")
        assert kept.recv(1024) == b"HTTP/1.1 100 Continue\r\n\r\n"
        told = {"incumbent": [service.process.pid], "successor": [successor]}
        for pid in told.get(target, [service.process.pid, successor]):
            os.kill(pid, signal.SIGTERM)
        service.line(message="stopping", pid=successor)
        assert path.exists(), "the incumbent may still have to serve there"
        kept.sendall(b'{"name!}')
        assert kept.recv(1024).startswith(b"HTTP/1.1 400 ")
    service.wait_for_end()
    assert service.statuses[service.process.pid] == 0
    assert not path.exists()


def test_the_incumbent_is_killed_on_trial_and_the_path_is_its_successor_s(
    start: Callable[..., Service], programs: Programs, path: Path
) -> None:
    """Who serves on removes it in the end."""
    service = start("-bind", f"unix:{path}", *TRIAL)
    (service.upgrade_dir / "good").symlink_to(programs.version("1.1.0"))
    upgrade_id = service.ask("POST", "/upgrade").json["id"]
    service.line(upgrade=upgrade_id, phase="PROBATION")
    service.process.kill()
    _running(service, "1.1.0")
    service.stop()
    assert not path.exists()


def test_a_path_that_a_crash_left_is_taken_over(start: Callable[..., Service], path: Path) -> None:
    """The next start serves there."""
    service = start("-bind", f"unix:{path}")
    service.line(message="serving")
    service.kill()
    assert path.exists()
    service.restart()
    assert service.get("/version") == {"version": "1.0.0"}


def test_one_of_several_addresses_is_taken(programs: Programs, tmp_path: Path, path: Path) -> None:
    """One line says which; nothing of the others is left."""
    with listeners.bind(Address("localhost", 0)) as taken:
        bind = f"localhost:{taken.getsockname()[1]}"
        ran = _run(programs.version("1.0.0"), "-bind", f"unix:{path},{bind}", "-state-dir", str(tmp_path / "state"))
    why = f"cannot listen on {bind}: another process listens there; stop it, or choose another address"
    assert (ran.returncode, ran.stderr) == (1, f"self-update: {why}\n")
    assert not path.exists()


def test_each_host_is_a_name_of_the_service(start: Callable[..., Service], tmp_path: Path) -> None:
    """A client may call it by the host of any `-bind`, on whichever it asks."""
    token = tmp_path / "token"
    token.write_text("x" * 32, encoding="ascii")
    token.chmod(0o600)
    flags = ("-token-file", str(token), "-allowed-signers", "/nowhere")
    service = start("-bind", "localhost:0", "-bind", "127.1:0", *flags)
    assert service.ask("GET", "/version", headers={"Host": "127.1"}).status == 200
    assert service.ask("GET", "/version", headers={"Host": "127.2"}).status == 421


# Plain successors, which bind by themselves.


def test_a_plain_successor_gets_each_address(start: Callable[..., Service], path: Path) -> None:
    """In order, and each free to be bound; the path is its own from then on."""
    service = start("-bind", "localhost:0", "-bind", f"unix:{path}", *QUICK)
    host, port = service.address
    fake(service.upgrade_dir / "foreign", "plain", "2.0.0", "serves")
    assert service.upgrade()["outcome"] == "committed"
    service.process.wait(PATIENCE)
    for place in service.places:
        arguments = service.ask("GET", "/version", address=place).json["arguments"]
        assert arguments[:3] == ["-upgrade", "true", "-upgrade-bind"]
        assert arguments[4:] == ["-bind", f"{host}:{port}", "-bind", f"unix:{path}"]


@pytest.mark.parametrize("mode", ["serves the first", "answers 500"])
def test_a_plain_successor_that_fails_gives_each_address_back(
    start: Callable[..., Service], path: Path, mode: str
) -> None:
    """The old version binds all of them again, and can hand them over again."""
    service = start("-bind", "localhost:0", "-bind", f"unix:{path}", "-probation", "5s")
    fake(service.upgrade_dir / "foreign", "plain", "2.0.0", mode)
    upgrade_id = service.ask("POST", "/upgrade").json["id"]
    service.line(upgrade=upgrade_id, outcome="rolled-back")
    reason = service.get(f"/upgrades/{upgrade_id}")["reason"]
    if mode == "serves the first":
        assert reason.startswith(f"foreign did not take over: it said so, and does not listen on unix:{path}: ")
    for place in service.places:
        assert service.ask("GET", "/version", address=place).json == {"version": "1.0.0"}
    fake(service.upgrade_dir / "full", "full", "3.0.0", "serves")
    assert service.upgrade()["outcome"] == "committed"
    service.process.wait(PATIENCE)
    for place in service.places:
        assert service.ask("GET", "/version", address=place).json["version"] == "3.0.0"


def test_one_address_is_served_again_while_another_is_taken(
    start: Callable[..., Service], path: Path, tmp_path: Path
) -> None:
    """A rollback waits for no address longer than for its own."""
    gate = tmp_path / "gate"
    os.mkfifo(gate)
    service = start("-bind", "localhost:0", "-bind", f"unix:{path}", "-probation", "100ms")
    tcp, unix = service.places
    assert isinstance(tcp, tuple)
    fake(service.upgrade_dir / "foreign", "plain", "2.0.0", f"waits for {gate}")
    upgrade_id = service.ask("POST", "/upgrade", address=unix).json["id"]
    with gate.open("wb"):  # it was asked to take over, and the addresses are free
        squatter = socket.create_server(tcp)
    with squatter:
        service.line(message="cannot serve again yet")
        service.line(message="serving again", bind=f"unix:{path}")
        answer = service.ask("GET", f"/upgrades/{upgrade_id}", address=unix)
        assert (answer.status, answer.json["phase"]) == (200, "ROLLING_BACK")
    service.line(upgrade=upgrade_id, phase="RUNNING")
    assert service.ask("GET", "/version", address=tcp).json == {"version": "1.0.0"}


# Sockets that a service manager passes on.


def test_all_that_is_passed_on_is_served_and_handed_over(
    activate: Callable[..., Service], programs: Programs, figure: Callable[[str], None], manager: Manager, path: Path
) -> None:
    """With its names, from one generation to the next; the path stays, for it is the manager's."""
    service = activate(*QUICK, passed=[manager.unix, manager.tcp], names="admin:web")
    assert service.get("/status")["bind"] == f"{manager.unix_bind},{manager.tcp_bind}"
    _go_through_all(service, programs, figure)
    started = [line["successor"] for line in service.lines if line["message"] == "started a successor"]
    assert len(started) == 3
    status = _running(service, "1.0.0")
    assert _environ(status["pid"])["LISTEN_FDNAMES"] == "admin:web"
    service.stop()
    assert path.exists()
    for place in manager.places:
        connect(place).close()  # nobody serves any more, and clients wait until the manager starts it again


@pytest.mark.parametrize(
    ("binds", "names", "served"),
    [
        (["fd:web"], "web:admin", ["tcp"]),
        (["fd:admin", "fd:web"], "web:admin", ["unix", "tcp"]),
        (["fd:it"], "it:it", ["tcp", "unix"]),
        (["localhost:0,fd:admin"], "web:admin", ["localhost:", "unix"]),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else value,
)
def test_a_name_says_what_is_served(
    activate: Callable[..., Service],
    programs: Programs,
    manager: Manager,
    binds: list[str],
    names: str,
    served: list[str],
) -> None:
    """Just the sockets of that name, beside what else was asked for, and the same after an upgrade."""
    flags = [text for bind in binds for text in ("-bind", bind)]
    service = activate(*flags, *QUICK, passed=[manager.tcp, manager.unix], names=names)
    bind = service.get("/status")["bind"]
    expected = [{"tcp": manager.tcp_bind, "unix": manager.unix_bind}.get(name, name) for name in served]
    assert [text if text in expected else text.rstrip("0123456789") for text in bind.split(",")] == expected
    (service.upgrade_dir / "good").symlink_to(programs.version("1.1.0"))
    assert service.upgrade()["outcome"] == "committed"
    assert _running(service, "1.1.0")["bind"] == bind
    for place in service.places:
        assert service.ask("GET", "/version", address=place).json == {"version": "1.1.0"}
    service.stop()
    connect(manager.places[1]).close()


def test_addresses_beside_sockets_that_are_passed_on(activate: Callable[..., Service], manager: Manager) -> None:
    """Without a name, what the manager says counts, and a warning says so."""
    service = activate("-bind", "localhost:0", passed=[manager.tcp], names="web")
    service.line(message="sockets were passed on: an address is not bound", bind="localhost:0")
    assert service.get("/status")["bind"] == manager.tcp_bind


@pytest.mark.parametrize(
    ("flags", "text"),
    [
        (["-bind", "fd:api"], "no socket was passed on for -bind fd:api; passed on were: fd:local, fd:all"),
        (["-insecure-allow-unsigned"], "the socket that was passed on for 0.0.0.0:"),
        (["-dev", "-bind", "fd:local", "-bind", "fd:all"], "the socket that was passed on for 0.0.0.0:"),
    ],
    ids=["unknown", "reach", "reach-by-name"],
)
def test_what_is_passed_on_and_cannot_be_served(
    programs: Programs, tmp_path: Path, flags: list[str], text: str
) -> None:
    """One line says why. Each socket is looked at: not the first alone may be reached from elsewhere."""
    with listeners.bind(Address("127.0.0.1", 0)) as local, listeners.bind(Address("0.0.0.0", 0)) as exposed:
        fds = [local.fileno(), exposed.fileno()]
        command = [*as_manager(fds), programs.version("1.0.0"), "-state-dir", str(tmp_path / "state"), *flags]
        ran = _run(*command, fds=fds, LISTEN_FDNAMES="local:all")
        assert ran.returncode == 1
        assert ran.stderr.startswith(f"self-update: {text}")
        assert ran.stderr.count("\n") == 1


def test_one_that_can_be_reached_and_is_not_served_needs_no_token(
    activate: Callable[..., Service], manager: Manager
) -> None:
    """What counts is what is served."""
    with listeners.bind(Address("0.0.0.0", 0)) as exposed:
        service = activate("-bind", "fd:web", passed=[exposed, manager.tcp], names="all:web")
        service.line(message="a socket that was passed on is not served", socket="all")
        assert service.get("/status")["bind"] == manager.tcp_bind


@pytest.mark.parametrize("generation", [0, 1])
def test_a_plain_successor_cannot_have_what_the_manager_holds(
    activate: Callable[..., Service], programs: Programs, manager: Manager, generation: int
) -> None:
    """It is refused before anything has happened to the service, in every generation, and is not to blame."""
    service = activate(*QUICK, passed=[manager.tcp, manager.unix], names="web:admin")
    if generation:
        (service.upgrade_dir / "good").symlink_to(programs.version("1.1.0"))
        assert service.upgrade()["outcome"] == "committed"
    status = _running(service, f"1.{generation}.0")
    fake(service.upgrade_dir / "foreign", "plain", "2.0.0", "serves")
    record = service.upgrade()
    assert (record["outcome"], record["code"], record["is_fault_of_release"]) == ("aborted", "handover-bind", False)
    held = f"{manager.tcp_bind},{manager.unix_bind}"
    assert (
        record["reason"] == f"foreign speaks the plain protocol, and cannot bind what the service manager holds: {held}"
    )
    assert _running(service, status["version"])["pid"] == status["pid"]


def test_a_foreign_successor_of_the_full_protocol_gets_all(activate: Callable[..., Service], manager: Manager) -> None:
    """As from systemd: descriptors from 3 on, as many as LISTEN_FDS says."""
    service = activate(*QUICK, passed=[manager.tcp, manager.unix], names="web:admin")
    service.line(message="serving")
    fake(service.upgrade_dir / "foreign", "full", "2.0.0", "serves")
    assert service.upgrade()["outcome"] == "committed"
    service.process.wait(PATIENCE)
    for place in service.places:
        assert service.ask("GET", "/version", address=place).json["version"] == "2.0.0"


def test_a_start_that_finishes_a_commit_passes_the_sockets_on(
    activate: Callable[..., Service], programs: Programs, manager: Manager
) -> None:
    """The version that had been committed is executed in its place, with what the manager passed."""
    hold = "import threading\nfrom selfupdate import upgrade\nupgrade.settle = lambda *_: threading.Event().wait()"
    program = programs.faulty("1.0.0", "unsettled", hold)
    flags = ("-bind", "fd:admin", "-bind", "fd:web", *QUICK)
    service = activate(*flags, passed=[manager.tcp, manager.unix], names="web:admin", program=program)
    (service.upgrade_dir / "good").symlink_to(programs.version("1.1.0"))
    service.ask("POST", "/upgrade")
    service.line(phase="RETIRED", outcome="committed")
    service.kill()
    service.restart()
    status = _running(service, "1.1.0")
    assert (status["bind"], status["generation"]) == (f"{manager.unix_bind},{manager.tcp_bind}", 0)
