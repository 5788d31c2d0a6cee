"""Candidates: list the files in the upgrade directory, ask each its version, choose one.

Three parts: which files are candidates at all (`_look`), what a candidate says
of itself (`_ask`), and the policy, which is to take the greatest version that is
greater than the running one (`_judge`). Whatever is not chosen is listed with
the reason in words.
"""

from __future__ import annotations

import os
import shutil
import stat
import sys
import threading
from collections import deque
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from selfupdate import process
from selfupdate.errors import (
    CandidateError,
    NoSuchCandidateError,
    NotEligibleError,
    ScanError,
    VersionError,
)
from selfupdate.foreign import shown
from selfupdate.versions import Version, parse_output

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from packaging.specifiers import SpecifierSet

    from selfupdate.journal import Record
    from selfupdate.releases import Release, Store
    from selfupdate.settings import Limits

_NOT_CANDIDATES = (".part", ".tmp", ".new", ".sig", ".asc", ".minisig", "~")
_WINDOWS_PROGRAMS = (".exe", ".com", ".bat", ".cmd")

# What a candidate sees of this process's environment when it is asked for its version: nothing.
_CLEAN_ENVIRONMENT = {
    "PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
    "LANG": "C.UTF-8",
    "LC_ALL": "C.UTF-8",
    "TZ": "UTC",
    "PYTHONNOUSERSITE": "1",
    "PYTHONDONTWRITEBYTECODE": "1",
}


@dataclass(frozen=True)
class Candidate:
    """One file of the upgrade directory, and what is thought of it."""

    name: str
    version: Version | None = None
    release: Release | None = None
    reason: str | None = "was not looked at"
    """Why it is not chosen; None for the one that would be."""
    eligible: bool = False

    def as_json(self) -> dict[str, object]:
        """Return the candidate as the HTTP interface shows it."""
        return {
            "name": shown(self.name),
            "version": str(self.version) if self.version else None,
            "sha256": self.release.sha256 if self.release else None,
            "signer": None,
            "eligible": self.eligible,
            "reason": self.reason,
        }


