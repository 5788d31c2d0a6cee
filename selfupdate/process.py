"""Other programs: start one, wait for it, end it with all that it started.

Each child leads a process group of its own and is killed as that group. It is
reaped only after the group was killed, so the number of the group is still the
child's and can't have come to belong to a stranger. What a child put into a
session of its own is known by the mark that each child has in its environment,
a variable whose value no other process was given, or by the directory of its own
that it was started in.

Starting takes a lock, and so does closing a file that was written to be
executed: between fork(2) and execve(2) a child holds a copy of every open
descriptor, and the kernel refuses to execute a file that anybody has open for
writing (ETXTBSY). With the lock, no child is in between when such a file closes.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import subprocess
import sys
import threading
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, NoReturn

from selfupdate.errors import StopRequestedError
from selfupdate.listener import FIRST_FD

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
    from pathlib import Path

STARTING = threading.Lock()
"""Held while a child is between fork and exec, and while a file to be executed is closed."""

_children: set[int] = set()
"""The children that somebody here waits for."""

LEFTOVER_TIME = 0.2
"""Seconds from a child's end to that of its output; longer means that another process holds it."""

_ROUNDS = 20
"""How often it is looked for processes that a child left behind."""

_HIGH_FD = 64
"""Descriptors are copied from above here to their places, so that no place is taken while it is still a source."""

# The first word says that the group may live on, the second that it has ended. Without the second, what it
# writes from now on is passed on, for as long as it does: see `transcript`. A signal that is meant for the whole
# service must not end it before those that write: it starts with these blocked, then has them ignored, as cat has.
_GUARD = 'trap "" HUP INT TERM; read -r word <&3 || kill -KILL "-$0"; read -r word <&3 && exit; '
_FOR_ALL = [number for number in signal.Signals if number.name in {"SIGHUP", "SIGINT", "SIGTERM"}]
_PASS_ON = {(2,): "exec cat <&4 >&2", (1, 2): "cat <&4 >&1 & cat <&5 >&2; wait"}

# LISTEN_PID has to be the number of a process that does not exist yet. The shell knows its own,
# and keeps it across exec.
_WITH_PID = 'export LISTEN_PID=$$; exec "$0" "$@"'


def ready(fds: Iterable[int], deadline: float | None) -> set[int]:
    """Wait until one of `fds` is readable or has ended; return those, none when `deadline` has passed.

    `deadline` is a time of `time.monotonic()`, or None to wait without end.
    """
    if sys.platform == "win32":
        raise OSError("poll needs POSIX")
    poll = select.poll()
    for fd in fds:
        poll.register(fd, select.POLLIN)
    timeout = None if deadline is None else max(0.0, deadline - time.monotonic()) * 1000
    return {fd for fd, _ in poll.poll(timeout)}


def ending(status: int) -> str:
    """Return how a process ended, in words; a negative `status` is a signal's number."""
    if status >= 0:
        return f"ended with status {status}"
    try:
        return f"was killed by {signal.Signals(-status).name}"
    except ValueError:
        return f"was killed by signal {-status}"


def watch(pid: int) -> int:
    """Return a descriptor that is readable when the process `pid` has ended (pidfd_open(2)). Raises OSError."""
    if sys.platform != "linux":
        raise OSError("process descriptors need Linux")
    return os.pidfd_open(pid)


class Watched:
    """A process whose end the kernel tells."""

    def __init__(self, pid: int) -> None:
        """Watch the process `pid`. Raises OSError."""
        self.pid = pid
        self.exit_fd = watch(pid)

    def wait(self, deadline: float) -> bool:
        """Wait until it has ended; tell whether it has."""
        return bool(ready([self.exit_fd], deadline))

    def forget(self) -> None:
        """Watch it no more, and let it be."""
        if self.exit_fd >= 0:
            os.close(self.exit_fd)
            self.exit_fd = -1


