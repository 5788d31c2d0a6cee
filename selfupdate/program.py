"""The program that runs, and the file that the service was started from.

They are the same at first. After an upgrade the running program is a release in
the store, and the file is what the next start will run.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from selfupdate.journal import Record


class Program:
    """What runs, and what a restart would run."""

    def __init__(self, version: str, sha256: str | None, path: Path | None, installed: str) -> None:
        """Keep what is known when this process begins."""
        self.version = version
        self.sha256 = sha256
        """Of the running program's file; None where it was not started from one file."""
        self.path = path
        """The file that the service was started from; None where that is no single file."""
        self.installed = installed
        """The version that `path` holds, and a restart brings, as far as this process knows when it begins to serve."""

    def after_restart(self, commit: Record | None) -> dict[str, object]:
        """Return the version that a restart brings, and why it is another; `commit` is the last one in the journal."""
        if commit is None or commit.sha256 != self.sha256:
            return {"version": self.installed, "reason": None}
        return {"version": self.version if commit.installed else self.installed, "reason": commit.not_installed}


def file_of_this_program() -> Path | None:
    """Return the file that this process was started from: the archive, or None for a folder of modules."""
    spec = sys.modules["selfupdate"].__spec__
    archive = getattr(spec and spec.loader, "archive", None)
    return Path(archive).resolve() if archive else None
