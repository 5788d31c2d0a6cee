"""Successors in C and in Node.js, in both protocols, there and, as incumbents of the plain one, back."""

from __future__ import annotations

import http.client
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import pytest
from load import Figures, Load
from programs import shell, write_program
from service import PATIENCE, Service, resources, wait_for_end

from selfupdate import notify, posix

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    from programs import Programs

    Build = Callable[..., Path]

pytestmark = pytest.mark.slow

SOURCES = Path(__file__).resolve().parent / "foreign"
LANGUAGES = ("c", "js")
PROTOCOLS = ("full", "plain")
SANITIZERS = "-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-g"
OF_THE_PLAIN_PROTOCOL = {"ConnectionRefusedError", "ConnectionResetError"}
"""What can befall a connection that arrives while the port belongs to nobody."""

UNHEALTHY = {
    "c": ("is_healthy(void)\n{\n    return true;", "is_healthy(void)\n{\n    return service < 0;"),
    "js": ("isHealthy() {\n  return true;", "isHealthy() {\n  return !service.listening;"),
}
"""What makes each program unhealthy from the moment at which it serves."""


@pytest.fixture(scope="session")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of the programs that are built, each once, for this run."""
    return tmp_path_factory.mktemp("foreign")


@pytest.fixture
def build(built: Path, tool: Callable[[str], str]) -> Build:
    """Build the program in a language, with flags for the compiler; perhaps one that becomes unhealthy."""

    def build(language: str, *flags: str, is_unhealthy: bool = False) -> Path:
        target = built / "-".join(["successor", language, "unhealthy" if is_unhealthy else "healthy", *flags])
        compiler = tool("cc" if language == "c" else "node")
        if target.exists():
            return target
        text = (SOURCES / f"successor.{language}").read_text(encoding="utf-8")
        if is_unhealthy:
            assert text.count(UNHEALTHY[language][0]) == 1
            text = text.replace(*UNHEALTHY[language])
        if language == "js":
            return write_program(target, text.encode())
        command = [compiler, "-Wall", "-Wextra", "-Werror", "-O2", *flags, "-x", "c", "-", "-o", str(target)]
        subprocess.run(command, input=text.encode(), check=True)
        return target

    return build


def offer(service: Service, program: Path, protocol: str) -> None:
    """Put a program into the upgrade directory; for the plain protocol, as one that is told its arguments alone."""
    candidate = service.upgrade_dir / "foreign"
    if protocol == "full":
        shutil.copy2(program, candidate)
    else:
        shell(candidate, "2.0.0", f'unset LISTEN_FDS NOTIFY_SOCKET SELF_UPDATE_HANDOVER_FD; exec {program} "$@"')


@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize("language", LANGUAGES)
def test_there_and_back(
    build: Build,
    programs: Programs,
    tmp_path: Path,
    figure: Callable[[str], None],
    language: str,
    protocol: str,
) -> None:
    """From this program to a foreign one and, by the plain protocol, on to this one, under clients without pause.

    The full protocol loses no request. With the plain one, connections are refused for a moment, or reset where
    they still wait when the port is given up; nothing else befalls them.
    """
    environ = {"SUCCESSOR": str(programs.version("3.0.0"))}
    flags = ("-probation", "300ms", "-drain", "30s")
    with Service(programs.version("1.0.0"), tmp_path, *flags, environ=environ) as service:
        offer(service, build(language), protocol)
        with Load(service.address) as load:
            load.take()
            record = service.ask("POST", "/upgrade?wait=30s").json
            assert record["outcome"] == "committed", record
            assert service.process.wait(PATIENCE) == 0
            there = take(load, lambda figures: "2.0.0" in figures.versions)
            foreign = service.get("/healthz")
            os.kill(foreign["pid"], signal.SIGHUP)
            assert exit_status(foreign["pid"]) == 0
            status = service.get("/status")
            back = take(load, lambda figures: "3.0.0" in figures.versions)
        assert foreign["version"] == "2.0.0"
        assert (status["version"], status["phase"]) == ("3.0.0", "RUNNING")
        assert there.versions == ["1.0.0", "2.0.0"]
        assert back.versions == ["2.0.0", "3.0.0"]
        assert there.ended_between_answers == back.ended_between_answers == 0
        assert there.failed.keys() <= (set() if protocol == "full" else OF_THE_PLAIN_PROTOCOL)
        assert back.failed.keys() <= OF_THE_PLAIN_PROTOCOL
        service.stop()
        assert service.statuses[status["pid"]] == 0
    figure(f"{language}, {protocol} protocol: {_said(there)}; back by the plain protocol: {_said(back)}")


def _said(figures: Figures) -> str:
    lost = figures.failed.total()
    return f"{figures.answered} answered, {lost} refused or reset, longest gap {figures.longest_gap * 1000:.0f} ms"


def take(load: Load, is_enough: Callable[[Figures], bool]) -> Figures:
    """Return the figures since the last ones, once they are enough."""
    figures = load.take()
    deadline = time.monotonic() + PATIENCE
    while not is_enough(figures):
        assert time.monotonic() < deadline, figures
        more = load.take()
        figures.answered += more.answered
        figures.failed += more.failed
        figures.ended_between_answers += more.ended_between_answers
        figures.versions += [version for version in more.versions if version not in figures.versions]
        figures.longest_gap = max(figures.longest_gap, more.longest_gap)
    return figures


def exit_status(pid: int) -> int:
    """Wait for the end of a process whose parent has gone, and return its exit status, negative for a signal."""
    wait_for_end(pid)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


@pytest.mark.parametrize("fault", ["dies", "is unhealthy"])
@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize("language", LANGUAGES)
def test_one_that_fails_on_trial_is_rolled_back(
    build: Build, start: Callable[..., Service], language: str, protocol: str, fault: str
) -> None:
    """The old version serves on, on the same address, and nothing is left of the foreign one."""
    service = start("-probation", "10s")
    address = service.address
    offer(service, build(language, is_unhealthy=fault == "is unhealthy"), protocol)
    upgrade_id = service.ask("POST", "/upgrade").json["id"]
    if fault == "dies":
        service.line(phase="PROBATION")
        started = [line for line in service.lines if line["message"] == "started a successor"]
        os.kill(started[-1]["successor"], signal.SIGKILL)
    service.line(upgrade=upgrade_id, outcome="rolled-back")
    reason = {
        "dies": "foreign was killed by SIGKILL on trial",
        "is unhealthy": "foreign is not healthy: it answered 503 on trial",
    }
    assert service.get(f"/upgrades/{upgrade_id}")["reason"] == reason[fault]
    assert (service.address, service.get("/version")) == (address, {"version": "1.0.0"})
    service.wait_until_alone(service.process.pid)


def free_address() -> tuple[str, int]:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        host, port = listener.getsockname()
        return host, port


class Standby:
    """A foreign successor that stands by, with the test as its incumbent."""

    def __init__(
        self, program: Path, listener: socket.socket | None, channel: socket.socket | None = None, **environ: str
    ) -> None:
        """Start it with the full protocol where there is a `listener`, and wait until it announces itself."""
        self.address: tuple[str, int] = listener.getsockname() if listener else free_address()
        self.temporary = free_address()
        manager = notify.Receiver()
        fds = [passed.fileno() for passed in (listener, channel) if passed]
        environ = {"PATH": os.environ["PATH"], "NOTIFY_SOCKET": manager.address, **environ}
        bind, upgrade_bind = (f"{host}:{port}" for host, port in (self.address, self.temporary))
        command = [str(program), "-upgrade", "true", "-upgrade-bind", upgrade_bind, "-bind", bind]
        self.process = posix.spawn(command, environ, fds, listeners=1 if listener else 0)
        assert posix.ready([manager.fileno(), self.process.exit_fd], time.monotonic() + PATIENCE)
        self.announced = manager.receive(self.process.pid)
        manager.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.end(0)

    def replace(self, **headers: str) -> int:
        return ask(self.temporary, "GET", "/replace", headers)[0]

    def stop(self) -> int:
        self.process.terminate()
        return self.process.end(PATIENCE)


def ask(
    address: tuple[str, int],
    method: str,
    path: str,
    headers: Mapping[str, str] | None = None,
    body: bytes | None = None,
) -> tuple[int, Any]:
    connection = http.client.HTTPConnection(*address, timeout=PATIENCE)
    try:
        connection.request(method, path, body, dict(headers or {}))
        response = connection.getresponse()
        return response.status, json.loads(response.read())
    finally:
        connection.close()


def is_refused(address: tuple[str, int]) -> bool:
    try:
        socket.create_connection(address, PATIENCE).close()
    except ConnectionError:  # reset, where the listener is closed in the very moment
        return True
    return False


def wait_until(is_so: Callable[[], bool]) -> None:
    """Look until something is so that nothing tells of."""
    deadline = time.monotonic() + PATIENCE
    while not is_so():
        assert time.monotonic() < deadline


@pytest.fixture
def listener() -> Iterator[socket.socket]:
    """Make a listener, a blocking one, as a careless incumbent would."""
    with socket.create_server(("127.0.0.1", 0), backlog=128) as listener:
        yield listener


@pytest.mark.parametrize("language", LANGUAGES)
def test_what_was_passed_on(build: Build, listener: socket.socket, language: str) -> None:
    """The listener is accepted on only when it is asked for, made non-blocking, and left whole to who shares it."""
    with Standby(build(language), listener) as standby:
        assert standby.announced == {"READY": "1", "X_SELF_UPDATE": "1"}
        health = (200, {"version": "2.0.0", "pid": standby.process.pid})
        with socket.create_connection(standby.address, PATIENCE) as early:
            early.sendall(b"GET /healthz HTTP/1.1\r\nHost: localhost\r\n\r\n")
            assert ask(standby.temporary, "GET", "/healthz") == health
            early.setblocking(False)
            with pytest.raises(BlockingIOError):
                early.recv(1)
            early.settimeout(PATIENCE)
            assert standby.replace() == 200
            assert early.recv(1024).startswith(b"HTTP/1.1 200 OK\r\n")
        assert not os.get_blocking(listener.fileno())
        assert ask(standby.address, "GET", "/healthz") == health
        assert is_refused(standby.temporary)
        assert standby.stop() == 0
    assert not is_refused(standby.address)
    listener.setblocking(True)
    listener.settimeout(PATIENCE)
    listener.accept()[0].close()


@pytest.mark.parametrize("language", LANGUAGES)
def test_two_that_share_a_listener_lose_no_request(build: Build, listener: socket.socket, language: str) -> None:
    """One is often too late to accept what it was told of; no descriptor is left of what has ended."""
    with Standby(build(language), listener) as one, Standby(build(language), listener) as other:
        assert (one.replace(), other.replace()) == (200, 200)
        for _ in range(20):  # whatever is made at first is made
            assert ask(one.address, "GET", "/version")[0] == 200
        wait_until(lambda: is_refused(other.temporary))
        before = resources(other.process.pid)["fd"]
        with Load(one.address) as load:
            figures = take(load, lambda figures: figures.answered > 1000)
            assert one.stop() == 0
            last = load.take()
        assert not figures.failed + last.failed
        wait_until(lambda: resources(other.process.pid)["fd"] <= before)
        assert other.stop() == 0


@pytest.mark.parametrize("language", LANGUAGES)
def test_a_stop_signal(build: Build, language: str) -> None:
    """It ends one that stands by, and one that serves when the request that it has begun to read is answered."""
    with Standby(build(language), None) as standby:
        assert standby.announced == {"READY": "1"}
        assert standby.stop() == 0
    with Standby(build(language), None) as standby:
        assert is_refused(standby.address)
        assert standby.replace() == 200
        with socket.create_connection(standby.address, PATIENCE) as slow:
            slow.sendall(b"POST / HTTP/1.1\r\nHost: loc")
            assert ask(standby.address, "GET", "/")[0] == 200  # what came before it has been accepted
            standby.process.terminate()
            wait_until(lambda: is_refused(standby.address))
            for letter in b"alhost\r\nContent-Length: 4\r\n\r\nbody":
                slow.sendall(bytes([letter]))
            assert slow.recv(1024).startswith(b"HTTP/1.1 400 Bad Request\r\n")
        assert standby.process.end(PATIENCE) == 0


@pytest.mark.parametrize("language", LANGUAGES)
def test_a_request_is_read_to_its_end(build: Build, language: str) -> None:
    """What is closed with something unread would be reset, and the answer could be lost."""
    with Standby(build(language), None) as standby:
        assert standby.replace() == 200
        with socket.create_connection(standby.address, PATIENCE) as slow:
            slow.sendall(b"POST / HTTP/1.1\r\nHost: localhost\r\nContent-Length: 4\r\n\r\nbod")
            assert ask(standby.address, "POST", "/", body=b"whole")[0] == 400
            slow.setblocking(False)
            with pytest.raises(BlockingIOError):
                slow.recv(1)
            slow.settimeout(PATIENCE)
            slow.sendall(b"y")
            assert slow.recv(1024).startswith(b"HTTP/1.1 400 Bad Request\r\n")


def test_the_secret_is_proved_to_one_that_asks_for_it(build: Build, listener: socket.socket) -> None:
    """The program in Node.js reads the channel; the one in C does not, and is spoken to all the same (above)."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with ours, theirs:
        ours.send(json.dumps({"generation": 1, "secret": "s3cret"}).encode())
        with Standby(build("js"), listener, theirs, SELF_UPDATE_HANDOVER_FD="4") as standby:
            assert standby.replace() == 403
            assert standby.replace(Authorization="Bearer guess") == 403
            assert standby.replace(Authorization="Bearer s3cret") == 200
            assert standby.stop() == 0