class Parent(Watched):
    """The process that started this one: it can be watched and ended, and is another's to reap."""

    def __init__(self, pid: int) -> None:
        """Watch `pid`, which this process was started by. Raises ProcessLookupError where that has ended."""
        super().__init__(pid)
        if os.getppid() != pid:  # looked at while it is watched: the number can't have gone to a stranger
            self.forget()
            raise ProcessLookupError(pid)

    def terminate(self) -> None:
        """Tell it to leave."""
        self._signal("SIGTERM")

    def kill(self) -> None:
        """End it."""
        self._signal("SIGKILL")

    def _signal(self, name: str) -> None:
        if sys.platform == "linux":
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(self.exit_fd, signal.Signals[name])


class Process(Watched):
    """A child that leads a process group."""

    def __init__(self, pid: int, mark: str = "") -> None:
        """Watch the child `pid`, which has not been reaped; `mark` is in its environment alone."""
        super().__init__(pid)
        _children.add(pid)
        self.has_left_strays = False
        """Whether a process of a session of its own had to be killed, too."""
        self._mark = mark.encode()
        self.status: int | None = None
        """The exit status, negative for a signal, or None while it is not reaped."""

    def wait(self, deadline: float) -> bool:
        """Wait until the child has ended; tell whether it has."""
        return self.status is not None or super().wait(deadline)

    def terminate(self) -> None:
        """Tell the group to leave."""
        self._signal(signal.SIGTERM)

    def end(self, grace: float) -> int:
        """Let the child leave within `grace` seconds, kill what is left of its group, and reap it.

        Returns the exit status, negative for a signal.
        """
        if self.status is None and sys.platform == "linux":
            self.wait(time.monotonic() + grace)
            self._signal(signal.SIGKILL)
            self._kill_strays()
            self.status = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])
            self.forget()
            reap_strangers()  # behind this one there may be others: see there
        assert self.status is not None
        return self.status

    def _kill_strays(self) -> None:
        """Kill what the child started outside of its group, as far as it kept the mark.

        A process that is killed may just have started another: it is looked again, until none is left.
        """
        for _ in range(_ROUNDS if self._mark else 0):
            strays = [pid for pid in _pids_since(self.pid) if self._kill_stray(pid)]
            if not strays:
                return
            self.has_left_strays = True
            for pid in strays:
                _wait_for_end(pid)

    def _kill_stray(self, pid: int) -> bool:
        """Kill the process `pid` if it bears the mark, or is in the directory that the mark names; tell whether."""
        if sys.platform != "linux":
            return False
        try:
            fd = os.pidfd_open(pid)  # whatever happens to the number now, this is the process that is looked at
        except OSError:
            return False
        try:
            if os.getpgid(pid) == self.pid:
                return False  # it is of the group, and dying already
            place = os.readlink(f"/proc/{pid}/cwd".encode()).removesuffix(b" (deleted)")  # noqa: PTH115 - no path of ours
            if place != self._mark.partition(b"=")[2]:
                with open(f"/proc/{pid}/environ", "rb") as file:  # noqa: PTH123 - no path of ours
                    if self._mark not in file.read().split(b"\0"):
                        return False
            signal.pidfd_send_signal(fd, signal.SIGKILL)
        except OSError:  # somebody else's, or gone
            return False
        finally:
            os.close(fd)
        return True

    def forget(self) -> None:
        """Watch the child no more, and let it be: its end is a stranger's."""
        super().forget()
        _children.discard(self.pid)

    def _signal(self, number: int) -> None:
        if self.status is None and sys.platform != "win32":
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.pid, number)


def reap_strangers() -> None:
    """Reap the children that have ended and are nobody's here.

    They were started by what this process was before it executed a release (`become`), or they came to the
    init of a container when they lost their parent. The kernel shows one child that has ended at a time: where
    that is one of those that are waited for, who waits for it looks again behind it.
    """
    if sys.platform != "linux":
        return
    with STARTING, contextlib.suppress(ChildProcessError):
        while found := os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT):
            if found.si_pid in _children:
                return
            os.waitpid(found.si_pid, 0)


