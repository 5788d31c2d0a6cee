"""The service that gunicorn and waitress serve: the same answer, of the version that the working directory names."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable
    from wsgiref.types import StartResponse, WSGIEnvironment

_BODY = json.dumps({"version": Path("version").read_text(encoding="utf-8")}).encode()
_HEADERS = [("Content-Type", "application/json"), ("Content-Length", str(len(_BODY)))]


def application(_: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
    """Answer any request."""
    start_response("200 OK", _HEADERS)
    return [_BODY]
