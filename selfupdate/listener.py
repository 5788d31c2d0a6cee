"""Addresses, and the sockets that listen on them: bind, adopt, choose, pass on.

A listener is non-blocking in every process: two processes wait on one queue
during a handover, and one that blocks in accept(2) would steal a connection
that it was told of too late. It is never passed to shutdown(2), which would end
it for every process that shares it, and never uses SO_REUSEPORT, which would
split the queue and let others bind beside it.

The path of a Unix socket goes with who bound it. One that this service bound is
removed when its last generation stops; one that a service manager passed on is
the manager's, and is never touched.
"""

import contextlib
import errno
import ipaddress
import os
import re
import socket
import stat
import sys
from collections.abc import Callable, Iterable, MutableMapping, Sequence
from pathlib import Path
from typing import NamedTuple

from selfupdate.errors import StartError
from selfupdate.foreign import shown

BACKLOG = 4096
"""Connections that wait in the kernel while nobody accepts; the kernel cuts it to net.core.somaxconn."""

MAX_SOCKETS = 32
"""Sockets that a service serves at most; they are passed on together (see `process`, _HIGH_FD)."""

_MAX_PORT = 65535
_MAX_PATH = 107
"""Bytes of a Unix socket's path: sun_path has 108, one of them NUL (unix(7))."""
_PATH_MODE = 0o666
"""Of a Unix socket's file, before the umask: who may write to it may connect (unix(7))."""

PEER_TIME = 1.0
"""Seconds for a Unix socket to take a connection; the kernel does, unless the queue is full."""

_UNNAMED = "unknown"
"""What sd_listen_fds_with_names(3) calls sockets without names."""

VARIABLES = ("LISTEN_PID", "LISTEN_FDS", "LISTEN_FDNAMES", "LISTEN_PIDFDID")
"""By which a service manager tells one process what it passes on to it."""
FIRST_FD = 3
"""The first descriptor that is passed on (sd_listen_fds(3), SD_LISTEN_FDS_START)."""

HANDOVER_FD = "SELF_UPDATE_HANDOVER_FD"
"""The variable that names the channel between an incumbent and its successor."""


class Address(NamedTuple):
    """`host:port`, the path of a Unix socket, or the name of a socket that a service manager passes on.

    A path that begins with `@` is a name in the kernel, without a file (unix(7), abstract).
    """

    host: str = ""
    port: int = 0
    path: str = ""
    passed: str = ""

    def __str__(self) -> str:
        """Return the address as a flag takes it."""
        if self.passed:
            return f"fd:{self.passed}"
        if self.path:
            return f"unix:{self.path}"
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"

    @property
    def is_fixed(self) -> bool:
        """Whether it means one place, and not any free port."""
        return bool(self.port or self.path or self.passed)


class Listener(NamedTuple):
    """A listening socket, and what it can't tell by itself."""

    sock: socket.socket
    address: Address
    """As people are told it: `localhost:8080` where that was asked for."""
    name: str = "http"
    """What it is passed on as (sd_listen_fds(3), LISTEN_FDNAMES)."""
    is_own: bool = True
    """Whether this service bound it, in this generation or an earlier one, and no service manager."""

    def remove(self) -> None:
        """Remove the path of a Unix socket, if this service bound it."""
        if self.is_own:
            remove(self.address)


def names_of(listeners: Iterable[Listener]) -> dict[str, str]:
    """Return the variable that tells a program the names of what is passed on to it (sd_listen_fds_with_names(3))."""
    names = [listener.name for listener in listeners]
    return {"LISTEN_FDNAMES": ":".join(names)} if names else {}


def join(addresses: Iterable[Address]) -> str:
    """Return addresses as `-bind` takes them: with commas between."""
    return ",".join(map(str, addresses))


def parse_address(text: str) -> Address:
    """Return the address that `text` is: `host:port`, `:port`, `[::1]:port`, `unix:/path` or `unix:@name`.

    Raises ValueError on anything else, and on a path with a comma, which stands between addresses.
    """
    if text.startswith(("unix:/", "unix:@")):
        path = text.removeprefix("unix:")
        if len(os.fsencode(path)) > _MAX_PATH or not path.isprintable() or "," in path or path == "@":
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
    elif any(letter in ":," or letter.isspace() or not letter.isprintable() for letter in host):
        raise ValueError(text)
    return Address(host, int(port))