class Scanner:
    """Looks into the upgrade directory. Safe to use from any thread; one scan runs at a time."""

    def __init__(  # noqa: PLR0913 - each is a noun of its own, given once by the composition root
        self,
        directory: Path,
        store: Store,
        *,
        running: Version,
        floor: Callable[[], Version | None],
        allow: SpecifierSet | None,
        fault_of: Callable[[str], Record | None],
        needed: Callable[[], set[str] | None],
        fault: str | None = None,
        stop_fd: int,
        limits: Limits,
    ) -> None:
        """Scan `directory` for what is greater than `running`, and not below the `floor`.

        `fault_of` tells which release failed before, `needed` which must stay in the store, and `fault`
        why nothing can be chosen at all. A scan ends when `stop_fd` becomes readable.
        """
        self._directory = directory
        self._store = store
        self._running = running
        self._allow = allow
        self._floor = floor
        self._fault_of = fault_of
        self._stop_fd = stop_fd
        self._needed = needed
        self._fault = fault
        self._limits = limits
        self._lock = threading.Lock()
        self._versions: dict[str, Version | str] = {}
        """What each digest answered to `-version`, or why it is no candidate."""

    def scan(self, *, retry: bool = False) -> list[Candidate]:
        """Return every candidate, the one that would be chosen first; then by version, greatest first.

        Answers to `-version` are remembered; with `retry`, failures are asked again.
        Raises ScanError where the directory can't be read, StopRequestedError when the process is to stop.
        """
        if self._fault is not None:
            raise ScanError(f"Upgrades are off: {self._fault}.")
        with self._lock:
            if retry:
                self._versions = {key: value for key, value in self._versions.items() if isinstance(value, Version)}
            found = self._examine(self._names())
            self._prune(found)
        found.sort(key=lambda candidate: candidate.name)
        found.sort(key=lambda candidate: (candidate.version is not None, candidate.version), reverse=True)
        return self._rank(found)

    def _prune(self, found: list[Candidate]) -> None:
        needed = self._needed()
        if needed is not None:
            self._store.prune(needed | {candidate.release.sha256 for candidate in found if candidate.release})

    def choose(self, name: str | None = None) -> Candidate | None:
        """Return the candidate to upgrade to, or None where nothing is newer.

        With `name`, that one, and one that failed before is not passed over. Raises
        NoSuchCandidateError, NotEligibleError or ScanError.
        """
        candidates = self.scan(retry=True)
        if name is None:
            return next((candidate for candidate in candidates if candidate.eligible), None)
        named = next((candidate for candidate in candidates if shown(candidate.name) == name), None)
        if named is None:
            raise NoSuchCandidateError(f"{shown(name)} is not in {self._directory}; GET /candidates lists what is.")
        named = self._judge(replace(named, reason=None), by_name=True) if named.version else named
        if not named.eligible:
            raise NotEligibleError(f"{shown(name)} cannot be upgraded to: {named.reason}.")
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

    def _examine(self, names: list[str]) -> list[Candidate]:
        """Look at each file, several at a time."""
        waiting = deque(names)
        found: list[Candidate] = []
        failures: list[BaseException] = []

        def work() -> None:
            while True:
                try:
                    name = waiting.popleft()
                except IndexError:
                    return
                try:
                    candidate = self._look(name)
                except BaseException as error:  # noqa: BLE001 - raised below, in the thread that asked
                    failures.append(error)
                    return
                if candidate is not None:
                    found.append(candidate)

        threads = [
            threading.Thread(target=work, name="scan") for _ in range(min(len(names), self._limits.version_runs))
        ]
        for thread in threads[1:]:
            thread.start()
        work()  # this thread takes part: one candidate needs no other
        for thread in threads[1:]:
            thread.join()
        if failures:
            raise failures[0]
        return found

    def _look(self, name: str) -> Candidate | None:
        """Return the candidate `name`, or None where it is none."""
        release = None
        try:
            path = self._directory / name
            try:
                status = path.stat()
            except OSError:
                return None  # removed meanwhile, or a link to nowhere
            if not stat.S_ISREG(status.st_mode):
                return None
            if sys.platform != "win32" and not status.st_mode & 0o111:
                raise CandidateError("is not executable; chmod +x makes it a candidate")
            if not status.st_size:
                raise CandidateError("is empty")
            release = self._store.stage(path)
            return self._judge(Candidate(name, self._version(release), release, None))
        except CandidateError as error:
            return Candidate(name, None, release, str(error))

    def _version(self, release: Release) -> Version:
        answer = self._versions.get(release.sha256)
        if answer is None:
            try:
                answer = self._ask(release)
            except CandidateError as error:
                answer = str(error)
            self._versions[release.sha256] = answer
        if isinstance(answer, str):
            raise CandidateError(answer)
        return answer

    def _ask(self, release: Release) -> Version:
        """Run `<release> -version`. Raises CandidateError where it does not answer with a version."""
        try:
            directory = self._store.scratch()
        except OSError as error:
            raise CandidateError(f"cannot be asked for its version: {error.strerror}") from error
        try:
            output = process.capture(
                [str(release.path), "-version"],
                {**_CLEAN_ENVIRONMENT, "HOME": str(directory)},
                directory,
                time_limit=self._limits.version_time,
                size_limit=self._limits.version_output,
                stop_fd=self._stop_fd,
            )
        except OSError as error:
            why = error.strerror or str(error)
            raise CandidateError(f"cannot be executed on this machine: {why}") from error
        except process.TooSlowError:
            raise CandidateError(f"did not answer -version within {self._limits.version_time:g} s") from None
        except process.TooMuchOutputError:
            raise CandidateError(f"answered -version with more than {self._limits.version_output} bytes") from None
        except process.LeftProcessesError:
            raise CandidateError("answered -version and left a process behind") from None
        finally:
            shutil.rmtree(directory, ignore_errors=True)
        if output.status:
            raise CandidateError(f"-version {process.ending(output.status)}{_last_words(output.stderr)}")
        try:
            return parse_output(output.stdout)
        except VersionError as error:
            raise CandidateError(f"-version {error}") from None

    def _judge(self, candidate: Candidate, *, by_name: bool = False) -> Candidate:
        """Say whether a candidate that told its version may be chosen."""
        assert candidate.version is not None
        assert candidate.release is not None
        reason = None
        failed = self._fault_of(candidate.release.sha256)
        floor = self._floor()
        if candidate.version == self._running:
            reason = f"{candidate.version} is the version that runs"
        elif candidate.version < self._running:
            reason = f"{candidate.version} is older than {self._running}, which runs"
        elif floor is not None and candidate.version < floor:
            reason = f"{candidate.version} is older than {floor}, to which this service was upgraded before"
        elif self._allow is not None and not candidate.version.allowed_by(self._allow):
            reason = f"{candidate.version} is not allowed by -allow {self._allow}"
        elif failed is not None and not by_name:
            reason = f"{_history_of(failed)}; ask for it by name to try it again"
        return replace(candidate, reason=reason, eligible=reason is None)

    def _rank(self, candidates: list[Candidate]) -> list[Candidate]:
        """Give each eligible candidate but the first the reason why it is not chosen."""
        best = next((candidate for candidate in candidates if candidate.eligible), None)
        if best is None:
            return candidates
        others = [
            replace(candidate, reason=f"{best.version} is chosen before it") if candidate.eligible else candidate
            for candidate in candidates
            if candidate is not best
        ]
        return [best, *others]


def _is_name_of_candidate(name: str) -> bool:
    if name.startswith(".") or name.endswith(_NOT_CANDIDATES):
        return False
    return sys.platform != "win32" or name.lower().endswith(_WINDOWS_PROGRAMS)


def _history_of(failed: Record) -> str:
    if failed.kind == "rollback" and failed.outcome == "committed":
        return f"was rolled back from at {failed.ended_at}"
    return f"failed before ({failed.reason})"


def _last_words(stderr: bytes) -> str:
    last = next((line for line in reversed(stderr.split(b"\n")) if line.strip()), b"")
    return f": {shown(last.strip(), 200)}" if last else ""
