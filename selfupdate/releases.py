"""The store of releases: private copies of candidates, each under its own digest.

What was copied is what is verified, what is asked for its version, and what runs:
a file in the upgrade directory is only ever read. Whoever may write there can
replace it at any moment, and the copy does not change.
"""

import contextlib
import errno
import io
import os
import stat
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

from selfupdate.errors import CandidateError, InstallError, StateError
from selfupdate.findings import Findings, Identity
from selfupdate.system import RELEASE_MODE, STARTING, is_noexec, mend, put_in_place, sync_directory

_CHUNK = 1 << 20
_NEW = ".new-"


class Copy(NamedTuple):
    """A private copy, of which nothing is known but its content. `trust` says whether it may be executed."""

    path: Path
    name: str
    sha256: str
    source: Path | None = None
    """The candidate that it is a copy of, where it was asked for as one."""
    identity: Identity | None = None
    """Of the candidate, when it was copied."""


class Store:
    """The directory `releases` in the state directory."""

    def __init__(self, state_dir: Path, size_limit: int) -> None:
        """Keep the path; `size_limit` is in bytes."""
        self._state_dir = state_dir.absolute()
        self._root = self._state_dir / "releases"
        self._size_limit = size_limit
        self._staged: dict[tuple[Path, Identity], Copy] = {}
        self.findings = Findings(self._state_dir / "findings")

    def open(self) -> None:
        """Make the directory where it is missing, for this user alone.

        Raises StateError where it can't be made, or nothing can be executed in it.
        """
        try:
            self._root.mkdir(mode=0o700, exist_ok=True)
            self._new_directory().rmdir()
            if is_noexec(self._root):
                raise StateError(
                    f"nothing can be executed in the state directory {self._root.parent}: it is mounted noexec",
                    "staging-noexec",
                    "give another one with -state-dir",
                )
        except OSError as error:
            raise StateError(
                f"the state directory {self._root.parent} cannot keep releases: {error.strerror}",
                "state-unusable",
                "make it writable for this account, or give another one with -state-dir",
            ) from error

    def stage(self, source: Path, status: os.stat_result | None = None) -> Copy:
        """Return the private copy of a candidate, made now or when the same file was last staged.

        Its `status` need not be asked for anew where it has just been seen. Raises CandidateError where it
        can't be read, is too large, or changes meanwhile.
        """
        try:
            identity = Identity.of(status or source.stat())
            copy = self._staged.get((source, identity)) or self._staged_before(source, identity)
            if copy is None or not copy.path.exists():
                copy = self._copy(source)
                assert copy.identity is not None
                self.findings.note_digest(source, copy.identity, copy.sha256)
                identity = copy.identity  # of what was read, whatever was there before
            self._staged[source, identity] = copy
        except FileNotFoundError:
            raise CandidateError("was removed while it was looked at", "candidate-missing") from None
        except OSError as error:
            if error.errno in {errno.ENOSPC, errno.EDQUOT}:
                why = f"cannot be copied, there is no room in {self._root}: {error.strerror}"
                raise CandidateError(why, "staging-full", "make room there") from error
            why = f"cannot be copied to {self._root}: {error.strerror}"
            raise CandidateError(why, "candidate-unreadable", "make it readable for this account") from error
        return copy

    def _staged_before(self, source: Path, identity: Identity) -> Copy | None:
        """Return the copy that another process of this service made of the same file, if it is there."""
        sha256 = self.findings.digest_of(source, identity)
        if sha256 is None:
            return None
        try:
            (path,) = (self._root / sha256).iterdir()
        except (OSError, ValueError):
            return None
        return Copy(path, source.name, sha256, source, identity)

    def confirm(self, copy: Copy) -> None:
        """Check that the file that `copy` was made of is still the same, and the copy is there.

        Raises CandidateError.
        """
        again = "ask for the upgrade again"
        try:
            identity = Identity.of(copy.source.stat()) if copy.source else copy.identity
        except OSError:
            why = f"{copy.name} was removed after it had been chosen"
            raise CandidateError(why, "candidate-missing", "copy it there again") from None
        if identity != copy.identity:
            raise CandidateError(f"{copy.name} was changed after it had been chosen", "candidate-changing", again)
        if not copy.path.exists():
            raise CandidateError(f"the private copy of {copy.name} has gone", "staging-missing", again)

    def find(self, sha256: str) -> Copy:
        """Return the copy with a digest, when its content still has it. Raises CandidateError."""
        try:
            (path,) = (self._root / sha256).iterdir()
            found = digest(path)
        except (OSError, ValueError):
            raise CandidateError(f"the release {sha256[:12]} is not in the store any more", "staging-missing") from None
        if found != sha256:
            raise CandidateError(
                f"the release {sha256[:12]} in the store is damaged: its content has another digest", "staging-damaged"
            )
        return Copy(path, path.name, sha256)

    def prune(self, kept: Iterable[str]) -> None:
        """Remove every release but those with the digests `kept`."""
        kept = set(kept)
        for name in os.listdir(self._root):  # noqa: PTH208 - names, not paths
            if name not in kept and not name.startswith(_NEW):
                _remove(self._root / name)
        self._staged = {key: copy for key, copy in self._staged.items() if copy.sha256 in kept}
        self.findings.forget_all_but(kept)

    def clear(self) -> None:
        """Remove what copies and questions left behind that a crash interrupted; nobody else may use the store now."""
        for directory in self._root.glob(f"{_NEW}*"):
            _remove(directory)

    @contextlib.contextmanager
    def scratch(self) -> Iterator[Path]:
        """Make an empty directory, and remove it with all that has come into it. Raises OSError."""
        from shutil import rmtree  # while there are descriptors left to read it with

        directory = self._new_directory()
        try:
            yield directory
        finally:
            rmtree(directory, ignore_errors=True)

    def _new_directory(self) -> Path:
        directory = self._root / f"{_NEW}{os.urandom(8).hex()}"
        self._root.mkdir(mode=0o700, parents=True, exist_ok=True)
        directory.mkdir(mode=0o700)
        return directory

    def _copy(self, source: Path) -> Copy:
        incoming = self._new_directory()
        try:
            # O_NONBLOCK: opening a FIFO would wait for a writer.
            fd = os.open(source, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
            with open(fd, "rb", buffering=0) as reader:  # noqa: PTH123 - a descriptor, not a path
                before = os.fstat(fd)
                if not stat.S_ISREG(before.st_mode):
                    raise CandidateError("is not a regular file", "candidate-not-regular")
                if before.st_size > self._size_limit:
                    raise self._too_big(before.st_size)
                sha256 = self._write(reader, incoming / source.name)
                identity = Identity.of(os.fstat(fd))
            if identity != Identity.of(before):
                raise CandidateError("is still being copied; it is looked at again", "candidate-changing")
            return Copy(self._keep(incoming, sha256), source.name, sha256, source, identity)
        finally:
            _remove(incoming)

    def _too_big(self, size: int) -> CandidateError:
        return CandidateError(f"has {size} bytes; at most {self._size_limit} are taken", "candidate-too-big")

    def _write(self, reader: io.RawIOBase, target: Path) -> str:
        """Copy `reader` to the new file `target`, durable and executable; return the digest."""
        import hashlib  # which a start need not wait for, once this program has been copied

        sha256 = hashlib.sha256()
        left = self._size_limit
        writer = os.open(target, os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0), RELEASE_MODE)
        try:
            while chunk := reader.read(min(_CHUNK, left + 1)):
                left -= len(chunk)
                if left < 0:
                    raise self._too_big(self._size_limit - left)
                sha256.update(chunk)
                view = memoryview(chunk)
                while view:
                    view = view[os.write(writer, view) :]
            os.fsync(writer)
        finally:
            with STARTING:
                os.close(writer)
        return sha256.hexdigest()

    def _keep(self, incoming: Path, sha256: str) -> Path:
        """Move the copy to the place of its digest, unless one is there; return its path there."""
        directory = self._root / sha256
        try:
            incoming.rename(directory)
        except OSError as error:
            if error.errno not in {errno.ENOTEMPTY, errno.EEXIST}:  # else the same content was there first
                raise
        sync_directory(self._root)
        (path,) = directory.iterdir()
        return path


