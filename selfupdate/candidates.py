"""Candidates: list the files in the upgrade directory, ask each its version, choose one.

Four parts: which files are candidates at all (`_look`), whether one may be
executed (`trust`), what it says of itself (`_ask`), and the policy, which is to
take the greatest version that is greater than the running one (`_judge`).
Whatever is not chosen is listed with the reason in words, a code, and a remedy
where there is one.
"""

import contextlib
import os
import re
import stat
import threading
import time
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from selfupdate import process, signature, system, trust
from selfupdate.errors import (
    CandidateError,
    NoSuchCandidateError,
    NotEligibleError,
    ScanError,
    StateError,
    VersionError,
)
from selfupdate.findings import Identity
from selfupdate.foreign import shown
from selfupdate.journal import Record
from selfupdate.releases import Store
from selfupdate.settings import Limits
from selfupdate.trust import Reading, Trust
from selfupdate.versions import Specifiers, Version, parse, parse_output

_NOT_CANDIDATES = (".part", ".tmp", ".new", ".sig", ".asc", ".minisig", "~")

# What a candidate sees of this process's environment when it is asked for its version: nothing.
_CLEAN_ENVIRONMENT = {**system.CLEAN_ENVIRONMENT, "PYTHONNOUSERSITE": "1", "PYTHONDONTWRITEBYTECODE": "1"}


class Candidate(NamedTuple):
    """One file of the upgrade directory, and what is thought of it."""

    name: str
    version: Version | None = None
    release: trust.Release | None = None
    refusal: CandidateError | None = None
    """Why it is not chosen; None for the one that would be."""

    @property
    def eligible(self) -> bool:
        """Whether it would be chosen."""
        return self.refusal is None

    def as_json(self) -> dict[str, object]:
        """Return the candidate as the HTTP interface shows it."""
        return {
            "name": shown(self.name),
            "version": str(self.version) if self.version else None,
            "sha256": self.release.sha256 if self.release else None,
            "signer": signature.names(self.release.signers) if self.release else None,
            "eligible": self.eligible,
            "reason": str(self.refusal) if self.refusal else None,
            "code": self.refusal.code if self.refusal else None,
            "remedy": self.refusal.remedy if self.refusal else None,
        }


class _LeftError(Exception):
    """Nobody looks ahead any more."""


