"""What a candidate may try, or be by accident: SECURITY.md, section 11, each row with its number.

Every candidate leaves a mark when it is executed, by more than is allowed to it; the mark must not be there.
"""

from __future__ import annotations

import ast
import contextlib
import os
import select
import shlex
import signal
import socket
import stat
import subprocess
import sys
import time
import tracemalloc
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from load import Load
from programs import Programs, shell, write_program
from service import PATIENCE, Service

from selfupdate import settings, versions
from selfupdate.candidates import Candidate, Scanner
from selfupdate.errors import NotEligibleError, ScanError, StateError
from selfupdate.journal import Journal, Record
from selfupdate.releases import Store
from selfupdate.settings import Limits
from selfupdate.trust import Trust
from selfupdate.verify import verify

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

# Rows, or the parts of rows, that other tests show: what is said of them there is not said again here.
SHOWN_ELSEWHERE = {
    29: ("test_faults.py::test_nothing_below_the_last_blessed_version_is_chosen",),  # across a restart
    34: (
        "test_swap_race.py::test_what_is_exchanged_during_scans_never_runs",
        "test_swap_race.py::test_what_is_exchanged_during_upgrades_never_runs",
    ),
    35: ("test_failures.py::test_it_goes_between_scan_and_start",),  # between the choice and the start
    38: (
        "test_candidates.py::test_what_is_no_candidate_is_not_listed",
        "test_candidates.py::test_a_symbolic_link_counts_as_its_target",
    ),
    43: ("test_candidates.py::test_an_odd_name_is_shown_escaped_and_refused",),  # without the page and the log
    47: ("test_process.py::test_capture_ends_what_left_its_group",),  # a stray that starts another
    48: ("test_candidates.py::test_a_version_is_asked_in_a_clean_place",),  # stdin, directory, environment
    50: (
        "test_failures.py::test_it_never_stands_by",
        "test_failures.py::test_it_stands_by_and_is_no_good",
        "test_failures.py::test_it_leaves_on_trial",
        "test_failures.py::test_it_dies_before_it_accepts",
    ),
    51: (
        "test_candidates.py::test_a_release_that_failed_is_passed_over",
        "test_failures.py::test_a_release_that_failed_is_not_chosen_again_until_asked_for_by_name",
    ),
    52: (
        "test_faults.py::test_the_disk_is_full_when_a_candidate_is_copied",
        "test_faults.py::test_the_disk_is_full_when_the_journal_is_written",
        "test_faults.py::test_the_disk_is_full_when_the_program_is_installed",
        "test_faults.py::test_the_program_directory_is_another_file_system",
        "test_faults.py::test_a_state_directory_that_cannot_be_used",
    ),
    53: ("test_crash.py::test_a_kill_at_any_step_leaves_something_that_works",),
    69: (
        "test_http.py::test_the_page",  # what programs say becomes no HTML
        "test_http.py::test_log_lines_are_json_and_survive_hostile_words",
        "test_transcript.py::test_both_streams_are_passed_on_and_kept",  # a successor's words in its record
        "test_transcript.py::test_a_flood_is_bounded",
    ),
    74: ("test_faults.py::test_a_second_service_on_the_same_state_directory",),
}


@pytest.mark.parametrize("row", SHOWN_ELSEWHERE)
def test_what_is_shown_elsewhere_is_there(row: int) -> None:
    """A test that this file relies on has not been renamed, or removed."""
    for where in SHOWN_ELSEWHERE[row]:
        file, _, name = where.partition("::")
        tree = ast.parse((Path(__file__).parent / file).read_text(encoding="utf-8"))
        assert name in {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}, where


