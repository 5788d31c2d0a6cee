"""A whole service, put together: from the settings to the exit status.

In two parts. First comes what must be there before anybody can be served, then the rest: at a start while the
first requests are being answered, in a successor before it stands by.
"""

from __future__ import annotations

import contextlib
import errno
import gc
import io
import logging
import os
import signal
import sys
import threading
from typing import TYPE_CHECKING

from selfupdate import __version__, log, settings, signals, system, versions
from selfupdate import listener as listeners
from selfupdate.access import Gate, read_token
from selfupdate.app import App
from selfupdate.errors import IllegalTransitionError, SelfUpdateError, StartError, UsageError
from selfupdate.estate import Estate
from selfupdate.frontend import Frontend, find_places
from selfupdate.lifecycle import Event, Lifecycle, Phase
from selfupdate.manager import Manager
from selfupdate.presence import Presence
from selfupdate.server import Server
from selfupdate.signals import Signals
from selfupdate.stop import Stop

if TYPE_CHECKING:
    from collections.abc import Sequence

    from selfupdate.candidates import Scanner
    from selfupdate.company import Company
    from selfupdate.incumbent import Incumbent, Standby
    from selfupdate.listener import Listener
    from selfupdate.settings import Settings
    from selfupdate.trust import Trust
    from selfupdate.upgrade import Upgrader
    from selfupdate.watch import Watch

_log = logging.getLogger(__name__)

_TURN = 0.0005
"""Seconds that a thread keeps the interpreter from one that wants it. With Python's own 5 ms whoever asks waits for
that long, and again and again, while another thread drives an upgrade."""


def run(arguments: Sequence[str]) -> int:
    """Run the service for a command line (without the program's name); return the exit status."""
    _open_missing_streams()
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # a path need not be text
    try:
        return _run(arguments)
    except UsageError as error:
        return _fail(2, error)
    except SelfUpdateError as error:
        return _fail(1, error)
    except KeyboardInterrupt:  # a command; the service takes it for a stop signal
        return 128 + signal.SIGINT


def _run(arguments: Sequence[str]) -> int:
    given = settings.parse(arguments, os.environ)
    if given.help or given.version:
        print(settings.usage() if given.help else __version__)
        return 0
    if given.status or given.apply or given.rollback:
        return _ask(given)
    if given.verify is not None:
        from selfupdate.verify import verify

        settings.check(given)
        return verify(given, given.verify)
    if given.print_unit:
        from selfupdate.unit import print_unit

        settings.check(given)
        return print_unit(given)
    return _Service(given).run()


def _ask(given: Settings) -> int:
    """Do what is to be asked of the service that runs."""
    from selfupdate.client import Client
    from selfupdate.terminal import Terminal

    client = Client(given, Terminal.of(sys.stdout, os.environ))
    if given.status:
        return client.status()
    return client.apply() if given.apply else client.roll_back()


def _fail(status: int, error: SelfUpdateError) -> int:
    print(f"self-update: {error}", file=sys.stderr)
    return status


def _open_missing_streams() -> None:
    """Put /dev/null where a standard stream is closed: a socket in its place would get what is printed."""
    for stream in (0, 1, 2):
        try:
            os.fstat(stream)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # the lowest free number: this one