class Scanner:
    """Looks into the upgrade directory. Safe to use from any thread; one scan runs at a time."""

    def __init__(  # noqa: PLR0913 - each is a noun of its own, given once by the composition root
        self,
        directory: Path,
        store: Store,
        trust: Trust,
        *,
        running: Version,
        running_sha256: Callable[[], str | None],
        floor: Callable[[], Version | None],
        allow: Specifiers | None,
        fault_of: Callable[[str], Record | None],
        needed: Callable[[], set[str] | None],
        fault: StateError | None = None,
        stop_fd: int,
        limits: Limits,
    ) -> None:
        """Scan `directory` for what `trust` lets run, is greater than `running`, and not below the `floor`.

        `fault_of` tells which release failed before, `needed` which must stay in the store, and `fault`
        why nothing can be kept there at all. A scan ends when `stop_fd` becomes readable.
        """
        self._directory = directory
        self._store = store
        self._trust = trust
        self._running = running
        self._running_sha256 = running_sha256
        self._allow = allow
        self._floor = floor
        self._fault_of = fault_of
        self._stop_fd = stop_fd
        self._needed = needed
        self._fault = fault
        self._limits = limits
        self._lock = threading.Lock()
        self.last: list[Candidate] | None = None
        """What the last scan of this process returned; None before the first."""
        self._versions: dict[str, Version] = {}
        """What each digest answered to `-version`."""
        self._failures: dict[str, tuple[float, CandidateError]] = {}
        """Why it is no candidate, and when that was found."""

    def scan(self, *, retry: bool = False) -> list[Candidate]:
        """Return every candidate, the one that would be chosen first; then by version, greatest first.

        Answers to `-version` are remembered; with `retry`, failures are asked again that were found before.
        Raises ScanError where the directory can't be read or nothing can be trusted, StopRequestedError when
        the process is to stop.
        """
        if self._fault is not None:
            raise ScanError(f"Upgrades are off: {self._fault}.", self._fault.code, self._fault.remedy)
        asked = time.monotonic()
        trusted = self._trust.read()
        with self._lock:
            if retry:  # another scan may have ended just now, which this one waited for
                self._failures = {key: value for key, value in self._failures.items() if value[0] >= asked}
            return self._scan(trusted)

    def look_ahead(self, may: Callable[[], bool]) -> None:
        """Find out what `scan` would, and remember it, as long as that may be. Raises what `scan` does."""
        trusted = self._trust.read()
        with self._lock, contextlib.suppress(_LeftError):
            self._scan(trusted, may)

    def _scan(self, trusted: Reading, may: Callable[[], bool] = lambda: True) -> list[Candidate]:
        found = self._examine(self._names(), trusted, may)
        self._prune(found)
        self._store.findings.save()
        digests = {candidate.release.sha256 for candidate in found if candidate.release}
        self._versions = {sha256: version for sha256, version in self._versions.items() if sha256 in digests}
        self._failures = {sha256: failure for sha256, failure in self._failures.items() if sha256 in digests}
        found.sort(key=lambda candidate: candidate.name)
        found.sort(key=lambda candidate: (candidate.version is not None, candidate.version), reverse=True)
        self.last = self._rank(found)
        return self.last

    def _prune(self, found: list[Candidate]) -> None:
        needed = self._needed()
        if needed is not None:
            self._store.prune(needed | {candidate.release.sha256 for candidate in found if candidate.release})

    def choose(self, name: str | None = None) -> Candidate | None:
        """Return the candidate to upgrade to, or None where nothing is newer.

        With `name`, that one, and one that failed before is not passed over. Raises
        NoSuchCandidateError, NotEligibleError or ScanError.
        """
        self._trust.warn()
        candidates = self.scan(retry=True)
        if name is None:
            return next((candidate for candidate in candidates if candidate.eligible), None)
        named = next((candidate for candidate in candidates if shown(candidate.name) == name), None)
        if named is None:
            raise NoSuchCandidateError(f"{shown(name)} is not in {self._directory}; GET /candidates lists what is.")
        named = self._judge(named, by_name=True) if named.version else named
        if named.refusal is not None:
            why = f"{shown(name)} cannot be upgraded to: {named.refusal}."
            raise NotEligibleError(why, named.refusal.code, named.refusal.remedy)
        return named

    def _names(self) -> list[str]:
        try:
            names = sorted(name for name in os.listdir(self._directory) if _is_name_of_candidate(name))  # noqa: PTH208 - names, not paths
        except OSError as error:
            raise ScanError(
                f"The upgrade directory {self._directory} cannot be read: {error.strerror}. "
                f"Make it (mkdir -p), or give another one with -upgrade-dir."
            ) from error
        if len(names) > self._limits.candidates:
            raise ScanError(
                f"The upgrade directory {self._directory} has {len(names)} files; "
                f"at most {self._limits.candidates} are looked at. Remove old ones."
            )
        return names

    def _examine(self, names: list[str], trusted: Reading, may: Callable[[], bool]) -> list[Candidate]:
        """Look at each file, as long as that may be; at several at a time, where that takes other programs."""
        paths = [(path, self._recall(path)) for path in map(self._directory.joinpath, names)]
        unknown = sum(status is None for _, status in paths)
        # First what takes long: by its end the others may have changed.
        paths.sort(key=lambda known: known[1] is not None)
        waiting = deque((path, None if unknown else status) for path, status in paths)
        found: list[Candidate] = []
        failures: list[BaseException] = []

        def work() -> None:
            while True:
                try:
                    path, status = waiting.popleft()
                except IndexError:
                    return
                try:
                    if not may():
                        raise _LeftError
                    candidate = self._look(path, status, trusted)
                except BaseException as error:  # noqa: BLE001 - raised below, in the thread that asked
                    failures.append(error)
                    return
                if candidate is not None:
                    found.append(candidate)

        threads = [threading.Thread(target=work, name="scan") for _ in range(min(unknown, self._limits.version_runs))]
        for thread in threads[1:]:
            thread.start()
        work()  # this thread takes part: one candidate needs no other
        for thread in threads[1:]:
            thread.join()
        if failures:
            raise failures[0]
        return found

    def _recall(self, path: Path) -> os.stat_result | None:
        """Return the status of a file of which neither a copy nor a question is needed to know what it is."""
        try:
            status = path.stat()
        except OSError:
            return None
        sha256 = self._store.findings.digest_of(path, Identity.of(status))
        if sha256 is None:
            return None
        is_known = sha256 in self._versions or sha256 in self._failures
        return status if is_known or self._store.findings.version_of(sha256) is not None else None

    def _look(self, path: Path, status: os.stat_result | None, trusted: Reading) -> Candidate | None:
        """Return what `path` is, if it is a candidate. Nothing is executed before it is verified.

        Its `status` need not be asked for anew where it has just been seen.
        """
        name, release = path.name, None
        try:
            status = status or path.stat()
        except OSError:
            return None  # removed meanwhile, or a link to nowhere
        if not stat.S_ISREG(status.st_mode):
            return None
        try:
            check_file(name, status, self._limits)
            trusted.examine(path)
            release = trusted.verify(self._store.stage(path, status))
            return self._judge(Candidate(name, self._version(release), release))
        except CandidateError as error:
            # What was raised is kept, perhaps for long, and raised again: without the frames that it came through.
            return Candidate(name, None, release, error.with_traceback(None))

    def _version(self, release: trust.Release) -> Version:
        if release.sha256 in self._failures:
            raise self._failures[release.sha256][1]
        answer = self._versions.get(release.sha256) or self._told_before(release)
        if answer is None:
            try:
                answer = self._ask(release)
            except CandidateError as error:
                self._failures[release.sha256] = (time.monotonic(), error)
                raise
            self._store.findings.note_version(release.sha256, str(answer))
        self._versions[release.sha256] = answer
        return answer

    def _told_before(self, release: trust.Release) -> Version | None:
        """Return what it told another process of this service."""
        try:
            return parse(self._store.findings.version_of(release.sha256) or "")
        except VersionError:
            return None

    def _ask(self, release: trust.Release) -> Version:
        """Run `<release> -version`. Raises CandidateError where it does not answer with a version."""
        try:
            with self._store.scratch() as home:
                output = self._run(release, home)
        except OSError as error:
            raise CandidateError(f"cannot be asked for its version: {error.strerror}", "staging-full") from error
        if output.status:
            code = "version-signal" if output.status < 0 else "version-exit"
            raise CandidateError(f"-version {process.ending(output.status)}{_last_words(output.stderr)}", code)
        try:
            return parse_output(output.stdout)
        except VersionError as error:
            raise CandidateError(f"-version {error}", "version-unreadable") from None

    def _run(self, release: trust.Release, home: Path) -> process.Output:
        """Run it with a home of its own. Raises CandidateError where it comes to no end, or to a bad one."""
        try:
            return process.capture(
                release.command("-version"),
                {**_CLEAN_ENVIRONMENT, "HOME": str(home)},
                home,
                time_limit=self._limits.version_time,
                size_limit=self._limits.version_output,
                stop_fd=self._stop_fd,
                mark=f"HOME={home}",
            )
        except OSError as error:
            why = error.strerror or str(error)
            raise CandidateError(f"cannot be executed on this machine: {why}", "cannot-execute") from error
        except process.TooSlowError:
            why = f"did not answer -version within {self._limits.version_time:g} s"
            raise CandidateError(why, "version-timeout") from None
        except process.TooMuchOutputError:
            why = f"answered -version with more than {self._limits.version_output} bytes"
            raise CandidateError(why, "version-too-much-output") from None
        except process.LeftProcessesError:
            raise CandidateError("answered -version and left a process behind", "version-left-processes") from None

    def _judge(self, candidate: Candidate, *, by_name: bool = False) -> Candidate:
        """Say whether a candidate that told its version may be chosen."""
        version, release = candidate.version, candidate.release
        assert version is not None
        assert release is not None
        failed = self._fault_of(release.sha256)
        floor = self._floor()
        refusal = None
        if version == self._running:
            refusal = self._same_version(version, release)
        elif version < self._running:
            refusal = CandidateError(f"{version} is older than {self._running}, which runs", "too-old")
        elif floor is not None and version < floor:
            why = f"{version} is older than {floor}, to which this service was upgraded before"
            refusal = CandidateError(why, "too-old")
        elif self._allow is not None and version not in self._allow:
            code = "pre-release" if version.is_prerelease else "not-allowed-version"
            refusal = CandidateError(f"{version} is not allowed by -allow {self._allow}", code)
        elif failed is not None and not by_name:
            refusal = CandidateError(_history_of(failed), "blocked", "ask for it by name to try it again")
        return candidate._replace(refusal=refusal)

    def _same_version(self, version: Version, release: trust.Release) -> CandidateError:
        if self._running_sha256() in {None, release.sha256}:
            return CandidateError(f"{version} is the version that runs", "same-version")
        why = f"{version} is the version that runs, and this file has another content"
        return CandidateError(why, "same-version-other-content", "give what has changed a version of its own")

    def _rank(self, candidates: list[Candidate]) -> list[Candidate]:
        """Give each eligible candidate but the first the reason why it is not chosen."""
        best = next((candidate for candidate in candidates if candidate.eligible), None)
        if best is None:
            return candidates
        others = [
            candidate._replace(refusal=CandidateError(f"{best.version} is chosen before it", "not-greatest"))
            if candidate.eligible
            else candidate
            for candidate in candidates
            if candidate is not best
        ]
        return [best, *others]


