"""Candidates: which files are, what is thought of each, and which is chosen."""

from __future__ import annotations

import itertools
import os
import socket
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

import pytest
from programs import shell, write_program
from service import PATIENCE

from selfupdate import settings, versions
from selfupdate.candidates import Candidate, Scanner
from selfupdate.errors import CandidateError, NoSuchCandidateError, NotEligibleError, ScanError, StateError
from selfupdate.journal import Journal, Record
from selfupdate.releases import Store, install
from selfupdate.settings import Limits
from selfupdate.trust import Trust

if TYPE_CHECKING:
    import io
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from selfupdate.trust import Reading


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    """Make an upgrade directory."""
    path = tmp_path / "upgrades"
    path.mkdir()
    return path


@pytest.fixture
def store(tmp_path: Path) -> Store:
    """Make a store of releases."""
    (tmp_path / "state").mkdir()
    store = Store(tmp_path / "state", 10000)
    store.open()
    return store


@pytest.fixture
def scanner(directory: Path, store: Store, tmp_path: Path) -> Iterator[Callable[..., Scanner]]:
    """Make scanners for a running version, 1.0.0 unless another is given."""
    stop_out, stop_in = socket.socketpair()

    def make(
        running: str = "1.0.0", allow: str | None = None, journal: Journal | None = None, floor: str | None = None
    ) -> Scanner:
        return Scanner(
            directory,
            store,
            Trust(settings.parse(["-insecure-allow-unsigned"], {"HOME": "/"}), store, stop_out.fileno()),
            running=versions.parse(running),
            running_sha256=lambda: None,
            allow=versions.Specifiers(allow) if allow else None,
            floor=lambda: versions.parse(floor) if floor else None,
            fault_of=(journal or Journal(tmp_path / "journal")).fault_of,
            needed=lambda: None,
            stop_fd=stop_out.fileno(),
            limits=Limits(),
        )

    with stop_out, stop_in:
        yield make


def _reasons(candidates: list[Candidate]) -> dict[str, str | None]:
    return {candidate.name: str(candidate.refusal) if candidate.refusal else None for candidate in candidates}


def test_the_greatest_is_chosen_and_each_other_has_its_reason(directory: Path, scanner: Callable[..., Scanner]) -> None:
    """The list begins with the chosen one, and goes on from the greatest to the least."""
    for name, version in {
        "a": "1.1.0",
        "b": "1.10.0",
        "c": "1.9.0",
        "d": "1.0.0",
        "e": "0.9.0",
        "f": "1.10.0-rc.1",
    }.items():
        shell(directory / name, version, "")
    found = scanner().scan()
    assert _reasons(found) == {
        "b": None,
        "f": "1.10.0 is chosen before it",
        "c": "1.10.0 is chosen before it",
        "a": "1.10.0 is chosen before it",
        "d": "1.0.0 is the version that runs",
        "e": "0.9.0 is older than 1.0.0, which runs",
    }
    assert [candidate.name for candidate in found] == ["b", "f", "c", "a", "d", "e"]
    chosen = scanner().choose()
    assert chosen is not None
    assert chosen.name == "b"


def test_what_is_no_candidate_is_not_listed(directory: Path, scanner: Callable[..., Scanner]) -> None:
    """Hidden files, files under way, signatures, folders, pipes, sockets, devices' links, and links to nowhere."""
    for name in (".hidden", "a.part", "a.tmp", "a.new", "a.sig", "a.asc", "a.minisig", "a~"):
        shell(directory / name, "2.0.0", "")
    (directory / "folder").mkdir()
    os.mkfifo(directory / "pipe", 0o777)
    (directory / "device").symlink_to("/dev/zero")
    (directory / "nowhere").symlink_to("nothing")
    (directory / "loop").symlink_to("loop")
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(directory / "socket"))
        assert scanner().scan() == []
        assert scanner().choose() is None


def test_a_symbolic_link_counts_as_its_target(directory: Path, tmp_path: Path, scanner: Callable[..., Scanner]) -> None:
    """It is a candidate under its own name."""
    shell(tmp_path / "program", "2.0.0", "")
    (directory / "link").symlink_to(tmp_path / "program")
    (candidate,) = scanner().scan()
    assert (candidate.name, candidate.eligible) == ("link", True)


