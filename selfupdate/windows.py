"""The operating system on Windows: other programs, files, signals, and how a successor is started.

`posix`, `notify`, `transcript` and `launch` offer the same names; `system` takes the one or the other.

Each child is in a job of its own (Microsoft, "Job Objects"), which is killed as a
whole. `select` takes sockets alone, so whatever can be waited for is made one: a
thread waits for a process, or reads a pipe, and a socket tells.

Sockets are not inherited but shared with a process by its id
(WSADuplicateSocket), and the process that is started is often a launcher, whose
child is the successor. So that tells its own id first (`MAINPID=`, as in
sd_notify(3)), by a pipe which it inherited, and is believed if it is in the job;
only then it is told the rest, by another pipe that ends with the incumbent. What
it writes goes to the service's own streams: no process would be there to read it
when the incumbent has gone.
"""

from __future__ import annotations

import base64
import contextlib
import glob
import json
import msvcrt
import os
import queue
import select
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from selfupdate import win32
from selfupdate.listener import HANDOVER_FD

if TYPE_CHECKING:
    import io
    from collections.abc import Callable, Iterable, Mapping, Sequence

    from selfupdate.listener import Address, Listener

assert sys.platform == "win32"  # for those who read types: none of this is there

SIGNALS = {signal.SIGTERM, signal.SIGINT, signal.SIGBREAK}
"""What tells the service to stop: Ctrl-C and Ctrl-Break on its console. SIGTERM is sent by nobody."""

CAN_BECOME = False
"""Whether a process can execute another program in its place."""

PROGRAM_SUFFIXES = (".exe", ".com", ".bat", ".cmd")
"""How the names of programs end."""

_ROOT = os.environ.get("SYSTEMROOT", r"C:\Windows")

TOOL_DIRECTORIES = (rf"{_ROOT}\System32\OpenSSH",)
"""Where the platform's own programs are."""

TOOL_SUFFIX = ".exe"
"""How their names end."""

STATE_HOME = "LOCALAPPDATA"
"""The variable that names the place of what programs keep (Microsoft, "KNOWNFOLDERID")."""

RELEASE_MODE = 0o700
"""Of a private copy: what is read-only could not be removed."""

MOST_CONNECTIONS = 400
"""How many connections a server may have: `select` takes 512 sockets."""

# Without these no program starts, and a launcher finds its interpreter on PATH.
_NEEDED = ("SYSTEMROOT", "SYSTEMDRIVE", "WINDIR", "COMSPEC", "PATH", "PATHEXT", "TEMP", "TMP")
CLEAN_ENVIRONMENT = {name: os.environ[name] for name in _NEEDED if name in os.environ}
"""All that a program needs to see of this process's environment."""

TOOL_ENVIRONMENT = {name: value for name, value in CLEAN_ENVIRONMENT.items() if not name.startswith("PATH")}
"""All that the platform's own programs see."""

STARTING = contextlib.nullcontext()
"""Nothing has to be held while a child is started: it inherits what it is given, and nothing else."""

_CREATE_SUSPENDED = 0x4
"""Microsoft, "Process Creation Flags"."""

_STOP_EVENT = r"Local\self-update-stop-{}"
"""The name of the event that tells the process with that id to stop."""

_AGAIN = 0.05
"""Seconds until it is tried again to take a lock; nothing tells when it is free."""

_CHUNK = 65536
_MESSAGE_SIZE = 4096
_HANDLE = "handle:"


def ready(fds: Iterable[int], deadline: float | None) -> set[int]:
    """Wait until one of the sockets `fds` is readable or has ended; return those, none when `deadline` has passed.

    `deadline` is a time of `time.monotonic()`, or None to wait without end.
    """
    waited = list(fds)
    timeout = None if deadline is None else max(0.0, deadline - time.monotonic())
    if not waited:  # which select does not take
        threading.Event().wait(timeout)
        return set()
    return set(select.select(waited, [], [], timeout)[0])


def wait_for_end(pid: int, deadline: float | None = None) -> None:
    """Wait until the process `pid`, anybody's, has ended, or until `deadline`."""
    with contextlib.suppress(OSError), win32.open_process(pid) as process:  # else it has
        process.wait(None if deadline is None else max(0.0, deadline - time.monotonic()))


