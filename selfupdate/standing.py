"""How the service stands: what `GET /status` tells, what the page shows, and what listeners hear of."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

from selfupdate.journal import now
from selfupdate.listener import join

if TYPE_CHECKING:
    from selfupdate.frontend import Frontend
    from selfupdate.journal import Journal
    from selfupdate.lifecycle import Lifecycle
    from selfupdate.program import Program
    from selfupdate.trust import Trust


class Standing:
    """Looks at what each part of the service says of itself."""

    def __init__(
        self,
        program: Program,
        generation: int,
        lifecycle: Lifecycle,
        journal: Journal,
        trust: Trust,
        frontend: Frontend,
    ) -> None:
        """Say that the service has been running since now."""
        self._program = program
        self._generation = generation
        self._lifecycle = lifecycle
        self._journal = journal
        self._trust = trust
        self._frontend = frontend
        self._started_at = now()

    def as_json(self) -> dict[str, Any]:
        """Return the answer to `GET /status`."""
        current = self._journal.current()
        return {
            "version": self._program.version,
            "pid": os.getpid(),
            "generation": self._generation,
            "phase": self._lifecycle.phase,
            "bind": join(self._frontend.binds),
            "started_at": self._started_at,
            "installed": self._program.after_restart(self._journal.last_commit()),
            "upgrade": current.as_json() if current else None,
            "trust": self._trust.as_json(self._journal.signed(self._program.sha256)),
        }