def test_a_file_that_is_no_program_is_listed_with_the_reason(directory: Path, scanner: Callable[..., Scanner]) -> None:
    """An operator who forgot something is told what."""
    (directory / "unmarked").write_text("#!/bin/sh\necho 2.0.0\n", encoding="utf-8")
    write_program(directory / "large", b"#!/bin/sh\n" + b"#" * 10000)
    assert _reasons(scanner().scan()) == {
        "unmarked": "is not executable",
        "large": "has 10010 bytes; at most 10000 are taken",
    }


@pytest.mark.parametrize("name", ["a\n\x1b[31m\u202eb", "<script>", "-rf", "..a", "a b", "a\udcff", "x" * 129, "é"])
def test_an_odd_name_is_shown_escaped_and_refused(directory: Path, scanner: Callable[..., Scanner], name: str) -> None:
    """A name can hold anything but a slash; what could be taken for something else is not run."""
    ran = directory.parent / "ran"
    write_program(directory / name, f"#!/bin/sh\necho > {ran}\necho 2.0.0\n".encode())
    found = scanner().scan()
    if name.startswith("."):
        assert found == [], "hidden"
    else:
        (candidate,) = found
        said = candidate.as_json()
        assert isinstance(said["name"], str)
        assert (said["name"].isprintable(), said["code"]) == (True, "candidate-odd-name")
        with pytest.raises(NotEligibleError, match="cannot be upgraded to: has an odd name"):
            scanner().choose(said["name"])
    assert not ran.exists()


def test_allow_narrows_the_choice(directory: Path, scanner: Callable[..., Scanner]) -> None:
    """What the specifiers do not take is listed with them."""
    for name, version in {"a": "1.2.0", "b": "2.0.0"}.items():
        shell(directory / name, version, "")
    assert _reasons(scanner(allow=">=1.2,<2").scan()) == {"a": None, "b": "2.0.0 is not allowed by -allow <2,>=1.2"}


def test_a_name_that_is_not_there_or_not_eligible(directory: Path, scanner: Callable[..., Scanner]) -> None:
    """Asking for one by name says why it can't be had."""
    shell(directory / "old", "0.9.0", "")
    with pytest.raises(NoSuchCandidateError, match="new is not in "):
        scanner().choose("new")
    with pytest.raises(NotEligibleError, match=r"old cannot be upgraded to: 0\.9\.0 is older than 1\.0\.0, which runs"):
        scanner().choose("old")


def test_a_lesser_one_can_be_asked_for_by_name(directory: Path, scanner: Callable[..., Scanner]) -> None:
    """Not being the greatest is no fault."""
    for name, version in {"a": "1.2.0", "b": "2.0.0"}.items():
        shell(directory / name, version, "")
    chosen = scanner().choose("a")
    assert chosen is not None
    assert (chosen.name, chosen.refusal) == ("a", None)


def test_a_release_that_failed_is_passed_over(directory: Path, tmp_path: Path, scanner: Callable[..., Scanner]) -> None:
    """By its digest, whatever its name, until it is asked for; the next greatest is taken instead."""
    for name, version in {"a": "1.2.0", "b": "2.0.0"}.items():
        shell(directory / name, version, "")
    journal = Journal(tmp_path / "journal")
    digest = scanner().scan()[0].as_json()["sha256"]
    assert isinstance(digest, str)
    journal.put(
        Record(
            "1", "1.0.0", "RUNNING", "", sha256=digest, outcome="aborted", reason="no good", is_fault_of_release=True
        )
    )
    shell(directory / "c", "2.0.0", "")  # the same bytes
    found = _reasons(scanner(journal=journal).scan())
    why = "failed before (no good)"
    assert found == {"a": None, "b": why, "c": why}
    chosen = scanner(journal=journal).choose("c")
    assert chosen is not None
    assert chosen.name == "c"


def test_a_version_is_asked_once(directory: Path, tmp_path: Path, scanner: Callable[..., Scanner]) -> None:
    """Answers are remembered by digest; a failure is asked again when an upgrade is."""
    log = tmp_path / "log"
    write_program(directory / "good", f"#!/bin/sh\necho good >> {log}\necho 2.0.0\n".encode())
    write_program(directory / "bad", f"#!/bin/sh\necho bad >> {log}\nexit 1\n".encode())
    one = scanner()
    one.scan()
    one.scan()
    assert sorted(log.read_text(encoding="utf-8").split()) == ["bad", "good"]
    one.choose()
    assert sorted(log.read_text(encoding="utf-8").split()) == ["bad", "bad", "good"]


