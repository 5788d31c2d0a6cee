"""Drives an upgrade: ask the machine, write it down, then act; and undo what failed.

One at a time. Choosing happens in the thread that asks, since its outcome is the
answer; the rest has a thread of its own. Every failure is raised, and one place
decides what becomes of it (`_drive`): before REPLACING the incumbent has never
stopped serving and merely ends the successor; from then on it first accepts
again on the listener that it kept, and only then ends the successor, which may
still have requests to answer.
"""

from __future__ import annotations

import functools
import logging
import os
import threading
import time
from typing import TYPE_CHECKING, Any

from selfupdate import listener as listeners
from selfupdate import log, signature, system, versions
from selfupdate.candidates import Candidate
from selfupdate.errors import (
    CandidateError,
    ChoiceError,
    HandedOverError,
    IllegalTransitionError,
    NotEligibleError,
    NothingToRollBackToError,
    NotNowError,
    SelfUpdateError,
    StartError,
    StopRequestedError,
    SuccessorError,
    UpgradeError,
    UpgradeUnderWayError,
)
from selfupdate.journal import now
from selfupdate.lifecycle import Event, Lifecycle, Phase
from selfupdate.original import Original
from selfupdate.process import ready
from selfupdate.recovery import settle
from selfupdate.started import Started

if TYPE_CHECKING:
    import socket
    from collections.abc import Callable, Sequence

    from selfupdate.candidates import Scanner
    from selfupdate.frontend import Frontend
    from selfupdate.journal import Journal, Record
    from selfupdate.listener import Address, Listener
    from selfupdate.program import Program
    from selfupdate.releases import Store
    from selfupdate.server import Server
    from selfupdate.settings import Settings
    from selfupdate.stop import Stop
    from selfupdate.successor import Successor
    from selfupdate.trust import Trust

_log = logging.getLogger(__name__)


_SETTLED = {Phase.RUNNING, Phase.STOPPING, Phase.RETIRED}
_WAY_BACK = {Event.FAILED, Event.REVERTED, Event.STOP}