class Process:
    """A child in a job of its own."""

    def __init__(self, child: subprocess.Popen[bytes], job: win32.Job) -> None:
        """Watch a child that is in `job`."""
        self.pid = child.pid
        self.has_left_strays = False
        """Nothing leaves a job."""
        self.job = job
        self.status: int | None = None
        """The exit status, or None while it is not known."""
        self._child = child
        self._exit_out, exit_in = socket.socketpair()
        self.exit_fd = self._exit_out.fileno()
        threading.Thread(target=_wait_for, args=(child, exit_in), name="child", daemon=True).start()

    def wait(self, deadline: float) -> bool:
        """Wait until the child has ended; tell whether it has."""
        return self.status is not None or bool(ready([self.exit_fd], deadline))

    def end(self, grace: float) -> int:
        """Let the child leave within `grace` seconds, and kill what is left of its job; return the exit status."""
        if self.status is None:
            self.wait(time.monotonic() + grace)
            self.job.kill()
            self.status = self._child.wait()
            self.forget()
        return self.status

    def forget(self) -> None:
        """Watch the child no more, and let it be."""
        self.job.close()
        self._exit_out.close()


def _wait_for(child: subprocess.Popen[bytes], tell: socket.socket) -> None:
    with tell:
        child.wait()


def own_child(_pid: int) -> Process:
    """Raise OSError: nothing started a child before it became this process."""
    raise OSError("no process becomes another here")


def reap_strangers() -> None:
    """Do nothing: no process waits to be reaped."""


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

    It can read `stdin`, if that is given. `fds` have no numbers here that it would know them by, and the job knows it
    without `mark`. Raises OSError.
    """
    del fds, mark
    child, job = _start(
        arguments,
        environ,
        win32.Job.KILL_ON_CLOSE,
        flags=subprocess.CREATE_NO_WINDOW,
        cwd=directory,
        stdin=subprocess.DEVNULL if stdin is None else stdin,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    assert child.stdout is not None
    assert child.stderr is not None
    return Process(child, job), _pump(child.stdout), _pump(child.stderr)


def _start(  # noqa: PLR0913 - what a child gets, each with its name
    arguments: Sequence[str],
    environ: Mapping[str, str] | None,
    limits: int,
    *,
    flags: int = 0,
    handles: Sequence[int] = (),
    cwd: Path | None = None,
    stdin: int | None = subprocess.DEVNULL,
    stdout: int | None = None,
    stderr: int | None = None,
) -> tuple[subprocess.Popen[bytes], win32.Job]:
    """Start a child in a job of its own, before it could have started another. Raises OSError."""
    job = win32.Job(limits)
    child = subprocess.Popen(
        list(arguments),
        bufsize=0,
        stdin=stdin,
        stdout=stdout,
        stderr=stderr,
        cwd=cwd,
        env=None if environ is None else dict(environ),
        startupinfo=subprocess.STARTUPINFO(lpAttributeList={"handle_list": list(handles)}),
        creationflags=flags | _CREATE_SUSPENDED,
    )
    try:
        job.take_in(child.pid)
    except OSError:
        child.kill()
        raise
    return child, job


def _pump(pipe: Any) -> socket.SocketIO:
    """Return a socket's reading end for what comes out of `pipe`, with which it ends."""
    ours, theirs = socket.socketpair()
    threading.Thread(target=_copy, args=(pipe, theirs), kwargs={"ends": True}, name="pipe", daemon=True).start()
    with ours:
        return ours.makefile("rb", buffering=0)


def _copy(pipe: Any, to: socket.socket, *, ends: bool) -> None:
    with contextlib.suppress(OSError), pipe:  # nobody reads any more
        while chunk := pipe.read(_CHUNK):
            to.sendall(chunk)
    if ends:
        to.close()


class _Writer:
    """A pipe that is written to in a thread of its own: who does not read it holds nobody up."""

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self._lines: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._write, name="channel", daemon=True)
        self._thread.start()

    def send(self, line: bytes) -> None:
        self._lines.put(line)

    def close(self, grace: float) -> None:
        """End it behind the last line, for which there are `grace` seconds."""
        self._lines.put(None)
        self._thread.join(grace)

    def _write(self) -> None:
        with contextlib.suppress(OSError), open(self._fd, "wb", buffering=0) as pipe:  # noqa: PTH123 - a descriptor
            while (line := self._lines.get()) is not None:
                while line:
                    line = line[pipe.write(line) or 0 :]


