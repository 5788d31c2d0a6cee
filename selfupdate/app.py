"""The routes: what a request asks of the service, and how each error is answered."""

from __future__ import annotations

import json
import math
import os
import pkgutil
import re
from typing import TYPE_CHECKING, Any

from selfupdate import events, exposition
from selfupdate.access import goes_by, is_from_here
from selfupdate.errors import (
    ChoiceError,
    HandedOverError,
    NoSuchCandidateError,
    NotEligibleError,
    NothingToRollBackToError,
    NotNowError,
    ScanError,
    SelfUpdateError,
    StopRequestedError,
    UpgradeUnderWayError,
)
from selfupdate.journal import KEPT, now
from selfupdate.lifecycle import Lifecycle, Phase
from selfupdate.listener import join
from selfupdate.messages import Request, Response, json_response, problem, refusal
from selfupdate.metrics import NO_ROUTE, OTHER, Metrics
from selfupdate.page import with_state
from selfupdate.relay import relay
from selfupdate.settings import parse_duration

if TYPE_CHECKING:
    from collections.abc import Callable

    from selfupdate.access import Gate
    from selfupdate.candidates import Scanner
    from selfupdate.counters import Counters
    from selfupdate.frontend import Frontend
    from selfupdate.journal import Journal, Record
    from selfupdate.program import Program
    from selfupdate.server import Server
    from selfupdate.settings import Settings
    from selfupdate.stop import Stop
    from selfupdate.trust import Trust
    from selfupdate.upgrade import Upgrader

# All files are read at start: a running program must not depend on the one that it was started from.
_CONTRACT = pkgutil.get_data("selfupdate", "openapi.json") or b""
_PAGE = {
    path: (pkgutil.get_data("selfupdate", f"ui/{name}") or b"", content_type)
    for path, name, content_type in (
        ("/", "index.html", "text/html; charset=utf-8"),
        ("/app.js", "app.js", "text/javascript; charset=utf-8"),
        ("/icon.svg", "icon.svg", "image/svg+xml"),
        ("/style.css", "style.css", "text/css; charset=utf-8"),
        ("/view.js", "view.js", "text/javascript; charset=utf-8"),
    )
}

AT_HAND = frozenset(_PAGE.keys() - {"/"}) | {"/version", "/healthz"}
"""Paths to which the answer waits for nothing."""

# What the caller can do next decides the status.
_STATUS_OF_ERRORS: dict[type[SelfUpdateError], int] = {
    UpgradeUnderWayError: 409,
    NotNowError: 503,
    NoSuchCandidateError: 404,
    NothingToRollBackToError: 409,
    NotEligibleError: 422,
    ScanError: 503,
    StopRequestedError: 503,
}


_MAX_NAME = 1024
"""A file's name has at most 255 bytes, each shown as at most four characters."""


class _BadRequestError(Exception):
    """The request says something that its route does not take."""


