"""Whose process listens on an address: the kernel says so, to whoever asks.

It is asked for just the sockets that listen on the port (sock_diag(7)). Where that
is not permitted, since a unit restricts address families, or not there, its tables
say the same (proc(5), /proc/net/tcp), but only behind a walk through all that the
machine has room for: milliseconds for each.
"""

from __future__ import annotations

import contextlib
import socket
import struct
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from selfupdate.listener import PEER_TIME, connect, resolve

if TYPE_CHECKING:
    from collections.abc import Iterator

    from selfupdate.listener import Address

_UCRED = struct.Struct("=iII")
"""pid, uid, gid."""

_LISTENING = 10
"""TCP_LISTEN: in the tables, and as the number of a bit."""
_MAPPED = bytes(10) + b"\xff\xff"
"""What stands before an IPv4 address in IPv6's form (RFC 4291, section 2.5.5.2)."""

_NETLINK_SOCK_DIAG = 4
_HEADER = struct.Struct("=IHHII")
"""nlmsghdr (netlink(7)): length, type, flags, number, port."""
_BY_FAMILY, _DONE = 20, 3
"""SOCK_DIAG_BY_FAMILY, NLMSG_DONE."""
_STATUS = struct.Struct("=i")
"""What ends all answers: a number of an error, negative, or nothing of the kind."""
_ALL_THAT_MATCH = 0x301
"""NLM_F_REQUEST | NLM_F_DUMP."""
_QUESTION = struct.Struct("=BBxxI2s46x")
"""inet_diag_req_v2: family, protocol, states, port; all else is zero, which means any."""
_ANSWER = struct.Struct("=4x4x16s16x12x12xI")
"""inet_diag_msg: the address, in 16 bytes, and the uid."""
_ANSWERS_SIZE = 65536


def owners_of(address: Address) -> set[int]:
    """Return the accounts, by uid, whose processes listen on `address`: another's answers are none of a successor's.

    For a Unix socket it is whose the file is. Raises OSError.
    """
    if sys.platform == "win32":
        return set()
    if address.path:
        return _owners_of_path(address)
    family, (host, port) = resolve(address)
    ours = socket.inet_pton(family, host)
    try:
        found = [*_asked(port)]
    except (OSError, struct.error):
        found = [*_in_tables(port)]
    return {uid for place, uid in found if _overlap(ours, place)}


def _owners_of_path(address: Address) -> set[int]:
    if sys.platform == "win32":
        return set()
    try:
        if not address.path.startswith("@"):
            return {Path(address.path).stat().st_uid}
        with connect(address, PEER_TIME) as peer:  # a name without a file: the kernel knows who called listen(2)
            credentials = peer.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _UCRED.size)
    except (FileNotFoundError, ConnectionRefusedError):
        return set()
    return {_UCRED.unpack(credentials)[1]}


def _asked(port: int) -> Iterator[tuple[bytes, int]]:
    """Return the address, packed, and the uid of each socket that listens on `port`. Raises OSError."""
    if sys.platform == "win32":
        return
    for family in (socket.AF_INET, socket.AF_INET6):
        question = _QUESTION.pack(family, socket.IPPROTO_TCP, 1 << _LISTENING, port.to_bytes(2, "big"))
        with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, _NETLINK_SOCK_DIAG) as kernel:
            kernel.settimeout(PEER_TIME)
            kernel.send(_HEADER.pack(_HEADER.size + len(question), _BY_FAMILY, _ALL_THAT_MATCH, 1, 0) + question)
            is_done = False
            while not is_done:
                answers = kernel.recv(_ANSWERS_SIZE)
                while answers and not is_done:
                    length, kind, *_ = _HEADER.unpack_from(answers)
                    if kind == _BY_FAMILY:
                        place, uid = _ANSWER.unpack_from(answers, _HEADER.size)
                        yield place[: 4 if family == socket.AF_INET else 16], uid
                    elif kind != _DONE or _STATUS.unpack_from(answers, _HEADER.size)[0] < 0:
                        raise OSError("the kernel knows no sock_diag(7)")
                    is_done = kind == _DONE
                    answers = answers[length:]


def _in_tables(port: int) -> Iterator[tuple[bytes, int]]:
    """Return what `_asked` returns."""
    for table in ("tcp", "tcp6"):
        with contextlib.suppress(FileNotFoundError), Path(f"/proc/net/{table}").open(encoding="ascii") as lines:
            next(lines)  # the names of the columns
            for line in lines:
                _, local, _, state, _, _, _, uid, *_ = line.split()
                if int(state, 16) != _LISTENING:
                    break  # those that listen come first, and of the others there may be many thousands
                place, _, number = local.rpartition(":")
                if int(number, 16) == port:
                    yield _unpacked(place), int(uid)


def _unpacked(place: str) -> bytes:
    """Return an address that /proc/net/tcp shows as words of 32 bits in the machine's order."""
    words = struct.unpack(f">{len(place) // 8}I", bytes.fromhex(place))
    return struct.pack(f"={len(words)}I", *words)


def _overlap(one: bytes, other: bytes) -> bool:
    """Tell whether two addresses can be reached by the same: one of them may be every address."""
    one, other = (place.removeprefix(_MAPPED) for place in (one, other))
    return one == other or not any(one) or not any(other)
