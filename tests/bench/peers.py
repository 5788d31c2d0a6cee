"""What is measured: this program, and what people would pick instead, each set up as its manual says.

Each answers `GET /version` with the same body, and those that can replace
themselves do so as their manual has it. What differs from a default is said
where it is set, and in the note of the table.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import select
import shutil
import signal
import socket
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, Protocol

from bench.answers import LAST_REQUEST, Answer, exchange
from bench.figures import SELF
from bench.trace import Window
from service import PATIENCE, Service, wait_for_end

if TYPE_CHECKING:
    from collections.abc import Callable

    from bench.generator import Load
    from programs import Programs

FIRST = "1.0.0"
"""The version that each peer is started with."""

PROBATION = "200ms"
"""Of this program's upgrades: a longer one is calm, and would thin out what the window shows."""

TESTS = Path(__file__).resolve().parent.parent


class Upgrade(NamedTuple):
    """One replacement, as its driver and the clients saw it."""

    trigger: float
    first_answer: float
    """When the new version first answered a client."""
    end: float
    """When the last process that it leaves behind had ended: the new version serves alone."""

    @property
    def window(self) -> Window:
        return Window(self.trigger, max(self.first_answer, self.end))


class Started(NamedTuple):
    """The times of a start."""

    began: float
    connected: float
    """When a connection was first accepted."""
    answered: float


class Peer(Protocol):
    """A server that runs from `__init__` to `stop`, in a directory of its own."""

    address: tuple[str, int]
    started: Started

    def pids(self) -> list[int]:
        """Return its processes."""

    def prepare(self, version: str) -> None:
        """Lay the next version ready, as is done before anybody triggers."""

    def upgrade(self, version: str, load: Load) -> Upgrade:
        """Replace what serves by the next version, and return when the old one has ended."""

    def stop(self) -> None:
        """End all of its processes."""


class SelfUpdate:
    """The program as its users run it, but for `PROBATION`.

    It comes back to the process that was started, so that each of its upgrades is two handovers; the upgrade has
    ended when the process in between has.
    """

    def __init__(self, programs: Programs, directory: Path, *flags: str) -> None:
        self._programs = programs
        self.address = ("127.0.0.1", free_port())
        program = directory / "self-update"
        if not program.exists():  # it is put there once, and started again and again
            shutil.copy2(programs.version(FIRST), program)
        where = "{}:{}".format(*self.address)
        began = time.monotonic()
        self._service = Service(program, directory, "-bind", where, "-probation", PROBATION, *flags)
        self.started = first_answer(began, self.address)

    def pids(self) -> list[int]:
        return self._service.pids()

    def prepare(self, version: str) -> None:
        next_one = self._service.upgrade_dir / "next"
        shutil.copy2(self._programs.version(version), next_one.with_suffix(".new"))
        next_one.with_suffix(".new").replace(next_one)
        self._service.get("/candidates")  # which the service looks at by itself: what it takes is not steady state

    def upgrade(self, version: str, load: Load) -> Upgrade:
        old = self._service.get("/status")["pid"]
        since = len(self._service.lines)
        trigger = time.monotonic()
        answer = self._service.ask("POST", "/upgrade")
        assert answer.status == 202, answer.body
        successor = self._service.line(since, message="started a successor")["successor"]
        watched = [os.pidfd_open(pid) for pid in (old, successor)]  # now: whichever ends is reaped at once
        answered = load.first_answer(version)
        ended = first_end(watched)
        record = self._service.record_when(answer.json["id"], lambda record: record["outcome"] is not None)
        assert record["outcome"] == "committed", record
        pid = self._service.status_when(lambda status: status["phase"] == "RUNNING")["pid"]
        self._service.wait_until_alone(pid)
        return Upgrade(trigger, answered, ended)

    def stop(self) -> None:
        self._service.kill()


