"""A whole service, put together: from the settings to the exit status."""

from __future__ import annotations

import logging
import os
import signal
import socket
import sys
import threading
from typing import TYPE_CHECKING

from selfupdate import __version__, log, settings, versions
from selfupdate import listener as listeners
from selfupdate.app import App
from selfupdate.candidates import Scanner
from selfupdate.errors import IllegalTransitionError, SelfUpdateError, UsageError
from selfupdate.incumbent import Incumbent, Standby
from selfupdate.journal import Journal
from selfupdate.lifecycle import Event, Lifecycle, Phase
from selfupdate.releases import Store
from selfupdate.server import Server
from selfupdate.upgrade import Upgrader

if TYPE_CHECKING:
    from collections.abc import Sequence

    from selfupdate.messages import Request, Response
    from selfupdate.settings import Settings

_log = logging.getLogger(__name__)

_STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT)
_SETTLED = b"\0"


def run(arguments: Sequence[str]) -> int:
    """Run the service for a command line (without the program's name); return the exit status."""
    try:
        given = settings.parse(arguments, os.environ)
        if given.help or given.version:
            print(settings.usage() if given.help else __version__)
            return 0
        return _Service(given).run()
    except UsageError as error:
        return _fail(2, error)
    except SelfUpdateError as error:
        return _fail(1, error)


def _fail(status: int, error: SelfUpdateError) -> int:
    print(f"self-update: {error}", file=sys.stderr)
    return status


class _Service:
    def __init__(self, given: Settings) -> None:
        self._settings = given
        self._wake_out, self._wake_in = socket.socketpair()
        self._wake_in.setblocking(False)
        self._listen_to_signals()
        self._incumbent = Incumbent(os.environ) if given.upgrade else None
        generation = self._incumbent.generation if self._incumbent else 0
        log.configure(dev=given.dev, version=__version__, generation=generation)
        threading.excepthook = _crash
        self._inherited = next(iter(listeners.adopt(os.environ)), None)
        self._lifecycle = Lifecycle(Phase.STANDBY if self._incumbent else Phase.RUNNING)
        self._journal = Journal()
        self._server = Server("http", self._respond, given.limits)
        store = Store(given.state_dir, given.limits.candidate_size)
        stop_out, stop_in = socket.socketpair()
        scanner = Scanner(
            given.upgrade_dir,
            store,
            running=versions.parse(__version__),
            allow=given.allow,
            fault_of=self._journal.fault_of,
            stop_fd=stop_out.fileno(),
            limits=given.limits,
        )
        self._upgrader = Upgrader(
            version=__version__,
            generation=generation,
            settings=given,
            lifecycle=self._lifecycle,
            journal=self._journal,
            scanner=scanner,
            store=store,
            server=self._server,
            stop=(stop_out, stop_in),
            on_retired=lambda: self._wake(_SETTLED),
            on_stop=lambda: self._wake(bytes([signal.SIGTERM])),
        )
        self._app = App(
            version=__version__,
            generation=generation,
            settings=given,
            lifecycle=self._lifecycle,
            journal=self._journal,
            scanner=scanner,
            upgrader=self._upgrader,
        )
        self._standby: Standby | None = None
        self._has_served = False

    def run(self) -> int:
        """Serve until a stop signal, or until a successor has taken over; return the exit status."""
        if self._incumbent:
            self._standby = Standby(
                self._incumbent,
                settings=self._settings,
                lifecycle=self._lifecycle,
                journal=self._journal,
                inherited=self._inherited,
                health=self._app.health,
                accept=self._accept,
                on_settled=lambda: self._wake(_SETTLED),
            )
            self._standby.begin()
        else:
            self._accept(self._inherited or listeners.bind(self._settings.bind))
            if not self._settings.upgrade_dir.is_dir():
                _log.warning("there is no upgrade directory yet", extra={"path": str(self._settings.upgrade_dir)})
        while True:
            word = self._wake_out.recv(1)
            if word != _SETTLED:
                return self._stop(signal.Signals(word[0]))
            if self._standby:
                self._standby.end()
                self._standby = None
            if self._lifecycle.phase is Phase.RETIRED:
                self._server.close(0)
                _log.info("retired")
                return 0

    def _respond(self, request: Request) -> Response:
        return self._app.respond(request)

    def _accept(self, listener: socket.socket) -> None:
        self._upgrader.serve_on(listener)
        self._has_served = True
        self._server.accept(listener)
        _log.info("serving", extra={"bind": str(self._upgrader.bind)})

    def _stop(self, number: signal.Signals) -> int:
        """End an upgrade, then finish what is under way."""
        self._server.end_connections()
        _log.info("stopping", extra={"signal": number.name})
        if self._incumbent and self._lifecycle.phase in {Phase.STANDBY, Phase.TRIAL}:
            self._incumbent.announce(STOPPING="1", X_SELF_UPDATE_STOP="1")
        self._upgrader.stop()
        try:
            self._lifecycle.step(Event.STOP)
        except IllegalTransitionError:
            _log.debug("was stopping already, or has handed over", extra={"phase": self._lifecycle.phase})
        if self._standby:
            self._standby.end()
        self._server.close(self._settings.drain)
        if self._lifecycle.phase is Phase.STOPPING and self._has_served:
            listeners.remove(self._settings.bind)
        if self._lifecycle.phase is Phase.STOPPING:
            self._lifecycle.step(Event.STOPPED)
        _log.info("stopped")
        return 0

    def _listen_to_signals(self) -> None:
        signal.set_wakeup_fd(self._wake_in.fileno(), warn_on_full_buffer=False)
        for number in _STOP_SIGNALS:
            signal.signal(number, lambda *_: None)  # the wake-up descriptor carries the number

    def _wake(self, word: bytes) -> None:
        self._wake_in.send(word)


def _crash(failure: threading.ExceptHookArgs) -> None:
    """End the process when a thread meets a defect: whoever watches it can act, on a half-dead one nobody can."""
    _log.critical("a defect ends the process", exc_info=failure.exc_value)
    os._exit(1)
