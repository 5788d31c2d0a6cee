"""What this process does when another one serves: become the same version in its place, or stay beside it.

A supervisor knows the service by this process: while the other one serves, this
one must not end, and whatever it is told is for the other one.
"""

from __future__ import annotations

import http
import logging
import os
import sys
import time
from typing import TYPE_CHECKING

from selfupdate import signals
from selfupdate.errors import NotNowError
from selfupdate.messages import Request

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from selfupdate import system
    from selfupdate.frontend import Frontend
    from selfupdate.listener import Listener
    from selfupdate.manager import Manager
    from selfupdate.server import Server
    from selfupdate.signals import Signals
    from selfupdate.state import StateDirectory

_log = logging.getLogger(__name__)


class Company:
    """How this process goes on beside the one that serves."""

    def __init__(
        self,
        frontend: Frontend,
        server: Server,
        told: Signals,
        manager: Manager,
        state: StateDirectory,
        health_time: float,
    ) -> None:
        """Hear of signals from `told`, and wait `health_time` seconds for the other one's health."""
        self.is_hung_up = False
        """Whether an upgrade was asked for that the next version is to do."""
        self._frontend = frontend
        self._server = server
        self._told = told
        self._manager = manager
        self._state = state
        self._health_time = health_time

    def come_back(self, comeback: system.Comeback, command: Sequence[str], environ: Mapping[str, str]) -> int | None:
        """Execute the release that serves now by its `command`, in place of this process.

        Returns a stop that came first; None where it can't be executed, which the other one is told.
        """
        kept: list[Listener] = []
        word = None
        try:
            for listener in self._frontend.listeners:
                kept.append(listener._replace(sock=listener.sock.dup()))  # noqa: PERF401 - each is to be closed
            self._server.close(0)
            word = self._last_word()
            if word is None:
                self._execute(comeback, command, environ, kept)
        except OSError as error:
            _log.error("cannot become the new version", extra={"reason": error.strerror})
            self._server.close(0)
            comeback.give_up(error)
        finally:
            for listener in kept:
                listener.sock.close()
        return word

    def _execute(
        self,
        comeback: system.Comeback,
        command: Sequence[str],
        environ: Mapping[str, str],
        passed: Sequence[Listener],
    ) -> None:
        _log.info("becomes the new version", extra={"release": command[0]})
        sys.stdout.flush()
        self._manager.alive()  # the next sign of life is the new version's
        if self.is_hung_up:
            os.kill(os.getpid(), signals.HANG_UP)  # it waits, as all signals do now
        comeback.execute(command, environ, passed, self._state.lock_fd)

    def _last_word(self) -> int | None:
        """Return the stop that has arrived, if one has."""
        while (word := self._told.next(0)) is not None:
            if word == signals.HANG_UP:
                self.is_hung_up = True
            elif word not in {signals.SETTLED, signals.RETIRED}:
                return word
        return None

    def stay_with(self, serving: system.Process) -> int:
        """Stay as the process that is known until `serving` has ended; return the exit status."""
        self._manager.ready(f"process {serving.pid} serves")
        return self.outlive(serving)

    def outlive(self, serving: system.Process) -> int:
        """Wait for the end of `serving`, which is told every signal; return the exit status."""
        interval = self._manager.watchdog_interval
        while not serving.wait(time.monotonic()):
            if interval is not None and self._is_healthy():
                self._manager.alive()
            word = self._told.next(interval, serving.exit_fd)
            if word not in {None, signals.SETTLED, signals.RETIRED}:
                os.kill(serving.pid, word)
        self._frontend.remove_paths()  # it may have ended before it knew that this was left to it
        return min(abs(serving.end(0)), 1)

    def _is_healthy(self) -> bool:
        """Tell whether the service answers."""
        from selfupdate.relay import relay

        try:
            asked = Request("GET", "/healthz", {}, {}, b"")
            return relay(asked, self._frontend.binds[0], self._health_time).status == http.HTTPStatus.OK
        except NotNowError:
            return False