class Upgrader:
    """Upgrades this service, when asked."""

    def __init__(  # noqa: PLR0913 - each is a noun of its own, given once by the composition root
        self,
        *,
        program: Program,
        generation: int,
        settings: Settings,
        lifecycle: Lifecycle,
        journal: Journal,
        scanner: Scanner,
        store: Store,
        trust: Trust,
        server: Server,
        frontend: Frontend,
        lock_fd: int,
        stop: Stop,
        on_retired: Callable[[], None],
        on_settled: Callable[[], None],
        on_stop: Callable[[], None],
    ) -> None:
        """Call `on_retired` when a successor has taken over for good, `on_stop` when it was told to stop.

        `on_settled` is called when the original process did not come back, and this one serves on.
        """
        self._program = program
        self._lock_fd = lock_fd
        self._generation = generation
        self._settings = settings
        self._lifecycle = lifecycle
        self._journal = journal
        self._scanner = scanner
        self._store = store
        self._trust = trust
        self._server = server
        self._on_retired = on_retired
        self._on_settled = on_settled
        self._on_stop = on_stop
        self._frontend = frontend
        self._successor: Successor | None = None
        self.comeback: system.Comeback | None = None
        """How this process becomes the release that it has blessed, where it is to; set when it has retired."""
        self._comes_back = False
        self._is_open = threading.Event()
        self._claim_lock = threading.Lock()
        self._stop = stop
        self._idle = threading.Event()
        self._idle.set()

    def open(self) -> None:
        """Take requests: this process has become the service, and given back what it needed until then."""
        self._is_open.set()

    @property
    def successor_pid(self) -> int | None:
        """The process to which this one handed over last, or was about to."""
        return self._successor.pid if self._successor else None

    def upgrade(self, name: str | None = None) -> Record | None:
        """Begin an upgrade, to the candidate `name` or to the greatest; return its record, or None if nothing is newer.

        Raises UpgradeUnderWayError, NotNowError, NoSuchCandidateError, NotEligibleError or ScanError.
        """
        return self._begin(self._claim("upgrade", name=name), lambda: self._scanner.choose(name))

    def roll_back(self) -> Record:
        """Begin to go back to the release that ran before the last commit; return the record.

        Raises UpgradeUnderWayError, NotNowError or NothingToRollBackToError.
        """
        record = self._begin(self._claim("rollback"), self._previous)
        assert record is not None
        return record

    def _previous(self) -> Candidate:
        last = self._journal.last_commit()
        if last is None or last.from_sha256 is None or last.sha256 != self._program.sha256:
            raise NothingToRollBackToError(
                "There is no version to go back to: the one that runs is the first that this state directory knows."
            )
        try:
            commit = self._journal.commit_of(last.from_sha256)
            release = self._trust.recall(self._store.find(last.from_sha256), commit)
        except CandidateError as error:
            raise NothingToRollBackToError(f"There is no version to go back to: {error}.") from None
        return Candidate(release.name, versions.parse(last.from_version), release)

    def _begin(self, record: Record, choose: Callable[[], Candidate | None]) -> Record | None:
        with log.upgrade(record.id):
            return self._choose(record, choose)

    def _choose(self, record: Record, choose: Callable[[], Candidate | None]) -> Record | None:
        try:
            candidate = choose()
            if candidate is None:
                self._forget(record, Event.UP_TO_DATE)
                return None
            self._raise_if_stopping()
        except NotEligibleError as error:
            self._fail(record.id, error)
            error.upgrade_id = record.id
            raise
        except ChoiceError as error:  # nothing was there to be upgraded to
            self._forget(record, Event.FAILED, Event.REVERTED, outcome="aborted", reason=str(error))
            raise
        except BaseException as error:
            self._fail(record.id, error)
            raise
        log.start_thread("upgrade", self._drive, record.id, candidate)
        return record

    def _forget(self, record: Record, *events: Event, **fields: Any) -> None:
        """Be as before by `events`; those who follow the journal hear of `fields`, and nothing is written down."""
        with self._claim_lock:  # whoever claims next finds it either under way or idle
            for event in events:
                self._lifecycle.step(event)
            if fields:
                ended = self._journal.put(record._replace(**fields))
                _log.warning("upgrade", extra={"upgrade": ended.id, "outcome": ended.outcome, "reason": ended.reason})
            self._journal.discard(record.id)
            self._idle.set()

    def stop(self) -> None:
        """Take no more requests; end an upgrade that is under way, and its successor."""
        with self._claim_lock:
            self._stop.ask()
        self._idle.wait()

    @property
    def command(self) -> list[str]:
        """What started the successor, and executes it in place of this process."""
        assert isinstance(self._successor, Started)
        return self._successor.command

    def hand_back(self, channel: system.Channel, original: int) -> None:
        """Begin to hand over to the process `original`, which this one came from, and which becomes this version."""
        self._idle.clear()
        log.start_thread("hand-back", self._drive_back, channel, original)

    def _claim(self, kind: str, **fields: Any) -> Record:
        self._wait_for_handover()
        with self._claim_lock:
            if self._stop.is_asked:
                raise NotNowError("The service is stopping: ask again when it has started.")
            current = self._journal.current()
            try:
                phase = self._lifecycle.step(Event.UPGRADE)
            except IllegalTransitionError as error:
                current = current or self._journal.current()
                if current is not None:
                    raise UpgradeUnderWayError(current.id) from None
                if error.phase == Phase.RETIRED and not self._comes_back:
                    raise HandedOverError("Another process serves now: ask again, over a new connection.") from None
                raise NotNowError(f"This process is {error.phase}: ask again, over a new connection.") from None
            self._idle.clear()
            self._successor = None
            origin = self._program.sha256
            return self._journal.begin(self._program.version, phase, kind=kind, from_sha256=origin, **fields)

    def _wait_for_handover(self) -> None:
        """Wait for what follows a commit at once: the incumbent's word, and the return to the original process."""
        if self._lifecycle.phase is not Phase.CHOOSING and self._journal.current() is None:
            self._lifecycle.wait_for(_SETTLED, self._settings.limits.replace_time)
        if self._lifecycle.phase is Phase.RUNNING:
            self._is_open.wait(self._settings.limits.replace_time)

    def _drive(self, upgrade_id: str, candidate: Candidate) -> None:
        """Go through the upgrade, and decide what becomes of a failure."""
        try:
            self._go_through(upgrade_id, candidate)
        except BaseException as error:  # noqa: BLE001 - whatever it was, the service must serve on
            self._fail(upgrade_id, error)
            return
        self._retire()

    def _retire(self) -> None:
        """Let requests under way end; the successor serves."""
        self._idle.set()
        self._server.wait_until_empty()
        self._on_retired()

    def _drive_back(self, channel: system.Channel, pid: int) -> None:
        """Hand over to the original process, or serve on as the process that this one is."""
        self._successor = original = Original(self._program.version, self._settings, self._frontend.binds)
        try:
            hello = self._hello(self._generation, self._program.sha256, self._frontend.listeners)
            original.call(channel, pid, hello, len(self._frontend.listeners), self._stop.fileno())
            original.wait_for_standby()
            self._pass_on(original, self._lifecycle.step, probation=0)  # this release has passed its trial
            self._lifecycle.step(Event.BLESSED)
            original.bless()
        except StopRequestedError as error:
            self._stop_both(None, error)
        except BaseException as error:  # noqa: BLE001 - as in _drive
            self._serve_on(original, error)
        else:
            self._retire()

    def _serve_on(self, original: Original, error: BaseException) -> None:
        """Serve under this process's id, and say why."""
        if isinstance(error, SelfUpdateError):
            reason = f"the original process {error}"
        else:
            _log.exception("a hand-back met a defect", exc_info=error)
            reason = f"a defect in the program: {error!r}"
        self._lifecycle.step(Event.FAILED)
        if self._lifecycle.phase is Phase.ROLLING_BACK:
            self._server.resume()
        _log.error("the service has another process id than before", extra={"reason": reason})
        original.dismiss(self._settings.limits.kill_time)
        last = self._journal.last_commit()
        if last is not None:
            self._journal.conclude(last.id, pid_not_kept=reason)
        with self._claim_lock:
            self._lifecycle.step(Event.REVERTED)
            self._idle.set()
        self._on_settled()

    def _go_through(self, upgrade_id: str, candidate: Candidate) -> None:
        assert candidate.release is not None
        assert candidate.version is not None
        release, version = candidate.release, str(candidate.version)
        fields = {"to_version": version, "name": release.name, "sha256": release.sha256}
        keys = tuple(signer.key for signer in release.signers)
        self._step(upgrade_id, Event.CHOSEN, **fields, signer=signature.names(release.signers), signer_keys=keys)
        self._store.confirm(release.copy)
        self._trust.confirm(release)

        self._step(upgrade_id, Event.STAGED)
        successor = self._start(candidate)
        follower = successor.show
        self._journal.follow(follower)
        try:
            self._pass_on(successor, functools.partial(self._step, upgrade_id), self._settings.probation)
            self._comes_back = self._settings.keep_pid and successor.can_hand_back
            path = str(self._program.path) if self._program.path else None
            self._step(upgrade_id, Event.BLESSED, outcome="committed", ended_at=now(), program=path)
            commit = self._journal.get(upgrade_id)
            assert commit is not None
            settle(self._journal, self._store, commit)
        finally:
            self._journal.unfollow(follower)
        if self._comes_back:
            hello = self._hello(self._generation + 1, release.sha256, self._frontend.listeners)
            self.comeback = successor.bless_to_hand_back(hello, len(self._frontend.listeners))
        else:
            successor.bless()

    def _pass_on(self, successor: Successor, step: Callable[[Event], Any], probation: float) -> None:
        """Test one that stands by, have it take over, and watch it for `probation` seconds."""
        step(Event.ANNOUNCED)
        successor.probe()

        # Nobody accepts from the pause to the successor's word: what can be done before is done before.
        with successor.reach() as connection:
            step(Event.PROBED)
            self._hand_over(successor, connection)

        step(Event.REPLACED)
        successor.watch(probation)
        self._raise_if_stopping()

    def _start(self, candidate: Candidate) -> Started:
        """Start the successor and wait until it stands by."""
        assert candidate.release is not None
        try:
            upgrade_bind = listeners.vacant(self._settings.upgrade_bind)
        except OSError as error:
            raise UpgradeError(
                f"the temporary address {self._settings.upgrade_bind} cannot be used: {error.strerror}",
                "handover-bind",
                "stop what listens there, or give another one with -upgrade-bind",
            ) from error
        successor = self._spawn(candidate, upgrade_bind, self._frontend.listeners)
        if not successor.shares_listener:
            self._check_can_bind(candidate.release.name)
            _log.info("the successor speaks the plain protocol, and is started again without the listeners")
            successor.terminate()
            successor.end(self._settings.limits.kill_time)
            successor = self._spawn(candidate, upgrade_bind, ())
        return successor

    def _check_can_bind(self, name: str) -> None:
        """Check that the plain successor `name` can bind each address. Raises UpgradeError.

        A service manager keeps a copy of what it passed on: nobody could bind that address, nor this process
        again, once it has let go of the socket.
        """
        passed = [listener.address for listener in self._frontend.listeners if not listener.is_own]
        if passed:
            raise UpgradeError(
                f"{name} speaks the plain protocol, and cannot bind what the service manager holds: "
                f"{listeners.join(passed)}",
                "handover-bind",
                "let it serve on the sockets that are passed on, and say X_SELF_UPDATE=1; or bind without the manager",
            )

    def _spawn(self, candidate: Candidate, upgrade_bind: Address, shared: Sequence[Listener]) -> Started:
        assert candidate.release is not None
        binds = self._frontend.binds
        successor = Started(candidate.release, str(candidate.version), self._settings, binds, upgrade_bind)
        self._successor = successor
        successor.on_log = lambda: self._journal.note(log=successor.log)
        hello = self._hello(self._generation + 1, candidate.release.sha256, shared)
        successor.start(shared, self._lock_fd, hello, os.environ, self._stop.fileno())
        _log.info("started a successor", extra={"successor": successor.pid, "release": str(candidate.release.path)})
        successor.wait_for_standby()
        return successor

    def _hello(self, generation: int, sha256: str | None, shared: Sequence[Listener]) -> dict[str, object]:
        """Return what a successor must know, which gets the listeners `shared`."""
        return {
            "generation": generation,
            "upgrade": log.upgrade_id(),
            "program": str(self._program.path) if self._program.path else None,
            "sha256": sha256,
            "installed": self._program.installed,
            "trust": self._settings.trust,
            "listeners": [[str(listener.address), listener.is_own] for listener in shared],
        }

    def _hand_over(self, successor: Successor, connection: socket.socket) -> None:
        """Stop accepting, and let the successor accept, which is asked over `connection`."""
        if successor.shares_listener:
            self._server.pause(self._settings.drain)
        else:
            for listener in self._frontend.listeners:
                listener.remove()
            self._server.release(self._settings.drain)
        successor.replace(connection)

    def _step(self, upgrade_id: str, event: Event, **fields: Any) -> None:
        """Ask the machine, then write it down, and only then go on.

        Raises UpgradeError where it can't be written on the way forward; the way back is gone all the same.
        """
        phase = self._lifecycle.step(event)
        if self._successor is not None:
            fields["log"] = self._successor.log
        write = self._journal.conclude if event in _WAY_BACK else self._journal.change
        record = write(upgrade_id, phase, **fields)
        fields = {"phase": phase, "to": record.to_version, "outcome": record.outcome}
        if record.reason is None:
            _log.info("upgrade", extra=fields)
        else:
            _log.warning("upgrade", extra={**fields, "candidate": record.name, "reason": record.reason})

    def _fail(self, upgrade_id: str, error: BaseException) -> None:
        """Undo an upgrade, or stop with it."""
        if isinstance(error, StopRequestedError):
            self._stop_both(upgrade_id, error)
        else:
            self._undo(upgrade_id, error)

    def _undo(self, upgrade_id: str, error: BaseException) -> None:
        record = self._journal.get(upgrade_id)
        name = record.name if record else None
        if not isinstance(error, SelfUpdateError):
            _log.exception("an upgrade met a defect", exc_info=error)
            reason = f"a defect in the program: {error!r}"
        elif isinstance(error, SuccessorError):
            reason = f"{name} {error}"
        else:
            reason = str(error)
        known = error if isinstance(error, SelfUpdateError) else SelfUpdateError(reason)
        self._step(upgrade_id, Event.FAILED, reason=reason, code=known.code, remedy=known.remedy)
        is_rolled_back = self._lifecycle.phase is Phase.ROLLING_BACK
        if is_rolled_back:
            self._serve_again()
        self._end_successor(self._settings.limits.kill_time)
        with self._claim_lock:  # whoever claims next must find it idle
            self._step(
                upgrade_id,
                Event.REVERTED,
                outcome="rolled-back" if is_rolled_back else "aborted",
                ended_at=now(),
                is_fault_of_release=isinstance(error, SuccessorError),
            )
            self._idle.set()

    def _serve_again(self) -> None:
        """Accept again: at once on listeners that were kept, or on each address as soon as it is free."""
        if self._server.has_listeners:
            self._server.resume()
        else:
            self._bind_again()

    def _bind_again(self) -> None:
        if self._successor:
            self._successor.end(0)
        bound: dict[Address, Listener] = {}
        has_said = False
        while True:
            for address in self._frontend.binds:
                if address in bound:
                    continue
                try:
                    (bound[address],) = listeners.listen([address])
                except StartError as error:
                    if not has_said:
                        _log.error("cannot serve again yet", extra={"reason": str(error)})
                    has_said = True
                else:
                    self._server.accept(*(listener.sock for listener in bound.values()))
                    _log.info("serving again", extra={"bind": str(address)})
            if len(bound) == len(self._frontend.binds):
                break
            if ready([self._stop.fileno()], time.monotonic() + self._settings.limits.poll_interval):
                return
        self._frontend.open([bound[address] for address in self._frontend.binds])

    def _stop_both(self, upgrade_id: str | None, error: StopRequestedError) -> None:
        """End the successor first, which answers what it has accepted; then this process takes what still waits."""
        has_paused = self._lifecycle.phase in {Phase.REPLACING, Phase.PROBATION}
        if upgrade_id is None:
            self._lifecycle.step(Event.STOP)
        else:
            self._step(upgrade_id, Event.STOP, outcome="interrupted", reason=str(error), ended_at=now())
        self._end_successor(self._settings.drain if has_paused else self._settings.limits.kill_time)
        if has_paused:
            self._server.resume()
        self._idle.set()
        self._on_stop()

    def _end_successor(self, grace: float) -> None:
        if self._successor is not None:
            self._successor.terminate()
            self._successor.end(grace)

    def _raise_if_stopping(self) -> None:
        if self._stop.is_asked:
            raise StopRequestedError("a stop signal arrived")
