"""In a terminal: through upgrades the service stays the foreground job of the shell that started it."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import signal
import subprocess
import threading
from typing import TYPE_CHECKING, Self

import pytest
from programs import shell
from service import PATIENCE, Place, Watched, is_zombie, sessions

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from programs import Programs

pytestmark = pytest.mark.slow

FLAGS = "-insecure-allow-unsigned -bind localhost:0 -upgrade-bind localhost:0 -state-dir state -drain 2s"
PROMPT = "ready> "
ENVIRONMENT = {"PS1": PROMPT, "TERM": "xterm", "NO_COLOR": ""}
CTRL_C = b"\x03"


class Terminal(Watched):
    """A terminal with a shell that has job control, and the service that is started in it."""

    def __init__(self, command: list[str], directory: Path) -> None:
        super().__init__()
        self._seen = ""
        self.written = b""
        self._master, slave = os.openpty()
        self.shell = subprocess.Popen(
            command, stdin=slave, stdout=slave, stderr=slave, cwd=directory, env={**os.environ, **ENVIRONMENT}
        )
        os.close(slave)
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        with contextlib.suppress(OSError):  # EIO: nobody has the terminal open any more
            while chunk := os.read(self._master, 4096):
                with self._news:
                    self.written += chunk
                    self._seen += chunk.decode()
                    self._news.notify_all()

    def expect(self, pattern: str) -> str:
        """Wait for what matches `pattern`, behind what was waited for before; return its group, if it has one."""
        with self._news:
            self._news.wait_for(lambda: re.search(pattern, self._seen), PATIENCE)
            found = re.search(pattern, self._seen)
            assert found is not None, self._seen
            self._seen = self._seen[found.end() :]
        return found[found.re.groups]

    def type(self, keys: bytes) -> None:
        os.write(self._master, keys)

    @property
    def foreground(self) -> int:
        """The process group that Ctrl-C is for."""
        return os.tcgetpgrp(self._master)

    @property
    def places(self) -> list[Place]:
        return [self._place]

    def start(self, flags: str) -> int:
        """Type the command that starts the service; return its process id."""
        self.expect(PROMPT)
        self.type(f"./self-update {FLAGS} {flags}\n".encode())
        self._place: Place = ("localhost", int(self.expect("serving.*bind[^l]+localhost:([0-9]+)[^0-9]")))
        return int(self.get("/status")["pid"])

    def assert_the_shell_is_back(self) -> None:
        """Check that the prompt is there, the last command ended with 0, and nothing of it lives on."""
        self.expect(PROMPT)
        assert self.foreground == self.shell.pid
        self.type(b"echo status=$?\n")
        self.expect(r"status=0\r\n")
        self.poll(
            lambda: [pid for pid, session in sessions() if session == self.shell.pid and not is_zombie(pid)],
            lambda left: left == [self.shell.pid],
        )  # what an upgrade leaves behind may still be on its way out, and the shell does not wait for that

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.shell.kill()
        self.shell.wait(PATIENCE)
        for pid, session in sessions():  # they are ours to reap now: see `service`
            if session == self.shell.pid:
                os.kill(pid, signal.SIGKILL)
                os.waitpid(pid, 0)
        self._reader.join(PATIENCE)
        os.close(self._master)


@pytest.fixture
def terminal(programs: Programs, tmp_path: Path, tool: Callable[[str], str]) -> Iterator[Terminal]:
    """Open a terminal in a directory that has the program in version 1.0.0, and room for candidates."""
    shutil.copy2(programs.version("1.0.0"), tmp_path / "self-update")
    (tmp_path / "upgrades").mkdir()
    command = [tool("setsid"), "--ctty", tool("bash"), "--noprofile", "--norc", "--noediting", "-i"]
    with Terminal(command, tmp_path) as terminal:
        yield terminal


def test_the_service_stays_the_foreground_job(terminal: Terminal, programs: Programs, tmp_path: Path) -> None:
    """After two upgrades the terminal is still its own: Ctrl-C ends it with status 0, and the prompt is back."""
    pid = terminal.start("-probation 100ms")
    assert terminal.foreground == pid
    for version in ("1.1.0", "1.2.0"):
        (tmp_path / "upgrades" / version).symlink_to(programs.version(version))
        assert terminal.upgrade()["outcome"] == "committed"
        status = terminal.status_when(lambda status: (status["pid"], status["phase"]) == (pid, "RUNNING"))
        assert status["version"] == version
        assert terminal.foreground == pid
    terminal.type(CTRL_C)
    terminal.assert_the_shell_is_back()


def test_ctrl_c_in_the_middle_of_an_upgrade_ends_both_versions(
    terminal: Terminal, programs: Programs, tmp_path: Path
) -> None:
    """The terminal tells the original process alone, and that ends the one on trial, too."""
    terminal.start("-probation 30s")
    (tmp_path / "upgrades" / "candidate").symlink_to(programs.version("1.1.0"))
    terminal.ask("POST", "/upgrade")
    terminal.expect('"phase": "PROBATION"')
    terminal.type(CTRL_C)
    terminal.expect('"stopped", "version": "1.1.0"')
    terminal.expect('"stopped", "version": "1.0.0"')
    terminal.assert_the_shell_is_back()


def test_logs_are_coloured_and_foreign_text_is_escaped(terminal: Terminal, tmp_path: Path) -> None:
    """What a candidate writes appears on the terminal, and is no order to it."""
    terminal.start("-dev")
    shell(tmp_path / "upgrades" / "bad", "2.0.0", r"printf '\033]0;owned\007\033[2J\302\233Jend\n' >&2; exit 3")
    assert terminal.upgrade()["outcome"] == "aborted"
    terminal.expect(r"\n\\x1b\]0;owned\\x07\\x1b\[2J\\x9bJend\r\n")
    terminal.expect("\x1b\\[33mWARNING\x1b\\[0m .*bad ended with status 3")
    terminal.type(CTRL_C)
    terminal.assert_the_shell_is_back()
    codes = re.findall(b"\x1b[^m]*m?|\xc2[\x80-\x9f]", terminal.written)
    assert {re.sub(rb"[0-9]+", b"", code) for code in codes} == {b"\x1b[m"}