def parse_addresses(text: str) -> tuple[Address, ...]:
    """Return the addresses that `text` is, with commas between; `fd:NAME` is a socket that is passed on.

    Raises ValueError.
    """
    addresses = tuple(_parse_passed(part) or parse_address(part) for part in text.split(","))
    if len(addresses) > MAX_SOCKETS:
        raise ValueError(text)
    return addresses


def _parse_passed(text: str) -> Address | None:
    # What systemd.socket(5), FileDescriptorName=, takes, but for the comma.
    named = re.fullmatch("fd:([ -+.-9;-~-]{1,255})", text)
    return Address(passed=named[1]) if named else None


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
    return is_loopback(_address_in_kernel(listener))


def bind(address: Address) -> socket.socket:
    """Return a listening, non-blocking socket on `address`.

    Raises StartError, naming the address and what to do.
    """
    try:
        # A port that was asked for stays the socket's own whatever is done to it; one that the kernel chose does not.
        listener = _bound(vacant(address) if not address.port else address)
        listener.listen(BACKLOG)
    except OSError as error:
        raise StartError(f"cannot listen on {address}: {_reason(address, error)}") from error
    return listener


def listen(
    places: Sequence[Address | Listener], bind: Callable[[Address], socket.socket] = bind
) -> tuple[Listener, ...]:
    """Return a listener for each of `places`: itself, or a socket that is bound by `bind`.

    All or none: raises StartError after it has closed, and removed, what it had bound.
    """
    found: list[Listener] = []
    try:
        for place in places:
            if isinstance(place, Address):
                sock = bind(place)
                found.append(Listener(sock, address_of(sock, place)))
            else:
                found.append(place)
    except StartError:
        for listener in found:
            if listener not in places:
                listener.sock.close()
                listener.remove()
        raise
    return tuple(found)


def choose(asked: Sequence[Address], passed: Sequence[Listener]) -> list[Address | Listener]:
    """Return what is served, in the order that was asked for: addresses to bind, and sockets that were `passed` on.

    Where a name is asked for (`fd:NAME`), just what was asked for; else all that were passed, or, where
    none was, the addresses. Raises StartError, naming those that were passed, for a name that was not,
    and where it is more than MAX_SOCKETS.
    """
    if not any(address.passed for address in asked):
        return [*(passed or asked)]
    places: list[Address | Listener] = []
    for address in asked:
        named = [listener for listener in passed if listener.name == address.passed]
        if address.passed and not named:
            names = ", ".join(dict.fromkeys(f"fd:{shown(listener.name)}" for listener in passed))
            raise StartError(f"no socket was passed on for -bind {address}; passed on were: {names or 'none'}")
        places += named if address.passed else [address]
    if len(places) > MAX_SOCKETS:
        raise StartError(f"-bind asks for {len(places)} sockets; at most {MAX_SOCKETS} can be served")
    return places


def _bound(address: Address) -> socket.socket:
    """Return a socket that is bound to `address` and does not listen. Raises OSError."""
    if address.path:
        return _bind_path(address.path)
    family, sockaddr = resolve(address)
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
    return asked if asked.path else asked._replace(port=listener.getsockname()[1])


def remove(address: Address) -> None:
    """Remove the path of a Unix socket that nobody will listen on any more."""
    if address.path.startswith("/"):
        Path(address.path).unlink(missing_ok=True)


def connect(address: Address, timeout: float) -> socket.socket:
    """Return a connection to the service at `address`; every address of the machine means loopback.

    Raises OSError. `timeout` in seconds.
    """
    if address.passed:
        raise OSError(errno.EDESTADDRREQ, "its service manager knows where that is")
    if address.path:
        if sys.platform == "win32":
            raise OSError(errno.EAFNOSUPPORT, "no Unix sockets on this platform")
        connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        target: str | tuple[str | int, ...] = _sun_path(address.path)
    else:
        family, sockaddr = resolve(address)
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


def adopt(environ: MutableMapping[str, str]) -> tuple[Listener, ...]:
    """Return the listeners that a service manager passed on (sd_listen_fds(3)), at most MAX_SOCKETS.

    The variables are taken out of `environ`, and the descriptors are no longer inherited.
    Raises StartError where a descriptor is not a listening stream socket whose address `-bind` could name.
    """
    pid, count, names, _ = (environ.pop(name, "") for name in VARIABLES)
    if pid != str(os.getpid()) or not count:
        return ()
    if not re.fullmatch("[0-9]{1,9}", count) or int(count) > MAX_SOCKETS:
        raise StartError(f"LISTEN_FDS={shown(count, 20)} is not a number of sockets from 0 to {MAX_SOCKETS}")
    fds = range(FIRST_FD, FIRST_FD + int(count))
    named = names.split(":") if names else [_UNNAMED] * len(fds)
    if len(named) != len(fds):
        raise StartError(f"LISTEN_FDNAMES={shown(names, 200)} has {len(named)} names, and LISTEN_FDS={count}")
    return tuple(_adopt(fd, name) for fd, name in zip(fds, named, strict=True))


