"""The operating system on POSIX, which is Linux: other programs, files, and signals.

`windows` offers the same names; `system` takes the one or the other.

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
import fcntl
import io
import os
import resource
import select
import signal
import sys
import threading
import time
from typing import TYPE_CHECKING, NoReturn

from selfupdate.listener import FIRST_FD

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
    from pathlib import Path

assert sys.platform != "win32"  # for those who read types: none of this is there

SIGNALS = {signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGCHLD}
"""What this process is told by signals: to stop, to upgrade, and that a child has ended."""

CAN_BECOME = sys.platform == "linux"
"""Whether a process can execute another program in its place."""

PROGRAM_SUFFIXES = ("",)
"""How the names of programs end: that they are executable is in their mode."""

TOOL_DIRECTORIES = ("/usr/bin", "/bin", "/usr/local/bin")
"""Where the platform's own programs are."""

TOOL_SUFFIX = ""
"""How their names end."""

TOOL_ENVIRONMENT = {"PATH": "/usr/bin:/bin", "LC_ALL": "C", "TZ": "UTC"}
"""All that they see."""

STATE_HOME = "XDG_STATE_HOME"
"""The variable that names the place of what programs keep (XDG Base Directory Specification)."""

RELEASE_MODE = 0o500
"""Of a private copy."""

MOST_CONNECTIONS = 4000
"""How many connections a server may have, where there are as many descriptors."""

_OTHER_DESCRIPTORS = 64
"""What a process has open besides connections, in the middle of an upgrade and a scan."""

CLEAN_ENVIRONMENT = {
    "PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
    "LANG": "C.UTF-8",
    "LC_ALL": "C.UTF-8",
    "TZ": "UTC",
}
"""All that a program needs to see of this process's environment: nothing of it."""

STARTING = threading.Lock()
"""Held while a child is between fork and exec, and while a file to be executed is closed."""

_children: set[int] = set()
"""The children that somebody here waits for."""

_GRACE = 0.2
"""Seconds for a guard, or a process that was killed, to end."""

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
    poll = select.poll()
    for fd in fds:
        poll.register(fd, select.POLLIN)
    timeout = None if deadline is None else max(0.0, deadline - time.monotonic()) * 1000
    return {fd for fd, _ in poll.poll(timeout)}


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
        self._signal(signal.SIGTERM)

    def kill(self) -> None:
        """End it."""
        self._signal(signal.SIGKILL)

    def _signal(self, number: signal.Signals) -> None:
        with contextlib.suppress(ProcessLookupError):
            signal.pidfd_send_signal(self.exit_fd, number)


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
        if self.status is None:
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
                wait_for_end(pid, time.monotonic() + _GRACE)

    def _kill_stray(self, pid: int) -> bool:
        """Kill the process `pid` if it bears the mark, or is in the directory that the mark names; tell whether."""
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
        if self.status is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.pid, number)


def reap_strangers() -> None:
    """Reap the children that have ended and are nobody's here.

    They were started by what this process was before it executed a release (`become`), or they came to the
    init of a container when they lost their parent. The kernel shows one child that has ended at a time: where
    that is one of those that are waited for, who waits for it looks again behind it.
    """
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


def wait_for_end(pid: int, deadline: float | None = None) -> None:
    """Wait until the process `pid`, anybody's, has ended, or until `deadline`."""
    with contextlib.suppress(OSError):  # it has
        fd = watch(pid)
        try:
            ready([fd], deadline)
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
        self._shell.end(_GRACE)

    def leave(self) -> None:
        """Leave what the group writes to the guard; it was released to live on."""
        os.close(self._write)
        self._shell.forget()


def own_child(pid: int) -> Process:
    """Return the child `pid`, which this process started before it became what it is. Raises OSError."""
    return Process(pid)


def start_piped(
    arguments: Sequence[str],
    environ: Mapping[str, str],
    directory: Path,
    *,
    stdin: int | None,
    fds: Sequence[int],
    mark: str,
) -> tuple[Process, io.RawIOBase, io.RawIOBase]:
    """Start `arguments` in `directory`; return the child, and what it prints to its output and its error.

    It can read `stdin`, if that is given, and has `fds`, under the numbers that they have here. Raises OSError.
    """
    import subprocess  # which a start need not wait for

    with STARTING:
        child = subprocess.Popen(
            list(arguments),
            bufsize=0,
            stdin=subprocess.DEVNULL if stdin is None else stdin,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            pass_fds=fds,
            cwd=directory,
            env=dict(environ),
            start_new_session=True,
            umask=0o077,
        )
        process = Process(child.pid, mark)
    child.returncode = 0  # it is reaped by `Process.end`, and by nobody else
    assert isinstance(child.stdout, io.RawIOBase)
    assert isinstance(child.stderr, io.RawIOBase)
    with contextlib.suppress(OSError):  # it has ended
        resource.prlimit(child.pid, resource.RLIMIT_CORE, (0, 0))
    return process, child.stdout, child.stderr


def execute_instead(path: str, arguments: Sequence[str], _lock_fd: int) -> None:
    """Become the program `path`, in this very process, which holds the lock no longer (execve(2)). Raises OSError."""
    os.execv(path, [path, *arguments])  # noqa: S606 - no shell is the point


def hold_signals() -> None:
    """Let `SIGNALS` wait, for this thread and those that it starts."""
    signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)


def take_signals() -> None:
    """Let `SIGNALS` come to this thread, those that waited first."""
    signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)


def watch_for_stop(_act: Callable[[], None]) -> None:
    """Call nothing: signals are all that tells a process to stop."""


def obeys_escape_codes(_fd: int, environ: Mapping[str, str]) -> bool:
    """Tell whether a terminal does what escape codes say (terminfo(5))."""
    return (environ.get("TERM") or "dumb") != "dumb"


def open_lock(path: Path) -> int:
    """Return a descriptor of the lock `path`, which is made where it is missing. Raises OSError."""
    return os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o600)


def take_lock(fd: int, _path: Path, *, wait: bool) -> int:
    """Take the lock of a descriptor, now or with `wait` when it is free; return the descriptor that holds it.

    It belongs to the open file and not to a process (flock(2)): whoever inherits the descriptor
    holds it, too. Raises BlockingIOError where another has it.
    """
    fcntl.flock(fd, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
    return fd


def is_noexec(path: Path) -> bool:
    """Tell whether nothing can be executed in the directory `path`. Raises OSError."""
    return bool(os.statvfs(path).f_flag & os.ST_NOEXEC)


def put_in_place(new: Path, program: Path) -> None:
    """Rename `new` to `program`, which may be there, and may run: at each moment the one or the other is there.

    Raises OSError.
    """
    new.replace(program)


def mend(_program: Path) -> None:
    """Do nothing: `put_in_place` leaves nothing behind (rename(2))."""


def sync_directory(path: Path) -> None:
    """Wait until the disk has the names in a directory: without that, a rename may be lost in a power cut."""
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def make_room(connections: int) -> int:
    """Have this process open descriptors for as many connections, if it may; return for how many it can.

    The soft limit is low for the sake of programs that use select(2), which this one does not (setrlimit(2)).
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = connections + _OTHER_DESCRIPTORS
    if hard != resource.RLIM_INFINITY:
        wanted = min(wanted, hard)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
    return max(1, min(connections, wanted - _OTHER_DESCRIPTORS))
