"""The state directory: private to one service, by a lock that lasts as long as any of its processes.

The lock belongs to the open file and not to a process: an incumbent passes the
descriptor to its successor, so there is no moment in a handover in which a
stranger could take it, and none in which it is left behind by a process that was
killed.
"""

from __future__ import annotations

import contextlib
import json
import os
from typing import TYPE_CHECKING

from selfupdate import permissions, system
from selfupdate.errors import StartError, StateError
from selfupdate.foreign import shown

if TYPE_CHECKING:
    from pathlib import Path


_LOCK = "lock"
_OTHERS = 0o077


class StateDirectory:
    """The directory, made where it is missing, for this user alone."""

    def __init__(self, path: Path) -> None:
        """Keep the path; nothing is made or opened yet."""
        self.path = path.absolute()
        self._fd = -1

    @property
    def lock_fd(self) -> int:
        """The descriptor that holds the lock, to be passed on."""
        return self._fd

    def inherit(self, fd: int) -> None:
        """Hold the lock that an incumbent passed on as `fd`."""
        self._fd = fd

    def open(self) -> None:
        """Make the directory where it is missing, and see that nobody else can get at what is in it.

        Raises StateError where it can't be made or written, or others can change it.
        """
        try:
            self.path.mkdir(mode=0o700, parents=True, exist_ok=True)
            permissions.check_directory(self.path)
            if self.path.stat().st_mode & _OTHERS:
                self.path.chmod(0o700)  # a service manager made it so that others can read it
            self._fd = system.open_lock(self.path / _LOCK)
        except permissions.UnsafeError as error:
            raise StateError(
                f"the state directory {self.path} is not safe: {error}", "staging-permissions", error.remedy
            ) from None
        except OSError as error:
            raise self._unusable(error) from error

    def lock(self, *, wait: bool = False) -> None:
        """Take the lock; with `wait`, when it is free. Raises StartError, naming who has it, or StateError."""
        try:
            self._fd = system.take_lock(self._fd, self.path / _LOCK, wait=wait)
        except BlockingIOError:
            raise StartError(
                f"the state directory {self.path} is in use{self._holder()}; "
                "stop that service, or give this one a directory of its own with -state-dir"
            ) from None
        except OSError as error:
            raise self._unusable(error) from error

    def sign(self, bind: str) -> None:
        """Write down who holds the lock, and where it serves, for people and for scripts."""
        if self._fd < 0:
            return
        text = json.dumps({"pid": os.getpid(), "bind": bind}).encode() + b"\n"
        with contextlib.suppress(OSError):  # a full disk, say: what needs the disk will say so
            os.lseek(self._fd, 0, os.SEEK_SET)
            os.write(self._fd, text.ljust(256))

    def _unusable(self, error: OSError) -> StateError:
        return StateError(
            f"the state directory {self.path} cannot be used: {error.strerror}",
            "state-unusable",
            "make it writable for this account, or give another one with -state-dir",
        )

    def _holder(self) -> str:
        signed = signature(self.path)
        return f" by process {signed['pid']}, which serves on {signed['bind']}" if signed else ""


def signature(state_dir: Path) -> dict[str, str]:
    """Return the `pid` and the `bind` that the last service on `state_dir` signed with, or nothing."""
    try:
        signed = json.loads((state_dir / _LOCK).read_bytes())
        return {"pid": shown(str(signed["pid"])), "bind": shown(str(signed["bind"]))}
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return {}
