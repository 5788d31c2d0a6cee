"""A machine of one's own for a test: private namespaces of Linux, with a first process, until the test ends.

Whatever is started in them dies with the first process, and that one with the test, however it ends: the
kernel sees to it (pid_namespaces(7)). Their network has nothing but a loopback device, so every port is free.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import select
import shutil
import subprocess
import sys
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING, NoReturn, Self

import pytest
from service import PATIENCE, Place, Watched, connect

if TYPE_CHECKING:
    import socket
    from collections.abc import Callable, Mapping, Sequence

_PATH = f"{Path(sys.executable).parent}:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin"
ENVIRON = {"PATH": _PATH, "LANG": "C.UTF-8", "HOME": "/root"}
"""What a service manager gives, and not what the tests run in; but for the Python that is tested."""

_CLONE_NEWNET = 0x40000000
"""For setns(2), which Python has from 3.12 on."""
_FIRST = 'set -e\nip link set lo up\n{setup}\necho up\nexec "$@" </dev/null 2>&1'


def cannot(why: str) -> NoReturn:
    """Skip the test, or fail it where `CI` is set: there, all have to run."""
    if os.environ.get("CI"):
        pytest.fail(why)
    pytest.skip(why)


@dataclass(frozen=True)
class Inhabitant:
    """A process in the namespaces, as it is numbered there."""

    pid: int
    parent: int
    is_zombie: bool
    arguments: tuple[str, ...]


class Namespaces:
    """Private namespaces in which `command` is the first process."""

    def __init__(
        self,
        command: Sequence[str | Path],
        *,
        kinds: Sequence[str] = (),
        setup: str = "",
        environ: Mapping[str, str] = ENVIRON,
        before: Sequence[str | Path] = (),
    ) -> None:
        """Have namespaces of these `kinds`, besides those of processes, mounts and the network.

        `setup` is shell to run in them before the command; `before` is put before all of it.
        """
        kinds = ("pid", "mount", "net", *kinds)
        self._enter = ["nsenter", *(f"--{kind}" for kind in kinds)]
        self._command = [
            *before,
            *("setpriv", "--pdeathsig", "KILL"),  # the kernel ends unshare with the test, and that all the rest
            *("unshare", "--fork", "--kill-child", "--mount-proc", "--propagation", "private"),
            *(f"--{kind}" for kind in kinds),
            *("sh", "-c", _FIRST.format(setup=setup), "sh", *command),
        ]
        self._environ = dict(environ)
        self._started: list[subprocess.Popen[bytes]] = []
        self._unfinished: list[subprocess.Popen[bytes]] = []
        self.readers: list[threading.Thread] = []
        """Of what is written in them; each ends with its stream."""
        self.pid = 0
        """Of the first process, as it is numbered here."""

    def __enter__(self) -> Self:
        if os.geteuid():
            cannot("private namespaces need root")
        if missing := [tool for tool in ("ip", "nsenter", "setpriv", "unshare") if not shutil.which(tool)]:
            cannot(f"{missing[0]} is not installed; .ci/run installs what the tests use")
        self._outer = subprocess.Popen(
            self._command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env=self._environ
        )
        try:
            said = next_line(self.output)
            if said != b"up\n":
                cannot(f"private namespaces cannot be had here: {(said + self.output.read()).decode()}")
            self.pid = self._first()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End all that runs in them."""
        first = self.pid or self._first()
        if first:
            with contextlib.suppress(ProcessLookupError):
                os.kill(first, 9)
        for process in self._unfinished:
            process.communicate(timeout=PATIENCE)
        for process in (self._outer, *self._started):
            process.wait(PATIENCE)
        for reader in self.readers:
            reader.join(PATIENCE)
        for process in (self._outer, *self._started):
            assert process.stdout is not None
            process.stdout.close()

    def wait(self) -> int:
        """Wait for the first process's end; return its exit status, or 128 and the signal."""
        return self._outer.wait(PATIENCE)

    @property
    def output(self) -> IO[bytes]:
        """What the first process writes, and whatever it starts."""
        assert self._outer.stdout is not None
        return self._outer.stdout

    @property
    def root(self) -> Path:
        """The file system as they have it, seen from here."""
        return Path(f"/proc/{self.pid}/root")

    def run(self, *command: str | Path, check: bool = True, text: str = "") -> subprocess.CompletedProcess[str]:
        """Run a command in them, with `text` as its input."""
        process = self._popen(command, stdin=subprocess.PIPE, stderr=subprocess.PIPE)
        try:
            out, err = process.communicate(text.encode(), PATIENCE)
        except BaseException:
            # It is not killed: what it started in them has no other parent to reap it, and they end no sooner.
            self._unfinished.append(process)
            raise
        ran = subprocess.CompletedProcess(command, process.returncode, out.decode(), err.decode())
        assert not check or ran.returncode == 0, ran
        return ran

    def start(self, *command: str | Path) -> IO[bytes]:
        """Start a command in them, which ends with them; return what it writes."""
        process = self._popen(command, stdin=subprocess.DEVNULL)
        self._started.append(process)
        assert process.stdout is not None
        return process.stdout

    def _popen(self, command: Sequence[str | Path], stdin: int, stderr: int | None = None) -> subprocess.Popen[bytes]:
        enter = [*self._enter, f"--target={self.pid}", "--", *command]
        return subprocess.Popen(enter, stdin=stdin, stdout=subprocess.PIPE, stderr=stderr, env=self._environ)

    def connect(self, place: Place, timeout: float) -> socket.socket:
        """Return a connection to a place in them."""
        if isinstance(place, str):
            return connect(str(self.root / place.strip("/")), timeout)
        setns = ctypes.CDLL(None, use_errno=True).setns
        with Path("/proc/thread-self/ns/net").open() as here, Path(f"/proc/{self.pid}/ns/net").open() as there:
            assert setns(there.fileno(), _CLONE_NEWNET) == 0, os.strerror(ctypes.get_errno())
            try:
                return connect(place, timeout)  # it stays where it was made
            finally:
                assert setns(here.fileno(), _CLONE_NEWNET) == 0

    def inhabitants(self) -> list[Inhabitant]:
        """Return the processes in them, in the order of their numbers."""
        numbers = sorted(int(entry.name) for entry in (self.root / "proc").iterdir() if entry.name.isdigit())
        found = []
        for number in numbers:
            with contextlib.suppress(FileNotFoundError, ProcessLookupError):
                found.append(_inhabitant(self.root / "proc" / str(number)))
        return found

    def _first(self) -> int:
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            children = Path(f"/proc/{self._outer.pid}/task/{self._outer.pid}/children").read_text(encoding="ascii")
            return int(children.split()[0]) if children else 0
        return 0


