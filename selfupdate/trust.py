"""Trust: the private copy of a candidate becomes a release, which may be executed, or an error.

To hold a `Release` is the proof that it may run: whatever executes a program that
came from the upgrade directory takes one, and it is made here alone, by `verify`,
for a copy whose signatures were found good, and by `recall`, for the version to go
back to, which was verified when it was committed. (A key may have expired since,
which must not take the way back away.)

The files that say whom to trust are read anew for every scan, and again before a
release is started. A verdict is remembered for exactly what it depends on: the
content, its signature, those files, and which of the keys are valid now.
"""

import hashlib
import logging
import os
import stat
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from selfupdate import permissions, signature
from selfupdate.errors import CandidateError, StopRequestedError, TrustError
from selfupdate.journal import Record
from selfupdate.releases import Copy, Store
from selfupdate.settings import Settings
from selfupdate.signature import Signer

if TYPE_CHECKING:
    from selfupdate.verifier import Verifier

_log = logging.getLogger(__name__)

MAX_FILE = 4 * 1024 * 1024
"""Bytes of a file that says whom to trust."""

_MOST_VERDICTS = 4096
_HOW_TO_TURN_ON = (
    "give the list of those whose signatures count with -allowed-signers FILE, or -keyring FILE and -signer FINGERPRINT"
)


class Release(NamedTuple):
    """What may be executed: a private copy that was verified. Only this module makes one."""

    copy: Copy
    signers: tuple[Signer, ...]

    @property
    def path(self) -> Path:
        """Where it is."""
        return self.copy.path

    def command(self, *arguments: str) -> list[str]:
        """Return the command that executes it: nothing else has one."""
        return [str(self.path), *arguments]

    @property
    def name(self) -> str:
        """The name of the candidate that it is a copy of."""
        return self.copy.name

    @property
    def sha256(self) -> str:
        """The digest of its content."""
        return self.copy.sha256


class Root(Protocol):
    """Whom to trust, as the files said when they were read."""

    @property
    def state(self) -> bytes:
        """All that a verdict depends on, besides the file and its signature."""

    def examine(self, content: bytes, name: str) -> None:
        """Check a signature file as far as that goes without the signed file. Raises CandidateError."""

    def verify(self, path: Path, content: bytes, name: str) -> list[Signer]:
        """Return whose signatures of `path` are good, when they are enough. Raises CandidateError."""

    def fault_of(self, key: str) -> CandidateError | None:
        """Return why a key would not be trusted now, or None."""


class Scheme(Protocol):
    """A kind of signatures."""

    name: str
    suffix: str

    @property
    def files(self) -> Mapping[str, Path]:
        """The files that say whom to trust."""

    def how_to_sign(self, name: str) -> str:
        """Return the command that makes the signature of a candidate."""

    def test(self) -> None:
        """Check with a known answer that the verifier works. Raises TrustError."""

    def load(self, files: Mapping[str, bytes]) -> Root:
        """Return whom to trust. Raises TrustError where a file is not as it must be."""