class Child:
    """A successor's process, from its start until it is left to itself or ended."""

    log: str | None = None
    """What it wrote is not kept."""

    def __init__(self, patience: float, _on_log: Callable[[], None]) -> None:
        """Prepare for one that may take `patience` seconds to read its last message. Raises OSError."""
        self.pid = 0
        """The id of the process that serves, as soon as it has told it; of the one that was started, until then."""
        self._patience = patience
        self._process: Process | None = None
        self._hello: Mapping[str, object] | None = None
        self._listeners: Sequence[Listener] = ()
        news_out, self._news_in = os.pipe()
        self._channel_out, channel_in = os.pipe()
        # The socket stays open when the pipe has ended: its end is no news, but that of the process.
        self._news, self._news_to = socket.socketpair()
        pipe = open(news_out, "rb", buffering=0)  # noqa: PTH123, SIM115 - a descriptor, and the thread's
        threading.Thread(
            target=_copy, args=(pipe, self._news_to), kwargs={"ends": False}, name="news", daemon=True
        ).start()
        self._channel = _Writer(channel_in)
        self._heard = b""

    def start(
        self,
        command: Sequence[str],
        environ: Mapping[str, str],
        hello: Mapping[str, object],
        listeners: Sequence[Listener],
        lock_fd: int,
    ) -> None:
        """Start `command`, to which the lock is passed on; it is told `hello` when it has said which process it is.

        Then `listeners` are shared with it. Raises OSError.
        """
        channel, news, lock = handles = [msvcrt.get_osfhandle(fd) for fd in (self._channel_out, self._news_in, lock_fd)]
        self._hello = {**hello, "lock": lock, "streams": []}
        self._listeners = listeners
        environ = {**environ, "NOTIFY_SOCKET": f"{_HANDLE}{news}", HANDOVER_FD: str(channel)}
        try:
            for handle in handles:
                os.set_handle_inheritable(handle, True)
            child, job = _start(
                command, environ, win32.Job.KILL_ON_CLOSE, handles=handles, flags=subprocess.CREATE_NEW_PROCESS_GROUP
            )
        finally:
            os.set_handle_inheritable(lock, False)
            os.close(self._channel_out)
            os.close(self._news_in)
        self._process = Process(child, job)
        self.pid = child.pid

    @property
    def exit_fd(self) -> int:
        """Readable when it has ended."""
        assert self._process is not None
        return self._process.exit_fd

    def fileno(self) -> int:
        """Return the socket that is readable when it has announced something."""
        return self._news.fileno()

    def receive(self) -> dict[str, str] | None:
        """Return what it announced next, or None."""
        if ready([self._news.fileno()], 0.0):
            self._heard += self._news.recv(_MESSAGE_SIZE)
        message, end, rest = self._heard.partition(b"\n\n")
        self._heard = rest if end else message[-_MESSAGE_SIZE:]
        if not end:
            return None
        lines = message.decode("utf-8", "replace").split("\n")
        fields = {name: value for name, equals, value in (line.partition("=") for line in lines) if equals}
        if "MAINPID" in fields:
            self._introduce(fields["MAINPID"])
        return fields

    def _introduce(self, pid: str) -> None:
        """Tell the process `pid`, if it is of the job, what it needs to know, once."""
        if self._hello is None or not pid.isdecimal() or not self.has(int(pid)):
            return
        self.pid = int(pid)
        with contextlib.suppress(OSError):  # it has ended, which is told otherwise
            sockets = [base64.b64encode(one.sock.share(self.pid)).decode() for one in self._listeners]
            hello, self._hello = self._hello, None
            self.tell({**hello, "shared": sockets})

    def hint(self, message: Mapping[str, Any]) -> None:
        """Send a message that may be lost; none is."""
        self.tell(message)

    def tell(self, message: Mapping[str, Any]) -> None:
        """Send a message on the channel, if it is one that listens there."""
        if self._hello is None:
            self._channel.send(json.dumps(message).encode() + b"\n")

    def has(self, pid: object) -> bool:
        """Tell whether the process `pid` is one of its own."""
        assert self._process is not None
        return isinstance(pid, int) and self._process.job.holds(pid)

    def owns(self, address: Address) -> bool | None:
        """Tell whether what listens on `address` are processes of its own; None where nothing does."""
        hosts, asked = _packed(address), address.port
        found = win32.listeners()
        owners = {pid for host, port, pid in found if port == asked and (host in hosts or not any(host))}
        # Wine does not know, and says 0. On Windows no process that listens has that id.
        return all(pid == 0 or self.has(pid) for pid in owners) if owners else None

    def release(self) -> None:
        """Let it live on when this process dies."""
        assert self._process is not None
        self._process.job.limit(0)

    def leave(self) -> None:
        """Let go of it: it is there to stay. What it starts from now on is not of its job."""
        assert self._process is not None
        self._process.job.limit(win32.Job.SILENT_BREAKAWAY)
        self._close()

    def terminate(self) -> None:
        """Tell it to leave: by its event, or by Ctrl-Break, where it has none and there is a console."""
        if self._process is None or self._process.status is not None:
            return
        try:
            win32.signal_event(_STOP_EVENT.format(self.pid))
        except OSError:
            with contextlib.suppress(OSError):
                win32.press_ctrl_break(self._process.pid)

    def end(self, grace: float) -> int | None:
        """Let it leave within `grace` seconds, kill what is left of it, and return its status, if it was started."""
        status = self._process.end(grace) if self._process else None
        self._close()
        return status

    def leave_to_hand_back(self, _patience: float, _hello: Mapping[str, object], _listeners: int) -> Comeback | None:
        """Do as `leave` does: nobody can hand back to this process."""
        self.leave()
        return None

    def reap(self) -> int:
        """Return the status of one that has ended, and kill what it left."""
        assert self._process is not None
        return self._process.end(0)

    def _close(self) -> None:
        self._channel.close(self._patience)
        self._news.close()
        self._news_to.close()
        if self._process:
            self._process.forget()