def _adopt(fd: int, name: str) -> Listener:
    """Return the listener that was passed on as descriptor `fd`. Raises StartError."""
    what = f"descriptor {fd}, which was passed on as {shown(name)!r},"
    try:
        os.set_inheritable(fd, False)
        sock = socket.socket(fileno=fd)
        sock.setblocking(False)
        if sock.type != socket.SOCK_STREAM:
            raise StartError(f"{what} is no stream socket; what HTTP is served on is one (ListenStream=)")
        if sys.platform != "win32" and not sock.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN):
            raise StartError(f"{what} is a socket that does not listen; a connection, say, of a unit with Accept=yes")
        address = _address_in_kernel(sock)
    except OSError as error:
        raise StartError(f"{what} is no socket that can be served: {error.strerror}") from error
    try:
        is_nameable = parse_addresses(str(address)) == (address,)
    except ValueError:
        is_nameable = False
    if not is_nameable:  # nor could a successor be told
        raise StartError(f"{what} listens on {shown(str(address))}, which -bind cannot name; let it listen elsewhere")
    return Listener(sock, address, name, is_own=False)


def _address_in_kernel(listener: socket.socket) -> Address:
    """Return where a listening socket listens, as the kernel has it. Raises OSError for a family that is not served."""
    if listener.family in {socket.AF_INET, socket.AF_INET6}:
        host, port, *more = listener.getsockname()
        if any(more):  # flow and scope: an address of one link alone
            host += f"%{more[-1]}"
        elif host == "::" and not listener.getsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY):
            host = ""
        return Address(host, port)
    if sys.platform != "win32" and listener.family == socket.AF_UNIX:
        path = os.fsdecode(listener.getsockname())
        return Address(path=f"@{path[1:]}" if path.startswith("\0") else path)
    raise OSError(errno.EAFNOSUPPORT, "only TCP and Unix sockets can")


def resolve(address: Address) -> tuple[socket.AddressFamily, tuple[str, int]]:
    """Return the family and address to bind, without asking a name server for what needs none."""
    if not address.host:
        family = socket.AF_INET6 if socket.has_dualstack_ipv6() else socket.AF_INET
        return family, ("::" if family == socket.AF_INET6 else "0.0.0.0", address.port)  # noqa: S104 - `:8080` asks for it
    if address.host == "localhost":
        return socket.AF_INET, ("127.0.0.1", address.port)
    with contextlib.suppress(OSError):  # no such literal: the tables of names, with which getaddrinfo begins, are large
        socket.inet_pton(socket.AF_INET, address.host)
        return socket.AF_INET, (address.host, address.port)
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
            if path.startswith("/"):
                _clear(path)
        listener.setblocking(False)
        if sys.platform == "linux":
            os.fchmod(listener.fileno(), _PATH_MODE)  # bind(2) makes the file with this mode, less the umask
        listener.bind(_sun_path(path))
    except BaseException:
        listener.close()
        raise
    return listener


def _clear(path: str) -> None:
    """Remove a socket on which nobody listens any more. Raises OSError where something else is there."""
    if not stat.S_ISSOCK(Path(path).lstat().st_mode):
        raise OSError(errno.EEXIST, "a file that is no socket is there; move it away, or choose another path")
    try:
        connect(Address(path=path), PEER_TIME).close()
    except ConnectionRefusedError:
        Path(path).unlink()
    except TimeoutError:
        pass  # somebody listens, and has much to do


def _sun_path(path: str) -> str:
    """Return a path as the kernel takes it: an abstract name begins with NUL (unix(7))."""
    return f"\0{path[1:]}" if path.startswith("@") else path


def _reason(address: Address, error: OSError) -> str:
    if error.errno == errno.EADDRINUSE:
        return "another process listens there; stop it, or choose another address"
    if error.errno == errno.EACCES:
        return "not permitted" + ("" if address.path else "; ports below 1024 need privileges")
    if error.errno == errno.EADDRNOTAVAIL:
        return "this machine has no such address"
    if isinstance(error, socket.gaierror):
        return "the host name is not known here"
    return error.strerror or str(error)
