"""What a peer is asked and answers: the version, and whether the connection goes on behind it."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import socket

REQUEST = b"GET /version HTTP/1.1\r\nHost: localhost\r\n\r\n"
LAST_REQUEST = b"GET /version HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n"

_HEAD = re.compile(rb"HTTP/1\.([01]) ([0-9]{3}) ")
_LENGTH = re.compile(rb"(?im)^content-length:[ \t]*([0-9]+)[ \t]*\r?$")
_CONNECTION = re.compile(rb"(?im)^connection:[ \t]*([^\r\n]*)")
_BODY = re.compile(rb'\{"version": ?"([^"]+)"\}\s*')


class WrongAnswerError(Exception):
    """An answer that is not the one that was asked for; the text says what it is instead."""


@dataclass(frozen=True, slots=True)
class Answer:
    """A complete answer to `GET /version`."""

    version: str
    says_end: bool
    """Whether it says that the connection ends behind it (RFC 9112, section 9.6)."""


def parse(received: bytes) -> Answer | None:
    """Read an answer; None when it is not complete yet. Raises WrongAnswerError."""
    head, end, body = received.partition(b"\r\n\r\n")
    if not end:
        return None
    first = _HEAD.match(head)
    if first is None:
        raise WrongAnswerError("no HTTP")
    minor, status = first[1], first[2].decode()
    length = _LENGTH.search(head)
    if length is None:
        raise WrongAnswerError("no length")
    if len(body) < int(length[1]):
        return None
    if status != "200":
        raise WrongAnswerError(f"status {status}")
    said = _BODY.fullmatch(body)
    if said is None:
        raise WrongAnswerError("wrong body")
    connection = _CONNECTION.search(head)
    options = connection[1].lower() if connection else b""
    says_end = b"close" in options or (minor == b"0" and b"keep-alive" not in options)
    return Answer(said[1].decode(), says_end)


def exchange(connection: socket.socket, request: bytes) -> Answer:
    """Send a request, and wait for its answer. Raises OSError or WrongAnswerError."""
    connection.sendall(request)
    received = b""
    while (answer := parse(received)) is None:
        more = connection.recv(65536)
        if not more:
            raise WrongAnswerError(f"cut after {received!r}")
        received += more
    return answer
