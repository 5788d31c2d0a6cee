"""Faults of disks and directories, made for real: each has its own clear error, and the service serves on."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import threading
from typing import TYPE_CHECKING

import pytest
from load import Load
from programs import Programs, shell
from service import Service

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

pytestmark = pytest.mark.slow

FLAGS = ("-probation", "100ms", "-drain", "2s")


@pytest.fixture
def mount(tmp_path: Path, tool: Callable[[str], str]) -> Iterator[Callable[..., Path]]:
    """Mount small file systems, each unmounted with the test."""
    mounted: list[Path] = []

    def mount(name: str, options: str) -> Path:
        if os.geteuid():
            message = "mounting needs root"
            pytest.fail(message) if os.environ.get("CI") else pytest.skip(message)
        where = tmp_path / name
        where.mkdir()
        subprocess.run([tool("mount"), "-t", "tmpfs", "-o", f"mode=0700,{options}", "tmpfs", where], check=True)
        mounted.append(where)
        return where

    yield mount
    for where in mounted:
        subprocess.run(["umount", "-l", where], check=True)


def _remount(where: Path, options: str) -> None:
    subprocess.run(["mount", "-o", f"remount,{options}", where], check=True)


def _fill(where: Path, left: int) -> Path:
    """Fill a file system but for `left` bytes."""
    ballast = where / "ballast"
    status = os.statvfs(where)
    with ballast.open("wb") as file, contextlib.suppress(OSError):
        file.write(b"\0" * (status.f_bavail * status.f_frsize - left))
    return ballast


@pytest.fixture
def serve(programs: Programs, tmp_path: Path) -> Iterator[Callable[..., Service]]:
    """Start services, each ended with the test."""
    with contextlib.ExitStack() as services:

        def serve(program: Path | None = None, user: int | None = None) -> Service:
            chosen = program or programs.version("1.0.0")
            return services.enter_context(Service(chosen, tmp_path, *FLAGS, user=user))

        yield serve


def test_the_disk_is_full_when_a_candidate_is_copied(
    serve: Callable[..., Service], mount: Callable[..., Path], programs: Programs
) -> None:
    """The candidate says so; no half copy stays; and with room again it is taken."""
    state = mount("state", "size=4m")
    service = serve()
    service.line(message="serving")
    ballast = _fill(state, 100_000)
    (service.upgrade_dir / "new").symlink_to(programs.version("1.1.0"))
    (candidate,) = service.get("/candidates")["candidates"]
    assert "No space left on device" in candidate["reason"]
    assert service.upgrade()["outcome"] == "up-to-date"
    releases = state / "releases"
    service.poll(lambda: list(releases.iterdir()), lambda left: len(left) == 1)  # the running one; none is looked at
    ballast.unlink()
    assert service.upgrade()["outcome"] == "committed"


def test_the_disk_is_full_when_the_journal_is_written(
    serve: Callable[..., Service], mount: Callable[..., Path], programs: Programs
) -> None:
    """The step that can't be written down is not taken."""
    state = mount("state", "size=4m")
    service = serve()
    (service.upgrade_dir / "new").symlink_to(programs.version("1.1.0"))
    assert service.get("/candidates")["latest"] == "new"
    ballast = _fill(state, 0)
    record = service.upgrade()
    assert record["outcome"] == "aborted"
    assert record["reason"].endswith("journal cannot be written: No space left on device")
    assert service.get("/status")["version"] == "1.0.0"
    ballast.unlink()
    assert service.upgrade()["outcome"] == "committed"


def test_the_disk_is_full_when_the_program_is_installed(
    serve: Callable[..., Service], mount: Callable[..., Path], programs: Programs, tmp_path: Path
) -> None:
    """The upgrade goes through, the program on disk is whole, and the status says what a restart brings."""
    home = mount("home", "size=2m")
    shutil.copy2(programs.version("1.0.0"), home / "self-update")
    (tmp_path / "self-update").symlink_to(home / "self-update")
    _fill(home, 1000)
    service = serve(program=tmp_path / "self-update")
    (service.upgrade_dir / "new").symlink_to(programs.version("1.1.0"))
    assert service.upgrade()["outcome"] == "committed"
    status = service.status_when(lambda status: status["phase"] == "RUNNING" and status["version"] == "1.1.0")
    assert status["installed"]["version"] == "1.0.0"
    assert status["installed"]["reason"].endswith("self-update cannot be replaced: No space left on device")
    assert (home / "self-update").read_bytes() == programs.version("1.0.0").read_bytes()
    assert sorted(path.name for path in home.iterdir()) == ["ballast", "self-update"]


