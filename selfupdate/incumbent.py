"""What a successor knows of its incumbent: stand by, and take over when asked.

The incumbent is whoever started this process with `-upgrade true`. One of this
program passes the listening sockets and a channel; one that speaks the plain
protocol alone passes neither, and its end is seen by its process.
"""

from __future__ import annotations

import contextlib
import hmac
import http
import json
import logging
import os
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from selfupdate import listener as listeners
from selfupdate import process, system
from selfupdate.access import goes_by
from selfupdate.errors import IllegalTransitionError, StartError, StateError
from selfupdate.foreign import shown
from selfupdate.journal import Record, now
from selfupdate.lifecycle import Event, Lifecycle, Phase
from selfupdate.listener import HANDOVER_FD
from selfupdate.messages import Request, Response, json_response, problem
from selfupdate.server import Server

if TYPE_CHECKING:
    import socket
    from collections.abc import Callable, Mapping, MutableMapping, Sequence

    from selfupdate.journal import Journal
    from selfupdate.listener import Address, Listener
    from selfupdate.settings import Settings

_log = logging.getLogger(__name__)

_STDOUT = 1
_HELLO_TIME = 5.0
_THREADS = 2
"""Of the temporary server: the incumbent asks one thing at a time."""
_MESSAGE_SIZE = 1 << 18
_NO_HELLO = (OSError, ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError)
"""What reading something else than an incumbent's first words can raise."""
_LAST_WORDS = {"blessed", "dismissed"}
_FROM_BROWSERS = ("origin", "referer", "cookie", "sec-fetch-site", "sec-fetch-mode", "sec-fetch-dest")


class Incumbent:
    """The process that started this one."""

    def __init__(self, environ: MutableMapping[str, str]) -> None:
        """Take what was passed on out of `environ`. Raises StartError where it is not what it should be."""
        self.generation = 1
        self.secret = ""
        self.lock_fd: int | None = None
        self.program: Path | None = None
        self.sha256: str | None = None
        self.installed: str | None = None
        self.trust: dict[str, str] | None = None
        """The text of each flag that concerns trust; None where nothing was said of it."""
        self.upgrade = ""
        """The id of the upgrade that this process is a part of; empty where it was not told."""
        self.pid = os.getppid()
        self.comes_back = False
        """Whether it is what this very process started, and hands back to it now."""
        self.may_serve_again = False
        """Whether it still holds the listeners, to accept on them should this process fail."""
        self._notify = {"NOTIFY_SOCKET": environ.pop("NOTIFY_SOCKET", "")}
        self._channel: system.Channel | None = None
        self.shared: list[socket.socket] = []
        """The listeners that it shared with this process, where none can be inherited."""
        self._streams: list[int] = []
        self._listeners: list[tuple[Address, bool]] = []
        fd = environ.pop(HANDOVER_FD, None)
        if fd is None:
            return
        try:
            self._channel = system.join(fd, self._notify)
            self._channel.settimeout(_HELLO_TIME)
            hello = json.loads(self._channel.recv(_MESSAGE_SIZE))
            self.generation = int(hello["generation"])
            self.secret = str(hello["secret"])
            self.lock_fd = system.adopt(int(hello["lock"]))
            self.program = Path(hello["program"]) if hello["program"] else None
            self.sha256 = str(hello["sha256"])
            self.installed = str(hello["installed"])
            self.shared = system.shared(hello)
            self.upgrade = str(hello.get("upgrade", ""))
            self.trust = {str(name): str(text) for name, text in hello["trust"].items()}
            self._streams = [system.adopt(int(stream)) for stream in hello["streams"]]
            self.comes_back = bool(hello.get("comes_back"))
            self.pid = int(hello["pid"]) if self.comes_back else self.pid
            told = hello.get("listeners", [])
            self._listeners = [(listeners.parse_address(text), bool(is_own)) for text, is_own in told]
        except _NO_HELLO as error:
            raise StartError(f"{HANDOVER_FD}={shown(fd, 20)} is not an incumbent's channel: {error!r}") from error
        self._channel.settimeout(None)
        self.may_serve_again = True

    @property
    def is_plain(self) -> bool:
        """Whether it speaks the plain protocol alone."""
        return self._channel is None

    def recognise(self, passed: Sequence[Listener]) -> tuple[Listener, ...]:
        """Return the listeners that were `passed` on with what it told of each: its address, and who bound it."""
        if self.shared:
            passed = [
                listeners.Listener(sock, address, is_own=is_own)
                for sock, (address, is_own) in zip(self.shared, self._listeners, strict=True)
            ]
        if len(passed) != len(self._listeners):
            return tuple(passed)
        told = zip(passed, self._listeners, strict=True)
        return tuple(listener._replace(address=address, is_own=is_own) for listener, (address, is_own) in told)

    def spend_secret(self) -> None:
        """Have the secret open nothing any more."""
        if self.secret:
            self.secret = os.urandom(32).hex()

    def take_streams(self) -> None:
        """Write to the service's own output and error from here on, and not to pipes that the incumbent reads."""
        for own, stream in enumerate(self._streams, _STDOUT):
            os.dup2(stream, own)
            os.close(stream)
        self._streams = []

    def take_channel(self) -> system.Channel | None:
        """Return the channel, in which this process is the incumbent from here on."""
        channel, self._channel = self._channel, None
        return channel

    def close_channel(self) -> None:
        """Have nothing more to say to it, and let it see that."""
        if self._channel:
            self._channel.close()
            self._channel = None

    def announce(self, **fields: str) -> None:
        """Tell it how this process stands (sd_notify(3))."""
        system.send(self._notify, **fields)

    def follow(self, on_message: Callable[[Mapping[str, Any]], None], on_gone: Callable[[], None]) -> None:
        """Call `on_message` with all that it says; `on_gone` when its process has ended before its last word."""
        target = self._follow_process if self._channel is None else self._follow_channel
        threading.Thread(target=target, args=(on_message, on_gone), name="incumbent", daemon=True).start()

    def _follow_channel(self, on_message: Callable[[Mapping[str, Any]], None], on_gone: Callable[[], None]) -> None:
        channel = self._channel
        assert channel is not None
        with contextlib.suppress(ConnectionError):  # it was killed with words of ours unread
            while received := channel.recv(_MESSAGE_SIZE):
                message = json.loads(received)
                is_last = bool(message.keys() & _LAST_WORDS)
                self.may_serve_again = self.may_serve_again and not is_last
                on_message(message)
                if is_last:  # what becomes of the channel now is the service's to say
                    return
        self.may_serve_again = False
        on_gone()

    def _follow_process(self, _on_message: Callable[[Mapping[str, Any]], None], on_gone: Callable[[], None]) -> None:
        process.wait_for_end(self.pid)
        on_gone()


