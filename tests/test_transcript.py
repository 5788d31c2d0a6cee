"""What a successor writes: on the service's own streams, in the upgrade's record, and bounded."""

from __future__ import annotations

import os
import select
import signal
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from programs import fake, shell
from service import PATIENCE

from selfupdate.transcript import KEPT, Transcript

if TYPE_CHECKING:
    from collections.abc import Callable

    from programs import Programs
    from service import Service


def _write(transcript: Transcript, *chunks: tuple[int, bytes]) -> None:
    """Have a child write `chunks`, each to a stream."""
    acts = "".join(f"os.write({stream}, {chunk!r});" for stream, chunk in chunks)
    writers = transcript.writers
    subprocess.run([sys.executable, "-ISc", f"import os;{acts}"], stdout=writers[1], stderr=writers[2], check=True)
    transcript.close_writers()
    transcript.end(PATIENCE)


def test_both_streams_are_passed_on_and_kept(capfd: pytest.CaptureFixture[str]) -> None:
    """Each to the stream that it was meant for, byte for byte; what is kept can be shown anywhere."""
    transcript = Transcript(lambda: None)
    _write(transcript, (1, b"out\n"), (2, b"err \x1b[31m\xff\n"), (2, b"no end of line"))
    captured = capfd.readouterr()
    assert (captured.out, captured.err) == ("out\n", "err \x1b[31m\ufffd\nno end of line")
    assert sorted(transcript.text.splitlines()) == ["err \\x1b[31m\\udcff", "no end of line", "out"]


def test_the_end_is_kept_in_whole_lines(capfd: pytest.CaptureFixture[str]) -> None:
    """Of much, no more than is promised, and no half line at its beginning."""
    transcript = Transcript(lambda: None)
    text = b"".join(b"line %d\n" % number for number in range(10000))
    _write(transcript, (2, text))
    assert capfd.readouterr().err.encode() == text
    assert KEPT - 20 < len(transcript.text) <= KEPT
    assert transcript.text.startswith("line ")
    assert transcript.text.endswith("line 9999\n")


def test_lines_are_passed_on_whole() -> None:
    """A line that comes in pieces is one write: lines of two processes in one stream do not mix."""
    read, write = os.pipe()
    own = os.dup(2)
    os.dup2(write, 2)
    try:
        transcript = Transcript(lambda: None)
        stream = transcript.writers[2]
        os.write(stream, b"one ")
        os.write(stream, b"line\nnext ")
        assert select.select([read], [], [], PATIENCE)[0]
        assert os.read(read, 100) == b"one line\n"
        os.write(stream, b"line\n")
        assert select.select([read], [], [], PATIENCE)[0]
        assert os.read(read, 100) == b"next line\n"
        transcript.close_writers()
        transcript.end(PATIENCE)
    finally:
        os.dup2(own, 2)
        for fd in (own, read, write):
            os.close(fd)


@pytest.mark.slow
def test_the_record_of_a_failure_says_what_the_candidate_wrote(start: Callable[..., Service]) -> None:
    """The end of both streams is in the record, and all of it where the service writes."""
    service = start()
    shell(service.upgrade_dir / "bad", "2.0.0", "echo starting; echo 'no such library: \x1b[31m' >&2; exit 3")
    record = service.upgrade()
    assert record["outcome"] == "aborted"
    assert sorted(record["log"].splitlines()) == ["no such library: \\x1b[31m", "starting"]
    service.line(message="no such library: \x1b[31m")
    (service.upgrade_dir / "bad").unlink()
    assert service.upgrade()["outcome"] == "up-to-date"


@pytest.mark.slow
def test_the_record_of_a_success_says_what_the_successor_wrote(
    start: Callable[..., Service], programs: Programs
) -> None:
    """Its first lines are in the record; its later ones still arrive where the service writes."""
    service = start("-probation", "100ms", "-drain", "2s")
    (service.upgrade_dir / "new").symlink_to(programs.version("1.1.0"))
    record = service.upgrade()
    assert record["outcome"] == "committed"
    assert '"standing by"' in record["log"]
    status = service.status_when(lambda status: status["version"] == "1.1.0" and status["phase"] == "RUNNING")
    service.wait_until_alone(status["pid"])
    assert service.process.stderr is not None
    own = f"pipe:[{os.fstat(service.process.stderr.fileno()).st_ino}]"
    assert str(Path(f"/proc/{status['pid']}/fd/2").readlink()) == own
    os.kill(status["pid"], signal.SIGTERM)
    service.line(message="stopped", version="1.1.0")


@pytest.mark.slow
def test_a_successor_whose_incumbent_is_killed_can_still_write(
    start: Callable[..., Service], programs: Programs
) -> None:
    """Somebody reads what it writes at each moment, so that no pipe breaks under it."""
    service = start("-probation", "20s", "-drain", "2s")
    (service.upgrade_dir / "new").symlink_to(programs.version("1.1.0"))
    service.ask("POST", "/upgrade")
    service.line(phase="PROBATION")
    os.kill(service.process.pid, signal.SIGKILL)
    service.line(message="the incumbent has gone without a blessing", version="1.1.0")
    status = service.status_when(lambda status: status["phase"] == "RUNNING")
    service.wait_until_alone(status["pid"])
    os.kill(status["pid"], signal.SIGTERM)
    service.line(message="stopped", version="1.1.0")


@pytest.mark.slow
def test_a_foreign_successor_that_stays_can_still_write(start: Callable[..., Service]) -> None:
    """It knows of no other stream than the one that it was given: what it writes is passed on as long as it lives."""
    service = start("-probation", "100ms", "-drain", "30s")
    address = service.address
    fake(service.upgrade_dir / "foreign", "full", "2.0.0", "talks")
    assert service.ask("POST", "/upgrade?wait=30s").json["outcome"] == "committed"
    service.process.wait(PATIENCE)
    service.ask("GET", "/said-after-the-incumbent-left", address=address)
    service.line(message="GET /said-after-the-incumbent-left")


@pytest.mark.slow
def test_a_flood_is_bounded(start: Callable[..., Service]) -> None:
    """A candidate that writes 50 MB costs no memory, and leaves a short record."""
    service = start("-standby", "2m")
    shell(service.upgrade_dir / "bad", "2.0.0", "head -c 50000000 /dev/zero | tr '\\0' 'x' | fold -w 1000 >&2; exit 3")
    record = service.upgrade()
    assert record["reason"] == "bad ended with status 3 before it stood by"
    assert KEPT / 2 < len(record["log"]) <= KEPT
    status = Path(f"/proc/{service.process.pid}/status").read_text(encoding="utf-8")
    resident = int(status.partition("VmHWM:")[2].split()[0])
    assert resident < 100_000, "KiB at its highest, of which the interpreter has a quarter"
