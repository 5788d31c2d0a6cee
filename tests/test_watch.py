"""What is dropped into the upgrade directory is known before anybody asks."""

from __future__ import annotations

import contextlib
import logging
import os
import queue
import select
import signal
import socket
import sys
import threading
from typing import TYPE_CHECKING

import pytest
from programs import write_program
from service import PATIENCE, is_zombie, wait_for_end
from signed import write

from selfupdate import watch
from selfupdate.errors import ScanError
from selfupdate.lifecycle import Event, Lifecycle, Phase
from selfupdate.watch import Watch

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterator
    from pathlib import Path

    from keys import SshKeys
    from service import Service

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="other systems do not tell")


class Asked:
    """Candidates that say by a pipe that they were asked for their version."""

    def __init__(self, path: Path) -> None:
        os.mkfifo(path)
        self._path = path
        self._fd = os.open(path, os.O_RDWR)

    def program(self, version: str, then: str = "") -> bytes:
        return f"#!/bin/sh\necho {version} $$ > {self._path}\n{then}\necho {version}\n".encode()

    def next(self) -> tuple[str, int]:
        """Wait until one was asked; return its version and its process."""
        assert select.select([self._fd], [], [], PATIENCE)[0], "nobody was asked"
        line = b""
        while not line.endswith(b"\n"):
            line += os.read(self._fd, 1)
        version, pid = line.split()
        return version.decode(), int(pid)

    def more(self) -> bool:
        """Tell whether another was asked."""
        return bool(select.select([self._fd], [], [], 0)[0])

    def close(self) -> None:
        os.close(self._fd)


@pytest.fixture
def asked(tmp_path: Path) -> Iterator[Asked]:
    """Make a pipe for candidates."""
    with contextlib.closing(Asked(tmp_path / "asked")) as asked:
        yield asked


@pytest.mark.slow
def test_a_candidate_is_asked_once_and_before_anybody_wants_to_know(
    start: Callable[..., Service], asked: Asked
) -> None:
    """One that was there at the start, and each that comes later; whoever asks is told what is known."""
    service = start()
    write_program(service.upgrade_dir / "first", asked.program("0.1.0"))
    assert asked.next()[0] == "0.1.0"
    write_program(service.upgrade_dir / "second", asked.program("0.2.0"))
    assert asked.next()[0] == "0.2.0"
    versions = {one["name"]: one["version"] for one in service.get("/candidates")["candidates"]}
    assert versions == {"first": "0.1.0", "second": "0.2.0"}
    assert service.ask("POST", "/upgrade").json["outcome"] == "up-to-date"
    assert not asked.more()


@pytest.mark.slow
def test_nothing_runs_before_its_signature_comes(
    start: Callable[..., Service], asked: Asked, ssh: SshKeys, tmp_path: Path
) -> None:
    """A signature that is dropped behind its candidate makes another look; the candidate alone runs nowhere."""
    key = ssh.key("alice")
    write(tmp_path / "signers", key.line().encode())
    service = start("-allowed-signers", str(tmp_path / "signers"))
    for name, version in (("signed", "0.1.0"), ("unsigned", "0.2.0")):
        write_program(service.upgrade_dir / name, asked.program(version))
    assert {one["code"] for one in service.get("/candidates")["candidates"]} == {"signature-missing"}
    signature = key.sign((service.upgrade_dir / "signed").read_bytes())
    (service.upgrade_dir / "signed.sig").write_bytes(signature)
    assert asked.next()[0] == "0.1.0"
    assert not asked.more()


@pytest.mark.slow
def test_a_stop_does_not_wait_for_a_look(start: Callable[..., Service], asked: Asked) -> None:
    """Nor does what was asked live on."""
    service = start()
    write_program(service.upgrade_dir / "hangs", asked.program("2.0.0", "exec sleep 1000"))
    _, pid = asked.next()
    service.process.send_signal(signal.SIGTERM)
    service.wait_for_end()
    assert service.statuses == {service.process.pid: 0}
    wait_for_end(pid)
    assert is_zombie(pid)


class Eye:
    """A watch of a directory, and each look that it takes: it goes on when it is told to."""

    def __init__(self, directory: Path, lifecycle: Lifecycle) -> None:
        self._stop_out, self._stop_in = socket.socketpair()
        self._looks: queue.SimpleQueue[bool] = queue.SimpleQueue()
        self._go_on: queue.SimpleQueue[Exception | None] = queue.SimpleQueue()
        before = set(threading.enumerate())
        Watch(directory, self._look, lifecycle, self._stop_out.fileno()).begin()
        (self.thread,) = set(threading.enumerate()) - before

    def _look(self, may: Callable[[], bool]) -> None:
        self._looks.put(may())
        if error := self._go_on.get(timeout=PATIENCE):
            raise error

    def looks(self) -> None:
        """Wait for the next look."""
        assert self._looks.get(timeout=PATIENCE)

    def go_on(self, error: Exception | None = None) -> None:
        self._go_on.put(error)

    def has_looked(self) -> bool:
        return not self._looks.empty()

    def close(self) -> None:
        self._stop_in.send(b"\0")
        self._go_on.put(None)
        self.thread.join(PATIENCE)
        for end in (self._stop_in, self._stop_out):
            end.close()


