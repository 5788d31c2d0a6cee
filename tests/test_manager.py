"""The service manager's side of sd_notify(3): what it hears, from whom, and when."""

from __future__ import annotations

import os
import queue
import signal
import socket
import struct
import threading
import time
from typing import TYPE_CHECKING, Self

import pytest
from programs import shell
from service import PATIENCE, Service

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from programs import Programs

pytestmark = pytest.mark.slow

Fields = dict[str, str]


class Listening:
    """A service manager that only listens."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._heard: queue.SimpleQueue[tuple[int, Fields]] = queue.SimpleQueue()
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, 1)
        self._socket.bind(str(path))
        self._thread = threading.Thread(target=self._listen)
        self._thread.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as last:
            last.sendto(b"", str(self.path))
        self._thread.join()
        self._socket.close()

    def _listen(self) -> None:
        while True:
            message, ancillary, _, _ = self._socket.recvmsg(4096, socket.CMSG_SPACE(12))
            if not message:
                return
            ((_, _, credentials),) = ancillary
            fields = dict(line.split("=", 1) for line in message.decode().split("\n"))
            self._heard.put((struct.unpack("=iII", credentials)[0], fields))

    def next(self, patience: float = PATIENCE) -> tuple[int, Fields]:
        """Return the next datagram, and who sent it, as the kernel says. Raises queue.Empty where none comes."""
        return self._heard.get(timeout=patience)

    def until(self, **wanted: str) -> list[tuple[int, Fields]]:
        """Return all that is said up to what has these fields."""
        heard = [self.next()]
        while wanted.items() - heard[-1][1].items():
            heard.append(self.next())
        return heard

    def is_silent(self, seconds: float) -> bool:
        """Tell whether nothing is said for so long."""
        try:
            self.next(seconds)
        except queue.Empty:
            return True
        return False


@pytest.fixture
def manager(tmp_path: Path) -> Iterator[Listening]:
    """Return a service manager."""
    with Listening(tmp_path / "notify") as listening:
        yield listening


@pytest.fixture
def begin(manager: Listening, programs: Programs, tmp_path: Path) -> Iterator[Callable[..., Service]]:
    """Start services under the manager."""
    services = []

    def begin(*flags: str, program: Path | None = None, **environ: str) -> Service:
        environ["NOTIFY_SOCKET"] = str(manager.path)
        flags = ("-probation", "100ms", "-drain", "2s", *flags)
        services.append(Service(program or programs.version("1.0.0"), tmp_path, *flags, environ=environ))
        return services[-1]

    yield begin
    for service in services:
        service.kill()


def test_an_upgrade_is_a_reload_of_one_process(
    begin: Callable[..., Service], manager: Listening, programs: Programs
) -> None:
    """READY, RELOADING with its time, the phases in words, READY, STOPPING: all from the process that it started."""
    service = begin()
    host, port = service.address
    assert manager.next()[1] == {"READY": "1", "STATUS": f"1.0.0 serves on {host}:{port}"}
    (service.upgrade_dir / "new").symlink_to(programs.version("1.1.0"))
    before = time.monotonic_ns() // 1000
    service.upgrade()
    heard = manager.until(READY="1")
    assert heard[0][1].keys() == {"RELOADING", "MONOTONIC_USEC"}
    assert before <= int(heard[0][1]["MONOTONIC_USEC"]) <= time.monotonic_ns() // 1000
    words = [fields["STATUS"] for _, fields in heard if "STATUS" in fields]
    assert [*dict.fromkeys(words)] == [
        "1.0.0 serves; choosing a candidate",
        "1.0.0 serves; checking 1.1.0",
        "1.0.0 serves; starting 1.1.0",
        "1.0.0 serves; testing 1.1.0",
        "1.0.0 hands over to 1.1.0",
        "1.1.0 serves on trial; 1.0.0 watches",
        "1.1.0 serves",
    ]
    os.kill(service.process.pid, signal.SIGTERM)
    heard += manager.until(STOPPING="1")
    assert {pid for pid, _ in heard} == {service.process.pid}
    service.wait_for_end()


@pytest.mark.parametrize("then", ["exit 3", "nothing is newer"])
def test_an_upgrade_that_comes_to_nothing_ends_the_reload(
    begin: Callable[..., Service], manager: Listening, then: str
) -> None:
    """READY=1 again, and the status says why."""
    service = begin()
    manager.until(READY="1")
    if then == "exit 3":
        shell(service.upgrade_dir / "bad", "2.0.0", then)
        service.upgrade()
        manager.until(RELOADING="1")
        manager.until(READY="1")
        manager.until(STATUS="1.0.0 serves; 2.0.0 failed: bad ended with status 3 before it stood by")
    else:
        assert service.upgrade()["outcome"] == "up-to-date"
        manager.until(RELOADING="1")
        manager.until(READY="1", STATUS="1.0.0 serves")


def test_the_process_to_know_is_told_where_it_changes(
    begin: Callable[..., Service], manager: Listening, programs: Programs
) -> None:
    """With `-keep-pid=false` the old process says which is the new one; from then on that speaks."""
    service = begin("-keep-pid=false")
    (service.upgrade_dir / "new").symlink_to(programs.version("1.1.0"))
    service.upgrade()
    successor = service.line(message="started a successor")["successor"]
    (*_, (sender, _)) = manager.until(MAINPID=str(successor), READY="1")
    assert sender == service.process.pid
    service.status_when(lambda status: status["pid"] == successor and status["phase"] == "RUNNING")
    os.kill(successor, signal.SIGTERM)
    (*_, (sender, _)) = manager.until(STOPPING="1")
    assert sender == successor


def test_the_watchdog_hears_of_the_loop_before_and_after_an_upgrade(
    begin: Callable[..., Service], manager: Listening, programs: Programs
) -> None:
    """A sign of life comes at least as often as it is wanted."""
    service = begin(WATCHDOG_USEC="500000")
    for version in ("1.0.0", "1.1.0"):
        if version != "1.0.0":
            (service.upgrade_dir / version).symlink_to(programs.version(version))
            service.upgrade()
            service.status_when(lambda status: (status["version"], status["phase"]) == ("1.1.0", "RUNNING"))
        for _ in range(3):
            (*_, (sender, _)) = manager.until(WATCHDOG="1")
            assert sender == service.process.pid


def test_a_loop_that_hangs_gives_no_sign_of_life(
    begin: Callable[..., Service], manager: Listening, programs: Programs
) -> None:
    """It is the accept loop itself that speaks: where it hangs, the manager hears nothing."""
    hang = """
