"""One client's connection: collects requests, parses each, and writes its answer.

`http.server`'s parser is asked about request lines (`parser`); what nearly all clients
send is not worth asking. Its parser of fields is that of mail, and is not asked at all.
"""

from __future__ import annotations

import contextlib
import http
import logging
import re
import socket
import time
import urllib.parse
from typing import TYPE_CHECKING, Protocol

from selfupdate import log
from selfupdate.head import LONGEST_LINE, Fields, end_of, is_too_large, is_well_formed, length_of_body
from selfupdate.messages import SAFETY_HEADERS, Request, Response, problem

if TYPE_CHECKING:
    from selfupdate.messages import Stream
    from selfupdate.settings import Limits

_log = logging.getLogger(__name__)

_MAX_TARGET = 2048
_MAX_HEAD = 128 * 1024
_CHUNK = 65536
_REFUSED, _TOO_OFTEN, _FAILED = 400, 429, 500
"""Statuses: the first that refuses, one whose requests are not to fill the log, the first of the service's failures."""


class Service(Protocol):
    """What a connection needs of the server that it belongs to."""

    limits: Limits
    ends_connections: bool
    """Whether each connection is closed behind its next answer."""

    def respond(self, request: Request) -> Response:
        """Return the application's answer."""

    def is_at_hand(self, path: str) -> bool:
        """Tell whether the answer to a GET takes no time worth a thread."""

    def answers(self, method: str, path: str | None, status: int, seconds: float) -> None:
        """Tell of an answer that is about to be written."""

    def date(self) -> str:
        """Return the Date field."""


class _FramingError(Exception):
    """The end of a request can't be told: answer, and close the connection (RFC 9112, section 6)."""

    def __init__(self, status: int, detail: str) -> None:
        super().__init__(detail)
        self.status = status
        self.detail = detail


_COMMON = re.compile(rb"(GET|HEAD|POST) (/(?!/)[!-~]*|/) (HTTP/1\.[01])\r?\n")
"""The first line of nearly all requests."""
_ID = re.compile(rb"\n(?i:x-request-id):[ \t]*([!-~]{1,128})[ \t]*\r?\n")
_PHRASES = {status.value: status.phrase for status in http.HTTPStatus}
_HEAD_OF_ANSWERS = "\r\n".join(("Server: self-update", *SAFETY_HEADERS))


