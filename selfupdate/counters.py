"""Numbers that only grow, and that outlive the process which counts, in files that a service's processes share.

Who watches a service takes a number that falls for one that began anew, and counts all of it twice. So each
process counts in a lane, one of the files `metrics.0`, `metrics.1`, … in the state directory, and what is shown
is the sum over all lanes: it does not fall when one process hands over to another, and what a process had
counted that is killed is there still, since the kernel has the page.

A process has a lock on its lane for as long as it lives, and takes the first that nobody has. So one lane has
one writer, whoever started whom; nobody waits for anybody, and one that still ends its requests, or was
stopped, merely keeps a lane. Where there is none, the process counts in memory: when the state directory can't
be used, so that there will be no handover, or when there are more processes than lanes, which the log says.

A lane is a row of slots: a number, and its key, a text. The number is a double of the machine, at a multiple of
eight bytes, which processors read and write whole. The first slot has the number of slots in use, and the name
of this layout. A key is written before it is counted as in use, so whoever is killed in between leaves nothing.
Keys that a version does not know stay where they are, for one that does.

A file is written whole before it is mapped, since a page that finds no room on the disk ends the process
(SIGBUS, mmap(2)); nor is one ever cut. Whoever cuts one by hand in the middle of that does end the process:
remove it instead.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import math
import mmap
import os
import stat
import threading
from typing import TYPE_CHECKING

from selfupdate import system

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

_log = logging.getLogger(__name__)

LANES = 8
"""One serves, one is on trial, and some may still end what they have begun."""
SLOTS = 1024
"""In a lane; more keys are not counted."""
LONGEST_KEY = 120
"""Bytes of a key."""

_LAYOUT = "self-update counters 1"
_NUMBER = 8
_SLOT = _NUMBER + LONGEST_KEY
_SIZE = SLOTS * _SLOT


class _DamagedError(Exception):
    """What is in a file is no lane."""


class _Lane:
    """A mapped lane: its numbers by key. One thread at a time may change it."""

    def __init__(self, content: mmap.mmap) -> None:
        """Look at `content`. Raises _DamagedError where that is no lane."""
        self._content = content
        # Assigning an item of this copies eight bytes that are aligned: one store, never a part of one.
        self._numbers = memoryview(content).cast("d")
        self._places: dict[str, int] = {}
        used = self._numbers[0]
        if self._key(0) != _LAYOUT or not (0 <= used < SLOTS and used.is_integer()):
            raise _DamagedError
        for slot in range(1, int(used) + 1):
            place, key = slot * _SLOT // _NUMBER, self._key(slot)
            if key and math.isfinite(self._numbers[place]) and self._numbers[place] >= 0:
                self._places[key] = place

    @classmethod
    def made(cls, content: mmap.mmap) -> _Lane:
        """Make an empty lane of `content`."""
        content[:] = bytes(_SIZE)
        layout = _LAYOUT.encode()
        content[_NUMBER : _NUMBER + len(layout)] = layout
        return cls(content)

    def mend(self) -> int:
        """Have each slot that holds nothing that was counted hold nothing; return how many did."""
        sound = set(self._places.values())
        damaged = [slot for slot in range(1, int(self._numbers[0]) + 1) if slot * _SLOT // _NUMBER not in sound]
        for slot in damaged:
            self._write(slot, f"damaged {slot}")
        return len(damaged)

    def add(self, key: str, amount: float) -> bool:
        """Add to the number of `key`; tell whether there is room for it."""
        place = self._places.get(key)
        if place is None:
            place = self._new(key)
            if place is None:
                return False
        self._numbers[place] += amount
        return True

    def items(self) -> list[tuple[str, float]]:
        """Return each key with its number, as it is now."""
        return [(key, self._numbers[place]) for key, place in tuple(self._places.items())]

    def _new(self, key: str) -> int | None:
        slot = int(self._numbers[0]) + 1
        if slot >= SLOTS or len(key.encode()) > LONGEST_KEY:
            return None
        self._write(slot, key)
        self._numbers[0] = slot
        return self._places[key]

    def _write(self, slot: int, key: str) -> None:
        start = slot * _SLOT
        place = self._places[key] = start // _NUMBER
        self._numbers[place] = 0.0
        self._content[start + _NUMBER : start + _SLOT] = key.encode().ljust(LONGEST_KEY, b"\0")

    def _key(self, slot: int) -> str:
        start = slot * _SLOT + _NUMBER
        text = self._content[start : start + LONGEST_KEY].rstrip(b"\0")
        try:
            key = text.decode()
        except UnicodeDecodeError:
            return ""
        return key if key.isprintable() else ""


class Counters:
    """The numbers of a service by key. Safe to use from any thread."""

    def __init__(self, directory: Path | None) -> None:
        """Count in a lane in `directory`; in memory where that is None, or there is no lane for this process."""
        self._directory = directory
        self._lock = threading.Lock()
        self._own = -1
        self._is_full = False
        self._lane = (self._take() if directory else None) or _Lane.made(mmap.mmap(-1, _SIZE))

    def add(self, *amounts: tuple[str, float]) -> None:
        """Add to the number of each key, a printable text: none is less than it was."""
        with self._lock:
            for key, amount in amounts:
                if not self._lane.add(key, amount) and not self._is_full:
                    self._is_full = True
                    _log.error(
                        "there are more counters than can be kept", extra={"reason": f"there is no room for {key}"}
                    )

    def totals(self) -> dict[str, float]:
        """Return each key with the sum over all processes that ever counted it."""
        totals: dict[str, float] = {}
        for items in (self._lane.items(), *map(_read, self._others())):
            for key, number in items:
                totals[key] = totals.get(key, 0.0) + number
        return totals

    def _path(self, number: int) -> Path:
        assert self._directory is not None
        return self._directory / f"metrics.{number}"

    def _others(self) -> list[Path]:
        return [self._path(number) for number in range(LANES) if number != self._own] if self._directory else []

    def _take(self) -> _Lane | None:
        """Take the first lane that nobody has, and begin it anew where it is damaged; return None where there is none.

        The mapping has a descriptor of its own, which holds the lock.
        """
        reason = "each file for it is another process's"
        for number in range(LANES):
            path = self._path(number)
            try:
                fd = system.open_lock(path)
                try:
                    fd = system.take_lock(fd, path, wait=False)
                    lane = _open(fd, path)
                finally:
                    os.close(fd)
            except BlockingIOError:
                continue
            except OSError as error:
                reason = f"{path} cannot be used: {error.strerror}"
                continue
            self._own = number
            return lane
        _log.error("what this process counts is lost when it ends", extra={"reason": reason})
        return None


def _open(fd: int, path: Path) -> _Lane:
    """Return the lane in an open file, which only this process writes to. Raises OSError."""
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        raise OSError(errno.EINVAL, "it is no regular file")
    before = os.read(fd, _SIZE)
    os.lseek(fd, 0, os.SEEK_SET)
    if os.write(fd, before.ljust(_SIZE, b"\0")) < _SIZE:  # all of it: a copy that was put back may have holes
        os.ftruncate(fd, len(before))
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    content = mmap.mmap(fd, _SIZE)
    try:
        lane = _Lane(content)
    except _DamagedError:
        if before:
            _log.warning("counters are damaged, and begin anew", extra={"file": str(path)})
        return _Lane.made(content)
    if damaged := lane.mend():
        _log.warning(
            "counters are damaged, and begin anew",
            extra={"file": str(path), "reason": f"{damaged} hold nothing that was counted"},
        )
    return lane


def _read(path: Path) -> Iterable[tuple[str, float]]:
    """Return what is in another process's lane, or in none's; nothing where there is no lane (yet)."""
    with contextlib.suppress(OSError, ValueError, _DamagedError):  # the second where it has just become shorter
        if path.lstat().st_size >= _SIZE:  # which no pipe has: one would keep who opens it waiting
            with path.open("rb") as file:
                return _Lane(mmap.mmap(file.fileno(), _SIZE, access=mmap.ACCESS_READ)).items()
    return ()