class Scene:
    """An upgrade directory, and a scanner of it: the attributes are its terms."""

    def __init__(self, root: Path, stop_fd: int) -> None:
        self.root = root
        self.marker = root / "ran"
        """What a candidate makes when it does what it may not."""
        self.upgrades = root / "upgrades"
        self.upgrades.mkdir()
        (root / "state").mkdir(mode=0o700)
        self.store = Store(root / "state", Limits().candidate_size)
        self.running = "1.0.0"
        self.running_sha256: str | None = None
        self.floor: str | None = None
        self.allow: str | None = None
        self.signers: Path | None = None
        """Whose signatures count; None where none do."""
        self.limits = Limits()
        self.journal = Journal(root / "journal")
        self._stop_fd = stop_fd

    def settings(self) -> settings.Settings:
        trust = ["-allowed-signers", str(self.signers)] if self.signers else ["-insecure-allow-unsigned"]
        return settings.parse([*trust, "-upgrade-dir", str(self.upgrades)], {"HOME": "/"})

    def scanner(self) -> Scanner:
        return Scanner(
            self.upgrades,
            self.store,
            Trust(self.settings(), Store(self.root / "state", 0), self._stop_fd),
            running=versions.parse(self.running),
            running_sha256=lambda: self.running_sha256,
            floor=lambda: versions.parse(self.floor) if self.floor else None,
            allow=versions.Specifiers(self.allow) if self.allow else None,
            fault_of=self.journal.fault_of,
            needed=lambda: None,
            stop_fd=self._stop_fd,
            limits=self.limits,
        )

    def scan(self) -> dict[str, dict[str, Any]]:
        """Return what is thought of each candidate, as it is shown."""
        return {candidate.name: candidate.as_json() for candidate in self.scanner().scan()}

    def only(self) -> dict[str, Any]:
        """Return what is thought of the only candidate."""
        (listed,) = self.scan().values()
        return listed

    def refused(self) -> str:
        """Return the code for which the only candidate is refused, be it asked for by name or not."""
        listed = self.only()
        assert not listed["eligible"]
        assert listed["reason"].isprintable()
        assert self.scanner().choose() is None
        with pytest.raises(NotEligibleError) as caught:
            self.scanner().choose(listed["name"])
        assert caught.value.code == listed["code"]
        return str(listed["code"])

    def marked(self, name: str, does: str = "echo 2.0.0") -> Path:
        """Write a candidate that leaves its mark when it is executed in any way."""
        return write_program(self.upgrades / name, f"#!/bin/sh\n: > {self.marker}\n{does}\n".encode())

    def asked(self, name: str, version: str) -> Path:
        """Write a candidate that may be asked for its version, and leaves its mark when more is asked of it."""
        return shell(self.upgrades / name, version, f": > {self.marker}")

    def copies(self) -> list[str]:
        """Return what is in the store."""
        return [entry.name for entry in (self.root / "state").glob("releases/*")]


@pytest.fixture
def scene(tmp_path: Path) -> Iterator[Scene]:
    """Make the scene of a test."""
    stop_out, stop_in = socket.socketpair()
    with stop_out, stop_in:
        yield Scene(tmp_path, stop_out.fileno())


@pytest.fixture
def sign(scene: Scene, tool: Callable[[str], str]) -> Callable[[Path], Path]:
    """Let signatures count in the scene, and sign files."""
    program, key = tool("ssh-keygen"), scene.root / "key"
    subprocess.run([program, "-q", "-t", "ed25519", "-N", "", "-C", "", "-f", key], check=True)
    scene.signers = scene.root / "signers"
    public = key.with_suffix(".pub").read_text(encoding="ascii")
    scene.signers.write_text(f'alice namespaces="release@self-update" {public}', encoding="ascii")

    def sign(file: Path) -> Path:
        command = [program, "-q", "-Y", "sign", "-f", str(key), "-n", "release@self-update"]
        with file.open("rb") as data, file.with_name(f"{file.name}.sig").open("wb") as signature:
            subprocess.run(command, stdin=data, stdout=signature, stderr=subprocess.DEVNULL, check=True)
        return file

    return sign


def _ends(pid: int, seconds: float = 1.0) -> bool:
    """Tell whether a process ends within `seconds`."""
    try:
        fd = os.pidfd_open(pid)
    except ProcessLookupError:
        return True
    try:
        poll = select.poll()
        poll.register(fd, select.POLLIN)
        return bool(poll.poll(seconds * 1000))
    finally:
        os.close(fd)


def _asked_in(root: Path) -> list[int]:
    """Return the processes that are candidates which were asked for their version in a scene, or come from one."""
    found = []
    for entry in Path("/proc").iterdir():
        with contextlib.suppress(OSError):
            if entry.name.isdigit() and f"\0HOME={root}/".encode() in b"\0" + (entry / "environ").read_bytes():
                found.append(int(entry.name))
    return found


# The version, and what the policy makes of it.


def test_an_old_signed_release_under_a_greater_name(scene: Scene, sign: Callable[[Path], Path]) -> None:
    """Row 28. The version comes from the signed bytes, whatever the file is called."""
    sign(scene.asked("app-99.9.9", "0.9.0"))
    assert scene.only()["version"] == "0.9.0"
    assert scene.refused() == "too-old"
    assert not scene.marker.exists()


def test_a_version_below_the_floor(scene: Scene) -> None:
    """Row 29. What was blessed once is the least, even where an older program runs again."""
    scene.floor = "2.0.0"
    scene.asked("app", "1.5.0")
    assert scene.refused() == "too-old"
    assert not scene.marker.exists()