def test_a_version_is_asked_in_a_clean_place(directory: Path, tmp_path: Path, scanner: Callable[..., Scanner]) -> None:
    """An own empty directory that is removed, a clean environment, nothing on standard input."""
    log = tmp_path / "log"
    os.environ["SELF_UPDATE_TEST"] = "leaks"
    write_program(directory / "a", f"#!/bin/sh\n{{ env; pwd; ls -A; cat; }} > {log}\ntouch left\necho 2.0.0\n".encode())
    scanner().scan()
    del os.environ["SELF_UPDATE_TEST"]
    lines = log.read_text(encoding="utf-8").splitlines()
    names = {line.partition("=")[0] for line in lines if "=" in line}
    assert names <= {
        "PATH",
        "LANG",
        "LC_ALL",
        "TZ",
        "HOME",
        "PYTHONNOUSERSITE",
        "PYTHONDONTWRITEBYTECODE",
        "PWD",
        "OLDPWD",
    }
    assert lines[-1].startswith(str(tmp_path / "state"))
    assert [entry.name for entry in (tmp_path / "state" / "releases").iterdir() if entry.name.startswith(".")] == []


def test_an_upgrade_directory_that_cannot_be_read(directory: Path, scanner: Callable[..., Scanner]) -> None:
    """The text names it and what to do."""
    directory.rmdir()
    with pytest.raises(ScanError, match=r"upgrades cannot be read: No such file or directory\. Make it"):
        scanner().scan()


def test_what_runs_is_a_private_copy(directory: Path, store: Store) -> None:
    """The candidate may change or go: the copy does not, and has the digest of its content as its place."""
    source = shell(directory / "a", "2.0.0", "")
    release = store.stage(source)
    content = source.read_bytes()
    source.write_bytes(b"evil")
    assert release.path.read_bytes() == content
    assert release.path.parent.name == release.sha256
    assert release.path.stat().st_mode & 0o777 == 0o500
    with pytest.raises(CandidateError, match="a was changed after it had been chosen"):
        store.confirm(release)
    source.unlink()
    with pytest.raises(CandidateError, match="a was removed after it had been chosen"):
        store.confirm(release)


def test_what_is_known_may_change_while_others_are_asked(
    directory: Path, scanner: Callable[..., Scanner], tmp_path: Path
) -> None:
    """It is taken for what it is then, and not for what it was when the scan began."""
    shell(directory / "known", "2.0.0", "")
    scanning = scanner()
    assert [str(candidate.version) for candidate in scanning.scan()] == ["2.0.0"]
    gate = tmp_path / "gate"
    os.mkfifo(gate)
    write_program(directory / "asked", f"#!/bin/sh\nread _ < {gate}; echo 1.1.0\n".encode())
    with ThreadPoolExecutor() as asking:
        found = asking.submit(scanning.scan)
        with gate.open("w", encoding="ascii") as at_the_gate:  # it is being asked
            shell(directory / "known", "3.0.0", "")
            at_the_gate.write("go\n")
        assert [str(candidate.version) for candidate in found.result(PATIENCE)] == ["3.0.0", "1.1.0"]


def test_a_file_that_is_being_written_is_taken_later(directory: Path, tmp_path: Path) -> None:
    """A writer that is at work during the copy is noticed; when it has ended, the file is whole."""
    source = shell(directory / "a", "2.0.0", "#" * (1 << 20))

    class Overtaken(Store):
        """A store in which the file grows while it is copied."""

        def _write(self, reader: io.RawIOBase, target: Path) -> str:
            sha256 = super()._write(reader, target)
            with source.open("ab") as file:
                file.write(b"#")
            return sha256

    with pytest.raises(CandidateError, match="is still being copied"):
        Overtaken(tmp_path, 1 << 30).stage(source)
    store = Store(tmp_path, 1 << 30)
    assert store.stage(source).path.read_bytes() == source.read_bytes()


def test_a_release_is_copied_once(directory: Path, store: Store) -> None:
    """The same file is not read again; one that was written anew is."""
    source = shell(directory / "a", "2.0.0", "")
    assert store.stage(source) is store.stage(source)
    shell(directory / "a", "2.0.1", "")
    assert store.stage(source).path.read_bytes() == source.read_bytes()


