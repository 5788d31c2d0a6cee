"""A timer of the kernel's that ticks at a rate, so that a schedule is kept to the microsecond (timerfd_create(2)).

epoll_wait(2) alone takes whole milliseconds, which is half of the time between two requests at 500 a second.
"""

from __future__ import annotations

import ctypes
import math
import os
import time

_ABSOLUTE = 1  # TFD_TIMER_ABSTIME


class _Time(ctypes.Structure):
    _fields_ = (("seconds", ctypes.c_long), ("nanoseconds", ctypes.c_long))

    @classmethod
    def of(cls, seconds: float) -> _Time:
        fraction, whole = math.modf(seconds)
        return cls(int(whole), int(fraction * 1e9))


class _Schedule(ctypes.Structure):
    _fields_ = (("interval", _Time), ("first", _Time))


class Ticks:
    """Ticks `rate` times a second, on the clock of `time.monotonic`; its descriptor is readable when one is due."""

    def __init__(self, rate: float) -> None:
        libc = ctypes.CDLL(None, use_errno=True)
        self._interval = 1 / rate
        self._next = time.monotonic() + self._interval
        self._fd: int = libc.timerfd_create(time.CLOCK_MONOTONIC, os.O_NONBLOCK | os.O_CLOEXEC)
        schedule = _Schedule(_Time.of(self._interval), _Time.of(self._next))
        if self._fd < 0 or libc.timerfd_settime(self._fd, _ABSOLUTE, ctypes.byref(schedule), None):
            raise OSError(ctypes.get_errno(), "timerfd")

    def fileno(self) -> int:
        return self._fd

    def take(self) -> list[float]:
        """Return when each tick since the last call was due."""
        try:
            count = int.from_bytes(os.read(self._fd, 8), "little")
        except BlockingIOError:
            return []
        due = [self._next + number * self._interval for number in range(count)]
        self._next += count * self._interval
        return due
