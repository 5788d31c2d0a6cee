"""The program's command line as a whole: what it prints, and its exit status."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from programs import Programs


def _run(program: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([program, *arguments], capture_output=True, text=True, timeout=30, check=False)


@pytest.mark.parametrize("arguments", [["-version"], ["--version"], ["-version=true"], ["-dev", "-version"]])
def test_version_is_printed_alone(programs: Programs, arguments: list[str]) -> None:
    """One line on stdout, status 0, nothing else."""
    ran = _run(programs.version("1.2.3"), *arguments)
    assert (ran.returncode, ran.stdout, ran.stderr) == (0, "1.2.3\n", "")


def test_wrong_usage_exits_with_2(programs: Programs) -> None:
    """One line on stderr, and no traceback."""
    ran = _run(programs.version("1.0.0"), "-bind", "here")
    assert (ran.returncode, ran.stdout) == (2, "")
    assert re.fullmatch(r"self-update: -bind got 'here'; it takes an address .*\n", ran.stderr)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["-bind", "192.0.2.1:80"], "cannot listen on 192.0.2.1:80: this machine has no such address"),
        (
            ["-bind", "no.such.host.invalid:80"],
            "cannot listen on no.such.host.invalid:80: the host name is not known here",
        ),
    ],
)
def test_a_failed_start_exits_with_1(programs: Programs, tmp_path: Path, arguments: list[str], message: str) -> None:
    """One line says what, and what to do."""
    token = tmp_path / "token"
    token.write_text("x" * 16, encoding="ascii")
    token.chmod(0o600)
    ran = _run(programs.version("1.0.0"), "-state-dir", str(tmp_path / "state"), "-token-file", str(token), *arguments)
    assert (ran.returncode, ran.stdout) == (1, "")
    assert ran.stderr.startswith(f"self-update: {message}")
    assert ran.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("output", "said"),
    [
        ("/dev/full", "self-update: what was printed is not all there: No space left on device\n"),
        (None, ""),
    ],
    ids=["full", "closed"],
)
def test_what_cannot_be_printed_ends_a_command_with_1(programs: Programs, output: str | None, said: str) -> None:
    """A full disk is named; who reads a pipe no further knows."""
    if output is None:
        read, write = os.pipe()
        os.close(read)
    else:
        write = os.open(output, os.O_WRONLY)
    command = [str(programs.version("1.0.0")), "-help"]
    try:
        ran = subprocess.run(command, stdout=write, stderr=subprocess.PIPE, text=True, timeout=30, check=False)
    finally:
        os.close(write)
    assert (ran.returncode, ran.stderr) == (1, said)


COMPILED = """
import importlib, json, sys
found = []
def note(event, arguments):
    if event == "compile" and arguments[1] == "<string>":
        found.append(bytes(arguments[0]).decode())
sys.addaudithook(note)
for name in sys.argv[1:]:
    importlib.import_module(name)
print(json.dumps(found))
"""


def test_a_start_compiles_no_annotation() -> None:
    """Those of a named tuple are no text, which `typing` would compile: a fifteenth of the time of a start."""
    folder = Path(__file__).parent.parent / "selfupdate"
    names = {path.stem for path in folder.glob("*.py")} - {"__init__", "__main__", "windows", "win32"}
    command = [sys.executable, "-c", COMPILED, *(f"selfupdate.{name}" for name in sorted(names))]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=30, check=True, cwd=folder.parent)
    compiled = json.loads(ran.stdout)
    assert any("body_time" in text for text in compiled)  # the constructor of the limits
    assert [text for text in compiled if not text.startswith("lambda _cls")] == []
