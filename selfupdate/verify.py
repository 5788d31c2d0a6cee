"""The command `-verify FILE`: what the service would think of a file, found out without running it."""

from __future__ import annotations

import socket
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from selfupdate.candidates import check_file
from selfupdate.errors import CandidateError, TrustError
from selfupdate.foreign import shown
from selfupdate.releases import Store
from selfupdate.trust import Trust

if TYPE_CHECKING:
    from selfupdate.settings import Settings


def verify(settings: Settings, path: Path) -> int:
    """Print whether the service would run `path`, and why; return the exit status, 0 if it would."""
    never, other_end = socket.socketpair()
    with never, other_end, tempfile.TemporaryDirectory(prefix="self-update-") as directory:
        store = Store(Path(directory), settings.limits.candidate_size)
        name = shown(path.name)
        try:
            trusted = Trust(settings, store, never.fileno()).read()
            check_file(path.name, path.stat(), settings.limits)
            trusted.examine(path)
            release = trusted.verify(store.stage(path))
        except TrustError as error:
            return _refuse(str(error), error.remedy)
        except CandidateError as error:
            return _refuse(f"{name} would not be run: {error} ({error.code})", error.remedy)
        except OSError as error:
            return _refuse(f"{name} cannot be read: {error.strerror}", "name a file that is there")
    print(f"{name} would be asked for its version, and run: sha256 {release.sha256}")
    for signer in release.signers:
        print(f"signed by {signer.name}, {signer.key}")
    if not release.signers:
        print("its signature was not checked: -insecure-allow-unsigned")
    return 0


def _refuse(text: str, remedy: str | None) -> int:
    print(text)
    if remedy:
        print(f"to mend it: {remedy}")
    return 1
