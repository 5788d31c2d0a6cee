"""Addresses, and the sockets that listen on them: bind, adopt, pass on.

A listener is non-blocking in every process: two processes wait on one queue
during a handover, and one that blocks in accept(2) would steal a connection
that it was told of too late. It is never passed to shutdown(2), which would end
it for every process that shares it, and never uses SO_REUSEPORT, which would
split the queue and let others bind beside it.
"""

from __future__ import annotations

import contextlib
import errno
import ipaddress
import os
import socket
import stat
import struct
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from selfupdate.errors import StartError

if TYPE_CHECKING:
    from collections.abc import MutableMapping

BACKLOG = 4096
"""Connections that wait in the kernel while nobody accepts; the kernel cuts it to net.core.somaxconn."""

_MAX_PORT = 65535
_MAX_PATH = 107
"""Bytes of a Unix socket's path: sun_path has 108, one of them NUL (unix(7))."""

_LISTENING = "0A"
"""TCP_LISTEN in /proc/net/tcp."""
_MAPPED = bytes(8) + struct.pack(">I", *struct.unpack("=I", b"\0\0\xff\xff"))
"""What stands before an IPv4 address in IPv6's form there."""

FIRST_FD = 3
"""The first descriptor that is passed on (sd_listen_fds(3), SD_LISTEN_FDS_START)."""


@dataclass(frozen=True)
class Address:
    """`host:port`, or the path of a Unix socket."""

    host: str = ""
    port: int = 0
    path: str = ""

    def __str__(self) -> str:
        """Return the address as a flag takes it."""
        if self.path:
            return f"unix:{self.path}"
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


def parse_address(text: str) -> Address:
    """Return the address that `text` is: `host:port`, `:port`, `[::1]:port` or `unix:/path`.

    Raises ValueError on anything else.
    """
    if text.startswith("unix:/"):
        path = text.removeprefix("unix:")
        if len(os.fsencode(path)) > _MAX_PATH or not path.isprintable():
            raise ValueError(text)
        return Address(path=path)
    host, colon, port = text.rpartition(":")
    if not colon or not port.isascii() or not port.isdigit() or int(port) > _MAX_PORT:
        raise ValueError(text)
    if host.startswith("[") and host.endswith("]"):
        host = host[1:-1]
        try:
            socket.inet_pton(socket.AF_INET6, host)
        except OSError:
            raise ValueError(text) from None
    elif ":" in host or any(letter.isspace() or not letter.isprintable() for letter in host):
        raise ValueError(text)
    return Address(host, int(port))


def is_loopback(address: Address) -> bool:
    """Tell whether `address` can be reached from this machine alone."""
    if address.path or address.host.lower() == "localhost":
        return True
    try:
        return ipaddress.ip_address(address.host).is_loopback
    except ValueError:  # a name, or every address of the machine
        return False


def is_local(listener: socket.socket) -> bool:
    """Tell whether a listening socket, whoever bound it, can be reached from this machine alone."""
    if listener.family not in {socket.AF_INET, socket.AF_INET6}:
        return True
    return is_loopback(Address(listener.getsockname()[0]))


def owners_of(address: Address) -> set[int]:
    """Return the accounts, by uid, whose processes listen on `address`: another's answers are none of a successor's.

    The kernel says whose each listening socket is (proc(5), /proc/net/tcp; the file of a Unix socket).
    """
    if sys.platform == "win32":
        return set()
    if address.path:
        try:
            return {Path(address.path).stat().st_uid}
        except FileNotFoundError:
            return set()
    family, (host, port) = _resolve(address)
    ours = _in_kernel(family, host)
    owners: set[int] = set()
    for table in ("tcp", "tcp6"):
        with contextlib.suppress(FileNotFoundError), Path(f"/proc/net/{table}").open(encoding="ascii") as lines:
            next(lines)  # the names of the columns
            for line in lines:
                _, local, _, state, _, _, _, uid, *_ = line.split()
                if state != _LISTENING:
                    break  # those that listen come first, and of the others there may be many thousands
                place, _, number = local.rpartition(":")
                if int(number, 16) == port and _overlap(ours, bytes.fromhex(place)):
                    owners.add(int(uid))
    return owners


def _in_kernel(family: int, host: str) -> bytes:
    """Return an address as /proc/net/tcp shows it: words of 32 bits in the machine's order."""
    packed = socket.inet_pton(family, host)
    words = struct.unpack(f"={len(packed) // 4}I", packed)
    return struct.pack(f">{len(words)}I", *words)


def _overlap(one: bytes, other: bytes) -> bool:
    """Tell whether two addresses in the kernel's form can be reached by the same: one of them may be every address.

    An IPv4 address may be written as an IPv6 one (RFC 4291, section 2.5.5.2).
    """
    one, other = (place.removeprefix(_MAPPED) for place in (one, other))
    return one == other or not any(one) or not any(other)


def bind(address: Address) -> socket.socket:
    """Return a listening, non-blocking socket on `address`.

    Raises StartError, naming the address and what to do.
    """
    try:
        # A port that was asked for stays the socket's own whatever is done to it; one that the kernel chose does not.
        listener = _bound(vacant(address) if not address.port else address)
        listener.listen(BACKLOG)
    except OSError as error:
        raise StartError(f"cannot listen on {address}: {_reason(error)}") from error
    return listener


