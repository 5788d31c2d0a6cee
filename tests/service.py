"""A running service for the tests: started from a built file, watched through what it says."""

from __future__ import annotations

import contextlib
import ctypes
import http.client
import json
import os
import select
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, Self

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

PATIENCE = 30.0
"""Seconds that a test waits for an event before it fails; no test takes that long."""

Line = dict[str, Any]

Place = tuple[str, int] | str
"""Where a service is reached: host and port, or the path of a Unix socket."""


def connect(place: Place, timeout: float = PATIENCE) -> socket.socket:
    """Return a connection to `place`."""
    if isinstance(place, tuple):
        return socket.create_connection(place, timeout)
    client = socket.socket(socket.AF_UNIX)
    client.settimeout(timeout)
    client.connect(place)
    return client


def places(bind: str) -> list[Place]:
    """Read the addresses that a service says it serves on."""
    found: list[Place] = []
    for text in bind.split(","):
        host, _, port = text.rpartition(":")
        found.append(port if host == "unix" else (host or "localhost", int(port)))
    return found


# Successors outlive the process that started them. With this process as their new parent (prctl(2),
# PR_SET_CHILD_SUBREAPER), it learns how each of them ended, and reaps it.
ctypes.CDLL(None).prctl(36, 1)

# One that ignores SIGHUP, as nohup(1) has it do, or SIGINT, as a shell has its background jobs do, leaves that to all
# that it starts: here both are to mean something.
signal.signal(signal.SIGHUP, signal.SIG_DFL)
signal.signal(signal.SIGINT, signal.default_int_handler)

# The first line of the program takes `python3` from PATH: it is to be the one that runs the tests.
os.environ["PATH"] = f"{Path(sys.executable).parent}:{os.environ['PATH']}"


class Answer:
    """The answer to one request."""

    def __init__(self, response: http.client.HTTPResponse) -> None:
        self.status = response.status
        self.headers = response.headers
        self.body = response.read()

    @property
    def json(self) -> Any:
        return json.loads(self.body)


def is_checked(flags: tuple[str, ...]) -> bool:
    """Tell whether flags say what is to become of signatures: most tests are about something else."""
    return any(flag in {"-allowed-signers", "-keyring", "-dev", "-upgrades-off"} for flag in flags)


def as_manager(fds: Sequence[int]) -> list[str]:
    """Return what starts a program with `fds` as its descriptors 3, 4, …, as sd_listen_fds(3) has it."""
    places = range(3, 3 + len(fds))
    high = "".join(f" {fd + 100}<&{fd}" for fd in fds)
    low = "".join(f" {place}<&{fd + 100} {fd + 100}<&-" for place, fd in zip(places, fds, strict=True))
    script = f'export LISTEN_FDS={len(fds)} LISTEN_PID=$$; exec{high}; exec "$0" "$@"{low}'
    return ["/bin/bash", "-c", script]


def has_settled(record: Any) -> bool:
    """Tell whether nothing more will happen: it has ended, and what a restart brings is known."""
    return record["outcome"] is not None and (record["outcome"] != "committed" or record["installed"] is not None)


