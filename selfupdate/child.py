"""The successor that an incumbent starts, and the only place that starts one.

It gets the listening sockets (sd_listen_fds(3)), one end of the channel, and pipes
for what it writes. One that speaks the plain protocol wants to bind the addresses
by itself; it can't while it holds a copy of a listening socket without knowing,
so it is started once more without them. Until then nothing has happened to the
service, and a plain successor does nothing before it is asked to.
"""

from __future__ import annotations

import errno
import json
import logging
import socket
import sys
from typing import TYPE_CHECKING

from selfupdate import process
from selfupdate.errors import SuccessorError, UpgradeError
from selfupdate.listener import FIRST_FD, names_of
from selfupdate.notify import Receiver
from selfupdate.original import Comeback
from selfupdate.successor import ANSWER_SIZE, Successor, environment
from selfupdate.transcript import STREAMS, Transcript

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from selfupdate.listener import Address, Listener
    from selfupdate.settings import Settings
    from selfupdate.trust import Release

_log = logging.getLogger(__name__)

_OF_THE_MACHINE = {errno.EMFILE, errno.ENFILE, errno.EAGAIN, errno.ENOMEM}
"""Errors of starting a process that are no fault of the program."""


class Child(Successor):
    """A successor that this process started."""

    def __init__(
        self, release: Release, version: str, settings: Settings, binds: Sequence[Address], upgrade_bind: Address
    ) -> None:
        """Prepare to start `release`, which said that it is `version`, for the addresses given."""
        super().__init__(version, settings, binds, upgrade_bind)
        self._name = release.name
        each = (text for bind in binds for text in ("-bind", str(bind)))
        self._command = release.command("-upgrade", "true", "-upgrade-bind", str(upgrade_bind), *each)
        self._guard: process.Guard | None = None
        self._transcript: Transcript | None = None

    def start(
        self,
        listeners: Sequence[Listener],
        lock_fd: int,
        hello: Mapping[str, object],
        environ: Mapping[str, str],
        stop_fd: int,
    ) -> None:
        """Start it; with `listeners`, as a successor that may share them. Raises SuccessorError or UpgradeError.

        It holds the lock `lock_fd`, too, and is told `hello` first. A wait ends with StopRequestedError
        when `stop_fd` becomes readable.
        """
        self._stop_fd = stop_fd
        self._may_share = bool(listeners)
        try:
            self._notifications = Receiver()
            self._channel, theirs = _channel()
            self._transcript = Transcript()
        except OSError as error:
            raise UpgradeError(f"this machine cannot start a successor: {error}") from error
        self._channel.settimeout(self._limits.announce_time)
        passed = [*(listener.sock.fileno() for listener in listeners), theirs.fileno(), lock_fd, *STREAMS]
        channel, lock, *streams = range(FIRST_FD + len(listeners), FIRST_FD + len(passed))
        self._tell({**hello, "secret": self._secret, "lock": lock, "streams": streams})
        environ = environment(self._settings, environ, self._notifications.address, channel)
        mark = f"NOTIFY_SOCKET={self._notifications.address}"
        environ |= names_of(listeners)
        try:
            self._process = process.spawn(
                self._command, environ, passed, listeners=len(listeners), streams=self._transcript.writers, mark=mark
            )
            self._guard = process.Guard(self._process.pid, self._transcript.readers)
        except OSError as error:
            kind = UpgradeError if error.errno in _OF_THE_MACHINE else SuccessorError
            raise kind(f"{self._name} cannot be executed: {error.strerror}", "cannot-execute") from error
        finally:
            theirs.close()
            self._transcript.close_writers()

    @property
    def log(self) -> str | None:
        """The end of what it wrote; None where it was not started."""
        return self._transcript.text if self._transcript else None

    def _ending(self) -> str:
        assert isinstance(self._process, process.Process)
        return process.ending(self._process.end(0))

    def replace(self) -> None:
        """Ask it to accept, from when on its guard lets it live when this process dies. Raises SuccessorError."""
        if self._guard:
            self._guard.release()
        super().replace()

    def bless(self) -> None:
        """Tell it that it is there to stay, and let go of it."""
        self._tell({"blessed": True})
        self._leave()
        self._forget()

    def bless_to_hand_back(self) -> Comeback | None:
        """Do as `bless` does, where it is to hand back to this process; return what that takes.

        Returns None where it does not answer: it has ended, or will do without.
        """
        assert self._channel is not None
        assert isinstance(self._process, process.Process)
        self._tell({"blessed": True, "comes_back": True})
        self._leave()
        self._notifications.close()
        self._channel.settimeout(self._limits.replace_time)
        try:
            address = str(json.loads(self._channel.recv(ANSWER_SIZE))["notify"])
        except (OSError, ValueError, KeyError, TypeError):
            self._forget()
            return None
        return Comeback(self._command, self._settings, address, self._channel, self._process)

    def _leave(self) -> None:
        if self._transcript and self._guard:
            self._transcript.leave(process.LEFTOVER_TIME)
            self._guard.leave()
            self._guard = None

    def end(self, grace: float) -> None:
        """Let it leave within `grace` seconds, and kill what is left of its process group."""
        if isinstance(self._process, process.Process):
            status = self._process.end(grace)
            _log.info("the successor %s", process.ending(status), extra={"successor": self.pid})
        if self._guard:
            self._guard.end()
            self._guard = None
        if self._transcript:
            self._transcript.end(process.LEFTOVER_TIME)
        self._forget()


def _channel() -> tuple[socket.socket, socket.socket]:
    """Return both ends of a channel of messages.

    Not of bytes: a message that does not fit is dropped whole, and never cut.
    """
    if sys.platform == "win32":
        raise OSError("inheriting a channel needs POSIX")
    return socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