def _bound(address: Address) -> socket.socket:
    """Return a socket that is bound to `address` and does not listen. Raises OSError."""
    if address.path:
        return _bind_path(address.path)
    family, sockaddr = _resolve(address)
    bound = socket.socket(family, socket.SOCK_STREAM)
    try:
        bound.setblocking(False)
        if sys.platform == "win32":
            bound.setsockopt(socket.SOL_SOCKET, socket.SO_EXCLUSIVEADDRUSE, 1)
        else:
            bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if family == socket.AF_INET6:
            # An empty host means every address of the machine, IPv4 included; `[::]` means what it says.
            bound.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0 if not address.host else 1)
        bound.bind(sockaddr)
    except BaseException:
        bound.close()
        raise
    return bound


def vacant(address: Address) -> Address:
    """Return `address`, with a free port for port 0, when nobody listens there now. Raises OSError."""
    if address.path:
        return address
    with _bound(address) as bound:
        return address_of(bound, address)


def address_of(listener: socket.socket, asked: Address) -> Address:
    """Return `asked` with the port that `listener` really has."""
    return asked if asked.path else replace(asked, port=listener.getsockname()[1])


def remove(address: Address) -> None:
    """Remove the path of a Unix socket that nobody will listen on any more."""
    if address.path:
        Path(address.path).unlink(missing_ok=True)


def connect(address: Address, timeout: float) -> socket.socket:
    """Return a connection to the service at `address`; every address of the machine means loopback.

    Raises OSError. `timeout` in seconds.
    """
    if address.path:
        if sys.platform == "win32":
            raise OSError(errno.EAFNOSUPPORT, "no Unix sockets on this platform")
        connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        target: str | tuple[str | int, ...] = address.path
    else:
        family, sockaddr = _resolve(address)
        loopback = {"0.0.0.0": "127.0.0.1", "::": "::1"}  # noqa: S104 - compared with, not bound
        connection = socket.socket(family, socket.SOCK_STREAM)
        target = (loopback.get(sockaddr[0], sockaddr[0]), *sockaddr[1:])
    try:
        connection.settimeout(timeout)
        connection.connect(target)
    except BaseException:
        connection.close()
        raise
    return connection


def adopt(environ: MutableMapping[str, str]) -> list[socket.socket]:
    """Return the listening sockets that a service manager passed on (sd_listen_fds(3)).

    The variables are taken out of `environ`, and the descriptors are no longer inherited.
    Raises StartError where a descriptor is not a listening socket.
    """
    pid, count = environ.pop("LISTEN_PID", ""), environ.pop("LISTEN_FDS", "")
    environ.pop("LISTEN_FDNAMES", None)
    if pid != str(os.getpid()) or not count.isdigit():
        return []
    listeners = []
    for fd in range(FIRST_FD, FIRST_FD + int(count)):
        try:
            os.set_inheritable(fd, False)
            listener = socket.socket(fileno=fd)
            listener.setblocking(False)
            if sys.platform != "win32" and not listener.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN):
                raise StartError(f"descriptor {fd} of LISTEN_FDS={count} is a socket that does not listen")
        except OSError as error:
            raise StartError(f"descriptor {fd} of LISTEN_FDS={count} is no socket: {error.strerror}") from error
        listeners.append(listener)
    return listeners


def _resolve(address: Address) -> tuple[socket.AddressFamily, tuple[str, int]]:
    """Return the family and address to bind, without asking a name server for what needs none."""
    if not address.host:
        family = socket.AF_INET6 if socket.has_dualstack_ipv6() else socket.AF_INET
        return family, ("::" if family == socket.AF_INET6 else "0.0.0.0", address.port)  # noqa: S104 - `:8080` asks for it
    if address.host == "localhost":
        return socket.AF_INET, ("127.0.0.1", address.port)
    try:
        found = socket.getaddrinfo(address.host, address.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except UnicodeError:  # a label that is empty or too long
        raise socket.gaierror(socket.EAI_NONAME, "no such host name") from None
    family, _, _, _, sockaddr = min(found, key=lambda entry: entry[0] != socket.AF_INET)
    return family, (str(sockaddr[0]), int(sockaddr[1]))


def _bind_path(path: str) -> socket.socket:
    """Bind a Unix socket; one that a dead process left behind is removed first."""
    if sys.platform == "win32":
        raise OSError(errno.EAFNOSUPPORT, "no Unix sockets on this platform")
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        with contextlib.suppress(FileNotFoundError):
            if not stat.S_ISSOCK(Path(path).lstat().st_mode):
                raise OSError(errno.EEXIST, "a file that is no socket is there; move it away, or choose another path")
            if not _is_served(path):
                Path(path).unlink()
        listener.setblocking(False)
        listener.bind(path)
    except BaseException:
        listener.close()
        raise
    return listener


def _is_served(path: str) -> bool:
    try:
        connect(Address(path=path), 1.0).close()
    except ConnectionRefusedError:
        return False
    return True


def _reason(error: OSError) -> str:
    if error.errno == errno.EADDRINUSE:
        return "another process listens there; stop it, or choose another address"
    if error.errno == errno.EACCES:
        return "not permitted; ports below 1024 need privileges"
    if error.errno == errno.EADDRNOTAVAIL:
        return "this machine has no such address"
    if isinstance(error, socket.gaierror):
        return "the host name is not known here"
    return error.strerror or str(error)
