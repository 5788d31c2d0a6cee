"""The machines that tests have for themselves: nothing of them is left, however a test ends."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from pathlib import Path

import pytest
from namespaces import Namespaces, next_line
from service import wait_for_end
from systemd import Systemd

pytestmark = pytest.mark.slow

_HELD = """
import signal
from namespaces import Namespaces
with Namespaces(["sleep", "600"]) as namespaces:
    print(namespaces.pid, flush=True)
    signal.pause()
"""


def running(argument: str) -> list[str]:
    """Return the processes of this machine that have an argument."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            if argument.encode() in path.read_bytes().split(b"\0"):
                found.append(path.parent.name)
    return found


def test_what_runs_in_them_ends_with_them() -> None:
    """The first process, what it started, and what was put into a session of its own."""
    mark = f"600.{os.getpid()}"
    with Namespaces(["sleep", mark]) as namespaces:
        namespaces.run("sh", "-c", f"setsid sleep {mark} <&- >&- 2>&- &")
        assert len(namespaces.inhabitants()) == 2
    assert running(mark) == []


def test_a_command_that_fails_is_shown_with_what_it_said() -> None:
    """A test says why it failed."""
    with Namespaces(["sleep", "600"]) as namespaces:
        with pytest.raises(AssertionError, match=r"cat: /none: No such file"):
            namespaces.run("cat", "/none")
        assert namespaces.run("cat", text="told").stdout == "told"


def test_they_end_with_a_test_that_is_killed() -> None:
    """The kernel ends them: nobody else could."""
    environ = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    with subprocess.Popen([sys.executable, "-c", _HELD], stdout=subprocess.PIPE, env=environ) as test:
        assert test.stdout is not None
        first = int(next_line(test.stdout))
        test.kill()
    wait_for_end(first)


def test_a_systemd_leaves_nothing_when_the_test_fails() -> None:
    """Neither a process nor a control group."""
    with contextlib.suppress(ZeroDivisionError), Systemd() as systemd:
        groups = systemd.groups
        assert groups.is_dir()
        systemd.run("systemd-run", "--quiet", "sleep", f"600.{os.getpid()}")
        raise ZeroDivisionError
    assert not groups.exists()
    assert running(f"600.{os.getpid()}") == []
