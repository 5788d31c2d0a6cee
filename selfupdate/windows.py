"""The operating system on Windows, as far as it is there: the service serves, and starts no other program.

`posix`, `notify`, `transcript` and `launch` offer the same names; `system` takes the one or the other.
"""

# ruff: noqa: ARG001, ARG002 - what is not there needs no arguments

from __future__ import annotations

import contextlib
import os
import signal
import sys
from typing import TYPE_CHECKING, Any, NoReturn, Protocol

if TYPE_CHECKING:
    import io
    import socket
    from collections.abc import Callable, Iterable, Mapping, Sequence
    from pathlib import Path

    from selfupdate.listener import Address, Listener

assert sys.platform == "win32"  # for those who read types: none of this is there

SIGNALS = {signal.SIGTERM, signal.SIGINT, signal.SIGBREAK}
"""What tells the service to stop."""

CAN_BECOME = False
"""Whether a process can execute another program in its place."""

PROGRAM_SUFFIXES = (".exe", ".com", ".bat", ".cmd")
"""How the names of programs end."""

TOOL_DIRECTORIES = ()
"""Where the platform's own programs are."""

TOOL_ENVIRONMENT: Mapping[str, str] = {}
"""All that they see."""

TOOL_SUFFIX = ".exe"
"""How their names end."""

STATE_HOME = "XDG_STATE_HOME"
"""The variable that names the place of what programs keep."""

RELEASE_MODE = 0o500
"""Of a private copy."""

MOST_CONNECTIONS = 1000
"""How many connections a server may have."""

CLEAN_ENVIRONMENT: Mapping[str, str] = {}
"""All that a program needs to see of this process's environment."""

STARTING = contextlib.nullcontext()
"""Held while a file to be executed is closed."""


def ready(fds: Iterable[int], deadline: float | None) -> set[int]:
    """Raise OSError: only sockets can be waited for here."""
    raise OSError("poll needs POSIX")


def wait_for_end(pid: int, deadline: float | None = None) -> None:
    """Return at once: a process can't be watched here."""


class Process:
    """A child: there is none."""

    pid: int
    exit_fd: int
    has_left_strays: bool

    def __init__(self, pid: int) -> None:
        """Raise OSError."""
        raise OSError("watching processes needs Linux")

    def wait(self, deadline: float) -> bool:
        """Wait until it has ended; tell whether it has."""
        return False

    def end(self, grace: float) -> int:
        """Let it leave within `grace` seconds, and return its status."""
        return -1


def start_piped(
    arguments: Sequence[str],
    environ: Mapping[str, str],
    directory: Path,
    *,
    stdin: int,
    fds: Sequence[int],
    mark: str,
) -> tuple[Process, io.RawIOBase, io.RawIOBase]:
    """Raise OSError."""
    raise OSError("starting programs needs Linux")


def reap_strangers() -> None:
    """Do nothing: no process waits to be reaped."""


def hold_signals() -> None:
    """Do nothing: signals don't interrupt."""


def take_signals() -> None:
    """Do nothing."""


class Child:
    """A successor's process: there is none."""

    log: str | None = None
    pid: int
    exit_fd: int

    def __init__(self, patience: float) -> None:
        """Raise OSError."""
        raise OSError("passing descriptors needs Linux")

    def start(
        self,
        command: Sequence[str],
        environ: Mapping[str, str],
        hello: Mapping[str, object],
        listeners: Sequence[Listener],
        lock_fd: int,
    ) -> None:
        """Start `command`."""

    def fileno(self) -> int:
        """Return the descriptor that is readable when it has announced something."""
        return -1

    def receive(self) -> dict[str, str] | None:
        """Return what it announced next, or None."""

    def tell(self, message: Mapping[str, Any]) -> None:
        """Send a message on the channel."""

    def has(self, pid: object) -> bool:
        """Tell whether the process `pid` is the one that was started."""
        return False

    def owns(self, address: Address) -> bool | None:
        """Tell whether what listens on `address` is this account's; None where nothing does."""

    def release(self) -> None:
        """Let it live on when this process dies."""

    def leave(self) -> None:
        """Let go of it: it is there to stay."""

    def terminate(self) -> None:
        """Tell it to leave."""

    def end(self, grace: float) -> int | None:
        """Let it leave within `grace` seconds, and return its status, if it was started."""

    def reap(self) -> int | None:
        """Return the status of one that has ended."""

    def leave_to_hand_back(self, patience: float) -> Comeback | None:
        """Return nothing: nobody hands back."""


class Parent:
    """The process that started this one: it does not become another."""

    log: str | None = None
    pid: int
    exit_fd: int

    def __init__(self, channel: Channel, pid: int, patience: float) -> None:
        """Raise OSError."""
        raise OSError("becoming another program needs POSIX")

    def call(self, hello: Mapping[str, object], listeners: int) -> None:
        """Have it come."""

    def dismiss(self, grace: float) -> None:
        """Have it serve no more."""

    def fileno(self) -> int:
        """Return the descriptor that is readable when it has announced something."""
        return -1

    def receive(self) -> dict[str, str] | None:
        """Return what it announced next, or None."""

    def tell(self, message: Mapping[str, Any]) -> None:
        """Send a message on the channel."""

    def has(self, pid: object) -> bool:
        """Tell whether the process `pid` is the one."""
        return False

    def owns(self, address: Address) -> bool | None:
        """Tell whether what listens on `address` is this account's; None where nothing does."""

    def release(self) -> None:
        """Let it live on when this process dies."""

    def leave(self) -> None:
        """Let go of it."""

    def terminate(self) -> None:
        """Tell it to leave."""

    def reap(self) -> int | None:
        """Return the status of one that has ended."""


class Comeback(Protocol):
    """What it takes to become another program: it can't be had."""

    successor: Process

    def execute(
        self, command: Sequence[str], environ: Mapping[str, str], listeners: Sequence[Listener], lock_fd: int
    ) -> NoReturn:
        """Become it."""

    def give_up(self, error: OSError) -> None:
        """Stay what this process is."""


Channel = Any
"""The successor's end of the channel."""


def join(fd: str, environ: Mapping[str, str]) -> Channel:
    """Raise OSError."""
    raise OSError("inheriting a channel needs POSIX")


def adopt(fd: int) -> int:
    """Raise OSError."""
    raise OSError("inheriting descriptors needs POSIX")


def shared(hello: Mapping[str, Any]) -> list[socket.socket]:
    """Return no listeners."""
    return []


def send(environ: Mapping[str, str], **fields: str) -> None:
    """Tell nobody."""


def execute_instead(path: str, arguments: Sequence[str], lock_fd: int) -> None:
    """Raise OSError."""
    raise OSError("becoming another program needs POSIX")


def watch_for_stop(act: Callable[[], None]) -> None:
    """Call nothing: signals are all that tells a process to stop."""


def open_lock(path: Path) -> int:
    """Return a descriptor of the lock `path`, which is made where it is missing. Raises OSError."""
    return os.open(path, os.O_RDWR | os.O_CREAT, 0o600)


def take_lock(fd: int, path: Path, *, wait: bool) -> int:
    """Return the descriptor as it is: nothing is locked."""
    return fd


def is_noexec(path: Path) -> bool:
    """Tell that programs can be executed everywhere."""
    return False


def put_in_place(new: Path, program: Path) -> None:
    """Rename `new` to `program`, which may be there. Raises OSError."""
    new.replace(program)


def mend(program: Path) -> None:
    """Do nothing."""


def sync_directory(path: Path) -> None:
    """Do nothing."""