def test_the_same_version_with_other_bytes(scene: Scene) -> None:
    """Row 30. The running version's number on another content is no upgrade, and is said to be odd."""
    scene.running_sha256 = "0" * 64
    scene.asked("app", "1.0.0")
    assert scene.refused() == "same-version-other-content"
    scene.running_sha256 = scene.only()["sha256"]
    assert scene.refused() == "same-version"
    assert not scene.marker.exists()


def test_another_build_of_the_same_version(scene: Scene) -> None:
    """Row 31. Build metadata makes nothing newer."""
    scene.running, scene.running_sha256 = "2.0.0+build1", "0" * 64
    scene.asked("app", "2.0.0+build2")
    assert scene.refused() == "same-version-other-content"
    assert not scene.marker.exists()


@pytest.mark.parametrize("allow", [">=1", ">=1,<3", "==2.*"])
def test_a_pre_release_that_was_not_allowed(scene: Scene, allow: str) -> None:
    """Row 32. With -allow, a pre-release is taken only where a specifier names one."""
    scene.running, scene.allow = "1.9.0", allow
    scene.asked("app", "2.0.0-rc.1")
    assert scene.refused() == "pre-release"
    assert not scene.marker.exists()


@pytest.mark.parametrize("allow", [None, ">=2.0.0rc0"])
def test_a_pre_release_that_is_allowed(scene: Scene, allow: str | None) -> None:
    """Row 32. It may be chosen where nothing was said, or one was named."""
    scene.running, scene.allow = "1.9.0", allow
    scene.asked("app", "2.0.0-rc.1")
    assert scene.only()["eligible"]


@pytest.mark.parametrize(
    ("output", "code"),
    [
        (b"1!9.9\n", "version-unreadable"),
        ("٣.0.0\n".encode(), "version-unreadable"),
        (b"01.2.3\n", "version-unreadable"),
        (b"1." + b"9" * 4000 + b".0\n", "version-unreadable"),
        (b"1." + b"9" * 5000 + b".0\n", "version-too-much-output"),  # more than is read
        (b"1.2.3\n9.9.9\n", "version-unreadable"),
        (b"1.2.3\r9.9.9\n", "version-unreadable"),
        (b"1.2.3\0\n", "version-unreadable"),
        (b"\x1b[31m1.2.3\n", "version-unreadable"),
        (b"", "version-unreadable"),
        (b"1.0\n", None),
        (b"v1.2.3\n", None),
    ],
    ids=[
        *("epoch", "arabic", "leading-zero", "4000-digits", "5000-digits", "two-lines", "carriage-return", "nul"),
        *("escape", "nothing", "two-numbers", "with-v"),
    ],
)
def test_a_version_that_cannot_be_read(scene: Scene, output: bytes, code: str | None) -> None:
    """Row 33. It is refused with the reason, without an exception; two forms that people write are read."""
    scene.running = "0.1.0"
    (scene.root / "output").write_bytes(output)
    write_program(scene.upgrades / "app", f"#!/bin/sh\nexec cat {scene.root / 'output'}\n".encode())
    listed = scene.only()
    assert (listed["code"], listed["eligible"]) == (code, code is None)
    assert len(listed["reason"] or "") < 400
    assert (listed["reason"] or "").isprintable()


# The file.


class Exchanging(Store):
    """A store that puts another file in a candidate's place, just before its copy is asked for its version."""

    evil: Path
    place: Path

    @contextlib.contextmanager
    def scratch(self) -> Iterator[Path]:
        if self.evil.exists():
            self.evil.replace(self.place)
        with super().scratch() as directory:
            yield directory


def test_it_is_exchanged_when_it_has_been_verified(scene: Scene, sign: Callable[[Path], Path]) -> None:
    """Row 35. What was verified is what runs; what is there now is seen, and verified, by the next scan."""
    scene.store = store = Exchanging(scene.root / "state", Limits().candidate_size)
    store.place = sign(scene.asked("app", "1.1.0"))
    store.evil = scene.marked("evil")
    store.evil.rename(store.evil.with_name(".evil"))
    store.evil = store.evil.with_name(".evil")
    assert (scene.only()["version"], scene.only()["code"]) == ("1.1.0", "signature-mismatch")
    assert not store.evil.exists()
    assert not scene.marker.exists()


