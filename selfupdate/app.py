"""Who may ask, and which route a question is for: `GET /candidates`, say, is the business of whoever serves it.

The routes come in two parts. The first are answered as soon as the server accepts; a question for any other
waits until the rest is put together, which at a start is behind that.
"""

from __future__ import annotations

import collections
import contextlib
import re
import threading
from typing import TYPE_CHECKING

from selfupdate.access import goes_by, is_from_here
from selfupdate.errors import (
    BadRequestError,
    ChoiceError,
    NoSuchCandidateError,
    NotEligibleError,
    NothingToRollBackToError,
    NotNowError,
    ScanError,
    SelfUpdateError,
    StopRequestedError,
    UpgradeUnderWayError,
)
from selfupdate.messages import problem, refusal

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Mapping

    from selfupdate.access import Gate
    from selfupdate.messages import Request, Response

    Routes = Mapping[str, tuple[str, Callable[[Request], Response]]]
    """The method that each pattern of a path takes, and what answers it."""

UPGRADE = "/upgrades/{id}"
"""The pattern of the one route that stands for many paths."""

NO_ROUTE = "none"
"""The route of what was refused before it was routed."""
OTHER = "other"
"""The route of what a client may call as it likes, and is not there."""

# What the caller can do next decides the status.
_STATUS_OF_ERRORS: dict[type[SelfUpdateError], int] = {
    BadRequestError: 400,
    UpgradeUnderWayError: 409,
    NotNowError: 503,
    NoSuchCandidateError: 404,
    NothingToRollBackToError: 409,
    NotEligibleError: 422,
    ScanError: 503,
    StopRequestedError: 503,
}


class App:
    """The service, as a client meets it."""

    def __init__(self, gate: Gate, names: Collection[str], routes: Routes) -> None:
        """Answer `routes`, all of them at hand, to clients that call the service by one of `names`."""
        self._gate = gate
        self._names = names
        self._routes = dict(routes)
        self.at_hand = set(routes)
        """Paths to which the answer waits for nothing."""
        self._is_whole = threading.Event()
        self._count: Callable[[str, str, int, float], None]
        self._uncounted: collections.deque[tuple[str, str, int, float]] = collections.deque()

    def complete(self, routes: Routes, at_hand: Collection[str], count: Callable[[str, str, int, float], None]) -> None:
        """Answer `routes`, too, those `at_hand` without waiting; have all answers counted, and all that were given.

        `count` takes a route, the method, the status and the seconds that it took.
        """
        self._routes |= routes
        self.at_hand |= set(at_hand)
        self._count = count
        self._is_whole.set()
        self._count_all()

    def respond(self, request: Request) -> Response:  # noqa: PLR0911 - each refusal has its own words
        """Return the answer to `request`; who may ask is checked before anything acts."""
        if not goes_by(request.headers.get("host"), self._names):
            return problem(
                421,
                "This service does not go by that name; call it by its address, or allow the name with -allowed-hosts.",
            )
        pattern = _pattern(request.path)
        if pattern not in self._routes:
            self._is_whole.wait()
        if pattern not in self._routes:
            return problem(404, "There is nothing here; GET / is the page, and GET /openapi.json lists the rest.")
        method, route = self._routes[pattern]
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
            return route(request)
        except SelfUpdateError as error:
            return _refuse(error)

    def answered(self, method: str, path: str | None, status: int, seconds: float) -> None:
        """Count an answer, now or as soon as counting has begun; without a `path` the request was never routed."""
        self._uncounted.append((NO_ROUTE if path is None else _pattern(path), method, status, seconds))
        if self._is_whole.is_set():
            self._count_all()

    def _count_all(self) -> None:
        with contextlib.suppress(IndexError):  # several threads may be at it
            while True:
                pattern, method, status, seconds = self._uncounted.popleft()
                is_known = pattern == NO_ROUTE or pattern in self._routes
                self._count(pattern if is_known else OTHER, method, status, seconds)


def _pattern(path: str) -> str:
    if re.fullmatch(r"/upgrades/[0-9A-Za-z-]+", path):
        return UPGRADE
    return OTHER if path == UPGRADE else path  # a path that is the pattern itself leads nowhere


def _refuse(error: SelfUpdateError) -> Response:
    status = next((status for kind, status in _STATUS_OF_ERRORS.items() if isinstance(error, kind)), 500)
    if isinstance(error, UpgradeUnderWayError | ChoiceError) and error.upgrade_id:
        where = f"/upgrades/{error.upgrade_id}"
        return refusal(status, error, {"id": error.upgrade_id}, Location=where)
    return refusal(status, error)
