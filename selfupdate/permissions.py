"""Who can change a file: the rule of sshd(8)'s StrictModes, for what this service relies on.

A file is as safe as each directory above it. All must belong to root or to this
account, and none may be writable by its group or by others. Only the directories
above the nearest one may be like /tmp: root's, writable by all, and sticky, so
that nobody can rename what belongs to another.
"""

from __future__ import annotations

import os
import shlex
import stat
import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

_OTHERS_CAN_WRITE = stat.S_IWGRP | stat.S_IWOTH
_OTHERS = stat.S_IRWXG | stat.S_IRWXO


class UnsafeError(Exception):
    """A file can be changed, or read, by others."""

    def __init__(self, path: Path, fault: str, remedy: str) -> None:
        """Keep which file, what is wrong with it, and what mends it."""
        super().__init__(f"{path} {fault}")
        self.remedy = remedy


def check(path: Path, *, is_secret: bool = False) -> None:
    """Check a regular file and all directories above it; `is_secret` when nobody else may read it.

    Raises UnsafeError, or OSError where it is not there.
    """
    if sys.platform == "win32":
        return
    path = path.absolute()
    status = path.lstat()
    if stat.S_ISLNK(status.st_mode):
        raise UnsafeError(path, "is a symbolic link", f"name the file that it points to, {os.path.realpath(path)}")
    if not stat.S_ISREG(status.st_mode):
        raise UnsafeError(path, "is not a regular file", "name a file")
    _check_owner(path, status)
    if is_secret and status.st_mode & _OTHERS:
        what = f"changed by {_writers(status)}" if status.st_mode & _OTHERS_CAN_WRITE else "read by others"
        raise UnsafeError(path, f"can be {what}", f"chmod 600 {shlex.quote(str(path))}")
    _check_mode(path, status)
    check_directory(path.parent)


def check_directory(path: Path) -> None:
    """Check a directory and all above it. Raises UnsafeError, or OSError where it is not there."""
    if sys.platform == "win32":
        return
    path = path.absolute()
    status = path.stat()
    _check_owner(path, status)
    _check_mode(path, status)
    for parent in _above(path):
        status = parent.stat()
        _check_owner(parent, status)
        if not (status.st_mode & stat.S_ISVTX and status.st_uid == 0):
            _check_mode(parent, status)


def _above(path: Path) -> Iterator[Path]:
    """Yield the directories above `path`, and above where it really is if links lead there."""
    yield from path.parents
    real = type(path)(os.path.realpath(path))  # which, other than resolve(), takes a loop of links
    if real != path:
        yield real
        yield from real.parents


def _check_owner(path: Path, status: os.stat_result) -> None:
    if sys.platform != "win32" and status.st_uid not in {0, os.geteuid()}:
        raise UnsafeError(
            path, f"belongs to another account, uid {status.st_uid}", f"chown {os.geteuid()} {shlex.quote(str(path))}"
        )


def _check_mode(path: Path, status: os.stat_result) -> None:
    if status.st_mode & _OTHERS_CAN_WRITE:
        letters = "go-w" if status.st_mode & stat.S_IWOTH else "g-w"
        raise UnsafeError(path, f"can be changed by {_writers(status)}", f"chmod {letters} {shlex.quote(str(path))}")


def _writers(status: os.stat_result) -> str:
    return "everybody" if status.st_mode & stat.S_IWOTH else "its group"
