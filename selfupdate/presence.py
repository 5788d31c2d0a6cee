"""That this process is there, and whether it is well, which a successor on standby tells, too."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from selfupdate.lifecycle import Lifecycle, Phase
from selfupdate.messages import Request, Response, json_response

if TYPE_CHECKING:
    from selfupdate.app import Routes
    from selfupdate.stop import Stop


class Presence:
    """Which version serves here, as which process."""

    def __init__(self, version: str, generation: int, lifecycle: Lifecycle, stop: Stop) -> None:
        """Answer for this process, which is well until it is to `stop`."""
        self._who = {"version": version, "pid": os.getpid(), "generation": generation}
        self._lifecycle = lifecycle
        self._stop = stop
        self._version = json_response({"version": version})

    @property
    def first_routes(self) -> Routes:
        """What is answered as soon as anybody can ask."""
        return {"/version": ("GET", lambda _: self._version)}

    @property
    def routes(self) -> Routes:
        """What is answered when all is there: before, nobody can say that it is well."""
        return {"/healthz": ("GET", self._health)}

    def _health(self, _: Request) -> Response:
        return self.health()

    def health(self) -> Response:
        """Return the answer to `GET /healthz`."""
        fit = self._lifecycle.phase is not Phase.STOPPING and not self._stop.is_asked
        return json_response({"status": "ok" if fit else "stopping", **self._who}, 200 if fit else 503)
