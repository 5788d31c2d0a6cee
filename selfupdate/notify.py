"""The readiness datagrams of sd_notify(3), both ends.

A datagram is `NAME=value` lines. The receiver asks the kernel who sent each one
(unix(7), SCM_CREDENTIALS), so that only the process it waits for is believed.
"""

from __future__ import annotations

import contextlib
import os
import socket
import struct
import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping

MAX_SIZE = 4096
"""Bytes of a datagram; the rest is cut off."""

PATIENCE = 0.1
"""Seconds for a datagram to be taken; the receiver's queue may be full (unix(7))."""
assert sys.platform != "win32"  # for those who read types: none of this is there

_UCRED = struct.Struct("=iII")  # pid, uid, gid


class Receiver:
    """A socket that a child process is told of through `NOTIFY_SOCKET`."""

    def __init__(self) -> None:
        """Bind a new name; raises OSError.

        The name is an abstract one: it needs no file, so a process that is killed leaves none.
        """
        name = f"self-update/{os.urandom(16).hex()}"
        self.address = f"@{name}"
        self._socket = _bind(name)

    def fileno(self) -> int:
        """Return the descriptor, readable when a datagram waits."""
        return self._socket.fileno()

    def receive(self, pid: int) -> dict[str, str] | None:
        """Return the next datagram that process `pid` sent, or None; others' are dropped."""
        while True:
            try:
                message, ancillary, _, _ = self._socket.recvmsg(MAX_SIZE, socket.CMSG_SPACE(_UCRED.size))
            except BlockingIOError:
                return None
            for level, kind, value in ancillary:
                if (level, kind) == (socket.SOL_SOCKET, socket.SCM_CREDENTIALS) and _UCRED.unpack(value)[0] == pid:
                    lines = message.decode("utf-8", "replace").split("\n")
                    return {name: value for name, equals, value in (line.partition("=") for line in lines) if equals}

    def close(self) -> None:
        """Take no more datagrams."""
        self._socket.close()


def _bind(name: str) -> socket.socket:
    receiver = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK)
    receiver.setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, 1)
    receiver.bind(f"\0{name}")
    return receiver


def send(environ: Mapping[str, str], **fields: str) -> None:
    """Tell the service manager that `environ` names, if it names one and still listens.

    One that does not take what it is told can hold nobody up for longer than `PATIENCE`.
    """
    address = environ.get("NOTIFY_SOCKET", "")
    if not address.startswith(("@", "/")):
        return
    message = "\n".join(f"{name}={value}" for name, value in fields.items()).encode()
    # A manager that has gone is no reason to fail: its end is told otherwise.
    with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sender:
        sender.settimeout(PATIENCE)
        sender.sendto(message, address.replace("@", "\0", 1) if address.startswith("@") else address)