def test_the_program_directory_cannot_be_written(
    serve: Callable[..., Service], mount: Callable[..., Path], programs: Programs, tmp_path: Path
) -> None:
    """On a read-only file system the upgrade goes through, and the next restart is announced."""
    home = mount("home", "size=2m")
    shutil.copy2(programs.version("1.0.0"), home / "self-update")
    (tmp_path / "self-update").symlink_to(home / "self-update")
    _remount(home, "ro")
    service = serve(program=tmp_path / "self-update")
    (service.upgrade_dir / "new").symlink_to(programs.version("1.1.0"))
    record = service.upgrade()
    assert (record["outcome"], record["installed"]) == ("committed", False)
    status = service.status_when(lambda status: status["phase"] == "RUNNING" and status["version"] == "1.1.0")
    assert status["installed"]["version"] == "1.0.0"
    assert status["installed"]["reason"].endswith("Read-only file system")


def test_the_program_directory_is_another_file_system(
    serve: Callable[..., Service], mount: Callable[..., Path], programs: Programs, tmp_path: Path
) -> None:
    """The file is written beside the program, where a rename is atomic; mode and owner stay."""
    home = mount("home", "size=4m")
    shutil.copy2(programs.version("1.0.0"), home / "self-update")
    (home / "self-update").chmod(0o711)
    os.chown(home / "self-update", 12, 34)
    (tmp_path / "self-update").symlink_to(home / "self-update")
    service = serve(program=tmp_path / "self-update")
    (service.upgrade_dir / "new").symlink_to(programs.version("1.1.0"))
    assert service.upgrade()["outcome"] == "committed"
    service.status_when(lambda status: (status["version"], status["phase"]) == ("1.1.0", "RUNNING"))
    assert (home / "self-update").read_bytes() == programs.version("1.1.0").read_bytes()
    status = (home / "self-update").stat()
    assert (status.st_mode & 0o7777, status.st_uid, status.st_gid) == (0o711, 12, 34)


@pytest.mark.parametrize(
    ("options", "reason"),
    [("ro", "Read-only file system"), ("noexec", "is mounted noexec. To mend it: give another one with -state-dir.")],
)
def test_a_state_directory_that_cannot_be_used(
    serve: Callable[..., Service], mount: Callable[..., Path], programs: Programs, options: str, reason: str
) -> None:
    """The service serves, upgrades are off, and each request for one is told why."""
    mount("state", f"size=4m,{options}")
    service = serve()
    (service.upgrade_dir / "new").symlink_to(programs.version("1.1.0"))
    answer = service.ask("POST", "/upgrade")
    assert answer.status == 503
    assert answer.json["detail"].startswith("Upgrades are off: ")
    assert reason in answer.json["detail"]
    assert service.get("/healthz")["status"] == "ok"
    service.line(message="upgrades are off")


def test_a_state_directory_that_becomes_read_only(
    serve: Callable[..., Service], mount: Callable[..., Path], programs: Programs
) -> None:
    """The running service serves on, the candidate says why it can't be had, and afterwards it is taken."""
    state = mount("state", "size=4m")
    service = serve()
    service.line(message="serving")
    subprocess.run(["mount", "--bind", state, state], check=True)
    _remount(state, "bind,ro")
    (service.upgrade_dir / "new").symlink_to(programs.version("1.1.0"))
    answer = service.upgrade()
    assert answer["outcome"] == "up-to-date"
    assert answer["candidates"][0]["reason"].endswith("Read-only file system")
    subprocess.run(["umount", "-l", state], check=True)  # a look ahead may be at it
    assert service.upgrade()["outcome"] == "committed"


@pytest.mark.parametrize("damage", [b'{"id": "torn', b"\xff\x00garbage\n", b'{"valid": "JSON"}\n[]\n'])
def test_a_damaged_journal_is_read_over(serve: Callable[..., Service], programs: Programs, damage: bytes) -> None:
    """What can be read is history; what can't is passed over, said in the log, and harms nothing that follows."""
    service = serve()
    shell(service.upgrade_dir / "bad", "2.0.0", "exit 3")
    first = service.upgrade()
    assert first["outcome"] == "aborted"
    service.stop()
    with (service.state_dir / "journal").open("ab") as journal:
        journal.write(damage)
    service.restart()
    service.line(message="a line of the journal is passed over")
    (service.upgrade_dir / "new").symlink_to(programs.version("1.1.0"))
    second = service.upgrade()
    assert second["outcome"] == "committed"
    service.status_when(lambda status: status["phase"] == "RUNNING" and status["version"] == "1.1.0")
    service.stop()
    service.restart()
    assert service.get("/version")["version"] == "1.1.0"
    known = [(record["id"], record["outcome"]) for record in service.get("/upgrades")["upgrades"]]
    assert known == [(second["id"], "committed"), (first["id"], "aborted")]
    listed = {candidate["name"]: candidate["reason"] for candidate in service.get("/candidates")["candidates"]}
    assert listed["bad"].startswith("failed before (bad ended with status 3")