def test_files_that_are_no_programs_of_their_own(scene: Scene, sign: Callable[[Path], Path]) -> None:
    """Row 38. Links count as their targets, what is no regular file does not count, and no kind holds a scan up."""
    program = sign(shell(scene.root / "program", "1.1.0", f": > {scene.marker}"))
    for name, target in (("link", program), ("unsigned", program), ("passwd", Path("/etc/passwd")), ("loop", "loop")):
        (scene.upgrades / name).symlink_to(target)
    for name in ("link", "hard"):
        (scene.upgrades / f"{name}.sig").write_bytes((scene.root / "program.sig").read_bytes())
    (scene.upgrades / "hard").hardlink_to(program)
    (scene.upgrades / "folder").mkdir()
    os.mkfifo(scene.upgrades / "pipe", 0o777)
    if not os.geteuid():
        os.mknod(scene.upgrades / "device", stat.S_IFCHR | 0o777, os.makedev(1, 5))
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(scene.upgrades / "socket"))
        scene.scan()  # the verifier's self-test belongs to the first scan of a process
        began = time.monotonic()
        found = scene.scanner().scan()
        seconds = time.monotonic() - began
    codes = {candidate.name: candidate.as_json()["code"] for candidate in found}
    assert codes == {
        "hard": None,
        "link": "not-greatest",
        "unsigned": "signature-missing",
        "passwd": "candidate-not-executable",
    }
    assert seconds < Limits().version_time
    assert _is_copied(found[0], program)
    assert not scene.marker.exists()


def _is_copied(candidate: Candidate, program: Path) -> bool:
    """Tell whether a candidate's release is a file of its own, to which nobody else has a name."""
    assert candidate.release is not None
    status = candidate.release.path.stat()
    return status.st_ino != program.stat().st_ino and status.st_nlink == 1


@pytest.mark.parametrize("mode", [0o4755, 0o2755, 0o6711])
def test_a_setuid_file(scene: Scene, mode: int) -> None:
    """Row 39. A program that wants another account's rights is none of ours."""
    scene.marked("app").chmod(mode)
    assert scene.refused() == "candidate-setuid"
    assert scene.copies() == []
    assert not scene.marker.exists()


def test_a_file_without_the_run_bit(scene: Scene) -> None:
    """Row 40. It is passed over, and the operator is told what is missing."""
    scene.marked("app").chmod(0o644)
    assert scene.refused() == "candidate-not-executable"
    assert scene.only()["remedy"] == "chmod +x app"
    assert not scene.marker.exists()


@pytest.mark.parametrize(
    ("size", "code"),
    [(0, "candidate-empty"), (513 << 20, "candidate-too-big"), (1 << 40, "candidate-too-big")],
    ids=["empty", "513-MiB", "1-TiB"],
)
def test_the_size_of_a_file(scene: Scene, size: int, code: str) -> None:
    """Row 41. What is empty or too big is told from its size, without copying any of it."""
    with scene.marked("app").open("r+b") as file:
        file.truncate(size)
    began = time.monotonic()
    assert scene.refused() == code
    assert time.monotonic() - began < 1
    assert scene.copies() == []
    assert not scene.marker.exists()


def test_more_files_than_are_looked_at(scene: Scene) -> None:
    """Row 42. 10000 files are refused at once, with their number and the most that there may be."""
    for number in range(10_000):
        (scene.upgrades / f"app{number}").touch(0o755)
    began = time.monotonic()
    with pytest.raises(ScanError, match="has 10000 files; at most 1000 are looked at"):
        scene.scanner().scan()
    assert time.monotonic() - began < 1
    assert scene.copies() == []


def test_as_many_long_names_as_are_looked_at(scene: Scene) -> None:
    """Row 42. The longest names, as many as may be, make a list that is bounded, and nothing runs."""
    for number in range(1000):
        (scene.upgrades / (f"{number:03}" + "\x1b" * 252)).symlink_to(scene.root / "evil")
    write_program(scene.root / "evil", f"#!/bin/sh\n: > {scene.marker}\n".encode())
    listed = scene.scan().values()
    assert {candidate["code"] for candidate in listed} == {"candidate-odd-name"}
    assert len(listed) == 1000
    assert max(len(candidate["name"]) for candidate in listed) <= 1024
    assert not scene.marker.exists()


ODD_NAMES = (b"<script>alert(1)<script>", b"a\nb", b"\x1b[31mred", b"-rf", "a\u202eb".encode(), b"a\xff")


