"""The original process: how it becomes the version that it has blessed, and what that knows of it.

A supervisor knows the service by its process: one that ends is started again, or
takes the container with it. So when the new version has passed its trial, the
original process executes the same release in its place (execve(2)), under its own
id, stands by as any successor does, and the version that serves hands over to it
as any incumbent does. The roles on the channel between the two are exchanged:
what the original told its successor with, it is told with now.

Up to the moment in which it executes the release the original is the old version,
and can answer; behind it, it is one that can fail to come up. Then the version
that passed the trial serves on, and says so.
"""

from __future__ import annotations

import os
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, NoReturn

from selfupdate import notify, process
from selfupdate.errors import UpgradeError
from selfupdate.listener import FIRST_FD, names_of
from selfupdate.notify import Receiver
from selfupdate.successor import Successor, environment

if TYPE_CHECKING:
    import socket
    from collections.abc import Mapping, Sequence

    from selfupdate.listener import Address, Listener
    from selfupdate.manager import Manager
    from selfupdate.settings import Settings
    from selfupdate.signals import Signals


class Original(Successor):
    """The process that started this one, and comes back as the same version."""

    announces_itself = True

    def __init__(
        self, channel: socket.socket, pid: int, version: str, settings: Settings, binds: Sequence[Address]
    ) -> None:
        """Prepare to hand back to the process `pid` at the other end of `channel`."""
        super().__init__(version, settings, binds, settings.upgrade_bind)
        self._channel = channel
        self._parent = pid
        self._standby_time = settings.drain + settings.standby  # what it has begun it ends first

    def call(self, hello: Mapping[str, object], listeners: int, stop_fd: int) -> None:
        """Have it come, to `listeners` sockets, and be told `hello` first. Raises UpgradeError.

        A wait ends with StopRequestedError when `stop_fd` becomes readable.
        """
        self._stop_fd = stop_fd
        assert self._channel is not None
        self._channel.settimeout(self._limits.announce_time)
        try:
            self._notifications = Receiver()
            self._process = process.Parent(self._parent)
        except OSError as error:
            raise UpgradeError(f"the original process cannot be called: {error.strerror}") from error
        self._tell({"notify": self._notifications.address})
        lock = FIRST_FD + listeners + 1  # behind the channel
        self._tell(
            {**hello, "secret": self._secret, "lock": lock, "streams": [], "comes_back": True, "pid": os.getpid()}
        )

    def dismiss(self, grace: float) -> None:
        """Have it serve no more and stay until this process ends, or end it where it does not answer to that."""
        if self._channel is None or not isinstance(self._process, process.Parent):
            return
        self._tell({"dismissed": True})
        # Its end of the channel closes when it accepts no more, or has ended.
        if not process.ready([self._channel.fileno()], time.monotonic() + grace):
            self._process.kill()
        self._forget()

    def end(self, _grace: float) -> None:
        """Let go of it: it ends when this process has ended, so that a supervisor sees the last one leave."""
        self._forget()


@dataclass(frozen=True)
class Comeback:
    """How this process becomes the release that it has blessed, to take over again under its own id."""

    command: list[str]
    settings: Settings
    notify_address: str
    channel: socket.socket
    successor: process.Process
    """Which serves now, and will hand over."""

    def execute(self, environ: Mapping[str, str], listeners: Sequence[Listener], lock_fd: int) -> NoReturn:
        """Become it. Raises OSError, with everything as it was."""
        channel = FIRST_FD + len(listeners)
        environ = environment(self.settings, environ, self.notify_address, channel)
        passed = [*(listener.sock.fileno() for listener in listeners), self.channel.fileno(), lock_fd]
        process.become(self.command, environ | names_of(listeners), passed, listeners=len(listeners))

    def give_up(self, error: OSError) -> None:
        """Tell the successor that this process stays what it is."""
        notify.send({"NOTIFY_SOCKET": self.notify_address}, ERRNO=str(error.errno))
        self.channel.close()


def accompany(serving: process.Process, signals: Signals, manager: Manager) -> int:
    """Stay, as the process that is known, until the one that serves has ended; return the exit status.

    Stop signals are passed on to it.
    """
    manager.ready(f"process {serving.pid} serves")
    signals.listen()
    while not serving.wait(time.monotonic()):
        manager.alive()
        word = signals.next(manager.watchdog_interval, serving.exit_fd)
        if word:
            os.kill(serving.pid, word)
    return min(abs(serving.end(0)), 1)
