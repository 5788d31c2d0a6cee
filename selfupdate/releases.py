"""The store of releases: private copies of candidates, each under its own digest.

What was copied is what is asked for its version, and what runs: a file in the
upgrade directory is only ever read. Whoever may write there can replace it at
any moment, and the copy does not change.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import secrets
import shutil
import stat
from dataclasses import dataclass
from typing import TYPE_CHECKING

from selfupdate.errors import CandidateError, StartError
from selfupdate.process import STARTING

if TYPE_CHECKING:
    import io
    from pathlib import Path

_CHUNK = 1 << 20


@dataclass(frozen=True)
class Identity:
    """What a file is known by without reading it; a file that is written to changes it (stat(2))."""

    device: int
    inode: int
    size: int
    modified: int
    changed: int

    @classmethod
    def of(cls, status: os.stat_result) -> Identity:
        """Return the identity in a file's status."""
        return cls(status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns)


@dataclass(frozen=True)
class Release:
    """A private copy that may be executed. Only the store makes one."""

    path: Path
    name: str
    sha256: str
    source: Path
    identity: Identity
    """Of the candidate, when it was copied."""


class Store:
    """The directory `releases` in the state directory."""

    def __init__(self, state_dir: Path, size_limit: int) -> None:
        """Make the directories where they are missing, for this user alone.

        `size_limit` is in bytes. Raises StartError where they can't be made.
        """
        self._root = state_dir.absolute() / "releases"
        self._size_limit = size_limit
        self._staged: dict[tuple[Path, Identity], Release] = {}
        try:
            for directory in (state_dir, self._root):
                directory.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._probe()
        except OSError as error:
            raise StartError(
                f"cannot keep releases in the state directory {state_dir}: {error.strerror}; "
                "give another one with -state-dir"
            ) from error

    def stage(self, source: Path) -> Release:
        """Return the private copy of a candidate, made now or when the same file was last staged.

        Raises CandidateError where it can't be read, is too large, or changes meanwhile.
        """
        try:
            identity = Identity.of(source.stat())
            release = self._staged.get((source, identity))
            if release is None or not release.path.exists():
                release = self._copy(source)
                self._staged[source, release.identity] = release
        except FileNotFoundError:
            raise CandidateError("was removed while it was looked at") from None
        except OSError as error:
            raise CandidateError(f"cannot be copied to {self._root}: {error.strerror}") from error
        return release

    def confirm(self, release: Release) -> None:
        """Check that the file that `release` is a copy of is still the same, and the copy is there.

        Raises CandidateError.
        """
        try:
            identity = Identity.of(release.source.stat())
        except OSError:
            raise CandidateError(f"{release.name} was removed after it had been chosen; copy it there again") from None
        if identity != release.identity:
            raise CandidateError(f"{release.name} was changed after it had been chosen; ask for the upgrade again")
        if not release.path.exists():
            raise CandidateError(f"the private copy of {release.name} has gone; ask for the upgrade again")

    def scratch(self) -> Path:
        """Return a new empty directory, for the caller to remove."""
        return self._new_directory()

    def _probe(self) -> None:
        self._new_directory().rmdir()

    def _new_directory(self) -> Path:
        directory = self._root / f".new-{secrets.token_hex(8)}"
        self._root.mkdir(mode=0o700, parents=True, exist_ok=True)
        directory.mkdir(mode=0o700)
        return directory

    def _copy(self, source: Path) -> Release:
        incoming = self._new_directory()
        try:
            # O_NONBLOCK: opening a FIFO would wait for a writer.
            fd = os.open(source, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
            with open(fd, "rb", buffering=0) as reader:  # noqa: PTH123 - a descriptor, not a path
                before = os.fstat(fd)
                if not stat.S_ISREG(before.st_mode):
                    raise CandidateError("is not a regular file")
                if before.st_size > self._size_limit:
                    raise CandidateError(f"has {before.st_size} bytes; at most {self._size_limit} are taken")
                sha256 = self._write(reader, incoming / source.name)
                identity = Identity.of(os.fstat(fd))
            if identity != Identity.of(before):
                raise CandidateError("is still being copied; it is looked at again")
            return Release(self._keep(incoming, source.name, sha256), source.name, sha256, source, identity)
        finally:
            shutil.rmtree(incoming, ignore_errors=True)

    def _write(self, reader: io.RawIOBase, target: Path) -> str:
        """Copy `reader` to the new file `target`, durable and executable; return the digest."""
        digest = hashlib.sha256()
        left = self._size_limit
        writer = os.open(target, os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0), 0o700)
        try:
            while chunk := reader.read(min(_CHUNK, left + 1)):
                left -= len(chunk)
                if left < 0:
                    raise CandidateError(f"has more than {self._size_limit} bytes")
                digest.update(chunk)
                view = memoryview(chunk)
                while view:
                    view = view[os.write(writer, view) :]
            os.fsync(writer)
        finally:
            with STARTING:
                os.close(writer)
        target.chmod(0o500)
        return digest.hexdigest()

    def _keep(self, incoming: Path, name: str, sha256: str) -> Path:
        """Move the copy to the place of its digest; return its path there."""
        directory = self._root / sha256
        with contextlib.suppress(FileExistsError):
            directory.mkdir(mode=0o700)
        (incoming / name).replace(directory / name)
        return directory / name
