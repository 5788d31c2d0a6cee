"""Programs for the tests: this one in any version, this one with a fault, and small foreign ones."""

from __future__ import annotations

import hashlib
import io
import sys
import zipfile
from pathlib import Path

import build

FAKES = Path(__file__).resolve().parent / "fakes"

PATIENT = """
from selfupdate import settings
settings.Settings.__new__.__defaults__ = (settings.Limits(version_time=60.0),)
"""
"""Statements for `Programs.faulty`: candidates have more time to tell their version than a test takes for anything."""
BLIND = """
from selfupdate import watch
watch.Watch.begin = lambda self: None
"""
"""Statements for `Programs.faulty`: nothing is looked at before somebody asks."""


class Programs:
    """Built files, each made once."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory

    def version(self, version: str) -> Path:
        """Return this program in a version."""
        target = self._directory / f"self-update-{version}"
        if not target.exists():
            build.build(target, version)
        return target

    def faulty(self, version: str, name: str, fault: str) -> Path:
        """Return this program in a version, with the statements `fault` run before it starts."""
        target = self._directory / f"{name}-{version}-{hashlib.sha256(fault.encode()).hexdigest()[:8]}"
        if target.exists():
            return target
        archive = zipfile.ZipFile(io.BytesIO(self.version(version).read_bytes()))
        content = io.BytesIO()
        with zipfile.ZipFile(content, "w", zipfile.ZIP_DEFLATED) as changed:
            for entry in archive.infolist():
                if entry.filename not in {"__main__.py", "__main__.pyc"}:
                    changed.writestr(entry, archive.read(entry))
            changed.writestr("__main__.py", f"{fault}\n{build.main_of(version).decode()}")
        return write_program(target, build.SHEBANG + content.getvalue())


def write_program(target: Path, content: bytes) -> Path:
    """Write an executable file, complete or not at all."""
    partial = target.with_name(f".{target.name}.tmp")
    partial.write_bytes(content)
    partial.chmod(0o755)
    return partial.replace(target)


def shell(target: Path, version: str, then: str) -> Path:
    """Write a shell script that says `version` to `-version`, and otherwise does `then`."""
    text = f'#!/bin/sh\nif [ "$1" = -version ]; then echo {version}; exit; fi\n{then}\n'
    return write_program(target, text.encode())


def fake(target: Path, name: str, version: str, mode: str = "") -> Path:
    """Write the foreign program `name` of the folder `fakes`, in a version and a mode."""
    source = (FAKES / f"{name}.py").read_text(encoding="utf-8")
    head = f"#!{sys.executable} -IS\nVERSION, MODE = {version!r}, {mode!r}\n"
    return write_program(target, (head + source).encode())