class Inside(Watched):
    """A service in namespaces."""

    def __init__(self, namespaces: Namespaces, log: IO[bytes]) -> None:
        """Read what it says from `log`."""
        super().__init__()
        self.namespaces = namespaces
        reader = threading.Thread(target=self.read, args=[log], daemon=True)
        namespaces.readers.append(reader)
        reader.start()

    def connect(self, place: Place, timeout: float) -> socket.socket:
        return self.namespaces.connect(place, timeout)

    def wait_for_pids(self, is_so: Callable[[set[int]], bool]) -> None:
        """Wait until the processes in the namespaces are as `is_so` says: nothing tells when one has been reaped."""
        self.poll(lambda: {process.pid for process in self.namespaces.inhabitants()}, is_so)


def next_line(stream: IO[bytes]) -> bytes:
    """Return the next line of an unbuffered stream, or what there was before its end."""
    ready, _, _ = select.select([stream], [], [], PATIENCE)
    assert ready, "nothing was said"
    return stream.readline()


def _inhabitant(entry: Path) -> Inhabitant:
    """Return what proc(5) says of a process."""
    lines = (entry / "status").read_text(encoding="utf-8", errors="replace").splitlines()
    status = dict(line.split(":\t", 1) for line in lines if ":\t" in line)
    arguments = (entry / "cmdline").read_bytes().decode("utf-8", "replace").split("\0")[:-1]
    return Inhabitant(int(status["Pid"]), int(status["PPid"]), status["State"].startswith("Z"), tuple(arguments))
