"""Pass a request on to the process that took over: one that arrives in the middle of a handover is not turned away."""

from __future__ import annotations

import contextlib
import http.client
import urllib.parse
from typing import TYPE_CHECKING

from selfupdate import log
from selfupdate.errors import NotNowError
from selfupdate.listener import connect
from selfupdate.messages import Response

if TYPE_CHECKING:
    import socket

    from selfupdate.listener import Address
    from selfupdate.messages import Request

_PASSED_ON = ("authorization", "content-type")
_PASSED_BACK = ("Location", "Retry-After", "WWW-Authenticate")


def relay(request: Request, address: Address, timeout: float) -> Response:
    """Return what the service at `address` answers to `request`, within `timeout` seconds.

    Whoever sent it was let in here, so what says from which page it came is left out. Raises NotNowError.
    """
    headers = {name: request.headers[name] for name in _PASSED_ON if name in request.headers}
    headers |= {"X-Request-Id": asked} if (asked := log.request_id()) else {}
    try:
        with contextlib.closing(_Connection(connect(address, timeout))) as connection:
            target = f"{request.path}?{urllib.parse.urlencode(request.query)}"
            connection.request(request.method, target, request.body, {**headers, "Connection": "close"})
            response = connection.getresponse()
            body = response.read()
    except (OSError, http.client.HTTPException):
        raise NotNowError("The service is changing its version: ask again, over a new connection.") from None
    content_type = response.headers.get("Content-Type", "application/octet-stream")
    back = {name: response.headers[name] for name in _PASSED_BACK if name in response.headers}
    return Response(response.status, body, content_type, back)


class _Connection(http.client.HTTPConnection):
    def __init__(self, connected: socket.socket) -> None:
        super().__init__("localhost")
        self.sock = connected
