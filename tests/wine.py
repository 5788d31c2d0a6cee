"""Windows for the tests: a Windows CPython under wine, and what runs there.

Wine's C library does not take a regular file for a standard stream: pipes are used.
"""

from __future__ import annotations

import hashlib
import io
import os
import pty
import re
import shutil
import subprocess
import sys
import tarfile
import threading
import zipfile
from pathlib import Path
from typing import TYPE_CHECKING, Self

import build
import pytest
from service import PATIENCE, Service

if TYPE_CHECKING:
    from collections.abc import Sequence

LOCK = build.ROOT / ".ci" / "windows.lock"
INTERPRETER = build.ROOT / "dist" / "windows-python"
"""Where the interpreter is kept from one run to the next."""

_PLACES = ("/usr/lib/wine", "/usr/lib/wine64", "/usr/bin", "/usr/local/bin")
_SLOW = 180.0
"""Seconds for what is done once: to fetch the interpreter, and to make Wine's directory."""


def missing(what: str) -> None:
    """Skip a test for what this machine lacks; where CI runs, nothing may be missing."""
    if os.environ.get("CI"):
        pytest.fail(f"{what}, and CI must show this")
    pytest.skip(what)


def _find(*names: str) -> str:
    found = next((path for name in names for place in _PLACES if (path := Path(place, name)).is_file()), None)
    if found is None:
        missing(f"wine is not installed ({names[0]})")
    return str(found)


def _fetch(target: Path) -> None:
    """Download the interpreter, as pinned, and take it out. Raises OSError where it can't be had."""
    pinned = re.search("sha256:([0-9a-f]{64})", LOCK.read_text(encoding="utf-8"))
    assert pinned is not None
    downloaded = target / "download"
    # pip checks the digest before it runs the package's setup.py, to learn its name, which that one does and no more.
    fetch = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--require-hashes"]
    ran = subprocess.run(
        [*fetch, "--no-deps", "--no-binary=:all:", "-r", LOCK, "-d", downloaded],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=_SLOW,
        check=False,
    )
    if ran.returncode:
        raise OSError(next((line for line in ran.stderr.splitlines() if "ERROR" in line), "no pip"))
    (archive,) = downloaded.iterdir()
    assert hashlib.sha256(archive.read_bytes()).hexdigest() == pinned[1]
    with tarfile.open(archive) as files:
        (name,) = (name for name in files.getnames() if name.endswith("/data.zip"))
        content = files.extractfile(name)
        assert content is not None
        with zipfile.ZipFile(io.BytesIO(content.read())) as inner:
            inner.extractall(target)
    shutil.rmtree(downloaded)
    (root,) = target.iterdir()
    assert (root / "python.exe").is_file()


def interpreter() -> Path:
    """Return the directory of the Windows CPython, fetched when it was not yet."""
    if not INTERPRETER.exists():
        partial = INTERPRETER.with_name(f".{INTERPRETER.name}.{os.getpid()}.tmp")
        try:
            _fetch(partial)
            partial.rename(INTERPRETER)
        except (OSError, subprocess.SubprocessError) as error:
            missing(f"the Windows interpreter cannot be had ({error})")
        finally:
            shutil.rmtree(partial, ignore_errors=True)
    (root,) = INTERPRETER.iterdir()
    return root


def windows_path(path: Path) -> str:
    """Return how a file of this machine is called there."""
    return "Z:" + str(path).replace("/", "\\")