@pytest.mark.slow
def test_odd_names_on_the_page_and_in_the_log(start: Callable[..., Service], tmp_path: Path) -> None:
    """Row 43. Each is shown escaped, the page is there, and the log has a line for each, of which none is broken."""
    service = start()
    marker = tmp_path / "ran"
    evil = write_program(tmp_path / "evil", f"#!/bin/sh\n: > {marker}\necho 2.0.0\n".encode())
    for name in ODD_NAMES:
        (service.upgrade_dir / os.fsdecode(name)).symlink_to(evil)
    assert service.ask("GET", "/").status == 200
    listed = service.get("/candidates")["candidates"]
    assert {candidate["code"] for candidate in listed} == {"candidate-odd-name"}
    names = {candidate["name"] for candidate in listed}
    assert len(names) == len(ODD_NAMES)
    for name in names:
        assert name.isprintable()
        refused = service.ask("POST", "/upgrade", {"name": name})
        assert (refused.status, refused.json["code"]) == (422, "candidate-odd-name")
    service.stop()
    assert all("at" in line for line in service.lines), "a line that is no JSON"
    said = [line["reason"] for line in service.lines if line.get("outcome") == "aborted"]
    assert len(said) == len(names)
    assert not marker.exists()


@pytest.mark.slow
def test_more_files_than_are_looked_at_on_the_page(start: Callable[..., Service]) -> None:
    """Row 42. The list says so in a bounded answer, the page is there, and the service is healthy."""
    service = start()
    service.line(message="serving")
    for number in range(10_000):
        (service.upgrade_dir / f"app{number}").touch(0o755)
    for method, path in (("GET", "/candidates"), ("POST", "/upgrade")):
        answer = service.ask(method, path)
        assert (answer.status, len(answer.body) < 1000) == (503, True)
        assert "has 10000 files; at most 1000 are looked at. Remove old ones." in answer.json["detail"]
    assert service.ask("GET", "/").status == 200
    assert service.get("/healthz")["status"] == "ok"


def test_what_is_not_signed_is_not_asked_for_its_version(
    scene: Scene, sign: Callable[[Path], Path], capsys: pytest.CaptureFixture[str]
) -> None:
    """Row 44. With signers, nothing of a candidate is executed before its signature was found good."""
    app = sign(scene.marked("app"))
    with app.open("ab") as file:
        file.write(b"#")
    assert scene.refused() == "signature-mismatch"
    assert verify(scene.settings(), app) == 1
    app.with_name("app.sig").unlink()
    assert scene.refused() == "signature-missing"
    assert verify(scene.settings(), app) == 1
    assert capsys.readouterr().out.count("app would not be run: ") == 2
    assert not scene.marker.exists()


# What it does when it is asked for its version.


@pytest.mark.parametrize(
    "does",
    ["exec sleep 600", "trap '' TERM; while :; do sleep 600; done", "kill -STOP $$", "exec >&- 2>&-; exec sleep 600"],
    ids=["sleeps", "ignores-sigterm", "stops-itself", "closes-its-output"],
)
def test_it_does_not_tell_its_version_in_time(scene: Scene, does: str) -> None:
    """Row 45. It is ended at the deadline, which is 5 s, with all that it started."""
    assert Limits().version_time == 5
    scene.limits = Limits(version_time=0.3)
    write_program(scene.upgrades / "app", f"#!/bin/sh\n{does}\n".encode())
    began = time.monotonic()
    assert scene.only()["code"] == "version-timeout"
    assert time.monotonic() - began < 6
    assert all(_ends(pid) for pid in _asked_in(scene.root))


@pytest.mark.parametrize(
    ("does", "code", "version_time"),
    [("exec yes 2.0.0", "version-too-much-output", PATIENCE), ("exec cat /dev/zero >&2", "version-timeout", 0.5)],
    ids=["output", "error"],
)
def test_it_prints_without_end(scene: Scene, does: str, code: str, version_time: float) -> None:
    """Row 46. It is refused, and what it prints takes no room."""
    scene.limits = Limits(version_time=version_time)
    write_program(scene.upgrades / "app", f"#!/bin/sh\n{does}\n".encode())
    tracemalloc.start()
    try:
        assert scene.only()["code"] == code
        assert tracemalloc.get_traced_memory()[1] < 4 << 20, "bytes at the highest, of which a copy's buffer has 1 MiB"
    finally:
        tracemalloc.stop()
    assert all(_ends(pid) for pid in _asked_in(scene.root))


