"""What an incumbent knows of its successor, from its standing by to the blessing or the end.

Towards its successor the incumbent plays the service manager: it takes readiness
(sd_notify(3)), and keeps a channel open, on which the successor learns what is
nobody else's business and, by the channel's end, that the incumbent has gone.

A successor that says `X_SELF_UPDATE=1` serves on the socket that it inherited:
the full protocol. Any other is a plain one, which binds the address by itself.

Each wait is for all that can happen at once: what it waits for, the successor's
words, its death, and a stop. Only what can't announce itself is looked at again
and again: a plain successor's temporary server, and health.
"""

from __future__ import annotations

import contextlib
import http
import json
import os
import time
from typing import TYPE_CHECKING, Any

from selfupdate import log, process, system, versions
from selfupdate.errors import StopRequestedError, SuccessorError, UpgradeError, VersionError
from selfupdate.foreign import shown
from selfupdate.listener import Address, connect
from selfupdate.question import NoAnswerError, answer_in, ask_for

if TYPE_CHECKING:
    import socket
    from collections.abc import Iterator, Mapping, Sequence

    from selfupdate.journal import Record
    from selfupdate.settings import Settings

_CHUNK = 65536
_LONGEST_STATUS = 200
_REPLACE = "/replace"
_TAKING_OVER = "when it was to take over"
_DYING_TIME = 0.2
"""Seconds from the end of a process's connections to its own, which says more; both are the kernel's work."""


class _NoAnswerError(SuccessorError):
    """It lives, and does not answer a question."""