class Wine:
    """A throw-away Windows, with the interpreter on its PATH."""

    def __init__(self, directory: Path) -> None:
        self._wine, self._server = _find("wine64", "wine"), _find("wineserver64", "wineserver")
        self._python = interpreter()
        self._prefix = directory
        self.environ = {
            **{name: value for name, value in os.environ.items() if name in {"PATH", "LANG"}},
            "HOME": str(directory),
            "WINEPREFIX": str(directory / "prefix"),
            "WINEPATH": windows_path(self._python),
            "WINEDEBUG": "-all",
            "WINEDLLOVERRIDES": "mscoree,mshtml,winemenubuilder.exe=",
        }

    def __enter__(self) -> Self:
        self.run("wineboot", "--init", timeout=_SLOW)
        subprocess.run([self._server, "--wait"], env=self.environ, timeout=_SLOW, check=True)  # it has written it all
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()
        shutil.rmtree(self._prefix, ignore_errors=True)

    def command(self, *arguments: str | Path) -> list[str]:
        """Return the command that runs a Windows program."""
        return [self._wine, *(windows_path(one) if isinstance(one, Path) else one for one in arguments)]

    def run(self, *arguments: str | Path, timeout: float = PATIENCE) -> subprocess.CompletedProcess[str]:
        """Run a program to its end."""
        return subprocess.run(
            self.command(*arguments),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            env=self.environ,
            timeout=timeout,
            check=False,
        )

    def python(self, program: Path, statements: str) -> subprocess.CompletedProcess[str]:
        """Run `statements` in the interpreter, with the modules of the built `program`."""
        head = f"import sys; sys.path.insert(0, {windows_path(program)!r})\n"
        return self.run(self._python / "python.exe", "-IS", "-c", head + statements)

    def on_console(self, *arguments: str | Path) -> tuple[subprocess.Popen[bytes], int]:
        """Start a program on a console of its own; return it, and the descriptor of who sits there."""
        seat, console = pty.openpty()
        try:
            process = subprocess.Popen(
                ["setsid", "--ctty", *self.command(*arguments)],
                stdin=console,
                stdout=console,
                stderr=console,
                env=self.environ,
            )
        finally:
            os.close(console)
        return process, seat

    def kill(self) -> None:
        """End all that runs there."""
        subprocess.run([self._server, "--kill"], env=self.environ, timeout=_SLOW, check=False)
        subprocess.run([self._server, "--wait"], env=self.environ, timeout=_SLOW, check=False)


class WindowsService(Service):
    """A service there."""

    def __init__(self, wine: Wine, program: Path, directory: Path, *flags: str) -> None:
        self._wine = wine
        super().__init__(program, directory, *flags)

    def _start(self) -> None:
        self._ended = False
        if not self.program.suffix:
            self.program = self.program.rename(self.program.with_suffix(".exe"))
        self.process = subprocess.Popen(
            self._wine.command(
                self.program,
                *("-bind", "localhost:0", "-upgrade-bind", "localhost:0"),
                *("-state-dir", self.state_dir, "-upgrade-dir", self.upgrade_dir),
                *self._flags,
            ),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            env=self._wine.environ,
            cwd=self._directory,
        )
        assert self.process.stderr is not None
        threading.Thread(target=self.read, args=(self.process.stderr,), daemon=True).start()

    def ask_to_stop(self, pid: int) -> None:
        """Signal the event of the process `pid`."""
        asked = self._wine.python(
            self.program, f"from selfupdate import win32; win32.signal_event(r'Local\\self-update-stop-{pid}')"
        )
        assert (asked.returncode, asked.stderr) == (0, "")

    def wait_for_end(self) -> None:
        """Wait until no process is left."""
        with self._news:
            self._news.wait_for(lambda: self._ended, PATIENCE)
        assert self._ended
        self.statuses[self.process.pid] = self.process.wait(PATIENCE)

    def kill(self) -> None:
        self._wine.kill()
        self.process.wait(PATIENCE)


def for_windows(program: Path, target: Path) -> Path:
    """Write a program that was built for POSIX as an .exe."""
    target.write_bytes(build.for_windows(program.read_bytes().removeprefix(build.SHEBANG)))
    return target


def source_for_windows(source: str, target: Path) -> Path:
    """Write a program of one source as an .exe."""
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w") as archive:
        archive.writestr("__main__.py", source)
    target.write_bytes(build.for_windows(content.getvalue()))
    return target


def names(paths: Sequence[Path]) -> list[str]:
    """Return the names of files, in order."""
    return sorted(path.name for path in paths)