class Watched:
    """A service that runs somewhere: what it says, in its log and over HTTP."""

    def __init__(self) -> None:
        self.lines: list[Line] = []
        self.headers: dict[str, str] = {}
        """What each request bears."""
        self._news = threading.Condition()
        self._ended = False

    def read(self, stream: IO[bytes]) -> None:
        """Take what the service writes from `stream`, until that ends."""
        with stream:
            for text in stream:
                try:
                    line = json.loads(text)
                except ValueError:
                    line = {"message": text.decode("utf-8", "replace").rstrip("\n")}
                with self._news:
                    self.lines.append(line)
                    self._news.notify_all()
        with self._news:  # the end of the stream: no process holds it any more
            self._ended = True
            self._news.notify_all()

    def line(self, since: int = 0, **fields: object) -> Line:
        """Wait for a log line, from number `since` on, that has these fields."""

        def found() -> Line | None:
            lines = self.lines[since:]
            return next((line for line in lines if all(line.get(key) == value for key, value in fields.items())), None)

        with self._news:
            self._news.wait_for(lambda: found() or self._ended, PATIENCE)
            line = found()
        assert line is not None, f"no line with {fields} in {self.lines[since:]}"
        return line

    def next_line(self) -> Line:
        """Wait for the first line."""
        with self._news:
            assert self._news.wait_for(lambda: self.lines, PATIENCE)
            return self.lines[0]

    @property
    def address(self) -> tuple[str, int]:
        """Where it serves: the first host and port."""
        return next(place for place in self.places if isinstance(place, tuple))

    @property
    def places(self) -> list[Place]:
        """All that it serves on."""
        return places(self.line(message="serving")["bind"])

    def connect(self, place: Place, timeout: float) -> socket.socket:
        """Return a connection to the service."""
        return connect(place, timeout)

    def ask(
        self,
        method: str,
        path: str,
        body: object = None,
        headers: Mapping[str, str] | None = None,
        address: Place | None = None,
        timeout: float = PATIENCE,
    ) -> Answer:
        """Send one request over a connection of its own."""
        place = address or self.places[0]
        connection = http.client.HTTPConnection(*(place if isinstance(place, tuple) else ("localhost",)))
        try:
            connection.sock = self.connect(place, timeout)
            text = None if body is None else json.dumps(body)
            connection.request(method, path, text, {**self.headers, **(headers or {})})
            return Answer(connection.getresponse())
        finally:
            connection.close()

    def get(self, path: str) -> Any:
        """Return the JSON of a GET that must succeed."""
        answer = self.ask("GET", path)
        assert answer.status == 200, answer.body
        return answer.json

    def upgrade(self, name: str | None = None) -> Any:
        """Upgrade, and return the record when it has ended."""
        answer = self.ask("POST", "/upgrade?wait=30s", {"name": name} if name else None)
        return self.get(answer.headers["Location"]) if answer.status in {404, 422} else self._record_of(answer)

    def roll_back(self) -> Any:
        """Go back to the version before, and return the record when that has ended."""
        return self._record_of(self.ask("POST", "/rollback?wait=30s"))

    def _record_of(self, answer: Answer) -> Any:
        """Return the record of what an answer says was begun, when it has ended: the answer waits for `-drain` only."""
        if answer.status == 202:
            return self.record_when(answer.json["id"], has_settled)
        assert answer.status == 200, answer.body
        return answer.json

    def record_when(self, upgrade_id: str, is_so: Callable[[Any], bool]) -> Any:
        """Return an upgrade's record once it is as `is_so` says."""
        return self.poll(lambda: self.get(f"/upgrades/{upgrade_id}"), is_so)

    def status_when(self, is_so: Callable[[Any], bool]) -> Any:
        """Return the status once it is as `is_so` says."""
        return self.poll(lambda: self.get("/status"), is_so)

    @staticmethod
    def poll(look: Callable[[], Any], is_so: Callable[[Any], bool]) -> Any:
        """Return what `look` finds once it is as `is_so` says: what is looked at can only be looked at again."""
        deadline = time.monotonic() + PATIENCE
        while True:
            value = look()
            if is_so(value):
                return value
            assert time.monotonic() < deadline, value


