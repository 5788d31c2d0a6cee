"""Other programs: start one, wait for it, end it with all that it started."""

import io
import signal
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from selfupdate.errors import StopRequestedError
from selfupdate.system import Process, ready, start_piped, wait_for_end

__all__ = [
    "LEFTOVER_TIME",
    "LeftProcessesError",
    "Output",
    "TooMuchOutputError",
    "TooSlowError",
    "capture",
    "ending",
    "ready",
    "wait_for_end",
]

LEFTOVER_TIME = 0.2
"""Seconds from a child's end to that of its output; longer means that another process holds it."""
_LAST_LOOKS = 3
"""Looks when the time is over: all may have come while this process was kept from looking, what fills a pipe and its
end. More would let an output without end have its way."""


def ending(status: int | None) -> str:
    """Return how a process ended, in words; a negative `status` is a signal's number, None is not known."""
    if status is None:
        return "ended"
    if status >= 0:
        return f"ended with status {status}"
    try:
        return f"was killed by {signal.Signals(-status).name}"
    except ValueError:
        return f"was killed by signal {-status}"


class Output(NamedTuple):
    """What a program printed, and how it ended."""

    status: int
    """The exit status, negative for a signal."""
    stdout: bytes
    stderr: bytes


class TooSlowError(Exception):
    """The program had not ended at its deadline."""


class TooMuchOutputError(Exception):
    """The program printed more than it may."""


class LeftProcessesError(Exception):
    """The program ended, and a process that it started lived on."""


def capture(  # noqa: PLR0913 - each bound, and each descriptor, has its name
    arguments: Sequence[str],
    environ: Mapping[str, str],
    directory: Path,
    *,
    time_limit: float,
    size_limit: int,
    stop_fd: int,
    stdin: int | None = None,
    fds: Sequence[int] = (),
    mark: str = "",
) -> Output:
    """Run `arguments` in `directory`, and return what it printed.

    It can read `stdin`, if that is given, and has `fds`, under the numbers that they have here.
    Whatever it started is killed with it. Raises OSError where it cannot be executed,
    TooSlowError after `time_limit` seconds, TooMuchOutputError above `size_limit` bytes of
    standard output (of standard error, the last of them are kept), LeftProcessesError, and
    StopRequestedError when `stop_fd` becomes readable.
    """
    process, out, err = start_piped(arguments, environ, directory, stdin=stdin, fds=fds, mark=mark)
    try:
        stdout, stderr = _read(process, (out, err), time.monotonic() + time_limit, size_limit, stop_fd)
    finally:
        status = process.end(grace=0)
        for stream in (out, err):
            stream.close()
    if process.has_left_strays:
        raise LeftProcessesError
    return Output(status, stdout, stderr)


def _read(
    process: Process, printed: tuple[io.RawIOBase, io.RawIOBase], deadline: float, size_limit: int, stop_fd: int
) -> tuple[bytes, bytes]:
    """Read both streams until they end."""
    streams = {stream.fileno(): stream for stream in printed}
    (out, err), exited = streams, process.exit_fd
    read = {out: bytearray(), err: bytearray()}
    watched, late = {out, err, exited}, 0
    while watched:
        late += time.monotonic() >= deadline
        readable = ready({*watched, stop_fd}, deadline) if late <= _LAST_LOOKS else set()
        if stop_fd in readable:
            raise StopRequestedError("a stop signal arrived")
        if not readable:
            raise TooSlowError if exited in watched else LeftProcessesError
        if exited in readable:
            watched.discard(exited)
            deadline = min(deadline, time.monotonic() + LEFTOVER_TIME)
        for fd in readable & read.keys():
            chunk = streams[fd].read(65536) or b""
            if not chunk:
                watched.discard(fd)
            read[fd] += chunk
            if fd == err:
                del read[err][:-size_limit]  # the last words say most
        if len(read[out]) > size_limit:
            raise TooMuchOutputError
    return bytes(read[out]), bytes(read[err])
