"""The .exe, run by a Windows CPython under wine.

What wine lacks is not shown here: Ctrl-Break to a process group needs a console that both share, the table of who
listens on a port has no process ids, and there is no ssh-keygen.exe.
"""

from __future__ import annotations

import json
import os
import re
from typing import TYPE_CHECKING

import pytest
from load import Load
from programs import FAKES, Programs
from service import PATIENCE
from wine import WindowsService, Wine, for_windows, names, source_for_windows

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]  # the first one makes a Windows


@pytest.fixture(scope="session")
def wine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Wine]:
    """One Windows for all."""
    with Wine(tmp_path_factory.mktemp("wine")) as wine:
        yield wine


@pytest.fixture
def exe(programs: Programs, tmp_path: Path) -> Path:
    """Return version 1.0.0."""
    return for_windows(programs.version("1.0.0"), tmp_path / "built.exe")


@pytest.fixture
def start(wine: Wine, exe: Path, tmp_path: Path) -> Iterator[Callable[..., WindowsService]]:
    """Start services, each ended with the test."""
    services: list[WindowsService] = []

    def start(*flags: str) -> WindowsService:
        services.append(WindowsService(wine, exe, tmp_path, *flags))
        return services[-1]

    yield start
    for service in services:
        service.kill()


def test_it_prints_its_version_and_says_what_is_wrong(wine: Wine, exe: Path) -> None:
    """Alone on one line, with status 0; a flag that it does not know is wrong usage, 2."""
    ran = wine.run(exe, "-version")
    assert (ran.returncode, ran.stdout, ran.stderr) == (0, "1.0.0\n", "")
    ran = wine.run(exe, "-no-such-flag")
    assert (ran.returncode, ran.stdout) == (2, "")
    assert ran.stderr == "self-update: '-no-such-flag' is not a flag; -help lists the flags\n"


def test_it_starts_lists_candidates_and_stops(
    start: Callable[..., WindowsService], wine: Wine, programs: Programs
) -> None:
    """Programs are known by the end of their name; who wants it to end signals its event."""
    service = start()
    for version in ("1.1.0", "1.2.0"):
        for_windows(programs.version(version), service.upgrade_dir / f"self-update-{version}.exe")
        service.get("/candidates")  # none has to share the time for its answer with the others
    (service.upgrade_dir / "README.txt").write_text("1.9.0", encoding="utf-8")
    (service.upgrade_dir / "broken.exe").write_bytes(b"MZ no program")
    source_for_windows("import subprocess, sys\nsys.exit('no idea')", service.upgrade_dir / "other.exe")
    listed = service.get("/candidates")
    found = {candidate["name"]: candidate["reason"] for candidate in listed["candidates"]}
    assert list(found) == ["self-update-1.2.0.exe", "self-update-1.1.0.exe", "broken.exe", "other.exe"]
    assert listed["latest"] == "self-update-1.2.0.exe"
    assert found["broken.exe"].startswith("cannot be executed on this machine: ")
    assert found["other.exe"] == "-version ended with status 1: no idea"
    status = wine.run(service.program, "-status", "-state-dir", service.state_dir)
    assert status.returncode == 0
    assert status.stdout.startswith("1.0.0 on localhost:")
    assert "an upgrade would take self-update-1.2.0.exe\n" in status.stdout
    service.ask_to_stop(service.get("/status")["pid"])
    service.wait_for_end()
    assert service.statuses[service.process.pid] == 0
    assert service.line(message="stopped")


def test_ctrl_c_on_its_console_stops_it(wine: Wine, exe: Path, tmp_path: Path) -> None:
    """The launcher waits for it, and it ends in order."""
    process, seat = wine.on_console(exe, "-dev", "-bind", "localhost:0", "-state-dir", tmp_path / "state")
    seen = b""
    with open(seat, "r+b", buffering=0) as console:  # noqa: PTH123 - a descriptor, not a path
        while b"serving" not in seen:
            seen += console.read(4096)
        console.write(b"\3")
        while b"stopped" not in seen:
            seen += console.read(4096)
    process.wait(PATIENCE)
    assert b"signal=SIGINT" in re.sub(rb"\x1b\[[0-9]*m", b"", seen)


def test_a_state_directory_has_one_service(start: Callable[..., WindowsService], wine: Wine) -> None:
    """The second one says who has it, and ends with status 1."""
    service = start()
    pid = service.get("/status")["pid"]
    ran = wine.run(service.program, "-bind", "localhost:0", "-state-dir", service.state_dir)
    assert ran.returncode == 1
    assert re.fullmatch(
        rf"self-update: the state directory \S+ is in use by process {pid}, which serves on localhost:\d+; "
        r"stop that service, or give this one a directory of its own with -state-dir\n",
        ran.stderr,
    )


