"""Where clients meet the service: what it listens on, which it hands over as a whole."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

    from selfupdate.listener import Address, Listener


class Frontend:
    """The listeners, and the addresses with the ports that they really have."""

    def __init__(self, binds: Sequence[Address]) -> None:
        """Begin with the addresses that are asked for, and no listener."""
        self.binds = tuple(binds)
        self.listeners: tuple[Listener, ...] = ()

    def open(self, listeners: Sequence[Listener]) -> None:
        """Be met on `listeners`, and on no others."""
        self.listeners = tuple(listeners)
        self.binds = tuple(listener.address for listener in listeners)
