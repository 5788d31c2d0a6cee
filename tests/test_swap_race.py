"""A candidate that is exchanged as fast as a process can, during scans and upgrades: SECURITY.md, 11, row 34.

A process of its own puts a good program, which is signed, and an evil one, which is not, in each
other's place by rename(2). The evil one leaves a mark when it is executed in any way.
"""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
from collections import Counter
from typing import TYPE_CHECKING, Self

import pytest
from programs import shell
from service import PATIENCE, Service

from selfupdate import settings, versions
from selfupdate.candidates import Candidate, Scanner
from selfupdate.releases import Store, digest
from selfupdate.settings import Limits
from selfupdate.trust import Trust

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from programs import Programs

pytestmark = pytest.mark.slow

SCANS = 1000
UPGRADES = 50
_WITHOUT_VERDICT = {
    "signature-missing",
    "signature-changing",
    "signature-mismatch",
    "candidate-changing",
    "candidate-missing",
}

# Puts the one and the other program in the place PLACE, evil with other bytes each time, until it is told to end;
# then says how often. `signature` says what becomes of the signature. Half of the time it goes on at once, and else
# stays for as long as a scan takes, or less: else a scan would find nothing but files that change while it looks.
_EXCHANGE = """
import os, random, signal, sys, time
place, good, marker, signature = sys.argv[1:]
folder, ended, count = os.path.dirname(place), [], 0
beside, beside_signature = f"{folder}/.beside", f"{folder}/.beside.sig"
def put(source, beside, target):
    os.link(source, beside)
    os.replace(beside, target)
def stay():
    if random.random() < 0.5:
        time.sleep(0.01 * random.random() ** 3)  # the pace of the exchange: the fault itself
def put_evil():
    with open(beside, "w") as file:
        file.write(f"#!/bin/sh\\n: > {marker}\\necho 9.9.9\\n# {count}\\n")
    os.chmod(beside, 0o755)
    if signature == "exchanged":
        os.replace(f"{place}.sig", beside_signature)
        stay()
    os.replace(beside, place)
def put_good():
    if signature == "exchanged":
        os.replace(beside_signature, f"{place}.sig")
        stay()
    put(good, beside, place)
signal.signal(signal.SIGTERM, lambda *_: ended.append(True))
print("begun", flush=True)
while not ended:
    put_evil()
    count += 1
    stay()
    put_good()
    stay()
print(count)
"""


class Exchange:
    """The process that exchanges: it stands still until it is let go."""

    def __init__(self, place: Path, good: Path, marker: Path, signature: str) -> None:
        self.count = 0
        command = [sys.executable, "-ISc", _EXCHANGE, str(place), str(good), str(marker), signature]
        self._process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        assert self._process.stdout is not None
        assert self._process.stdout.readline() == "begun\n"

    def hold(self) -> None:
        """Stand still, wherever it is."""
        self._process.send_signal(signal.SIGSTOP)
        os.waitid(os.P_PID, self._process.pid, os.WSTOPPED | os.WNOWAIT)

    def go(self) -> None:
        self._process.send_signal(signal.SIGCONT)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.go()
        self._process.terminate()
        said, _none = self._process.communicate(timeout=PATIENCE)
        self.count = int(said)


class Key:
    """A key whose signatures count."""

    def __init__(self, directory: Path, program: str) -> None:
        self._program, self._key = program, directory / "key"
        subprocess.run([program, "-q", "-t", "ed25519", "-N", "", "-C", "", "-f", self._key], check=True)
        self.signers = directory / "signers"
        public = self._key.with_suffix(".pub").read_text(encoding="ascii")
        self.signers.write_text(f'alice namespaces="release@self-update" {public}', encoding="ascii")

    def sign(self, file: Path, signature: Path) -> None:
        command = [self._program, "-Y", "sign", "-f", str(self._key), "-n", "release@self-update"]
        with file.open("rb") as data, signature.open("wb") as out:
            subprocess.run(command, stdin=data, stdout=out, stderr=subprocess.DEVNULL, check=True)


@pytest.fixture
def key(tmp_path: Path, tool: Callable[[str], str]) -> Key:
    """Make a key, and the file that says that it counts."""
    return Key(tmp_path, tool("ssh-keygen"))


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """Make an upgrade directory, and say where in it the candidate is."""
    (tmp_path / "upgrades").mkdir()
    return tmp_path / "upgrades" / "app"


