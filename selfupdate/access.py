"""Who may ask: by which name, from which page, and with which token.

The order in which a request is checked: its framing (`connection`), the name that
it calls the service by, its route and method (`app`), the page that it comes from,
its token; and only then does anything act.
"""

from __future__ import annotations

import functools
import ipaddress
import logging
import re
import threading
import time
from collections import deque
from typing import TYPE_CHECKING

from selfupdate import permissions
from selfupdate.errors import StartError
from selfupdate.messages import problem

if TYPE_CHECKING:
    from collections.abc import Collection
    from pathlib import Path

    from selfupdate.messages import Request, Response

_log = logging.getLogger(__name__)

_FAILURES = 10
"""Wrong tokens in a minute that are answered by 401, and logged; more get 429."""
_LONGEST_ADDRESS = 64
"""Characters of an address of IPv6 with its brackets and a zone."""
_PORT = re.compile(":[0-9]*$")
_MAX_FILE = 4096


def goes_by(host: str | None, names: Collection[str]) -> bool:
    """Tell whether a client may call the service `host`: a page of another site that resolves to us may not.

    An address can't be rebound to another machine; a name can (DNS rebinding). HTTP/1.0 has no Host.
    """
    if host is None:
        return True
    name = _PORT.sub("", host.lower())
    if name == "localhost" or name in names:
        return bool(name)
    return len(name) <= _LONGEST_ADDRESS and _is_ip_address(name)


@functools.lru_cache(1024)
def _is_ip_address(host: str) -> bool:
    try:
        ipaddress.ip_address(host[1:-1] if re.fullmatch(r"\[.*\]", host) else host)
    except ValueError:
        return False
    return True


def is_from_here(request: Request) -> bool:
    """Tell whether a state-changing request is no browser's, or our own page's."""
    site = request.headers.get("sec-fetch-site")
    if site is not None:
        return site in {"same-origin", "none"}
    origin = request.headers.get("origin")
    return origin is None or re.sub("^https?://", "", origin) == request.headers.get("host")


def read_token(path: Path) -> str:
    """Return the token in a file that nobody else may read. Raises StartError."""
    try:
        permissions.check(path, is_secret=True)
        with path.open("rb") as file:
            token = file.read(_MAX_FILE).decode("ascii").strip()
    except permissions.UnsafeError as error:
        raise StartError(f"the token file {error}; {error.remedy}") from None
    except OSError as error:
        raise StartError(f"the token file {path} cannot be read: {error.strerror}") from None
    except UnicodeDecodeError:
        token = ""
    if not re.fullmatch("[!-~]{16,512}", token):
        raise StartError(
            f"the token file {path} does not hold one token of 16 to 512 printable ASCII characters; "
            f"make one: (umask 077; python3 -c 'import secrets; print(secrets.token_urlsafe())' > {path})"
        )
    return token


class Gate:
    """Lets those pass who bear the token (RFC 6750); everybody, where there is none."""

    def __init__(self, token: str | None) -> None:
        """Keep the token's digest: what is compared has one length, and takes one time."""
        self._digest = _digest(token.encode()) if token is not None else None
        self._failures: deque[float] = deque(maxlen=_FAILURES)
        self._lock = threading.Lock()

    def refuse(self, request: Request) -> Response | None:
        """Return the answer for a request that may not pass, or None."""
        if self._digest is None:
            return None
        import hmac  # which a start need not wait for

        scheme, _, token = request.headers.get("authorization", "").partition(" ")
        if scheme.lower() == "bearer" and hmac.compare_digest(_digest(token.encode("latin-1")), self._digest):
            return None
        now = time.monotonic()
        with self._lock:
            if len(self._failures) == _FAILURES and self._failures[0] > now - 60:
                return problem(429, "Too many wrong tokens; wait a minute.", Retry_After="60")
            self._failures.append(now)
        _log.warning("a request had no token, or a wrong one", extra={"method": request.method, "path": request.path})
        return problem(401, "This request needs the service's token.", WWW_Authenticate="Bearer")


def _digest(token: bytes) -> bytes:
    import hashlib  # as hmac

    return hashlib.sha256(token).digest()