def test_a_journal_that_belongs_to_somebody_else(serve: Callable[..., Service], tmp_path: Path) -> None:
    """The service serves without upgrades, and says which file it may not read."""
    if os.geteuid():
        pytest.skip("only root can run a service as somebody else")
    state = tmp_path / "state"
    state.mkdir()
    (state / "journal").write_bytes(b"")
    (state / "journal").chmod(0o600)
    (state / "lock").write_bytes(b"")
    for path in (state, state / "lock"):
        os.chown(path, 65534, 65534)
    for path in (tmp_path, *list(tmp_path.parents)[:3]):
        path.chmod(path.stat().st_mode | 0o755)
    service = serve(user=65534)
    answer = service.ask("POST", "/upgrade")
    assert answer.status == 503
    assert "journal cannot be read: Permission denied. To mend it: make it" in answer.json["detail"]


def test_a_candidate_that_is_exchanged_all_the_time(
    serve: Callable[..., Service], programs: Programs, tmp_path: Path
) -> None:
    """Replaced and removed as fast as possible during scans and upgrades: what runs is whole, and it serves on."""
    service = serve()
    shell(tmp_path / "bad", "1.2.0", "exit 3")
    candidate, beside = service.upgrade_dir / "it", service.upgrade_dir / ".it"
    stop = threading.Event()

    def exchange() -> None:
        while not stop.is_set():
            for source in (programs.version("1.1.0"), tmp_path / "bad", None):
                if source is None:
                    candidate.unlink()
                else:
                    os.link(source, beside)
                    beside.replace(candidate)

    thread = threading.Thread(target=exchange)
    thread.start()
    try:
        for _ in range(30):
            for listed in service.get("/candidates")["candidates"]:
                assert listed["version"] in {"1.1.0", "1.2.0", None}
        outcomes = {service.upgrade()["outcome"] for _ in range(10)}
    finally:
        stop.set()
        thread.join()
    assert outcomes <= {"up-to-date", "aborted", "committed"}
    assert service.get("/version")["version"] in {"1.0.0", "1.1.0"}
    (service.upgrade_dir / "good").symlink_to(programs.version("1.3.0"))
    assert service.upgrade("good")["outcome"] == "committed"


def test_nothing_below_the_last_blessed_version_is_chosen(serve: Callable[..., Service], programs: Programs) -> None:
    """Whoever starts an old program by accident does not go back further by an upgrade; a rollback lowers the floor."""
    service = serve()
    (service.upgrade_dir / "2.0.0").symlink_to(programs.version("2.0.0"))
    assert service.upgrade()["outcome"] == "committed"
    service.status_when(lambda status: status["phase"] == "RUNNING" and status["version"] == "2.0.0")
    service.stop()
    shutil.copy2(programs.version("1.0.0"), service.program)
    (service.upgrade_dir / "2.0.0").unlink()
    (service.upgrade_dir / "1.5.0").symlink_to(programs.version("1.5.0"))
    service.restart()
    answer = service.upgrade()
    assert answer["outcome"] == "up-to-date"
    reason = "1.5.0 is older than 2.0.0, to which this service was upgraded before"
    assert [candidate["reason"] for candidate in answer["candidates"]] == [reason]


def test_a_second_service_on_the_same_state_directory(serve: Callable[..., Service]) -> None:
    """It ends with status 1, and names the first one's process and address."""
    first = serve()
    host, port = first.address
    second = serve()
    second.wait_for_end()
    assert second.statuses[second.process.pid] == 1
    (line,) = second.lines
    assert f"is in use by process {first.process.pid}, which serves on {host}:{port}; stop that" in line["message"]
    assert first.get("/version")["version"] == "1.0.0"


SLOW_DISK = """
import os, time
fsync = os.fsync
def slow(fd):
    if os.readlink(f"/proc/self/fd/{fd}").endswith("/journal"):
        time.sleep(2)  # the fault itself
    fsync(fd)
os.fsync = slow
"""


def test_requests_do_not_wait_for_the_journal(
    programs: Programs, tmp_path: Path, figure: Callable[[str], None]
) -> None:
    """While a write takes two seconds, none of them waits for it."""
    with Service(programs.faulty("1.0.0", "slow-disk", SLOW_DISK), tmp_path, *FLAGS) as service:
        shell(service.upgrade_dir / "bad", "2.0.0", "exit 3")
        with Load(service.address) as load:
            load.take()
            service.upgrade("bad")  # five records, each two seconds
            slow = load.take()
        assert not slow.failed
        assert slow.seconds > 4  # two writes at least
        assert slow.longest_gap < 2, "a write of the journal holds the service up"
        gap = slow.longest_gap * 1000
        figure(f"the longest time without an answer while each write of the journal takes 2 s: {gap:.0f} ms")