def test_it_upgrades_itself_twice_and_goes_back(
    start: Callable[..., WindowsService], wine: Wine, programs: Programs
) -> None:
    """Under load, and no request is lost: the socket is shared. The file that it was started from is replaced."""
    service = start("-probation", "1s")
    address = service.address
    with Load(address) as load:
        for generation, version in enumerate(("1.1.0", "1.2.0"), 1):
            exe = for_windows(programs.version(version), service.upgrade_dir / f"self-update-{version}.exe")
            record = service.upgrade()
            assert (record["outcome"], record["to"]) == ("committed", version), record["reason"]
            status = service.status_when(lambda status: status["phase"] == "RUNNING")
            assert (status["version"], status["generation"]) == (version, generation)
            assert status["installed"] == {"version": version, "reason": None}
            assert status["trust"]["checked"] is False  # which stands in no argument and no variable
            assert service.program.read_bytes() == exe.read_bytes()
        ran = wine.run(service.program, "-rollback", "-state-dir", service.state_dir)
        assert ran.returncode == 0, ran.stdout + ran.stderr
        assert "committed: 1.2.0 -> 1.1.0" in ran.stdout
        figures = load.take()
    assert figures.versions == ["1.0.0", "1.1.0", "1.2.0"]  # in the order in which they first answered
    assert figures.answered > 0
    assert not figures.failed
    assert service.address == address
    service.ask_to_stop(service.get("/status")["pid"])
    service.wait_for_end()
    service.restart()
    assert service.get("/version") == {"version": "1.1.0"}
    beside = [path for path in service.program.parent.iterdir() if path.name.startswith("self-update")]
    assert names(beside) == ["self-update.exe"]  # what had run and been renamed away is gone


DIES_ON_TRIAL = """
import os, threading
from selfupdate import presence
health = presence.Presence.health
def answer(self):
    if self._lifecycle.phase == "TRIAL":
        threading.Timer(0.3, os._exit, [7]).start()
    return health(self)
presence.Presence.health = answer
"""
DIES_AT_ONCE = """
import sys
if sys.argv[1:] != ["-version"]:
    sys.exit(3)
"""
NEVER_STANDS_BY = """
import subprocess, sys, threading
if sys.argv[1:] != ["-version"]:
    subprocess.Popen([sys.executable, "-c", "import threading; threading.Event().wait()"])
    threading.Event().wait()
"""


@pytest.mark.parametrize(
    ("fault", "outcome", "reason"),
    [
        (DIES_AT_ONCE, "aborted", "bad.exe ended with status 3 before it stood by"),
        (NEVER_STANDS_BY, "aborted", "bad.exe did not stand by within 3 s"),
        (DIES_ON_TRIAL, "rolled-back", "bad.exe ended with status 7 on trial"),
    ],
    ids=["dies-at-once", "never-stands-by", "dies-on-trial"],
)
def test_a_bad_candidate_leaves_the_old_version(
    start: Callable[..., WindowsService], programs: Programs, exe: Path, fault: str, outcome: str, reason: str
) -> None:
    """It serves on or again, on the same port; the candidate is ended with all that it started, and remembered."""
    service = start("-probation", "5s", "-standby", "3s" if fault is NEVER_STANDS_BY else "30s")
    pid, address = service.get("/status")["pid"], service.address
    for_windows(programs.faulty("1.1.0", "bad", fault), service.upgrade_dir / "bad.exe")
    record = service.upgrade()
    assert (record["outcome"], record["reason"]) == (outcome, reason)
    status = service.get("/status")
    assert (status["version"], status["pid"], status["phase"]) == ("1.0.0", pid, "RUNNING")
    assert service.address == address
    assert service.program.read_bytes() == exe.read_bytes()
    assert service.upgrade()["outcome"] == "up-to-date"  # not a second time, unasked
    service.ask_to_stop(pid)
    service.wait_for_end()  # of all that hold its streams


def test_a_successor_ends_with_its_incumbent(start: Callable[..., WindowsService], programs: Programs) -> None:
    """One that has not taken over is killed with it, with all that it started, however the incumbent ends."""
    service = start()
    for_windows(programs.faulty("1.1.0", "bad", NEVER_STANDS_BY), service.upgrade_dir / "bad.exe")
    assert service.ask("POST", "/upgrade").status == 202
    service.line(message="started a successor")
    service.process.kill()
    service.wait_for_end()


def test_a_successor_on_trial_serves_on_without_its_incumbent(
    start: Callable[..., WindowsService], programs: Programs
) -> None:
    """From the moment at which it is asked to take over, the one lives without the other."""
    service = start("-probation", "60s")
    address = service.address
    for_windows(programs.version("1.1.0"), service.upgrade_dir / "self-update-1.1.0.exe")
    assert service.ask("POST", "/upgrade").status == 202
    service.line(phase="PROBATION")
    service.process.kill()
    service.line(message="settled", phase="RUNNING")
    status = service.survivor()
    assert (status["version"], status["generation"], service.address) == ("1.1.0", 1, address)
    (record,) = service.get("/upgrades")["upgrades"]
    assert record["outcome"] == "interrupted"