class Connection:
    """A client's connection: the loop collects each request until it is complete, so a slow client costs no worker."""

    def __init__(self, connection: socket.socket, server: Service) -> None:
        """Serve the client of an accepted `connection`."""
        self.connection: socket.socket = connection
        self.close_connection = True
        self._server = server
        self._fields: Fields
        self._received = bytearray()
        self._end = float("inf")
        """Where the request ends, as far as is known."""
        self._has_ended = False
        self.stream: Stream | None = None
        """What goes on being said, once its answer has begun."""
        self._unsent = b""
        """What the client has not taken of the last answer."""
        self._says_last = False
        """Whether the client said that it sends no request behind the last one."""
        self._began = 0.0
        """When the request was taken up; of `time.monotonic()`."""

    def fileno(self) -> int:
        """Return the descriptor, readable when something has arrived."""
        return self.connection.fileno()

    # The loop's part.

    def collect(self) -> bool:
        """Take what has arrived; tell whether a worker can do something about it."""
        try:
            chunk = self.connection.recv(_CHUNK)
        except BlockingIOError:
            return False
        except OSError:
            chunk = b""
        self._has_ended = not chunk
        self._received += chunk
        return self._has_ended or self.has_request()

    def has_request(self) -> bool:
        """Tell whether a request is complete, or so far gone that it must be refused."""
        while self._received.startswith(b"\r\n"):  # RFC 9112, section 2.2
            del self._received[:2]
        self._end = self._end_of_request()
        return self._end <= len(self._received) or len(self._received) > _MAX_HEAD

    def has_input(self) -> bool:
        """Tell whether something has arrived that was not collected."""
        try:
            return bool(self.connection.recv(1, socket.MSG_PEEK))
        except OSError:
            return False

    def has_left(self) -> bool:
        """Throw away what arrives where nothing is expected; tell whether the client has gone."""
        try:
            return not self.connection.recv(_CHUNK)
        except BlockingIOError:
            return False
        except OSError:
            return True

    @property
    def has_begun(self) -> bool:
        """Whether the beginning of a request has arrived."""
        return bool(self._received)

    def _end_of_request(self) -> float:
        """Return how many bytes the request has, as far as its head tells; more than any where it does not."""
        end = end_of(self._received)
        if end is None:
            return float("inf")
        return end + length_of_body(self._received[:end], self._server.limits.body_size)

    @property
    def is_over(self) -> bool:
        """Whether the client has left, and nothing is to be answered."""
        return self._has_ended and not self._received

    @property
    def ends_with_client(self) -> bool:
        """Whether the client said that it sends nothing more, and has not."""
        return self._says_last and not self._received and not self.has_input()

    def serve_at_once(self) -> bool:
        """Answer what has arrived, if that is one request whose answer is at hand; tell whether it was.

        `close_connection` says whether the connection ends with that.
        """
        found = _COMMON.match(self._received)
        if found is None or found[1] == b"POST" or not self._server.is_at_hand(found[2].decode()):
            return False
        if self._end != len(self._received):
            return False  # more has arrived, which would keep the others waiting
        try:
            self._serve_one()
        except OSError:  # the client has gone
            self.close_connection = True
        return not self._unsent

    # A worker's part.

    def serve(self) -> None:
        """Answer what has arrived, and wait for the client; `close_connection` says whether the connection ends."""
        try:
            self.connection.settimeout(self._server.limits.send_time)
            if self._unsent:
                self._unsent = self._send(self._unsent)
            else:
                self._serve_one()
            while not self.close_connection and self.has_request():
                self._serve_one()
        except OSError:  # the client has gone
            self.close_connection = True

    def _serve_one(self) -> None:
        self.close_connection = True
        self.command = self.path = self.request_version = ""
        self._began = time.monotonic()
        end = end_of(self._received)
        head = bytes(self._received[:end]) if end else b""
        given = _ID.search(head)
        log.begin_request(given[1].decode() if given else "")
        if end is None:
            self._refuse_beginning()
            return
        line = head[: head.index(b"\n") + 1]
        if len(line) > LONGEST_LINE:
            self._refuse(414)
        elif is_too_large(head):
            self._refuse(431)
        elif not is_well_formed(head):
            self._refuse(400)
        else:
            self._fields = Fields(head)
            if self._takes(line):
                del self._received[:end]
                self._answer()

    def _takes(self, line: bytes) -> bool:
        """Take the request line apart, and tell whether it is one that is answered; else it has been refused."""
        common = _COMMON.fullmatch(line)
        if common:
            self.command, self.path, self.request_version = (part.decode() for part in common.groups())
        else:
            from selfupdate.parser import Parser

            parsed = Parser(line)
            if parsed.refusal:
                self._refuse(*parsed.refusal)
                return False
            self.command, self.path, self.request_version = parsed.command, parsed.path, parsed.request_version
        if self.request_version == "HTTP/1.0":
            self._says_last = not self._fields.has_option("keep-alive")
        else:
            self._says_last = self._fields.has_option("close")
        self.close_connection = self._says_last
        return True

    def _refuse_beginning(self) -> None:
        """Answer a head that does not come to its end."""
        if self._has_ended:
            return
        if len(self._received) <= _MAX_HEAD:
            self._reject(408, "The request did not arrive in time; send it at once, and complete.")
        else:
            self._refuse(431 if b"\n" in self._received[:LONGEST_LINE] else 414)

    def _answer(self) -> None:
        keep_alive = not self.close_connection
        self.close_connection = True
        try:
            body = self._read_body()
        except _FramingError as error:
            self._reject(error.status, error.detail)
            return
        self.close_connection = not keep_alive
        path, _, query = self.path.partition("?")
        parameters = dict(urllib.parse.parse_qsl(query, keep_blank_values=True)) if query else {}
        request = Request(self.command, path, parameters, self._fields.last, body)
        self._write(self._server.respond(request), path)

    def _read_body(self) -> bytes:
        """Return the body. Raises _FramingError where its length is not certain (RFC 9112, section 6.3)."""
        self._check_head()
        length = self._length_of_body()
        if length and "expect" in self._fields.last and self.request_version != "HTTP/1.0":  # RFC 9110, section 10.1.1
            self._send(b"HTTP/1.1 100 Continue\r\n\r\n")
            self._receive(length, time.monotonic() + self._server.limits.body_time)
        if len(self._received) < length:
            if self._has_ended:
                raise ConnectionResetError("the client left in the middle of its body")
            raise _FramingError(408, "The body did not arrive in time; send it at once, and complete.")
        body = bytes(self._received[:length])
        del self._received[:length]
        return body

    def _check_head(self) -> None:
        """Refuse a head that others may read otherwise. Raises _FramingError."""
        for name in ("host", "origin"):
            if len(self._fields.all(name)) > 1:
                raise _FramingError(400, f"{name.title()} is there more than once; send it once.")
        if "host" not in self._fields.last and self.request_version != "HTTP/1.0":
            raise _FramingError(400, "Host is missing; send it.")
        if not self.path.startswith("/"):
            raise _FramingError(400, "The target must be a path; this is no proxy.")
        if len(self.path) > _MAX_TARGET:
            raise _FramingError(414, f"The target has {len(self.path)} characters; send at most {_MAX_TARGET}.")

    def _length_of_body(self) -> int:
        limit = self._server.limits.body_size
        if "transfer-encoding" in self._fields.last:
            raise _FramingError(501, "Transfer-Encoding is not taken here; send Content-Length.")
        lengths = self._fields.all("content-length") or ["0"]
        if len(lengths) > 1 or not re.fullmatch("[0-9]{1,18}", lengths[0]):
            raise _FramingError(400, "Content-Length must be one decimal number.")
        length = int(lengths[0])
        if length > limit:
            raise _FramingError(413, f"The body has {length} bytes; send at most {limit}.")
        if length and self.command in {"GET", "HEAD"}:
            raise _FramingError(400, f"{self.command} takes no body; send none.")
        return length

    def _receive(self, length: int, deadline: float) -> None:
        """Receive until `length` bytes are there, the client has ended, or `deadline` has passed."""
        while len(self._received) < length and not self._has_ended:
            self.connection.settimeout(max(0.001, deadline - time.monotonic()))
            try:
                chunk = self.connection.recv(_CHUNK)
            except TimeoutError:
                break
            self._has_ended = not chunk
            self._received += chunk
        self.connection.settimeout(self._server.limits.send_time)

    def _refuse(self, status: int, why: str | None = None) -> None:
        """Answer a head that is none."""
        self._reject(status, f"{why or http.HTTPStatus(status).phrase}; send a well-formed HTTP/1.1 request.")

    def _reject(self, status: int, detail: str) -> None:
        self.close_connection = True
        self._write(problem(status, detail))

    def _write(self, response: Response, path: str | None = None) -> None:
        self._server.answers(self.command, path, response.status, time.monotonic() - self._began)
        if self._server.ends_connections:
            self.close_connection = True
        lines = [
            f"HTTP/1.1 {response.status} {_PHRASES[response.status]}",
            _HEAD_OF_ANSWERS,
            f"Date: {self._server.date()}",
            f"Content-Type: {response.content_type}",
            f"X-Request-Id: {log.request_id()}",
        ]
        if response.stream is None:
            lines.append(f"Content-Length: {len(response.body)}")
        else:
            self.close_connection = True  # which is the end of it (RFC 9112, section 6.3)
            self.stream = response.stream
        lines += [f"{name}: {value}" for name, value in response.headers.items()]
        if self.close_connection:
            lines.append("Connection: close")
        elif self.request_version == "HTTP/1.0":
            lines.append("Connection: keep-alive")
        head = "\r\n".join([*lines, "", ""]).encode("latin-1")
        try:
            self._unsent = self._send(head if self.command == "HEAD" else head + response.body)
        finally:
            self._note(response.status)
        if self.command == "HEAD":
            self.close_stream()

    def _note(self, status: int) -> None:
        """Log that a request was answered, at a level by how much that says: most lines are never written."""
        level = logging.WARNING if status >= _FAILED else logging.INFO
        if status == _TOO_OFTEN or (status < _REFUSED and self.command != "POST"):
            level = logging.DEBUG
        if _log.isEnabledFor(level):
            path = self.path.partition("?")[0][:_MAX_TARGET]
            took = round(time.monotonic() - self._began, 6)
            said = {"method": self.command, "path": path, "status": status, "seconds": took}
            _log.log(level, "answered", extra=said)

    def _send(self, text: bytes) -> bytes:
        """Send `text`; return what the client does not take at once, where that is not to be waited for.

        A worker waits, and its socket with it; one that is the loop's does not block.
        """
        if self.connection.gettimeout() == 0:
            with contextlib.suppress(BlockingIOError):
                return text[self.connection.send(text) :]
            return text
        self.connection.sendall(text)
        return b""

    # The loop's part again.

    def close_stream(self) -> None:
        """Say nothing more."""
        if self.stream is not None:
            self.stream.close()
            self.stream = None

    def close(self) -> None:
        """End the connection."""
        self.close_stream()
        self.connection.close()
