"""What this process is told by signals, and by its own threads: one word at a time, for the main thread.

The main thread alone takes signals, and only while it listens: every other thread
is started with them blocked. So none is lost between its arrival and the moment in
which this process executes another program: it stays pending, and the new program
takes it (execve(2), signal(7)).
"""

from __future__ import annotations

import collections
import contextlib
import os
import signal
import socket
import time

from selfupdate import system

SETTLED = 0
"""A thread's word: what this process is has been settled."""
RETIRED = -2
"""A thread's word: another process has taken over, and nothing is under way here."""
CHILD: int = getattr(signal, "SIGCHLD", -1)
"""A child has ended; nobody is told."""
HANG_UP: int = getattr(signal, "SIGHUP", -1)
"""An upgrade is asked for."""
STOP = signal.SIGTERM
"""The service is to stop; so does every word that is none of these."""


class Signals:
    """The words that have arrived. One for the process."""

    def __init__(self) -> None:
        """Take signals from here on; they wait until `next` is called."""
        self._words: collections.deque[int] = collections.deque()
        self._out, self._in = socket.socketpair()
        self._in.setblocking(False)
        self._had_terminal = _has_terminal()
        system.hold_signals()
        signal.set_wakeup_fd(self._in.fileno(), warn_on_full_buffer=False)
        for number in system.SIGNALS:
            if number != HANG_UP or signal.getsignal(number) is not signal.SIG_IGN:  # nohup(1)
                signal.signal(number, lambda number, _: self._words.append(number))
        system.watch_for_stop(lambda: self.wake(STOP))

    def wake(self, word: int = SETTLED) -> None:
        """Tell the main thread `word`."""
        self._words.append(word)
        with contextlib.suppress(BlockingIOError):  # full: it will wake
            self._in.send(b"\0")

    def next(self, timeout: float | None = None, fd: int | None = None) -> int | None:
        """Return the next word; None when `timeout` seconds have passed, or `fd` is readable first.

        Signals wait from when this returns until it is called again.
        """
        fds = [self._out.fileno()] if fd is None else [self._out.fileno(), fd]
        deadline = None if timeout is None else time.monotonic() + timeout
        while (word := self._take()) is None:
            system.take_signals()
            try:
                ready = system.ready(fds, deadline)
            finally:
                system.hold_signals()
            if self._out.fileno() not in ready:
                return self._take()  # what came just before it was held
            self._out.recv(4096)
        return word

    def _take(self) -> int | None:
        """Return the first word that is for somebody else: children are reaped, a hang-up of the terminal is a stop."""
        while self._words:
            word = self._words.popleft()
            if word == CHILD:
                system.reap_strangers()
            elif word == HANG_UP and self._had_terminal and not _has_terminal():
                return STOP
            else:
                return word
        return None


def _has_terminal() -> bool:
    """Tell whether this process has a controlling terminal (tty(4))."""
    try:
        os.close(os.open("/dev/tty", os.O_RDONLY))
    except OSError:
        return False
    return True
