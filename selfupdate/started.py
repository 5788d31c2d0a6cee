"""The successor that an incumbent starts, and the only place that starts one.

It gets the listening sockets, one end of the channel, and pipes for what it writes.
One that speaks the plain protocol wants to bind the addresses by itself; it can't
while it holds a copy of a listening socket without knowing, so it is started once
more without them. Until then nothing has happened to the service, and a plain
successor does nothing before it is asked to.
"""

from __future__ import annotations

import errno
import logging
from typing import TYPE_CHECKING

from selfupdate import process, system
from selfupdate.errors import SuccessorError, UpgradeError
from selfupdate.successor import Successor

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from selfupdate.listener import Address, Listener
    from selfupdate.settings import Settings
    from selfupdate.trust import Release

_log = logging.getLogger(__name__)

_OF_THE_MACHINE = {errno.EMFILE, errno.ENFILE, errno.EAGAIN, errno.ENOMEM}
"""Errors of starting a process that are no fault of the program."""


class Started(Successor):
    """A successor that this process started."""

    def __init__(
        self, release: Release, version: str, settings: Settings, binds: Sequence[Address], upgrade_bind: Address
    ) -> None:
        """Prepare to start `release`, which said that it is `version`, for the addresses given."""
        super().__init__(version, settings, binds, upgrade_bind)
        self._name = release.name
        each = (text for bind in binds for text in ("-bind", str(bind)))
        self.command = release.command("-upgrade", "true", "-upgrade-bind", str(upgrade_bind), *each)
        """What starts it, and executes it in place of this process."""
        self._child: system.Child | None = None
        self.on_log: Callable[[], None] = lambda: None
        """Called whenever it has written more."""

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
            self._peer = self._child = system.Child(self._limits.announce_time, self.on_log)
        except OSError as error:
            raise UpgradeError(f"this machine cannot start a successor: {error}") from error
        environ = {**environ, **self._settings.environment()}
        try:
            self._child.start(self.command, environ, {**hello, "secret": self._secret}, listeners, lock_fd)
        except OSError as error:
            kind = UpgradeError if error.errno in _OF_THE_MACHINE else SuccessorError
            raise kind(f"{self._name} cannot be executed: {error.strerror}", "cannot-execute") from error

    def bless_to_hand_back(self, hello: Mapping[str, object], listeners: int) -> system.Comeback | None:
        """Do as `bless` does, where it is to hand back to this process; return what that takes.

        Where it has died, this process comes back to its `listeners` sockets by itself, with `hello`.
        Returns None where it has stopped, or does not answer in time.
        """
        assert self._child is not None
        self._child.tell({"blessed": True, "comes_back": True})
        return self._child.leave_to_hand_back(self._limits.replace_time, {**hello, "secret": self._secret}, listeners)

    def end(self, grace: float) -> None:
        """Let it leave within `grace` seconds, and kill what is left of its process group."""
        if self._child and (status := self._child.end(grace)) is not None:
            _log.info("the successor %s", process.ending(status), extra={"successor": self.pid})