class Standby:
    """The temporary server, the moment of taking over, and the trial after it."""

    def __init__(  # noqa: PLR0913 - each is a noun of its own, given once by the composition root
        self,
        incumbent: Incumbent,
        *,
        settings: Settings,
        lifecycle: Lifecycle,
        journal: Journal,
        places: Sequence[Address | Listener],
        health: Callable[[], Response],
        accept: Callable[[Sequence[Listener]], None],
        on_settled: Callable[[], None],
    ) -> None:
        """Take over by having the service `accept` on the listeners of `places`, and on its addresses, bound then.

        `on_settled` is called when the process is RUNNING or RETIRED.
        """
        self._incumbent = incumbent
        self._settings = settings
        self._lifecycle = lifecycle
        self._journal = journal
        self._places = places
        self._health = health
        self._accept = accept
        self._on_settled = on_settled
        self.settled: Phase | None = None
        """What this process has become: RUNNING, STARTING where it is to hand back, or RETIRED."""
        self._lock = threading.Lock()
        self._temporary = Server("standby", self._respond, settings.limits._replace(threads=_THREADS))

    def begin(self) -> None:
        """Listen on the temporary address, and say so. Raises StartError."""
        self._temporary.accept(listeners.bind(self._settings.upgrade_bind))
        self._incumbent.follow(self._take_message, self._incumbent_gone)
        has_all = not any(isinstance(place, listeners.Address) for place in self._places)
        shares = {"X_SELF_UPDATE": "1"} if has_all and not self._incumbent.is_plain else {}
        hands_back = (
            {"X_SELF_UPDATE_HAND_BACK": "1"} if shares and system.CAN_BECOME and not self._incumbent.comes_back else {}
        )
        self._incumbent.announce(READY="1", STATUS="standing by", **shares, **hands_back)
        _log.info("standing by", extra={"upgrade_bind": str(self._settings.upgrade_bind)})

    def end(self) -> None:
        """Give the temporary address back."""
        self._temporary.close(self._settings.limits.linger_time)
        listeners.remove(self._settings.upgrade_bind)

    def _respond(self, request: Request) -> Response:  # noqa: PLR0911 - each refusal has its own words
        if not goes_by(request.headers.get("host"), {self._settings.upgrade_bind.host.lower()}):
            return problem(421, "This successor does not go by that name; call it by its address.")
        if request.path == "/healthz":
            return self._health()
        if request.path != "/replace":
            return problem(404, "This is a successor that stands by: it has GET /healthz and GET /replace.")
        if request.method != "GET":
            return problem(405, "Ask with GET.", Allow="GET")
        # The contract makes this a GET, which a web page can send: a browser tells itself by its headers.
        if any(name in request.headers for name in _FROM_BROWSERS):
            return problem(403, "Only the incumbent may ask for this, and no browser.")
        proof = request.headers.get("authorization", "").encode("latin-1")
        with self._lock:
            if self._incumbent.secret and not hmac.compare_digest(proof, f"Bearer {self._incumbent.secret}".encode()):
                return problem(403, "Only the incumbent, which handed a secret over, may ask for this, and once.")
            answer = self._take_over()
            if answer.status == http.HTTPStatus.OK:
                self._incumbent.spend_secret()
            return answer

    def _take_over(self) -> Response:
        if self._lifecycle.phase is not Phase.STANDBY:
            return problem(409, f"This process does not stand by any more: it is {self._lifecycle.phase}.")
        try:
            deadline = time.monotonic() + self._settings.limits.rebind_time
            found = listeners.listen(self._places, lambda address: self._bind(address, deadline))
            self._lifecycle.step(Event.REPLACE)
        except StartError as error:
            return problem(503, f"{error}.")
        except IllegalTransitionError as error:  # a stop came first
            return problem(409, f"This process does not stand by any more: it is {error.phase}.")
        self._accept(found)
        _log.info("took over")
        if self._incumbent.is_plain:  # nobody watches, and nobody will bless
            self._settle(Event.BLESSED)
        return json_response({"status": "ok", "pid": os.getpid()})

    def _bind(self, address: Address, deadline: float) -> socket.socket:
        """Bind an address that a plain incumbent gives up, perhaps only after it has asked.

        Nothing tells when an address is free: it is tried again until `deadline`.
        """
        while True:
            try:
                return listeners.bind(address)
            except StartError:
                if time.monotonic() >= deadline:
                    raise
            process.ready([], min(deadline, time.monotonic() + self._settings.limits.poll_interval))

    def _take_message(self, message: Mapping[str, Any]) -> None:
        if "record" in message:
            self._journal.put(Record.from_json(message["record"]))
        elif "blessed" in message:
            self._own_journal()
            self._settle(Event.HAND_BACK if message.get("comes_back") else Event.BLESSED)
        elif "dismissed" in message:
            self._settle(Event.DISMISSED)

    def _incumbent_gone(self) -> None:
        with self._lock:
            if self._lifecycle.phase not in {Phase.STANDBY, Phase.TRIAL}:
                return
            _log.warning("the incumbent has gone without a blessing", extra={"phase": self._lifecycle.phase})
            if self._incumbent.comes_back and self._lifecycle.phase is Phase.STANDBY:
                self._take_over()  # nobody else would serve
            if self._lifecycle.phase is Phase.TRIAL:
                self._own_journal()
                self._inherit_upgrade()
            self._settle(Event.ORPHANED)

    def _own_journal(self) -> None:
        """Write the journal from here on: whoever wrote it does so no more."""
        try:
            self._journal.open()
        except StateError as error:
            _log.error("the history is kept in memory alone", extra={"reason": str(error)})

    def _inherit_upgrade(self) -> None:
        """Conclude the upgrade that the incumbent left: it had committed, or it was interrupted."""
        current = self._journal.current()
        if current is not None:
            reason = "the old version ended before the trial did; the new one serves on"
            self._journal.conclude(current.id, outcome="interrupted", reason=reason, ended_at=now())

    def _settle(self, event: Event) -> None:
        try:
            phase = self._lifecycle.step(event)
        except IllegalTransitionError:
            return  # a stop came first
        _log.info("settled", extra={"phase": phase})
        self.settled = phase
        self._on_settled()
