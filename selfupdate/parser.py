"""Request lines as `http.server` reads them: all but the one form that nearly all clients send.

What it imports to read a request, a parser of mail and TLS among it, takes longer than the rest of a start.
So this module is read behind the first answers, or when it is needed first.
"""

from __future__ import annotations

import http
import http.server
import io


class Parser(http.server.BaseHTTPRequestHandler):
    """`http.server`'s parser, without its constructor, which would serve until the end."""

    protocol_version = "HTTP/1.1"

    def __init__(self, line: bytes) -> None:
        """Take a request line apart: into `command`, `path` and `request_version`, or into a `refusal`."""
        self.refusal: tuple[int, str] | None = None
        """The status, and why."""
        self.raw_requestline = line
        self.rfile = io.BytesIO(b"\r\n")  # the fields are not its business
        self.parse_request()

    def send_error(self, code: int, message: str | None = None, explain: str | None = None) -> None:
        """Refuse the line."""
        self.refusal = code, explain or message or http.HTTPStatus(code).phrase
