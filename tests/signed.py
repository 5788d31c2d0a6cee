"""A signed candidate with all that says whom to trust: what the service would make of it, and whether it ran."""

from __future__ import annotations

import os
import subprocess
from typing import TYPE_CHECKING

import pytest
from programs import Programs, write_program
from service import PATIENCE

from selfupdate import settings, verifier, versions
from selfupdate.candidates import Candidate, Scanner
from selfupdate.errors import TrustError
from selfupdate.journal import Journal
from selfupdate.releases import Store
from selfupdate.trust import Trust

if TYPE_CHECKING:
    from pathlib import Path


class Site:
    """An upgrade directory, whom to trust, and one candidate: what the service would make of them."""

    def __init__(self, directory: Path, stop_fd: int) -> None:
        self.directory = directory
        self.upgrades = directory / "upgrades"
        self.state = directory / "state"
        self.marker = directory / "ran"
        self.allowed = directory / "allowed_signers"
        self.revoked = directory / "revoked"
        self.keyring = directory / "keyring"
        self.candidate = self.upgrades / "app"
        self.signature = self.upgrades / "app.sig"
        self.stop_fd = stop_fd
        self.store = Store(self.state, 64 << 20)
        for path in (self.upgrades, self.state):
            path.mkdir(mode=0o700)
        write_program(self.candidate, self.program())

    def program(self, version: str = "2.0.0") -> bytes:
        """Return a program that tells by the marker that it was executed."""
        return f"#!/bin/sh\n: > {self.marker}\necho {version}\n".encode()

    @property
    def content(self) -> bytes:
        return self.candidate.read_bytes()

    def allow(self, *lines: str | bytes) -> None:
        """Write the allowed-signers file."""
        write(self.allowed, b"".join(line.encode() if isinstance(line, str) else line for line in lines))

    def trust(self, *flags: str, verify_time: float = PATIENCE) -> Trust:
        """Trust the allowed signers, and as `flags` say; or the keyring, if they name it."""
        scheme = [] if "-keyring" in flags else ["-allowed-signers", str(self.allowed)]
        given = settings.parse([*scheme, "-upgrade-dir", str(self.upgrades), *flags], {"HOME": "/"})
        settings.check(given)
        limits = given.limits._replace(verify_time=verify_time)
        return Trust(given._replace(limits=limits), self.store, self.stop_fd)

    def scanner(self, *flags: str, trust: Trust | None = None) -> Scanner:
        """Return one that has never asked the candidate anything."""
        self.store.findings.forget_all_but(())
        return Scanner(
            self.upgrades,
            self.store,
            trust or self.trust(*flags),
            running=versions.parse("1.0.0"),
            running_sha256=lambda: None,
            allow=None,
            floor=lambda: None,
            fault_of=Journal(self.directory / "journal").fault_of,
            needed=lambda: None,
            stop_fd=self.stop_fd,
            limits=settings.Limits(),
        )

    def look(self, *flags: str, scanner: Scanner | None = None) -> Candidate:
        """Return what is thought of the one candidate."""
        (candidate,) = (scanner or self.scanner(*flags)).scan()
        return candidate

    def assert_accepted(self, *flags: str, scanner: Scanner | None = None, signer: str = "alice") -> None:
        """Check that the candidate would be chosen, and has been executed."""
        said = self.look(*flags, scanner=scanner).as_json()
        assert (said["reason"], said["version"], said["signer"]) == (None, "2.0.0", signer)
        assert self.marker.exists()
        self.marker.unlink()

    def assert_refused(self, code: str, *flags: str, scanner: Scanner | None = None) -> str:
        """Check that the candidate is refused with a code, and was not executed; return the reason."""
        said = self.look(*flags, scanner=scanner).as_json()
        assert not self.marker.exists()
        assert (said["code"], said["eligible"], said["version"]) == (code, False, None), said
        return str(said["reason"])

    def assert_off(self, code: str, *flags: str) -> TrustError:
        """Check that nothing can be chosen, with a code, and nothing was executed; return the error."""
        with pytest.raises(TrustError, match=r"^Upgrades are off: ") as caught:
            self.scanner(*flags).scan()
        assert not self.marker.exists()
        assert caught.value.code == code, caught.value
        assert caught.value.remedy
        return caught.value


def write(path: Path, content: bytes) -> None:
    """Write a file that nobody else can change, whatever the umask."""
    path.write_bytes(content)
    path.chmod(0o644)


def need_root() -> None:
    if os.geteuid():
        message = "giving a file to somebody else needs root"
        pytest.fail(message) if os.environ.get("CI") else pytest.skip(message)


def run(programs: Programs, *arguments: str, environ: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    command: list[str | Path] = [programs.version("1.0.0"), *arguments]
    environ = {**os.environ, **(environ or {})}
    return subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE, env=environ, check=False)


def double(site: Site, monkeypatch: pytest.MonkeyPatch, name: str, then: str) -> Path:
    """Have a script take the place of a tool; return the file that it makes when it is started."""
    directory = site.directory / "doubles"
    directory.mkdir(exist_ok=True)
    started = site.directory / "started"
    write_program(directory / name, f"#!/bin/sh\n: > {started}\n{then}\n".encode())
    monkeypatch.setattr(verifier, "DIRECTORIES", (directory,))
    return started
