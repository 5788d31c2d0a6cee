"""How a successor is started on POSIX, and what connects it with its incumbent: both ends.

`windows` offers the same names; `system` takes the one or the other.

The incumbent passes descriptors: the listening sockets (sd_listen_fds(3)), one
end of a channel of messages, which is private and whose end tells that the
incumbent has gone, the lock of the state directory, and the service's own
streams, for later. The successor announces itself by datagrams (sd_notify(3)).
"""

import errno
import fcntl
import json
import os
import socket
import sys
import termios
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, NoReturn

from selfupdate import notify, posix, transcript
from selfupdate.listener import FIRST_FD, HANDOVER_FD, Address, Listener, names_of
from selfupdate.owners import owners_of

assert sys.platform != "win32"  # for those who read types: none of this is there

_ANSWER_SIZE = 65536
_ROOM_FOR_HINTS = 65536
"""Bytes that may wait in the channel, which has room for thrice as many (unix(7), net.core.wmem_default)."""
_LAST_WORDS_TIME = 0.2
"""Seconds for what is still in the pipes of a child's streams."""


class _Link:
    """A successor's process, the channel to it, and what it announces."""

    def __init__(self, channel: socket.socket, patience: float) -> None:
        """Prepare for one that may take `patience` seconds to read a message. Raises OSError."""
        self._process: posix.Watched | None = None
        self._is_deaf = False
        self._channel = channel
        self._channel.settimeout(patience)
        self._notifications = notify.Receiver()

    @property
    def pid(self) -> int:
        """Its process id."""
        assert self._process is not None
        return self._process.pid

    @property
    def exit_fd(self) -> int:
        """Readable when it has ended."""
        assert self._process is not None
        return self._process.exit_fd

    def fileno(self) -> int:
        """Return the descriptor that is readable when it has announced something."""
        return self._notifications.fileno()

    def receive(self) -> dict[str, str] | None:
        """Return what it announced next, or None."""
        return self._notifications.receive(self.pid)

    def tell(self, message: Mapping[str, Any]) -> None:
        """Send a message on the channel."""
        self._send(json.dumps(message).encode())

    def hint(self, message: Mapping[str, Any]) -> None:
        """Send a message that may be lost, where it takes no room from those that may not."""
        waiting = fcntl.ioctl(self._channel, termios.TIOCOUTQ, bytes(4))  # unix(7), SIOCOUTQ
        if int.from_bytes(waiting, sys.byteorder) < _ROOM_FOR_HINTS:
            self.tell(message)

    def _send(self, message: bytes) -> None:
        if self._is_deaf:
            self._channel.setblocking(False)
        try:
            self._channel.send(message)
        except OSError as error:
            # It has gone, which is told otherwise, or does not read, which it need not: no more waiting for it.
            self._is_deaf = error.errno != errno.EMSGSIZE

    def has(self, pid: object) -> bool:
        """Tell whether the process `pid` is the one that was started."""
        return pid == self.pid

    def owns(self, address: Address) -> bool | None:
        """Tell whether what listens on `address` is this account's; None where nothing does."""
        owners = owners_of(address)
        return owners == {os.geteuid()} if owners else None

    def _close(self) -> None:
        self._channel.close()
        self._notifications.close()
        if self._process:
            self._process.forget()


class Child(_Link):
    """A successor that this process starts, until it is left to itself or ended."""

    def __init__(self, patience: float, on_log: Callable[[], None]) -> None:
        """Prepare for one that may take `patience` seconds to read a message. Raises OSError.

        Whenever it has written more, `on_log` is called.
        """
        # Of messages, not of bytes: a message that does not fit is dropped whole, and never cut.
        ours, self._theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        super().__init__(ours, patience)
        self._process: posix.Process | None = None
        self._guard: posix.Guard | None = None
        self._transcript = transcript.Transcript(on_log)

    def start(
        self,
        command: Sequence[str],
        environ: Mapping[str, str],
        hello: Mapping[str, object],
        listeners: Sequence[Listener],
        lock_fd: int,
    ) -> None:
        """Start `command`, to which `listeners` and the lock are passed on, and tell it `hello`. Raises OSError."""
        passed = [*(one.sock.fileno() for one in listeners), self._theirs.fileno(), lock_fd, *transcript.STREAMS]
        channel, lock, *streams = range(FIRST_FD + len(listeners), FIRST_FD + len(passed))
        self.tell({**hello, "lock": lock, "streams": streams})
        address = self._notifications.address
        mark = f"NOTIFY_SOCKET={address}"
        environ = {**environ, **names_of(listeners), "NOTIFY_SOCKET": address, HANDOVER_FD: str(channel)}
        try:
            self._process = posix.spawn(
                command, environ, passed, listeners=len(listeners), streams=self._transcript.writers, mark=mark
            )
            self._guard = posix.Guard(self._process.pid, self._transcript.readers)
        finally:
            self._theirs.close()
            self._transcript.close_writers()

    @property
    def log(self) -> str | None:
        """The end of what it wrote."""
        return self._transcript.text

    def release(self) -> None:
        """Let it live on when this process dies."""
        if self._guard:
            self._guard.release()

    def leave(self) -> None:
        """Let go of it: it is there to stay."""
        self._let_write()
        self._close()

    def leave_to_hand_back(self, patience: float, hello: Mapping[str, object], listeners: int) -> "Comeback | None":
        """Let go of it, where it is to hand back, and return what that takes; None where it does not say so in time.

        Where it has ended, this process will find what it would have been told, and that nobody is there.
        """
        assert self._process is not None
        self._let_write()
        self._notifications.close()
        self._channel.settimeout(patience)
        try:
            address = str(json.loads(self._channel.recv(_ANSWER_SIZE))["notify"])
        except (OSError, ValueError, KeyError, TypeError):
            self._channel.close()
            has_ended = self._process.wait(time.monotonic() + _LAST_WORDS_TIME)  # which follows that of the channel
            if not has_ended or self._process.end(0) == 0:  # it was told to stop
                self._process.forget()
                return None
            nobody, self._channel = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            with nobody:
                nobody.send(_to_the_original(self.pid, hello, listeners))
            address = ""
        return Comeback(address, self._channel, self._process)

    def _let_write(self) -> None:
        if self._guard:
            self._transcript.leave(_LAST_WORDS_TIME)
            self._guard.leave()
            self._guard = None

    def terminate(self) -> None:
        """Tell it to leave."""
        if self._process:
            self._process.terminate()

    def end(self, grace: float) -> int | None:
        """Let it leave within `grace` seconds, kill what is left of it, and return its status, if it was started."""
        status = self._process.end(grace) if self._process else None
        if self._guard:
            self._guard.end()
            self._guard = None
        self._transcript.end(_LAST_WORDS_TIME)
        self._close()
        return status

    def reap(self) -> int:
        """Return the status of one that has ended, and kill what it left in its group."""
        assert self._process is not None
        return self._process.end(0)