@pytest.mark.parametrize(
    "start",
    ["sh -c {}", "setsid sh -c {}", "setsid sh -c {} <&- >&- 2>&-", "env -i setsid sh -c {} <&- >&- 2>&-"],
    ids=["keeps-output", "own-session", "own-session-closes-output", "no-environment"],
)
def test_it_leaves_a_process_behind(scene: Scene, start: str) -> None:
    """Row 47. It is refused at once, and what it left is ended, wherever that went."""
    pid = scene.root / "pid"
    stray = shlex.quote(f"echo $$ > {pid}.new; /bin/mv {pid}.new {pid}; exec /bin/sleep 600")
    text = f"#!/bin/sh\n{start.format(stray)} &\nwhile ! [ -e {pid} ]; do :; done\necho 2.0.0\n"
    write_program(scene.upgrades / "app", text.encode())
    began = time.monotonic()
    code = scene.only()["code"]
    seconds = time.monotonic() - began
    left = int(pid.read_text(encoding="ascii"))
    try:
        assert _ends(left), "it lives on"
        assert code == "version-left-processes"
        assert seconds < Limits().version_time
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.kill(left, signal.SIGKILL)


def test_what_is_left_in_its_group_does_not_decide_by_chance(scene: Scene) -> None:
    """Row 47. Processes that hold nothing open and are of its group are ended, with the same verdict each time."""
    leaves = "for one in 1 2 3 4 5; do sleep 600 <&- >&- 2>&- & done; echo 2.0.0"
    for number in range(30):
        write_program(scene.upgrades / f"app{number}", f"#!/bin/sh\n# {number}\n{leaves}\n".encode())
    verdicts = {"left" if listed["code"] == "version-left-processes" else "fine" for listed in scene.scan().values()}
    assert all(_ends(pid) for pid in _asked_in(scene.root))
    assert len(verdicts) == 1


_LOOKS_AROUND = """
import os, resource
while resource.getrlimit(resource.RLIMIT_CORE) != (0, 0):
    pass
found = []
for fd in range(3, 1024):
    try:
        found.append(os.readlink(f"/proc/self/fd/{fd}"))
    except OSError:
        pass
open(LOG, "w").write(repr(found))
print("2.0.0")
"""


def test_it_dumps_no_core_and_has_no_descriptor_of_ours(scene: Scene, tmp_path: Path) -> None:
    """Row 48. No core is written of it, and it gets three streams and nothing else that is open here."""
    log = tmp_path / "log"
    secret = os.open(tmp_path / "secret", os.O_RDWR | os.O_CREAT, 0o600)
    os.set_inheritable(secret, True)
    head = f"#!{sys.executable} -IS\nLOG = {str(log)!r}\n"
    write_program(scene.upgrades / "app", (head + _LOOKS_AROUND).encode())
    try:
        assert scene.only()["eligible"]
    finally:
        os.close(secret)
    assert log.read_text(encoding="utf-8") == "[]"


def test_a_core_would_be_written_into_a_directory_that_is_removed(scene: Scene) -> None:
    """Row 48. What crashes is refused with its signal, and leaves nothing."""
    write_program(scene.upgrades / "app", b"#!/bin/sh\n: > core\nkill -SEGV $$\n")
    assert scene.refused() == "version-signal"
    assert scene.only()["reason"] == "-version was killed by SIGSEGV"
    assert len(scene.copies()) == 1
    assert list(scene.root.rglob("core")) == []


def _of_another_machine() -> bytes:
    """Return a real program of this machine that says that it is of another (elf(5), e_machine)."""
    content = bytearray(Path("/bin/true").read_bytes())
    assert content.startswith(b"\x7fELF")
    content[18:20] = b"\xfe\xfe"
    return bytes(content)


@pytest.mark.parametrize("kind", ["other-machine", "no-interpreter", "no-program"])
def test_it_cannot_be_executed_here(scene: Scene, kind: str) -> None:
    """Row 49. The kernel's reason is shown, and no shell tries to make something of a text."""
    content, reason = {
        "other-machine": (_of_another_machine(), "Exec format error"),
        "no-interpreter": (f"#!/nonexistent\n: > {scene.marker}\n".encode(), "No such file or directory"),
        "no-program": (f": > {scene.marker}\necho 2.0.0\n".encode(), "Exec format error"),
    }[kind]
    write_program(scene.upgrades / "app", content)
    assert scene.refused() == "cannot-execute"
    assert scene.only()["reason"] == f"cannot be executed on this machine: {reason}"
    assert not scene.marker.exists()


# What it does as a successor.

_OTHER_PROCESS = """
from selfupdate import messages, presence
presence.Presence.health = lambda self: messages.json_response({"status": "ok", "version": "2.0.0", "pid": 1})
"""
_ANSWERS_500 = """
from selfupdate import messages, presence
health = presence.Presence._health
def answer(self, request):
    if self._lifecycle.phase == "TRIAL" and "user-agent" not in request.headers:
        return messages.problem(500, "Out of order.")
    return health(self, request)
presence.Presence._health = answer
"""
_DIES_LATER = """
import os, threading
from selfupdate import presence
health = presence.Presence._health
def answer(self, request):
    if self._lifecycle.phase == "TRIAL":
        threading.Timer(0.5, os._exit, (7,)).start()
    return health(self, request)
presence.Presence._health = answer
"""