class Successor:
    """A running successor, from its standing by to the blessing or the end."""

    announces_itself = False
    """Whether it is known that it does, and need not be looked for."""

    def __init__(self, version: str, settings: Settings, binds: Sequence[Address], upgrade_bind: Address) -> None:
        """Prepare for one that is `version`, and stands by at `upgrade_bind` to serve on `binds`."""
        self.shares_listener = False
        """Whether it serves on the inherited sockets."""
        self.can_hand_back = False
        """Whether this process can become it: it would hand over to that, and leave."""
        self._version = version
        self._settings = settings
        self._limits = settings.limits
        self._binds = tuple(binds)
        self._upgrade_bind = upgrade_bind
        self._secret = os.urandom(32).hex()
        self._peer: system.Child | system.Parent | None = None
        self._stop_fd: int
        self._standby_time = settings.standby
        self._is_ready = False
        self._may_share = True
        self._announces_until: float | None = None
        self._shown: tuple[str, str | None] | None = None

    @property
    def log(self) -> str | None:
        """The end of what it wrote; None where it was not started, or that is not known."""
        return self._peer.log if self._peer else None

    @property
    def pid(self) -> int:
        """Its process id."""
        assert self._peer is not None
        return self._peer.pid

    def wait_for_standby(self) -> None:
        """Wait until it stands by, then say by `shares_listener` of which kind it is.

        Raises SuccessorError where it ends or is not there in time.
        """
        doing = "before it stood by"
        deadline = time.monotonic() + self._standby_time
        while not self._is_ready:
            if time.monotonic() >= deadline:
                raise SuccessorError(f"did not stand by within {self._standby_time:g} s", "handover-timeout")
            if self.announces_itself:
                self.wait(deadline, doing)
                continue
            self.wait(min(deadline, time.monotonic() + self._limits.poll_interval), doing)
            if self._is_plain(deadline, doing):
                break
        self._check_owner(self._upgrade_bind, "-upgrade-bind", doing)

    def _check_owner(self, address: Address, flag: str, doing: str) -> None:
        """Check that what listens there is this account's.

        Raises SuccessorError where nothing does, or it has ended; UpgradeError where a stranger's does.
        """
        assert self._peer is not None
        owns = self._peer.owns(address)
        if owns:
            return
        self.wait(time.monotonic() + _DYING_TIME, doing)
        if owns is None:
            raise SuccessorError(f"does not listen on {address}", "handover-bind")
        raise UpgradeError(
            f"another account's process listens on {address}",
            "handover-bind",
            f"end it, or give another address with {flag}",
        )

    def probe(self) -> None:
        """Check on its temporary server that it is the right version, the right process, and healthy.

        Raises SuccessorError. A plain successor has nothing to be asked.
        """
        if not self.shares_listener:
            return
        deadline = time.monotonic() + self._limits.replace_time
        status, health = self._get(self._upgrade_bind, "/healthz", deadline, "when it was probed")
        if status != http.HTTPStatus.OK:
            raise SuccessorError(f"is not healthy: it answered {status} when it was probed", "probe-unhealthy")
        if not self._owns(health.get("pid")):
            raise SuccessorError(
                f"is process {self.pid}, and what answers on {self._upgrade_bind} is process {health.get('pid')!r}",
                "probe-other-process",
            )
        if not self._is_own_version(health.get("version")):
            raise SuccessorError(
                f"says {health.get('version')!r} when it runs, and said {self._version} to -version",
                "probe-other-version",
            )

    def _owns(self, pid: object) -> bool:
        assert self._peer is not None
        return self._peer.has(pid)

    def _is_own_version(self, said: object) -> bool:
        try:
            return versions.parse(str(said)) == versions.parse(self._version)
        except VersionError:
            return False

    def reach(self) -> socket.socket:
        """Return a connection on which `replace` can ask. Raises SuccessorError, or UpgradeError for a stranger's.

        What is told the secret is what listened there when it stood by, and again behind the connection.
        """
        with self._expecting(_REPLACE, _TAKING_OVER):
            connection = connect(self._upgrade_bind, self._limits.replace_time)
        try:
            # Again, since it is told the secret.
            self._check_owner(self._upgrade_bind, "-upgrade-bind", _TAKING_OVER)
        except BaseException:
            connection.close()
            raise
        return connection

    def replace(self, connection: socket.socket) -> None:
        """Ask it to accept on the service's address, to which it is entitled from then on. Raises SuccessorError."""
        assert self._peer is not None
        self._peer.release()
        deadline = time.monotonic() + self._limits.replace_time
        proof = {"Authorization": f"Bearer {self._secret}"}
        with self._expecting(_REPLACE, _TAKING_OVER):
            status, answer = self._ask(connection, _REPLACE, deadline, _TAKING_OVER, proof)
        if status != http.HTTPStatus.OK:
            detail = f": {answer['detail']}" if isinstance(answer.get("detail"), str) else ""
            raise SuccessorError(f"did not take over: it answered {status}{detail}", "handover-refused")
        if not self.shares_listener:
            deadline = time.monotonic() + self._limits.rebind_time
            for bind in self._binds:
                self._wait_until_bound(bind, deadline)

    def watch(self, seconds: float) -> None:
        """Watch its process and its health on the service's first address. Raises SuccessorError."""
        doing, bind = "on trial", self._binds[0]
        end = time.monotonic() + seconds
        while True:
            deadline = time.monotonic() + self._limits.health_time
            status, health = self._get(bind, "/healthz", deadline, doing)
            if status >= http.HTTPStatus.INTERNAL_SERVER_ERROR:
                raise SuccessorError(f"is not healthy: it answered {status} on trial", "trial-unhealthy")
            if "pid" in health and not self._owns(health["pid"]):
                raise SuccessorError(f"does not serve on {bind}: process {health['pid']!r} does", "trial-other-process")
            if time.monotonic() >= end:
                return
            self.wait(min(end, time.monotonic() + self._limits.health_interval), doing)

    def show(self, record: Record) -> None:
        """Tell it how the upgrade goes; what is new within a step may be lost."""
        assert self._peer is not None
        step = (record.phase, record.outcome)
        send = self._peer.hint if step == self._shown else self._peer.tell
        self._shown = step
        send({"record": record.as_json()})

    def bless(self) -> None:
        """Tell it that it is there to stay, and let go of it."""
        assert self._peer is not None
        self._peer.tell({"blessed": True})
        self._peer.leave()

    def terminate(self) -> None:
        """Tell it to leave."""
        if self._peer:
            self._peer.terminate()

    def end(self, grace: float) -> None:
        """Let it leave within `grace` seconds, or see to it that it does."""
        raise NotImplementedError

    def wait(self, deadline: float, doing: str, fd: int | None = None) -> bool:
        """Wait until `fd` is readable or `deadline` has passed, and take the news meanwhile; tell whether `fd` is.

        Raises SuccessorError when the successor ends, StopRequestedError when a stop is asked for.
        """
        assert self._peer is not None
        fds = {self._peer.exit_fd, self._peer.fileno(), self._stop_fd} | ({fd} if fd is not None else set())
        while ready := process.ready(fds, deadline):
            is_late = time.monotonic() >= deadline  # what has happened is news all the same
            if self._stop_fd in ready:
                raise StopRequestedError("a stop signal arrived")
            self._take_notifications()
            if fd in ready and not is_late:
                return True
            if self._peer.exit_fd in ready:
                raise SuccessorError(f"{process.ending(self._peer.reap())} {doing}", "handover-died")
            if is_late or (fd is None and self._is_ready):
                return False
        return False

    def _take_notifications(self) -> None:
        assert self._peer is not None
        while (fields := self._peer.receive()) is not None:
            if fields.get("X_SELF_UPDATE_STOP") == "1":
                raise StopRequestedError("a stop signal arrived at the successor")
            if "ERRNO" in fields:  # sd_notify(3)
                why = fields.get("STATUS") or _error_text(fields["ERRNO"])
                raise SuccessorError(f"failed: {shown(why, _LONGEST_STATUS)}", "handover-failed")
            if fields.get("X_SELF_UPDATE") == "1":
                self.shares_listener = True
            if fields.get("X_SELF_UPDATE_HAND_BACK") == "1":
                self.can_hand_back = True
            if fields.get("READY") == "1":
                self._is_ready = True

    def _is_plain(self, deadline: float, doing: str) -> bool:
        """Tell whether it stands by without having announced itself."""
        if self._is_ready:
            return False
        if self._announces_until is not None:
            return time.monotonic() >= self._announces_until
        try:
            connect(self._upgrade_bind, self._limits.poll_interval).close()
        except OSError:
            return False
        if self._may_share and self._tells_its_health(deadline, doing):
            # One that does may speak the full protocol, and its announcement be under way.
            self._announces_until = time.monotonic() + self._limits.announce_time
            return False
        return True

    def _tells_its_health(self, deadline: float, doing: str) -> bool:
        try:
            status, health = self._get(self._upgrade_bind, "/healthz", deadline, doing)
        except _NoAnswerError:  # it serves, and need not know that path
            return False
        return self._owns(health.get("pid")) or status >= http.HTTPStatus.INTERNAL_SERVER_ERROR

    def _wait_until_bound(self, bind: Address, deadline: float) -> None:
        while True:
            try:
                connect(bind, self._limits.replace_time).close()
            except OSError as error:
                if time.monotonic() >= deadline:
                    raise SuccessorError(
                        f"did not take over: it said so, and does not listen on {bind}: {error.strerror}",
                        "handover-bind",
                    ) from None
            else:
                self._check_owner(bind, "-bind", "after it was to take over")
                return
            self.wait(min(deadline, time.monotonic() + self._limits.poll_interval), "after it was to take over")

    def _get(self, address: Address, path: str, deadline: float, doing: str) -> tuple[int, dict[str, Any]]:
        """Return what GET `path` answers over a connection of its own, as `_ask` does. Raises SuccessorError."""
        with (
            self._expecting(path, doing),
            connect(address, max(0.001, deadline - time.monotonic())) as connection,
        ):
            return self._ask(connection, path, deadline, doing, {})

    def _ask(
        self, connection: socket.socket, path: str, deadline: float, doing: str, headers: Mapping[str, str]
    ) -> tuple[int, dict[str, Any]]:
        """Return the status and the JSON object (or none) that GET `path` answers. Raises what `_expecting` takes."""
        asked = {"X-Request-Id": log.request_id()} if log.request_id() else {}
        connection.sendall(ask_for(path, {**headers, **asked}))
        connection.setblocking(False)
        status, body = self._receive(connection, deadline, doing)
        try:
            value = json.loads(body)
        except (ValueError, RecursionError):
            value = None
        return status, value if isinstance(value, dict) else {}

    def _receive(self, connection: socket.socket, deadline: float, doing: str) -> tuple[int, bytes]:
        """Return what it answers, within one deadline for the whole of it, given up for whatever else happens."""
        received = bytearray()
        has_ended = False
        while (answer := answer_in(received, has_ended=has_ended)) is None:
            if not self.wait(deadline, doing, connection.fileno()):
                raise TimeoutError
            chunk = connection.recv(_CHUNK)
            has_ended = not chunk
            received += chunk
        return answer

    @contextlib.contextmanager
    def _expecting(self, path: str, doing: str) -> Iterator[None]:
        """Say what it means that it can't be asked for `path`, or gives no answer. Raises SuccessorError."""
        try:
            yield
        except TimeoutError:
            raise _NoAnswerError(f"did not answer GET {path} {doing} in time", "handover-timeout") from None
        except (OSError, NoAnswerError) as error:
            self.wait(time.monotonic() + _DYING_TIME, doing)
            what = error.strerror if isinstance(error, OSError) and error.strerror else error
            raise _NoAnswerError(f"did not answer GET {path} {doing}: {what}", "handover-no-answer") from None


def _error_text(number: str) -> str:
    return os.strerror(int(number)) if number.isascii() and number.isdigit() else "it did not say why"