class Parent(_Link):
    """The process that started this one, and becomes its successor: the roles on the channel are exchanged."""

    log: str | None = None
    """What it writes goes to the service's own streams."""

    def __init__(self, channel: socket.socket, pid: int, patience: float) -> None:
        """Prepare for the process `pid` at the other end of `channel`. Raises OSError."""
        super().__init__(channel, patience)
        self._process: posix.Parent = posix.Parent(pid)

    def call(self, hello: Mapping[str, object], listeners: int) -> None:
        """Have it come, bringing `listeners` sockets, and tell it `hello` first."""
        self.tell({"notify": self._notifications.address})
        self._send(_to_the_original(os.getpid(), hello, listeners))

    def dismiss(self, grace: float) -> None:
        """Have it serve no more and stay until this process ends, or end it where it does not answer to that."""
        self.tell({"dismissed": True})
        # Its end of the channel closes when it accepts no more, or has ended.
        if not posix.ready([self._channel.fileno()], time.monotonic() + grace):
            self._process.kill()
        self._close()

    def release(self) -> None:
        """Let it live on when this process dies, as it does anyway."""

    def terminate(self) -> None:
        """Tell it to leave."""
        self._process.terminate()

    def leave(self) -> None:
        """Let go of it."""
        self._close()

    def reap(self) -> None:
        """Leave its status to its own parent."""


def _to_the_original(pid: int, hello: Mapping[str, object], listeners: int) -> bytes:
    """Return what the process `pid` tells the original one first; see Comeback for what that brings itself."""
    lock = FIRST_FD + listeners + 1  # behind the channel
    return json.dumps({**hello, "lock": lock, "streams": [], "comes_back": True, "pid": pid}).encode()


class Comeback(NamedTuple):
    """The original process's end of all that: what it takes to execute the release that serves now."""

    notify_address: str
    channel: socket.socket
    successor: posix.Process
    """Which serves now, and will hand over."""

    def execute(
        self, command: Sequence[str], environ: Mapping[str, str], listeners: Sequence[Listener], lock_fd: int
    ) -> NoReturn:
        """Become it. Raises OSError, with everything as it was."""
        channel = str(FIRST_FD + len(listeners))
        environ = {**environ, **names_of(listeners), "NOTIFY_SOCKET": self.notify_address, HANDOVER_FD: channel}
        passed = [*(one.sock.fileno() for one in listeners), self.channel.fileno(), lock_fd]
        posix.become(command, environ, passed, listeners=len(listeners))

    def give_up(self, error: OSError) -> None:
        """Tell the successor that this process stays what it is (sd_notify(3))."""
        notify.send({"NOTIFY_SOCKET": self.notify_address}, ERRNO=str(error.errno))
        self.channel.close()


Channel = socket.socket
"""The successor's end of the channel."""


def join(fd: str, _environ: Mapping[str, str]) -> Channel:
    """Return the successor's end of the channel that was passed on as `fd`. Raises OSError or ValueError."""
    channel = socket.socket(fileno=int(fd))
    os.set_inheritable(channel.fileno(), False)
    return channel


def adopt(fd: int) -> int:
    """Return a descriptor that an incumbent passed on as `fd`, no longer to be inherited. Raises OSError."""
    os.set_inheritable(fd, False)
    return fd


def shared(_hello: Mapping[str, Any]) -> list[socket.socket]:
    """Return no listeners: they are inherited, and `listener.adopt` finds them."""
    return []