from selfupdate import server
expire = server.Server._expire
def hang(self, now):
    expire(self, now)
    if self._thread.name == "http" and self._accepting:
        print("hangs", file=__import__("sys").stderr, flush=True)
        __import__("threading").Event().wait()
server.Server._expire = hang
"""
    service = begin(program=programs.faulty("1.0.0", "hangs", hang), WATCHDOG_USEC="200000")
    manager.until(READY="1")
    service.line(message="hangs")
    assert manager.is_silent(1.0)  # five times what it would wait
    assert service.process.poll() is None


def test_a_watchdog_of_another_process_is_none_of_ours(begin: Callable[..., Service], manager: Listening) -> None:
    """WATCHDOG_PID says whose it is (sd_watchdog_enabled(3))."""
    begin(WATCHDOG_USEC="100000", WATCHDOG_PID="1")
    manager.until(READY="1")
    assert manager.is_silent(0.5)  # ten times the interval


def test_a_hang_up_starts_an_upgrade(start: Callable[..., Service], programs: Programs) -> None:
    """SIGHUP does as `POST /upgrade` does; where nothing can be chosen, the log says why."""
    service = start("-probation", "100ms")
    service.get("/version")
    os.kill(service.process.pid, signal.SIGHUP)
    service.line(message="up to date")
    (service.upgrade_dir / "new").symlink_to(programs.version("1.1.0"))
    os.kill(service.process.pid, signal.SIGHUP)
    service.status_when(lambda status: (status["version"], status["phase"]) == ("1.1.0", "RUNNING"))
    (service.upgrade_dir / "new").unlink()
    service.upgrade_dir.rmdir()
    os.kill(service.process.pid, signal.SIGHUP)
    line = service.line(message="no upgrade")
    assert "cannot be read" in line["reason"]