class Daemon:
    """What the others have in common: a command that serves on a port, in a directory where nothing else runs."""

    def __init__(self, directory: Path, *command: str | Path, port: int) -> None:
        self.directory = directory
        self.address = ("127.0.0.1", port)
        began = time.monotonic()
        with (directory / "stderr").open("wb") as stderr:
            self.process = subprocess.Popen(
                command,
                cwd=directory,
                env={**os.environ, "PYTHONPATH": str(TESTS)},
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=stderr,
            )
        try:
            self.started = first_answer(began, self.address)
        except OSError as error:
            self.stop()
            said = (directory / "stderr").read_text(encoding="utf-8", errors="replace")
            raise RuntimeError(f"{command} does not serve; it said: {said}") from error
        except BaseException:
            self.stop()
            raise

    def pids(self) -> list[int]:
        """Return the processes that run in the directory: some leave the parent and the session of the first."""
        found = []
        for entry in Path("/proc").iterdir():
            if entry.name.isdigit():
                with contextlib.suppress(OSError):
                    if (entry / "cwd").readlink() == self.directory:
                        found.append(int(entry.name))
        return found

    def pid_in(self, name: str) -> int:
        """Return what a file in the directory says, once it is there: who writes it tells nobody."""
        path = self.directory / name
        return int(Service.poll(lambda: path.read_text() if path.exists() else "", lambda text: text.endswith("\n")))

    def answers_beside(self, version: str) -> float:
        """Wait until a version answers new connections beside the one before, as an operator looks before ending that.

        The clients may not have met it: they keep the connections that they have.
        """
        Service.poll(lambda: ask(self.address).version, lambda found: found == version)
        return time.monotonic()

    def stop(self) -> None:
        """Kill all: nobody asks any more."""
        while pids := self.pids():
            for pid in pids:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            for pid in pids:
                end_of(pid)
        self.process.wait(PATIENCE)


class Nginx(Daemon):
    """A new binary by USR2; once that answers, the old workers end by WINCH, and the old master by QUIT."""

    _CONFIGURATION = """\
pid nginx.pid;
error_log stderr;
worker_processes auto;
events {{ worker_connections 4096; }}
http {{
    access_log off;
    client_body_temp_path body;
    server {{
        listen 127.0.0.1:{port} backlog=1024;
        location = /version {{
            default_type application/json;
            return 200 '{{"version": "{version}"}}';
        }}
    }}
}}
"""

    def __init__(self, directory: Path) -> None:
        self._port = free_port()
        self.directory = directory
        self.prepare(FIRST)
        program = find("nginx")
        assert program is not None
        super().__init__(directory, program, "-p", directory, "-c", "nginx.conf", port=self._port)

    def prepare(self, version: str) -> None:
        text = self._CONFIGURATION.format(port=self._port, version=version)
        (self.directory / "nginx.conf").write_text(text)

    def upgrade(self, version: str, load: Load) -> Upgrade:
        old = self.pid_in("nginx.pid")
        trigger = time.monotonic()
        os.kill(old, signal.SIGUSR2)
        answered = self.answers_beside(version)
        os.kill(old, signal.SIGWINCH)
        os.kill(old, signal.SIGQUIT)
        ended = end_of(old)
        return Upgrade(trigger, min(answered, load.first_answer(version)), ended)


class HAProxy(Daemon):
    """A reload of the master by USR2: the new worker takes the sockets from the old one, which ends when it is done."""

    _CONFIGURATION = """\
global
    maxconn 4096
defaults
    mode http
    timeout client 75s
    timeout connect 5s
    timeout server 30s
frontend version
    bind 127.0.0.1:{port}
    http-request return status 200 content-type application/json string '{{"version": "{version}"}}'
"""

    def __init__(self, directory: Path) -> None:
        self._port = free_port()
        self.directory = directory
        self.prepare(FIRST)
        program = find("haproxy")
        assert program is not None
        super().__init__(directory, program, "-W", "-f", "haproxy.cfg", port=self._port)

    def prepare(self, version: str) -> None:
        text = self._CONFIGURATION.format(port=self._port, version=version)
        (self.directory / "haproxy.cfg").write_text(text)

    def upgrade(self, version: str, load: Load) -> Upgrade:
        (old,) = (pid for pid in self.pids() if pid != self.process.pid)
        trigger = time.monotonic()
        os.kill(self.process.pid, signal.SIGUSR2)
        return Upgrade(trigger, load.first_answer(version), end_of(old))


class _Wsgi(Daemon):
    """A server of a WSGI application, which is of the version that a file in the directory names."""

    def __init__(self, directory: Path, *command: str) -> None:
        self.directory = directory
        self.prepare(FIRST)
        port = free_port()
        super().__init__(directory, sys.executable, *(part.format(port) for part in command), port=port)

    def prepare(self, version: str) -> None:
        (self.directory / "version").write_text(version)

    def upgrade(self, version: str, load: Load) -> Upgrade:
        raise NotImplementedError


class Gunicorn(_Wsgi):
    """A new master by USR2; once that answers, the old one ends by TERM. Two workers.

    With threads, a connection is kept as long as this program and nginx keep it; gunicorn's default is 2 s.
    """

    def __init__(self, directory: Path, *options: str) -> None:
        where = ("--bind", "127.0.0.1:{}", "--pid", "gunicorn.pid", "--workers", "2")
        super().__init__(directory, "-m", "gunicorn", *where, *options, "bench.wsgi:application")

    def upgrade(self, version: str, load: Load) -> Upgrade:
        old = self.pid_in("gunicorn.pid")
        trigger = time.monotonic()
        os.kill(old, signal.SIGUSR2)
        answered = self.answers_beside(version)
        new = self.pid_in("gunicorn.pid.2")
        os.kill(old, signal.SIGTERM)
        ended = end_of(old)
        Service.poll(lambda: self.pid_in("gunicorn.pid"), lambda pid: pid == new)  # it renames its file in its own time
        return Upgrade(trigger, min(answered, load.first_answer(version)), ended)