def test_releases_that_nobody_needs_are_removed(directory: Path, store: Store) -> None:
    """Those that are named stay; one that is being copied is let alone."""
    kept, other = (
        store.stage(shell(directory / name, version, "")) for name, version in (("a", "1.1.0"), ("b", "1.2.0"))
    )
    with store.scratch() as scratch:
        store.prune({kept.sha256})
        assert scratch.exists()
    assert not scratch.exists()
    assert kept.path.exists()
    assert not other.path.exists()
    assert store.stage(directory / "b").path.exists()


def test_a_release_that_was_damaged_is_not_found(directory: Path, store: Store) -> None:
    """What is gone back to must have the digest that was blessed."""
    release = store.stage(shell(directory / "a", "1.1.0", ""))
    assert store.find(release.sha256).path == release.path
    release.path.chmod(0o700)
    release.path.write_bytes(b"evil")
    with pytest.raises(CandidateError, match="is damaged: its content has another digest"):
        store.find(release.sha256)


def test_installing_keeps_mode_and_owner_and_leaves_one_whole_file(
    directory: Path, store: Store, tmp_path: Path
) -> None:
    """The file is replaced by a rename: who has it open still reads the old one."""
    release = store.stage(shell(directory / "a", "1.1.0", ""))
    program = tmp_path / "bin" / "program"
    program.parent.mkdir()
    program.write_bytes(b"old")
    program.chmod(0o751)
    with program.open("rb") as running:
        install(release, program)
        assert running.read() == b"old"
    assert program.read_bytes() == release.path.read_bytes()
    assert program.stat().st_mode & 0o777 == 0o751
    assert [path.name for path in program.parent.iterdir()] == ["program"]


def test_a_state_directory_that_cannot_keep_releases(tmp_path: Path) -> None:
    """The text names it, and the remedy which flag helps."""
    (tmp_path / "file").write_text("", encoding="utf-8")
    with pytest.raises(StateError, match="file cannot keep releases: Not a directory") as caught:
        Store(tmp_path / "file", 1).open()
    assert caught.value.remedy == "make it writable for this account, or give another one with -state-dir"


def test_a_choice_during_a_look_ahead_shares_what_that_finds(
    directory: Path, scanner: Callable[..., Scanner], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It asks none again that failed meanwhile, which it waited for; the next choice does."""
    runs, barrier = directory.parent / "runs", directory.parent / "barrier"
    os.mkfifo(barrier)
    write_program(directory / "fails", f"#!/bin/sh\necho >> {runs}\nread -r word < {barrier}\nexit 1\n".encode())
    looking, read, has_asked = scanner(), Trust.read, threading.Event()
    ahead = threading.Thread(target=looking.look_ahead, args=[lambda: True])
    ahead.start()
    with barrier.open("w", encoding="ascii") as gate:  # it has been opened at the other end: the look is under way

        def tell(trust: Trust) -> Reading:
            has_asked.set()
            return read(trust)

        monkeypatch.setattr(Trust, "read", tell)
        choice = threading.Thread(target=looking.choose)
        choice.start()
        assert has_asked.wait(PATIENCE)
        gate.write("on\n")
    ahead.join()
    choice.join()
    assert runs.read_text(encoding="ascii") == "\n"
    opens = threading.Thread(target=barrier.write_text, args=["on\n", "ascii"])
    opens.start()
    looking.choose()
    opens.join()
    assert runs.read_text(encoding="ascii") == "\n\n"


def test_a_look_ahead_ends_when_it_may_not_go_on(directory: Path, scanner: Callable[..., Scanner]) -> None:
    """An upgrade does not wait for all that was dropped, and what was not looked at is not taken for removed."""
    runs = directory.parent / "runs"
    for number in range(10):
        text = f"#!/bin/sh\necho >> {runs}\necho 1.1.{number}\n"
        write_program(directory / f"c{number}", text.encode())
    looking, asked = scanner(), itertools.count()
    looking.look_ahead(lambda: next(asked) < 1)
    assert runs.read_text(encoding="ascii") == "\n"
    assert looking.last is None
    assert len(looking.scan()) == 10
    assert runs.read_text(encoding="ascii") == "\n" * 10