class App:
    """The service's answers."""

    def __init__(  # noqa: PLR0913 - each is a noun of its own, given once by the composition root
        self,
        *,
        program: Program,
        generation: int,
        settings: Settings,
        lifecycle: Lifecycle,
        journal: Journal,
        scanner: Scanner,
        upgrader: Upgrader,
        trust: Trust,
        gate: Gate,
        server: Server,
        frontend: Frontend,
        stop: Stop,
        counters: Counters,
    ) -> None:
        """Answer for this process; count what the `server` answers, and wake it when streams have news."""
        self._program = program
        self._version = program.version
        self._generation = generation
        self._settings = settings
        self._lifecycle = lifecycle
        self._journal = journal
        self._scanner = scanner
        self._upgrader = upgrader
        self._trust = trust
        self._gate = gate
        self._frontend = frontend
        self._stop = stop
        self._names = {*(bind.host.lower() for bind in settings.bind), *(settings.allowed_hosts or ())}
        self._started_at = now()
        self._feed = events.Feed(journal, lifecycle, self._standing, server.advance_streams, settings.limits.listeners)
        said = json_response({"version": program.version})
        self._routes: dict[str, tuple[str, Callable[[Request], Response]]] = {
            "/version": ("GET", lambda _: said),
            "/openapi.json": ("GET", self._contract),
            "/healthz": ("GET", lambda _: self.health()),
            "/status": ("GET", lambda _: json_response(self._standing())),
            "/events": ("GET", self._events),
            "/candidates": ("GET", self._candidates),
            "/upgrade": ("POST", self._upgrade),
            "/rollback": ("POST", self._rollback),
            "/upgrades": ("GET", self._upgrades),
            "/metrics": ("GET", lambda _: Response(200, self._metrics.text().encode(), exposition.CONTENT_TYPE)),
            **dict.fromkeys(_PAGE, ("GET", self._page)),
        }
        self._metrics = Metrics(
            version=program.version,
            generation=generation,
            lifecycle=lifecycle,
            journal=journal,
            scanner=scanner,
            server=server,
            counters=counters,
        )
        server.follow(self._count)

    def respond(self, request: Request) -> Response:  # noqa: PLR0911 - each refusal has its own words
        """Return the answer to `request`; who may ask is checked before anything acts."""
        if not goes_by(request.headers.get("host"), self._names):
            return problem(
                421,
                "This service does not go by that name; call it by its address, or allow the name with -allowed-hosts.",
            )
        method, route = self._routes.get(
            request.path, ("GET", self._record if _is_record(request.path) else _not_found)
        )
        if route is _not_found:
            return _not_found(request)
        asked = "GET" if request.method == "HEAD" else request.method
        if asked != method:
            allowed = "GET, HEAD" if method == "GET" else method
            return problem(405, f"{request.path} takes {allowed}.", Allow=allowed)
        if method == "POST" and not is_from_here(request):
            return problem(
                403, "This request comes from a page of another site; use the service's own page, or no browser."
            )
        if method == "POST" and (refused := self._gate.refuse(request)):
            return refused
        try:
            try:
                return route(request)
            except HandedOverError:
                return relay(request, self._frontend.binds[0], self._settings.drain)
        except _BadRequestError as error:
            return problem(400, str(error))
        except SelfUpdateError as error:
            return self._refuse(error)

    def _count(self, method: str, path: str | None, status: int, seconds: float) -> None:
        self._metrics.answered(self._pattern(path), method, status, seconds)

    def _pattern(self, path: str | None) -> str:
        """Return the pattern of the route of `path`."""
        if path is None:
            return NO_ROUTE
        if path in self._routes:
            return path
        return "/upgrades/{id}" if _is_record(path) else OTHER

    def health(self) -> Response:
        """Return the answer to `GET /healthz`."""
        fit = self._lifecycle.phase is not Phase.STOPPING and not self._stop.is_asked
        state = {"status": "ok" if fit else "stopping", "version": self._version, "pid": os.getpid()}
        return json_response({**state, "generation": self._generation}, 200 if fit else 503)

    def _standing(self) -> dict[str, Any]:
        """Return how the service stands: the answer to `GET /status`."""
        current = self._journal.current()
        return {
            "version": self._version,
            "pid": os.getpid(),
            "generation": self._generation,
            "phase": self._lifecycle.phase,
            "bind": join(self._frontend.binds),
            "started_at": self._started_at,
            "installed": self._program.after_restart(self._journal.last_commit()),
            "upgrade": current.as_json() if current else None,
            "trust": self._trust.as_json(self._journal.signed(self._program.sha256)),
        }

    def _events(self, request: Request) -> Response:
        last = request.headers.get("last-event-id", "")
        if not re.fullmatch("[0-9]{0,18}", last):
            raise _BadRequestError("Last-Event-ID takes the id of an event that was told here.")
        listener = self._feed.open(int(last) if last else None)
        if listener is None:
            return problem(503, "Too many clients listen; ask GET /status, or come back later.", Retry_After="5")
        return Response(200, content_type=events.CONTENT_TYPE, stream=listener)

    def _candidates(self, _: Request) -> Response:
        return json_response(self._listing())

    def _listing(self) -> dict[str, object]:
        candidates = [candidate.as_json() for candidate in self._scanner.scan()]
        latest = next((candidate["name"] for candidate in candidates if candidate["eligible"]), None)
        return {"current": self._version, "latest": latest, "candidates": candidates}

    def _upgrade(self, request: Request) -> Response:
        name = _name_in(request.body)
        wait = self._wait_in(request)
        record = self._upgrader.upgrade(name)
        if record is None:
            return json_response({"outcome": "up-to-date", **self._listing()})
        return self._accepted(record, wait)

    def _rollback(self, request: Request) -> Response:
        wait = self._wait_in(request)
        if request.body:
            raise _BadRequestError("A rollback takes no body; it goes to the version that ran before.")
        return self._accepted(self._upgrader.roll_back(), wait)

    def _accepted(self, record: Record, wait: float) -> Response:
        record = self._journal.wait(record.id, lambda record: record.is_settled, wait) or record
        status = 202 if record.outcome is None else 200
        return json_response(record.as_json(), status, Location=f"/upgrades/{record.id}")

    def _wait_in(self, request: Request) -> float:
        try:
            wait = parse_duration(request.query.get("wait", "0"), longest=math.inf)  # what is too long is cut below
        except ValueError:
            raise _BadRequestError("wait takes a duration such as 500ms, 30s or 2m.") from None
        # The answer is under way when this process stops accepting, and must be given while it drains.
        return min(wait, self._settings.drain)

    def _upgrades(self, request: Request) -> Response:
        limit = request.query.get("limit", str(KEPT))
        if not re.fullmatch("[0-9]{1,3}", limit):
            raise _BadRequestError("limit takes the number of upgrades to list, the newest ones.")
        return json_response({"upgrades": [record.as_json() for record in self._journal.records()[: int(limit)]]})

    def _record(self, request: Request) -> Response:
        upgrade_id = request.path.removeprefix("/upgrades/")
        seen = request.query.get("seen", "")
        if not re.fullmatch("[0-9]{0,3}", seen):
            raise _BadRequestError("seen takes the number of phases that are known already.")
        record = self._journal.wait(
            upgrade_id,
            lambda record: record.is_settled or len(record.timeline) > int(seen or len(record.timeline)),
            self._wait_in(request),
        )
        if record is None:
            return problem(404, "There is no such upgrade; GET /upgrades lists all that are known.")
        return json_response(record.as_json())

    def _contract(self, _: Request) -> Response:
        document = json.loads(_CONTRACT)
        document["info"]["version"] = self._version
        return json_response(document)

    def _page(self, request: Request) -> Response:
        body, content_type = _PAGE[request.path]
        if request.path == "/":
            host = request.headers.get("host", join(self._frontend.binds))
            needs_token = self._settings.token_file is not None
            body = with_state(body, self._standing(), self._journal.records(), host, needs_token=needs_token)
        return Response(200, body, content_type)

    def _refuse(self, error: SelfUpdateError) -> Response:
        status = next((status for kind, status in _STATUS_OF_ERRORS.items() if isinstance(error, kind)), 500)
        if isinstance(error, UpgradeUnderWayError | ChoiceError) and error.upgrade_id:
            where = f"/upgrades/{error.upgrade_id}"
            return refusal(status, error, {"id": error.upgrade_id}, Location=where)
        return refusal(status, error)


def _not_found(_: Request) -> Response:
    return problem(404, "There is nothing here; GET / is the page, and GET /openapi.json lists the rest.")


def _is_record(path: str) -> bool:
    return re.fullmatch(r"/upgrades/[0-9A-Za-z-]+", path) is not None


def _name_in(body: bytes) -> str | None:
    """Return the candidate that a body asks for. Raises _BadRequestError on anything but `{"name": "…"}`."""
    if not body:
        return None
    try:
        value: Any = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise _BadRequestError(f'The body is not JSON ({error}); send nothing, or {{"name": "…"}}.') from None
    if not isinstance(value, dict) or set(value) - {"name"} or not isinstance(value.get("name"), str | None):
        raise _BadRequestError('The body must be {"name": "…"} with the name of a candidate, or nothing.')
    name: str | None = value.get("name")
    if name is not None and len(name) > _MAX_NAME:
        raise _BadRequestError(f"A candidate's name has at most {_MAX_NAME} characters.")
    return name