def check_file(name: str, status: os.stat_result, limits: Limits) -> None:
    """Refuse what can be told of a file from outside. Raises CandidateError."""
    if not re.fullmatch("[A-Za-z0-9][A-Za-z0-9._+-]{0,127}", name):
        raise CandidateError(
            "has an odd name", "candidate-odd-name", "rename it, with letters, digits and . _ + - alone"
        )
    if not status.st_mode & 0o111:  # which on Windows the end of the name says
        raise CandidateError("is not executable", "candidate-not-executable", f"chmod +x {name}")
    if status.st_mode & (stat.S_ISUID | stat.S_ISGID):
        raise CandidateError("is setuid or setgid", "candidate-setuid", f"chmod ug-s {name}")
    if not status.st_size:
        raise CandidateError("is empty", "candidate-empty")
    if status.st_size > limits.candidate_size:
        raise CandidateError(
            f"has {status.st_size} bytes; at most {limits.candidate_size} are taken", "candidate-too-big"
        )


def _is_name_of_candidate(name: str) -> bool:
    is_hidden = name.startswith(".") or name.endswith(_NOT_CANDIDATES)
    return not is_hidden and name.lower().endswith(system.PROGRAM_SUFFIXES)


def _history_of(failed: Record) -> str:
    if failed.kind == "rollback" and failed.outcome == "committed":
        return f"was rolled back from at {failed.ended_at}"
    return f"failed before ({failed.reason})"


def _last_words(stderr: bytes) -> str:
    last = next((line for line in reversed(stderr.split(b"\n")) if line.strip()), b"")
    return f": {shown(last.strip(), 200)}" if last else ""