class Trust:
    """Decides what may run. Safe to use from any thread."""

    def __init__(self, settings: Settings, store: Store, stop_fd: int) -> None:
        """Trust whom the settings name; a check ends when `stop_fd` becomes readable."""
        self._settings = settings
        self._scheme = _scheme_of(settings, store, stop_fd)
        self._is_tested = False
        self._lock = threading.Lock()
        self._glancing = threading.Lock()
        self._last: Reading | TrustError | None = None
        self._verdicts: dict[tuple[str, str, bytes], list[Signer] | CandidateError] = {}

    @property
    def is_on(self) -> bool:
        """Whether anything can come to be trusted."""
        return self._scheme is not None or bool(self._settings.insecure_allow_unsigned)

    def read(self) -> "Reading":
        """Read whom to trust now. Raises TrustError where nothing can be trusted."""
        if self._scheme is None:
            if not self._settings.insecure_allow_unsigned:
                raise TrustError("nothing says whose signatures count", "no-trust-root", _HOW_TO_TURN_ON)
            _check_upgrade_dir(self._settings.upgrade_dir)
            return Reading(None, None, {})
        with self._lock:
            try:
                root = self._load(self._scheme)
            except CandidateError as error:  # no verdict on a file: the verifier came to no answer at all
                raise TrustError(str(error), error.code or "", error.remedy or "") from error
            if len(self._verdicts) > _MOST_VERDICTS:
                self._verdicts = {}
            return Reading(self._scheme, root, self._verdicts)

    def _load(self, scheme: Scheme) -> Root:
        if not self._is_tested:
            scheme.test()
            self._is_tested = True
        return scheme.load({name: self._read(name, path) for name, path in scheme.files.items()})

    def confirm(self, release: Release) -> None:
        """Check that `release` would be trusted now, too. Raises TrustError or CandidateError."""
        if release.copy.source is not None:
            self.read().verify(release.copy)

    def recall(self, copy: Copy, commit: Record | None) -> Release:
        """Return the release to go back to. It was verified when it was committed, as `commit` says.

        Without a commit it is the file that the service was started from at first. Raises CandidateError
        where it was committed while signatures were not checked, and they are now.
        """
        if self._scheme is not None and commit is not None and not commit.signer:
            raise CandidateError(f"{commit.to_version} was never verified", "signature-missing")
        return Release(copy, ())

    def as_json(self, running: Record | None) -> dict[str, Any]:
        """Return how things stand, for the status; `running` is the record of the running version's commit."""
        fault: TrustError | CandidateError | None = None
        signer: dict[str, Any] | None = None
        reading = self._glance()
        if isinstance(reading, TrustError):
            fault = reading
        elif reading is not None and running is not None and running.signer:
            faults = [found for key in running.signer_keys if (found := reading.fault_of(key))]
            signer = {"name": running.signer, "reason": str(faults[0]) if faults else None}
        return {
            "scheme": self._scheme.name if self._scheme else None,
            "checked": not self._settings.insecure_allow_unsigned,
            "code": fault.code if fault else None,
            "reason": str(fault) if fault else None,
            "remedy": fault.remedy if fault else None,
            "running": signer,
        }

    def _glance(self) -> "Reading | TrustError | None":
        """Return what is read now, or, while somebody else reads, what was read last: nobody waits for a verifier."""
        if self._glancing.acquire(blocking=False):
            try:
                self._last = self.read()
            except TrustError as error:
                self._last = error
            except StopRequestedError:  # a service that ends says how things stand until it has ended
                pass
            finally:
                self._glancing.release()
        return self._last

    def warn(self) -> None:
        """Log that signatures are not checked, if they are not."""
        if self._settings.insecure_allow_unsigned:
            _log.warning("signatures are not checked: whoever can write to the upgrade directory decides what runs")

    def announce(self) -> None:
        """Log how things stand, when the service has started."""
        self.warn()
        if not self._settings.insecure_allow_unsigned and _everybody_can_write(self._settings.upgrade_dir):
            _log.warning(
                "everybody can write to the upgrade directory", extra={"directory": str(self._settings.upgrade_dir)}
            )
        try:
            self.read()
        except StopRequestedError:
            _log.debug("was told to stop before it was known whom to trust")
        except TrustError as error:
            _log.warning("upgrades are off", extra={"code": error.code, "reason": str(error), "remedy": error.remedy})

    def _read(self, name: str, path: Path) -> bytes:
        code = "revocation-unreadable" if name == "revoked" else "trust-bad"
        try:
            permissions.check(path)
            if Path(os.path.realpath(path)).is_relative_to(os.path.realpath(self._settings.upgrade_dir)):
                raise TrustError(f"{path} is in the upgrade directory", "trust-permissions", "move it elsewhere")
            with path.open("rb") as file:
                content = file.read(MAX_FILE + 1)
        except permissions.UnsafeError as error:
            raise TrustError(str(error), "trust-permissions", error.remedy) from None
        except OSError as error:
            raise TrustError(f"{path} cannot be read: {error.strerror}", code, "mend the path, or the file") from None
        if len(content) > MAX_FILE:
            raise TrustError(f"{path} has more than {MAX_FILE} bytes", code, "name a smaller file")
        return content