@pytest.fixture
def scanner(tmp_path: Path, place: Path, key: Key) -> Iterator[Callable[[], Scanner]]:
    """Make scanners that remember no version, over one store and one trust."""
    (tmp_path / "state").mkdir(mode=0o700)
    stop_out, stop_in = socket.socketpair()
    flags = ["-allowed-signers", str(key.signers), "-upgrade-dir", str(place.parent)]
    store = Store(tmp_path / "state", Limits().candidate_size)
    trust = Trust(settings.parse(flags, {"HOME": "/"}), store, stop_out.fileno())

    def make() -> Scanner:
        return Scanner(
            place.parent,
            store,
            trust,
            running=versions.parse("1.0.0"),
            running_sha256=lambda: None,
            floor=lambda: None,
            allow=None,
            fault_of=lambda _: None,
            needed=set,
            stop_fd=stop_out.fileno(),
            limits=Limits(),
        )

    with stop_out, stop_in:
        yield make


def _thought_of(candidate: Candidate, sha256: str) -> str:
    """Return what is thought of a candidate: only what is signed may have told a version."""
    if candidate.version is None:
        assert candidate.refusal is not None
        assert candidate.refusal.code in _WITHOUT_VERDICT, candidate.refusal
        return str(candidate.refusal.code)
    assert candidate.release is not None
    assert (str(candidate.version), candidate.release.sha256, candidate.refusal) == ("1.1.0", sha256, None)
    return "eligible"


each_kind = pytest.mark.parametrize("signature", ["kept", "exchanged"], ids=["candidate", "candidate-and-signature"])


@each_kind
def test_what_is_exchanged_during_scans_never_runs(
    place: Path,
    key: Key,
    scanner: Callable[[], Scanner],
    tmp_path: Path,
    figure: Callable[[str], None],
    signature: str,
) -> None:
    """Row 34. Whatever a scan finds in the place, what it asks for its version is what was signed."""
    good, marker = shell(tmp_path / "good", "1.1.0", ""), tmp_path / "ran"
    os.link(good, place)
    key.sign(good, place.with_name("app.sig"))
    sha256 = digest(good)
    found: Counter[str] = Counter()
    with Exchange(place, good, marker, signature) as exchange:
        for _ in range(SCANS // 2):
            found.update(_thought_of(candidate, sha256) for candidate in scanner().scan())
            assert not marker.exists(), found
    assert found.total() == SCANS // 2, "the place is never empty"
    assert found["eligible"]
    assert found.total() > found["eligible"]
    figure(f"{SCANS // 2} scans, evil put in place {exchange.count} times, found: {dict(found.most_common())}")


@each_kind
def test_what_is_exchanged_during_upgrades_never_runs(
    place: Path,
    key: Key,
    programs: Programs,
    tmp_path: Path,
    figure: Callable[[str], None],
    signature: str,
) -> None:
    """Row 34. Exchanged all the time, or from the moment on at which it is started: what was signed is started."""
    good, marker = shell(tmp_path / "good", "1.1.0", "exit 3"), tmp_path / "ran"
    key.sign(good, tmp_path / "good.sig")
    flags = ("-allowed-signers", str(key.signers), "-probation", "100ms", "-drain", "1s")
    ended: Counter[str] = Counter()
    with Service(programs.version("1.0.0"), tmp_path, *flags) as service:
        _put(good, place)
        with Exchange(place, good, marker, signature) as exchange:
            for number in range(UPGRADES // 2):
                if number % 2:
                    exchange.hold()
                    _put(good, place)
                ended[_upgrade(service, exchange, when="STARTING" if number % 2 else None)] += 1
                assert not marker.exists(), ended
        assert service.get("/version") == {"version": "1.0.0"}
    assert ended.keys() <= _WITHOUT_VERDICT | {"handover-died"}
    assert ended["handover-died"] >= UPGRADES // 4, "each that was exchanged from its start on was started"
    figure(f"{ended.total()} upgrades, evil put in place {exchange.count} times, ended: {dict(ended.most_common())}")


def _put(good: Path, place: Path) -> None:
    """Put the good program in its place, with its signature, wherever the exchange stands."""
    for source, target in ((good, place), (good.with_name("good.sig"), place.with_name("app.sig"))):
        beside = target.with_name(f".{target.name}.test")
        shutil.copy2(source, beside)
        beside.replace(target)


def _upgrade(service: Service, exchange: Exchange, when: str | None) -> str:
    """Ask for an upgrade, let it be exchanged from a phase on, and return the code with which it ends."""
    since = len(service.lines)
    answer = service.ask("POST", "/upgrade", {"name": "app"})
    if answer.status == 422:
        return str(answer.json["code"])
    assert answer.status == 202, answer.body
    if when is not None:
        service.line(since, upgrade=answer.json["id"], phase=when)
        exchange.go()
    service.line(since, upgrade=answer.json["id"], phase="RUNNING")
    return str(service.get(f"/upgrades/{answer.json['id']}")["code"])
