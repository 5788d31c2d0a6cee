"""What the checking of signatures costs, measured: reads of the file, and time."""

from __future__ import annotations

import itertools
import socket
import statistics
import subprocess
import time
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from programs import write_program

from selfupdate import settings, versions
from selfupdate.candidates import Scanner
from selfupdate.journal import Journal
from selfupdate.releases import Store
from selfupdate.trust import Trust

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

MIB = 1 << 20
NAMESPACE = "release@self-update"
_NUMBERS = itertools.count(1)


class Site:
    """An upgrade directory with a signing key, and a scanner that checks signatures and one that does not."""

    def __init__(self, directory: Path, stop_fd: int) -> None:
        self.key = directory / "key"
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", self.key], check=True)
        kind, key, *_ = self.key.with_suffix(".pub").read_text(encoding="ascii").split()
        signers = directory / "signers"
        signers.write_text(f'alice namespaces="{NAMESPACE}" {kind} {key}\n', encoding="ascii")
        self.upgrade_dir = directory / "upgrades"
        self.upgrade_dir.mkdir()
        self._stop_fd = stop_fd
        self.signed = self._scanner(directory / "signed", "-allowed-signers", str(signers))
        self.unsigned = self._scanner(directory / "unsigned", "-insecure-allow-unsigned")

    def _scanner(self, state: Path, *flags: str) -> Scanner:
        state.mkdir()
        given = settings.parse(flags, {"HOME": "/"})
        store = Store(state, given.limits.candidate_size)
        store.open()
        return Scanner(
            self.upgrade_dir,
            store,
            Trust(given, store, self._stop_fd),
            running=versions.parse("1.0.0"),
            running_sha256=lambda: None,
            floor=lambda: None,
            allow=None,
            fault_of=Journal(state / "journal").fault_of,
            needed=lambda: None,
            stop_fd=self._stop_fd,
            limits=given.limits,
        )

    def drop(self, size: int) -> None:
        """Put a new signed candidate there, in place of the one before."""
        head = f"#!/bin/sh\necho 2.0.0\nexit\n# {next(_NUMBERS)} ".encode()
        program = write_program(self.upgrade_dir / "new", head + b"#" * (size - len(head)))
        with program.open("rb") as content, (self.upgrade_dir / "new.sig").open("wb") as signature:
            command = ["ssh-keygen", "-q", "-Y", "sign", "-f", str(self.key), "-n", NAMESPACE]
            subprocess.run(command, stdin=content, stdout=signature, check=True)


@pytest.fixture
def site(tmp_path: Path, tool: Callable[[str], str]) -> Iterator[Site]:
    """Make a site."""
    tool("ssh-keygen")
    stop_out, stop_in = socket.socketpair()
    with stop_out, stop_in:
        yield Site(tmp_path, stop_out.fileno())


def _read_so_far() -> int:
    """Return the bytes that this process and its ended children have read (proc(5), /proc/PID/io)."""
    return int(Path("/proc/self/io").read_text(encoding="ascii").split()[1])


def test_a_candidate_is_read_at_most_twice(site: Site, figure: Callable[[str], None]) -> None:
    """Once to copy it, which gives its digest, and once by ssh-keygen."""
    site.drop(1000)
    site.signed.scan()  # the tools have been tested, and what they load was read
    site.drop(100 * MIB)
    before = _read_so_far()
    (candidate,) = site.signed.scan()
    read = (_read_so_far() - before) / (100 * MIB)
    assert (candidate.eligible, candidate.as_json()["signer"]) == (True, "alice")
    assert 1.9 < read < 2.05
    before = _read_so_far()
    assert site.signed.choose() == candidate
    assert _read_so_far() - before < MIB, "a verdict is remembered for the same content"
    figure(f"a signed candidate of 100 MiB is read {read:.2f} times")


def test_what_checking_adds(site: Site, figure: Callable[[str], None]) -> None:
    """The first look at a candidate of 200 KB, with signatures checked and without, in turn."""
    times: dict[Scanner, list[float]] = {site.signed: [], site.unsigned: []}
    for number in range(16):
        site.drop(200_000)
        for scanner, taken in times.items():
            began = time.monotonic()
            (candidate,) = scanner.scan()
            if number:  # the first one tests the tools
                taken.append(time.monotonic() - began)
            assert candidate.eligible
    signed, unsigned = (statistics.median(taken) * 1000 for taken in times.values())
    figure(
        f"the first look at a candidate of 200 KB: {signed:.1f} ms with signatures, {unsigned:.1f} ms without, "
        f"{signed - unsigned:.1f} ms more"
    )