class Parent(Any):  # type: ignore[misc] # nothing of it is ever reached
    """The process that started this one, where that becomes its successor: on POSIX alone."""

    def __init__(self, _channel: Channel, _pid: int, _patience: float) -> None:
        """Raise OSError."""
        raise OSError("no process becomes another here")


Comeback = Any
"""What it takes for this process to become another: nobody has it."""


def _packed(address: Address) -> set[bytes]:
    """Return the hosts that `address` means, as the system's tables have them. Raises OSError."""
    host = "127.0.0.1" if address.host == "localhost" else address.host or None
    found = socket.getaddrinfo(host, address.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    return {socket.inet_pton(family, str(sockaddr[0])) for family, _, _, _, sockaddr in found}


class Channel:
    """The successor's end of the pipe on which it is told everything: a message a line."""

    def __init__(self, pipe: BinaryIO) -> None:
        """Read from `pipe`."""
        self._pipe = pipe

    def settimeout(self, _seconds: float | None) -> None:
        """Do nothing: what is read is there, or its writer has gone."""

    def recv(self, size: int) -> bytes:
        """Return the next message, none when the incumbent has gone."""
        return self._pipe.readline(size)

    def close(self) -> None:
        """Listen no more."""
        self._pipe.close()


def join(fd: str, environ: Mapping[str, str]) -> Channel:
    """Tell the incumbent that this is the process, and return the channel. Raises OSError or ValueError."""
    pipe = open(adopt(int(fd)), "rb")  # noqa: SIM115 - the channel's
    send(environ, MAINPID=str(os.getpid()))
    return Channel(pipe)


def adopt(handle: int) -> int:
    """Return a descriptor for what an incumbent passed on as `handle`, no longer to be inherited. Raises OSError."""
    fd = msvcrt.open_osfhandle(handle, 0)
    os.set_inheritable(fd, False)
    return fd


def shared(hello: Mapping[str, Any]) -> list[socket.socket]:
    """Return the listeners that the incumbent shared with this process. Raises OSError or ValueError."""
    found = [socket.fromshare(base64.b64decode(text, validate=True)) for text in hello["shared"]]
    for listener in found:
        listener.setblocking(False)
    return found


def send(environ: Mapping[str, str], **fields: str) -> None:
    """Tell the incumbent that `environ` names, if it names one and still listens."""
    where = environ.get("NOTIFY_SOCKET", "")
    if where.startswith(_HANDLE):
        message = "\n".join(f"{name}={value}" for name, value in fields.items())
        with contextlib.suppress(OSError, ValueError):
            win32.write(int(where.removeprefix(_HANDLE)), message.encode() + b"\n\n")


def execute_instead(path: str, arguments: Sequence[str], lock_fd: int) -> None:
    """Run the program `path` as though it were this process, and end with its status. Raises OSError.

    A process can't become another program here, and whoever started this one waits for this one: it
    lets go of the lock, and stays until the other ends, which ends with it. A successor of that one does not.
    """
    os.close(lock_fd)
    child, _job = _start([path, *arguments], None, win32.Job.KILL_ON_CLOSE | win32.Job.SILENT_BREAKAWAY, stdin=None)
    os._exit(child.wait())


def hold_signals() -> None:
    """Do nothing: what the console tells interrupts no system call, and none is lost."""


def take_signals() -> None:
    """Do nothing, as `hold_signals` does."""


def watch_for_stop(act: Callable[[], None]) -> None:
    """Call `act` when somebody signals this process's event: a process without a console gets no signals."""
    event = win32.create_event(_STOP_EVENT.format(os.getpid()))

    def watch() -> None:
        if event and event.wait():
            act()

    threading.Thread(target=watch, name="stop", daemon=True).start()


def obeys_escape_codes(fd: int, environ: Mapping[str, str]) -> bool:
    """Tell whether a console does what escape codes say, now that it was told to."""
    return environ.get("TERM") != "dumb" and win32.obey_escape_codes(fd)


def open_lock(path: Path) -> int:
    """Return a descriptor of the lock `path`, which is made where it is missing. Raises OSError."""
    return os.open(path, os.O_RDONLY | os.O_CREAT, 0o600)


def take_lock(fd: int, path: Path, *, wait: bool) -> int:
    """Take the lock, now or with `wait` when it is free; return the descriptor that holds it, in place of `fd`.

    It is that nobody else can open the file for writing, as long as somebody has this descriptor, or
    inherited it (Microsoft, "Creating and Opening Files", sharing mode). Raises BlockingIOError
    where another has it.
    """
    while True:
        try:
            handle = win32.open_exclusively(str(path))
        except OSError as error:
            if error.winerror != win32.SHARING_VIOLATION:
                raise
            if not wait:
                raise BlockingIOError from None
        else:
            os.close(fd)
            return msvcrt.open_osfhandle(handle, 0)
        ready([], time.monotonic() + _AGAIN)


def is_noexec(_path: Path) -> bool:
    """Tell that programs can be executed everywhere."""
    return False


def put_in_place(new: Path, program: Path) -> None:
    """Rename `new` to `program`, which may be there, and may run. Raises OSError.

    A file that runs can't be replaced, but renamed away (Microsoft, "MoveFileEx"): between the two
    renames there is a moment without `program`. Whoever dies in it leaves the old file as `….old`
    beside it, which `mend` takes back.
    """
    try:
        new.replace(program)
    except PermissionError:  # it runs
        old = program.with_name(f"{program.name}.{os.urandom(4).hex()}.old")
        program.rename(old)
        try:
            new.rename(program)
        except OSError:
            old.rename(program)
            raise


def mend(program: Path) -> None:
    """Put `program` back where `put_in_place` was interrupted; remove what it left, but for what still runs."""
    left = [Path(name) for name in glob.glob(f"{glob.escape(str(program))}.????????.old")]  # noqa: PTH207 - a name as it is
    for old in sorted(left, key=lambda path: path.stat().st_mtime_ns, reverse=True):
        with contextlib.suppress(OSError):
            if program.exists():
                old.unlink()
            else:
                old.rename(program)


def sync_directory(_path: Path) -> None:
    """Do nothing: the file system's own journal has the names in a directory."""


def make_room(connections: int) -> int:
    """Return for how many connections there is room: for all."""
    return connections