def _pids_since(pid: int) -> list[int]:
    """Return the numbers of the processes that were started after `pid` was (numbers are given in turn)."""
    with open("/proc/loadavg", encoding="ascii") as file:  # noqa: PTH123 - no path of ours
        last = int(file.read().split()[-1])
    numbers = (int(name) for name in os.listdir("/proc") if name.isdigit())  # noqa: PTH208 - names, not paths
    return [number for number in numbers if (pid < number <= last if last >= pid else number > pid or number <= last)]


def _wait_for_end(pid: int) -> None:
    with contextlib.suppress(OSError):
        fd = watch(pid)
        try:
            ready([fd], time.monotonic() + LEFTOVER_TIME)
        finally:
            os.close(fd)


def spawn(  # noqa: PLR0913 - what a child gets, each with its name
    arguments: Sequence[str],
    environ: Mapping[str, str],
    fds: Sequence[int],
    *,
    listeners: int = 0,
    streams: Mapping[int, int] | None = None,
    mark: str = "",
    blocked: Collection[signal.Signals] = (),
) -> Process:
    """Start `arguments` with `fds` as its descriptors 3, 4, … of which the first are `listeners` sockets.

    The child keeps this process's directory and standard streams, but for those that are given in
    `streams`, by their number. `mark` is an entry of `environ` that no other process has,
    `blocked` are signals that do not reach it. Raises OSError.
    """
    if sys.platform != "linux":
        raise OSError("passing descriptors needs Linux")
    environ = dict(environ)
    command = list(arguments)
    if listeners:
        environ["LISTEN_FDS"] = str(listeners)
        command = ["/bin/sh", "-c", _WITH_PID, *arguments]
    places = {**dict(enumerate(fds, FIRST_FD)), **(streams or {})}
    with _copied(places) as high, STARTING:
        pid = os.posix_spawn(
            command[0],
            command,
            environ,
            file_actions=[(os.POSIX_SPAWN_DUP2, fd, place) for place, fd in high.items()],
            setpgroup=0,
            setsigmask=blocked,
            setsigdef=(signal.SIGINT, signal.SIGTERM, signal.SIGPIPE),
        )
        return Process(pid, mark)


def become(arguments: Sequence[str], environ: Mapping[str, str], fds: Sequence[int], *, listeners: int) -> NoReturn:
    """Execute `arguments` in place of this process, which keeps its id.

    It has `fds` as its descriptors 3, 4, … of which the first are `listeners` sockets. All else that is open is
    closed and every thread ends, so nothing may be under way any more. Signals that are blocked stay so, and one
    that comes meanwhile waits (execve(2)). Raises OSError, with everything as it was.
    """
    places = dict(enumerate(fds, FIRST_FD))
    environ = {**environ, "LISTEN_FDS": str(listeners), "LISTEN_PID": str(os.getpid())}
    with _copied(places) as high, _copied({place: place for place in places if _is_open(place)}) as before, STARTING:
        try:
            for place, fd in high.items():
                os.dup2(fd, place)
            os.execve(arguments[0], list(arguments), environ)  # noqa: S606 - no shell is the point
        except OSError:
            for place in places:
                if place in before:
                    os.dup2(before[place], place, inheritable=False)
                else:
                    os.close(place)
            raise


@contextlib.contextmanager
def _copied(places: Mapping[int, int]) -> Iterator[dict[int, int]]:
    """Copy the descriptors that are to come to `places` to where none of those is, for as long as it takes."""
    if sys.platform != "linux":
        raise OSError("passing descriptors needs Linux")
    import fcntl  # noqa: PLC0415 - POSIX only

    high: dict[int, int] = {}
    try:
        for place, fd in places.items():
            high[place] = fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, _HIGH_FD)
        yield high
    finally:
        for fd in high.values():
            os.close(fd)


