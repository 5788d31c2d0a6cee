"""The routes: what each request asks of the service."""

from __future__ import annotations

import json
import math
import pkgutil
import re
from typing import TYPE_CHECKING, Any

from selfupdate import events, exposition
from selfupdate.app import UPGRADE
from selfupdate.errors import BadRequestError, HandedOverError
from selfupdate.journal import KEPT
from selfupdate.listener import join
from selfupdate.messages import Request, Response, json_response, problem
from selfupdate.settings import parse_duration

if TYPE_CHECKING:
    from selfupdate.app import Routes
    from selfupdate.candidates import Scanner
    from selfupdate.events import Feed
    from selfupdate.frontend import Frontend
    from selfupdate.journal import Journal, Record
    from selfupdate.metrics import Metrics
    from selfupdate.settings import Settings
    from selfupdate.standing import Standing
    from selfupdate.upgrade import Upgrader

# Read now: a running program must not depend on the file that it was started from.
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

AT_HAND = _PAGE.keys() - {"/"}
"""Paths to which the answer waits for nothing."""

_MAX_NAME = 1024
"""A file's name has at most 255 bytes, each shown as at most four characters."""


class Api:
    """The service's answers."""

    def __init__(  # noqa: PLR0913 - each is a noun of its own, given once by the composition root
        self,
        *,
        version: str,
        settings: Settings,
        standing: Standing,
        journal: Journal,
        scanner: Scanner,
        upgrader: Upgrader,
        frontend: Frontend,
        feed: Feed,
        metrics: Metrics,
    ) -> None:
        """Answer for this process."""
        self._version = version
        self._settings = settings
        self._standing = standing
        self._journal = journal
        self._scanner = scanner
        self._upgrader = upgrader
        self._frontend = frontend
        self._feed = feed
        self._metrics = metrics

    @property
    def routes(self) -> Routes:
        """All routes but those of `presence`."""
        return {
            "/openapi.json": ("GET", self._contract),
            "/status": ("GET", lambda _: json_response(self._standing.as_json())),
            "/events": ("GET", self._events),
            "/candidates": ("GET", self._candidates),
            "/upgrade": ("POST", self._upgrade),
            "/rollback": ("POST", self._rollback),
            "/upgrades": ("GET", self._upgrades),
            UPGRADE: ("GET", self._record),
            "/metrics": ("GET", lambda _: Response(200, self._metrics.text().encode(), exposition.CONTENT_TYPE)),
            **dict.fromkeys(_PAGE, ("GET", self._page)),
        }

    def _events(self, request: Request) -> Response:
        last = request.headers.get("last-event-id", "")
        if not re.fullmatch("[0-9]{0,18}", last):
            raise BadRequestError("Last-Event-ID takes the id of an event that was told here.")
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
        try:
            record = self._upgrader.upgrade(name)
        except HandedOverError:
            return self._relay(request)
        if record is None:
            return json_response({"outcome": "up-to-date", **self._listing()})
        return self._accepted(record, wait)

    def _rollback(self, request: Request) -> Response:
        wait = self._wait_in(request)
        if request.body:
            raise BadRequestError("A rollback takes no body; it goes to the version that ran before.")
        try:
            record = self._upgrader.roll_back()
        except HandedOverError:
            return self._relay(request)
        return self._accepted(record, wait)

    def _relay(self, request: Request) -> Response:
        """Return what the process answers that serves now."""
        from selfupdate.relay import relay  # which only the end of a process needs

        return relay(request, self._frontend.binds[0], self._settings.drain)

    def _accepted(self, record: Record, wait: float) -> Response:
        record = self._journal.wait(record.id, lambda record: record.is_settled, wait) or record
        status = 202 if record.outcome is None else 200
        return json_response(record.as_json(), status, Location=f"/upgrades/{record.id}")

    def _wait_in(self, request: Request) -> float:
        try:
            wait = parse_duration(request.query.get("wait", "0"), longest=math.inf)  # what is too long is cut below
        except ValueError:
            raise BadRequestError("wait takes a duration such as 500ms, 30s or 2m.") from None
        # The answer is under way when this process stops accepting, and must be given while it drains.
        return min(wait, self._settings.drain)

    def _upgrades(self, request: Request) -> Response:
        limit = request.query.get("limit", str(KEPT))
        if not re.fullmatch("[0-9]{1,3}", limit):
            raise BadRequestError("limit takes the number of upgrades to list, the newest ones.")
        return json_response({"upgrades": [record.as_json() for record in self._journal.records()[: int(limit)]]})

    def _record(self, request: Request) -> Response:
        upgrade_id = request.path.removeprefix("/upgrades/")
        seen = request.query.get("seen", "")
        if not re.fullmatch("[0-9]{0,3}", seen):
            raise BadRequestError("seen takes the number of phases that are known already.")
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
            from selfupdate.page import with_state  # whose table of entities no successor need wait for

            host = request.headers.get("host", join(self._frontend.binds))
            needs_token = self._settings.token_file is not None
            body = with_state(body, self._standing.as_json(), self._journal.records(), host, needs_token=needs_token)
        return Response(200, body, content_type)


def _name_in(body: bytes) -> str | None:
    """Return the candidate that a body asks for. Raises BadRequestError on anything but `{"name": "…"}`."""
    if not body:
        return None
    try:
        value: Any = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise BadRequestError(f'The body is not JSON ({error}); send nothing, or {{"name": "…"}}.') from None
    if not isinstance(value, dict) or set(value) - {"name"} or not isinstance(value.get("name"), str | None):
        raise BadRequestError('The body must be {"name": "…"} with the name of a candidate, or nothing.')
    name: str | None = value.get("name")
    if name is not None and len(name) > _MAX_NAME:
        raise BadRequestError(f"A candidate's name has at most {_MAX_NAME} characters.")
    return name
