"""What was found out about files, kept over restarts and handovers: it is not found out twice.

By a file's identity, the digest of what was read of it; by the digest, the version
that it told. Neither says that a file may run: that is found out anew each time.
The file is a cache. Where it is missing, damaged or cannot be written, all that is
lost is time; its directory is out of others' reach, as the copies are.
"""

import contextlib
import json
import os
import re
import threading
from collections.abc import Collection
from pathlib import Path
from typing import NamedTuple

from selfupdate.system import put_in_place

_NOT_FINDINGS = (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError)
"""What reading something else can raise."""


class Identity(NamedTuple):
    """What a file is known by without reading it; a file that is written to changes it (stat(2))."""

    device: int
    inode: int
    size: int
    modified: int
    changed: int

    @classmethod
    def of(cls, status: os.stat_result) -> "Identity":
        """Return the identity in a file's status."""
        return cls(status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns)


class Findings:
    """Digests by file, and versions by digest. Safe to use from any thread; one at a time saves or forgets."""

    def __init__(self, path: Path) -> None:
        """Keep them in the file `path`, which is read when something is looked up first."""
        self._path = path
        self._lock = threading.Lock()
        self._is_read = False
        self._is_saved = True
        self._digests: dict[tuple[str, Identity], str] = {}
        self._versions: dict[str, str] = {}

    def digest_of(self, source: Path, identity: Identity) -> str | None:
        """Return the digest of a file that has not changed since it was noted, or None."""
        self._read()
        return self._digests.get((str(source), identity))

    def version_of(self, sha256: str) -> str | None:
        """Return the version that the program with a digest told, or None."""
        self._read()
        return self._versions.get(sha256)

    def note_digest(self, source: Path, identity: Identity, sha256: str) -> None:
        """Remember what was read of a file."""
        self._digests[str(source), identity] = sha256
        self._is_saved = False

    def note_version(self, sha256: str, version: str) -> None:
        """Remember what a program told."""
        self._versions[sha256] = version
        self._is_saved = False

    def forget_all_but(self, kept: Collection[str]) -> None:
        """Forget what concerns no digest of `kept`."""
        self._read()
        known = len(self._digests) + len(self._versions)
        self._digests = {key: sha256 for key, sha256 in self._digests.items() if sha256 in kept}
        self._versions = {sha256: version for sha256, version in self._versions.items() if sha256 in kept}
        self._is_saved = self._is_saved and known == len(self._digests) + len(self._versions)

    def save(self) -> None:
        """Write down what is new, if anything is."""
        if self._is_saved:
            return
        self._is_saved = True  # or every scan would try it again
        digests = [[path, identity, sha256] for (path, identity), sha256 in self._digests.items()]
        partial = self._path.with_name(f".{self._path.name}.{os.urandom(4).hex()}.new")
        with contextlib.suppress(OSError):
            try:
                with open(os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w", encoding="ascii") as file:  # noqa: PTH123 - a descriptor
                    json.dump({"digests": digests, "versions": self._versions}, file)
                put_in_place(partial, self._path)
            finally:
                partial.unlink(missing_ok=True)

    def _read(self) -> None:
        with self._lock:
            if self._is_read:
                return
            with contextlib.suppress(*_NOT_FINDINGS):
                found = json.loads(self._path.read_bytes())
                for path, fields, sha256 in found["digests"]:
                    self._digests.setdefault((str(path), Identity(*map(int, fields))), _checked(sha256))
                for sha256, version in found["versions"].items():
                    self._versions.setdefault(_checked(sha256), str(version))
            self._is_read = True


def _checked(sha256: str) -> str:
    """Return a digest; raises ValueError where it is none, and so no name of a directory."""
    if not re.fullmatch("[0-9a-f]{64}", sha256):
        raise ValueError(sha256)
    return sha256