class Service(Watched):
    """A process that was started from a program, with its successors, until none is left."""

    def __init__(
        self,
        program: Path,
        directory: Path,
        *flags: str,
        environ: Mapping[str, str] | None = None,
        user: int | None = None,
        passed: Sequence[socket.socket] = (),
    ) -> None:
        """Pass on the listening sockets `passed`, as a service manager does; LISTEN_FDNAMES is in `environ`."""
        super().__init__()
        self.upgrade_dir = directory / "upgrades"
        self.upgrade_dir.mkdir(parents=True, exist_ok=True)
        self.program = directory / "self-update"
        if program != self.program:
            shutil.copy2(program, self.program)  # an upgrade replaces the file that the service is started from
        self.statuses: dict[int, int | None] = {}
        """How each process that has ended did so."""
        self.state_dir = directory / "state"
        self._user = user
        self._fds = [listener.fileno() for listener in passed]
        self._before = as_manager(self._fds) if passed else []
        self._says_where = bool(passed) or "-bind" in flags or "SELF_UPDATE_BIND" in (environ or {})
        self._flags = (*(() if is_checked(flags) else ("-insecure-allow-unsigned",)), *flags)
        self._directory = directory
        self._environ = {**os.environ, **(environ or {})}
        self._start()

    def _start(self) -> None:
        """Start the program on disk."""
        self._ended = False
        self.process = subprocess.Popen(
            [
                *self._before,
                str(self.program),
                *(() if self._says_where else ("-bind", "localhost:0")),
                *("-upgrade-bind", "localhost:0"),
                *("-state-dir", str(self.state_dir), "-upgrade-dir", str(self.upgrade_dir)),
                *self._flags,
            ],
            stdin=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            env=self._environ,
            start_new_session=True,
            cwd=self._directory,
            user=self._user,
            pass_fds=self._fds,
        )
        assert self.process.stderr is not None
        threading.Thread(target=self.read, args=[self.process.stderr], daemon=True).start()

    def restart(self, *flags: str) -> None:
        """Start again what is on disk now, once no process is left; with other flags, if any are given."""
        self.wait_for_end()  # and all that was said has been read
        self.lines.clear()
        self._flags = flags or self._flags
        self._start()

    def survivor(self) -> Any:
        """Return the status when somebody serves for good, or None when no process is left."""
        address = self.places[0]
        deadline = time.monotonic() + PATIENCE
        while not self._ended:
            with contextlib.suppress(OSError, http.client.HTTPException):
                status = self.ask("GET", "/status", address=address, timeout=1.0).json
                if status.get("phase") == "RUNNING":
                    return status
            assert time.monotonic() < deadline, self.lines
        return None

    def close(self) -> None:
        """Leave nothing behind."""
        self.kill()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()

    def pids(self) -> list[int]:
        """Return the processes of the service's session, zombies included."""
        return [pid for pid, session in sessions() if session == self.process.pid]

    def wait_until_alone(self, *pids: int) -> None:
        """Wait until `pids` are the only processes left."""
        for other in self.pids():
            if other not in pids:
                self.statuses[other] = self._reap(other)
        self.poll(
            lambda: set(self.pids()), lambda left: left == set(pids)
        )  # its parent, being alive, reaps each: nothing tells when

    def wait_for_end(self) -> None:
        """Wait until no process is left; `statuses` says how each ended."""
        with self._news:
            self._news.wait_for(lambda: self._ended, PATIENCE)
        assert self._ended, f"processes are left: {self.pids()}"
        self.statuses[self.process.pid] = self._reap(self.process.pid)
        while pids := self.pids():  # a child becomes ours when its parent is reaped
            for pid in pids:
                self.statuses[pid] = self._reap(pid)

    def stop(self) -> None:
        """Send SIGTERM to all processes, and wait for their end."""
        for pid in self.pids():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGTERM)
        self.wait_for_end()

    def _reap(self, pid: int) -> int | None:
        """Wait for a process's end; return its exit status, negative for a signal, or None if its parent took it."""
        if pid == self.process.pid:
            return self.process.wait(PATIENCE)
        wait_for_end(pid)
        try:
            return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        except ChildProcessError:  # its parent took it, being alive
            return None

    def kill(self) -> None:
        """Leave nothing behind."""
        while pids := [pid for pid in self.pids() if not is_zombie(pid)]:
            for pid in pids:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            for pid in pids:
                self._reap(pid)
        self.process.wait(PATIENCE)


def wait_for_end(pid: int) -> None:
    """Wait until a process, anybody's, has ended."""
    try:
        fd = os.pidfd_open(pid)
    except ProcessLookupError:
        return
    try:
        poll = select.poll()
        poll.register(fd, select.POLLIN)
        assert poll.poll(PATIENCE * 1000), f"process {pid} has not ended"
    finally:
        os.close(fd)


def sessions() -> list[tuple[int, int]]:
    """Return each process with its session (proc(5), stat, field 6)."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(FileNotFoundError, ProcessLookupError):
                found.append((int(entry.name), int(_stat(int(entry.name))[3])))
    return found


def _stat(pid: int) -> list[str]:
    """Return the fields of /proc/PID/stat behind the name: the state first."""
    return Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()


def is_zombie(pid: int) -> bool:
    try:
        return _stat(pid)[0] == "Z"
    except (FileNotFoundError, ProcessLookupError):
        return True


def resources(pid: int) -> dict[str, int]:
    """Return how many descriptors and threads a process has."""
    return {kind: len(list(Path(f"/proc/{pid}/{kind}").iterdir())) for kind in ("fd", "task")}


def resident(pid: int) -> int:
    """Return how many KiB of memory a process occupies."""
    return int(Path(f"/proc/{pid}/status").read_text(encoding="utf-8").partition("VmRSS:")[2].split()[0])