class _Service:
    def __init__(self, given: Settings) -> None:
        sys.setswitchinterval(_TURN)
        self._signals = Signals()
        self._incumbent: Incumbent | None = None
        if given.upgrade:
            from selfupdate.incumbent import Incumbent

            self._incumbent = Incumbent(os.environ)
        is_main = self._incumbent is None or self._incumbent.comes_back
        self._manager = Manager(os.environ, __version__, is_main=is_main)
        self._settings = given = self._with_trust(given)
        settings.check(given)
        self._generation = self._incumbent.generation if self._incumbent else 0
        upgrade = self._incumbent.upgrade if self._incumbent else ""
        log.configure(os.environ, dev=given.dev, generation=self._generation, upgrade=upgrade)
        threading.excepthook = _crash
        self._token = read_token(given.token_file) if given.token_file else None
        self._lifecycle = Lifecycle(Phase.STANDBY if self._incumbent else Phase.RUNNING)
        self._estate = Estate(given.state_dir, given.limits.candidate_size)
        if self._incumbent:
            self._estate.share(self._incumbent)
        elif self._estate.take():
            self._execute_anew()
        passed = listeners.adopt(os.environ)  # not before: what recovers starts anew, and leaves the sockets to that
        if self._incumbent:
            passed = self._incumbent.recognise(passed)
        has_token = self._token is not None
        self._frontend = Frontend(find_places(given, passed, is_successor=given.upgrade, has_token=has_token))
        limits = given.limits._replace(connections=system.make_room(given.limits.connections))
        self._settings = given = given._replace(bind=self._frontend.binds, limits=limits)
        self._stop_request = Stop()
        self._presence = Presence(__version__, self._generation, self._lifecycle, self._stop_request)
        names = {*(bind.host.lower() for bind in given.bind), *(given.allowed_hosts or ())}
        self._app = App(Gate(self._token), names, self._presence.first_routes)
        self._server = Server("http", self._app.respond, given.limits, self._app.at_hand)
        self._server.follow(self._app.answered)
        self._follow()
        self._standby: Standby | None = None
        # Put together later, by `_complete`.
        self._trust: Trust
        self._upgrader: Upgrader
        self._company: Company
        self._watch: Watch

    def _complete(self) -> None:
        """Put together the rest: what upgrades, and what tells of it."""
        from selfupdate.candidates import Scanner
        from selfupdate.company import Company
        from selfupdate.trust import Trust
        from selfupdate.upgrade import Upgrader
        from selfupdate.watch import Watch

        given, estate, stop_fd = self._settings, self._estate, self._stop_request.fileno()
        self._trust = Trust(given, estate.store, stop_fd)
        scanner = Scanner(
            given.upgrade_dir,
            estate.store,
            self._trust,
            running=versions.parse(__version__),
            running_sha256=lambda: estate.program.sha256,
            floor=estate.floor,
            allow=given.allow,
            fault_of=estate.journal.fault_of,
            needed=self._needed_releases,
            fault=estate.fault,
            stop_fd=stop_fd,
            limits=given.limits,
        )
        self._upgrader = Upgrader(
            program=estate.program,
            generation=self._generation,
            settings=given,
            lifecycle=self._lifecycle,
            journal=estate.journal,
            scanner=scanner,
            store=estate.store,
            trust=self._trust,
            server=self._server,
            frontend=self._frontend,
            stop=self._stop_request,
            lock_fd=estate.state.lock_fd,
            on_settled=self._signals.wake,
            on_retired=lambda: self._signals.wake(signals.RETIRED),
            on_stop=lambda: self._signals.wake(signals.STOP),
        )
        self._company = Company(
            self._frontend,
            self._server,
            self._signals,
            self._manager,
            estate.state,
            given.limits.health_time,
        )
        self._watch = Watch(given.upgrade_dir, scanner.look_ahead, self._lifecycle, stop_fd)
        self._tell(scanner)

    def _tell(self, scanner: Scanner) -> None:
        """Answer all routes from here on."""
        from selfupdate.api import AT_HAND, Api
        from selfupdate.counters import Counters
        from selfupdate.events import Feed
        from selfupdate.metrics import Metrics
        from selfupdate.standing import Standing

        estate, journal = self._estate, self._estate.journal
        standing = Standing(estate.program, self._generation, self._lifecycle, journal, self._trust, self._frontend)
        metrics = Metrics(
            version=__version__,
            generation=self._generation,
            lifecycle=self._lifecycle,
            journal=journal,
            scanner=scanner,
            server=self._server,
            counters=Counters(None if estate.fault else estate.state.path),
        )
        wake, limit = self._server.advance_streams, self._settings.limits.listeners
        api = Api(
            version=__version__,
            settings=self._settings,
            standing=standing,
            journal=journal,
            scanner=scanner,
            upgrader=self._upgrader,
            frontend=self._frontend,
            feed=Feed(journal, self._lifecycle, standing.as_json, wake, limit),
            metrics=metrics,
        )
        routes = {**self._presence.routes, **api.routes}
        self._app.complete(routes, {*self._presence.routes, *AT_HAND}, metrics.answered)

    def _follow(self) -> None:
        """Have the service manager told what happens."""
        self._lifecycle.follow(self._manager.follow)
        self._estate.journal.follow(self._manager.show)
        if self._manager.watchdog_interval is not None:
            self._server.beat(self._manager.watchdog_interval, self._manager.alive)

    def _with_trust(self, given: Settings) -> Settings:
        """Return the settings with those of trust that the incumbent passed on, if it did."""
        if self._incumbent is None or self._incumbent.trust is None:
            return given
        try:
            return given.inheriting(self._incumbent.trust)
        except (ValueError, KeyError) as error:
            raise StartError(f"the incumbent's settings cannot be taken over: {error!r}") from error

    def run(self) -> int:
        """Serve until a stop signal, or until a successor has taken over; return the exit status."""
        if self._incumbent:
            from selfupdate.incumbent import Standby

            self._complete()  # first: what is imported beside the first requests would keep them waiting
            if self._incumbent.is_plain:
                _read_the_rest()
            _begin_to_collect()
            self._standby = Standby(
                self._incumbent,
                settings=self._settings,
                lifecycle=self._lifecycle,
                journal=self._estate.journal,
                places=self._frontend.places,
                health=self._presence.health,
                accept=self._take_over,
                on_settled=self._signals.wake,
            )
            try:
                self._standby.begin()
            except StartError as error:
                if not self._incumbent.comes_back:
                    raise
                return self._give_up(error)
        else:
            self._accept(listeners.listen(self._frontend.places))
            self._complete()
            _read_the_rest()
            _begin_to_collect()
            self._say_where()
            self._upgrader.open()
            self._manager.ready(f"{__version__} serves on {listeners.join(self._frontend.binds)}")
            threading.Thread(target=self._trust.announce, name="trust", daemon=True).start()
            self._look_ahead()
            if not self._settings.upgrade_dir.is_dir():
                _log.warning("there is no upgrade directory yet", extra={"directory": str(self._settings.upgrade_dir)})
        while True:
            word = self._signals.next()
            assert word is not None
            if word == signals.HANG_UP:
                self._hang_up()
            elif word == signals.RETIRED or (self._standby and self._standby.settled is Phase.RETIRED):
                return self._retire()
            elif word == signals.SETTLED:
                self._settle()
            else:
                return self._stop(word)

    def _look_ahead(self) -> None:
        """Know what is in the upgrade directory before anybody asks, if upgrades are on."""
        if self._estate.fault is None and self._trust.is_on:
            self._watch.begin()

    def _hang_up(self) -> None:
        """Begin an upgrade, or leave that to the version that this process is about to become."""
        if self._lifecycle.phase is Phase.RETIRED:
            self._company.is_hung_up = True
        else:
            threading.Thread(target=self._upgrade, name="reload", daemon=True).start()

    def _upgrade(self) -> None:
        """Do as `POST /upgrade` does, and write the answer into the log."""
        try:
            if self._upgrader.upgrade() is None:
                _log.info("up to date")
        except SelfUpdateError as error:
            _log.warning("no upgrade", extra={"code": error.code, "reason": str(error), "remedy": error.remedy})

    def _settle(self) -> None:
        """Go on as what this process has become: the service, which may be about to hand back."""
        if self._incumbent is None:
            return
        if self._standby is None:  # the original process did not come back
            self._manager.is_main = os.getppid() != self._incumbent.pid
            return
        settled = self._standby.settled
        self._standby.end()
        self._standby = None
        self._incumbent.take_streams()
        log.configure(os.environ, dev=self._settings.dev, generation=self._generation)
        self._begin_to_own()
        if settled is Phase.STARTING:
            channel = self._incumbent.take_channel()
            assert channel is not None
            with log.upgrade(self._incumbent.upgrade):
                self._upgrader.hand_back(channel, self._incumbent.pid)
        else:
            self._incumbent.close_channel()
            self._manager.is_main = True
        self._upgrader.open()
        if not self._incumbent.is_plain:
            self._look_ahead()

    def _retire(self) -> int:
        """Leave the service to the process that took over, or become it; return the exit status."""
        limits = self._settings.limits
        self._watch.end(max(limits.version_time, limits.verify_time) + limits.kill_time)
        comeback = self._upgrader.comeback
        if comeback:
            environ = {**os.environ, **self._settings.environment()}
            word = self._company.come_back(comeback, self._upgrader.command, environ)
            return self._company.stay_with(comeback.successor) if word is None else self._stop(word)
        partner = self._partner()
        if self._standby and self._incumbent:  # nobody hands over to this process any more
            self._server.pause(self._settings.drain)
            self._incumbent.close_channel()
            self._standby.end()
        self._server.wait_until_empty()
        self._server.close(0)
        _log.info("retired")
        if partner:
            return self._company.stay_with(partner)
        if self._upgrader.successor_pid is not None:
            self._manager.hand_over(self._upgrader.successor_pid)
        return 0

    def _give_up(self, error: StartError) -> int:
        """Stay what a supervisor knows, beside the version that would have handed back to this process."""
        assert self._incumbent is not None
        _log.error("cannot take over", extra={"reason": str(error)})
        cause = error.__cause__
        number = cause.errno if isinstance(cause, OSError) and cause.errno else errno.EIO
        self._incumbent.announce(ERRNO=str(number), STATUS=str(error))
        self._lifecycle.step(Event.DISMISSED)
        self._frontend.leave()
        return self._retire()

    def _partner(self) -> system.Process | None:
        """Return the process beside which this one stays as the one that is known, and which it outlives; or None."""
        comeback = self._upgrader.comeback
        if comeback:
            serving: system.Process = comeback.successor
            return serving
        pid = None
        if self._standby and self._incumbent and self._incumbent.comes_back:
            pid = self._incumbent.pid
        elif os.getpid() == 1 and self._lifecycle.phase is Phase.RETIRED:  # with the init of a container all ends
            pid = self._upgrader.successor_pid
        try:
            return system.own_child(pid) if pid else None
        except OSError:
            return None  # it has ended

    def _accept(self, found: Sequence[Listener]) -> None:
        self._frontend.open(found)
        self._server.accept(*(listener.sock for listener in found))
        self._estate.state.sign(str(self._frontend.binds[0]))

    def _take_over(self, found: Sequence[Listener]) -> None:
        self._accept(found)
        self._say_where()

    def _say_where(self) -> None:
        """Tell that all is there: who waits for this line may replace the file that the program was started from."""
        _log.info("serving", extra={"bind": listeners.join(self._frontend.binds)})

    def _execute_anew(self) -> None:
        """Become the version that is in the program's file now."""
        path = str(self._estate.program.path)
        _log.warning("the version that had been committed is installed now, and started", extra={"program": path})
        system.execute_instead(path, sys.argv[1:], self._estate.state.lock_fd)

    def _begin_to_own(self) -> None:
        """Settle what the incumbent left to this process, when this process is there to stay."""
        if self._incumbent and self._incumbent.is_plain and self._estate.fault is None:
            threading.Thread(target=self._own_later, name="lock", daemon=True).start()
        else:
            self._estate.settle()

    def _own_later(self) -> None:
        """Wait until a plain incumbent has let go of the state directory."""
        if self._estate.wait_for(str(self._frontend.binds[0])):
            self._look_ahead()

    def _needed_releases(self) -> set[str] | None:
        """Return the digests of the releases that must stay; None where another process decides that."""
        if self._lifecycle.phase in {Phase.STANDBY, Phase.TRIAL, Phase.RETIRED}:
            return None
        return self._estate.needed_releases()

    def _stop(self, word: int) -> int:
        """End an upgrade, then finish what is under way."""
        self._server.end_connections()
        _log.info("stopping", extra={"signal": signal.Signals(word).name})
        if self._incumbent and self._lifecycle.phase in {Phase.STANDBY, Phase.TRIAL}:
            self._incumbent.announce(STOPPING="1", X_SELF_UPDATE_STOP="1")
        self._upgrader.stop()
        partner = self._partner()
        self._pass_stop_on(partner)
        try:
            self._lifecycle.step(Event.STOP)
        except IllegalTransitionError:
            _log.debug("was stopping already, or has handed over", extra={"phase": self._lifecycle.phase})
        self._manager.stopping()
        self._frontend.leave()
        if self._standby:
            self._standby.end()
        may_go_on = self._incumbent is not None and self._incumbent.may_serve_again
        if self._lifecycle.phase is Phase.STOPPING and not may_go_on:
            self._frontend.remove_paths()
        self._server.close(self._settings.drain)
        self._watch.end(self._settings.limits.kill_time)
        if self._lifecycle.phase is Phase.STOPPING:
            self._lifecycle.step(Event.STOPPED)
        _log.info("stopped")
        return self._company.outlive(partner) if partner else 0

    def _pass_stop_on(self, partner: system.Process | None) -> None:
        """Tell the process beside this one, or the one that has just taken over for good."""
        pid = partner.pid if partner else None
        if self._lifecycle.phase is Phase.RETIRED:
            pid = pid or self._upgrader.successor_pid
        if pid is not None:
            with contextlib.suppress(ProcessLookupError):  # it has ended
                os.kill(pid, signal.SIGTERM)


def _read_the_rest() -> None:
    """Import what may be needed later: the file that this program was started from may be replaced at any time.

    Not that of a successor of this program: it is a copy, which stays as long as it runs.
    """
    from selfupdate import page, parser, relay  # noqa: F401


def _begin_to_collect() -> None:
    """Look for garbage from here on, but never in what is there now, for nearly all of that stays (gc.freeze)."""
    gc.freeze()
    gc.enable()


def _crash(failure: threading.ExceptHookArgs) -> None:
    """End the process when a thread meets a defect: whoever watches it can act, on a half-dead one nobody can."""
    _log.critical("a defect ends the process", exc_info=failure.exc_value)
    os._exit(1)
