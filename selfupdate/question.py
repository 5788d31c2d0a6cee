"""One question to a successor in any language, and its answer, with which the connection ends (RFC 9112, section 6.3).

`http.client` would bring a parser of mail and TLS along, and each successor would have to wait for that.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from selfupdate.head import end_of

if TYPE_CHECKING:
    from collections.abc import Mapping

ANSWER_SIZE = 65536
"""Bytes of an answer that are read; what comes behind them is not waited for."""

_STATUS = re.compile(rb"HTTP/1\.[01] ([1-5][0-9]{2})[ \r\n]")
_LENGTH = re.compile(rb"(?i)\ncontent-length:[ \t]*([0-9]{1,9})[ \t]*\r?\n")
_IS_CHUNKED = re.compile(rb"(?i)\ntransfer-encoding:[ \t]*chunked[ \t]*\r?\n")
_CHUNK = re.compile(rb"([0-9A-Fa-f]{1,8})[^\n]*\n")
_FINAL = 200
"""The first status that is no interim one."""
_WITHOUT_BODY = {204, 304}


class NoAnswerError(Exception):
    """What was received is no answer."""


def ask_for(path: str, fields: Mapping[str, str]) -> bytes:
    """Return the request for `path`."""
    lines = (f"{name}: {text}\r\n" for name, text in {"Host": "localhost", "Connection": "close", **fields}.items())
    return f"GET {path} HTTP/1.1\r\n{''.join(lines)}\r\n".encode("latin-1")


def answer_in(received: bytearray, *, has_ended: bool) -> tuple[int, bytes] | None:
    """Return the status and the body of the answer that was `received`, or None while more of it is to come.

    Raises NoAnswerError where it is none, or its end is missing.
    """
    is_all = has_ended or len(received) >= ANSWER_SIZE
    status, head, rest = 100, b"", bytes(received)
    while status < _FINAL:  # RFC 9110, section 15.2: interim answers come before
        end = end_of(rest)
        if end is None and not is_all:
            return None
        found = _STATUS.match(rest)
        if found is None or end is None:
            raise NoAnswerError("what it sent is no HTTP" if received else "it closed the connection")
        status, head, rest = int(found[1]), rest[:end], rest[end:]
    body = b"" if status in _WITHOUT_BODY else _body_in(head, rest, is_all=is_all)
    if body is None and (has_ended or len(received) >= 2 * ANSWER_SIZE):
        raise NoAnswerError("its answer was cut")
    return None if body is None else (status, body[:ANSWER_SIZE])


def _body_in(head: bytes, rest: bytes, *, is_all: bool) -> bytes | None:
    """Return the body behind `head`, or None where `rest` is not all of it."""
    if _IS_CHUNKED.search(head):
        return _join_chunks(rest)
    if length := _LENGTH.search(head):
        size = min(int(length[1]), ANSWER_SIZE)
        return rest[:size] if len(rest) >= size else None
    return rest if is_all else None


def _join_chunks(rest: bytes) -> bytes | None:
    """Return the content of chunks (RFC 9112, section 7.1), or None where the last one, of size 0, is missing."""
    body = b""
    while chunk := _CHUNK.match(rest):
        size = int(chunk[1], 16)
        body += rest[chunk.end() : chunk.end() + size]
        if not size or len(body) >= ANSWER_SIZE:
            return body
        rest = rest[chunk.end() + size :].removeprefix(b"\r").removeprefix(b"\n")
    return None