class Reading:
    """Whom to trust, for one scan."""

    def __init__(
        self,
        scheme: Scheme | None,
        root: Root | None,
        verdicts: dict[tuple[str, str, bytes], list[Signer] | CandidateError],
    ) -> None:
        """Trust as `root` says; without one, everything. `verdicts` are remembered ones."""
        self._scheme = scheme
        self._root = root
        self._verdicts = verdicts

    def examine(self, candidate: Path) -> None:
        """Check the signature file of a candidate as far as that goes without reading the candidate.

        Raises CandidateError.
        """
        if self._root is not None:
            path = self._signature_of(candidate)
            self._root.examine(self._content(path), path.name)

    def verify(self, copy: Copy) -> Release:
        """Return the release that a private copy is, if it is signed as it must be. Raises CandidateError."""
        if self._root is None:
            return Release(copy, ())
        assert copy.source is not None
        path = self._signature_of(copy.source)
        content = self._content(path)
        key = (copy.sha256, hashlib.sha256(content).hexdigest(), self._root.state)
        verdict = self._verdicts.get(key)
        if verdict is None:
            verdict = self._verdict(copy, content, path.name)
            self._verdicts[key] = verdict
        if isinstance(verdict, CandidateError):
            raise verdict.with_traceback(None)
        return Release(copy, tuple(verdict))

    def fault_of(self, key: str) -> CandidateError | None:
        """Return why a key would not be trusted now, or None."""
        return self._root.fault_of(key) if self._root else None

    def _verdict(self, copy: Copy, content: bytes, name: str) -> list[Signer] | CandidateError:
        assert self._root is not None
        try:
            return self._root.verify(copy.path, content, name)
        except CandidateError as error:
            if error.code and error.code.startswith("verifier-"):
                raise  # that is no verdict
            return error

    def _signature_of(self, candidate: Path) -> Path:
        assert self._scheme is not None
        return candidate.with_name(candidate.name + self._scheme.suffix)

    def _content(self, path: Path) -> bytes:
        assert self._scheme is not None
        return signature.read(path, self._scheme.how_to_sign(path.name.removesuffix(self._scheme.suffix)))


def _scheme_of(settings: Settings, store: Store, stop_fd: int) -> Scheme | None:
    def verifier(name: str, package: str) -> "Verifier":
        from selfupdate.verifier import Verifier

        return Verifier(name, package, store.scratch, stop_fd, settings.limits.verify_time)

    if settings.allowed_signers is not None:
        from selfupdate.sshsig import SshSignatures

        return SshSignatures(
            settings.allowed_signers,
            settings.revoked_keys,
            settings.sign_namespace,
            settings.signers_required,
            verifier("ssh-keygen", "openssh-client"),
        )
    if settings.keyring is not None:
        from selfupdate.openpgp import OpenPgpSignatures

        signers: Sequence[str] = settings.signer or ()
        return OpenPgpSignatures(settings.keyring, signers, settings.signers_required, verifier("gpgv", "gpgv"))
    return None


def _check_upgrade_dir(path: Path) -> None:
    """Refuse a directory into which anybody can put a program that would run unsigned."""
    if _everybody_can_write(path):
        raise TrustError(
            f"everybody can write to the upgrade directory {path}, and signatures are not checked",
            "trust-permissions",
            f"chmod o-w {path}",
        )


def _everybody_can_write(path: Path) -> bool:
    try:
        return os.name == "posix" and bool(path.stat().st_mode & stat.S_IWOTH)
    except OSError:
        return False  # the scan says what is wrong with it