def install(copy: Copy, program: Path) -> None:
    """Replace the file `program` by a copy of a release: at each moment the one or the other is there, whole.

    Mode and owner stay. Raises InstallError, and `program` is as it was.
    """
    import shutil

    partial = program.with_name(f".{program.name}.{os.urandom(4).hex()}.new")
    try:
        mend(program)
        before = program.stat()
        try:
            with copy.path.open("rb") as reader, partial.open("xb") as writer:
                shutil.copyfileobj(reader, writer, _CHUNK)
                writer.flush()
                made = os.fstat(writer.fileno())
                if (made.st_uid, made.st_gid) != (before.st_uid, before.st_gid) and hasattr(os, "fchown"):
                    os.fchown(writer.fileno(), before.st_uid, before.st_gid)
                partial.chmod(stat.S_IMODE(before.st_mode))
                os.fsync(writer.fileno())
            put_in_place(partial, program)
            sync_directory(program.parent)
        finally:
            partial.unlink(missing_ok=True)
    except OSError as error:
        raise InstallError(f"{program} cannot be replaced: {error.strerror}") from error


def digest(path: Path) -> str:
    """Return the SHA-256 digest of a file, in hexadecimal. Raises OSError."""
    import hashlib

    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _remove(directory: Path) -> None:
    import shutil  # which brings three compressors along: a start that finds nothing to remove need not wait for them

    shutil.rmtree(directory, ignore_errors=True)