@pytest.mark.slow
def test_successors_that_are_no_good(start: Callable[..., Service], programs: Programs) -> None:
    """Rows 50 and 51. Each kind ends with its code, the old version answers throughout, and no kind is tried twice."""
    service = start("-standby", "4s", "-probation", "5s", "-drain", "5s")
    candidate = service.upgrade_dir / "app"
    kinds: dict[str, tuple[Callable[[], object], set[str]]] = {
        "never answers": (lambda: shell(candidate, "2.0.0", "exec sleep 600"), {"handover-timeout"}),
        "other process": (lambda: _faulty(programs, _OTHER_PROCESS, candidate), {"probe-other-process"}),
        "500": (lambda: _faulty(programs, _ANSWERS_500, candidate), {"trial-unhealthy"}),
        "dies": (lambda: _faulty(programs, _DIES_LATER, candidate), {"handover-died", "handover-no-answer"}),
    }
    with Load(service.address) as load:
        for kind, (put, codes) in kinds.items():
            put()
            load.take()
            record = service.upgrade("app")
            failed = load.take().failed
            assert record["code"] in codes, (kind, record)
            assert record["outcome"] == ("rolled-back" if kind in {"500", "dies"} else "aborted")
            assert kind == "dies" or not failed  # what a dead process had accepted nobody can answer
            again = service.upgrade()
            assert again["outcome"] == "up-to-date"
            assert [listed["code"] for listed in again["candidates"]] == ["blocked"]
    assert service.get("/version") == {"version": "1.0.0"}


def _faulty(programs: Programs, fault: str, candidate: Path) -> Path:
    return programs.faulty("2.0.0", "bad", fault).replace(candidate)


def test_a_release_that_failed_is_blocked(scene: Scene) -> None:
    """Row 51. Its digest is remembered, under whichever name it comes again, and a scan starts nothing."""
    scene.asked("app", "2.0.0")
    digest = scene.only()["sha256"]
    failed = Record("1", "1.0.0", "RUNNING", "", sha256=digest, outcome="rolled-back", is_fault_of_release=True)
    scene.journal.put(failed)
    (scene.upgrades / "app").rename(scene.upgrades / "other")
    for _ in range(3):
        assert scene.only()["code"] == "blocked"
        assert scene.scanner().choose() is None
    assert not scene.marker.exists()


@pytest.fixture
def mount(scene: Scene, tool: Callable[[str], str]) -> Iterator[Callable[[str], Store]]:
    """Put the scene's state directory on a small file system, which goes with the test."""
    where = scene.root / "state"

    def mount(options: str) -> Store:
        if os.geteuid():
            message = "mounting needs root"
            pytest.fail(message) if os.environ.get("CI") else pytest.skip(message)
        subprocess.run([tool("mount"), "-t", "tmpfs", "-o", f"mode=0700,{options}", "tmpfs", where], check=True)
        return scene.store

    yield mount
    if os.path.ismount(where):
        subprocess.run(["umount", "-l", where], check=True)


def test_there_is_no_room_for_a_copy(scene: Scene, mount: Callable[[str], Store]) -> None:
    """Row 52. The candidate has the code for it, and no half copy stays."""
    mount("size=64k")
    with scene.marked("app").open("ab") as file:
        file.write(b"#" * 100_000)
    assert scene.refused() == "staging-full"
    assert scene.copies() == []
    assert not scene.marker.exists()


def test_nothing_can_be_executed_in_the_state_directory(mount: Callable[[str], Store]) -> None:
    """Row 52. The store is refused with the code for it, and with what mends it."""
    store = mount("size=64k,noexec")
    with pytest.raises(StateError) as caught:
        store.open()
    assert (caught.value.code, caught.value.remedy) == ("staging-noexec", "give another one with -state-dir")


# What it says, and what it is told.


def test_what_it_says_on_standard_error(scene: Scene) -> None:
    """Row 69. Of a megabyte with all that could do harm, the reason keeps some, on one line, and escaped."""
    (scene.root / "said").write_bytes(b"\x1b[31m</script>\r\n\0\xff" * 60_000 + b"\x1b]0;</script>\x07" + b"x" * 1000)
    text = f"#!/bin/sh\ncat {scene.root / 'said'} >&2\nprintf '\\n\\033[31m</script>\\n' >&2\nexit 1\n"
    write_program(scene.upgrades / "app", text.encode())
    assert scene.refused() == "version-exit"
    reason = scene.only()["reason"]
    assert reason.startswith("-version ended with status 1: ")
    assert len(reason) < 250
    assert "\\x1b[31m</" in reason


