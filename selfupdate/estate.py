"""What a service has on disk: the state directory with its lock, the journal, the releases, and the program.

One process writes to it at a time. A start takes it, and puts in order what a crash
left; a successor shares it with its incumbent, and settles what is left when it stays.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from selfupdate import __version__, versions
from selfupdate.errors import CandidateError, StateError
from selfupdate.journal import Journal
from selfupdate.program import Program, file_of_this_program
from selfupdate.recovery import recover, settle
from selfupdate.releases import Store
from selfupdate.state import StateDirectory

if TYPE_CHECKING:
    from pathlib import Path

    from selfupdate.incumbent import Incumbent

_log = logging.getLogger(__name__)


class Estate:
    """All of it. One for the process."""

    def __init__(self, state_dir: Path, size_limit: int) -> None:
        """Say where it is; nothing is made or opened yet. A release has at most `size_limit` bytes."""
        self.state = StateDirectory(state_dir)
        self.store = Store(state_dir, size_limit)
        self.journal = Journal(self.state.path / "journal")
        self.program = Program(__version__, None, file_of_this_program(), __version__)
        self.fault: StateError | None = None
        """Why upgrades are off, where it can't be used."""

    def take(self) -> bool:
        """Be the only service that has it, and put it in order, before anything is bound.

        Returns whether the file of the program was replaced, by one that had been committed, and is to be executed
        anew. Raises StartError where another service has it.
        """
        try:
            self.state.open()
            self.state.lock()
            self.store.open()
            self.journal.open()
            self.store.clear()
            self._keep_program()
            return recover(self.journal, self.store, self.program.path)
        except StateError as error:
            self._do_without(error)
            return False

    def share(self, incumbent: Incumbent) -> None:
        """Read it while the incumbent still has it, which tells what it changes from here on."""
        try:
            if incumbent.lock_fd is not None:
                self.state.inherit(incumbent.lock_fd)
                self.journal.read()
                installed = incumbent.installed or __version__
                self.program = Program(__version__, incumbent.sha256, incumbent.program, installed)
            else:
                self.state.open()
                self.store.open()
                self.journal.read()
        except StateError as error:
            self._do_without(error)

    def settle(self) -> None:
        """Do what the incumbent left to do to this process, which is there to stay."""
        last = self.journal.last_commit()
        if last is None or last.sha256 != self.program.sha256:
            return
        if last.installed is None:
            settle(self.journal, self.store, last)
            last = self.journal.get(last.id) or last
        if last.installed:
            self.program.installed = __version__

    def wait_for(self, bind: str) -> bool:
        """Wait until a plain incumbent, which passes nothing on, has let go of it; tell whether this process has it.

        The lock then names `bind` as where the service is met.
        """
        try:
            self.state.lock(wait=True)
            self.state.sign(bind)
            self.journal.open()
        except StateError as error:
            _log.error("the history is kept in memory alone", extra={"reason": str(error)})
            return False
        return True

    def floor(self) -> versions.Version | None:
        """Return the version below which nothing is chosen: the last that was blessed, or rolled back to."""
        last = self.journal.last_commit()
        return versions.parse(last.to_version) if last and last.to_version else None

    def needed_releases(self) -> set[str]:
        """Return the digests of the releases that must stay."""
        last, newest = self.journal.last_commit(), next(iter(self.journal.records()), None)
        found = {self.program.sha256}
        found |= {last.sha256, last.from_sha256} if last else set()
        found |= {newest.sha256} if newest else set()  # under way, or failed and looked into
        return {sha256 for sha256 in found if sha256}

    def _keep_program(self) -> None:
        """Keep a copy of the running program in the store, to go back to."""
        if self.program.path is None:
            return
        try:
            self.program.sha256 = self.store.stage(self.program.path).sha256
            self.store.findings.save()  # the next start need not read the file
        except CandidateError as error:
            _log.warning("no rollback to this version will be possible", extra={"reason": str(error)})

    def _do_without(self, error: StateError) -> None:
        _log.error("upgrades are off", extra={"code": error.code, "reason": str(error), "remedy": error.remedy})
        self.fault = error