def test_a_foreign_program_takes_over(start: Callable[..., WindowsService]) -> None:
    """It knows the plain protocol alone: the port is given up before it binds it."""
    service = start("-probation", "1s")
    source = (FAKES / "plain.py").read_text(encoding="utf-8")
    for version, mode in (("2.0.0", "never serves"), ("1.5.0", "serves")):
        head = f"VERSION, MODE = {version!r}, {mode!r}\n"
        source_for_windows(head + source, service.upgrade_dir / f"plain-{version}.exe")
    record = service.upgrade("plain-2.0.0.exe")
    assert record["outcome"] == "rolled-back"
    assert record["reason"].startswith("plain-2.0.0.exe did not take over: it said so, and does not listen on ")
    answer = service.ask("POST", "/upgrade", {"name": "plain-1.5.0.exe"})
    assert answer.status == 202
    service.line(message="upgrade", outcome="committed")
    assert service.get("/version")["version"] == "1.5.0"


def test_what_a_crash_left_is_finished_by_the_next_start(
    start: Callable[..., WindowsService], programs: Programs, exe: Path
) -> None:
    """The committed version is installed, though the file runs, and then run in place of the old one."""
    service = start("-probation", "1s")
    candidate = for_windows(programs.version("1.1.0"), service.upgrade_dir / "self-update-1.1.0.exe")
    assert service.upgrade()["outcome"] == "committed"
    service.ask_to_stop(service.status_when(lambda status: status["phase"] == "RUNNING")["pid"])
    service.wait_for_end()
    service.program.write_bytes(exe.read_bytes())
    journal = service.state_dir / "journal"
    lines = [json.loads(line) for line in journal.read_bytes().splitlines()]
    assert lines.pop()["installed"] is True
    journal.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    service.restart()
    assert service.get("/version") == {"version": "1.1.0"}
    assert service.program.read_bytes() == candidate.read_bytes()
    service.ask_to_stop(service.get("/status")["pid"])
    service.wait_for_end()
    assert service.statuses[service.process.pid] == 0  # of the one that was started first


REPLACES_ITSELF = """
import os, subprocess, sys
from pathlib import Path
from selfupdate.windows import mend, put_in_place
os.chdir(sys.argv[1])
program, new = Path("program.exe"), Path("new")
with subprocess.Popen([program, "-bind", "localhost:0", "-state-dir", "s"], stderr=subprocess.PIPE) as running:
    running.stderr.readline()
    put_in_place(new, program)
    mend(program)
    print(program.read_text(), *sorted(path.suffix for path in Path().glob("program*")))
    program.unlink()
    mend(program)  # as after a crash between the two renames
    print(*sorted(path.name for path in Path().glob("program*")))
    running.kill()
mend(program)
print(*sorted(path.name for path in Path().glob("program*")))
"""


def test_a_file_that_runs_is_renamed_away_and_back_where_that_was_interrupted(wine: Wine, exe: Path) -> None:
    """Only between two renames nothing is in its place, and the file that was there still is."""
    directory = exe.parent / "installed"
    directory.mkdir()
    (directory / "program.exe").write_bytes(exe.read_bytes())
    (directory / "new").write_text("new", encoding="utf-8")
    ran = wine.python(exe, REPLACES_ITSELF.replace("sys.argv[1]", repr("Z:" + str(directory))))
    assert (ran.returncode, ran.stderr) == (0, "")
    assert ran.stdout.splitlines() == ["new .exe .old", "program.exe", "program.exe"]


def test_the_journal_is_written_anew_while_it_is_open(wine: Wine, exe: Path) -> None:
    """Windows replaces no file that is open: it is closed for that moment."""
    statements = """
from pathlib import Path
from selfupdate import journal
journal.ROTATED_AT = 2000
kept = journal.Journal(Path(PLACE))
kept.open()
kept._rotated_at = 2000
for number in range(20):
    record = kept.begin("1.0.0", "CHOOSING")
    kept.change(record.id, "STAGING", name="x" * 100)
again = journal.Journal(Path(PLACE))
again.read()
print(len(again.records()))
""".replace("PLACE", repr("Z:" + str(exe.parent / "journal")))
    ran = wine.python(exe, statements)
    assert (ran.returncode, ran.stdout, ran.stderr) == (0, "20\n", "")
    assert names(list(exe.parent.glob("*journal*"))) == ["journal"]
    assert os.stat(exe.parent / "journal").st_size < 20 * 1000  # noqa: PTH116