_ROUTES = (
    "/",
    "/app.js",
    "/icon.svg",
    "/style.css",
    "/view.js",
    "/version",
    "/healthz",
    "/status",
    "/candidates",
    "/upgrades",
)


def _begun(address: tuple[str, int], request: str) -> socket.socket:
    """Return a connection on which a request has begun."""
    connection = socket.create_connection(address, PATIENCE)
    connection.sendall(f"{request} HTTP/1.1\r\nHost: localhost\r\nContent-Length: 0\r\n".encode())
    return connection


def _finish(connection: socket.socket) -> tuple[int, bytes]:
    """End the request, and return the status and the body of its answer."""
    answer = b""
    with connection:
        connection.sendall(b"\r\n")
        while chunk := connection.recv(65536):
            answer += chunk
    return int(answer[9:12]), answer.partition(b"\r\n\r\n")[2]


@pytest.mark.slow
def test_the_old_version_serves_when_its_file_has_been_replaced(
    start: Callable[..., Service], programs: Programs
) -> None:
    """Row 72. A program that still answers what had begun needs nothing of the file that it was started from."""
    service = start("-probation", "100ms", "-drain", "9s")
    head, _, archive = programs.version("1.1.0").read_bytes().partition(b"\n")
    new = write_program(service.upgrade_dir / "new", head + b"\n" + b"#" * 4096 + archive)  # all is elsewhere in it
    requests = {f"GET {route}": 200 for route in (*_ROUTES, "/upgrades/1")} | {"GET /upgrades/1": 404, "GET /no": 404}
    requests |= {"POST /upgrade": 503, "POST /rollback": 503, "PUT /upgrade": 405}
    begun = {request: _begun(service.address, request) for request in requests}
    service.get("/version")  # whoever came before this was accepted before
    upgrade_id = service.ask("POST", "/upgrade").json["id"]
    service.line(upgrade=upgrade_id, outcome="committed")
    record = service.record_when(upgrade_id, lambda record: record["installed"] is not None)
    assert record["installed"]
    assert service.program.read_bytes() == new.read_bytes()
    answers = {request: _finish(connection) for request, connection in begun.items()}
    assert {request: status for request, (status, _) in answers.items()} == requests
    assert b'"version": "1.0.0"' in answers["GET /version"][1], "the old one answers"
    service.status_when(lambda status: status["pid"] == service.process.pid and status["phase"] == "RUNNING")
    assert not any("exception" in line or line["message"] == "a request failed" for line in service.lines)


_PRELOAD = ("LD_PRELOAD", "LD_LIBRARY_PATH", "LD_DEBUG", "LD_DEBUG_OUTPUT")
_STEERING = (*_PRELOAD, "PYTHONPATH", "PYTHONSTARTUP", "PYTHONHOME", "OPENSSL_CONF", "GIT_DIR", "ENV", "BASH_ENV")


def test_what_steers_programs_is_not_passed_on(
    scene: Scene, sign: Callable[[Path], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Row 73. Neither a candidate nor the verifier sees what the service's own environment has of that."""
    traces, log = scene.root / "traces", scene.root / "log"
    traces.mkdir()
    app = scene.upgrades / "app"
    sign(write_program(app, f"#!/bin/sh\nenv > {log}\nexec {sys.executable} -c 'print(\"1.1.0\")'\n".encode()))
    (scene.root / "sitecustomize.py").write_text(f"open({str(scene.marker)!r}, 'w')\n", encoding="utf-8")
    for name in _STEERING:
        monkeypatch.setenv(name, str(scene.root))
    # The dynamic linker leaves a file for each program that sees these two (ld.so(8)).
    monkeypatch.setenv("LD_DEBUG", "libs")
    monkeypatch.setenv("LD_DEBUG_OUTPUT", str(traces / "of"))
    monkeypatch.delenv("LD_PRELOAD")
    assert scene.only()["eligible"]
    assert list(traces.iterdir()) == []
    assert not scene.marker.exists()
    names = {line.partition("=")[0] for line in log.read_text(encoding="utf-8").splitlines()}
    assert names.isdisjoint(_STEERING)
    subprocess.run(["/bin/true"], check=True)
    assert len(list(traces.iterdir())) == 1, "the trace that a program leaves that does see them"
