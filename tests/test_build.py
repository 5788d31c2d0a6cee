"""The built files."""

from __future__ import annotations

import io
import os
import subprocess
import sys
import zipfile
from typing import TYPE_CHECKING

import build

if TYPE_CHECKING:
    from pathlib import Path


def test_two_builds_are_the_same_byte_for_byte(tmp_path: Path) -> None:
    """Each in a process of its own, as `make build` runs it, with another time, umask and hash seed."""
    for name, seed in (("a", "1"), ("b", "2")):
        subprocess.run(
            [sys.executable, build.__file__, tmp_path / name],
            env={**os.environ, "PYTHONHASHSEED": seed},
            check=True,
            capture_output=True,
        )
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_the_program_is_one_file_that_needs_nothing_else(tmp_path: Path) -> None:
    """It runs from anywhere, with no installed package and whatever the environment says."""
    target = tmp_path / "elsewhere" / "program"
    build.build(target, "1.2.3-rc.1")
    (tmp_path / "selfupdate.py").write_text("raise SystemExit('not ours')", encoding="utf-8")
    ran = subprocess.run(
        [target, "-dev=true", "-version"],
        env={"PATH": os.environ["PATH"], "PYTHONPATH": str(tmp_path)},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=True,
    )
    assert (ran.stdout, ran.stderr) == ("1.2.3-rc.1\n", "")
    assert [path.name for path in target.parent.iterdir()] == ["program"]


def test_a_compiled_module_stands_beside_each_source(tmp_path: Path) -> None:
    """A zip is never compiled on the fly."""
    build.build(tmp_path / "program")
    names = set(zipfile.ZipFile(tmp_path / "program").namelist())
    sources = {name for name in names if name.endswith(".py")}
    assert {"__main__.py", "selfupdate/server.py", "packaging/version.py"} <= sources
    assert {f"{name}c" for name in sources} <= names
    assert "selfupdate/openapi.json" in names
    assert {f"selfupdate/ui/{name}" for name in ("index.html", "app.js", "view.js", "style.css")} <= names


def test_the_windows_program_is_a_launcher_with_the_same_archive(tmp_path: Path) -> None:
    """A Windows executable, the line that names the interpreter, and the zip."""
    build.build(tmp_path / "program.exe", "1.2.3", windows=True)
    build.build(tmp_path / "program", "1.2.3")
    content = (tmp_path / "program.exe").read_bytes()
    assert content.startswith(b"MZ")
    launcher, line, archive = content.partition(build.WINDOWS_SHEBANG)
    assert line
    assert b"PE\0\0" in launcher
    assert build.SHEBANG + archive == (tmp_path / "program").read_bytes()
    assert zipfile.ZipFile(io.BytesIO(content)).testzip() is None
