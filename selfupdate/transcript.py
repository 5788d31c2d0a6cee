"""What a successor writes: passed on to this process's own streams as it comes, and the end of it kept.

The successor's standard output and error are pipes, which a thread here reads. A
pipe whose reader dies kills its writer, and this process may be killed at any
moment, and leaves after the blessing: so another process holds the reading ends,
too, and passes on what still comes (`posix.Guard`). A successor that knows the
full protocol goes back to the service's own streams when it is there to stay.
"""

from __future__ import annotations

import contextlib
import os
import sys
import threading
import time
from typing import TYPE_CHECKING

from selfupdate import posix
from selfupdate.foreign import shown

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

assert sys.platform != "win32"  # for those who read types: none of this is there

KEPT = 4096
"""Bytes of the end that are kept."""

STREAMS = (1, 2)
"""This process's standard output and error."""

_CHUNK = 65536
_NEWS_INTERVAL = 0.1
"""Seconds between two times that it is told that there is more."""


class Transcript:
    """Pipes for the streams of one child, and what came out of them."""

    def __init__(self, on_more: Callable[[], None]) -> None:
        """Make the pipes; raises OSError. Whenever more has been written, call `on_more`, but not too often."""
        self._on_more = on_more
        # Where both streams are one, one pipe keeps the lines of both in order.
        self._targets = (2,) if os.path.sameopenfile(*STREAMS) else STREAMS
        pipes = [os.pipe() for _ in self._targets]
        self.readers = {target: reader for target, (reader, _) in zip(self._targets, pipes, strict=True)}
        """The reading ends by the stream that each is passed on to."""
        self._writers = {target: writer for target, (_, writer) in zip(self._targets, pipes, strict=True)}
        self._stop_out, self._stop_in = os.pipe()
        self._tail = b""
        self._is_cut = False
        self._has_left = False
        self._thread = threading.Thread(target=self._relay, name="transcript", daemon=True)
        self._thread.start()

    @property
    def writers(self) -> Mapping[int, int]:
        """The writing ends by the child's stream that each is to be."""
        return {stream: self._writers.get(stream, self._writers[self._targets[-1]]) for stream in STREAMS}

    @property
    def text(self) -> str:
        """The end of what was written, in whole lines where it has any, with what is not printable escaped."""
        tail = self._tail
        if self._is_cut and b"\n" in tail:
            tail = tail.partition(b"\n")[2]
        return _escaped(tail)

    def close_writers(self) -> None:
        """Leave the writing ends to the child, so that its end is theirs."""
        for writer in self._writers.values():
            os.close(writer)
        self._writers = {}

    def end(self, grace: float) -> None:
        """Take what is still in the pipes, at most for `grace` seconds, then read no more."""
        self._thread.join(grace)
        self.leave(grace)

    def leave(self, grace: float) -> None:
        """Read no more: what still comes is another's to read. Waits at most `grace` seconds for the last words."""
        if self._has_left:
            return
        self._has_left = True
        self.close_writers()
        os.write(self._stop_in, b"\0")
        self._thread.join(grace)
        if not self._thread.is_alive():  # else nobody reads our own streams: the descriptors are in use as long
            for fd in (*self.readers.values(), self._stop_out, self._stop_in):
                os.close(fd)

    def _relay(self) -> None:
        targets = {reader: target for target, reader in self.readers.items()}
        # The line that each pipe has begun: a line is passed on whole, so that lines of two processes do not mix.
        begun = dict.fromkeys(targets, b"")
        tell_at: float | None = None
        told_at = 0.0
        while begun and self._stop_out not in (readable := posix.ready({*begun, self._stop_out}, tell_at)):
            for reader in readable:
                chunk = os.read(reader, _CHUNK)
                self._keep(chunk)
                tell_at = tell_at or told_at + _NEWS_INTERVAL
                lines = begun[reader] + chunk
                end = lines.rfind(b"\n") + 1 if chunk and len(lines) < _CHUNK else len(lines)
                _write(targets[reader], lines[:end])
                begun[reader] = lines[end:]
                if not chunk:
                    del begun[reader]
            if tell_at is not None and tell_at <= time.monotonic():
                tell_at, told_at = None, time.monotonic()
                self._on_more()
        for reader, line in begun.items():
            _write(targets[reader], line)

    def _keep(self, chunk: bytes) -> None:
        self._is_cut = self._is_cut or len(self._tail) + len(chunk) > KEPT
        self._tail = (self._tail + chunk)[-KEPT:]


def _escaped(text: bytes) -> str:
    """Return `text` with all that is not printable escaped, but for the ends of lines."""
    return "\n".join(shown(line) for line in text.decode("utf-8", "surrogateescape").split("\n"))


def _write(stream: int, text: bytes) -> None:
    if os.isatty(stream):  # which would do what escape codes say
        text = _escaped(text).encode()
    with contextlib.suppress(OSError):  # nobody reads it, or its disk is full: no reason to hold the successor up
        while text:
            text = text[os.write(stream, text) :]