def _is_open(fd: int) -> bool:
    try:
        os.fstat(fd)
    except OSError:
        return False
    return True


class Guard:
    """Acts for a process group when this process dies, or leaves, before that group has ended.

    A group that was started by a process that is killed would live on, and hold what it inherited;
    one that is there to stay needs somebody to read what it writes. The kernel closes the pipe, and
    the shell at its other end, which did not get its word, acts.
    """

    def __init__(self, pid: int, readers: Mapping[int, int]) -> None:
        """Guard the group `pid`; `readers` is what it writes, by the stream to pass it on to. Raises OSError."""
        read, self._write = os.pipe()
        try:
            command = ["/bin/sh", "-c", _GUARD + _PASS_ON[tuple(readers)], str(pid)]
            self._shell = spawn(command, {"PATH": "/usr/bin:/bin"}, [read, *readers.values()], blocked=_FOR_ALL)
        except BaseException:
            os.close(self._write)
            raise
        finally:
            os.close(read)
        self.pid = self._shell.pid

    def release(self) -> None:
        """Let the group live on when this process dies."""
        with contextlib.suppress(BrokenPipeError):
            os.write(self._write, b"\n")

    def end(self) -> None:
        """Guard no more: the group has ended."""
        self.release()
        self.release()
        os.close(self._write)
        self._shell.end(LEFTOVER_TIME)

    def leave(self) -> None:
        """Leave what the group writes to the guard; it was released to live on."""
        os.close(self._write)
        self._shell.forget()


@dataclass(frozen=True)
class Output:
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
    stdin: int = subprocess.DEVNULL,
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
    with STARTING:
        child = subprocess.Popen(
            list(arguments),
            stdin=stdin,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            pass_fds=fds,
            cwd=directory,
            env=dict(environ),
            start_new_session=True,
            umask=0o077,
        )
        process = Process(child.pid, mark)
    try:
        _allow_no_core(child.pid)
        stdout, stderr = _read(process, child, time.monotonic() + time_limit, size_limit, stop_fd)
    finally:
        child.returncode = process.end(grace=0)
        for stream in (child.stdout, child.stderr):
            assert stream is not None
            stream.close()
    if process.has_left_strays:
        raise LeftProcessesError
    return Output(child.returncode, stdout, stderr)


def _allow_no_core(pid: int) -> None:
    if sys.platform == "linux":
        import resource  # noqa: PLC0415 - POSIX only

        with contextlib.suppress(OSError):  # it has ended
            resource.prlimit(pid, resource.RLIMIT_CORE, (0, 0))


def _read(
    process: Process, child: subprocess.Popen[bytes], deadline: float, size_limit: int, stop_fd: int
) -> tuple[bytes, bytes]:
    """Read both streams until they end."""
    assert child.stdout is not None
    assert child.stderr is not None
    out, err, exited = child.stdout.fileno(), child.stderr.fileno(), process.exit_fd
    read = {out: bytearray(), err: bytearray()}
    watched = {out, err, exited}
    while watched:
        readable = ready({*watched, stop_fd}, deadline) if time.monotonic() < deadline else set()
        if stop_fd in readable:
            raise StopRequestedError("a stop signal arrived")
        if not readable:
            raise TooSlowError if exited in watched else LeftProcessesError
        if exited in readable:
            watched.discard(exited)
            deadline = min(deadline, time.monotonic() + LEFTOVER_TIME)
        for fd in readable & read.keys():
            chunk = os.read(fd, 65536)
            if not chunk:
                watched.discard(fd)
            read[fd] += chunk
            if fd == err:
                del read[err][:-size_limit]  # the last words say most
        if len(read[out]) > size_limit:
            raise TooMuchOutputError
    return bytes(read[out]), bytes(read[err])
