"""Build the program as one executable file: a zip application with all that it needs.

A zip is never compiled on the fly, so a compiled module stands beside each
source; another version of Python than the builder's falls back to the source.
Two builds of one commit with one interpreter are the same byte for byte: the
order, the times and the modes in the archive are fixed, and a compiled module
is tied to its source by a digest and not by a time.
"""

from __future__ import annotations

import argparse
import functools
import importlib.metadata
import io
import json
import os
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import packaging

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "selfupdate"
OF_PACKAGING = ("__init__", "_ranges", "_structures", "ranges", "specifiers", "version")
"""What the two of its modules that are used import: the directory of an archive is read at each start."""
VERSION_FILE = "selfupdate/__init__.py"

# -I and -S: neither the environment nor installed packages can put a module in front of ours.
SHEBANG = b"#!/usr/bin/env -S python3 -IS\n"
WINDOWS_SHEBANG = b"#!python.exe -IS\r\n"

# The version stands in the program that is executed first: every candidate is asked for it, and imports nothing.
_MAIN = """\
import sys

if sys.argv[1:] in (["-version"], ["--version"]):
    print("%s")
else:
    from selfupdate.__main__ import main

    main()
"""

_EPOCH = (1980, 1, 1, 0, 0, 0)  # the first time that a zip can hold
_SEMVER = re.compile(r"[0-9]+\.[0-9]+\.[0-9]+([-+][0-9A-Za-z.+-]+)?")
_VERSION = re.compile(rb'(?m)^__version__ = "(.+)"$')

# In a process of its own: what is marshalled depends on which strings the process has interned.
_COMPILE = """\
import importlib.util, json, marshal, sys
for name, source in json.load(sys.stdin).items():
    code = marshal.dumps(compile(source, name, "exec", dont_inherit=True, optimize=0))
    digest = importlib.util.source_hash(source.encode())
    # PEP 552: flags 1 mean hash-based and unchecked
    print(name, (importlib.util.MAGIC_NUMBER + (1).to_bytes(4, "little") + digest + code).hex())
"""


def build(target: Path, version: str | None = None, *, windows: bool = False) -> None:
    """Write the program to `target`, complete or not at all; `version` replaces the source's own."""
    archive = _archive(version)
    content = for_windows(archive) if windows else SHEBANG + archive
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    partial.write_bytes(content)
    partial.chmod(0o755)
    partial.replace(target)


def main_of(version: str) -> bytes:
    """Return what is executed first in the program of `version`."""
    return (_MAIN % version).encode()


def source_version() -> str:
    """Return the version that the source has."""
    match = _VERSION.search((ROOT / VERSION_FILE).read_bytes())
    assert match is not None
    return match[1].decode()


@functools.cache
def _sources() -> dict[str, bytes]:
    """Return every file of the program by its name in the archive."""
    library = Path(packaging.__file__).parent
    own = (path for path in PACKAGE.rglob("*") if "__pycache__" not in path.parts and path.name != "py.typed")
    files = {path.relative_to(PACKAGE.parent).as_posix(): path.read_bytes() for path in own if path.is_file()}
    files |= {f"packaging/{name}.py": (library / f"{name}.py").read_bytes() for name in OF_PACKAGING}
    for licence in importlib.metadata.files("packaging") or []:
        if licence.name.startswith("LICENSE"):
            files[licence.as_posix()] = licence.read_binary()
    return files


@functools.cache
def _compiled(names_and_sources: tuple[tuple[str, bytes], ...]) -> dict[str, bytes]:
    request = json.dumps({name: source.decode() for name, source in names_and_sources})
    answer = subprocess.run(
        [sys.executable, "-I", "-S", "-c", _COMPILE], input=request, capture_output=True, text=True, check=True
    )
    lines = (line.split(" ") for line in answer.stdout.splitlines())
    return {name + "c": bytes.fromhex(code) for name, code in lines}


def _archive(version: str | None) -> bytes:
    files = dict(_sources())
    version_file = files.pop(VERSION_FILE)
    if version is not None:
        version_file = _VERSION.sub(b'__version__ = "%s"' % version.encode(), version_file)
    versioned = {VERSION_FILE: version_file, "__main__.py": main_of(version or source_version())}
    files |= _compiled(tuple((name, source) for name, source in files.items() if name.endswith(".py")))
    files |= versioned | _compiled(tuple(versioned.items()))
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        for name in sorted(files):
            entry = zipfile.ZipInfo(name, _EPOCH)
            entry.create_system = 3  # Unix, wherever it is built
            entry.external_attr = 0o100644 << 16
            # What is read at each start is not inflated each time: all but the sources.
            entry.compress_type = zipfile.ZIP_DEFLATED if name.endswith(".py") else zipfile.ZIP_STORED
            archive.writestr(entry, files[name], compresslevel=9)
    return buffer.getvalue()


def for_windows(archive: bytes) -> bytes:
    """Return an archive as an .exe: behind a stub that runs the interpreter which the line after it names."""
    path = importlib.metadata.distribution("distlib").locate_file("distlib/t64.exe")
    return Path(str(path)).read_bytes() + WINDOWS_SHEBANG + archive


def main() -> None:
    """Build what the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("target", type=Path, help="the file to write")
    parser.add_argument("--version", help=f"the version to give it (default {source_version()})")
    parser.add_argument("--windows", action="store_true", help="build an .exe")
    arguments = parser.parse_args()
    if arguments.version and not _SEMVER.fullmatch(arguments.version):
        parser.error(f"{arguments.version!r} is not a version such as 1.2.3 or 1.3.0-rc.1")
    build(arguments.target, arguments.version or None, windows=arguments.windows)
    print(f"{arguments.target}: {arguments.version or source_version()}, {arguments.target.stat().st_size} bytes")


if __name__ == "__main__":
    main()
