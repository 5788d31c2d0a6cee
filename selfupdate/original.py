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

from typing import TYPE_CHECKING

from selfupdate import system
from selfupdate.errors import UpgradeError
from selfupdate.successor import Successor

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from selfupdate.listener import Address
    from selfupdate.settings import Settings


class Original(Successor):
    """The process that started this one, and comes back as the same version."""

    announces_itself = True

    def __init__(self, version: str, settings: Settings, binds: Sequence[Address]) -> None:
        """Prepare to hand back to it."""
        super().__init__(version, settings, binds, settings.upgrade_bind)
        self._standby_time = settings.drain + settings.standby  # what it has begun it ends first
        self._parent: system.Parent | None = None

    def call(
        self, channel: system.Channel, pid: int, hello: Mapping[str, object], listeners: int, stop_fd: int
    ) -> None:
        """Have the process `pid`, at the other end of `channel`, come to `listeners` sockets. Raises UpgradeError.

        It is told `hello` first. A wait ends with StopRequestedError when `stop_fd` becomes readable.
        """
        self._stop_fd = stop_fd
        try:
            self._peer = self._parent = system.Parent(channel, pid, self._limits.announce_time)
        except OSError as error:
            raise UpgradeError(f"cannot be called: {error.strerror}") from error
        self._parent.call({**hello, "secret": self._secret}, listeners)

    def dismiss(self, grace: float) -> None:
        """Have it serve no more and stay until this process ends, or end it where it does not answer to that."""
        if self._parent:
            self._parent.dismiss(grace)

    def end(self, _grace: float) -> None:
        """Let go of it: it ends when this process has ended, so that a supervisor sees the last one leave."""
        if self._parent:
            self._parent.leave()
