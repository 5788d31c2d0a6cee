"""The request to stop: whoever waits for something else waits for it, too."""

from __future__ import annotations

import socket


class Stop:
    """Asked for once, and seen from any thread."""

    def __init__(self) -> None:
        """Begin without being asked for."""
        self._seen, self._asking = socket.socketpair()
        self.is_asked = False

    def ask(self) -> None:
        """Have all that this process waits for end."""
        self.is_asked = True
        self._asking.send(b"\0")

    def fileno(self) -> int:
        """Return the descriptor that becomes readable, and stays it, when it is asked for."""
        return self._seen.fileno()
