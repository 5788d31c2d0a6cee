"""Requests and answers, as the application sees them: apart from how they travel."""

import http
import json
from collections.abc import Mapping
from types import MappingProxyType
from typing import NamedTuple, Protocol

from selfupdate.errors import SelfUpdateError

_CONTENT_SECURITY_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; "
    "form-action 'self'; base-uri 'none'; frame-ancestors 'none'"
)
SAFETY_HEADERS = (
    f"Content-Security-Policy: {_CONTENT_SECURITY_POLICY}",
    "X-Content-Type-Options: nosniff",
    "X-Frame-Options: DENY",
    "Referrer-Policy: no-referrer",
    "Cross-Origin-Opener-Policy: same-origin",
    "Cross-Origin-Resource-Policy: same-origin",
    "Cache-Control: no-store",
)
"""What every answer tells browsers: run nothing but our own files, show nothing in a frame, keep nothing."""


class Request(NamedTuple):
    """One request, complete with its body."""

    method: str
    path: str
    query: Mapping[str, str]
    headers: Mapping[str, str]
    """Names in lower case."""
    body: bytes


class Stream(Protocol):
    """A body that has no end of its own: it goes on until one of both sides leaves."""

    def more(self) -> bytes:
        """Return what there is to say now, which may be nothing, and later more."""

    def farewell(self) -> bytes:
        """Return what is said when this process serves no more."""

    def close(self) -> None:
        """Say nothing more: the client has left, or is left."""


SIGN_OF_LIFE = b":\n\n"
"""What a stream says when there has been nothing to say for a while: a comment (HTML, section 9.2.6)."""


class Response(NamedTuple):
    """One answer."""

    status: int
    body: bytes = b""
    content_type: str = "application/json"
    headers: Mapping[str, str] = MappingProxyType({})
    stream: Stream | None = None
    """In place of a body."""


def json_response(value: object, status: int = 200, **headers: str) -> Response:
    """Return an answer in JSON; `Content_Location="/x"` becomes the header `Content-Location: /x`."""
    named = {name.replace("_", "-"): text for name, text in headers.items()}
    return Response(status, json.dumps(value).encode() + b"\n", headers=named)


def refusal(status: int, error: SelfUpdateError, extra: Mapping[str, object] | None = None, **headers: str) -> Response:
    """Return an error of this program as a problem, with its code and its remedy where it has them."""
    named = {name: text for name, text in (("code", error.code), ("remedy", error.remedy)) if text}
    detail = f"{error} To mend it: {error.remedy}." if error.remedy else str(error)
    return problem(status, detail, {**named, **(extra or {})}, **headers)


def problem(status: int, detail: str, extra: Mapping[str, object] | None = None, **headers: str) -> Response:
    """Return an error as application/problem+json (RFC 9457); `detail` says what to do."""
    title = http.HTTPStatus(status).phrase
    answer = json_response({"type": "about:blank", "title": title, "status": status, "detail": detail, **(extra or {})})
    named = {name.replace("_", "-"): text for name, text in headers.items()}
    return Response(status, answer.body, "application/problem+json", named)