@pytest.fixture
def eye(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Eye]]:
    """Watch directories, without a pause before the first look."""
    monkeypatch.setattr(watch, "_CALM", 0.0)
    with contextlib.ExitStack() as eyes:

        def make(directory: Path, phase: Phase = Phase.RUNNING, lifecycle: Lifecycle | None = None) -> Eye:
            return eyes.enter_context(contextlib.closing(Eye(directory, lifecycle or Lifecycle(phase))))

        yield make


def test_a_burst_is_one_look(tmp_path: Path, eye: Callable[..., Eye]) -> None:
    """Whatever happens during a look makes one more, and nothing makes none."""
    watching = eye(tmp_path)
    watching.looks()
    for number in range(100):
        (tmp_path / f"a{number}").write_text("x", encoding="ascii")
        (tmp_path / f"a{number}").chmod(0o755)
        (tmp_path / f"a{number}").rename(tmp_path / f"b{number}")
    watching.go_on()
    watching.looks()
    assert not watching.has_looked()
    watching.go_on()
    (tmp_path / "b1").unlink()  # had the burst made another look, this one would not be the next
    watching.looks()
    assert not watching.has_looked()


def test_a_directory_that_comes_later(tmp_path: Path, eye: Callable[..., Eye]) -> None:
    """It is waited for, with all that is above it; and again, when it has gone."""
    directory = tmp_path / "above" / "upgrades"
    watching = eye(directory)
    for change in (directory.parent.mkdir, directory.mkdir, directory.rmdir, directory.mkdir):
        watching.looks()
        watching.go_on()
        change()
    watching.looks()
    watching.go_on()
    (directory / "candidate").write_text("x", encoding="ascii")
    watching.looks()


class Waited(Lifecycle):
    """One that tells that somebody waits for its phase."""

    def __init__(self, phase: Phase) -> None:
        super().__init__(phase)
        self.is_waited_for = threading.Event()

    def wait_for(self, phases: Collection[Phase], timeout: float | None) -> None:
        self.is_waited_for.set()
        super().wait_for(phases, timeout)


def test_nobody_looks_during_an_upgrade(tmp_path: Path, eye: Callable[..., Eye]) -> None:
    """Nor on trial: what was dropped meanwhile is looked at behind it."""
    lifecycle = Waited(Phase.TRIAL)
    watching = eye(tmp_path, lifecycle=lifecycle)
    for begin, end in ((None, Event.BLESSED), (Event.UPGRADE, Event.UP_TO_DATE)):
        if begin:
            lifecycle.step(begin)
            watching.go_on()
            (tmp_path / "candidate").write_text("x", encoding="ascii")
        assert lifecycle.is_waited_for.wait(PATIENCE)
        assert not watching.has_looked()
        lifecycle.is_waited_for.clear()
        lifecycle.step(end)
        watching.looks()


def test_what_goes_wrong_is_said_once(
    tmp_path: Path, eye: Callable[..., Eye], caplog: pytest.LogCaptureFixture
) -> None:
    """Until something else goes wrong."""
    caplog.set_level(logging.DEBUG, "selfupdate.watch")
    watching = eye(tmp_path)
    for number, why in enumerate(["no room", "no room", "no sense", "no sense"]):
        watching.looks()
        watching.go_on(ScanError(why))
        (tmp_path / f"{number}").write_text("x", encoding="ascii")
    watching.looks()
    assert [record.__dict__["reason"] for record in caplog.records] == ["no room", "no sense"]


@pytest.mark.parametrize("why", [OSError(38, "no such call"), ModuleNotFoundError("No module named '_ctypes'")])
def test_where_the_kernel_does_not_tell_there_is_one_look(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, eye: Callable[..., Eye], why: Exception
) -> None:
    """Behind the start."""

    def refuse(_: Path) -> int:
        raise why

    monkeypatch.setattr(watch, "_eye_on", refuse)
    watching = eye(tmp_path)
    watching.looks()
    watching.go_on()
    watching.thread.join(PATIENCE)
    assert not watching.thread.is_alive()
    assert not watching.has_looked()