class Waitress(_Wsgi):
    """Eight threads, and room for as many connections as the crowds have."""

    def __init__(self, directory: Path) -> None:
        options = ("--threads=8", "--connection-limit=4096")
        super().__init__(directory, "-m", "waitress", "--listen=127.0.0.1:{}", *options, "bench.wsgi:application")


class Stock(_Wsgi):
    """`http.server`, as little as it takes: neither the environment nor installed packages, as with this program."""

    def __init__(self, directory: Path) -> None:
        super().__init__(directory, "-I", "-S", str(TESTS / "bench" / "stock.py"), "{}")


@dataclass(frozen=True)
class Kind:
    """One column of the tables."""

    name: str
    start: Callable[[Programs, Path], Peer]
    program: str
    """What has to be installed: a program, or a module of the interpreter's that runs this."""
    replaces_itself: bool = False
    is_python: bool = True

    def missing(self) -> bool:
        """Tell whether it is not installed."""
        return find(self.program) is None if not self.is_python else importlib.util.find_spec(self.program) is None


KINDS = (
    Kind(SELF, SelfUpdate, "selfupdate", replaces_itself=True),
    Kind(
        f"{SELF}-new-pid",
        lambda programs, place: SelfUpdate(programs, place, "-keep-pid=false"),
        "selfupdate",
        replaces_itself=True,
    ),
    Kind("nginx", lambda _, place: Nginx(place), "nginx", replaces_itself=True, is_python=False),
    Kind("haproxy", lambda _, place: HAProxy(place), "haproxy", replaces_itself=True, is_python=False),
    Kind("gunicorn-sync", lambda _, place: Gunicorn(place), "gunicorn", replaces_itself=True),
    Kind(
        "gunicorn-gthread",
        lambda _, place: Gunicorn(place, "--worker-class", "gthread", "--threads", "8", "--keep-alive", "75"),
        "gunicorn",
        replaces_itself=True,
    ),
    Kind("waitress", lambda _, place: Waitress(place), "waitress"),
    Kind("http.server", lambda _, place: Stock(place), "http"),
)


def find(program: str) -> str | None:
    """Return the path of an installed program; what serves is often where only root looks."""
    return shutil.which(program, path=f"{os.environ['PATH']}:/usr/local/sbin:/usr/sbin:/sbin")


def free_port() -> int:
    """Return a port of the loopback that was free a moment ago, for those that take no port 0."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port: int = listener.getsockname()[1]
        return port


def first_answer(began: float, address: tuple[str, int]) -> Started:
    """Wait until `address` is listened on and answers: connecting is tried again, for nothing tells when it can be."""
    deadline = time.monotonic() + PATIENCE
    while True:
        try:
            connection = socket.create_connection(address, PATIENCE)
        except ConnectionRefusedError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.0005)
            continue
        with connection:
            connected = time.monotonic()
            exchange(connection, LAST_REQUEST)
            return Started(began, connected, time.monotonic())


def ask(address: tuple[str, int]) -> Answer:
    """Ask over a new connection."""
    with socket.create_connection(address, PATIENCE) as connection:
        return exchange(connection, LAST_REQUEST)


def first_end(fds: list[int]) -> float:
    """Wait until one of some processes has ended, and return when; close `fds`, which say so (pidfd_open(2))."""
    poll = select.poll()
    for fd in fds:
        poll.register(fd, select.POLLIN)
    try:
        assert poll.poll(PATIENCE * 1000), "none of the processes has ended"
        return time.monotonic()
    finally:
        for fd in fds:
            os.close(fd)


def end_of(pid: int) -> float:
    """Wait until a process has ended, and return when it had."""
    wait_for_end(pid)
    ended = time.monotonic()
    with contextlib.suppress(ChildProcessError):  # its parent takes it
        os.waitpid(pid, 0)
    return ended


def memory(pids: list[int], field: str = "Rss") -> float:
    """Return how many MiB some processes occupy together, each with what it shares (proc(5), smaps_rollup)."""
    found = 0
    for pid in pids:
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            text = Path(f"/proc/{pid}/smaps_rollup").read_text(encoding="utf-8")
            found += sum(int(line.split()[1]) for line in text.splitlines() if line.startswith(f"{field}:"))
    return found / 1024
