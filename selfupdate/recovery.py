"""What a start makes of a journal that a crash left behind, before the service binds.

An upgrade without an outcome was interrupted: nothing of it is running any more
(the lock of the state directory says so), and the program on disk is still the
old one, since it is replaced only behind the blessing. A commit without a word
on its installation was blessed: its program belongs on disk, and is put there
now, from the store.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import TYPE_CHECKING

from selfupdate.errors import CandidateError, InstallError
from selfupdate.journal import now
from selfupdate.releases import digest, install
from selfupdate.system import mend

if TYPE_CHECKING:
    from selfupdate.journal import Journal, Record
    from selfupdate.releases import Store

_log = logging.getLogger(__name__)


def recover(journal: Journal, store: Store, program: Path | None) -> bool:
    """Finish or undo what was interrupted; tell whether `program` was replaced and must be executed anew."""
    for record in journal.records():
        if record.outcome is None:
            reason = (
                f"the service ended in the middle of it, when it was {record.phase}; it was undone at the next start"
            )
            journal.conclude(record.id, outcome="interrupted", reason=reason, ended_at=now())
            _log.warning("an upgrade was interrupted", extra={"upgrade": record.id, "phase": record.phase})
    if program is not None:
        mend(program)
    last = journal.last_commit()
    if last is None or last.installed is not None or program is None or last.program != str(program):
        return False
    return settle(journal, store, last)


def settle(journal: Journal, store: Store, commit: Record) -> bool:
    """Install what was committed, and write down whether that went well; tell whether the file was changed."""
    if commit.program is None:
        why = "the service was not started from a built file"
        journal.conclude(commit.id, installed=False, not_installed=why)
        return False
    assert commit.sha256 is not None
    program = Path(commit.program)
    try:
        is_there = program.exists() and digest(program) == commit.sha256
        if not is_there:
            install(store.find(commit.sha256), program)
    except (OSError, InstallError, CandidateError) as error:
        journal.conclude(commit.id, installed=False, not_installed=str(error))
        _log.error(
            "a restart will bring another version than runs now",
            extra={"upgrade": commit.id, "program": commit.program, "reason": str(error)},
        )
        return False
    journal.conclude(commit.id, installed=True)
    return not is_there