@pytest.mark.parametrize("fault", ["dies", "refuses"])
@pytest.mark.parametrize("language", LANGUAGES)
def test_a_foreign_incumbent_serves_on_where_its_successor_fails(
    build: Build, tmp_path: Path, language: str, fault: str
) -> None:
    """It ends a successor that does not take over, and binds the address again."""
    fifo = tmp_path / "pid"
    os.mkfifo(fifo)
    # Python's server of files stands by on -upgrade-bind, and answers 404 to GET /replace.
    then = {"dies": "exit 7", "refuses": f'exec {sys.executable} -m http.server --bind 127.0.0.1 "${{4##*:}}"'}
    successor = shell(tmp_path / "successor", "3.0.0", f"echo $$ > {fifo}; {then[fault]} 2>/dev/null")
    with Standby(build(language), None, SUCCESSOR=str(successor)) as standby:
        assert standby.replace() == 200
        os.kill(standby.process.pid, signal.SIGHUP)
        started = Path("/proc") / fifo.read_text(encoding="ascii").strip()
        wait_until(lambda: not started.exists())
        wait_until(lambda: not is_refused(standby.address))
        assert ask(standby.address, "GET", "/version")[1]["pid"] == standby.process.pid
        assert standby.stop() == 0


def test_the_program_in_c_under_the_sanitizers(build: Build, listener: socket.socket, tmp_path: Path) -> None:
    """Load, hostile clients and an upgrade that fails show no fault of memory, no undefined behaviour, and no leak."""
    hostile = [
        b"",
        b"\r\n\r\n",
        b"\0" * 100,
        b"GET /" + b"a" * 20000,
        b"GET / HTTP/1.1\r\nContent-Length: 99999999999999999999999\r\n\r\n",
        b"POST / HTTP/1.1\r\nContent-Length: -1\r\n\r\n",
        b"\r\nContent-Length:\r\n\r\n",
    ]
    successor = shell(tmp_path / "successor", "3.0.0", "exit 7")
    with Standby(build("c", *SANITIZERS), listener, SUCCESSOR=str(successor)) as standby:
        assert standby.replace() == 200
        os.kill(standby.process.pid, signal.SIGHUP)
        with Load(standby.address) as load:
            for content in hostile * 20:
                with socket.create_connection(standby.address, PATIENCE) as client:
                    client.sendall(content)
            assert not load.take().failed
        assert standby.stop() == 0
